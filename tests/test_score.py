"""Chapter 08 against other libraries and double loops, and what it says to bad input."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from dino_edu.augment import center_crop
from dino_edu.core import rank, world_size
from dino_edu.data import Pictures
from dino_edu.score import (accuracy, check_features, features, knn, knn_sweep, leave_one_out, linear_probe, neighbours, pixel_knn, pixels,
                            score, standard_error, votes)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def blobs(n, m, width=16, classes=4, seed=0, spread=1.5, dtype=torch.float64):
    "Points around one centre a class: train, labels, test, truth."
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n + m,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    points = centres[labels] + spread * torch.randn(n + m, width, generator=generator)
    points = points.to(dtype)
    return points[:n], labels[:n], points[n:], labels[n:]


def tinted(n, side=12, seed=0):
    "Pictures of noise whose class is their tint."
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 60, (n, 3, side, side), generator=generator)
    images[torch.arange(n), labels] += 150
    return Pictures.stack(images.to(torch.uint8), labels, ("red", "green", "blue"), name="tinted")


def of_many_sizes(channels=3):
    "Three pictures of different height and width in one array of bytes."
    sizes = torch.tensor([[10, 14], [16, 12], [9, 9]])
    images = [torch.randint(0, 256, (channels, h, w), dtype=torch.uint8) for h, w in sizes.tolist()]
    flat = np.concatenate([image.numpy().reshape(-1) for image in images])
    ends = (sizes.prod(1) * channels).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    return Pictures(flat, offsets, sizes, channels), images


class Encoder(nn.Module):
    "Behaves otherwise in training than in evaluation, and notes where it was."

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.BatchNorm1d(6), nn.Dropout(.5))

    def forward(self, x):
        self.was_training, self.had_gradient = self.training, torch.is_grad_enabled()
        return self.net(x)


# Features

@pytest.mark.parametrize("training", [True, False])
def test_features_evaluate_and_restore(training):
    encoder, pictures = Encoder(), tinted(20)
    features(encoder, pictures, 8)
    encoder.train(training)
    found = features(encoder, pictures, 8, batch=7)
    assert encoder.training == training and not encoder.was_training and not encoder.had_gradient
    assert found.shape == (20, 6) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, features(encoder, pictures, 8, batch=1))


def test_features_ignore_autocast():
    encoder, pictures = Encoder(), tinted(20)
    expected = features(encoder, pictures, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(encoder, pictures, 8), expected)


def test_features_of_no_pictures():
    with pytest.raises(ValueError, match="no pictures to embed in 'tinted'"):
        features(nn.Flatten(), tinted(3).subset([]), 8)


def test_features_of_another_view():
    "The view is told which pictures it sees, batch by batch."
    def numbered(images, sizes, index):
        assert images.shape[1:] == (3, 12, 12) and (sizes == 12).all()
        return images.float() + 1000 * index[:, None, None, None]
    found = features(nn.Flatten(), pictures := tinted(7), 8, batch=3, view=numbered)
    expected = pictures.batch(range(7))[0].float() + 1000 * torch.arange(7)[:, None, None, None]
    assert torch.equal(found, expected.flatten(1))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_many_sizes(channels):
    pictures, images = of_many_sizes(channels)
    found = pixels(pictures, 4)
    assert found.shape == (3, channels * 16)
    for row, image in zip(found, images, strict=True):
        alone = center_crop(image[None], torch.tensor([image.shape[1:]]), 4)
        torch.testing.assert_close(row, alone.flatten())


# Neighbours

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("budget", [1, 60, 1000, 2**26])
def test_neighbours_equal_numpy(budget, device):
    gallery, _, query, _ = blobs(50, 23)
    a, b = query.numpy(), gallery.numpy()
    cosine = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    order = np.argsort(-cosine, axis=1)[:, :7]
    similarity, index = neighbours(query, gallery.to(device), 7, budget)
    assert similarity.device.type == device and np.array_equal(index.cpu().numpy(), order)
    np.testing.assert_allclose(similarity.cpu().numpy(), np.take_along_axis(cosine, order, 1), rtol=1e-12)


def test_neighbours_at_the_edges():
    gallery, query = torch.eye(3), torch.tensor([[0., 2, 0], [0, 0, 0]])
    similarity, index = neighbours(query, gallery, k=9)
    assert similarity.shape == index.shape == (2, 3) and index[0, 0] == 1
    assert torch.equal(similarity[1], torch.zeros(3)), "a point at the origin is near to nobody, and not NaN"
    assert neighbours(query.half(), gallery.half(), 1)[0].dtype == torch.float32
    assert neighbours(query, gallery[:0], 5)[1].shape == (2, 0)


@pytest.mark.parametrize("tile", [1, 7, 49, 1000])
def test_neighbours_in_any_tiles(tile, monkeypatch):
    gallery, _, query, _ = blobs(50, 23)
    expected = neighbours(query, gallery, 20)
    monkeypatch.setattr("dino_edu.score.TILE", tile)
    similarity, index = neighbours(query, gallery, 20)
    assert torch.equal(index, expected[1])
    torch.testing.assert_close(similarity, expected[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("budget", [1, 60, 2**26])
def test_neighbours_leave_out_a_row(budget):
    gallery, _, query, _ = blobs(30, 9)
    skip = torch.tensor([0, 29, 3, 3, 8, 11, 17, 20, 5])
    similarity, index = neighbours(query, gallery, 99, budget, skip)
    assert index.shape == (9, 29) and torch.isfinite(similarity).all()
    for point, out, found in zip(query, skip.tolist(), index.tolist(), strict=True):
        cosine = [float(point @ other / point.norm() / other.norm()) for other in gallery]
        assert found == [i for i in sorted(range(30), key=lambda i: -cosine[i]) if i != out]


MEMORY = """
import resource, sys, torch
from dino_edu.score import knn
torch.set_num_threads(1)

