"""What the notebook of chapter 02 does not show: odd sizes, single pictures, Pillow operation by operation, devices."""
import itertools
import pickle

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode

from dino_edu.augment import (MEAN, STD, MultiCrop, TorchvisionMultiCrop, Views, blur_matrix, center_crop, colour_matrix, jitter, normalize,
                              random_boxes, resample, resize_matrix, solarize)
from dino_edu.core import keys, uniform
from dino_edu.shapes import NAMES, make

SMALL = dict(global_size=32, local_size=16, n_local=4)


@pytest.fixture(scope="module")
def batch():
    images = make(6, seed=0)[0]
    return images, torch.full((6, 2), 48), keys(0, 0, torch.arange(6))


@pytest.mark.parametrize("size", [1, 7, 32, 100])
@pytest.mark.parametrize("box", [(0, 0, 37, 53), (5, 11, 1, 1), (36, 0, 1, 53), (3, 4, 20, 17)])
def test_any_box_to_any_size(box, size):
    "As torchvision, also for boxes of one pixel and pictures that are not square."
    image = torch.rand(1, 3, 37, 53, generator=torch.Generator().manual_seed(0))
    ours = resample(image, torch.tensor([box]), size)
    theirs = TF.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_views_at_once_are_views_one_by_one():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 2, 20, 30, generator=generator)
    boxes = torch.tensor([[[0, 0, 20, 30], [1, 2, 9, 8], [10, 20, 10, 10]], [[4, 4, 4, 4], [0, 0, 1, 30], [0, 10, 20, 20]]])
    flips, sigma = torch.tensor([[True, False, True], [False, True, False]]), torch.rand(2, 3, generator=generator)
    together = resample(images, boxes, 12, flips, sigma)
    for v, i in itertools.product(range(2), range(3)):
        alone = resample(images[i : i + 1], boxes[v, i : i + 1], 12, flips[v, i : i + 1], sigma[v, i : i + 1])
        assert torch.allclose(together[v, i], alone[0], atol=1e-6)


def test_matrices_have_nothing_denormal():
    "Numbers next to zero make matrix products a hundred times slower on a CPU."
    blur = blur_matrix(torch.linspace(0, 4, 41), 96)
    resize = resize_matrix(torch.zeros(5), torch.tensor([1, 7, 50, 127, 128]), 128, 96)
    for matrix in (blur, resize, blur[:5] @ resize):
        tiny = (matrix != 0) & (matrix.abs() < 1e-30)
        assert not tiny.any() and torch.allclose(matrix.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("factor", [0.6, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_against_pillow(name, factor):
    "Pillow cuts the decimals off, so up to one level of 255 apart (contrast: and rounds the mean grey)."
    image = (0.4 + 0.2 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))).mul(255).round() / 255
    factors = dict(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0) | {name: factor}
    ours = jitter(image, *(torch.tensor([f]) for f in factors.values()), torch.tensor([False])) * 255
    theirs = getattr(TF, f"adjust_{name}")(TF.to_pil_image(image[0]), factor)
    assert (ours[0] - TF.pil_to_tensor(theirs)).abs().max() < 1.5


def test_hue_is_a_turn():
    one, off = torch.ones(3), torch.zeros(3) > 0
    small, rest, whole = colour_matrix(one, one, torch.tensor([0.1, 0.9, 1.0]), off)
    assert torch.allclose(small @ rest, torch.eye(3), atol=1e-6) and torch.allclose(whole, torch.eye(3), atol=1e-5)
    assert torch.allclose(small @ torch.ones(3), torch.ones(3), atol=1e-6), "greys stay"
    red = torch.tensor([1.0, 0, 0])
    assert (small @ red)[1] > (small @ red)[2], "a positive turn goes from red towards green, as torchvision's"


def test_blur_against_pillow():
    image = (torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).round()
    theirs = TF.pil_to_tensor(TF.to_pil_image(image[0] / 255).filter(ImageFilter.GaussianBlur(1.5))).float()
    ours = resample(image / 255, torch.tensor([[0, 0, 64, 64]]), 64, sigma=torch.tensor([1.5])) * 255
    assert (ours[0] - theirs).abs()[:, 8:-8, 8:-8].mean() < 2   # of a noise whose spread is 74 levels


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize("n_local", [0, 1, 4])
def test_one_picture(batch, chans, n_local):
    images, sizes, key = (x[:1] for x in batch)
    views = MultiCrop(32, 16, n_local)(images[:, :chans], sizes, key)
    assert isinstance(views, Views) and len(views) == 2 + n_local
    assert [tuple(view.shape) for view in views.images] == [(1, chans, 32, 32)] * 2 + [(1, chans, 16, 16)] * n_local
    assert views.boxes.shape == (2 + n_local, 1, 4) and views.flips.shape == (2 + n_local, 1)
    assert all(view.isfinite().all() for view in views.images)


def test_boxes_lie_inside_small_and_long_pictures():
    sizes = torch.tensor([[1, 1], [3, 200], [200, 3], [17, 31], [500, 375]])
    for seed, scale in itertools.product(range(20), ((0.4, 1.0), (0.05, 0.4))):
        boxes = random_boxes(uniform(keys(seed, 0, torch.arange(5)), 40), sizes, scale)
        top, left, tall, wide = boxes.unbind(1)
        assert (boxes == boxes.round()).all() and (tall >= 1).all() and (wide >= 1).all() and (top >= 0).all() and (left >= 0).all()
        assert (top + tall <= sizes[:, 0]).all() and (left + wide <= sizes[:, 1]).all()


def test_padding_is_never_seen():
    "In a batch of sizes, every picture gives the views that it gives alone, and white padding changes nothing."
    generator, sizes = torch.Generator().manual_seed(0), torch.tensor([[20, 40], [40, 20], [33, 17]])
    images = torch.full((3, 3, 40, 40), 255, dtype=torch.uint8)
    for image, (height, width) in zip(images, sizes.tolist()):
        image[:, :height, :width] = torch.randint(0, 120, (3, height, width), generator=generator)
    key = keys(0, 0, torch.arange(3))
    together = MultiCrop(**SMALL)(images, sizes, key)
    for i, (height, width) in enumerate(sizes.tolist()):
        alone = MultiCrop(**SMALL)(images[i : i + 1, :, :height, :width], sizes[i : i + 1], key[i : i + 1])
        assert all(torch.allclose(a[i], b[0], atol=1e-5) for a, b in zip(together.images, alone.images))
    whole = normalize(torch.full((1, 3, 1, 1), 125 / 255))   # bicubic overshoots the 119 of the brightest pixel
    assert (center_crop(images, sizes, 12) < whole + 0.7).all()


def test_epochs_differ_and_repeat(batch):
    images, sizes, _ = batch
    first, again, second = (MultiCrop(**SMALL)(images, sizes, keys(0, epoch, torch.arange(6))) for epoch in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.images, again.images))
    assert (first.boxes != second.boxes).any(-1).float().mean() > 0.9


