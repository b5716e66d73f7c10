"""Average precision against loops and scikit-learn, the real ground truth of the revisited Oxford and Paris, and rankings by class."""
import json
import math
import pickle
from itertools import combinations

import pytest
import torch
from PIL import Image
from torch import nn

from dino_edu.data import Pictures, load
from dino_edu.recipe import shapes
from dino_edu.retrieve import (
    CHANCE, PROTOCOLS, PUBLISHED, SCALES, SETUPS, Truth, average_precision, chance, curve, descriptor, find_photos, photo, places, plot_ranking,
    precision_at, rank_all, rank_classes, read_truth, retrieval, retrieve_places, score_places,
)
from dino_edu.score import features
from dino_edu.segment import fresh, interval


def generator(seed):
    return torch.Generator().manual_seed(seed)


def oxford_loop(ranking, right, junk):
    "The rule of the Oxford buildings: walk down the list, and add a trapezoid whenever recall moves."
    recall, precision, area, found, shown = 0.0, 1.0, 0.0, 0, 0
    for picture in ranking:
        if picture in junk:
            continue
        shown += 1
        found += picture in right
        area += (found / len(right) - recall) * (precision + found / shown) / 2
        recall, precision = found / len(right), found / shown
    return area


# One ranking

def test_by_hand():
    assert average_precision(torch.tensor([0]), 1) == 1 and average_precision(torch.tensor([1]), 1) == 0.25
    assert average_precision(torch.tensor([1, 3]), 2) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert average_precision(torch.tensor([3, 1]), 2) == average_precision(torch.tensor([1, 3]), 2)
    assert average_precision(torch.tensor([0]), 4) == 0.25   # three were never found
    assert average_precision(torch.tensor([], dtype=torch.int64), 4) == 0


@pytest.mark.parametrize("seed", range(10))
def test_rules_have_other_oracles(seed):
    from sklearn.metrics import average_precision_score
    right = torch.rand(40, generator=generator(seed)) < 0.3
    ranks = right.nonzero()[:, 0]
    assert average_precision(ranks, len(ranks), "step") == pytest.approx(average_precision_score(right.numpy(), -torch.arange(40).numpy()))
    assert average_precision(ranks, len(ranks)) == pytest.approx(oxford_loop(range(40), set(ranks.tolist()), ()))
    recall, precision = curve(ranks, len(ranks)).T
    assert torch.trapezoid(precision, recall).item() == pytest.approx(average_precision(ranks, len(ranks))) and recall[-1] == 1


def test_what_is_no_ranking():
    for ranks, positives in ((torch.tensor([0, 1]), 1), (torch.tensor([0]), 0), (torch.tensor([-1]), 2)):
        with pytest.raises(ValueError, match="average precision needs"):
            average_precision(ranks, positives)
    with pytest.raises(ValueError, match="no rule 'mean'.*trapezoid or step"):
        average_precision(torch.tensor([0]), 1, "mean")


def test_precision_stops_at_the_last_right_answer():
    ranks = torch.tensor([0, 3, 6])
    assert [precision_at(ranks, k) for k in (1, 2, 4, 5, 7, 10, 100)] == [1, 1 / 2, 2 / 4, 2 / 5, 3 / 7, 3 / 7, 3 / 7]


def test_places_without_junk():
    ranking = torch.tensor([8, 3, 9, 1, 0, 2])
    assert places(ranking, torch.tensor([1, 2])).tolist() == [3, 5]
    assert places(ranking, torch.tensor([2, 1]), torch.tensor([8, 9])).tolist() == [1, 3]
    assert places(ranking, torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)).tolist() == [3, 5]


@pytest.mark.parametrize("rule", ["trapezoid", "step"])
@pytest.mark.parametrize("positives, answers", [(1, 1), (1, 6), (3, 8), (6, 6)])
def test_chance_is_the_mean_of_all_orders(rule, positives, answers):
    scores = [average_precision(torch.tensor(c), positives, rule) for c in combinations(range(answers), positives)]
    assert chance(positives, answers, rule) == pytest.approx(sum(scores) / len(scores))


def test_chance_of_nothing():
    for arguments in ((0, 5), (6, 5), (1, 5, "mean")):
        with pytest.raises(ValueError, match="chance needs"):
            chance(*arguments)


# Ground truth

def write_truth(folder, **changes):
    found = dict(imlist=["a", "b", "c", "d", "e", "f"], qimlist=["q", "r"], gnd=[dict(bbx=[0, 0, 4, 8], easy=[0], hard=[1, 2], junk=[3]),
                                                                              dict(bbx=[0, 0, 8, 8], easy=[], hard=[5], junk=[])])
    (folder / "gnd.json").write_text(json.dumps(found | changes))
    return folder / "gnd.json"


