"""Labels handed on from patch to patch, and the scores of DAVIS, against brute force, scikit-image and cases worked by hand."""
import io
import itertools
import math
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino_edu.patches import patch_features
from dino_edu.recipe import shapes
from dino_edu.segment import davis_pairs, fresh
from dino_edu.video import (
    Colours, Video, boundary, boundary_f, carry, decide, follow, j_and_f, label_shares, made_up_video, propagate, quarters, show_following,
    video_segmentation, videos, write_labels,
)
from dino_edu.weights import find_encoder


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def distributions(*shape, seed=0):
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def square(top, left, side=20, height=60, width=80):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:top + side, left:left + side] = True
    return mask


# Votes

def dense(query, keys, labels, radius, topk, temperature):
    "As it is published: all pairs, a mask of the neighbourhood, all but the largest `topk` set to zero, columns normalised."
    (height, width), count = query.shape[:2], keys.shape[0]
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    near = (place[:, None] - place).abs().amax(-1) <= radius
    affinity = ((query.flatten(0, 1) @ keys.flatten(0, 2).T) / temperature).exp() * near.repeat(1, count)
    affinity[affinity < affinity.topk(topk, dim=1).values[:, -1:]] = 0
    return (affinity / affinity.sum(1, keepdim=True) @ labels.flatten(0, 2)).view(height, width, -1)


@pytest.mark.parametrize("height, width, frames", [(3, 7, 1), (6, 4, 3), (1, 9, 2)])
@pytest.mark.parametrize("radius, topk, temperature", [(1, 1, 0.1), (1, 3, 0.1), (2, 5, 0.5), (12, 5, 0.1)])
def test_carry_is_what_is_published(height, width, frames, radius, topk, temperature):
    query, keys, labels = unit(height, width, 6), unit(frames, height, width, 6, seed=1), distributions(frames, height, width, 3)
    found = carry(query, keys, labels, radius, topk, temperature)
    assert torch.allclose(found, dense(query, keys, labels, radius, topk, temperature), atol=1e-5)
    assert torch.allclose(found.sum(-1), torch.ones(height, width))


def test_with_radius_nought_and_one_frame_every_patch_keeps_its_label():
    labels = distributions(1, 4, 5, 2)
    assert torch.allclose(carry(unit(4, 5, 3), unit(1, 4, 5, 3, seed=1), labels, radius=0), labels[0])


def test_a_patch_beyond_the_radius_has_no_vote():
    keys = torch.zeros(1, 1, 8, 2)
    keys[..., 1] = 1
    keys[0, 0, 7] = query = torch.tensor([1.0, 0.0])
    labels = torch.eye(8).view(1, 1, 8, 8)
    for radius, who in ((7, 7), (8, 7), (None, 7)):
        assert carry(query.expand(1, 8, 2), keys, labels, radius, topk=1)[0, 0].argmax() == who
    assert carry(query.expand(1, 8, 2), keys, labels, 6, topk=1)[0, 0, 7] == 0


def test_labels_and_objects_have_no_order():
    query, keys, labels, order = unit(4, 5, 6), unit(2, 4, 5, 6, seed=1), distributions(2, 4, 5, 4), [2, 0, 3, 1]
    assert torch.allclose(carry(query, keys, labels)[..., order], carry(query, keys, labels[..., order]), atol=1e-6)


# From frame to frame

@pytest.mark.parametrize("last_frames", [0, 1, 3])
def test_first_and_last_frames_are_asked(last_frames):
    features, first = [unit(3, 4, 5, seed=t) for t in range(6)], distributions(3, 4, 2)
    known = [first]
    for t in range(1, 6):
        asked = [0, *range(max(1, t - last_frames), t)]
        known.append(carry(features[t], torch.stack([features[i] for i in asked]), torch.stack([known[i] for i in asked]), radius=2))
    found = list(propagate([7 * f for f in features], first, last_frames, radius=2))   # lengths do not matter
    assert len(found) == 6 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, known))


