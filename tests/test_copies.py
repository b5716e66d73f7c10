"""Descriptors and whitening against other implementations, copies that depend on their seed alone, Copydays in its layout, and the protocol by hand."""
import math

import pytest
import torch
from PIL import Image
from torch import nn

from dino_edu.copies import (
    KINDS, PUBLISHED, SINGLE, Copies, check_disjoint, copy_detection, copydays, describe, gem, learn_whitening, make_copies, plot_firsts,
    plot_kinds,
)
from dino_edu.data import Pictures, load
from dino_edu.recipe import shapes
from dino_edu.retrieve import chance
from dino_edu.segment import fresh, interval


@pytest.fixture(scope="module")
def sets():
    "Twelve originals, forty distractors, pictures to learn from."
    distractors, originals = load("shapes", n=60, seed=31)
    return originals, distractors.subset(range(40)), load("shapes", n=60, seed=32)[0]


def grey(values, height=8, width=8):
    "Pictures of one grey each."
    return Pictures.stack(torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, height, width).contiguous())


class Table(nn.Module):
    "Knows a vector for the grey in the top left corner."

    def __init__(self, vectors):
        super().__init__()
        self.vectors = {grey: torch.tensor(vector) for grey, vector in vectors.items()}

    def forward(self, x):
        greys = (255 * (x[:, 0, 0, 0] * 0.229 + 0.485)).round().int().tolist()
        return torch.stack([self.vectors[g] for g in greys])


# Descriptors

def test_gem_between_mean_and_maximum():
    tokens = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    literal = [[(sum(float(t[i, d]) ** 4 for i in range(5)) / 5) ** 0.25 for d in range(3)] for t in tokens]
    assert torch.allclose(gem(tokens), torch.tensor(literal, dtype=torch.float64))
    assert torch.allclose(gem(tokens, p=1), tokens.mean(1)) and torch.allclose(gem(tokens, p=300), tokens.amax(1), rtol=0.02)
    assert torch.allclose(gem(-tokens), torch.tensor(1e-6, dtype=torch.float64))


def test_descriptor_reads_the_whole_picture(sets):
    net, originals = fresh(shapes(), [0])[0].train(), sets[0]
    found = describe(net, originals, 32, batch=5)
    assert found.shape == (12, 128) and net.training and torch.allclose(found, describe(net, originals, 32), atol=1e-5)
    changed = originals[0].clone()
    changed[:, :, :2] = 255   # a centre crop would not see these columns
    assert not torch.allclose(describe(net, Pictures.stack(changed[None]), 32), found[:1], atol=1e-3)
    assert describe(nn.Flatten(), grey([3], 10, 30), 8).shape == (1, 3 * 64)
    with pytest.raises(ValueError, match="no pictures to describe"):
        describe(net, originals.subset([]), 32)


def test_descriptor_squeezes():
    wide = torch.zeros(3, 16, 32, dtype=torch.uint8)
    wide[:, :, 16:] = 255
    found = describe(nn.Flatten(), Pictures.stack(wide[None]), 8).view(3, 8, 8)
    assert (found[:, :, :3] < -1).all() and (found[:, :, 5:] > 1).all()


# Whitening

@pytest.mark.parametrize("seed", range(3))
def test_whitening_is_that_of_scikit_learn(seed):
    from sklearn.decomposition import PCA
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(80, 6, generator=draw) @ torch.randn(6, 6, generator=draw) + 10
    y = torch.randn(5, 6, generator=draw)
    expected = torch.from_numpy(PCA(4, whiten=True).fit(x.numpy()).transform(y.numpy())) * math.sqrt(80 / 79)   # it divides by n - 1
    assert torch.allclose(learn_whitening(x, keep=4)(y).abs(), expected.abs().float(), rtol=1e-3, atol=1e-3)
    turned = learn_whitening(x, power=0)
    assert torch.allclose((turned(x) - turned(y[:1])).norm(dim=1), (x - y[0]).norm(dim=1), rtol=1e-4)   # a turn keeps distances


