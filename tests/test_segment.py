"""Masks of videos and objects, choices that no picture makes for itself, and intervals over what is independent."""
import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from torch import nn

from dino_edu.attention import jaccard_table
from dino_edu.data import Pictures, load
from dino_edu.recipe import override, shapes
from dino_edu.run import record
from dino_edu.segment import (
    MASSES, SWEEP, Interval, Scene, area, blob, crossfit, davis, davis_pairs, fresh, group_means, interval, look, measure, plot_segment, read_scenes,
    scene, scenes_of, segment, segment_markdown, voc,
)
from dino_edu.shapes import make
from dino_edu.vit import backbone


class Looks(nn.Module):
    "Looks where it is told: the maps of one picture, or what a function makes of the picture."
    patch_size = 4

    def __init__(self, where):
        super().__init__()
        self.where, self.weight = where, nn.Parameter(torch.zeros(1))

    def attention(self, x, layer, token):
        maps = self.where(x[0]) if callable(self.where) else self.where   # [heads, h, w]
        return torch.cat([torch.zeros(len(maps), 1), maps.flatten(1)], 1)[None, :, None]


def black(height, width):
    return torch.zeros(3, height, width, dtype=torch.uint8)


# Pictures with masks

@pytest.mark.parametrize("height, width, expected", [(60, 90, (20, 28)), (90, 60, (28, 20)), (40, 40, (20, 20)), (20, 47, (20, 44))])
def test_aspect_is_kept_and_patches_are_whole(height, width, expected):
    mask = torch.ones(1, height, width, dtype=torch.bool)
    s = scene(black(height, width), mask, 20, 4, "a")
    assert s.image.shape == (3, *expected) and s.masks.shape == (1, *expected) and torch.allclose(s.masks, torch.ones(()))


def test_small_objects_do_not_vanish():
    masks = torch.zeros(2, 80, 80, dtype=torch.bool)
    masks[0, 5, 5], masks[1, 40:, :] = True, True
    s = scene(black(80, 80), masks, 20, 4, "a")
    assert s.masks[0].sum() == pytest.approx(1 / 16) and s.masks[1].sum() == pytest.approx(200)


def test_objects_outside_the_patches_are_left_out():
    masks = torch.zeros(2, 20, 22, dtype=torch.bool)
    masks[0, 3:9, 3:9], masks[1, :, 20:] = True, True
    assert len(scene(black(20, 22), masks, 20, 4, "a").masks) == 1
    with pytest.raises(ValueError, match="swan: there is no object"):
        scene(black(20, 22), masks[1:], 20, 4, "a", "swan")
    with pytest.raises(ValueError, match=r"swan: a mask of \[20, 21\] pixels"):
        scene(black(20, 22), masks[..., :-1], 20, 4, "a", "swan")


def test_scenes_of_a_set():
    pictures = load("shapes", n=20, seed=3)[0]
    found = scenes_of(pictures, 48, 4)
    assert len(found) == 20 == len({s.group for s in found})
    assert all(torch.equal(s.image, pictures[i]) and torch.equal(s.masks[0] > 0.5, pictures.masks[i]) for i, s in enumerate(found))
    assert torch.allclose(area(found), pictures.masks.float().mean((1, 2)))
    with pytest.raises(ValueError, match="photos: there are no masks"):
        scenes_of(Pictures.stack(black(8, 8)[None], name="photos"), 8, 4)


# DAVIS