def test_setups(tmp_path):
    truth = read_truth(write_truth(tmp_path))
    assert isinstance(truth, Truth) and truth.boxes.tolist() == [[0, 0, 4, 8], [0, 0, 8, 8]]
    selected = {setup: [x.tolist() for x in truth.select(0, setup)] for setup in SETUPS}
    assert selected == dict(easy=[[0], [1, 2, 3]], medium=[[0, 1, 2], [3]], hard=[[1, 2], [0, 3]])


def test_scores_by_hand(tmp_path):
    truth = read_truth(write_truth(tmp_path))
    found = score_places(torch.tensor([[3, 1, 4, 0, 2, 5], [0, 5, 1, 2, 3, 4]]), truth, ks=(1, 3))
    m = found["metrics"]   # query 0: easy 4 0 5, medium 1 4 0 2 5, hard 1 4 2 5; query 1: easy nothing, else 0 5 1 ...
    assert m["map_easy"] == pytest.approx(25) and math.isnan(found["ap"]["easy"][1])
    assert m["map_medium"] == pytest.approx(100 * ((2 + 1 / 2 + 2 / 3 + 2 / 3 + 3 / 4) / 6 + 1 / 4) / 2)
    assert m["map_hard"] == pytest.approx(100 * ((2 + 1 / 2 + 2 / 3) / 4 + 1 / 4) / 2)
    assert m["p1_easy"] == 0 and m["p3_easy"] == pytest.approx(50) and m["p1_hard"] == pytest.approx(50) and m["p3_hard"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    assert m["chance_easy"] == pytest.approx(100 * chance(1, 3)) and m["chance_hard"] == pytest.approx(50 * (chance(2, 4) + chance(1, 6)))


def test_what_is_no_ranking_of_all_images(tmp_path):
    truth = read_truth(write_truth(tmp_path))
    for wrong in (torch.zeros(2, 6, dtype=torch.int64), torch.arange(6)[None], torch.arange(5).repeat(2, 1)):
        with pytest.raises(ValueError, match="2 orders of all 6 images"):
            score_places(wrong, truth)


def test_what_is_no_ground_truth(tmp_path):
    with pytest.raises(FileNotFoundError, match="no ground truth .*nowhere"):
        read_truth(tmp_path / "nowhere.json")
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(dict(imlist=[])))
    with pytest.raises(ValueError, match="gnd.pkl is a pickle.*JSON once"):
        read_truth(tmp_path / "gnd.pkl")
    (tmp_path / "text.json").write_text("once upon")
    for path in (tmp_path / "text.json", write_truth(tmp_path, gnd=[dict(bbx=[0, 0, 1, 1], easy=[])])):
        with pytest.raises(ValueError, match="no ground truth of the revisited"):
            read_truth(path)
    for changes in (dict(qimlist=["q"]), dict(imlist=["a", "b"])):
        with pytest.raises(ValueError, match="entries for|rows beyond"):
            read_truth(write_truth(tmp_path, **changes))


@pytest.fixture(scope="module", params=["roxford5k", "rparis6k"])
def real(request, shared_data):
    path = shared_data / "revisitop" / f"gnd_{request.param}.json"
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    return request.param, read_truth(path)


def in_order(truth, *kinds):
    "A ranking for every query: pictures of these lists first, in this order, then all others by number."
    rows = []
    for lists in truth.lists:
        first = torch.cat([lists[kind] for kind in kinds])
        rest = torch.ones(len(truth.images), dtype=torch.bool)
        rest[first] = False
        rows.append(torch.cat([first, rest.nonzero()[:, 0]]))
    return torch.stack(rows)


def test_real_sets_have_the_published_sizes(real):
    name, truth = real
    assert (len(truth.queries), len(truth.images)) == dict(roxford5k=(70, 4993), rparis6k=(70, 6322))[name]
    without = [q for q in range(70) if not len(truth.select(q, "easy")[0])]
    assert without == dict(roxford5k=[11, 66], rparis6k=[])[name] and PROTOCOLS[name]["longer"] in (224, 512)
    assert (truth.boxes[:, 2:] > truth.boxes[:, :2]).all()


def test_real_perfect_and_reversed(real):
    truth = real[1]
    perfect = in_order(truth, "easy", "hard", "junk")
    m = score_places(perfect, truth)["metrics"]
    assert all(m[f"{what}_{setup}"] == pytest.approx(100) for what in ("map", "p1", "p5", "p10") for setup in SETUPS)
    assert score_places(in_order(truth, "junk", "easy", "hard"), truth)["metrics"] == m   # junk on top changes nothing
    worst = score_places(perfect.flip(1), truth)
    for setup in ("medium", "hard"):
        for q in (0, 33, 69):
            right, junk = truth.select(q, setup)
            n, p = len(truth.images) - len(junk), len(right)
            last = sum((j / (n - p + j) + (j + 1) / (n - p + j + 1)) / 2 for j in range(p)) / p
            assert worst["ap"][setup][q] == pytest.approx(100 * last)
    hard_first = score_places(in_order(truth, "hard", "easy"), truth)["metrics"]
    assert hard_first["map_hard"] == hard_first["map_medium"] == pytest.approx(100) == hard_first["map_easy"]   # what is in between is junk to the other