def test_frames_are_read_when_they_are_needed():
    read = []
    found = propagate((read.append(t) or unit(2, 2, 3, seed=t) for t in itertools.count()), distributions(2, 2, 2))
    next(found), next(found)
    assert read == [0, 1]


def test_labels_that_do_not_fit():
    with pytest.raises(ValueError, match=r"labels of \[2, 3\] patches do not fit features of \[3, 2\]"):
        next(propagate([unit(3, 2, 4)], distributions(2, 3, 2)))


# In, and out again

def test_label_shares_by_hand():
    labels = torch.zeros(4, 6, dtype=torch.uint8)
    labels[:, 3:], labels[0, 0] = 2, 1
    assert torch.allclose(label_shares(labels, (1, 2)), torch.tensor([[[11 / 12, 1 / 12, 0], [0, 0, 1]]]))
    assert label_shares(labels, (3, 5)).sum(-1).allclose(torch.ones(3, 5))   # patches that are no whole pixels


def test_decide_by_hand():
    p = torch.tensor([[0.1, 0.2, 0.28, 0.5]])
    soft = torch.stack([1 - p, p], -1)
    assert decide(soft, (1, 4)).tolist() == [[0, 0, 0, 1]]                     # above (0.1 + 0.5) / 2
    assert decide(soft + torch.tensor([0, 0.2]), (1, 4), stretch=False).tolist() == [[0, 0, 0, 1]]
    assert not decide(soft, (1, 4), stretch=False).any()
    assert decide(soft, (1, 8)).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]         # bilinear: .1 .125 .175 .22 .26 .335 .445 .5


@pytest.mark.parametrize("shares, label", [([1, 0], 0), ([0, 1], 1), ([0.2, 0.8], 1)])
def test_maps_without_contrast_stay(shares, label):
    found = decide(torch.tensor(shares, dtype=torch.float).expand(2, 3, 2), (4, 6))
    assert (found == label).all() and found.dtype == torch.uint8


# Following

class Notes:
    "Colours, and the sizes of the pictures that were asked for."
    patch_size = 4

    def __init__(self):
        self.sizes = []

    def __call__(self, image):
        self.sizes.append(tuple(image.shape[-2:]))
        return Colours(4)(image)