def davis_files(resolution="240p", sequences=("bear", "swan"), frames=3):
    "Name and bytes of every file: a square that moves by four pixels a frame."
    files = {}
    for n, sequence in enumerate(sequences):
        for f in range(frames):
            mask = torch.zeros(48, 80, dtype=torch.uint8)
            mask[8:24, 8 + 16 * n + 4 * f : 24 + 16 * n + 4 * f] = 255
            for folder, ending, pixels in (("JPEGImages", "jpg", mask[:, :, None].expand(-1, -1, 3)), ("Annotations", "png", mask)):
                Image.fromarray(pixels.numpy()).save(file := io.BytesIO(), "JPEG" if ending == "jpg" else "PNG")
                files[f"{folder}/{resolution}/{sequence}/{f:05}.{ending}"] = file.getvalue()
    listed = [f"{sequence}/{f:05}" for sequence in sequences for f in range(0, frames, 2)]
    return files | {"ImageSets/attention.txt": "\n".join(listed).encode()}


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def packed(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_davis_from_folder_and_tar(tmp_path):
    files = davis_files()
    found = [davis(write(tmp_path / "folder", files), 24, 4), davis(packed(tmp_path / "d.tar", files), 24, 4),
             davis(packed(tmp_path / "w.tar", {f"DAVIS/{name}": data for name, data in files.items()}), 24, 4)]
    for scenes in found:
        assert [s.name for s in scenes] == ["bear/00000", "bear/00002", "swan/00000", "swan/00002"]
        assert [s.group for s in scenes] == ["bear", "bear", "swan", "swan"]
        assert scenes[0].image.shape == (3, 24, 40) and scenes[3].masks[0].sum() == pytest.approx(8 * 8)
        assert (scenes[3].masks[0].nonzero().float().mean(0) - torch.tensor([7.5, 19.5])).abs().max() < 1e-4   # rows 4..11, columns 16..23


def test_lists_of_davis_itself(tmp_path):
    files = davis_files("480p")
    files["ImageSets/480p/val.txt"] = b"/JPEGImages/480p/swan/00001.jpg /Annotations/480p/swan/00001.png\n\n"
    folder = write(tmp_path, files)
    assert [s.name for s in davis(folder, 24, 4, "480p/val")] == ["swan/00001"]
    assert len(davis(folder, 24, 4, None)) == 6


def test_lists_of_sequences(tmp_path):
    files = davis_files() | {"ImageSets/2017/val.txt": b"swan\nbear\n"}
    folder = write(tmp_path, files)
    whole = [f"{sequence}/{f:05}" for sequence in ("swan", "bear") for f in range(3)]
    assert [frame for frame, _, _ in davis_pairs(folder, "2017/val")] == whole
    (folder / "ImageSets/2017/val.txt").write_text("sw\n")
    with pytest.raises(ValueError, match="frame sw is listed, but has no picture"):
        list(davis_pairs(folder, "2017/val"))


def test_frames_without_an_object_are_left_out(tmp_path):
    files = davis_files(sequences=["bear"])
    Image.new("L", (80, 48)).save(file := io.BytesIO(), "PNG")
    files["Annotations/240p/bear/00002.png"] = file.getvalue()
    assert [s.name for s in davis(write(tmp_path / "one", files), 24, 4)] == ["bear/00000"]
    files["Annotations/240p/bear/00000.png"] = file.getvalue()
    with pytest.raises(ValueError, match="no frame shows an object"):
        davis(write(tmp_path / "none", files), 24, 4)


def test_what_is_missing_of_davis_is_named(tmp_path):
    files = davis_files()
    with pytest.raises(FileNotFoundError, match="no DAVIS at .*nowhere"):
        davis(tmp_path / "nowhere", 24, 4)
    with pytest.raises(FileNotFoundError, match="no list ImageSets/val.txt; there is attention"):
        davis(write(tmp_path / "a", files), 24, 4, "val")
    with pytest.raises(ValueError, match="there is no Annotations/RESOLUTION/SEQUENCE"):
        davis(write(tmp_path / "b", {name: data for name, data in files.items() if "Annotations" not in name}), 24, 4)
    with pytest.raises(ValueError, match="swan/00002 is listed, but has no mask"):
        davis(write(tmp_path / "c", {name: data for name, data in files.items() if name != "Annotations/240p/swan/00002.png"}), 24, 4)
    with pytest.raises(ValueError, match="bear/00000 is listed, but has no picture"):
        davis(write(tmp_path / "d", {name: data for name, data in files.items() if name != "JPEGImages/240p/bear/00000.jpg"}), 24, 4)


def test_davis_2016(shared_data):
    scenes = davis(shared_data / "davis2016val-240p-small.tar", 240, 8)
    assert len(scenes) == 141 and len({s.group for s in scenes}) == 20 and {s.image.shape for s in scenes} == {(3, 240, 424)}
    assert area(scenes).mean() == pytest.approx(0.083, abs=0.002)   # as its README says


# VOC

@pytest.fixture
def voc_root(tmp_path):
    "Two pictures: two objects of class 3 and an undecided border; one of class 9."
    base = tmp_path / "VOCdevkit" / "VOC2012"
    one, two = torch.zeros(2, 40, 60, dtype=torch.uint8)
    one[4:20, 4:20], one[20:24, 4:20], one[8:24, 32:48], two[:20] = 1, 255, 2, 1
    for name, numbers, kind in (("2007_1", one, 3), ("2007_2", two, 9)):
        for folder, pixels in (("SegmentationObject", numbers), ("SegmentationClass", torch.where((numbers > 0) & (numbers < 255), kind, numbers))):
            (base / folder).mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels.numpy(), "P")
            image.putpalette(list(range(256)) * 3)
            image.save(base / folder / f"{name}.png")
        (base / "JPEGImages").mkdir(exist_ok=True)
        Image.new("RGB", (60, 40)).save(base / "JPEGImages" / f"{name}.jpg")
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_1\n2007_2\n")
    return tmp_path


