"""Tables and figures from lines of results: statistics against literal transcriptions, partial and failed runs, the choice of table B."""
import copy
import json
import math

import pytest
from dino_edu import ablate
from dino_edu.ablate import (Difference, accuracy_markdown, agreement, choose, cost_markdown, difference, lead, notes, of_table, paired, per_seed,
                             plot_lead, plot_rows, reference_of, run_tuned, sentence, table_markdown, write)
from dino_edu.recipe import Recipe, override, shapes_lab
from dino_edu.rows import KNOBS, Row, component, corners, refresh, tables, teacher, trials, without_bn

BASE = shapes_lab()
SIGNS = dict(collapse_index=.33, mean_entropy_share=.83, entropy_share=.49, target_spread=.9, rank_teacher=15., spread_teacher=.1)


def line(row, seed, knn=50., table="component", changes=None, **more):
    "A line as `run_row` and `record` leave it."
    recipe = override(BASE, average=True, **(changes or {}))
    kinds = ("knn_teacher", "knn_student", "knn_ema", "knn200_teacher", "linear_teacher", "held_knn_teacher", "held_knn_student", "held_knn_best")
    metrics = dict(knn_untrained=26., knn_pixels=31., **{kind: knn for kind in kinds}, **SIGNS)
    made = dict(table=table, row=row, base="shapes_lab", seed=seed, overrides=changes or {}, recipe=vars(recipe), commit="0123456789", data="shapes train",
                device="cpu", seconds=140.4, images_per_second=171., metrics=metrics, memory_mib=1072., n_val=1200)
    return json.loads(json.dumps(made | more))


def lost(row, seed, **more):
    "A line of a run whose loss was no number any more."
    made = line(row, seed, failed="the loss is nan at step 7", **more) | dict(seconds=None, images_per_second=None, metrics=dict(knn_untrained=26., knn_pixels=31.))
    return {key: value for key, value in made.items() if key not in ("memory_mib", "n_val")}


# Statistics

@pytest.mark.parametrize("values, t", [([1., 2., 3., 4., 5.], 2.7764), ([3., -1.], 12.7062), ([.5, .1, -.2, .4], 3.1824)])
def test_t_interval_as_in_a_printed_table(values, t):
    mean = sum(values) / len(values)
    s = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
    found = difference(values)
    assert found.mean == pytest.approx(mean) and found.pairs == len(values)
    assert found.low == pytest.approx(mean - t * s / math.sqrt(len(values)), abs=1e-3)
    assert found.high == pytest.approx(mean + t * s / math.sqrt(len(values)), abs=1e-3)


@pytest.mark.parametrize("values, word", [([1., 2., 3., 4., 5.], "above"), ([-1., -2., -3., -4., -5.], "below"), ([3., -1.], "not told apart"), ([9.], "one seed"),
                                          ([2., 2.], "above"), ([0., 0.], "not told apart")])
def test_a_word_is_no_stronger_than_its_interval(values, word):
    found = difference(values)
    assert found.word == word and word in str(found)
    assert difference([]) is None


def test_an_interval_that_touches_0_is_no_result():
    assert Difference(1., 0., 2., 5).word == Difference(-1., -2., 0., 5).word == "not told apart"


def test_unpaired_seeds_are_left_out_and_counted():
    lines = [line("dino", seed, 60. + seed) for seed in (1, 2, 3)] + [line("mse", seed, 50. + 2 * seed) for seed in (2, 3, 4)] + [lost("mse", 1)]
    found = paired(lines, "mse", "dino")
    assert found.mean == pytest.approx((54 - 62 + 56 - 63) / 2) and found.pairs == 2 and found.left_out == 2   # 4 has no dino, 1 was lost
    assert str(found).endswith(", 2 left out")
    assert paired(lines, "byol", "dino") is None and sentence(None, "byol", "dino") == "byol and dino share no seed."
    assert per_seed(lines, "mse", "knn_teacher") == {2: 54., 3: 56., 4: 58.}


def test_a_metric_that_is_no_number_is_not_there():
    lines = [line("dino", 1), line("dino", 2, math.nan), line("mse", 1, 40.), line("mse", 2, 41.)]
    found = paired(lines, "mse", "dino")
    assert (found.mean, found.low, found.pairs, found.left_out) == (-10., None, 1, 1)
    assert "one seed" in sentence(found, "mse", "dino")


