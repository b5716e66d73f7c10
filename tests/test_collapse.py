"""Every diagnosis on a run that was really made ill, none on healthy runs, and words for whatever a log may hold."""
import json
import math

import pytest
import torch

import dino_edu.fit as fit_module
from dino_edu.collapse import ILLNESSES, Finding, Illness, diagnose, explore, live, patient, plot_course, watch
from dino_edu.data import load
from dino_edu.fit import fit
from dino_edu.methods import METHODS
from dino_edu.recipe import method, override

TWO = dict(n_local=0, global_scale=(0.5, 1.0))
SHARP = dict(teacher_temperature=0.02, warmup_teacher_temperature=0.02)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Small products are faster on one thread than on two."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures():
    return load("shapes", n=500)[0]


def course(pictures, name, seed, **changes):
    "Findings of a run that has an illness, or none."
    illness = ILLNESSES.get(name, Illness())
    lines, error = watch(patient(**changes), pictures, seed, illness)
    return diagnose(lines, override(patient(**changes), **illness.changes), error)


def names(findings):
    return {finding.name for finding in findings}


EXPECTED = {
    "temperature .08": ({"uniform"}, "teacher_temperature 0.08"),
    "no sharpening": ({"uniform"}, "no sharper than the student's own answers"),
    "no centering": ({"dominated", "few"}, "center_momentum 1"),
    "center momentum .999": ({"dominated", "few"}, "center_momentum 0.999"),
    "learning rate x 30": ({"collapsed", "uniform"}, "learning rate is high"),
    "aliased teacher": ({"swinging", "collapsed"}, "not the student itself"),
    "no stop-gradient": ({"swinging", "collapsed"}, "no gradient flows through"),
    "different pictures paired": ({"collapsed", "uniform"}, "show the same picture"),
    "float16 overflow": ({"lost"}, "precision 'fp32'"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_illness(name, pictures):
    "A seed that is not the notebook's: the kind is right, and the words say what to look at."
    kinds, words = EXPECTED[name]
    found = course(pictures, name, seed=1)
    assert names(found) & kinds
    assert any(words in str(finding) for finding in found)


def test_two_prototypes_are_nearly_one(pictures):
    "Without a centre, by one seed: two answers are left, which is no collapse by the index."
    lines, error = watch(patient(), pictures, 3, ILLNESSES["no centering"])
    few = [line | dict(prototypes_used=2 / 64, mean_entropy_share=0.17, entropy_share=0.03, collapse_index=0.13) if "collapse_index" in line else line for line in lines]
    recipe = override(patient(), **ILLNESSES["no centering"].changes)
    finding, = [finding for finding in diagnose(few, recipe) if finding.name == "few"]
    assert "2 of 64 prototypes" in str(finding) and "center_momentum 1" in str(finding)
    assert "few" not in names(diagnose([line | dict(prototypes_used=8 / 64) if "prototypes_used" in line else line for line in few], recipe))


def test_every_illness_has_a_case():
    assert EXPECTED.keys() == ILLNESSES.keys()


@pytest.mark.parametrize("seed", [1, 2])
def test_healthy(seed, pictures):
    assert course(pictures, "healthy", seed) == []


@pytest.mark.parametrize("name", ["dino", "swav", "byol", "mocov2", "supervised"])
def test_healthy_methods(name, pictures):
    changes = dict(loss="labels", n_local=0) if name == "supervised" else METHODS[name] | TWO | (SHARP if name in ("dino", "swav") else {})
    assert course(pictures, "healthy", 1, head_bn=True, **changes) == []


def test_a_cosine_loss_without_anything_against_collapse(pictures):
    "BYOL without predictor and with a copy for a teacher: its directions become one, and the words say what is missing."
    changes = METHODS["byol"] | TWO | dict(predictor=False, teacher="student_copy")
    found = course(pictures, "healthy", 0, steps=240, **changes)
    assert names(found) == {"collapsed"}
    assert "needs a predictor or a center" in str(found[0]) and "no past to learn from" in str(found[0])


def test_features_that_share_much_are_no_collapse():
    "Signs of a MoCo-v2 run on Imagenette that ended at 38.3 % k-NN, 6.8 above untrained: its outputs differ. Without outputs to ask, the features are asked."
    recipe, signs = patient(**METHODS["mocov2"]), dict(rank_teacher=18.6, spread_teacher=0.023)
    lines = [dict(i=i, t=i / 100, loss=5.0) for i in range(10, 101, 10)]
    assert diagnose([*lines, dict(i=100, target_spread=0.91, **signs)], recipe) == []
    assert names(diagnose([*lines, dict(i=100, target_spread=0.02, **signs)], recipe)) == {"collapsed"}
    assert names(diagnose([*lines, dict(i=100, **signs)], recipe)) == {"collapsed"}


def infect(monkeypatch, name):
    "Let `fit` build methods that have an illness."
    def ill(*args):
        net = method(*args)
        ILLNESSES[name].method(net)
        return net
    monkeypatch.setattr(fit_module, "method", ill)


def test_in_the_log_of_fit_teacher_and_student_are_one(pictures, tmp_path, monkeypatch):
    "A teacher that is the student, found by `diagnose` in log.jsonl."
    infect(monkeypatch, "aliased teacher")
    recipe = patient(evaluations=4, steps=40)
    fit(recipe, *load("shapes", n=300), tmp_path, linear=False, say=str)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = [finding for finding in diagnose(lines, recipe) if finding.name == "same"]
    assert found and "4 evaluations" in found[0].words
    assert not names(diagnose(lines, override(recipe, teacher="student_copy"))) & {"same"}   # there, it is meant to be so


def test_a_fit_that_ends_without_a_number(pictures, tmp_path, monkeypatch):
    "What `fit` raises, and what it had logged until then."
    infect(monkeypatch, "float16 overflow")
    with torch.autocast("cpu", torch.float16), pytest.raises(FloatingPointError) as raised:
        fit(patient(), pictures, None, tmp_path, say=str)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = diagnose(lines, patient(), str(raised.value))
    assert names(found) == {"lost"} and "65,504" in str(found[0]) and "nan" in str(found[0])


def test_a_gradient_that_grew():
    "A gradient that grew before the loss was lost: the words blame the size of the steps, not the number format."
    lines = [dict(i=i, t=i / 100, loss=5.0, gradient_norm=1.0) for i in range(1, 50)]
    lines += [dict(i=i, t=i / 100, loss=9.0, gradient_norm=10.0 ** (i - 48)) for i in range(50, 53)]
    found = diagnose(lines, patient(), "the loss of step 53 is inf, or its gradient is not finite; the run stops here")
    assert [finding.name for finding in found] == ["lost"] and "lower the learning rate" in str(found[0]) and "1e+04" in str(found[0])
    assert names(diagnose([*lines, dict(i=53, t=0.53, loss=math.nan, gradient_norm=math.inf)], patient())) == {"lost"}   # from the log alone


def test_nothing_was_logged():
    assert diagnose([], patient()) == []
    found = diagnose([], patient(), "the loss of step 1 is nan, or its gradient is not finite; the run stops here")
    assert [finding.name for finding in found] == ["lost"] and "No step was logged" in str(found[0])


def ended(steps=1000, **signs):
    "A log with the same readings at every step."
    usual = dict(loss=2.0, target_entropy=1.0, mean_target_entropy=3.0, kl=1.0, gradient_norm=1.0,
                 collapse_index=0.4, mean_entropy_share=0.9, entropy_share=0.3, prototypes_used=0.9)
    return [dict(i=i, t=i / steps) | usual | signs for i in range(steps // 50, steps + 1, steps // 50)]


def test_ln_k_is_no_alarm_before_the_warm_up_is_over():
    "The same readings are healthy in the first tenth and a collapse at the end."
    flat = dict(loss=math.log(64), target_entropy=math.log(64), kl=0.0, collapse_index=0.0, mean_entropy_share=1.0, entropy_share=1.0)
    lines, recipe = ended(**flat), patient(warmup=0.1, teacher_temperature_warmup=0.3)
    assert diagnose([line for line in lines if line["t"] <= 0.3], recipe) == []
    found = diagnose(lines, recipe)
    assert names(found) == {"uniform"} and "Loss 4.159, ln K 4.159, KL(teacher, student) 0.000" in str(found[0])


def test_a_student_that_learns_nothing_about_pictures():
    "Targets differ, and the loss is that of the mean answer: said after 500 steps, not before."
    lazy = dict(loss=0.9 * math.log(64))
    assert names(diagnose(ended(**lazy), patient())) == {"unlearnt"}
    assert diagnose(ended(steps=400, **lazy), patient()) == [] and diagnose(ended(), patient()) == []


def test_worse_than_untrained_and_flat_features():
    lines = [dict(i=0, knn_untrained=26.0), *ended(), dict(i=1000, knn_teacher=20.0, knn_student=21.0, rank_teacher=1.5)]
    found = diagnose(lines, patient())
    assert names(found) == {"worse", "flat"}
    assert "20.0 %" in str(found[1]) and "26.0 %" in str(found[1]) and "rank 1.5" in str(found[0])
    lines[-1] |= dict(knn_teacher=24.0, rank_teacher=2.5)
    assert diagnose(lines, patient()) == []


def test_figure_and_widget(pictures):
    figure = live(momentum=0.9, steps=20)
    left, right = figure.axes
    assert len(left.lines) == 2 and len(right.lines[0].get_xdata()) == 5 and "diagnosis" in figure._suptitle.get_text()
    plot_course(right, ended(), patient())
    assert right.lines[-1].get_ydata()[0] == pytest.approx(3 / math.log(64))
    widget = explore()
    *_, steps, button, bar, view = widget.children
    steps.value = 40
    button.click()
    assert view.picture.startswith(b"\x89PNG") and "over 40 steps; diagnosis: " in view.caption
    assert bar.value == bar.max == 40 and not button.disabled
    assert str(Finding("worse", "words")) == "words"