def test_real_chance(real):
    name, truth = real
    rankings = torch.stack([torch.stack([torch.randperm(len(truth.images), generator=generator(100 * s + q)) for q in range(70)]) for s in range(3)])
    found = [score_places(r, truth) for r in rankings]
    for i, setup in enumerate(("medium", "hard")):
        expected = found[0]["metrics"][f"chance_{setup}"]
        assert CHANCE[2 * (name == "rparis6k") + i] == pytest.approx(expected, abs=5e-4)
        selected = [truth.select(q, setup) for q in range(70)]
        by_query = torch.tensor([100 * chance(len(right), len(truth.images) - len(junk)) for right, junk in selected])
        off = interval(torch.cat([f["ap"][setup] - by_query for f in found]), level=0.999)
        assert off.low < 0 < off.high and off.high - off.low < expected
    assert all(row[2 * (name == "rparis6k")] > expected for row in PUBLISHED.values())


def test_real_against_the_loop(real):
    truth = real[1]
    rankings = torch.stack([torch.randperm(len(truth.images), generator=generator(q)) for q in range(70)])
    found = score_places(rankings, truth)["ap"]
    for q in (0, 11, 42):
        entry = {name: set(rows.tolist()) for name, rows in truth.lists[q].items()}
        right = dict(easy=entry["easy"], medium=entry["easy"] | entry["hard"], hard=entry["hard"])
        junk = dict(easy=entry["junk"] | entry["hard"], medium=entry["junk"], hard=entry["junk"] | entry["easy"])
        for setup in SETUPS:
            if right[setup]:
                assert found[setup][q] == pytest.approx(100 * oxford_loop(rankings[q].tolist(), right[setup], junk[setup]))
            else:
                assert math.isnan(found[setup][q])


# Photos

class Colour(nn.Module):
    "A picture's mean colour, and where its patches would end."
    patch_size = 4

    def forward(self, x):
        assert x.shape[-2] % 4 == 0 == x.shape[-1] % 4
        return x.mean((2, 3))


def test_photos_keep_their_aspect():
    image = torch.arange(60 * 90, dtype=torch.float32).remainder(255).to(torch.uint8).view(1, 60, 90).expand(3, -1, -1)
    assert photo(image, 45).shape == (3, 30, 45) and torch.equal(photo(image, 90), image) and torch.equal(photo(image), image)
    assert torch.equal(photo(image, box=(10.4, 4.6, 20.6, 60)), image[:, 5:60, 10:21])
    assert torch.equal(photo(image, box=(-3, 0, 500, 500)), image)
    with pytest.raises(ValueError, match="holds nothing"):
        photo(image, box=(95, 0, 99, 10))


def test_descriptor_normalises_every_scale_and_picture():
    net = fresh(shapes(), [0])[0].train()
    images = load("shapes", n=3, seed=5)[0]
    points = torch.stack([descriptor(net, images[i], SCALES) for i in range(3)])
    assert torch.allclose(points.norm(dim=1), torch.ones(3)) and net.training
    single = torch.stack([descriptor(net, images[0], [s]) for s in SCALES])
    assert torch.allclose(points[0], single.sum(0) / single.sum(0).norm(), atol=1e-6) and not torch.allclose(points[0], single[0], atol=1e-3)
    assert descriptor(Colour(), torch.ones(3, 30, 41, dtype=torch.uint8), SCALES).shape == (3,)
    with pytest.raises(ValueError, match="holds no patch of 4"):
        descriptor(Colour(), torch.ones(3, 6, 6, dtype=torch.uint8), [0.5])


