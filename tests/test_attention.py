"""Attention maps, masks and scores where the notebook does not go: odd sizes, ties, empty masks, bad input."""
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dino_edu.attention import (
    attention_maps, attention_score, centred_gaussian, class_attention, crop_masks, crop_to_patches, enlarge, inside, jaccard, jaccard_scores,
    mass_mask, paint, patch_attention, patch_share, show_attention, write_attention,
)
from dino_edu.augment import center_crop, normalize
from dino_edu.data import Pictures
from dino_edu.shapes import NAMES, make
from dino_edu.vit import ViT, backbone


def net(**options):
    return ViT(**dict(img_size=32, patch_size=4, width=32, depth=2, heads=2, init_std=None) | options)


def shapes(n=12, seed=3, size=48):
    images, labels, masks = make(n, seed=seed, size=size)
    return Pictures.stack(images, labels, NAMES, masks, "shapes")


# Maps

@pytest.mark.parametrize("height, width", [(32, 32), (33, 35), (16, 60), (63, 4)])
def test_maps_at_any_size(height, width):
    encoder, image = net().eval(), torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    maps = attention_maps(encoder, image)
    assert maps.shape == (2, height // 4, width // 4) and (maps >= 0).all() and (maps.flatten(1).sum(1) < 1).all()
    whole = image[:, : height // 4 * 4, : width // 4 * 4]
    assert torch.equal(crop_to_patches(image, 4), whole) and torch.equal(attention_maps(encoder, whole), maps)
    assert torch.allclose(attention_maps(encoder, normalize(whole[None] / 255)[0]), maps)


def test_every_layer_and_token():
    encoder, image = net().eval(), normalize(torch.rand(1, 3, 32, 24))[0]
    for layer in (0, 1, -1):
        everything = encoder.attention(image[None], layer)[0]
        assert torch.allclose(attention_maps(encoder, image, layer).flatten(1), everything[:, 0, 1:], atol=1e-6)
        assert torch.allclose(patch_attention(encoder, image, 7, 5, layer).flatten(1), everything[:, 1 + 7 * 6 + 5, 1:], atol=1e-6)


def test_patch_of_a_cropped_picture():
    encoder, image = net().eval(), torch.randint(0, 256, (3, 35, 27), dtype=torch.uint8)
    assert torch.equal(patch_attention(encoder, image, 7, 5), patch_attention(encoder, crop_to_patches(image, 4), 7, 5))


def test_mode_and_gradients_are_left_alone():
    encoder = net(drop_path=0.5).train()
    image = torch.rand(3, 32, 32)
    assert torch.equal(attention_maps(encoder, image), attention_maps(encoder, image))
    attention_score(encoder, shapes(4), 32)
    assert encoder.training and all(parameter.grad is None for parameter in encoder.parameters())


def test_one_channel():
    assert attention_maps(net(in_chans=1), torch.randint(0, 256, (1, 16, 32), dtype=torch.uint8)).shape == (2, 4, 8)


def test_bad_maps():
    image = torch.rand(3, 32, 32)
    for look in (attention_maps, lambda encoder, image: class_attention(encoder, image[None]), lambda *both: patch_attention(*both, 0, 0)):
        with pytest.raises(ValueError, match="Timm shows no attention"):
            look(backbone("resnet18"), image)
    with pytest.raises(ValueError, match="3 x 32 pixels holds no patch of 4"):
        attention_maps(net(), image[:, :3])
    for row, col in [(8, 0), (0, 8), (-1, 0)]:
        with pytest.raises(ValueError, match="8 rows and 8 columns"):
            patch_attention(net(), image, row, col)


# Masks

def smallest(values, mass):
    "Size of the smallest set that holds the mass, over all subsets."
    n = len(values)
    sets = ([i for i in range(n) if code >> i & 1] for code in range(2**n))
    return min(len(kept) for kept in sets if sum(values[i] for i in kept) >= mass * sum(values) - 1e-12)


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.6, 0.8, 1.0])
def test_mass_mask_is_the_smallest_set(mass):
    for seed in range(5):
        attention = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed)) ** 3
        found = mass_mask(attention, mass)
        assert attention[found].sum() >= mass * attention.sum() - 1e-6
        assert found.sum() == smallest(attention.double().flatten().tolist(), mass)
        assert attention[found].min() >= attention[~found].max() if (~found).any() else True


def test_mass_mask_of_ties_and_batches():
    assert mass_mask(torch.ones(2, 2), 0.5).tolist() == [[True, True], [False, False]]
    assert mass_mask(torch.ones(2, 5), 0.6).sum() == 6
    maps = torch.rand(2, 3, 4, 5)
    assert all(torch.equal(mass_mask(maps)[i, j], mass_mask(maps[i, j])) for i in range(2) for j in range(3))


@pytest.mark.parametrize("mass", [0, -0.1, 1.1, 60])
def test_bad_mass(mass):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        mass_mask(torch.ones(2, 2), mass)