def test_views_survive_a_pickle(batch):
    "A transform travels to worker processes."
    images, sizes, key = batch
    augment = pickle.loads(pickle.dumps(MultiCrop(**SMALL)))
    assert torch.equal(augment(images, sizes, key).images[0], MultiCrop(**SMALL)(images, sizes, key).images[0])


def test_reference_takes_the_same_arguments():
    arguments = SMALL | dict(global_scale=(0.3, 0.9), local_scale=[0.1, 0.3], jitter=(0.1, 0.1, 0.1, 0.0), jitter_p=0.5, grey_p=0.0,
                             flip_p=0.0, blur_p=(0.0, 0.0, 0.0), blur_sigma=(0.1, 1.0), solarize_p=1.0)
    views = TorchvisionMultiCrop(**arguments)(Image.new("RGB", (60, 40), (255, 255, 255)))
    assert [view.shape[-1] for view in views] == [32, 32, 16, 16, 16, 16]
    black = -(torch.tensor(MEAN) / torch.tensor(STD))
    assert torch.allclose(views[1].amin((1, 2)), black, atol=0.6), "the second view, and only that, is solarised"
    assert views[0].amin() > 1


def test_solarize_leaves_the_lower_half():
    image = torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0]).expand(2, 1, 1, 5)
    out = solarize(image, torch.tensor([True, False]))
    assert torch.allclose(out[0, 0, 0], torch.tensor([0.0, 0.3, 0.5, 0.3, 0.0])) and torch.equal(out[1], image[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_views_on_the_gpu(batch):
    cpu, gpu = MultiCrop(**SMALL)(*batch), MultiCrop(**SMALL)(*(x.cuda() for x in batch))
    assert torch.equal(cpu.boxes, gpu.boxes.cpu()) and torch.equal(cpu.flips, gpu.flips.cpu())
    assert all(torch.allclose(a, b.cpu(), atol=2e-2) for a, b in zip(cpu.images, gpu.images))


def test_generated_pictures_of_any_number_and_size():
    for n, size in ((1, 8), (7, 33), (101, 16)):
        images, labels, masks = make(n, seed=1, size=size)
        assert images.shape == (n, 3, size, size) and masks.shape == (n, size, size) and labels.max() < len(NAMES)
        assert masks.flatten(1).any(1).all()
