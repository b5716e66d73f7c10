"""Fine-tuning: rates and targets by hand, runs that can be killed, and val pictures that nobody looks at before the end."""
import json
import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn

import dino_edu.transfer as transfer
from dino_edu.checkpoint import load_checkpoint
from dino_edu.core import seed_everything
from dino_edu.data import Pictures
from dino_edu.laboratory import hold_out
from dino_edu.launch import together
from dino_edu.score import features, linear_probe
from dino_edu.transfer import PRESETS, Classifier, Seen, Tuning, finetune, labelled_views, layerwise, mixing, read_classifier, reading, tune, tuning, view
from dino_edu.vit import vit

COLOURS = torch.tensor([[220, 40, 40], [40, 220, 40], [40, 40, 220]], dtype=torch.uint8)


def coloured(n=24, classes=3, name="colours"):
    "Noisy pictures of one colour each, which is their class."
    labels = torch.arange(n) % classes
    noise = torch.randint(0, 30, (n, 3, 20, 20), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    return Pictures.stack(COLOURS[labels][:, :, None, None] + noise, labels, "abc"[:classes], name=name)


def small(**changes):
    "A plan that takes milliseconds."
    return tuning("shapes", **dict(size=16, batch=4, steps=4, probe_first=False, head_std=0.02, precision="fp32") | changes)


@pytest.fixture(scope="module")
def net():
    seed_everything(0)
    return vit("vit_nano", img_size=16, patch_size=8, mlp_ratio=1.0, init_std=None)


# Plans

def test_presets_have_known_fields_only():
    known = {field.name for field in fields(Tuning)}
    assert all(changes.keys() <= known and isinstance(tuning(name), Tuning) for name, changes in PRESETS.items())
    assert {"cifar10", "cifar100", "inat18", "inat19", "flowers102", "cars", "imagenet"} <= PRESETS.keys()


def test_what_was_published():
    c10, c100, inat = tuning("cifar10"), tuning("cifar100"), tuning("inat18")
    for plan in (c10, c100):
        assert (plan.batch, plan.epochs, plan.weight_decay, plan.mixup, plan.cutmix, plan.smoothing, plan.drop_path) == (768, 1000, 0.05, 0.8, 1.0, 0.1, 0.1)
        assert plan.warmup * plan.epochs == pytest.approx(5) and plan.rand_augment == "rand-m9-mstd0.5-inc1"
    assert (c10.lr, c100.lr) == (7.5e-6, 5e-6)
    assert inat.lr * 512 / inat.batch == pytest.approx(5e-5) and inat.erase_p == 0.25 and inat.epochs == 300 and inat.warmup * 300 == pytest.approx(5)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="no preset 'cifar'"):
        tuning("cifar")
    with pytest.raises(ValueError, match="no field 'mix_up'"):
        tuning("cifar10", mix_up=1)


# Views

def test_every_distortion_of_randaugment_works():
    "Posterizing at full strength keeps no bit, which Pillow refuses."
    seen = Seen(coloured(12), small(rand_augment="rand-m10-n4-inc1", erase_p=0.5, crop_scale=(0.08, 1.0)))
    views, _ = seen.batch(torch.arange(120))
    assert views.shape == (120, 3, 16, 16) and torch.isfinite(views).all()


def test_a_view_depends_on_its_number_alone():
    pictures, plan = coloured(12), small(rand_augment="rand-m9-mstd0.5-inc1", erase_p=0.5)
    views, which = Seen(pictures, plan, 3).batch(torch.tensor([5, 17, 29, 2]))
    assert which.tolist() == [5, 5, 5, 2]
    assert torch.equal(Seen(pictures, plan, 3).batch(torch.tensor([2, 29]))[0], views[[3, 2]])
    assert not torch.equal(views[0], views[1]) and not torch.equal(Seen(pictures, plan, 4).batch(torch.tensor([5]))[0][0], views[0])


def test_a_view_is_normalised_as_pictures_are_for_evaluation():
    class Echo(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))
    flat = Pictures.stack(COLOURS[:, :, None, None].expand(-1, -1, 20, 20), torch.arange(3))
    views, _ = Seen(flat, small()).batch(torch.arange(3))
    assert torch.allclose(views.mean((2, 3)), features(Echo(), flat, 16), atol=1e-5)