# Scores

def test_share_of_patches_and_inside():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:2, :3] = True
    assert patch_share(mask, (2, 3)).tolist() == [[1, 0.5, 0], [0, 0, 0]]
    attention = torch.tensor([[[0.1, 0.2, 0.1], [0.1, 0.2, 0.3]], [[1.0, 0, 0], [0, 0, 0]]])
    assert torch.allclose(inside(attention, mask), torch.tensor([0.2, 1.0]))
    assert torch.allclose(inside(0.5 * attention, mask), inside(attention, mask))
    with pytest.raises(ValueError, match="crop_to_patches"):
        patch_share(mask, (3, 3))
    with pytest.raises(ValueError, match="crop_to_patches"):
        enlarge(attention, (5, 6))


def test_jaccard():
    a, b = torch.zeros(2, 4, 4, dtype=torch.bool)
    assert jaccard(a, b) == 1
    a[:2], b[1:3] = True, True
    assert torch.isclose(jaccard(a, b), torch.tensor(4 / 12)) and jaccard(a, a) == 1 and jaccard(a, ~a) == 0
    assert jaccard(torch.stack([a, b]), b).tolist() == [jaccard(a, b).item(), 1]


def test_jaccard_scores_against_a_loop():
    attention, masks = torch.rand(8, 3, 4, 4), torch.rand(8, 16, 16) < 0.3
    scores = jaccard_scores(attention, masks, masses=(0.3, 0.8))
    for m, mass in enumerate((0.3, 0.8)):
        table = [[jaccard(enlarge(mass_mask(attention[i, h], mass), (16, 16)), masks[i]).item() for h in range(3)] for i in range(8)]
        table = torch.tensor(table)
        assert torch.allclose(scores["heads"][m], table.mean(0))
        assert torch.allclose(scores["best_per_picture"][m], table.amax(1).mean())
        assert torch.allclose(scores["best_single"][m], table.mean(0).amax())
        even, odd = table[0::2].mean(0), table[1::2].mean(0)
        assert torch.allclose(scores["held_out"][m], (odd[even.argmax()] + even[odd.argmax()]) / 2)
    assert (scores["best_per_picture"] >= scores["best_single"]).all() and (scores["best_single"] >= scores["held_out"] - 1e-6).all()


def test_perfect_attention_scores_perfectly():
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[:, 8:16, 8:24] = True
    attention = patch_share(mask, (8, 8))[:, None]
    assert torch.allclose(inside(attention, mask), torch.ones(2, 1))
    assert torch.allclose(jaccard_scores(attention, mask, masses=[1.0])["held_out"], torch.ones(1))


def test_masks_follow_the_pictures():
    "A picture that *is* its mask stays so, at any aspect and with padding."
    masks = torch.zeros(3, 60, 50, dtype=torch.bool)
    masks[0, 20:40, 10:30], masks[1, 5:25, 10:40], masks[2, 10:30, 5:20] = True, True, True
    sizes = torch.tensor([[60, 50], [40, 50], [48, 30]])
    white = (255 * masks[:, None].expand(-1, 3, -1, -1)).to(torch.uint8)
    black, one = normalize(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(-1, 3, -1, -1))[:, 0, 0, 0]
    shares = (center_crop(white, sizes, 32)[:, 0] - black) / (one - black)
    cropped = crop_masks(masks, sizes, 32)
    assert torch.equal(cropped, shares >= 0.5) and cropped.any((1, 2)).all()


def test_score():
    pictures, encoder = shapes(), net()
    result = attention_score(encoder, pictures, 32)
    assert result.keys() == {"inside", "inside_heads", "inside_uniform", "inside_gaussian", "masses", "jaccard_heads", "jaccard_best_per_picture",
                             "jaccard_best_single", "jaccard_held_out", "jaccard_gaussian"}
    again = attention_score(encoder, pictures, 32, batch=5)
    assert again["inside"] == pytest.approx(result["inside"], abs=1e-3) and again["masses"] == result["masses"]
    images, sizes = pictures.batch(range(12))
    truth = crop_masks(pictures.masks, sizes, 32)
    maps = class_attention(encoder.eval(), center_crop(images, sizes, 32))
    assert result["inside"] == pytest.approx(100 * inside(maps, truth).mean().item(), abs=1e-3)
    assert result["inside_uniform"] == pytest.approx(100 * truth.float().mean().item(), abs=1e-3)
    gaussian = [inside(centred_gaussian(8, 8), mask).item() for mask in truth]
    assert result["inside_gaussian"] == pytest.approx(100 * sum(gaussian) / 12, abs=1e-3)


def test_score_without_masks():
    with pytest.raises(ValueError, match="shapes: there are no masks"):
        attention_score(net(), replace(shapes(4), masks=None), 32)


# Figures