def test_voc_by_object_and_as_one(voc_root):
    scenes = voc(voc_root, 40, 4)
    assert [(s.group, len(s.masks)) for s in scenes] == [("2007_1", 2), ("2007_2", 1)]
    assert [int(mask.sum()) for s in scenes for mask in s.masks] == [256, 256, 1200]
    assert [[int(mask.sum()) for mask in s.masks] for s in voc(voc_root, 40, 4, objects=False)] == [[512], [1200]]
    found, name = read_scenes(str(voc_root), 20, 4)
    assert name.startswith("VOC2012") and found[0].image.shape == (3, 20, 28)


def test_voc_that_is_not_there(tmp_path, voc_root):
    with pytest.raises(FileNotFoundError, match="no VOC 2012 in .*download=True"):
        voc(tmp_path / "nowhere", 40, 4)
    with pytest.raises(FileNotFoundError, match="no VOC 2012.*train.txt"):
        voc(voc_root, 40, 4, split="train")


# Scores

def test_jaccard_by_hand():
    maps = torch.tensor([[[0.5, 0.3], [0.15, 0.05]], [[0.0, 0.0], [0.0, 1.0]]])
    mask = torch.zeros(1, 8, 8)
    mask[0, :4, :6] = 1   # all of patch 0, half of patch 1
    table = look(Looks(maps), [Scene(black(8, 8), mask, "a", "")], (0.4, 0.6, 0.95))
    assert torch.allclose(table, torch.tensor([[[1 / 1.5, 0], [1.5 / 2, 0], [1.5 / 3, 0]]]))


def test_several_objects_and_sizes():
    mask = torch.zeros(2, 8, 8)
    mask[0, :4, :4], mask[1, 4:] = 1, 1
    maps = torch.tensor([[[1.0, 0], [0, 0]]])
    scenes = [Scene(black(8, 8), mask, "a", ""), Scene(black(8, 8), mask.flip(0), "b", "")]
    assert look(Looks(maps), scenes, [0.6])[:, 0, 0].tolist() == [1, 0, 0, 1]
    wide = Scene(black(8, 12), torch.ones(1, 8, 12), "c", "")
    assert blob([*scenes, wide], 4).shape == (5, len(SWEEP), 3) and area([*scenes, wide]).tolist() == [0.25, 0.5, 0.5, 0.25, 1]
    assert SWEEP[: len(MASSES)] == MASSES


