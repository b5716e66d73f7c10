"""The loop and what is written about it, where no notebook should show them: bad input, precision, lost losses, odd terminals."""
import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from dino_edu.data import load
from dino_edu.recipe import PRESETS, Recipe, changes, imagenette, method, override, shapes
from dino_edu.run import Run, commit, plot_curves, progress, record, summarize
from dino_edu.train import batches, halves, optimizer, report, set_schedule, steps_per_epoch, train

SHORT = override(shapes(), steps=4, evaluations=2, batch=16, log_every=1)


@pytest.fixture(scope="module")
def pictures():
    return load("shapes", n=60)


def test_too_few_pictures_for_a_batch():
    with pytest.raises(ValueError, match="60 pictures are fewer than a batch of 512: set batch to 60 or less"):
        steps_per_epoch(Recipe(), 60)


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


def test_timm_stays_in_float32_on_a_cpu(monkeypatch):
    "Where bfloat16 is faster, our own networks use it; convolutions of oneDNN on tiny maps return gradients of uninitialised memory."
    monkeypatch.setattr("dino_edu.train.multiplies_bf16", lambda kind: True)
    ours, theirs = (method(override(SHORT, encoder=name)) for name in ("vit_nano", "resnet10t"))
    assert [halves("auto", net, torch.device("cpu")) for net in (ours, theirs)] == [True, False]
    assert halves("auto", theirs, torch.device("cuda")) and halves("bf16", theirs, torch.device("cpu")) and not halves("fp32", ours, torch.device("cuda"))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_build(preset):
    recipe = preset()
    net = method(override(recipe, out_dim=64, hidden=32))
    assert net.student.encoder.embed_dim in (64, 96, 192, 384, 768, 2048)
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


def lost(model, views, t):
    "The loss is no number."
    return model.loss_of(views, t) * float("nan")


def lost_in_the_gradient(model, views, t):
    "The loss is finite; at zero the root is infinitely steep, and infinity times zero is no number."
    return model.loss_of(views, t) + (0 * next(model.student.parameters())).square().sum().sqrt()


@pytest.mark.parametrize("forward", [lost, lost_in_the_gradient])
def test_a_step_that_is_not_finite_is_not_taken(pictures, forward):
    model = method(SHORT)
    opt, model.loss_of = optimizer(model, SHORT), model.forward
    steps = train(model, batches(pictures[0], SHORT), SHORT, 4, opt)
    next(steps), next(steps)
    before = copy.deepcopy((dict(model.named_parameters()), opt.state_dict()["state"]))   # the running means of BatchNorm have seen the batch
    model.forward = lambda views, t: forward(model, views, t)
    with pytest.raises(FloatingPointError, match="the loss of step 3 is .*lower lr"):
        next(steps)
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.named_parameters())
    for i, moments in opt.state_dict()["state"].items():
        assert all(torch.equal(moment, before[1][i][name]) for name, moment in moments.items())