@pytest.mark.parametrize("height, width, size, read", [(48, 80, 24, (24, 40)), (48, 85, 16, (16, 28)), (90, 41, 8, (16, 8)), (30, 40, 1, (4, 4))])
def test_frames_are_read_in_whole_patches_at_their_aspect(height, width, size, read):
    net, first = Notes(), torch.zeros(height, width, dtype=torch.uint8)
    first[:height // 2] = 1
    found = follow(net, torch.zeros(2, 3, height, width, dtype=torch.uint8), first, size)
    assert net.sizes == [read] * 2 and found.shape == (2, height, width) and found.dtype == torch.uint8


def test_what_stands_still_is_kept():
    noise = torch.randint(256, (3, 24, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = torch.zeros(24, 40, dtype=torch.uint8)
    first[4:16, 8:20], first[16:24, 28:40] = 1, 2
    found = follow(Colours(4), noise.expand(5, 3, 24, 40), first, 24, topk=1)
    j, _ = j_and_f(found, first.expand(5, -1, -1))
    assert j.min() > 0.9   # corners are rounded by the bilinear enlargement


def test_follow_is_its_parts():
    clip, net = made_up_video(3, frames=4), fresh(shapes(), [0])[0]
    features = [patch_features(net, frame) for frame in clip.frames]
    soft = propagate(features, label_shares(clip.labels[0], (12, 20)), last_frames=2, radius=3, topk=4)
    literal = torch.stack([decide(s, (48, 80), stretch=False) for s in soft])
    assert torch.equal(follow(net, clip.frames, clip.labels[0], 48, stretch=False, last_frames=2, radius=3, topk=4), literal)


def test_nothing_to_follow():
    frames = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="first frame shows no object"):
        follow(Colours(4), frames, torch.zeros(8, 8, dtype=torch.uint8), 8)
    with pytest.raises(ValueError, match=r"frame 2 has \[8, 9\] pixels, the first mask \[8, 8\]"):
        follow(Colours(4), [frames[0], torch.zeros(3, 8, 9, dtype=torch.uint8)], torch.ones(8, 8, dtype=torch.uint8), 8)
    for use in (lambda net: follow(net, frames, torch.ones(8, 8, dtype=torch.uint8), 8), lambda net: video_segmentation(dict(a=[net]), [], 8)):
        with pytest.raises(ValueError, match="Linear has no patches to follow"):
            use(torch.nn.Linear(2, 2))


# J and F

def blobs(seed, height=40, width=56):
    "A smooth random mask."
    noise = torch.randn(1, 1, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=(height, width), mode="bicubic")[0, 0] > 0.3


def test_boundary_pixel_by_pixel():
    for seed in range(3):
        mask = blobs(seed)
        found, (height, width) = boundary(mask), mask.shape
        for y, x in itertools.product(range(height), range(width)):
            around = [mask[v, u] for v, u in ((y, x + 1), (y + 1, x), (y + 1, x + 1)) if v < height and u < width]
            if y == height - 1 or x == width - 1:   # beyond the border a pixel goes on as it is
                around = [mask[min(v, height - 1), min(u, width - 1)] for v, u in ((y, x + 1), (y + 1, x))]
            assert found[y, x] == any(other != mask[y, x] for other in around)


@pytest.mark.parametrize("tolerance", [0.008, 0.03, 0.06])
def test_boundary_f_against_scikit_image(tolerance):
    morphology = pytest.importorskip("skimage.morphology")
    for seed in range(4):
        found, truth = blobs(seed), blobs(seed).roll(2, 1) ^ square(5, 5, 6, 40, 56)
        ours, theirs = boundary(found).numpy(), boundary(truth).numpy()
        disk = morphology.disk(math.ceil(tolerance * np.linalg.norm(truth.shape)))
        precision = ours[morphology.dilation(theirs.astype(np.uint8), disk) > 0].sum() / ours.sum()
        recall = theirs[morphology.dilation(ours.astype(np.uint8), disk) > 0].sum() / theirs.sum()
        assert boundary_f(found, truth, tolerance).item() == pytest.approx(2 * precision * recall / (precision + recall))


def test_j_and_f_by_hand():
    here = square(10, 10)   # the diagonal is 100 pixels: one is allowed
    cases = torch.stack([here, square(10, 11), square(10, 12), square(10, 35), here & False]).byte()
    j, f = j_and_f(cases, here.byte().expand(5, -1, -1))
    assert torch.allclose(j, torch.tensor([[1, 380 / 420, 360 / 440, 0, 0]]))
    assert torch.allclose(f, torch.tensor([[1, 1, 42 / 80, 0, 0]]))   # two aside: 20 pixels above, 20 below, and one beside each left corner


def test_nothing_is_found_where_nothing_is():
    nothing, everything = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    everything = ~everything
    assert boundary_f(nothing, nothing) == boundary_f(everything, nothing) == 1   # neither has a boundary
    assert boundary_f(square(2, 2, 4, 9, 9), nothing[0]) == 0 == boundary_f(nothing[0], square(2, 2, 4, 9, 9))
    assert boundary_f(torch.stack([nothing, nothing]), torch.stack([nothing, nothing])).shape == (2, 1)


def test_objects_are_those_of_the_first_frame():
    truth = torch.zeros(3, 20, 30, dtype=torch.uint8)
    truth[:, 2:8, 2:8], truth[:, 12:18, 2:8], truth[1:, 2:8, 20:26] = 1, 3, 5
    found = truth.clone()
    found[2][found[2] == 3] = 1   # the third object is taken for the first
    j, f = j_and_f(found, truth)
    assert torch.allclose(j, torch.tensor([[1, 1, 0.5], [1, 1, 0]])) and torch.allclose(f, torch.tensor([[1, 1, 2 / 3], [1, 1, 0]]))
    with pytest.raises(ValueError, match=r"labels of \[2, 20, 30\] cannot be compared with a truth of \[3, 20, 30\]"):
        j_and_f(found[:2], truth)
    with pytest.raises(ValueError, match="no object"):
        j_and_f(found, truth * 0)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 48, 103])