def test_table_is_the_table_of_chapter_04():
    attention, masks = torch.rand(5, 3, 4, 4), torch.rand(5, 16, 16)
    table = jaccard_table(attention, masks, [0.4])
    for i in range(5):
        assert torch.allclose(look(Looks(attention[i]), [Scene(black(16, 16), masks[i][None], "a", "")], [0.4])[0], table[:, i], atol=1e-6)


# Choices

def test_group_means_by_hand():
    values = torch.tensor([[1.0, 10], [3, 30], [5, 50]])
    assert group_means(values, ["b", "a", "b"]).tolist() == [[3, 30], [3, 30]]
    assert group_means(values[:, 0], [0, 1, 2]).tolist() == [1, 3, 5]


@pytest.mark.parametrize("groups", [[f"video {i // 4}" for i in range(28)], [f"video {i % 7}" for i in range(28)], list(range(28))])
def test_no_picture_chooses_for_its_own_group(groups):
    torch.manual_seed(0)
    scores = torch.rand(28, 6)
    found, choice = crossfit(scores, groups)
    assert torch.equal(found, scores[torch.arange(28), choice])
    for group in set(groups):
        own = torch.tensor([g == group for g in groups])
        for column in range(6):   # whatever the own group says, its choice stays
            changed = scores.clone()
            changed[own] = torch.eye(6)[column] * 100
            assert torch.equal(crossfit(changed, groups)[1][own], choice[own])


def test_the_choice_is_the_best_of_the_other_groups():
    torch.manual_seed(1)
    scores, groups = torch.rand(12, 4), ["abc"[i % 3] if i < 9 else "d" for i in range(12)]
    choice = crossfit(scores, groups, folds=4)[1]
    for i, group in enumerate(groups):
        means = [sum(scores[[k for k in range(12) if groups[k] == other]].double().mean(0) for other in "abcd" if other != group)]
        assert choice[i] == means[0].argmax()
    assert torch.equal(crossfit(scores, groups, folds=99)[1], choice)
    with pytest.raises(ValueError, match="only one group"):
        crossfit(scores, ["a"] * 12)


@pytest.mark.parametrize("n, level", [(2, 0.95), (20, 0.95), (20, 0.5)])
def test_interval_is_that_of_scipy(n, level):
    from scipy.stats import ttest_1samp
    values = torch.rand(3 * n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    groups = [i // 3 for i in range(3 * n)]
    expected = ttest_1samp(values.view(n, 3).mean(1).numpy(), 0).confidence_interval(level)
    found = interval(values, groups, level)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high)) and found.n == n and found.mean == pytest.approx(values.mean().item())


def test_interval_of_little():
    one = interval(torch.tensor([3.0, 5.0]), ["a", "a"])
    assert one.mean == 4 and one.low != one.low and one.n == 1
    assert str(Interval(45.23, 41, 49.96, 3)) == "45.2 [41.0, 50.0]"
    with pytest.raises(ValueError, match="no values"):
        interval(torch.tensor([]))


# The measurement

def looks_at_light(x):
    "One head on what is bright, one on the rest."
    bright = (x.mean(0).unflatten(-1, (-1, 4)).unflatten(0, (-1, 4)).mean((1, 3)) > 0).float() + 1e-9
    return torch.stack([1 - bright + 2e-9, bright])


def test_a_network_that_sees_the_object(tmp_path):
    scenes = davis(packed(tmp_path / "d.tar", davis_files(sequences=["bear", "swan", "cow"])), 48, 4, None)
    found = segment(dict(trained=[Looks(looks_at_light)], untrained=[Looks(torch.rand(2, 12, 20)) for _ in range(2)]), scenes, 4)
    m, curves = found["metrics"], found["curves"]
    assert m["objects"] == 9 and m["groups"] == 3 and m["jaccard_trained"] == pytest.approx(100) and all(head == 1 for _, head in m["choices"])
    assert m["jaccard_area"] == pytest.approx(100 * 256 / (48 * 80))
    for rival in ("untrained", "gaussian", "area"):
        assert m[f"less_{rival}"] == pytest.approx(m["jaccard_trained"] - m[f"jaccard_{rival}"]) and m[f"less_{rival}"] > 50
        low, high = m[f"less_{rival}_interval"]
        assert low <= m[f"less_{rival}"] <= high
    assert curves["masses"] == list(SWEEP) and all(len(curves[name]) == len(SWEEP) for name in curves)
    assert all(oracle[0] >= honest[0] - 0.01 for oracle, honest in zip(curves["oracle_untrained"], curves["untrained"]))
    assert len(plot_segment(curves).axes[0].lines) == 5