def test_grey_pictures_are_refused():
    with pytest.raises(ValueError, match="'fog' is grey"):
        Seen(Pictures.stack(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), name="fog"), small())


def test_view_is_what_the_tuning_says():
    names = [type(step).__name__ for step in view(small(rand_augment="rand-m9-mstd0.5-inc1", erase_p=0.25)).transforms]
    assert "RandAugment" in names and "RandomErasing" in names
    assert not {"RandAugment", "RandomErasing", "ColorJitter"} & {type(step).__name__ for step in view(small()).transforms}


# Batches

def plan_of(plan, steps, n=24, start=0, seed=0):
    numbers = transfer._plan(n, plan, seed, start)
    return [next(numbers) for _ in range(steps)]


def test_an_epoch_sees_every_picture_once():
    epochs = torch.cat(plan_of(small(batch=8), 6)).view(2, 24)
    assert [epoch.sort().values.tolist() for epoch in epochs] == [list(range(24)), list(range(24, 48))]
    assert epochs[0].tolist() != (epochs[1] - 24).tolist()


def test_repeated_views_share_a_batch():
    batches = plan_of(small(batch=12, repeats=3), 4)
    for batch in batches:
        assert sorted((batch % 24).bincount().unique().tolist()) == [0, 3]
    assert len(torch.cat(batches).unique()) == 48   # no view comes twice
    assert torch.cat(plan_of(small(batch=12, repeats=3), 2, start=2)).tolist() == torch.cat(batches[2:]).tolist()


def test_processes_share_a_batch(monkeypatch):
    whole = plan_of(small(batch=8, repeats=2), 3)
    monkeypatch.setattr(transfer, "world_size", lambda: 2)
    parts = []
    for number in range(2):
        monkeypatch.setattr(transfer, "rank", lambda number=number: number)
        parts.append(plan_of(small(batch=8, repeats=2), 3))
    assert all(sorted([*a.tolist(), *b.tolist()]) == sorted(w.tolist()) and len(a) == 4 for a, b, w in zip(*parts, whole))
    with pytest.raises(ValueError, match="a batch of 6 is not even on each of 2"):
        next(labelled_views(coloured(), small(batch=6)))


def test_labels_belong_to_their_views():
    stream = labelled_views(coloured(), small(batch=12, repeats=2))
    images, labels = next(stream)
    assert images.mean((2, 3)).argmax(1).tolist() == labels.tolist()
    stream.close()


def test_worker_processes_make_the_same_views():
    plan = small(rand_augment="rand-m9-mstd0.5-inc1", erase_p=0.5)
    here, there = (labelled_views(coloured(), plan, 1, workers=workers) for workers in (0, 1))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(next(here), next(there)))
    there.close()


# Targets

@pytest.mark.parametrize("kind", [dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0), {}])
def test_targets_are_the_shares_of_what_is_seen(kind):
    labels, cut = torch.tensor([0, 1, 2, 3]), 0
    for seed in range(12):
        images = F.one_hot(labels, 4).float()[:, :, None, None].repeat(1, 1, 16, 16)
        seed_everything(seed)
        mixed, targets = mixing(small(smoothing=0.2, **kind), 4)(images, labels)
        cut += bool(((mixed == 0) | (mixed == 1)).all() and (mixed[0, 0] == 0).any())
        assert torch.allclose(targets.sum(1), torch.ones(4))
        for b in range(4):
            seen = mixed[b].mean((1, 2))   # the share of every class in the picture
            for c in range(4):
                assert targets[b, c] == pytest.approx(0.8 * seen[c].item() + 0.2 / 4, abs=1e-5)
    assert (cut > 0) == ("cutmix" in kind)


# The classifier and its rates

@pytest.mark.parametrize("classes", [2, 7])
def test_as_many_outputs_as_classes(net, classes):
    model = Classifier(net, classes, small(head_std=2e-5))
    logits = model(torch.rand(2, 3, 16, 16))
    assert logits.shape == (2, classes) and logits.abs().max() < 0.01 and model(torch.rand(1, 3, 24, 32)).shape == (1, classes)