def test_teacher_and_student_of_one_row_can_be_compared():
    lines = [line("dino", seed) for seed in (1, 2, 3)]
    for each, points in zip(lines, (1., 2., 3.)):
        each["metrics"]["knn_student"] = 50. - points
    found = paired(lines, "dino", "dino", "knn_teacher", "knn_student")
    assert found.mean == 2 and found.pairs == 3 and found.left_out == 0
    assert sentence(found, "teacher", "student").startswith("teacher and student are not told apart: +2.0 points (95 % interval -0.5 to +4.5, 3 seeds)")


def tau_b(x, y):
    "Kendall's tau-b by its definition."
    n, concordant, discordant, only_x, only_y = len(x), 0, 0, 0, 0
    for i in range(n):
        for j in range(i + 1, n):
            if x[i] == x[j] or y[i] == y[j]:
                only_x += x[i] == x[j] and y[i] != y[j]
                only_y += y[i] == y[j] and x[i] != x[j]
            elif (x[i] < x[j]) == (y[i] < y[j]):
                concordant += 1
            else:
                discordant += 1
    both = concordant + discordant
    return (concordant - discordant) / math.sqrt((both + only_x) * (both + only_y))


@pytest.mark.parametrize("ours", [[67., 23., 69., 51., 30., 16., 25., 24., 53.], [60., 20., 60., 20., 30., 30., 10., 20., 20.]])
def test_agreement_is_tau_b(ours):
    rows = component()
    lines = [line(name, seed, value + (seed - 1)) for name, value in zip(rows, ours) for seed in (0, 1, 2)]   # the mean is the value
    tau, n = agreement(lines, rows)
    assert n == 9 and tau == pytest.approx(tau_b(ours, [row.knn for row in rows.values()]))
    assert agreement(lines, rows, "linear_teacher", "linear")[0] == pytest.approx(tau_b(ours, [row.linear for row in rows.values()]))


def test_agreement_without_an_order():
    assert agreement([], component()) == (None, 0)
    assert agreement([line("dino", 1)], component()) == (None, 1)
    assert agreement([line("dino", 1), line("mse", 1)], component()) == (None, 2)   # ours are tied


# Which lines

def test_a_run_is_found_by_its_recipe():
    lines = [line("no_momentum", 1, changes=dict(teacher="student_copy")), line("dino", 1), line("dino", 1, 99.), line("dino", 2),
             line("dino", 3, changes=dict(lr=.1)), line("dino", 4, table="real")]
    found = of_table(lines, BASE, "teacher", teacher())
    assert sorted((each["row"], each["seed"]) for each in found) == [("momentum", 1), ("momentum", 2), ("student_copy", 1)]
    assert {each["table"] for each in found} == {"teacher"} and all(each["metrics"]["knn_teacher"] == 50. for each in found)
    assert [each["row"] for each in of_table(lines, BASE, "refresh", refresh())] == ["every_1"]


def test_a_table_of_its_own_borrows_its_own_seeds_only():
    "Seeds that other tables were tuned on do not slip in."
    lines = [line("momentum", seed, table="teacher") for seed in (100, 101)] + [line("no_momentum", seed, changes=dict(teacher="student_copy")) for seed in (1, 100)]
    assert sorted((each["row"], each["seed"]) for each in of_table(lines, BASE, "teacher", teacher())) == [("momentum", 100), ("momentum", 101), ("student_copy", 100)]


def test_reference():
    assert {name: reference_of(rows) for name, rows in tables(BASE).items() if name in ("component", "teacher", "teacher_no_bn", "collapse_no_bn", "refresh", "center_momentum")} == dict(
        component="dino", teacher="momentum", teacher_no_bn="momentum_no_bn", collapse_no_bn="both_no_bn", refresh="every_1", center_momentum="0.9")


# Tables and figures

LINES = [line(name, seed, 50. + i + seed) for i, name in enumerate(component()) for seed in (1, 2, 3) if (name, seed) != ("swav", 3)] + [lost("swav", 3)]


def cells(text, row):
    "The cells of one row of a Markdown table."
    return next([cell.strip() for cell in part.strip("| ").split("|")] for part in text.splitlines() if part.startswith(f"| {row} |"))