def test_whitening_keeps_what_it_can_learn():
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    assert learn_whitening(x).axes.shape == (30, 10) and learn_whitening(x, keep=20).axes.shape == (30, 20)
    x[:, 5:] = 7
    assert learn_whitening(x).axes.shape == (30, 5)   # numbers that never move are no axes
    for nothing in (torch.ones(40, 3), torch.randn(3, 3)):
        with pytest.raises(ValueError, match="whitening cannot learn from"):
            learn_whitening(nothing)


# Copies

def test_copies_depend_on_seed_kind_and_number_alone(sets):
    originals, _, others = sets
    made = make_copies(originals, others, seed=4)
    assert len(made.copies) == 12 * len(KINDS) and made.kinds[:12] == ("crop",) * 12 and made.source[12:24].tolist() == list(range(12))
    for kind in KINDS:
        row = made.kinds.index(kind)
        part = make_copies(originals.subset(range(5)), others, seed=4, kinds=[kind])
        other = make_copies(originals.subset(range(5)), others, seed=5, kinds=[kind])
        same = [torch.equal(part.copies[i], made.copies[row + i]) for i in range(5)]
        moved = [not torch.equal(part.copies[i], other.copies[i]) for i in range(5)]
        assert all(same) and any(moved) == (kind != "mirror"), kind
        assert not any(torch.equal(part.copies[i], originals[i]) for i in range(5)) and part.copies[0].dtype == torch.uint8, kind


def test_what_each_kind_changes(sets):
    originals, _, others = sets
    made = make_copies(originals, others, seed=1)
    def pairs(kind):
        return [(made.copies[j], originals[int(made.source[j])]) for j in range(len(made.copies)) if made.kinds[j] == kind]
    assert all(torch.equal(copy.flip(2), original) for copy, original in pairs("mirror"))
    for copy, original in pairs("crop"):
        _, h, w = copy.shape
        assert 0.17 < h * w / 48**2 < 0.53 and any(torch.equal(original[:, a:a + h, b:b + w], copy) for a in range(49 - h) for b in range(49 - w))
    for copy, original in pairs("caption"):
        changed = (copy != original).any(0)
        assert not changed[:28].any() and changed[40:].float().mean() > 0.8
    for copy, original in pairs("paste"):
        rows, columns = (copy != original).any(0).nonzero().T
        assert 20 <= rows.max() - rows.min() + 1 <= 28 and 20 <= columns.max() - columns.min() + 1 <= 28
    greys = [bool((copy[0] == copy[1]).all() and (copy[1] == copy[2]).all()) for copy, _ in pairs("recolour")]
    assert any(greys) and not all(greys)
    away = [(copy.float() - original).abs().mean().item() for copy, original in pairs("jpeg")]
    assert min(away) > 2 and max(away) < 60


def test_copies_of_photos_that_are_not_square():
    photos = Pictures.stack(torch.randint(0, 255, (2, 3, 60, 100), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
    made = make_copies(photos, grey([7, 9]))
    assert all(made.copies[i].shape == (3, 60, 100) for i in range(2, len(made.copies)))
    assert torch.equal(made.copies.subset([13])[0], photos[1].flip(2))


def test_copies_that_cannot_be_made(sets):
    originals, _, others = sets
    with pytest.raises(ValueError, match="no kind 'fold' of copy: known are crop, jpeg"):
        make_copies(originals, others, kinds=["crop", "fold"])
    with pytest.raises(ValueError, match="copies are made of colour pictures"):
        make_copies(load("shapes", n=2, channels=1)[0], others)


def test_sets_that_overlap_are_named(sets):
    originals, distractors, learn = sets
    check_disjoint(dict(originals=originals, distractors=distractors, pictures=learn))
    twin = Pictures.stack(torch.stack([distractors[0], originals[9]]))
    with pytest.raises(ValueError, match="picture 1 of the friends is picture 9 of the originals"):
        check_disjoint(dict(originals=originals, friends=twin))
    made, nets = make_copies(originals, learn, kinds=["mirror"]), dict(flat=[nn.Flatten()])
    with pytest.raises(ValueError, match="picture 0 of the distractors is picture 4 of the copies"):
        copy_detection(nets, made, made.copies.subset([4]), 8)
    with pytest.raises(ValueError, match="of the distractors is picture 9 of the originals"):
        copy_detection(nets, made, twin, 8)
    with pytest.raises(ValueError, match="of the pictures to learn from is picture 0 of the distractors"):
        copy_detection(nets, made, distractors, 8, learn=twin.subset([0]))


# Copydays

@pytest.fixture
def folder(tmp_path):
    "Three originals; two strong copies of the first and one of the last."
    for name, value in {"original/200000": 10, "original/200100": 90, "original/200200": 200, "strong/200001": 12, "strong/200002": 14, "strong/200201": 196}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 12 + value % 3), (value,) * 3).save(tmp_path / f"{name}.jpg", quality=100)
    return tmp_path