def test_the_encoder_that_was_given_stays(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = Classifier(net, 3, small(drop_path=0.3, lr=0.1))
    assert [block.drop_path.drop_prob for block in model.encoder.blocks] == pytest.approx([0, 0.15, 0.3])
    list(tune(model, labelled_views(coloured(), small(lr=0.1)), small(lr=0.1), 2, layerwise(model, small())))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(isinstance(block.drop_path, nn.Identity) for block in net.blocks)


def test_rates_are_those_of_timms_own_transformer(net):
    theirs = VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=3, num_heads=4, mlp_ratio=1.0, num_classes=3)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    wanted = {names[id(p)]: (group["lr_scale"], group["weight_decay"])
              for group in param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.6) for p in group["params"]}
    model = Classifier(net, 3, small())
    names = {id(parameter): name.removeprefix("encoder.") for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in layerwise(model, small(layer_decay=0.6)).param_groups for p in group["params"]}
    assert found == wanted and len(wanted) == len(names)


def test_rates_by_hand(net):
    model = Classifier(net, 3, small())
    rate = {id(p): group["lr_scale"] for group in layerwise(model, small(layer_decay=0.5)).param_groups for p in group["params"]}
    of = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert of["head.weight"] == of["head.bias"] == 1 and of["encoder.norm.weight"] == of["encoder.blocks.2.mlp.fc1.weight"] == 0.5
    assert of["encoder.blocks.1.attn.qkv.weight"] == 0.25 and of["encoder.blocks.0.norm1.bias"] == 0.125
    assert of["encoder.cls_token"] == of["encoder.pos_embed"] == of["encoder.patch_embed.proj.weight"] == 0.0625


def test_the_rate_warms_up_and_falls(net):
    plan = small(steps=10, warmup=0.2, lr=0.5, lr_end=0.1, layer_decay=0.5)
    model = Classifier(net, 3, plan)
    opt, seen = layerwise(model, plan), []
    for step in tune(model, labelled_views(coloured(), plan), plan, 10, opt):
        assert all(group["lr"] == step.lr * group["lr_scale"] for group in opt.param_groups)
        seen.append(step.lr)
    assert seen == pytest.approx([0.25] + [0.1 + 0.4 * (1 + math.cos(math.pi * (i / 10 - 0.2) / 0.8)) / 2 for i in range(2, 11)])


def test_only_the_head_learns(net):
    plan = small(head_only=True, lr=0.1, drop_path=0.5)
    model = Classifier(net, 3, plan)
    head = model.head.weight.detach().clone()
    opt = layerwise(model, plan)
    list(tune(model, labelled_views(coloured(), plan), plan, 3, opt))
    assert sum(p.numel() for group in opt.param_groups for p in group["params"]) == 64 * 3 + 3
    assert all(torch.equal(p, q) for p, q in zip(model.encoder.parameters(), net.parameters())) and not torch.equal(model.head.weight, head)
    assert model.training and not model.encoder.training


def test_an_encoder_without_blocks():
    class Flat(nn.Flatten):
        embed_dim = 768
    with pytest.raises(ValueError, match="no blocks to drop"):
        Classifier(Flat(), 3, small(drop_path=0.1, layer_decay=1.0))
    plan = small(layer_decay=1.0)
    model = Classifier(Flat(), 3, plan)
    assert layerwise(model, plan).param_groups[0]["lr_scale"] == 1


def test_the_head_may_read_the_mean_of_the_patches(net):
    model, x = Classifier(net, 3, small(global_pool="avg")), torch.rand(2, 3, 16, 16)
    assert torch.allclose(model.encoder(x), net.tokens(x)[:, 1:].mean(1), atol=1e-6) and torch.allclose(net(x), net.tokens(x)[:, 0], atol=1e-6)
    with pytest.raises(ValueError, match="features of one kind: set global_pool='token'"):
        reading(nn.Flatten(), "avg")


# The loop

def test_steps_lower_the_loss(net):
    plan = small(steps=30, batch=8, lr=3e-3, layer_decay=1.0)
    model = Classifier(net, 3, plan)
    losses = [step.loss.item() for step in tune(model, labelled_views(coloured(), plan), plan, 30, layerwise(model, plan))]
    assert losses[0] == pytest.approx(math.log(3), abs=0.3) and sum(losses[-5:]) / 5 < 0.7 < losses[0]