def test_figure(tmp_path):
    encoder, image = net(), torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8)
    maps = attention_maps(encoder, image)
    fig = show_attention(image, maps, mass=0.8, views=("overlay", "map", "mask"), truth=torch.rand(24, 32) < 0.5)
    assert len(fig.axes) == 3 * 4 and fig.axes[9].get_ylabel() == "80% of the mass"
    fig.savefig(tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 1000
    grey = show_attention(normalize(torch.rand(1, 1, 24, 32))[0], maps)
    assert grey.axes[0].images[0].get_array().shape == (24, 32, 3)


def test_bad_figures():
    image, maps = torch.zeros(3, 25, 32, dtype=torch.uint8), torch.rand(2, 6, 8)
    with pytest.raises(ValueError, match="maps of 6 x 8 patches were not made from a picture of 32 x 25 pixels"):
        show_attention(image.transpose(1, 2), maps)
    with pytest.raises(ValueError, match="maps of 6 x 8 patches were not made from a picture of 3 x 4 pixels"):
        show_attention(image[:, :3, :4], maps)
    with pytest.raises(ValueError, match="heat"):
        show_attention(image[:, :24], maps, views=["heat"])


def test_figure_of_a_picture_that_is_not_cropped():
    "Whether patches had 16 or 17 pixels cannot be seen from 14 of them in 239, so nothing is guessed."
    image, truth = torch.randint(0, 256, (3, 27, 35), dtype=torch.uint8), torch.rand(27, 35) < 0.5
    maps = attention_maps(net(), image)
    for show in (show_attention, lambda image, maps: paint(image, maps[0])):
        with pytest.raises(ValueError, match="crop_to_patches"):
            show(image, maps)
    fig = show_attention(crop_to_patches(image, 4), maps, mass=(0.5, 0.9), truth=crop_to_patches(truth, 4))
    assert all(ax.images[-1].get_array().shape[:2] == (24, 32) for ax in fig.axes if ax.axison)


def test_paint():
    "Alone, the picture is grey and the map is inferno from its lowest to its highest value; between, a mean of both."
    image, heat = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8), torch.rand(6, 8)
    grey, colour = paint(image, heat, 0.0), paint(image, heat, 1.0)
    assert grey.dtype == torch.uint8 and grey.shape == colour.shape == (3, 24, 32)
    assert (grey.float() - image.float().mean(0)).abs().max() <= 0.51
    high = enlarge(heat, (24, 32)) == heat.max()
    assert (colour[:, high].T == torch.tensor([252, 255, 164])).all() and high.sum() == 16   # inferno's last colour
    low = enlarge(heat, (24, 32)) == heat.min()
    assert (colour[:, low].T == torch.tensor([0, 0, 4], dtype=torch.uint8)).all()
    half = (grey.float() + colour.float()) / 2
    assert (paint(image, heat, 0.5).float() - half).abs().max() <= 1


def test_paint_other_pictures():
    "Grey and normalised ones; a map of one value; another aspect is an error."
    grey = torch.randint(0, 256, (1, 16, 24), dtype=torch.uint8)
    heat = torch.rand(4, 6)
    assert (paint(normalize(grey[None] / 255)[0], heat).int() - paint(grey, heat).int()).abs().max() <= 1
    flat = paint(grey, torch.full((4, 6), 0.3), 1.0)
    assert (flat == flat[:, :1, :1]).all()
    with pytest.raises(ValueError, match="maps of 4 x 5 patches"):
        paint(grey, heat[:, :5])


@pytest.mark.parametrize("channels, height, width", [(3, 27, 35), (1, 32, 16), (3, 4, 63)])
def test_written_files(tmp_path, channels, height, width):
    "Every part by its name, of the size of the whole patches, and with the content that it claims."
    image = crop_to_patches(torch.randint(0, 256, (channels, height, width), dtype=torch.uint8), 4)
    maps = attention_maps(net(in_chans=channels), image)
    paths = write_attention(tmp_path / "new" / "folder", image, maps, mass=0.4)
    assert [path.name for path in paths] == ["attention.png", "head_1.png", "head_2.png", "overlay.png", "mask.png"]
    read = {path.stem: np.array(Image.open(path)) for path in paths}
    size = (height // 4 * 4, width // 4 * 4)
    assert all(part.shape[:2] == size for name, part in read.items() if name != "attention")
    for name, heat, strength in [("head_1", maps[0], 1.0), ("head_2", maps[1], 1.0), ("overlay", maps.mean(0), 0.65)]:
        assert np.array_equal(read[name], paint(image, heat, strength).permute(1, 2, 0))
    assert np.array_equal(read["mask"], 255 * enlarge(mass_mask(maps.mean(0), 0.4), size).byte())


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    with pytest.raises(OSError, match="file"):
        write_attention(tmp_path / "file", image, torch.rand(2, 4, 4))


def test_matplotlib_is_not_imported_before_it_is_needed():
    code = "import dino_edu.attention, sys; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
