"""Figures and widgets where chapters 04c, 08g and 17 do not go; a browser moves them in test_browser.py."""
import io
from dataclasses import replace
from datetime import datetime

import ipywidgets
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dino_edu.data import Pictures
from dino_edu.explore import (
    AttentionExplorer, draw_attention, draw_crops, draw_emergence, draw_temperature, panel, touch_crops, touch_emergence, touch_temperature,
)
from dino_edu.map import draw_map, draw_neighbours, flat_map, touch_map, touch_neighbours, with_bar
from dino_edu.picker import PHOTOGRAPHS, Picker, gallery, grid_points, png, to_patches
from dino_edu.shapes import NAMES, make
from dino_edu.vit import ViT


def net(seed=0, **options):
    torch.manual_seed(seed)
    return ViT(**dict(img_size=32, patch_size=4, width=32, depth=2, heads=2, init_std=None) | options).eval()


def shapes(n=20):
    images, labels, masks = make(n, seed=3, size=48)
    return Pictures.stack(images, labels, NAMES, masks, "shapes")


def shown(data):
    "The pixels of a PNG."
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(scope="module")
def pictures():
    return gallery(generated=2)


# Pictures and points

def test_gallery_without_photographs(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    assert len(gallery(generated=3)) == 3 and not set(PHOTOGRAPHS) & gallery().keys()


def test_photographs(pictures):
    pytest.importorskip("skimage")
    assert pictures["chelsea"].shape == (3, 300, 451) and pictures["chelsea"].is_contiguous()


@pytest.mark.parametrize("size, shape", [(32, (32, 48)), (50, (48, 72)), (4, (4, 4))])
def test_to_patches(size, shape):
    assert to_patches(torch.zeros(3, 100, 150, dtype=torch.uint8), size, 4).shape == (3, *shape)


def test_too_small_for_a_patch():
    with pytest.raises(ValueError, match="holds no patch of 16"):
        to_patches(torch.zeros(3, 100, 150, dtype=torch.uint8), 8, 16)


def test_png_of_grey_and_of_wide_pictures():
    grey = torch.arange(6, dtype=torch.uint8).view(1, 2, 3)
    assert (shown(png(grey)) == grey.permute(1, 2, 0).expand(-1, -1, 3).numpy()).all()
    assert shown(png(grey, wide=7)).shape == (6, 9, 3) and shown(png(grey, wide=2)).shape == (2, 3, 3)


def test_points_are_the_centres():
    assert grid_points(2, 2) == [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]


def test_picker_sends_what_the_browser_needs():
    picker = Picker(picture=b"png", points=[(0.5, 0.5)], alt="a dot")
    assert {"picture", "points", "chosen", "alt", "caption", "hover"} <= set(picker.keys) and picker.chosen == -1


# Panels

def test_panel_keeps_the_last_good_picture():
    def draw(n):
        if n == 2:
            raise ValueError("two is too many")
        figure = Figure(figsize=(1 + n, 1))
        figure.set_label(f"number {n}")
        return figure
    control = ipywidgets.IntSlider(0)
    *_, view = panel(draw, n=control).children
    control.value = 1
    good = view.picture
    assert view.caption == view.alt == "number 1" and shown(good).shape[1] == 200
    control.value = 2
    assert view.caption == "two is too many" and view.picture == good
    control.value = 1
    control.value = 0
    assert view.caption == "number 0"


def test_temperature_and_crops_follow(pictures):
    for box in (touch_temperature(), touch_crops(pictures)):
        *controls, view = box.children
        for control in controls:
            before = view.picture
            if isinstance(control, ipywidgets.FloatRangeSlider):
                control.value = (0.1, 0.2)
            elif isinstance(control, ipywidgets.Dropdown | ipywidgets.SelectionSlider):
                control.value = control.options[-1]
            else:
                control.value = control.min if control.value != control.min else control.max
            assert view.picture != before, control.description


@pytest.mark.parametrize("center", [0.0, 1.0])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_temperature_in_numbers(temperature, center):
    figure = draw_temperature(temperature, center, out_dim=16)
    bars = [bar.get_height() for bar in figure.axes[1].patches]
    assert len(bars) == 16 and sum(bars) == pytest.approx(1)
    mean_over_pictures = np.interp(temperature, *figure.axes[2].lines[0].get_data())
    assert f"entropy {mean_over_pictures:.2f} nats" in figure.get_label()
    assert (mean_over_pictures > 0.99 * np.log(16)) == (temperature == 1.0)   # hot: uniform
    common = figure.axes[0].lines[0].get_ydata()
    assert (np.abs(common).max() < 1e-6) == (center == 1.0)


def test_crops_of_an_oblong_picture():
    figure = draw_crops(torch.randint(0, 256, (3, 60, 200), dtype=torch.uint8), local_scale=(0.05, 0.1), n_local=3)
    whole = figure.axes[0]
    height, width = whole.images[0].get_array().shape[:2]
    areas = [box.get_width() * box.get_height() / (height * width) for box in whole.patches]
    assert len(areas) == 5 and all(0.03 < area < 0.12 for area in areas[2:]) and all(area > 0.2 for area in areas[:2])


# Attention

def test_attention_figure(pictures):
    image = next(iter(pictures.values()))
    figure = draw_attention(net(), image, 32, mass=0.5, patch=9)
    (dot,) = figure.axes[0].lines
    assert dot.get_xydata().tolist() == [[(1 + 0.5) * 4, (1 + 0.5) * 4]] and figure.axes[-1].images


def test_explorer(pictures, tmp_path):
    explorer = AttentionExplorer({"small": (net(), 16), "other": (net(1, heads=4, depth=3), 32)}, pictures)
    assert (explorer.layer.max, explorer.size.value, len(explorer.head.options)) == (2, 32, 3)
    explorer.head.value = 1
    explorer.network.value = "other"
    assert (explorer.layer.max, explorer.layer.value, explorer.size.value, len(explorer.head.options)) == (3, 3, 64, 5)
    assert explorer.head.label == "mean" and "looks, mean, layer 3" in explorer.view.caption

    Image.new("RGB", (64, 32), "red").save(tmp_path / "red.png")
    explorer.view.chosen = explorer.rows * explorer.columns - 1
    explorer.file.value = str(tmp_path / "red.png")   # fewer patches or more: the choice must be one that there is
    assert explorer.picture.value.endswith("red.png") and (explorer.rows, explorer.columns) == (16, 32)
    explorer.size.value = 16
    assert explorer.view.chosen == -1 and (explorer.rows, explorer.columns) == (4, 8)
    explorer.upload.value = (dict(name="blue.png", type="image/png", size=1, content=b"no picture", last_modified=datetime.now()),)
    assert "blue.png: not a readable picture" in explorer.view.caption


def test_explorer_asks_once_under_a_bar(pictures):
    large, asked, seen = net(1, heads=4, depth=3), [], []
    large.patch_embed.register_forward_hook(lambda *_: asked.append(large))
    explorer = AttentionExplorer({"small": (net(), 16), "large": (large, 32)}, pictures)
    explorer.bar.observe(lambda change: seen.append((change.new, explorer.bar.max, explorer.bar.layout.visibility)), "value")
    explorer.network.value = "large"
    assert len(asked) == 1 and explorer.bar.layout.visibility == "hidden"
    assert [each for each in seen if each[0]] == [(1, 2, "visible"), (2, 2, "visible")]   # the last block is asked for its attention alone
    explorer.view.chosen = 5
    explorer.mass.value = 0.3   # paints anew, asks nobody
    assert len(asked) == 2


def test_explorer_draws_once(pictures, tmp_path):
    "A list with new options stands at its first for a moment, which nobody wants to see."
    explorer, drawn = AttentionExplorer({"small": (net(), 16), "other": (net(1, heads=4, depth=3), 32)}, pictures), []
    explorer.view.observe(lambda change: drawn.append(change.new), "picture")
    explorer.network.value = "other"
    assert len(drawn) == 1
    Image.new("RGB", (64, 32), "red").save(tmp_path / "red.png")
    explorer.picture.value = list(pictures)[-1]
    drawn.clear()
    explorer.file.value = str(tmp_path / "red.png")
    (shown,) = drawn
    with Image.open(io.BytesIO(shown)) as found:
        assert found.width == 2 * found.height


def test_emergence(pictures):
    course = {0: dict(student=net(0), teacher=net(0)), 5: dict(student=net(1), teacher=net(2))}
    figure = draw_emergence(course, next(iter(pictures.values())), 32)
    assert len(figure.axes) == 6 and "step 0, 5" in figure.get_label()
    rows = [[axes.images[0].get_array() for axes in figure.axes[r:r + 3]] for r in (0, 3)]
    assert (rows[0][1] == rows[1][1]).all() and (rows[0][2] != rows[1][2]).any()   # equal at first, then not
    *_, step, kind, mass, head, view = touch_emergence(course, pictures, 32).children
    before, step.value = view.picture, 0
    assert view.picture != before and "after step 0" in view.caption
    before, head.value = view.picture, 1
    assert view.picture != before


# Embeddings

def test_neighbours_do_not_find_themselves():
    pictures, embedding = shapes(), torch.randn(20, 8)
    embedding[1] = embedding[0]   # a double: as near as itself
    figure = draw_neighbours(dict(a=embedding), pictures, 0, k=3)
    arrays = [axes.images[0].get_array() for axes in figure.axes]
    assert (arrays[0] == pictures[0].permute(1, 2, 0).numpy()).all() and (arrays[1] == pictures[1].permute(1, 2, 0).numpy()).all()
    assert not any((array == arrays[0]).all() for array in arrays[1:])


def test_without_labels():
    pictures, embedding = replace(shapes(), labels=None, classes=()), torch.randn(20, 8)
    assert all(not axes.get_title() for axes in draw_neighbours(dict(a=embedding), pictures, 4).axes)
    sheet, answer = touch_neighbours(dict(a=embedding), pictures, shown=7).children
    assert len(sheet.points) == 7 and answer.picture
    box = touch_map(dict(a=torch.rand(20, 2)), pictures)
    assert box.children[1].children[1].caption == "number 0"


def test_map_puts_alike_side_by_side():
    pytest.importorskip("sklearn")
    groups = torch.eye(8)[:3].repeat_interleave(10, 0) + 0.05 * torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    places = flat_map(groups)
    far = torch.cdist(places, places).fill_diagonal_(9).argmin(1)
    assert (far // 10 == torch.arange(30) // 10).all()
    dots = draw_map(places[:20], shapes()).axes[0].collections[0].get_offsets()
    assert np.allclose(dots, places[:20])


def test_map_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.manifold", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        flat_map(torch.randn(5, 3))


def test_bar_closes_whatever_happens(monkeypatch):
    closed = []
    monkeypatch.setattr(ipywidgets.IntProgress, "close", lambda bar: closed.append(bar.value))
    assert with_bar(dict(one=lambda: 1, two=lambda: 2)) == dict(one=1, two=2)
    with pytest.raises(ZeroDivisionError):
        with_bar(dict(good=lambda: 1, bad=lambda: 1 / 0))
    assert closed == [2, 1]