def test_the_gradient_is_clipped_as_a_whole(net):
    plan = small(clip=0.01)
    model = Classifier(net, 3, plan)
    for step in tune(model, labelled_views(coloured(), plan), plan, 2, layerwise(model, plan)):
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        assert step.gradient_norm > 0.01 and norm.item() == pytest.approx(0.01, rel=1e-3)


def test_a_lost_loss_stops_before_its_step(net):
    model = Classifier(net, 3, small())
    before = [p.detach().clone() for p in model.parameters()]
    nothing = [(torch.full((4, 3, 16, 16), float("nan")), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(FloatingPointError, match="step 1 is nan"):
        list(tune(model, nothing, small(), 4, layerwise(model, small())))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_the_average_is_the_one_by_hand(net):
    plan = small(lr=1e-2)
    model = Classifier(net, 3, plan)
    average, literal = ModelEmaV3(model, 0.75), [p.detach().clone() for p in model.parameters()]
    for _ in tune(model, labelled_views(coloured(), plan), plan, 4, layerwise(model, plan), average):
        literal = [0.75 * a + 0.25 * p.detach() for a, p in zip(literal, model.parameters())]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(average.module.parameters(), literal))
    assert not torch.allclose(average.module.head.weight, model.head.weight, atol=1e-4)


# The run

STIRRED = dict(steps=6, evaluations=3, mixup=0.8, cutmix=1.0, drop_path=0.3, erase_p=0.5, rand_augment="rand-m9-mstd0.5-inc1", ema=0.5, lr=1e-2)


class PowerCut(Exception):
    "Somebody pulled the plug."


@pytest.mark.parametrize("save_every, last", [(1, 3), (None, 2)])
def test_a_killed_run_goes_on_to_the_last_bit(net, tmp_path, save_every, last):
    plan, train, val, told = small(save_every=save_every, **STIRRED), coloured(), coloured(12), []

    def pull(line):
        told.append(line)
        if len(told) == 2:
            raise PowerCut
    whole = finetune(net, plan, train, val, tmp_path / "whole", say=None)
    with pytest.raises(PowerCut):
        finetune(net, plan, train, val, tmp_path / "cut", say=pull)
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == last
    torch.rand(7)   # whoever else draws numbers meanwhile
    again = finetune(net, plan, train, val, tmp_path / "cut", say=None)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert a["step"] == b["step"] == 6 and all(torch.equal(a["method"][name], b["method"][name]) for name in a["method"])
    moments = [[t for state in x["optimizer"]["state"].values() for t in state.values()] for x in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(*moments)) and whole["metrics"] == again["metrics"]
    logs = [[json.loads(line)["held_top1"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["metrics"] == again["metrics"]


def test_another_plan_does_not_go_on(net, tmp_path):
    finetune(net, small(), coloured(), coloured(12), tmp_path, say=None)
    with pytest.raises(ValueError, match="made with lr = 0.0001, this run asks for 0.5"):
        finetune(net, small(lr=0.5), coloured(), coloured(12), tmp_path, say=None)


@pytest.fixture
def looks(monkeypatch):
    "Which pictures were embedded, call by call."
    seen = []

    def watched(encoder, pictures, *rest):
        seen.append((pictures.name, len(pictures)))
        return features(encoder, pictures, *rest)
    monkeypatch.setattr(transfer, "features", watched)
    return seen


def test_val_is_looked_at_once_and_last(net, tmp_path, looks):
    finetune(net, small(evaluations=4), coloured(40, name="train"), coloured(13, name="val"), tmp_path, say=None)
    assert looks == [("train", 6)] * 4 + [("val", 13)]   # 15 % of 14, 13 and 13 pictures


def test_held_out_pictures_choose(net, tmp_path, monkeypatch):
    scripted = iter([50.0, 80.0, 80.0, 60.0])
    top = transfer._top
    monkeypatch.setattr(transfer, "_top", lambda model, pictures, *rest: top(model, pictures, *rest) if pictures.name == "val" else (next(scripted), 100.0))
    found = finetune(net, small(evaluations=4, lr=1e-2), coloured(), coloured(12, name="val"), tmp_path, say=None)
    assert found["metrics"]["best_step"] == 3 and found["metrics"]["held_top1"] == 80
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 3 and load_checkpoint(tmp_path / "last.pt")["step"] == 4
    logits = features(read_classifier(tmp_path, net), coloured(12), 16)
    assert found["metrics"]["val_top1"] == pytest.approx(100 * (logits.argmax(1) == coloured(12).labels).float().mean().item())


def test_wrong_val_labels_change_no_choice(net, tmp_path):
    val = coloured(12)
    lies = Pictures.stack(torch.stack([val[i] for i in range(12)]), val.labels.roll(1), "abc")
    right, wrong = (finetune(net, small(), coloured(), pictures, tmp_path / name, say=None) for name, pictures in (("a", val), ("b", lies)))
    assert all(torch.equal(p, q) for p, q in zip(*(read_classifier(tmp_path / name, net).parameters() for name in "ab")))
    assert right["metrics"]["best_step"] == wrong["metrics"]["best_step"] and right["metrics"]["held_top1"] == wrong["metrics"]["held_top1"]


def test_the_average_is_what_is_judged(net, tmp_path):
    finetune(net, small(ema=0.9, lr=1e-2), coloured(), coloured(12), tmp_path, say=None)
    stored, judged = load_checkpoint(tmp_path / "best.pt")["method"], read_classifier(tmp_path, net)
    assert torch.equal(judged.head.weight, stored["average.head.weight"]) and not torch.equal(judged.head.weight, stored["model.head.weight"])
    assert not judged.training


def test_the_head_may_start_as_a_probe(net, tmp_path):
    plan, train = small(probe_first=True, steps=1, lr=0.0, lr_end=0.0), coloured()
    finetune(net, plan, train, coloured(12), tmp_path, say=None)
    known = hold_out(train)[0]
    found = features(net, known, 16)
    probe = linear_probe(found, known.labels, found, known.labels, decay=0.01)[1]
    assert torch.allclose(read_classifier(tmp_path, net).head.weight, probe.weight, atol=1e-6)


def test_sets_that_cannot_be_learnt_from(net, tmp_path):
    unlabelled = Pictures.stack(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), name="walk")
    for train, val in ((unlabelled, coloured()), (coloured(), unlabelled)):
        with pytest.raises(ValueError, match="'walk' has no labels, and fine-tuning learns from them"):
            finetune(net, small(), train, val, tmp_path, say=None)
    with pytest.raises(ValueError, match="class 2 of 'colours' has no picture to learn from: there are 2"):
        finetune(net, small(), coloured(classes=2), coloured(), tmp_path, say=None)
    with pytest.raises(ValueError, match="fewer than four pictures a class"):
        finetune(net, small(), coloured(9), coloured(), tmp_path, say=None)
    with pytest.raises(FileNotFoundError, match="not come to its first evaluation"):
        read_classifier(tmp_path / "nowhere", net)


def fine_tuned(folder):
    "Metrics and weights of a run; only this text travels to other processes."
    import torch
    from dino_edu.data import Pictures
    from dino_edu.transfer import finetune, read_classifier, tuning
    from dino_edu.vit import vit
    torch.manual_seed(0)
    net, labels = vit("vit_nano", img_size=16, patch_size=8, mlp_ratio=1.0, init_std=None), torch.arange(24) % 3
    pictures = torch.randint(0, 90, (24, 3, 20, 20), dtype=torch.uint8) + 60 * torch.eye(3, dtype=torch.uint8)[labels][:, :, None, None]
    plan = tuning("shapes", size=16, batch=8, repeats=2, steps=4, evaluations=2, lr=1e-3, smoothing=0.1, ema=0.5, precision="fp32")
    found = finetune(net, plan, Pictures.stack(pictures, labels), Pictures.stack(pictures[:7], labels[:7]), folder, device="cpu", say=None)
    return found["metrics"], read_classifier(folder, net).state_dict()


def test_two_processes_are_one(tmp_path):
    metrics, alone = fine_tuned(tmp_path / "one")
    for found, weights in together(fine_tuned, str(tmp_path / "two"), timeout=240):
        far = {name: (weights[name] - alone[name]).abs().max().item() for name in alone if "qkv.bias" not in name}   # keys' biases have no gradient but noise
        assert found == metrics and max(far.values()) < 1e-4
