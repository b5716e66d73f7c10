"""The loop and the run folder where no notebook should show them: odd data, bad input, other backbones, real pictures."""
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dino_edu.checkpoint import load_checkpoint, load_encoder
from dino_edu.core import cosine, warmup_cosine
from dino_edu.data import load
from dino_edu.methods import METHODS
from dino_edu.recipe import PRESETS, Recipe, changes, imagenette, method, override, shapes
from dino_edu.run import Run, commit, plot_curves, progress, record, summarize
from dino_edu.train import batches, fit, optimizer, report, set_schedule, steps_per_epoch, train

SHORT = override(shapes(), steps=4, evaluations=2, batch=16, log_every=1)


@pytest.fixture(scope="module")
def pictures():
    return load("shapes", n=60)


def paint(folder, name, n, size=(60, 50)):
    "A folder of noisy pictures."
    place = folder / name
    place.mkdir(parents=True)
    chance = np.random.default_rng(len(name))
    for i in range(n):
        Image.fromarray(chance.integers(0, 255, (*size, 3), dtype=np.uint8)).save(place / f"{i}.png")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_bit_exactly(name, pictures, tmp_path):
    recipe = override(SHORT, queue=64, drop_path=0.2, **METHODS[name])
    whole = fit(recipe, *pictures, tmp_path / "whole", linear=False, say=str)

    class Stop(Exception):
        pass

    def stop(message):
        if message.startswith("step 4"):
            raise Stop
    with pytest.raises(Stop):
        fit(recipe, *pictures, tmp_path / "parts", linear=False, say=stop)
    parts = fit(recipe, *pictures, tmp_path / "parts", linear=False, say=str)
    ends = [load_checkpoint(tmp_path / run / "last.pt")["method"] for run in ("whole", "parts")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert whole["metrics"] == parts["metrics"]


@pytest.mark.parametrize("teacher", ["student_copy", "previous_iteration", "previous_epoch"])
def test_every_teacher_trains(teacher, pictures, tmp_path):
    recipe = override(SHORT, teacher=teacher)
    summary = fit(recipe, *pictures, tmp_path, linear=False, say=str)
    assert summary["recipe"]["teacher"] == teacher and summary["steps"] == 4


def test_run_folder(pictures, tmp_path):
    summary = fit(SHORT, *pictures, tmp_path, seed=3, say=str)
    assert {"log.jsonl", "last.pt", "encoder.safetensors", "summary.json", "curves.png"} == {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"] == summary["metrics"]
    assert set(summary) == {"recipe", "data", "device", "seed", "steps", "seconds", "images_per_second", "metrics"}
    assert {"knn_teacher", "knn_student", "knn_best", "knn_untrained", "knn_pixels", "linear_teacher",
            "attention_untrained", "attention_teacher"} <= set(summary["metrics"])
    net, recipe = load_encoder(tmp_path / "encoder.safetensors")
    teacher = {name.removeprefix("teacher.network.encoder."): value for name, value in load_checkpoint(tmp_path / "last.pt")["method"].items()}
    assert recipe == SHORT and all(torch.equal(value, teacher[name]) for name, value in net.state_dict().items())


def test_log_holds_what_the_schedules_say(pictures, tmp_path):
    fit(SHORT, *pictures, tmp_path, say=str)
    lines = [line for line in Run(tmp_path).lines() if "loss" in line]
    assert [line["i"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        t = line["i"] / 4
        assert math.isclose(line["lr"], warmup_cosine(t, SHORT.lr * 16 / 256, SHORT.lr_end, SHORT.warmup))
        assert math.isclose(line["weight_decay"], cosine(t, 0.04, 0.4)) and math.isclose(line["momentum"], cosine(t, 0.98, SHORT.momentum_end))
        if "kl" in line:
            assert math.isclose(line["loss"], line["target_entropy"] + line["kl"], rel_tol=1e-4)
    assert sum("kl" in line for line in lines) == 3   # every logged step but the first


def test_a_finished_run_is_not_run_again(pictures, tmp_path):
    first = fit(SHORT, *pictures, tmp_path, say=str)
    assert fit(SHORT, *pictures, tmp_path, say=str)["metrics"] == first["metrics"]


def test_another_recipe_in_the_same_folder_is_refused(pictures, tmp_path):
    fit(SHORT, *pictures, tmp_path, linear=False, say=str)
    with pytest.raises(ValueError, match="teacher_temperature = 0.04.*0.05.*another output folder"):
        fit(override(SHORT, teacher_temperature=0.05), *pictures, tmp_path, say=str)
    with pytest.raises(ValueError, match="seed = 0"):
        fit(SHORT, *pictures, tmp_path, seed=1, say=str)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 4


def test_pictures_without_labels(tmp_path):
    paint(tmp_path, "holiday", 40)
    train_set, val_set = load(tmp_path / "holiday", 48)
    said = []
    summary = fit(SHORT, train_set, val_set, tmp_path / "run", say=said.append)
    assert val_set is None and summary["metrics"] == {} and "needs labels" in said[0]
    assert (tmp_path / "run" / "encoder.safetensors").exists()


def test_one_class_trains_and_is_not_scored(tmp_path):
    paint(tmp_path, "pictures/cats", 40)
    summary = fit(SHORT, *load(tmp_path / "pictures", 48), tmp_path / "run", say=str)
    assert summary["metrics"] == {}


def test_sizes_may_differ(tmp_path):
    paint(tmp_path, "pictures/wide", 20, (40, 90))
    paint(tmp_path, "pictures/tall", 20, (90, 40))
    train_set, val_set = load(tmp_path / "pictures", 48)
    assert not train_set.uniform
    summary = fit(SHORT, train_set, val_set, tmp_path / "run", linear=False, say=str)
    assert "knn_teacher" in summary["metrics"]


def test_grey_pictures(tmp_path):
    recipe = override(SHORT, in_chans=1)
    train_set, val_set = load("shapes", channels=1, n=60)
    assert "knn_teacher" in fit(recipe, train_set, val_set, tmp_path, linear=False, say=str)["metrics"]


def test_a_backbone_of_timm(pictures, tmp_path):
    recipe = override(SHORT, encoder="resnet10t", steps=2, evaluations=1, optimizer="lars")
    summary = fit(recipe, *pictures, tmp_path, linear=False, say=str)
    assert "knn_teacher" in summary["metrics"] and "attention_teacher" not in summary["metrics"]
    assert load_encoder(tmp_path / "encoder.safetensors")[1].encoder == "resnet10t"


def test_too_few_pictures_for_a_batch():
    with pytest.raises(ValueError, match="60 pictures are fewer than a batch of 512: set batch to 60 or less"):
        steps_per_epoch(Recipe(), 60)


def test_a_folder_that_cannot_be_written(pictures, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write to the output folder .*file"):
        fit(SHORT, *pictures, tmp_path / "file" / "run", say=str)


def test_a_lost_loss_keeps_the_last_checkpoint(pictures, tmp_path, monkeypatch):
    "The loss turns into nan at step 3; the checkpoint of step 2 stays usable."
    import dino_edu.train
    steps = iter(range(1, 100))

    def poisoned(recipe, *more):
        model = method(recipe, *more)
        forward = model.forward
        model.forward = lambda views, t: forward(views, t) * (float("nan") if next(steps) == 3 else 1.0)
        return model
    monkeypatch.setattr(dino_edu.train, "method", poisoned)
    with pytest.raises(FloatingPointError, match="step 3 is nan.*lower lr"):
        fit(SHORT, *pictures, tmp_path, linear=False, say=str)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2
    assert fit(SHORT, *pictures, tmp_path, linear=False, say=str)["steps"] == 4


def test_prototypes_stand_still_at_the_start(pictures):
    recipe = override(SHORT, freeze_last_layer=0.5)
    model = method(recipe)
    weights = [model.student.head.last_layer.weight_v.detach().clone()]
    for _ in train(model, batches(pictures[0], recipe), recipe, 4, optimizer(model, recipe)):
        weights.append(model.student.head.last_layer.weight_v.detach().clone())
    still = [torch.equal(a, b) for a, b in zip(weights, weights[1:])]
    assert still == [True, True, False, False]


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="'adam' is not one of adamw, sgd, lars"):
        optimizer(torch.nn.Linear(2, 2), override(SHORT, optimizer="adam"))


def test_sgd_decays_weights_only():
    opt = optimizer(torch.nn.Linear(2, 2), override(SHORT, optimizer="sgd"))
    set_schedule(opt, SHORT, 1.0)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.4, 0.0]


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision_is_the_recipes(pictures, precision, dtype):
    "Matrix products in the recipe's precision; weights and loss in float32."
    recipe, seen = override(SHORT, precision=precision), []
    model = method(recipe)
    model.student.encoder.blocks[0].mlp.fc1.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    step = next(train(model, batches(pictures[0], recipe), recipe, 1, optimizer(model, recipe)))
    assert set(seen) == {dtype}
    assert step.loss.dtype == torch.float32 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert report(step, recipe, model, 0.0)["i"] == 1


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_build(preset):
    recipe = preset()
    net = method(override(recipe, out_dim=64, hidden=32))
    assert net.student.encoder.embed_dim in (64, 96, 192)
    assert override(recipe, **changes(recipe, imagenette())) == imagenette()


def test_progress_is_silent_elsewhere(capsys):
    assert list(progress(iter([1, 2, 3]), 3)) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_curves_of_a_run_without_scores(pictures, tmp_path):
    lines = [dict(i=1, loss=2.0)]
    figure = plot_curves(lines, override(SHORT, loss="cosine"))
    assert len(figure.axes) == 3 and summarize(lines) == {}


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    run = Run(tmp_path, tensorboard=True)
    run.log(i=1, loss=2.0)
    run.events.flush()
    assert any(path.name.startswith("events") for path in tmp_path.iterdir())


def test_tensorboard_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        Run(tmp_path, tensorboard=True)


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    steps = [SimpleNamespace(i=i, loss=torch.tensor(0.5)) for i in (1, 2, 3)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert [step.i for step in progress(iter(steps), 3)] == [1, 2, 3]
    assert "3/3" in capsys.readouterr().err


def test_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_record_appends(tmp_path):
    summary = dict(seed=1, recipe={}, data="x", device="cpu", seconds=1.0, images_per_second=2.0, metrics={})
    for row in ("dino", "byol"):
        record(tmp_path / "rows.jsonl", summary, "component", row, "shapes", {})
    assert [json.loads(line)["row"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == ["dino", "byol"]


def test_real_pictures(shared_data, tmp_path):
    "The main job for a few steps: Imagenette from a tar, scored on its own val split."
    train_set, val_set = load(shared_data / "imagenette128-balanced.tar", 48)
    index = torch.arange(0, len(train_set), 20)
    recipe = override(PRESETS["imagenette_cpu"](), steps=3, evaluations=1, batch=32)
    summary = fit(recipe, train_set.subset(index), val_set.subset(torch.arange(0, 2400, 40)), tmp_path, linear=False, say=str)
    assert 0 < summary["metrics"]["knn_teacher"] < 100 and summary["recipe"]["encoder"] == "vit_micro"
