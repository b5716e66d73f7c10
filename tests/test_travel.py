"""Sets read where they are, three ways to use a start, and paired differences."""
import json

import pytest
import torch
from PIL import Image
from torch import nn

from dino_edu.data import Pictures
from dino_edu.transfer import tuning
from dino_edu.travel import ELSEWHERE, PUBLISHED, WAYS, gain, plot_travel, presets_markdown, read_target, travel, travel_markdown


def save(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), (grey, grey, grey)).save(path)


# Reading

def test_inaturalist_by_its_lists(tmp_path):
    for split, rows in (("train", [(11, 7), (12, 3), (13, 7)]), ("val", [(20, 3)])):
        for number, _ in rows:
            save(tmp_path / f"train_val2019/Birds/{number}.png", number)
        (tmp_path / f"{split}2019.json").write_text(json.dumps(dict(
            images=[dict(id=number, file_name=f"train_val2019/Birds/{number}.png") for number, _ in reversed(rows)],
            annotations=[dict(image_id=number, category_id=category) for number, category in rows])))
    train, val = read_target(tuning("inat19", picture_size=16), tmp_path)
    assert train.labels.tolist() == [1, 0, 1] and val.labels.tolist() == [0] and train.classes == val.classes == ("3", "7")
    assert [int(train[i][0, 0, 0]) for i in range(3)] == [11, 12, 13] and int(val[0][0, 0, 0]) == 20 and val[0].shape[1] == 16


def test_cars_by_torchvisions_lists(tmp_path):
    import numpy as np
    from scipy.io import savemat
    home = tmp_path / "stanford_cars"
    (home / "devkit").mkdir(parents=True)
    savemat(home / "devkit/cars_meta.mat", dict(class_names=np.array(["coupe", "van"], dtype=object)))
    for split, file, greys in (("train", "devkit/cars_train_annos.mat", [30, 60, 90]), ("test", "cars_test_annos_withlabels.mat", [200, 210])):
        rows = np.array([(f"{grey}.png", k % 2 + 1) for k, grey in enumerate(greys)], dtype=[("fname", object), ("class", object)])
        savemat(home / file, dict(annotations=rows))
        for grey in greys:
            save(home / f"cars_{split}/{grey}.png", grey)
    train, val = read_target(tuning("cars"), tmp_path)
    assert train.labels.tolist() == [0, 1, 0] and val.labels.tolist() == [0, 1] and train.classes == ("coupe", "van")
    assert [int(train[i][0, 0, 0]) for i in range(3)] == [30, 60, 90] and int(val[1][0, 0, 0]) == 210


