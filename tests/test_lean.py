"""Pictures whose background is another's, what features make of them, and galleries of what went wrong."""
import hashlib

import pytest
import torch
import torch.nn.functional as F

from dino_edu.data import Pictures, load
from dino_edu.lean import (
    MEASURES, confident_mistakes, follows_object, lean, lean_markdown, plot_lean, shift, spread, swaps, worst_masks, worst_neighbours,
)
from dino_edu.score import pixels
from dino_edu.segment import Scene, crossfit, fresh, interval, look, scenes_of
from dino_edu.shapes import NAMES, _background, _between, _axes, _layers, _objects, make, swap_backgrounds


# The generated pictures

STORED = {  # SHA-256 of pictures, labels and masks, before backgrounds could be swapped
    (250, 7, 48, 1.0): "6d2fe1f3fb802e23a766f82af5b3b3445d1b27b0e5f5d34ced8f433bf7c5aebe",
    (120, 201, 32, 1.0): "f2a6d5e01cce9ee12a34c18f978fbf46110e8f294a6d0c65b46187bb5c25cee6",
    (130, 3, 48, 0.0): "91da82ed42955ff479b8af1e6533bb8f2fb3e4fb07ad8c5d33da1d6c3ce70f3b",
}
SAME_ARITHMETIC = torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.__version__.startswith("2.14.")


@pytest.mark.skipif(not SAME_ARITHMETIC, reason="another PyTorch or processor may round a pixel otherwise")
@pytest.mark.parametrize("arguments", STORED)
def test_pictures_are_those_of_every_run_so_far(arguments):
    found = hashlib.sha256()
    for tensor in make(*arguments):
        found.update(tensor.numpy().tobytes())
    assert found.hexdigest() == STORED[arguments]


def test_chance_is_drawn_in_the_order_that_it_always_was():
    "The first two hundreds of a set, drawn literally one thing after another."
    generator = torch.Generator().manual_seed(5)
    labels, (x, y) = torch.randperm(130, generator=generator) % 10, _axes(48)
    pictures = []
    for part in (labels[:100], labels[100:]):
        back = _background(len(part), 48, 7, generator)
        front, cover, _ = _objects(part, 48, 1.0, generator)
        towards = _between(0, 2 * torch.pi, (len(part), 1, 1, 1), generator)
        strength = _between(0, 0.3, (len(part), 1, 1, 1), generator)
        lit = torch.lerp(back, front, cover[:, None]) * (1 + strength * (x * towards.cos() + y * towards.sin()))
        pictures.append(lit + 0.03 * torch.randn(lit.shape, generator=generator))
    assert torch.equal(make(130, 5)[0], (255 * torch.cat(pictures).clamp(0, 1)).round().byte())