def test_quarters_are_those_of_the_official_tool(n):
    values = torch.randn(2, n, generator=torch.Generator().manual_seed(n))
    ends = (np.round(np.linspace(1, n, 5) + 1e-10) - 1).astype(int)
    literal = np.stack([values.numpy()[:, ends[q]:ends[q + 1] + 1].mean(1) for q in range(4)], 1)
    assert np.allclose(quarters(values), literal, atol=1e-6)


# The measurement

def still_video(name, shifts, objects=1):
    "An object that a shift displaces, over a frame that never changes, and others that stay."
    labels = torch.zeros(len(shifts), 60, 80, dtype=torch.uint8)
    for t, shift in enumerate(shifts):
        labels[t][square(10, 10 + shift)] = 1
        for k in range(1, objects):
            labels[t][square(35, 25 * k - 20)] = k + 1
    frames = torch.randint(256, (3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).expand(len(shifts), -1, -1, -1)
    return Video(name, frames, labels, tuple(f"{t:05}" for t in range(len(shifts))))


def test_scores_of_what_does_not_move():
    "Videos whose truth moves by known steps: what stays scores fractions known by hand."
    two = [still_video("one", [0, 1, 2, 30]), still_video("three", [0, 0, 0, 0], objects=3)]
    out = video_segmentation(dict(colours=[Colours(4)]), two, 60)
    m, j = out["metrics"], 50 * (380 / 420 + 360 / 440)
    assert (m["videos"], m["objects"], m["frames"]) == (2, 4, 8)
    assert out["objects"]["one/1"]["still"] == pytest.approx([j, 50 * (1 + 42 / 80)], rel=1e-5)
    assert m["j_still"] == pytest.approx((j + 300) / 4) and m["f_still"] == pytest.approx((76.25 + 300) / 4)   # over objects
    assert m["jf_still"] == pytest.approx((m["j_still"] + m["f_still"]) / 2)
    by_video = np.array([(j + 76.25) / 2, 100])
    half = 12.7062 * by_video.std(ddof=1) / 2**0.5   # t of one degree of freedom
    assert m["jf_still_interval"] == pytest.approx([by_video.mean() - half, by_video.mean() + half], rel=1e-4)
    assert m["decay_still"] == pytest.approx(100 * (380 / 420 - 360 / 440) / 4, rel=1e-4)
    assert "less_colours" not in m and m["less_still"] == pytest.approx(np.mean(
        [np.mean([sum(v["colours"]) - sum(v["still"]) for name, v in out["objects"].items() if name.startswith(video)]) / 2 for video in ("one", "three")]))
    with_last = video_segmentation(dict(colours=[Colours(4)]), two, 60, last=True)
    assert with_last["objects"]["one/1"]["still"][0] == pytest.approx(j * 2 / 3, rel=1e-5)


def test_several_networks_of_a_name_are_averaged():
    clips, nets = [made_up_video(5, frames=4)], fresh(shapes(), range(2))
    both, *single = (video_segmentation(dict(untrained=each), clips, 48) for each in (nets, nets[:1], nets[1:]))
    for key in ("j_untrained", "f_untrained", "decay_untrained", "less_still"):
        assert both["metrics"][key] == pytest.approx(sum(each["metrics"][key] for each in single) / 2, abs=1e-3)
    assert math.isnan(both["metrics"]["jf_untrained_interval"][0])   # a single video has no interval


def test_too_little_to_measure():
    with pytest.raises(ValueError, match="no videos"):
        video_segmentation(dict(a=[Colours(4)]), [], 48)
    with pytest.raises(ValueError, match="made-up 1: 2 frames are too few"):
        video_segmentation(dict(a=[Colours(4)]), [made_up_video(1, frames=2)], 48)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_helps_to_follow(seed):
    trained, recipe, _ = find_encoder("shapes_vit_nano")
    clips = [made_up_video(40 * seed + s, frames=8) for s in range(4)]
    m = video_segmentation(dict(trained=[trained], untrained=fresh(recipe, [seed])), clips, 48)["metrics"]
    assert m["less_untrained"] > 15 and m["less_still"] > 25 and m["jf_trained"] > 60


# Videos

def test_made_up_videos():
    clip = made_up_video(7, frames=6, objects=3, height=40, width=72, size=24)
    assert clip.frames.shape == (6, 3, 40, 72) and clip.frames.dtype == torch.uint8 == clip.labels.dtype and len(clip.names) == 6
    assert set(clip.labels.unique().tolist()) == {0, 1, 2, 3} and torch.equal(clip.frames, made_up_video(7, 6, 3, 40, 72, 24).frames)
    assert not torch.equal(clip.labels[0], clip.labels[3]) and not torch.equal(clip.labels, made_up_video(8, 6, 3, 40, 72, 24).labels)
    alone = made_up_video(7, frames=6, height=24, width=24, size=24)   # no room to move
    assert torch.equal(alone.labels[0], alone.labels[5])
    for wrong, match in ((dict(size=49), "does not fit into frames of 48 x 80"), (dict(objects=0), "one to 10 objects, not 0"), (dict(objects=11), "not 11")):
        with pytest.raises(ValueError, match=match):
            made_up_video(0, **wrong)


def test_made_up_objects_move_otherwise_than_their_background():
    for seed in range(3):
        clip = made_up_video(seed, frames=8)
        rows, columns = (clip.labels > 0).float().mean((1, 2)), clip.labels
        middle = torch.stack([(m > 0).nonzero().float().mean(0) for m in columns])
        assert (middle[1:] - middle[:-1]).norm(dim=1).max() > 1 and rows.max() < 2 * rows.min()
        behind = (clip.labels[0] == 0) & (clip.labels[7] == 0)
        assert (clip.frames[0].float() - clip.frames[7].float()).abs()[:, behind].mean() > 8   # noise alone gives 6


# DAVIS

def davis_folder(folder, masks, mode="L", palette=False, name="swan"):
    "A video of grey frames with these masks."
    for t, mask in enumerate(masks):
        for kind, ending, image in (("JPEGImages", "jpg", Image.new("RGB", mask.shape[::-1], (40 * t, 80, 120))), ("Annotations", "png", Image.fromarray(mask.numpy()))):
            path = folder / kind / "480p" / name / f"{t:05}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "Annotations":
                image = image.convert(mode) if mode != "P" else Image.fromarray(mask.numpy(), "P")
                if palette:
                    image.putpalette(list(range(256)) * 3)
            image.save(path)
    return folder


def numbered(*values):
    masks = torch.zeros(len(values), 16, 24, dtype=torch.uint8)
    for mask, row in zip(masks, values):
        for k, value in enumerate(row):
            mask[2:6, 8 * k:8 * k + 4] = value
    return masks


@pytest.mark.parametrize("mode", ["L", "1", "RGB"])
def test_one_object_in_white(tmp_path, mode):
    read, = videos(davis_folder(tmp_path, numbered([255], [255, 255]), mode), None)
    assert read.name == "swan" and read.names == ("00000", "00001") and read.frames.shape == (2, 3, 16, 24)
    assert torch.equal(read.labels, numbered([1], [1, 1]))


@pytest.mark.parametrize("mode, palette", [("P", True), ("L", False)])
def test_several_objects_by_number(tmp_path, mode, palette):
    read, = videos(davis_folder(tmp_path, numbered([1, 2, 3], [2, 255, 1]), mode, palette), None)
    assert torch.equal(read.labels, numbered([1, 2, 3], [2, 0, 1]))   # undecided pixels are background


def test_lists_and_archives(tmp_path):
    for name in ("bear", "swan"):
        davis_folder(tmp_path / "DAVIS", numbered([1, 2], [2, 1]), name=name)
    lists = tmp_path / "DAVIS" / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("swan\n")
    with tarfile.open(tmp_path / "davis.tar", "w") as tar:
        tar.add(tmp_path / "DAVIS", "DAVIS")
    for path in (tmp_path / "DAVIS", tmp_path / "davis.tar"):
        assert [video.name for video in videos(path, "2017/val")] == ["swan"]
        assert [video.name for video in videos(path, None)] == ["bear", "swan"]
    with pytest.raises(FileNotFoundError, match="no list ImageSets/propagation.txt; there is 2017/val"):
        next(videos(tmp_path / "DAVIS"))
    with pytest.raises(FileNotFoundError, match="no DAVIS at .*nowhere"):
        next(videos(tmp_path / "nowhere"))


def test_masks_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="first frame of swan shows no object"):
        next(videos(davis_folder(tmp_path / "a", numbered([0], [1])), None))
    folder = davis_folder(tmp_path / "b", numbered([1], [1]))
    mask = folder / "Annotations/480p/swan/00001.png"
    Image.new("L", (24, 15)).save(mask)
    with pytest.raises(ValueError, match="masks of swan have several sizes: 24 x 15, 24 x 16"):
        next(videos(folder, None))
    Image.new("RGB", (24, 16), (200, 0, 0)).save(mask)
    with pytest.raises(ValueError, match=r"swan/00001 has colours \(mode RGB\)"):
        next(videos(folder, None))
    mask.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="the mask of swan/00001 is not a readable picture"):
        next(videos(folder, None))