def test_flowers_learn_from_train_and_val(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import Flowers102
    home = tmp_path / "flowers-102"
    for number in range(1, 7):
        save(home / f"jpg/image_{number:05}.jpg", 40 * number)
    savemat(home / "setid.mat", dict(trnid=[[1, 3]], valid=[[2, 5]], tstid=[[4, 6]]))
    savemat(home / "imagelabels.mat", dict(labels=[[1, 2, 1, 2, 3, 3]]))
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)   # of the real files' check sums
    train, val = read_target(tuning("flowers102"), tmp_path)
    assert train.labels.tolist() == [0, 0, 1, 2] and val.labels.tolist() == [1, 2] and len(train.classes) == 102
    assert int(val[0][0, 0, 0]) == pytest.approx(160, abs=3)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_missing_is_said(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{name} is read from a folder: pass root="):
        read_target(tuning(name))
    with pytest.raises(FileNotFoundError, match=f"{name} is not in .*: (fetch|put|its first)"):
        read_target(tuning(name), tmp_path)


def test_named_sets_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar10 is not in"):
        read_target(tuning("cifar10"), tmp_path)
    with pytest.raises(FileNotFoundError, match="pass root="):
        read_target(tuning("imagenet"))
    train, val = read_target(tuning("shapes", data="shapes:30"), seed=4)
    assert len(train) == 30 and len(val) == 6 and train[0].shape == (3, 48, 48)
    for kind, grey in (("cat", 10), ("dog", 200)):
        for k in range(8):
            save(tmp_path / "zoo" / kind / f"{k}.png", grey)
    train, val = read_target(tuning("shapes", data=str(tmp_path / "zoo"), picture_size=16))
    assert train.classes == ("cat", "dog") and len(train) + len(val) == 16


def test_an_unlabelled_folder(tmp_path):
    for k in range(4):
        save(tmp_path / "walk" / f"{k}.png", k)
    with pytest.raises(ValueError, match="has no labels, and fine-tuning learns from them"):
        read_target(tuning("shapes", data=str(tmp_path / "walk")))


# Travelling

class MeanColour(nn.Module):
    "Sees colour alone, or (blind) nothing but noise."
    embed_dim = 3

    def __init__(self, blind=False):
        super().__init__()
        self.weight, self.blind = nn.Parameter(torch.ones(3)), blind

    def forward(self, x):
        seen = x.mean((2, 3)) * self.weight
        return x[:, :, 0, :3].diff(dim=2).sum(2) * self.weight if self.blind else seen


def colours(n, seed):
    labels = torch.arange(n) % 3
    noise = torch.randint(0, 120, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Pictures.stack((noise + 130 * torch.eye(3, dtype=torch.uint8)[labels][:, :, None, None]), labels, "rgb", name="colours")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    plan, out = tuning("shapes", size=16, batch=6, steps=3, layer_decay=1.0, precision="fp32"), tmp_path_factory.mktemp("runs")
    return [row for seed in range(3) for row in travel(dict(blind=MeanColour(True), sees=MeanColour()), [plan], colours(45, seed), colours(30, 100 + seed),
                                                      out / str(seed), seed, say=None)]


def test_rows(rows):
    assert [(row["start"], row["seed"]) for row in rows] == [(start, seed) for seed in range(3) for start in ("blind", "sees")]
    assert all(row[way] == 100 for row in rows if row["start"] == "sees" for way in WAYS)
    assert all(row[way] < 75 for row in rows if row["start"] == "blind" for way in WAYS)


@pytest.mark.parametrize("way", WAYS)
def test_gain_is_a_paired_t_interval(rows, way):
    from scipy.stats import ttest_rel
    sees, blind = ([row[way] for row in rows if row["start"] == start] for start in ("sees", "blind"))
    expected = ttest_rel(sees, blind).confidence_interval()
    found = gain(list(reversed(rows)), "colours", way, "sees", "blind")
    assert (found.low, found.high, found.n) == pytest.approx((expected.low, expected.high, 3), rel=1e-4)


def test_gain_pairs_seeds_and_nothing_else(rows):
    more = rows + [dict(rows[0], seed=9, frozen=0.0), dict(rows[1], data="other", frozen=0.0)]   # no partner; another set
    assert gain(more, "colours", "frozen", "sees", "blind") == gain(rows, "colours", "frozen", "sees", "blind")
    with pytest.raises(ValueError, match="no seed of 'colours' has both 'sees' and 'scratch'"):
        gain(rows, "colours", "frozen", "sees")


def test_figure(rows):
    figure = plot_travel(rows + [dict(row, data="elsewhere", tuned=10.0) for row in rows])
    assert [axes.get_title() for axes in figure.axes] == ["start: blind", "start: sees"] and [len(axes.lines) for axes in figure.axes] == [4, 4]
    line, dots = figure.axes[1].lines[2:]
    assert line.get_ydata().tolist() == [100, 100, 10] and len(dots.get_ydata()) == 9


def test_the_papers_table():
    assert PUBLISHED["ViT-S/16", "DINO"] == dict(cifar10=99.0, cifar100=90.5, inat18=72.0, inat19=78.2, flowers102=98.5, cars=93.0, imagenet=81.5)
    assert PUBLISHED["ViT-B/16", "supervised"]["inat18"] == 73.2 and all(tuning(name) for name in PUBLISHED["ViT-B/16", "DINO"])
    lines = presets_markdown().splitlines()
    assert len(lines) == 9 and len({line.count("|") for line in lines}) == 1
    assert "| inat18 | 1024 | 0.0001 | 300 |" in lines[4] and lines[4].endswith("| 70.7 | 72.0 | 73.2 | 72.6 |")


def test_held_out_pictures_choose_the_plan(tmp_path, monkeypatch):
    "Whatever val says."
    scores = {1e-4: dict(held_top1=60.0, val_top1=90.0), 1e-3: dict(held_top1=70.0, val_top1=50.0), 1e-2: dict(held_top1=65.0, val_top1=95.0)}
    monkeypatch.setattr("dino_edu.travel.finetune", lambda net, plan, *rest: dict(metrics=scores[plan.lr], seconds=1.0, device="cpu"))
    plans = [tuning("shapes", size=16, lr=lr) for lr in scores]
    row, = travel(dict(sees=MeanColour()), plans, colours(45, 0), colours(30, 1), tmp_path)
    assert row["tuned"] == 50 and row["seconds"] == 3 and row["labels"] == 45


def test_a_share_of_the_labels(tmp_path, monkeypatch):
    "As many of each class, drawn by the seed, the same for every start."
    seen = []
    monkeypatch.setattr("dino_edu.travel.finetune",
                        lambda net, plan, train, *rest: seen.append(train.offsets.tolist()) or dict(metrics=dict(held_top1=1.0, val_top1=1.0), seconds=1.0, device="cpu"))
    plan, starts = tuning("shapes", size=16), dict(one=MeanColour(), two=MeanColour())
    for seed in (0, 1):
        rows = travel(starts, [plan], colours(60, 0), colours(30, 1), tmp_path, seed, labels=0.2)
        assert [row["labels"] for row in rows] == [12, 12]
    assert seen[0] == seen[1] != seen[2] == seen[3]
    with pytest.raises(ValueError, match="a share lies between 0 and 1"):
        travel(starts, [plan], colours(60, 0), colours(30, 1), tmp_path, labels=0.0)


def test_the_table_in_words(rows):
    text = travel_markdown(rows + [dict(rows[0], data="elsewhere", tuned=10.0)])
    head, _, blind, sees, elsewhere = text.splitlines()
    assert head.count("|") == blind.count("|") == 8 and sees == "| sees | colours | 45 | 100.0 ± 0.0 | 100.0 ± 0.0 | 100.0 ± 0.0 | 3 |"
    assert elsewhere.endswith("| 10.0 | 1 |")