class Layered(Looks):
    "Blocks that look where they are told, each at its own."

    def __init__(self, *where):
        super().__init__(where)
        self.blocks = where

    def attention(self, x, layer, token):
        return Looks(self.where[layer]).attention(x, layer, token)


def test_layers_are_chosen_on_other_pictures(tmp_path):
    "Only the first of two blocks sees the object; all maps of a block come before those of the next."
    scenes = davis(packed(tmp_path / "d.tar", davis_files(sequences=["bear", "swan", "cow"])), 48, 4, None)
    nets = dict(trained=[Layered(looks_at_light, torch.rand(2, 12, 20))], untrained=[Layered(*torch.rand(2, 2, 12, 20))])
    first, last = (look(nets["trained"][0], scenes, layers=[layer]) for layer in (0, 1))
    assert torch.equal(look(nets["trained"][0], scenes, layers=(0, 1)), torch.cat([first, last], 2))
    assert torch.equal(look(nets["trained"][0], scenes), last)
    last, every = (segment(nets, scenes, 4, layers=layers)["metrics"] for layers in ((-1,), (0, 1)))
    assert every["jaccard_trained"] == pytest.approx(100) and {number for _, number in every["choices"]} == {1} and last["jaccard_trained"] < 60


def test_several_untrained_networks_are_averaged():
    scenes = scenes_of(load("shapes", n=30)[0], 32, 4)
    nets = fresh(override(shapes(), picture_size=32), [0, 1])
    both, one, two = (segment(dict(trained=nets[:1], untrained=some), scenes, 4)["metrics"] for some in (nets, nets[:1], nets[1:]))
    assert both["jaccard_untrained"] == pytest.approx((one["jaccard_untrained"] + two["jaccard_untrained"]) / 2)
    assert one["less_untrained"] == 0 and one["jaccard_untrained"] != two["jaccard_untrained"]


def test_fresh_networks_differ_by_seed_alone():
    a, b, again = fresh(shapes(), [0, 1, 0])
    weights = [net.blocks[0].attn.qkv.weight for net in (a, b, again)]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1]) and not a.training


def test_a_row(tmp_path):
    recipe = shapes()
    net = fresh(recipe, [5])[0]
    found = measure(net, recipe, "shapes:100", seed=7, inits=1)
    assert found["data"] == "shapes val" and found["size"] == 32 and found["metrics"]["groups"] == 20
    again = measure(net, recipe, "shapes:100", seed=7, size=48, inits=1)
    assert again["size"] == 48 and again["metrics"]["jaccard_trained"] != found["metrics"]["jaccard_trained"]
    assert read_scenes("shapes:100", 32, 4, seed=7)[0][0].image.equal(scenes_of(Pictures.stack(*make(20, 15)[:1], masks=make(20, 15)[2]), 32, 4)[0].image)
    line = record(tmp_path / "rows.jsonl", found, "segment", "dino", "shapes", {}, None, curves=found["curves"], size=found["size"])
    assert json.loads((tmp_path / "rows.jsonl").read_text())["metrics"] == line["metrics"]
    text = segment_markdown([line])
    assert "| dino | 7 | shapes val | 32 | last | 20 |" in text and f"{line['metrics']['jaccard_trained']:.1f} [" in text


def test_a_network_without_attention():
    with pytest.raises(ValueError, match="resnet18 shows no attention"):
        measure(backbone("resnet18"), override(shapes(), encoder="resnet18"), "shapes:100")
