"""Features of patches where the notebook does not go: odd sizes, one channel, one patch, ties, bad input."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.decomposition import PCA

from dino_edu.attention import attention_maps, mass_mask
from dino_edu.augment import normalize
from dino_edu.patches import (
    bounding_box, foreground, largest_part, patch_features, pca_maps, principal_axes, show_object, show_pca, show_similarity, similarity,
)
from dino_edu.vit import ViT, backbone


def net(**options):
    torch.manual_seed(0)
    return ViT(**dict(img_size=32, patch_size=4, width=32, depth=3, heads=2, init_std=None) | options)


def picture(height=32, width=32, channels=3, seed=0):
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# Features

@pytest.mark.parametrize("height, width", [(32, 32), (33, 35), (16, 60), (63, 4)])
def test_features_at_any_size(height, width):
    encoder, image = net().eval(), picture(height, width)
    features = patch_features(encoder, image)
    rows, columns = height // 4, width // 4
    assert features.shape == (rows, columns, 32)
    x = normalize(image[None, :, : 4 * rows, : 4 * columns] / 255)
    tokens = encoder.tokens(x)[0]
    for row, column in [(0, 0), (rows - 1, 0), (rows - 1, columns - 1)]:
        assert torch.allclose(features[row, column], tokens[1 + row * columns + column], atol=1e-5)
    assert torch.allclose(patch_features(encoder, x[0]), features, atol=1e-5)


def test_features_of_every_layer():
    encoder, image = net().eval(), picture()
    x = encoder.embed(normalize(image[None] / 255))
    for layer, block in enumerate(encoder.blocks):
        x = block(x)
        by_hand = encoder.norm(x)[0, 1:].view(8, 8, 32)
        assert torch.allclose(patch_features(encoder, image, layer), by_hand, atol=1e-5)
        assert torch.equal(patch_features(encoder, image, layer), patch_features(encoder, image, layer - 3))


def test_mode_and_gradients_are_left_alone():
    encoder = net(drop_path=0.5).train()
    features = patch_features(encoder, picture())
    assert torch.equal(features, patch_features(encoder, picture())) and encoder.training and not features.requires_grad


def test_bad_features():
    with pytest.raises(ValueError, match="Timm has no features of patches"):
        patch_features(backbone("resnet18"), picture())
    with pytest.raises(ValueError, match="holds no patch of 4"):
        patch_features(net(), picture(3, 32))
    for layer in (3, -4):
        with pytest.raises(ValueError, match="there are 3 blocks"):
            patch_features(net(), picture(), layer)


# Likeness and components

def test_similarity_against_a_loop():
    features = torch.randn(3, 5, 7)
    found = similarity(features, features[2, 4])
    for row in range(3):
        for column in range(5):
            a, b = features[row, column].double(), features[2, 4].double()
            assert found[row, column].item() == pytest.approx(sum(a * b).item() / (sum(a * a) * sum(b * b)).sqrt().item(), abs=1e-5)


def test_axes_against_scikit_learn():
    rows = torch.randn(200, 10, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 11) + 5
    centre, axes = principal_axes(rows, 4)
    pca = PCA(4).fit(rows.numpy())
    assert np.allclose(centre, pca.mean_, atol=1e-4)
    assert np.allclose(np.abs(np.sum(axes.numpy() * pca.components_, 1)), 1, atol=1e-4)
    assert torch.equal(axes.amax(1), axes.abs().amax(1))


def test_sign_does_not_depend_on_the_order_or_the_sign_of_the_rows():
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 2, 4, 8, 16, 32])
    axes = principal_axes(rows)[1]
    for other in (rows.flip(0), -rows, rows[torch.randperm(50)]):
        assert torch.allclose(principal_axes(other)[1], axes, atol=1e-6)


def test_no_rows_and_one_row():
    with pytest.raises(ValueError, match="keep at least one"):
        principal_axes(torch.empty(0, 5))
    colours, = pca_maps([torch.randn(1, 1, 8)])
    assert colours.shape == (1, 1, 3) and torch.isfinite(colours).all()


def test_equal_patches_have_one_colour():
    colours, = pca_maps([torch.full((4, 5, 8), 1.7)])
    assert torch.isfinite(colours).all() and (colours == colours[0, 0]).all()


def test_colours_agree_between_pictures():
    a, b = torch.randn(2, 6, 6, 8)
    b[3, 2] = a[1, 4]
    first, second = pca_maps([a, b])
    assert torch.allclose(first[1, 4], second[3, 2]) and first.min() == 0 and max(first.max(), second.max()) == 1


def test_colours_of_some_patches():
    a, b = torch.randn(4, 6, 8), torch.randn(5, 3, 8)
    keep = [torch.rand(4, 6) < 0.5, torch.rand(5, 3) < 0.5]
    keep[0][0, 0] = True
    maps = pca_maps([a, b], keep)
    assert all((m[~k] == 1).all() for m, k in zip(maps, keep))
    changed = a.clone()
    changed[~keep[0]] += 100   # what is left out has no say
    assert torch.equal(pca_maps([changed, b], keep)[0], maps[0])


def test_foreground_is_not_the_border():
    for sign in (1, -1):
        features = [torch.zeros(8, 9, 5) for _ in range(3)]
        for i, f in enumerate(features):
            f[2:5 + i, 3:6] = sign * torch.tensor([3.0, 0, 1, 0, 0])
        found = foreground([f + 0.01 * torch.randn_like(f) for f in features])
        for i, mask in enumerate(found):
            assert bounding_box(mask) == (2, 3, 3 + i, 3) and mask.sum() == 3 * (3 + i)


# Parts and boxes

def test_largest_part_against_every_part():
    for seed in range(20):
        mask = torch.rand(7, 9, generator=torch.Generator().manual_seed(seed)) < 0.55
        numbers, n = ndimage.label(mask.numpy())
        part = largest_part(mask)
        assert part.sum() == max((numbers == i).sum() for i in range(1, n + 1))
        assert len(np.unique(numbers[part.numpy()])) == 1 and not (part & ~mask).any()


def test_parts_of_little():
    assert not largest_part(torch.zeros(3, 4, dtype=torch.bool)).any()
    assert largest_part(torch.ones(3, 4, dtype=torch.bool)).all()
    corners = torch.eye(3, dtype=torch.bool)   # they touch by corners alone: the first of equal ones
    assert largest_part(corners).nonzero().tolist() == [[0, 0]]


def test_boxes():
    mask = torch.zeros(10, 12, dtype=torch.bool)
    mask[4, 7] = True
    assert bounding_box(mask) == (4, 7, 1, 1)
    mask[9, 0] = True
    assert bounding_box(mask) == (4, 0, 6, 8)
    with pytest.raises(ValueError, match="empty mask"):
        bounding_box(torch.zeros(2, 2, dtype=torch.bool))


# Figures

def test_similarity_figure(tmp_path):
    fig = show_similarity(picture(27, 35), net(), [(0, 0), (5, 7)], others=[picture(16, 16), picture(40, 20)])
    assert [ax.get_title() for ax in fig.axes[:3]] == ["picture", "like patch A", "like patch B"] and len(fig.axes) == 3 * 3 + 1
    shown = fig.axes[2].images[0].get_array()
    assert shown.shape == (6, 8) and shown[5, 7] == pytest.approx(1, abs=1e-5)
    fig.savefig(tmp_path / "similarity.png")
    for patches, message in [([(6, 0)], "no patch at row 6, column 0: the picture has 6 rows and 8 columns"), ([(0, -1)], "no patch"), ([], "not 0")]:
        with pytest.raises(ValueError, match=message):
            show_similarity(picture(27, 35), net(), patches)


def test_pca_figure(tmp_path):
    images, encoder = [picture(27, 35, seed=1), picture(16, 16, seed=2)], net()
    for keep in (None, "component", "attention"):
        fig = show_pca(images, encoder, keep=keep, mass=0.5)
        fig.savefig(tmp_path / "pca.png")
        assert len(fig.axes) == 4 and fig.axes[0].images[0].get_array().shape == (24, 32, 3)
    white = (np.asarray(fig.axes[2].images[0].get_array()) == 1).all(-1)
    assert np.array_equal(~white, mass_mask(attention_maps(encoder, images[0]).mean(0), 0.5).numpy())
    with pytest.raises(ValueError, match="'mask' is not one of component, attention"):
        show_pca(images, encoder, keep="mask")


def test_object_figure(tmp_path):
    image, encoder = picture(27, 35), net()
    fig = show_object(image, encoder, mass=0.4, head=1, truth=torch.rand(27, 35) < 0.5)
    fig.savefig(tmp_path / "object.png")
    top, left, height, width = bounding_box(largest_part(mass_mask(attention_maps(encoder, image)[1], 0.4)))
    drawn = fig.axes[0].patches[0]
    assert (drawn.get_y() + 0.5, drawn.get_x() + 0.5, drawn.get_height(), drawn.get_width()) == (4 * top, 4 * left, 4 * height, 4 * width)
    assert [ax.get_title() for ax in fig.axes] == [f"a box of {4 * width} x {4 * height} px", "40% of the mass (head 2)", "its largest part"]
    for head in (2, -1):
        with pytest.raises(ValueError, match="there are 2 heads"):
            show_object(image, encoder, head=head)


def test_figures_of_grey_pictures():
    encoder, image = net(in_chans=1), picture(channels=1)
    for fig in (show_similarity(image, encoder, [(1, 1)]), show_pca([image], encoder), show_object(image, encoder)):
        assert fig.axes[0].images[0].get_array().shape == (32, 32, 3)


def test_what_draws_is_not_imported_before_it_is_needed():
    code = "import dino_edu.patches, sys; assert not {'matplotlib', 'scipy.ndimage'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