def test_accuracy():
    text = accuracy_markdown(LINES, component(), "dino")
    assert cells(text, "mse") == ["mse", "52.6", "62.4", "**56.0 ± 1.0**", "+4.0 [+4.0, +4.0] above", *["56.0 ± 1.0"] * 4]
    assert cells(text, "dino")[4] == "reference" and cells(text, "swav")[4] == "+8.0 [+8.0, +8.0] above, 1 left out"


def test_cost_and_collapse():
    lines = copy.deepcopy(LINES)
    lines[3]["metrics"] |= dict(entropy_share=.99, collapse_index=.01)   # no_momentum, seed 1
    text = cost_markdown(lines, component())
    assert cells(text, "dino") == ["dino", "3", "0", "none 3", "0.33 ± 0.00", "0.90 ± 0.00", "15.0 ± 0.0", "52.0 ± 1.0", "52.0 ± 1.0", "171", "1072", "140"]
    assert cells(text, "no_momentum")[3] == "none 2, uniform 1" and cells(text, "swav")[1:4] == ["3", "1", "none 2"]


def test_notes():
    said = "\n".join(notes(LINES, component(), "dino"))
    error = math.sqrt(52 * 48 / 1200)
    for words in (f"1,200 test pictures: ± {error:.1f} points", "Untrained network: 26.0 %; raw pixels: 31.0 %", "tau-b with the paper's order, k-NN: ", "over 9 rows",
                  "Base shapes_lab; pictures: shapes train; cpu; seeds 1, 2, 3; commit 01234567.", "swav, seed 3, was lost: the loss is nan at step 7.",
                  *(row.unlike for row in component().values())):
        assert words in said
    assert notes(LINES, teacher(), "momentum") == ["No run of this table is finished."]
    assert "commit unknown" in notes([line("dino", 1, commit=None)], component(), "dino")[0]
    assert "commit 01234567+" in notes([line("dino", 1, commit="0123456789+")], component(), "dino")[0]


@pytest.mark.parametrize("lines", [[], LINES[:1], LINES[1:7], [lost("dino", 1), line("mse", 1)], LINES], ids=["none", "one", "few", "lost", "all"])
@pytest.mark.parametrize("rows", [component(), teacher(), without_bn(corners(BASE)), tables(BASE)["crops"]], ids=["component", "teacher", "collapse", "crops"])
def test_any_subset_is_shown(lines, rows, tmp_path):
    text = table_markdown(lines, rows)
    assert text.count("\n| ") + 1 == 2 * (len(rows) + 2) and "nan" not in text.replace("the loss is nan", "")
    paths = write(tmp_path, "a_table", lines, rows)
    assert sorted(tmp_path.iterdir()) == sorted(paths)   # nothing half-written beside them
    assert text in paths[0].read_text(encoding="utf-8") and paths[1].read_bytes().startswith(b"\x89PNG")
    assert len(plot_rows(lines, rows).axes) == (1 if "both_no_bn" in rows else 2)
    assert plot_lead(lines, rows).axes