def test_backgrounds_move_and_objects_stay():
    images, _, masks = make(130, 5)
    other = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    moved, alone = swap_backgrounds(130, 5, other), swap_backgrounds(130, 5, torch.arange(130), objects=False)
    cover = torch.cat([cover for _, _, _, (_, cover, _), _ in _layers(130, 5, 48, 1.0)])[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(swap_backgrounds(130, 5, torch.arange(130)), images)
    assert (moved.int() - images.int())[cover > 0.999].abs().max() <= 1 and (alone.int() - images.int())[cover < 1e-4].abs().max() <= 1
    changed = (moved.int() - images.int()).abs().float().mean(1)
    assert changed[~masks].mean() > 10 * changed[masks].mean()
    seen = (moved.int() - alone[other].int())[(cover < 1e-4)].abs().float().mean()   # another's background, in one's own light
    assert seen < 0.5 * (moved.int() - alone.int())[(cover < 1e-4)].abs().float().mean()


@pytest.mark.parametrize("other", [torch.arange(5), torch.full((6,), 6), torch.full((6,), -1)])
def test_bad_partners(other):
    with pytest.raises(ValueError, match="one of the 6 pictures"):
        swap_backgrounds(6, 0, other)


@pytest.mark.parametrize("n", [20, 57, 200])
def test_partners(n):
    queries, donors = swaps(n, 9)
    labels = make(n, 9)[1]
    assert list(queries) == ["original", "same_class", "other_class", "alone"]
    assert all(torch.equal(pictures.labels, labels) and pictures.classes == NAMES for pictures in queries.values())
    for name, same in (("same_class", True), ("other_class", False)):
        other = donors[name]
        assert sorted(other.tolist()) == list(range(n)) and (other != torch.arange(n)).all() and ((labels[other] == labels) == same).all()
        assert torch.equal(queries[name].batch(range(n))[0], swap_backgrounds(n, 9, other))
    with pytest.raises(ValueError, match="19 pictures are too few"):
        swaps(19, 0)


# What features make of them

def test_shift_by_hand():
    z = torch.tensor([[1.0, 0], [0, 2], [3, 0], [0, -1]])
    labels = torch.tensor([0, 0, 1, 1])
    assert spread(z, labels) == pytest.approx(1)   # two right angles
    assert spread(torch.tensor([[1.0, 0], [1, 1], [-1, 0]]), torch.tensor([0, 0, 0])) == pytest.approx((1 - 0.5**0.5 + 1 + 0.5**0.5 + 2) / 3)
    moved = torch.tensor([[1.0, 1], [0, 1], [3, 0], [1, 0]])
    assert shift(moved, z, labels) == pytest.approx((1 - 0.5**0.5 + 0 + 0 + 1) / 4)
    assert follows_object(moved, z, torch.tensor([3, 0, 1, 2])) == 75   # the last went over to the third


@pytest.fixture(scope="module")
def world():
    queries, donors = swaps(100, 1)
    return load("shapes", n=200)[0], queries, donors


def centre_and_rim(pictures):
    "Mean colour of the true object, and of what is around it."
    images, masks = pictures.batch(range(len(pictures)))[0] / 255, pictures.masks[:, None]
    return [(images * m).sum((2, 3)) / m.sum((2, 3)) - 0.5 for m in (masks, ~masks)]


def test_a_network_that_sees_one_of_the_two(world):
    gallery, queries, donors = world
    inside, outside = (lean(lambda p: centre_and_rim(p)[i], *world) for i in (0, 1))   # noqa: B023
    named = lean(lambda p: F.one_hot(p.labels, 10).float(), *world)
    assert named["knn_original"] == 100 and named["drop_other_class"] == 0 and named["shift_same_class"] != named["shift_same_class"]   # 0 / 0
    assert inside["object_other_class"] > 90 and outside["object_other_class"] < 60
    assert inside["shift_other_class"] < 0.2 < outside["shift_other_class"]
    for m in (inside, outside):
        assert m["drop_same_class"] == pytest.approx(m["knn_original"] - m["knn_same_class"]) and set(MEASURES) <= m.keys()


def test_table_pairs_seeds(world):
    from scipy.stats import ttest_rel
    lines = [dict(row=row, seed=seed, metrics={key: base + 3 * seed + (seed == 2) * (row == "dino") for key in MEASURES})
             for row, base in (("dino", 10.0), ("pixels", 4.0)) for seed in (1, 2, 4)] + [dict(row="dino", seed=9, metrics=dict.fromkeys(MEASURES, 0.0))]
    text = lean_markdown(lines).splitlines()
    ours, theirs = ([line["metrics"]["knn_alone"] for line in lines if line["row"] == row][:3] for row in ("dino", "pixels"))
    expected = ttest_rel(ours, theirs).confidence_interval()
    assert text[2].startswith("| dino | 4 |") and text[4].startswith("| dino less pixels | 3 |")
    assert f"| {sum(ours) / 3 - sum(theirs) / 3:+.1f} [{expected.low:+.1f}, {expected.high:+.1f}] |" in text[4]
    assert len(lean_markdown(lines, reference="absent").splitlines()) == 4
    assert len(plot_lean([dict(row="pixels", seed=0, metrics=lean(lambda p: pixels(p, 8), *world))]).axes) == 2


def test_pixels_know_no_class_of_a_background(world):
    assert lean(lambda p: pixels(p, 16), *world)["knn_alone"] < 30


# What goes wrong

def test_worst_masks_come_first():
    scenes = scenes_of(load("shapes", n=40, seed=2)[0], 32, 4)
    from dino_edu.recipe import shapes
    net = fresh(shapes(), [0])[0]
    scores = crossfit(look(net, scenes).flatten(1), [s.group for s in scenes])[0]
    figure = worst_masks(net, scenes, n=5)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == [f"{100 * s:.0f} %" for s in scores.sort().values[:5]]
    assert interval(scores).low > 0
    with pytest.raises(ValueError, match="one object each"):
        worst_masks(net, [Scene(s.image, s.masks.expand(2, -1, -1), s.group, "") for s in scenes])


def test_mistakes_that_are_surest_come_first():
    gallery, labels = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [0.6, 0.6]]), torch.tensor([0, 0, 1, 1, 0])
    query, truth = torch.tensor([[0.0, 1], [1, 0], [0.55, 0.6]]), torch.tensor([0, 0, 1])
    wrong, share, near = confident_mistakes(query, truth, gallery, labels, k=2)
    assert wrong.tolist() == [0, 2] and share[0] == 1 > share[1] and near[0].tolist() == [2, 3]
    assert len(confident_mistakes(query, torch.tensor([1, 0, 0]), gallery, labels, k=2)[0]) == 0


def test_gallery_of_neighbours(world):
    gallery, queries, _ = world
    wrong, share, index = confident_mistakes(pixels(queries["original"], 8), queries["original"].labels, pixels(gallery, 8), gallery.labels)
    figure = worst_neighbours(lambda p: pixels(p, 8), gallery, queries["original"], n=3, shown=2)
    titles = [ax.get_title().replace("\n", " ") for ax in figure.axes if ax.get_title()]
    expected = [NAMES[k] for i in range(3) for k in (queries["original"].labels[wrong[i]], *gallery.labels[index[i, :2]])]
    assert titles == expected and figure.axes[0].get_xlabel() == f"wrong, {share[0]:.0%}"
    grey = Pictures.stack(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), ("a", "b"))
    assert worst_neighbours(lambda p: torch.ones(len(p), 2), grey, grey, n=2, shown=1).axes
