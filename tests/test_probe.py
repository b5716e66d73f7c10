"""The paper's protocols against torch's SGD, scikit-learn and loops written out; nothing is chosen on val, and two processes are one."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from dino_edu.augment import normalize, random_boxes
from dino_edu.core import keys, permutation, uniform
from dino_edu.data import Pictures
from dino_edu.probe import (DECAYS, MULTIPLES, Blocks, LowShot, Stack, Sweep, base_rate, block_features, choose_decay, linear_cached,
                            linear_sweep, low_shot, plot_sweep, probe, random_view, stratified)
from dino_edu.score import features, knn
from dino_edu.vit import ViT


def vit(depth=3, seed=0):
    torch.manual_seed(seed)
    return ViT(img_size=8, patch_size=4, width=16, depth=depth, heads=2, init_std=None).eval()


def tinted(n, side=12, seed=0, classes=3):
    "Pictures of noise whose class is their tint."
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = torch.randint(0, 60, (n, 3, side, side), generator=generator)
    images[torch.arange(n), labels] += 150
    return Pictures.stack(images.to(torch.uint8), labels, ("red", "green", "blue"), name="tinted")


def blobs(n, width=8, classes=4, seed=0, spread=2.0, dtype=torch.float64):
    "Points around one centre a class, the same centres for every seed."
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return (centres[labels] + spread * torch.randn(n, width, generator=generator)).to(dtype), labels


class Colours(nn.Module):
    "Mean colour of a picture; notes what it is shown."
    def __init__(self):
        super().__init__()
        self.gain, self.seen = nn.Parameter(torch.ones(3)), []

    def forward(self, x):
        self.seen.append((x.clone(), self.training))
        return self.gain * x.mean((2, 3))


# Features of several blocks

@pytest.mark.parametrize("n, patches", [(1, False), (1, True), (2, False), (3, True)])
def test_blocks_are_walked_by_hand(n, patches):
    net, x = vit(), torch.randn(2, 3, 8, 8)
    tokens, by_hand = net.embed(x), []
    for block in net.blocks:
        tokens = block(tokens)
        by_hand.append(net.norm(tokens))
    expected = [layer[:, 0] for layer in by_hand[-n:]] + [by_hand[-1][:, 1:].mean(1)] * patches
    torch.testing.assert_close(Blocks(net, n, patches)(x), torch.cat(expected, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_block_features_leave_the_encoder_as_it_was(training):
    net, pictures = vit().train(training), tinted(7)
    found = block_features(net, pictures, 8, n=2, patches=True, batch=3)
    assert found.shape == (7, 48) and not found.requires_grad and net.training == net.blocks[0].training == training
    torch.testing.assert_close(found, features(Blocks(net.eval(), 2, True), pictures, 8))


def test_any_encoder_gives_its_output_and_nothing_more():
    pictures = tinted(5)
    torch.testing.assert_close(block_features(Colours(), pictures, 8, n=1), features(Colours(), pictures, 8))
    for n, patches in ((2, False), (1, True)):
        with pytest.raises(ValueError, match="Colours has no tokens"):
            Blocks(Colours(), n, patches)
    with pytest.raises(ValueError, match="there are 3 blocks"):
        block_features(vit(), pictures, 8, n=4)


# Views

def test_random_view_equals_torchvision():
    pictures = tinted(12, side=40)
    smooth = TF.gaussian_blur(pictures.batch(range(12))[0], 9)
    chance = keys(3, 1, torch.arange(12))
    found = random_view(smooth, torch.full((12, 2), 40), chance, 16)
    u = uniform(chance, 41)
    boxes, flips = random_boxes(u[:, :40], torch.full((12, 2), 40), (0.08, 1.0)).int().tolist(), u[:, 40] < 0.5
    assert 0 < flips.sum() < 12
    for view, picture, box, flip in zip(found, smooth, boxes, flips, strict=True):
        crop = TF.resized_crop(picture / 255, *box, [16, 16], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        torch.testing.assert_close(view, normalize((crop.flip(-1) if flip else crop)[None])[0], rtol=0, atol=0.03)


def test_random_view_keeps_to_its_scale():
    "A ramp from left to right: what a crop spans of it is its width."
    ramp = torch.arange(200).expand(64, 3, 200, 200).to(torch.uint8)
    small, large = (random_view(ramp, torch.full((64, 2), 200), keys(0, 0, torch.arange(64)), 20, scale) for scale in ((.04, .05), (.9, 1.)))
    spans = [(x.amax((1, 2, 3)) - x.amin((1, 2, 3))).mean() for x in (small, large)]
    assert spans[0] < spans[1] / 3


# The sweep

def sgd_alone(z, labels, rate, epochs, batch, seed, classes):
    "One classifier by torch's own optimizer and schedule."
    plane = nn.Linear(z.shape[1], classes, dtype=z.dtype)
    plane.weight.data = (0.01 * torch.randn(classes, z.shape[1], generator=torch.Generator().manual_seed(seed))).to(z)
    plane.bias.data.zero_()
    descent = torch.optim.SGD(plane.parameters(), lr=rate, momentum=0.9)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(descent, epochs)
    for epoch in range(epochs):
        for index in permutation(len(z), seed, epoch).split(batch):
            descent.zero_grad()
            F.cross_entropy(plane(z[index]), labels[index]).backward()
            descent.step()
        fall.step()
    return plane


@pytest.mark.parametrize("seed", range(3))
def test_cached_sweep_equals_sgd_for_each_rate(seed):
    train, held, val = blobs(70, seed=seed), blobs(500, seed=10 + seed), blobs(500, seed=20 + seed)
    rates = [1e-4, 1e-2, 0.3, 5.0]
    found = linear_cached(train, held, val, epochs=4, batch=16, rates=rates, seed=seed)
    for i, rate in enumerate(rates):
        plane = sgd_alone(*train, rate, 4, 16, seed, 4)
        for (z, labels), accuracies in ((held, found.held), (val, found.val)):
            assert accuracies[i] == pytest.approx(100 * (plane(z).argmax(1) == labels).double().mean().item()), rate


def test_stack_weights_equal_sgd():
    z, labels = blobs(40)
    stack = Stack(8, 4, [0.01, 1.0], seed=5, like=z)
    for index in permutation(40, 5, 0).split(16):
        stack.step(z[index], labels[index])
    for weight, bias, rate in zip(stack.weight, stack.bias, (0.01, 1.0), strict=True):
        plane = sgd_alone(z, labels, rate, 1, 16, 5, 4)
        torch.testing.assert_close(weight, plane.weight.data, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(bias, plane.bias.data, rtol=1e-10, atol=1e-13)


def test_stack_starts_as_the_paper_says():
    stack = Stack(1000, 50, MULTIPLES, seed=1)
    assert (stack.weight == stack.weight[0]).all() and not stack.bias.any()
    assert stack.weight.std().item() == pytest.approx(0.01, rel=0.02) and abs(stack.weight.mean().item()) < 3e-4
    assert stack(torch.ones(2, 1000)).shape == (2, 13, 50)


def test_rates_of_the_script():
    assert base_rate(1024) == 0.004 and base_rate(256) == 0.001
    assert MULTIPLES[0] == pytest.approx(0.1) and MULTIPLES[-1] == pytest.approx(1000)
    assert np.allclose(np.diff(np.log10(MULTIPLES)), 1 / 3)
    z, labels = blobs(30)
    assert linear_cached((z, labels), (z, labels), (z, labels), epochs=1, batch=512).rates == pytest.approx([2e-3 * m for m in MULTIPLES])


@pytest.mark.parametrize("held, best, edge", [((1., 5., 3.), 1, False), ((5., 5., 3.), 0, True), ((1., 2., 3.), 2, True)])
def test_held_out_pictures_choose(held, best, edge):
    sweep = Sweep("linear", (0.1, 1.0, 10.0), held, (70.0, 10.0, 99.0))
    assert sweep.best == best
    assert sweep.metrics() == dict(linear=sweep.val[best], linear_rate=sweep.rates[best], linear_held=held[best], linear_edge=edge)


def test_rates_come_back_in_order():
    train, val = blobs(30), blobs(40, seed=1)
    found = linear_cached(train, val, val, epochs=2, batch=8, rates=[1.0, 0.001])
    assert found.rates == (0.001, 1.0) and found == linear_cached(train, val, val, epochs=2, batch=8, rates=[0.001, 1.0])


broken = blobs(20)[0].clone()
broken[3, 3] = math.nan
BAD = {
    "no labels": ((blobs(20)[0], None), blobs(20), "have no labels"),
    "held without labels": (blobs(20), (blobs(20)[0], None), "have no labels"),
    "diverged": (blobs(20), (broken, blobs(20)[1]), "NaN or infinity"),
    "another encoder": (blobs(20), blobs(20, width=7), "8 wide, test features 7"),
    "from minus one": ((blobs(20)[0], blobs(20)[1] - 1), blobs(20), "a label -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    train, held, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        linear_cached(train, held, blobs(20), epochs=1)


def test_augmented_sweep_shows_new_crops_to_a_frozen_encoder():
    net, train, held, val = Colours().train(), tinted(30), tinted(12, seed=1), tinted(12, seed=2)
    before = net.gain.clone()
    sweep = linear_sweep(net, train, held, val, 8, n=1, epochs=3, batch=30, rates=[0.5])
    assert sweep.name == "linear" and sweep.val == (100.0,)
    assert torch.equal(net.gain, before) and net.gain.grad is None and net.training and not any(training for _, training in net.seen)
    for epoch, (view, _) in enumerate(net.seen[2:]):   # after held and val
        index = permutation(30, 0, epoch)
        assert torch.equal(view, random_view(*train.batch(index), keys(0, epoch, index), 8))
    assert len(net.seen) == 5


def test_augmented_sweep_needs_labels():
    bare = Pictures.stack(torch.zeros(9, 3, 12, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match="without labels"):
        linear_sweep(Colours(), tinted(9), bare, tinted(9), 8, n=1)
    with pytest.raises(ValueError, match="without labels"):
        probe(Colours(), tinted(9), bare, 8, n=1)


def test_plot_marks_the_choice():
    sweep = Sweep("linear", (0.1, 1.0, 10.0), (1.0, 5.0, 3.0), (70.0, 10.0, 99.0))
    axes = plot_sweep(sweep, "a title").axes[0]
    assert axes.lines[0].get_ydata().tolist() == [1, 5, 3] and axes.lines[1].get_ydata().tolist() == [70, 10, 99]
    assert axes.lines[-1].get_xydata().tolist() == [[1.0, 10.0]] and axes.get_title() == "a title"


# Two processes

def sweep_of_tints():
    "A sweep whose batches do not divide by two."
    return linear_sweep(vit(2), tinted(25), tinted(9, seed=1), tinted(31, seed=2), 8, n=2, patches=True, epochs=2, batch=7, rates=[0.01, 0.1])


def work(me):
    "What one of two processes finds."
    return sweep_of_tints()


def test_two_ranks_are_one(in_two_processes):
    assert in_two_processes(work) == [sweep_of_tints()] * 2


# Few labels

@pytest.mark.parametrize("share, kept", [(1e-9, (1, 1, 1)), (0.1, (1, 1, 5)), (0.3, (1, 3, 15)), (1, (3, 10, 50))])
def test_stratified_takes_a_share_of_every_class(share, kept):
    labels = torch.tensor([7] * 3 + [0] * 10 + [2] * 50)[permutation(63, 4, 0)]
    marked = stratified(labels, share, seed=1)
    assert tuple(int(marked[labels == k].sum()) for k in (7, 0, 2)) == kept


def test_stratified_is_chance_and_repeatable():
    labels = torch.arange(400) % 4
    draws = [stratified(labels, 0.25, seed) for seed in range(40)]
    assert torch.equal(draws[3], stratified(labels, 0.25, 3)) and not torch.equal(draws[0], draws[1])
    often = torch.stack(draws).double().mean(0)   # every picture with probability 1/4, in 40 draws
    assert 0 < often.min() and often.max() < 0.7
    for share in (0, -1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            stratified(labels, share)


def logistic(z, labels, test, decay):
    "Guesses of scikit-learn's logistic regression with the same penalty, on standardised features."
    mean, std = z.mean(0), z.std(0, correction=0)
    other = LogisticRegression(C=1 / (decay * len(z)), solver="newton-cg", tol=1e-10, max_iter=10_000)
    return torch.from_numpy(other.fit(((z - mean) / std).numpy(), labels.numpy()).predict(((test - mean) / std).numpy()))


@pytest.mark.parametrize("seed, spread", [(0, 2.0), (1, 4.0), (2, 0.5)])
def test_choose_decay_equals_sklearn(seed, spread):
    z, labels = blobs(60, seed=seed, spread=spread)
    decays, seen, fold = (1e-3, 0.1, 10.0), {}, torch.zeros(60, dtype=torch.int64)
    for i in permutation(60, seed, 0).tolist():   # every class is dealt out like cards
        seen[int(labels[i])] = seen.get(int(labels[i]), -1) + 1
        fold[i] = seen[int(labels[i])] % 4
    right = {decay: sum(int((logistic(z[fold != f], labels[fold != f], z[fold == f], decay) == labels[fold == f]).sum()) for f in range(4))
             for decay in decays}
    assert choose_decay(z, labels, decays, 4, seed) == max(d for d in decays if right[d] == max(right.values()))


def test_choose_decay_needs_two_of_a_class():
    z, labels = torch.randn(4, 3), torch.arange(4)
    with pytest.raises(ValueError, match="one labelled picture"):
        choose_decay(z, labels)
    assert choose_decay(z, labels, [0.5]) == 0.5


def test_low_shot_equals_sklearn():
    train, val = blobs(300), blobs(200, seed=1)
    found = low_shot(train, val, 0.2, draws=3, decays=(0.03, 1.0), folds=3, seed=7)
    for draw, (accuracy, decay) in enumerate(zip(found.accuracies, found.decays, strict=True)):
        marked = stratified(train[1], 0.2, 7 + draw)
        z, labels = train[0][marked], train[1][marked]
        assert decay == choose_decay(z, labels, (0.03, 1.0), 3, 7 + draw) and found.pictures == len(z) or draw < 2
        assert accuracy == pytest.approx(100 * (logistic(z, labels, val[0], decay) == val[1]).double().mean().item())
    assert min(found.accuracies) > 40 and len(set(found.accuracies)) > 1


def test_low_shot_interval():
    found = LowShot(0.1, 10, (60.0, 70.0, 80.0), (1.0, 1.0, 1.0)).interval
    assert found.mean == 70 and found.high - 70 == pytest.approx(4.302653 * 10 / 3**0.5) and found.n == 3
    assert len(DECAYS) == 6


# All of it

@pytest.mark.parametrize("augment, name", [(True, "linear"), (False, "linear_cached")])
def test_probe_is_its_parts(augment, name):
    net, train, val = vit(), tinted(60), tinted(30, seed=1)
    settings = dict(n=2, patches=True, augment=augment, epochs=2, batch=20, rates=[0.01, 0.1], shares=(0.3,), draws=2, decays=(0.1, 1.0), folds=2)
    found = probe(net, train, val, 8, **settings)
    z, asked = (features(net, pictures, 8) for pictures in (train, val))
    aside = stratified(train.labels, 0.15)
    m = found["metrics"]
    assert set(m) == {"knn", name, f"{name}_rate", f"{name}_held", f"{name}_edge", "low_shot_30", "low_shot_30_interval", "low_shot_30_labels"}
    assert m["knn"] == knn(z, train.labels, asked, val.labels, [20])[20][0]
    low = low_shot((z, train.labels), (asked, val.labels), 0.3, 2, (0.1, 1.0), 2)
    assert (m["low_shot_30"], m["low_shot_30_labels"]) == (low.interval.mean, low.pictures)
    if augment:
        sweep = linear_sweep(net, train.subset(~aside), train.subset(aside), val, 8, 2, True, 2, 20, [0.01, 0.1])
    else:
        wide, wide_val = (block_features(net, pictures, 8, 2, True) for pictures in (train, val))
        sweep = linear_cached((wide[~aside], train.labels[~aside]), (wide[aside], train.labels[aside]), (wide_val, val.labels), 2, 20, [0.01, 0.1])
    assert found["sweep"] == sweep and m[name] == sweep.val[sweep.best]


def test_val_chooses_nothing():
    net, train, val = vit(), tinted(60), tinted(30, seed=1)
    settings = dict(n=2, augment=False, epochs=3, batch=10, shares=(0.3,), draws=2, decays=(0.1, 1.0), folds=2)
    other = Pictures.stack(val.batch(range(30))[0], (val.labels + 1) % 3, val.classes)
    first, second = (probe(net, train, pictures, 8, **settings) for pictures in (val, other))
    assert first["metrics"]["linear_cached"] != second["metrics"]["linear_cached"]
    for name in ("linear_cached_rate", "linear_cached_held"):
        assert first["metrics"][name] == second["metrics"][name]
    assert first["sweep"].held == second["sweep"].held