def test_places_from_a_folder(tmp_path):
    "Query r shows red on the left and blue on the right; its box asks for red."
    colours = dict(a="red", b="red", c="darkred", d="blue", e="green", f="blue", r="blue", q="blue")
    (tmp_path / "photos" / "jpg").mkdir(parents=True)
    for name, colour in colours.items():
        image = Image.new("RGB", (40, 24), colour)
        if name == "q":
            image.paste(Image.new("RGB", (20, 24), "red"), (0, 0))
        image.save(tmp_path / "photos" / "jpg" / f"{name}.jpg", quality=95)
    gnd = [dict(bbx=[0, 0, 20, 24], easy=[0, 1], hard=[2], junk=[]), dict(bbx=[0, 0, 40, 24], easy=[3, 5], hard=[2], junk=[])]
    truth = read_truth(write_truth(tmp_path, gnd=gnd))
    found = retrieve_places(Colour(), tmp_path / "photos", truth, longer=20, scales=(1.0, 0.5))
    assert found["metrics"]["map_easy"] == 100 and found["ap"]["medium"][0] == 100 and found["rankings"].shape == (2, 6)
    uncropped = retrieve_places(Colour(), tmp_path / "photos", truth, longer=20, crop=False)
    assert uncropped["ap"]["easy"][0] < 100 == uncropped["ap"]["easy"][1]
    (tmp_path / "photos" / "jpg" / "c.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="2 of 3 pictures are missing: c.jpg, z.jpg; put them into .*jpg"):
        find_photos(tmp_path / "photos", ["a", "c", "z"])
    with pytest.raises(FileNotFoundError, match="1 of 8 pictures are missing: c.jpg"):
        retrieve_places(Colour(), tmp_path / "photos", truth)


# Classes

def test_rank_all_shuffles_only_ties():
    query, database = torch.randn(4, 8, generator=generator(0)), torch.randn(30, 8, generator=generator(1))
    expected = (query / query.norm(dim=1, keepdim=True) @ (database / database.norm(dim=1, keepdim=True)).T).argsort(1, descending=True)
    assert torch.equal(rank_all(query, database), expected)
    ties = rank_all(torch.ones(2, 3), torch.ones(30, 3))
    assert torch.equal(ties[0].sort().values, torch.arange(30)) and not torch.equal(ties[0], torch.arange(30)) and torch.equal(ties[0], ties[1])


def test_classes_by_hand():
    gallery, classes = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.2, 0.8]]), torch.tensor([0, 1, 1, 0])
    scores = rank_classes(torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([0, 0]), gallery, classes, ks=(1, 2))
    assert scores[0].tolist() == pytest.approx([(2 + 1 / 2 + 2 / 3) / 4, 1, 1 / 2])   # right at 0 and 2
    assert scores[1].tolist() == pytest.approx([(0 + 1 / 2 + 1 / 3 + 2 / 4) / 4, 0, 1 / 2])   # right at 1 and 3
    with pytest.raises(ValueError, match="class 7 of a query has no picture"):
        rank_classes(torch.ones(1, 2), torch.tensor([7]), gallery, classes)


def test_a_collapsed_network_scores_chance_in_a_sorted_database():
    classes = torch.arange(10).repeat_interleave(60)
    found = rank_classes(torch.ones(10, 4), torch.arange(10), torch.ones(600, 4), classes)[:, 0]
    assert found.mean().item() == pytest.approx(chance(60, 600), abs=0.01)
    literal = [average_precision(torch.arange(60 * k, 60 * k + 60), 60) for k in range(10)]
    assert sum(literal) / 10 > 0.15   # what the sorted database would have given


def test_retrieval_of_sets():
    train, val = load("shapes", n=120, seed=3)
    nets = fresh(shapes(), [0, 1])
    found = retrieval(dict(one=nets[:1], both=nets, flat=[nn.Flatten()]), train, val, 32, ks=(1, 4))
    m, ap = found["metrics"], found["ap"]
    assert m["queries"] == 24 and m["database"] == 120 and set(ap) == {"one", "both", "flat"}
    other = rank_classes(features(nets[1], val, 32), val.labels, features(nets[1], train, 32), train.labels)[:, 0]
    assert torch.allclose(ap["both"], (ap["one"] + 100 * other) / 2)
    paired = interval(ap["one"] - ap["flat"])
    assert m["less_flat"] == pytest.approx(paired.mean) and m["less_flat_interval"] == pytest.approx([paired.low, paired.high])
    assert m["map_one"] == pytest.approx(ap["one"].mean().item()) and "less_one" not in m and 0 <= m["p4_both"] <= 100
    counts = train.labels.bincount()
    assert m["chance"] == pytest.approx(100 * sum(chance(int(counts[k]), 120) for k in val.labels) / 24)
    with pytest.raises(ValueError, match="'bare' has no labels"):
        retrieval(dict(one=nets), train, Pictures.stack(torch.zeros(2, 3, 48, 48, dtype=torch.uint8), name="bare"), 32)


def test_figure_says_who_is_right():
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    figure = plot_ranking(picture, [picture] * 3, torch.tensor([True, False, True, False]), "q")
    *pictures, area = figure.axes
    frames = [ax.spines["left"].get_edgecolor() for ax in pictures]
    assert len(pictures) == 4 and frames[1] == frames[3] != frames[2] and "79%" in area.get_title()   # (2 + 1 / 2 + 2 / 3) / 4
