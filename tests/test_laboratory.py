"""The laboratory: every row trains, a table that is stopped goes on, what breaks is named, and nothing looks at the val split early."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch

from dino_edu.core import seed_everything
from dino_edu.data import load
from dino_edu.laboratory import Job, find, forecast, hold_out, plan, read_rows, run_jobs, run_row, run_table
from dino_edu.recipe import imagenette_cpu, method, override, shapes_lab
from dino_edu.rows import KNOBS, Row, tables, trials
from dino_edu.train import batches, optimizer, train

TINY = override(shapes_lab(), data="shapes:100", steps=3, evaluations=1, log_every=1, batch=8, patch_size=8, n_local=2,
                out_dim=64, hidden=32, bottleneck=16, queue=32)
EVERY_ROW = {f"{table}-{name}": row for table, rows in tables(TINY).items() for name, row in rows.items()}
EVERY_ROW |= {name: row for known in KNOBS for name, row in trials(TINY, known).items()}


@pytest.fixture(scope="module")
def pictures():
    return load("shapes", n=64)[0]


@pytest.mark.parametrize("name", EVERY_ROW)
def test_every_row_trains(name, pictures):
    "Three steps: the loss is a number, the student moves, and whatever is to be scored can be."
    recipe = override(TINY, average=True, **EVERY_ROW[name].changes)
    seed_everything(0)
    model = method(recipe)
    before = [p.detach().clone() for p in model.student.parameters()]
    losses = [step.loss for step in train(model, batches(pictures, recipe), recipe, 3, optimizer(model, recipe))]
    assert torch.isfinite(torch.stack(losses)).all()
    moved = [not torch.equal(p, old) for p, old in zip(model.student.parameters(), before) if p.requires_grad]
    assert sum(moved) > 0.8 * len(moved)
    averaged = model.encoders().get("ema") or (model.encoders()["teacher"] if model.teacher.kind == "momentum" else None)
    assert averaged is not None and {"teacher", "student"} <= model.encoders().keys()


def test_the_average_of_a_student_copy_is_that_of_a_momentum_teacher(pictures):
    "Where the student does not depend on it, the average for evaluation is what `Teacher` would keep."
    recipe = override(TINY, teacher="student_copy", average=True, momentum=0.9, momentum_end=0.9)
    model, student = method(recipe), []
    by_hand = [p.detach().clone() for p in model.student.encoder.parameters()]
    for _ in train(model, batches(pictures, recipe), recipe, 3, optimizer(model, recipe)):
        student = [p.detach().clone() for p in model.student.encoder.parameters()]
        by_hand = [0.9 * old + 0.1 * new for old, new in zip(by_hand, student)]
    for p, expected in zip(model.encoders()["ema"].parameters(), by_hand):
        assert torch.allclose(p, expected, atol=1e-6)
    assert "ema" not in method(override(recipe, teacher="momentum")).encoders()


def test_an_average_has_the_statistics_of_its_student(pictures):
    "A convolutional encoder's BatchNorm: the average never sees a batch, so it takes over the student's running means."
    recipe = override(TINY, encoder="resnet18", teacher="student_copy", average=True)
    model = method(recipe)
    list(train(model, batches(pictures, recipe), recipe, 2, optimizer(model, recipe)))
    mine, its = model.encoders()["ema"].state_dict(), model.student.encoder.state_dict()
    means = [name for name in mine if name.endswith("running_mean")]
    assert means and all(torch.equal(mine[name], its[name]) and its[name].abs().sum() > 0 for name in means)


def test_labels_are_asked_for(pictures):
    recipe = override(TINY, loss="labels")
    unlabelled = type(pictures).stack(torch.zeros(16, 3, 48, 48, dtype=torch.uint8))
    model = method(recipe)
    with pytest.raises(ValueError, match="labelled pictures"):
        next(train(model, batches(unlabelled, recipe), recipe, 1, optimizer(model, recipe)))
    with pytest.raises(ValueError, match="no labels"):
        hold_out(unlabelled)


def test_labels_teach(pictures):
    "Sixty steps on 64 pictures: the supervised rival knows most of them."
    recipe = override(TINY, loss="labels", batch=32, lr=0.02, weight_decay=0, weight_decay_end=0)
    seed_everything(0)
    model = method(recipe)
    losses = [step.loss.item() for step in train(model, batches(pictures, recipe), recipe, 60, optimizer(model, recipe))]
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_rows_of_one_seed_start_alike():
    "Paired: the encoder's first weights are those of every other row, whatever its head, loss and teacher."
    starts = []
    for name in ("dino", "byol", "mocov2", "swav", "predictor"):
        seed_everything(5)
        starts.append(method(override(TINY, **tables(TINY)["component"][name].changes)).student.encoder.state_dict())
    assert all(torch.equal(a, b) for other in starts[1:] for a, b in zip(starts[0].values(), other.values()))


def test_the_val_split_is_scored_once(tmp_path, monkeypatch):
    "Every evaluation during the run looks at held-out pictures; val is judged after the last step, once (and before the first, untrained)."
    import dino_edu.laboratory
    asked, judged = [], []
    original, judge = dino_edu.laboratory.fit, dino_edu.laboratory.judge

    def watched(recipe, train, held, *rest, **more):
        asked.append((train, held))
        return original(recipe, train, held, *rest, **more)

    def counted(encoders, train, val, *rest):
        judged.append((len(asked), val.name))
        return judge(encoders, train, val, *rest)
    monkeypatch.setattr(dino_edu.laboratory, "fit", watched)
    monkeypatch.setattr(dino_edu.laboratory, "judge", counted)
    result = run_row(TINY, 1, tmp_path)
    (learnt, held), = asked
    assert judged == [(1, "shapes val")]   # after fit
    assert held.name == "shapes train" and len(held) == 20 and len(learnt) == 80
    assert result["n_val"] == 20 and {"held_knn_teacher", "knn_teacher", "knn_untrained"} <= result["metrics"].keys()


def test_a_lost_loss_is_a_result(tmp_path):
    result = run_row(override(TINY, lr=1e30, clip=None, optimizer="sgd"), 1, tmp_path)
    assert "loss of step" in result["failed"] and "knn_untrained" in result["metrics"] and "knn_teacher" not in result["metrics"]
    json.dumps(result)


def test_every_run_of_table_b_is_another(tmp_path):
    jobs = [job for known in KNOBS for job in plan(TINY, "tuning", trials(TINY, known), (1,), tmp_path)]
    assert len({job.folder for job in jobs}) == 48


def test_another_base_has_other_folders(tmp_path):
    rows = dict(dino=Row({}))
    one, two = (plan(base, "component", rows, (1,), tmp_path)[0].folder for base in (TINY, override(TINY, steps=4)))
    three = plan(override(TINY, log_every=2, evaluations=2), "component", rows, (1,), tmp_path)[0].folder
    assert one != two and one == three


def test_runs_are_found_wherever_the_pictures_lie():
    there = override(TINY, data="/one/set.tar")
    line = dict(table="teacher", seed=1, recipe=json.loads(json.dumps(asdict(there) | dict(data="set.tar"))))
    assert find([line], override(TINY, data="/another/set.tar"), 1) == [line]
    assert not find([line | dict(table="bench")], there, 1)


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"table": 1}\n{"tab\n')
    with pytest.raises(ValueError, match="line 2 of .*rows.jsonl"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_run_that_breaks_is_named_and_the_others_are_kept(tmp_path):
    "An encoder that does not exist breaks in its process; the row beside it is recorded, and asked again only the broken one runs."
    rows, said = dict(dino=Row({}), odd=Row(dict(encoder="no_such_net"))), []
    with pytest.raises(ValueError, match=r"(?s)1 of 2 runs broke.*odd, seed 1 ended with status 1.*no_such_net"):
        run_table(TINY, "shapes_lab", "component", rows, (1,), tmp_path, tmp_path / "runs", slots=2, device="cpu", say=said.append)
    lines = read_rows(tmp_path / "rows.jsonl")
    assert [line["row"] for line in lines] == ["dino"] and lines[0]["memory_mib"] > 0 and lines[0]["curves"]["loss"]
    assert not list((tmp_path / "runs").rglob("*.pt"))
    assert run_table(TINY, "shapes_lab", "component", dict(dino=Row({})), (1,), tmp_path, tmp_path / "runs", say=said.append) == lines
    assert "1 of them finished before" in said[-1]


def test_jobs_that_are_left_are_told_to_stop(tmp_path):
    jobs = plan(override(TINY, steps=100_000), "component", dict(dino=Row({})), (1,), tmp_path)
    assert isinstance(jobs[0], Job)
    running = run_jobs([*plan(TINY, "component", dict(dino=Row({})), (1,), tmp_path), *jobs], slots=2, device="cpu")
    assert next(running)[0].recipe.steps == 3
    wait_for(lambda: (jobs[0].folder / "log.jsonl").exists())
    running.close()
    assert (jobs[0].folder / "last.pt").exists() and not (jobs[0].folder / "result.json").exists()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


def command(out, *words):
    words = ["ablate", "component", "--rows", "dino", "no_momentum", "--data", "shapes:100", "--steps", "40", "--seeds", "1",
             "--out", str(out), "--runs", str(out / "runs"), "--jobs", "2", "--device", "cpu", *words]
    return subprocess.Popen([sys.executable, "-m", "dino_edu.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1"))


def test_a_table_that_is_stopped_goes_on(tmp_path):
    "SIGTERM in mid-run: status 143, both checkpoints written; the same command ends at the rows of an undisturbed one."
    first = command(tmp_path / "stopped")
    logs = tmp_path / "stopped" / "runs"
    wait_for(lambda: len([log for log in logs.rglob("log.jsonl") if '"i": 10,' in log.read_text()]) == 2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 143 and "the same command goes on from there" in first.stderr.read()
    assert len(list(logs.rglob("last.pt"))) == 2 and not read_rows(tmp_path / "stopped" / "rows.jsonl")
    for out in (tmp_path / "stopped", tmp_path / "straight"):
        done = command(out)
        assert done.wait(300) == 0, done.stderr.read()
        text = done.stdout.read()
        assert "2 of 2" in text and str(out / "component.md") in text and (out / "component.png").exists()
    one, other = ({line["row"]: line["metrics"] for line in read_rows(tmp_path / name / "rows.jsonl")} for name in ("stopped", "straight"))
    assert one == other and one.keys() == {"dino", "no_momentum"}


def test_a_forecast_counts_and_measures():
    text = forecast(TINY, dict(dino=Row({})), (1, 2))
    assert "1 rows (dino) with seeds [1, 2]" in text and "images/s" in text


@pytest.mark.parametrize("preset", [shapes_lab, imagenette_cpu])
def test_two_view_rows_have_the_wide_range(preset):
    for rows in tables(preset()).values():
        for row in rows.values():
            recipe = override(preset(), **row.changes)
            patchwise = recipe.loss == "features"   # its views are to be predicted patch by patch: the base's range, as the rows say
            assert recipe.n_local > 0 or patchwise or recipe.global_scale == (0.14, 1.0)