def test_written_labels_are_indexed_pngs(tmp_path):
    video = made_up_video(2, frames=3, objects=3)
    paths = write_labels(tmp_path / "results", video, video.labels)
    assert [p.relative_to(tmp_path).as_posix() for p in paths] == [f"results/made-up 2/{t:05}.png" for t in range(3)]
    for path, labels in zip(paths, video.labels):
        with Image.open(path) as image:
            assert image.mode == "P" and np.array_equal(np.array(image), labels.numpy())
            colours = np.array(image.getpalette()).reshape(-1, 3)
    known = {0: [0, 0, 0], 1: [128, 0, 0], 2: [0, 128, 0], 3: [128, 128, 0]}   # as in DAVIS
    assert all(colours[k].tolist() == colour for k, colour in known.items())
    with pytest.raises(ValueError, match="made-up 2 has 3 frames, so it takes as many labels, not 2"):
        write_labels(tmp_path / "short", video, video.labels[:2])
    assert not (tmp_path / "short").exists()


def test_figure():
    video = replace(made_up_video(1, frames=7, objects=2), name="two")
    fig = show_following(video, dict(truth=video.labels, nobody=torch.zeros_like(video.labels)), count=3)
    titles = [ax.get_title() for ax in fig.axes]
    assert titles == ["frame 1: given", "frame 4: J 100%", "frame 7: J 100%", "frame 1: given", "frame 4: J 0%", "frame 7: J 0%"]
    fig.savefig(file := io.BytesIO())
    assert len(file.getvalue()) > 10_000


def test_colours_are_normalised_pixels():
    image = torch.randint(256, (3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = Colours(4)(image)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    literal = (image[:, 4:8, 8:12].float() / 255 - mean[:, None, None]) / std[:, None, None]
    assert found.shape == (2, 3, 48) and torch.allclose(found[1, 2], literal.flatten(), atol=1e-5)


def test_real_videos(shared_data):
    path = shared_data / "davis2016val-240p-small.tar"
    listed = [frame.split("/")[0] for frame, _, _ in davis_pairs(path, "propagation")]
    assert len(listed) == 182 and list(dict.fromkeys(listed)) == ["blackswan", "car-shadow", "libby", "scooter-black"]
    video = next(videos(path))
    assert video.frames.shape == (50, 3, 240, 427) and set(video.labels.unique().tolist()) == {0, 1}
    trained, *_ = find_encoder("shapes_vit_nano")
    found = follow(trained, video.frames[:5], video.labels[0], 64)
    j, f = j_and_f(found, video.labels[:5])
    assert j[0, 1:].min() > 0.3 and f.min() > 0.2   # calling everything object has a J of 0.1 and no boundary