def peak():   # on Linux `ru_maxrss` starts with the peak of the process that started this one
    if sys.platform == "linux":
        return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

gallery, labels = torch.empty(300_000, 256), torch.arange(300_000) % 9
for part in gallery.split(10_000):
    part.uniform_(-1, 1)
knn(gallery[:70_000], labels[:70_000], gallery[:200], labels[:200])   # what libraries and tiles need
before = peak()
knn(gallery, labels, gallery[:200], labels[:200])
print(peak() - before)
"""


def test_knn_makes_no_copy_of_the_gallery():
    "307 MB of points: one copy more, or the whole matrix of 240 MB, would show."
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150e6


# Votes and k-NN

def knn_by_hand(train, labels, test, truth, k, temperature):
    "Percent right at the first and at the first five, one picture and one neighbour at a time."
    first = five = 0
    for point, answer in zip(test, truth.tolist(), strict=True):
        cosine = [float(point @ other / point.norm() / other.norm()) for other in train]
        order = sorted(range(len(train)), key=lambda i: -cosine[i])[:k]
        ballot = {}
        for i in order:
            ballot[int(labels[i])] = ballot.get(int(labels[i]), 0) + math.exp(cosine[i] / temperature)
        ranking = sorted(ballot, key=lambda label: -ballot[label])
        first += ranking[0] == answer
        five += answer in ranking[:5]
    return 100 * first / len(test), 100 * five / len(test)


@pytest.mark.parametrize("classes", [2, 3, 5, 13])
@pytest.mark.parametrize("temperature", [.05, .07, 1.])
def test_knn_equals_double_loop(classes, temperature):
    data = blobs(90, 41, classes=classes, seed=classes, spread=2.)
    found = knn(*data, ks=(1, 7, 20, 500), temperature=temperature)
    for k, value in found.items():
        assert value == pytest.approx(knn_by_hand(*data, k, temperature)), k


@pytest.mark.parametrize("seed", range(3))
def test_knn_equals_sklearn(seed):
    train, labels, test, truth = blobs(300, 200, classes=6, seed=seed, spread=2.)
    other = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / .07))
    other.fit(train.numpy(), labels.numpy())
    assert knn(train, labels, test, truth)[20][0] == pytest.approx(100 * other.score(test.numpy(), truth.numpy()))


def test_knn_takes_any_labels():
    "Numbers of classes may have gaps, and be large or negative; a class of the test set may be unknown in training."
    train, labels, test, truth = blobs(80, 40, classes=5)
    names = torch.tensor([10**12, -4, 7, 8, 3])
    expected = knn(train, labels, test, truth, ks=[9])
    assert knn(train, names[labels], test, names[truth], ks=[9]) == expected
    strangers = truth.clone()
    strangers[:20] = 99
    top1, top5 = knn(train, labels, test, strangers, ks=[9])[9]
    assert top1 <= top5 <= 50


@pytest.mark.parametrize("device", DEVICES)
def test_knn_on_device(device):
    data = blobs(100, 50)
    train, labels, test, truth = (x.to(device) for x in data)
    for moved in ((train, labels, test, truth), (train, *data[1:])):
        assert knn(*moved)[20] == pytest.approx(knn(*data)[20])


def test_sweep_is_knn_at_every_pair():
    data = blobs(90, 41, classes=5, seed=5, spread=2.)
    found = knn_sweep(*data, ks=(1, 7, 500), temperatures=(.05, 1.))
    assert list(found) == [(k, T) for k in (1, 7, 500) for T in (.05, 1.)]
    for (k, T), value in found.items():
        assert value == pytest.approx(knn_by_hand(*data, k, T)), (k, T)
    assert {k: found[k, .05] for k in (1, 7, 500)} == knn(*data, (1, 7, 500), .05)


def test_sweep_searches_once(monkeypatch):
    calls = []
    monkeypatch.setattr("dino_edu.score.neighbours", lambda *args, **named: calls.append(1) or neighbours(*args, **named))
    knn_sweep(*blobs(60, 20), ks=(1, 5, 10), temperatures=(.01, .1, 1.))
    assert calls == [1]


@pytest.mark.parametrize("k, temperature, disagree", [(1, .07, 0), (5, .07, 0), (500, .2, 0), (500, .2, 1)])   # a small k may cut between twins that disagree
def test_leave_one_out_equals_a_loop(k, temperature, disagree):
    z, labels, _, _ = blobs(45, 1, classes=4, spread=2.)
    z, labels = torch.cat([z, z[:9]]), torch.cat([labels, (labels[:9] + disagree) % 4])   # nine pictures are in the set twice
    right = [torch.tensor(knn_by_hand(z[~out], labels[~out], z[out], labels[out], k, temperature))
             for out in torch.eye(len(z), dtype=torch.bool)]
    found = leave_one_out(z, labels, [k], [temperature])[k, temperature]
    assert found == pytest.approx(torch.stack(right).mean(0).tolist())


def test_leave_one_out_refuses_what_says_nothing():
    with pytest.raises(ValueError, match="at least two classes"):
        leave_one_out(torch.randn(9, 3), torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="have no labels"):
        leave_one_out(torch.randn(9, 3), None)


# Two processes

KS = (1, 5, 20, 500)


def ask_shared():
    "Scores of galleries that are dealt out, as one of the ranks sees them."
    mine = slice(rank(), None, world_size())
    few, pictures = blobs(11, 40, classes=3), tinted(25)
    found = {}
    for name, (train, labels, test, truth) in dict(many=blobs(151, 60, classes=7, spread=2.), few=few).items():
        found[name] = knn_sweep(train[mine], labels[mine], test, truth, KS, (.07, 1.), shared=True)
    found["share"] = features(nn.Flatten(), pictures, 8, gather=False)
    found["all"] = features(nn.Flatten(), pictures, 8)
    try:
        knn(few[0][mine], torch.full((len(few[0][mine]),), 4), *few[2:], shared=True)
    except ValueError as error:
        found["one class"] = str(error)
    by_rank = torch.full((len(few[0][mine]),), rank())   # one class here, another there: two classes
    found["two classes"] = knn(few[0][mine], by_rank, *few[2:], ks=[3], shared=True)
    return found


def work(me):
    "What one of two processes finds."
    return ask_shared()


@pytest.fixture(scope="module")
def two_ranks(in_two_processes):
    "What both found."
    return in_two_processes(work)


@pytest.mark.parametrize("name, data", [("many", blobs(151, 60, classes=7, spread=2.)), ("few", blobs(11, 40, classes=3))])
def test_shares_of_two_ranks_are_one_gallery(two_ranks, name, data):
    "Also where a rank has fewer points than there are votes."
    assert two_ranks[0][name] == two_ranks[1][name]
    for pair, expected in knn_sweep(*data, KS, (.07, 1.)).items():
        assert two_ranks[0][name][pair] == pytest.approx(expected), pair


def test_shares_of_features(two_ranks):
    expected = features(nn.Flatten(), tinted(25), 8)
    for me, found in enumerate(two_ranks):
        assert torch.equal(found["share"], expected[me::2]) and torch.equal(found["all"], expected)


def test_shares_know_all_classes(two_ranks):
    for found in two_ranks:
        assert "at least two classes" in found["one class"] and found["two classes"] == two_ranks[0]["two classes"]


def test_votes_do_not_overflow():
    similarity, labels = torch.tensor([[.9, .8, -1.]]), torch.tensor([[1, 0, 0]])
    for temperature in (1e-4, 1e-3, .07, 1e6):
        assert torch.isfinite(votes(similarity, labels, 2, temperature)).all()
    far = math.exp(-.1 / .07) + math.exp(-1.9 / .07)
    assert votes(similarity, labels, 2, .07).tolist()[0] == pytest.approx([far, 1])


@pytest.mark.parametrize("classes", [6, 9, 40])
def test_accuracy_equals_sklearn(classes):
    generator = torch.Generator().manual_seed(classes)
    ballot = torch.rand(200, classes, generator=generator, dtype=torch.float64)
    truth = torch.randint(0, classes, (200,), generator=generator)
    expected = [100 * top_k_accuracy_score(truth, ballot, k=k, labels=range(classes)) for k in (1, 5)]
    assert accuracy(ballot, truth) == pytest.approx(expected)


def test_accuracy_with_few_classes():
    ballot = torch.tensor([[.7, .3, 0.], [.2, .8, 0.]])
    assert accuracy(ballot, torch.tensor([0, 0])) == (50, 100)
    assert accuracy(ballot, torch.tensor([2, 2])) == (0, 0), "a class without a vote is no guess"


good = blobs(30, 10)
broken = good[2].clone()
broken[3, 3] = math.nan
BAD = {
    "no labels": ((good[0], None, *good[2:]), "the train pictures have no labels"),
    "no truth": ((*good[:3], None), "the test pictures have no labels"),
    "one class": ((good[0], torch.ones(30, dtype=torch.int64), *good[2:]), "at least two classes"),
    "nothing to learn from": ((good[0][:0], good[1][:0], *good[2:]), r"train: .* not \[0, 16\] and 0 labels"),
    "features of no width": ((good[0][:, :0], *good[1:]), r"train: .* not \[30, 0\]"),
    "nothing to classify": ((*good[:2], good[2][:0], good[3][:0]), r"test: .* not \[0, 16\]"),
    "other number of labels": ((good[0], good[1][:-1], *good[2:]), r"train: .* not \[30, 16\] and 29 labels"),
    "a map for each picture": ((good[0].view(30, 4, 4), *good[1:]), r"features must be \[N, D\]"),
    "another encoder": ((*good[:2], good[2][:, :8], good[3]), "16 wide, test features 8"),
    "diverged": ((*good[:2], broken, good[3]), "test features contain NaN"),
}


@pytest.mark.parametrize("judge", [knn, linear_probe, check_features])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(judge, case):
    data, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        judge(*data)


# Linear probe

@pytest.mark.parametrize("classes, decay", [(3, 1e-4), (5, 1e-3), (7, 1e-2)])
def test_probe_equals_sklearn(classes, decay):
    train, labels, test, truth = blobs(400, 300, classes=classes, seed=classes, spread=3.)
    train, test = train * torch.linspace(.1, 9, 16) + 5, test * torch.linspace(.1, 9, 16) + 5
    mean, std = train.mean(0), train.std(0, correction=0)
    other = LogisticRegression(C=1 / (decay * len(train)), solver="newton-cg", tol=1e-10, max_iter=10_000)
    other.fit(((train - mean) / std).numpy(), labels.numpy())
    top1, classifier = linear_probe(train, labels, test, truth, decay)
    expected = other.predict_proba(((test - mean) / std).numpy())
    np.testing.assert_allclose(classifier(test).softmax(1).detach().numpy(), expected, atol=1e-5)
    assert top1 == pytest.approx(100 * (expected.argmax(1) == truth.numpy()).mean())


def test_probe_of_two_classes_equals_sklearn():
    "Two planes share the work: half the weight each, so the penalty on their difference is half as strong."
    train, labels, test, truth = blobs(400, 300, classes=2, spread=3.)
    mean, std = train.mean(0), train.std(0, correction=0)
    other = LogisticRegression(C=2 / (1e-3 * len(train)), solver="newton-cg", tol=1e-10, max_iter=10_000)
    other.fit(((train - mean) / std).numpy(), labels.numpy())
    _, classifier = linear_probe(train, labels, test, truth, decay=1e-3)
    expected = other.predict_proba(((test - mean) / std).numpy())
    np.testing.assert_allclose(classifier(test).softmax(1).detach().numpy(), expected, atol=1e-5)


def test_probe_in_single_precision():
    data = blobs(1000, 500, classes=5, spread=2.)
    exact, _ = linear_probe(*data)
    single, classifier = linear_probe(data[0].float(), data[1], data[2].float(), data[3])
    assert classifier.weight.dtype == torch.float32 and abs(exact - single) <= .4
    assert linear_probe(data[0].half(), data[1], data[2].half(), data[3])[1].weight.dtype == torch.float32


def test_probe_ignores_scale_and_shift():
    train, labels, test, truth = blobs(200, 100)
    _, plain = linear_probe(train, labels, test, truth)
    _, moved = linear_probe(100 * train - 7, labels, 100 * test - 7, truth)
    torch.testing.assert_close(moved(100 * test - 7), plain(test), rtol=1e-3, atol=1e-3)


def test_probe_with_dead_features():
    "A collapsed encoder scores by chance; it does not divide by zero."
    train, labels, test, truth = blobs(200, 100)
    top1, classifier = linear_probe(torch.full_like(train, 3), labels, torch.full_like(test, 3), truth)
    assert torch.isfinite(classifier.weight).all()
    assert top1 == pytest.approx(100 * (truth == labels.bincount().argmax()).double().mean().item())


def test_probe_without_gradient():
    data = blobs(200, 100)
    expected, _ = linear_probe(*data)
    with torch.no_grad():
        assert linear_probe(*data)[0] == expected


def test_probe_names_a_negative_label():
    train, labels, test, truth = blobs(20, 10)
    labels[3] = -1
    with pytest.raises(ValueError, match="label -1"):
        linear_probe(train, labels, test, truth)


@pytest.mark.parametrize("device", DEVICES)
def test_probe_on_device(device):
    data = blobs(200, 100)
    top1, classifier = linear_probe(data[0].to(device), *data[1:])
    assert classifier.weight.device.type == device and top1 == pytest.approx(linear_probe(*data)[0])


# Scores of encoders

def test_score_has_the_names_of_a_run():
    train, val = tinted(60), tinted(30, seed=1)
    torch.manual_seed(0)
    widths = dict(teacher=8, student=4)
    encoders = {name: nn.Sequential(nn.Flatten(), nn.Linear(192, width)) for name, width in widths.items()}
    metrics = score(encoders, train, val, size=8, linear=True)
    assert set(metrics) == {"knn_teacher", "knn_student", "linear_teacher"}
    assert set(score(encoders, train, val, size=8)) == {"knn_teacher", "knn_student"}
    for name, encoder in encoders.items():
        data = features(encoder, train, 8), train.labels, features(encoder, val, 8), val.labels
        assert metrics[f"knn_{name}"] == knn(*data)[20][0]
    data = features(encoders["teacher"], train, 8), train.labels, features(encoders["teacher"], val, 8), val.labels
    assert metrics["linear_teacher"] == linear_probe(*data)[0]


def test_score_needs_labels():
    labelled = tinted(9)
    bare = Pictures.stack(torch.zeros(9, 3, 12, 12, dtype=torch.uint8), name="holiday")
    for train, val in ((bare, labelled), (labelled, bare)):
        with pytest.raises(ValueError, match="'holiday' has no labels"):
            score(dict(teacher=nn.Flatten()), train, val, size=8)


def test_pixel_knn_takes_the_best_size():
    train, val = tinted(60), tinted(30, seed=1)
    assert pixel_knn(train, val) == 100
    sides = [knn(pixels(train, side), train.labels, pixels(val, side), val.labels)[20][0] for side in (2, 3)]
    assert pixel_knn(train, val, sides=(2, 3)) == max(sides)


def test_standard_error():
    assert standard_error(50, 10_000) == .5
    assert standard_error(60, 2000) == pytest.approx(standard_error(40, 2000)) == pytest.approx(1.0954451)
    assert standard_error(100, 7) == 0