def test_copydays_from_its_folders(folder):
    found = copydays(folder)
    assert found.source.tolist() == [0, 0, 2] and found.kinds == ("strong",) * 3
    assert [int(found.originals[i][0, 0, 0]) for i in range(3)] == pytest.approx([10, 90, 200], abs=1)
    assert copydays(folder, size=6).copies[0].shape[1] == 6


def test_what_is_missing_of_copydays(folder):
    with pytest.raises(FileNotFoundError, match="there is no folder crops/30/"):
        copydays(folder, part="crops/30")
    with pytest.raises(FileNotFoundError, match="no Copydays at .*strong: there is no folder original/"):
        copydays(folder / "strong")
    (folder / "original" / "200200.jpg").unlink()
    with pytest.raises(ValueError, match="strong/200201.jpg has no original"):
        copydays(folder)
    (folder / "original" / "200003.jpg").write_bytes((folder / "original" / "200000.jpg").read_bytes())
    (folder / "strong" / "200201.jpg").unlink()
    with pytest.raises(ValueError, match="two files in original/ begin with the same"):
        copydays(folder)
    (folder / "strong" / "holiday.jpg").write_bytes((folder / "original" / "200000.jpg").read_bytes())
    with pytest.raises(ValueError, match="holiday.jpg: names of Copydays are six digits"):
        copydays(folder)


# The protocol

ANGLES = {0: 0, 50: 1, 100: 2, 150: 2.2, 10: 0.1, 60: 1.6, 110: 2.15}   # of each grey; 0, 50, 100 are originals, 150 a distractor
TABLE = Table({grey: [math.cos(a), math.sin(a)] for grey, a in ANGLES.items()})
COPIES = Copies(grey([0, 50, 100]), grey([10, 60, 110]), torch.tensor([0, 1, 2]), ("near", "far", "far"))


def test_copies_ask_by_hand():
    found = copy_detection(dict(one=[TABLE]), COPIES, grey([150]), 8)
    # 10 is nearest to 0; 60 at 1.6 is nearest to 100 (.4), then 50 and 150 (both .6); 110 at 2.15 to 150, then 100
    assert found["ap"]["one"][[0, 2]].tolist() == [100, 25] and found["ap"]["one"][1] in (25, pytest.approx(100 / 6))
    assert found["first"]["one"].tolist() == [0, 2, 3]
    m = found["metrics"]
    assert m["map_one_near"] == 100 and m["database"] == 4 and m["queries"] == 3 and m["chance"] == pytest.approx(100 * chance(1, 4))
    assert copy_detection(dict(one=[TABLE]), COPIES, None, 8)["ap"]["one"].tolist() == [100, 25, 100]


def test_originals_ask_by_hand():
    copies = Copies(COPIES.originals, COPIES.copies, torch.tensor([0, 0, 2]), COPIES.kinds)
    with pytest.raises(ValueError, match="original 1 has no copy to find"):
        copy_detection(dict(one=[TABLE]), copies, grey([150]), 8, by="original")
    copies = Copies(grey([0, 100]), COPIES.copies, torch.tensor([0, 0, 1]), COPIES.kinds)
    found = copy_detection(dict(one=[TABLE]), copies, grey([150]), 8, by="original")
    assert found["ap"]["one"].tolist() == [100, 100] and found["first"]["one"].tolist() == [0, 2]   # 0 asks: 10 (.1), 60 (1.6); 100 asks: 110 (.15)
    assert not [key for key in found["metrics"] if "far" in key]
    with pytest.raises(ValueError, match="'both' does not ask: say copy or original"):
        copy_detection(dict(one=[TABLE]), copies, None, 8, by="both")