def test_writing_keeps_the_old_table_if_it_fails(tmp_path, monkeypatch):
    old = [path.read_bytes() for path in write(tmp_path, "component", LINES, component())]
    monkeypatch.setattr(ablate, "plot_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, "component", LINES[:2], component())
    assert [(tmp_path / f"component.{kind}").read_bytes() for kind in ("md", "png")] == old and len(list(tmp_path.iterdir())) == 2


def test_a_figure_holds_every_seed_and_the_papers_numbers():
    here, paper = plot_rows(LINES, component()).axes
    dots = [y for drawn in here.get_lines() if drawn.get_marker() == "o" for y in drawn.get_xdata()]
    assert sorted(dots) == sorted(each["metrics"]["knn_teacher"] for each in LINES if "failed" not in each)
    assert [drawn.get_xdata()[0] for drawn in paper.get_lines()] == [row.knn for row in component().values()]
    assert {drawn.get_label() for drawn in here.get_lines()} >= {"untrained network, 26 %", "raw pixels, 31 %"}


def test_lead():
    watched = dict(curves=dict(knn_teacher=[[300, 30.], [600, 40.], [900, 50.]], knn_student=[[300, 28.], [900, 51.]]))
    assert lead(watched) == [(300, 2.), (900, -1.)] and lead({}) == [] and lead(dict(curves={})) == []
    two = [line("dino", 1, **watched), line("dino", 2, curves=dict(knn_teacher=[[300, 30.]], knn_student=[[300, 26.]])), line("mse", 1)]
    panels = [axes for axes in plot_lead(two, component()).axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["dino"]
    mean = next(drawn for drawn in panels[0].get_lines() if drawn.get_marker() == "o")
    assert list(zip(*mean.get_data())) == [(300, 3.), (900, -1.)]


# Table B

def tried(method, seeds=(99,)):
    "Twelve trials; the one in the middle is the best on held-out pictures, the last one on val."
    return [line(name, seed, float(i), "tuning", changes=row.changes) | dict(metrics=dict(
                held_knn_teacher=50. - abs(i - 6), held_knn_student=50. - abs(i - 4), held_knn_ema=float(i), knn_teacher=float(i), knn_student=float(i)))
            for i, (name, row) in enumerate(trials(BASE, method).items()) for seed in seeds]


@pytest.mark.parametrize("method", KNOBS)
def test_the_choice_is_the_best_on_held_out_pictures(method):
    best = list(trials(BASE, method).values())[4 if method == "swav" else 6].changes   # swav's teacher is a copy of its student
    assert override(BASE, **choose(tried(method), method)) == override(BASE, **best)
    others = [each for other in KNOBS for each in tried(other)]
    assert choose(others + LINES, method) == choose(tried(method, (98, 99)), method) == choose(tried(method), method)


def test_the_choice_never_looks_at_val():
    lines = tried("dino")
    chosen = choose(lines, "dino")
    for i, each in enumerate(lines):
        each["metrics"] |= {name: 1000. * (-1) ** i for name in each["metrics"] if not name.startswith("held_")}
    assert choose(lines, "dino") == chosen
    for each in lines:
        each["metrics"] = {name: value for name, value in each["metrics"].items() if name.startswith("held_")}
    assert choose(lines, "dino") == chosen


def test_a_lost_trial_is_worse_than_any():
    lines = tried("dino", (98, 99))
    for each in lines:
        if each["row"] == "dino_1_0":   # the best; one of its two seeds is lost
            each |= dict(failed="the loss is nan") if each["seed"] == 98 else {}
    assert choose(lines, "dino") == trials(BASE, "dino")["dino_0.5_2"].changes   # of two as good, the first
    for each in lines:
        each["failed"] = "the loss is nan"
    with pytest.raises(ValueError, match="every trial of dino was lost"):
        choose(lines, "dino")


def test_a_method_with_fewer_trials_is_refused():
    with pytest.raises(ValueError, match="dino: 1 of 12 trials are missing, or not there with every seed: dino_2_2"):
        choose(tried("dino")[:-1], "dino")
    with pytest.raises(ValueError, match="1 of 12"):
        choose(tried("dino", (98, 99))[1:], "dino")
    with pytest.raises(ValueError, match="12 of 12"):
        choose([], "dino")


def test_table_b_tries_then_runs(monkeypatch, tmp_path):
    calls = []

    def run_table(base, preset, table, rows, seeds, out, **places):
        calls.append((table, list(rows), list(seeds), places))
        if table == "tuning":
            return tried(next(iter(rows)).split("_")[0])
        return [line(name, seed, table=table, changes=row.changes) for name, row in rows.items() for seed in seeds]

    monkeypatch.setattr(ablate, "run_table", run_table)
    rows = {name: component()[name] for name in KNOBS}
    lines = run_tuned(BASE, "shapes_lab", "tuned", rows, (100, 101), tmp_path, slots=2)
    assert [(table, len(rows), seeds) for table, rows, seeds, _ in calls] == [*[("tuning", 12, [99])] * 4, ("tuned", 4, [100, 101])]
    assert all(places == dict(slots=2) for *_, places in calls) and len(lines) == 8
    assert override(Recipe(), **{**lines[0]["overrides"]}) == override(Recipe(), **choose(tried("dino"), "dino"))
    assert table_markdown(lines, rows)
    with pytest.raises(ValueError, match="seed 99 is that of the trials"):
        run_tuned(BASE, "shapes_lab", "tuned", rows, (99, 100), tmp_path)


def test_a_row_says_what_the_paper_measured():
    assert accuracy_markdown([], {"10": Row({}, None, 74.6)}, "10").splitlines()[-1] == "| 10 | – | 74.6 | **–** | reference | – | – | – | – |"