def test_mean_over_queries_interval_over_originals(sets):
    originals, distractors, learn = sets
    made = make_copies(originals, learn, seed=2)
    nets = dict(net=fresh(shapes(), [0]), several=fresh(shapes(), [0, 1]), flat=[nn.Flatten()])
    found = copy_detection(nets, made, distractors, 32)
    m, ap = found["metrics"], found["ap"]
    for key, values in (("map_net", ap["net"]), ("less_flat", ap["net"] - ap["flat"])):
        expected = interval(values, made.source.tolist())   # as many copies of each: the plain interval over groups
        assert m[key] == pytest.approx(expected.mean) and m[f"{key}_interval"] == pytest.approx([expected.low, expected.high])
    rows = torch.tensor([kind == "paste" for kind in made.kinds])
    assert m["less_several_paste"] == pytest.approx((ap["net"] - ap["several"])[rows].mean().item()) and m["map_flat_paste"] > m["map_flat_mirror"]
    some = torch.tensor([True] * 20 + [False] * 60 + [True] * 4)   # unequal numbers
    part = Copies(originals, made.copies.subset(some), made.source[some], tuple(k for k, s in zip(made.kinds, some) if s))
    uneven = copy_detection(dict(flat=[nn.Flatten()]), part, distractors, 32)
    values, sources = uneven["ap"]["flat"], part.source
    sums = [(values[sources == g] - values.mean()).sum().item() for g in sources.unique()]
    error = math.sqrt(len(sums) / (len(sums) - 1) * sum(s * s for s in sums)) / len(values)   # of a ratio of means, by the residuals
    low, high = uneven["metrics"]["map_flat_interval"]
    from scipy.stats import t
    assert uneven["metrics"]["map_flat"] == pytest.approx(values.mean().item())
    assert (high - low) / 2 == pytest.approx(error * t.ppf(0.975, len(sums) - 1))


def test_equal_pictures_are_found_and_whitening_is_used(sets):
    originals, distractors, learn = sets
    same = Copies(originals, originals, torch.arange(12), ("same",) * 12)
    for options in (dict(), dict(learn=learn)):
        assert copy_detection(dict(flat=[nn.Flatten()]), same, distractors, 16, **options)["metrics"]["map_flat"] == 100
    made = make_copies(originals, learn.subset(range(5)), seed=2)
    plain, white = (copy_detection(dict(flat=[nn.Flatten()]), made, distractors, 16, **o)["ap"]["flat"] for o in (dict(), dict(learn=learn)))
    assert not torch.equal(plain, white)


def test_a_collapsed_network_scores_chance(sets):
    class Collapsed(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 4)
    originals, distractors, learn = sets
    found = copy_detection(dict(none=[Collapsed()]), make_copies(originals, learn, kinds=["jpeg"]), distractors, 16)["metrics"]
    assert found["map_none"] < 20   # originals stand first in the database: without shuffled ties 12 of 52 places would give 26


def test_figures(sets):
    originals, distractors, learn = sets
    made = make_copies(originals, learn, kinds=["jpeg", "mirror"])
    found = copy_detection(dict(flat=[nn.Flatten()]), made, distractors, 16)
    figure = plot_kinds(found["metrics"], ["flat"])
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([found["metrics"][f"map_flat_{k}"] for k in ("jpeg", "mirror")])
    figure = plot_firsts(made, distractors, dict(right=torch.tensor([3] * 24), wrong=torch.tensor([12 + 7] * 24)), 3)
    right, wrong = (figure.axes[k].spines["left"].get_edgecolor() for k in (4, 7))
    assert len(figure.axes) == 9 and right != wrong
    assert PUBLISHED["DINO, ViT-B/8, 320"] == 85.5 and SINGLE["DINO"] == 96.4
