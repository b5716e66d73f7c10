"""Films where the notebook does not go: mp4, phones, odd sides, single frames, frames of several sizes, broken files, stopped runs."""
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dino_edu.attention import attention_maps, jaccard
from dino_edu.film import VIEWS, Clip, brightest, contact_sheet, film, moving_shape, read_frames, side_by_side, steadiness, watch
from dino_edu.vit import ViT

av = pytest.importorskip("av", reason="the extra `video` is not installed")


def net(**options):
    torch.manual_seed(0)
    return ViT(**dict(img_size=32, patch_size=4, width=16, depth=1, heads=2, init_std=None) | options)


def gradient(n=5, height=24, width=32):
    "Smooth frames, which compress well: a bright bar that moves from left to right."
    frames = torch.full((n, 3, height, width), 40, dtype=torch.uint8)
    for i in range(n):
        frames[i, :, :, 4 * i:4 * i + 8] = torch.tensor([200, 120, 60], dtype=torch.uint8)[:, None, None]
    return frames


def save(folder, frames, name="frame{}.png"):
    folder.mkdir(exist_ok=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / name.format(i + 1))
    return folder


def write(path, frames, fps=25, codec="libx264", **options):
    "An mp4 by PyAV alone."
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[-2:], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), "rgb24")))
        container.mux(stream.encode())
    return path


def stack(clip):
    return torch.stack(list(clip))


def near(a, b):
    "Whether frames agree but for the losses of compression."
    return a.shape == b.shape and (a.float() - b.float()).abs().mean() < 6


# Reading

def test_folder_in_natural_order(tmp_path):
    frames = gradient(12, 24, 64)
    clip = read_frames(save(tmp_path / "clip", frames, "take2_{}.png"))
    (tmp_path / "clip" / "notes.txt").write_text("no picture")
    (tmp_path / "clip" / ".hidden.png").write_bytes(b"")
    assert clip.count == 12 and clip.fps is None
    assert torch.equal(stack(clip), frames) and torch.equal(stack(clip), frames)   # twice: decoded anew


def test_names_with_and_without_numbers(tmp_path):
    for name in ("b", "10", "a2", "9", "a10", "a"):
        Image.new("RGB", (4, 4), (len(name), ord(name[-1]), 0)).save(tmp_path / f"{name}.png")
    order = [(frame[0, 0, 0].item(), chr(frame[1, 0, 0])) for frame in read_frames(tmp_path)]
    assert order == [(1, "9"), (2, "0"), (1, "a"), (2, "2"), (3, "0"), (1, "b")]


def test_shorter_side_and_grey(tmp_path):
    folder = save(tmp_path / "clip", gradient(2, 24, 60))
    assert stack(read_frames(folder, size=12)).shape == (2, 3, 12, 30)
    assert stack(read_frames(folder, channels=1)).shape == (2, 1, 24, 60)
    path = write(tmp_path / "clip.mp4", gradient(2, 24, 60))
    assert stack(read_frames(path, size=48, channels=1)).shape == (2, 1, 48, 120)


def test_film_by_pyav(tmp_path):
    frames = gradient(7)
    clip = read_frames(write(tmp_path / "clip.mp4", frames, 30))
    assert (clip.fps, clip.count) == (30, 7) and near(stack(clip), frames) and near(stack(clip), frames)


def test_film_is_decoded_lazily(tmp_path, monkeypatch):
    clip, decoded = read_frames(write(tmp_path / "clip.mp4", gradient(7))), []
    monkeypatch.setattr(torch, "from_numpy", lambda array, old=torch.from_numpy: decoded.append(1) or old(array))
    iterator = iter(clip)
    next(iterator)
    assert len(decoded) == 1
    iterator.close()


def test_film_of_a_phone_is_upright(tmp_path):
    "The header says: turn by 90 degrees. The bar, which moved to the right, then moves down."
    path, frames = write(tmp_path / "clip.mp4", gradient()), gradient()
    content = bytearray(path.read_bytes())
    start = content.find(b"tkhd") + 44   # where the matrix lies in a track's header
    content[start:start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 24 << 16, 0, 1 << 30)
    path.write_bytes(content)
    assert near(stack(read_frames(path)), frames.rot90(-1, (2, 3))) and not near(stack(read_frames(path)), frames.rot90(1, (2, 3)))


def test_gif(tmp_path):
    frames = gradient(4)
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    images[0].save(tmp_path / "clip.gif", save_all=True, append_images=images[1:], duration=[30, 50, 40, 40])
    clip = read_frames(tmp_path / "clip.gif")
    assert clip.count == 4 and clip.fps == pytest.approx(25) and near(stack(clip), frames)
    assert stack(read_frames(tmp_path / "clip.gif", channels=1)).shape == (4, 1, 24, 32)
    images[0].save(tmp_path / "still.GIF")
    still = read_frames(tmp_path / "still.GIF")
    assert (still.count, still.fps) == (1, None) and stack(still).shape == (1, 3, 24, 32)


def test_frames_of_several_sizes(tmp_path):
    folder = save(tmp_path / "clip", gradient(2))
    Image.new("RGB", (30, 24)).save(folder / "frame3.png")
    with pytest.raises(ValueError, match=r"frame3.png is 24 x 30 pixels, the frames before it are 24 x 32"):
        watch(net(), read_frames(folder))
    with pytest.raises(ValueError, match="frame 2 is 32 x 24 pixels"):
        watch(net(), [gradient()[0], gradient(1, 32, 24)[0]])


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder or clip: .*nothing.mp4"):
        read_frames(tmp_path / "nothing.mp4")
    with pytest.raises(ValueError, match="no frames in it"):
        read_frames(tmp_path)
    whole = write(tmp_path / "whole.mp4", gradient()).read_bytes()
    for content in (b"", b"no film at all" * 50, whole[:len(whole) // 2]):
        for name, message in (("broken.mp4", "not a film that can be read"), ("broken.gif", "not a GIF that can be read")):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=message):
                read_frames(tmp_path / name)
    folder = save(tmp_path / "clip", gradient(2))
    (folder / "frame2.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="frame2.png: not a readable picture"):
        list(read_frames(folder))


def test_gif_that_ends_too_early(tmp_path):
    frames = torch.randint(0, 256, (6, 3, 40, 40), dtype=torch.uint8)
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    images[0].save(tmp_path / "clip.gif", save_all=True, append_images=images[1:], duration=40)
    content = (tmp_path / "clip.gif").read_bytes()
    (tmp_path / "clip.gif").write_bytes(content[:len(content) // 10])
    with pytest.raises(ValueError, match="clip.gif: not a GIF that can be read"):
        list(Clip(tmp_path / "clip.gif"))


def test_sound_without_a_film(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", 8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="sound.mp4: there is sound in it, but no film"):
        read_frames(path)


def test_without_pyav(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4", gradient())
    monkeypatch.setitem(sys.modules, "av", None)
    for what in (lambda: read_frames(path), lambda: film(tmp_path / "out.mp4", gradient(), net())):
        with pytest.raises(ValueError, match="pip install av"):
            what()
    film(tmp_path / "out.gif", read_frames(save(tmp_path / "clip", gradient())), net())
    assert read_frames(tmp_path / "out.gif").count == 5


# Looking and painting

def test_watch():
    encoder, frames = net(), gradient(3, 26, 35)
    maps = watch(encoder, frames)
    assert maps.shape == (3, 6, 8) and torch.equal(maps[2], attention_maps(encoder, frames[2]).mean(0))
    assert torch.equal(watch(encoder, iter(frames), head=1, layer=0)[2], attention_maps(encoder, frames[2], 0)[1])
    with pytest.raises(ValueError, match="there are 2 heads"):
        watch(encoder, frames, head=2)
    with pytest.raises(ValueError, match="no frame to look at"):
        watch(encoder, [])


@pytest.mark.parametrize("patch_size, height, width", [(4, 24, 32), (4, 27, 33), (5, 27, 33), (16, 47, 47)])
def test_frames_leave_out_what_fills_no_patch(patch_size, height, width):
    frame, grid = torch.randint(0, 256, (3, height, width), dtype=torch.uint8), (height // patch_size, width // patch_size)
    painted = side_by_side(frame, torch.rand(grid), patch_size, 1.0)
    h, w = grid[0] * patch_size, grid[1] * patch_size
    assert painted.shape == (3, h, 3 * w) and torch.equal(painted[:, :, :w], frame[:, :h, :w])


def test_paint_has_one_scale():
    frame, heat = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    overlay = side_by_side(frame, heat, 4, 0.4, views=["overlay"])
    brighter = side_by_side(frame, 2 * heat, 4, 0.4, views=["overlay"])
    assert torch.equal(overlay[:, 0, 4], brighter[:, 0, 0]) and torch.equal(brighter[:, 0, 4], brighter[:, 7, 7])
    assert side_by_side(frame, torch.zeros(2, 2), 4, 0.0, views=["overlay"]).float().mean() < 10
    assert brightest(torch.arange(101.0).view(1, 1, 101)) == 99


def test_paint_of_grey_frames_and_bad_input():
    frame, heat = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.ones(2, 2)
    assert side_by_side(frame, heat, 4, 1.0, views=VIEWS[::-1]).shape == (3, 8, 24)
    with pytest.raises(ValueError, match="picture, overlay, mask, not heat"):
        side_by_side(frame, heat, 4, 1.0, views=["heat"])
    with pytest.raises(ValueError, match="not none"):
        side_by_side(frame, heat, 4, 1.0, views=[])
    with pytest.raises(ValueError, match="map of 2 x 2 patches was not made from a frame of 8 x 12 pixels"):
        side_by_side(torch.zeros(3, 8, 12, dtype=torch.uint8), heat, 4, 1.0)


# Films

def test_mp4_read_back(tmp_path):
    encoder, frames = net(), gradient(6)
    maps = film(tmp_path / "new" / "look.mp4", frames, encoder, mass=0.5, fps=12)
    back = read_frames(tmp_path / "new" / "look.mp4")
    assert (back.fps, back.count) == (12, 6) and torch.equal(maps, watch(encoder, frames))
    bright = brightest(maps)
    wanted = torch.stack([side_by_side(frame, heat, 4, bright, 0.5) for frame, heat in zip(frames, maps)])
    assert near(stack(back), wanted) and stack(back).shape == (6, 3, 24, 96)


@pytest.mark.parametrize("patch_size, height, width", [(5, 27, 36), (3, 32, 32), (4, 33, 47)])
def test_mp4_has_even_sides(tmp_path, patch_size, height, width):
    encoder = net(img_size=6 * patch_size, patch_size=patch_size)
    film(tmp_path / "look.mp4", gradient(2, height, width), encoder, views=["picture"])
    shape = stack(read_frames(tmp_path / "look.mp4")).shape[-2:]
    whole = height // patch_size * patch_size, width // patch_size * patch_size
    assert shape == tuple(side + side % 2 for side in whole)


def test_frames_per_second_of_the_clip_are_kept(tmp_path):
    from fractions import Fraction
    clip = read_frames(write(tmp_path / "clip.mp4", gradient(), Fraction(30000, 1001)))
    film(tmp_path / "look.mp4", clip, net())
    assert read_frames(tmp_path / "look.mp4").fps == pytest.approx(30000 / 1001, abs=1e-6)
    film(tmp_path / "look.gif", clip, net(), fps=5)
    assert read_frames(tmp_path / "look.gif").fps == pytest.approx(5)


@pytest.mark.parametrize("fps", [7, 25, 30, 50])
def test_gif_keeps_its_length(tmp_path, fps):
    film(tmp_path / "look.gif", gradient(7), net(), fps=fps)
    with Image.open(tmp_path / "look.gif") as image:
        durations = [image.seek(i) or image.info["duration"] for i in range(image.n_frames)]
        assert image.size == (96, 24) and len(durations) == 7 and image.info["loop"] == 0
    assert sum(durations) == 10 * round(100 * 7 / fps) and max(durations) - min(durations) <= 10


@pytest.mark.parametrize("ending", [".gif", ".mp4", ".MP4"])
def test_one_frame(tmp_path, ending):
    path = tmp_path / f"look{ending}"
    maps = film(path, gradient(1), net())
    assert len(maps) == 1 and near(stack(read_frames(path)), side_by_side(gradient(1)[0], maps[0], 4, brightest(maps))[None])


class Stopped:
    "Frames that somebody interrupts in the middle of painting."
    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        for i, frame in enumerate(gradient()):
            if self.passes == 2 and i == 3:
                raise KeyboardInterrupt
            yield frame


@pytest.mark.parametrize("ending", [".gif", ".mp4"])
def test_stopped_film_leaves_what_was_there(tmp_path, ending):
    path = tmp_path / f"look{ending}"
    path.write_bytes(b"the film of yesterday")
    with pytest.raises(KeyboardInterrupt):
        film(path, Stopped(), net())
    assert path.read_bytes() == b"the film of yesterday" and list(tmp_path.iterdir()) == [path]


def test_film_says_what_cannot_be_before_it_looks(tmp_path):
    def never(*args):
        raise AssertionError("it has looked")
    encoder, frames = net(), gradient()
    encoder.attention = never
    for name, options, message in [("look.avi", {}, "ends in .mp4 or .gif"), ("look.gif", dict(fps=60), "at most 50 frames"), ("look.mp4", dict(fps=-1), "more than -1"),
                                   ("look.gif", dict(views=["all"]), "not all"), ("look.gif", dict(mass=60), "above 0 and at most 1")]:
        with pytest.raises(ValueError, match=message):
            film(tmp_path / name, frames, encoder, **options)
    with pytest.raises(ValueError, match="not an iterator"):
        film(tmp_path / "look.gif", iter(frames), encoder)
    assert not list(tmp_path.iterdir())


# Numbers, and the made-up clip

def test_steadiness():
    masks = torch.rand(5, 2, 6, 7) < 0.4
    literal = sum(jaccard(masks[i], masks[i + 1]) for i in range(4)) / 4
    assert torch.allclose(steadiness(masks), literal) and steadiness(masks[:1].expand(3, -1, -1, -1)).tolist() == [1, 1]
    with pytest.raises(ValueError, match="two frames"):
        steadiness(masks[:1])


def test_moving_shape():
    frames, masks = moving_shape(6, seed=13, height=40, width=70, size=30)
    again, _ = moving_shape(6, seed=13, height=40, width=70, size=30)
    other, _ = moving_shape(6, seed=14, height=40, width=70, size=30)
    assert torch.equal(frames, again) and not torch.equal(frames, other)
    assert len({tuple(mask.nonzero().amin(0).tolist()) for mask in masks}) > 3   # it moves
    pixels = [frames[i][:, masks[i]].float() for i in range(6)]
    assert all((pixels[i] - pixels[0]).abs().mean() < 6 for i in range(6))       # and is the same thing everywhere
    assert moving_shape(1, height=20, width=20, size=20)[0].shape == (1, 3, 20, 20)
    with pytest.raises(ValueError, match="48 x 48 pixels does not fit into frames of 40 x 70"):
        moving_shape(6, height=40, width=70)


def test_contact_sheet(tmp_path):
    frames, masks = moving_shape(5, height=35, width=50, size=24)
    maps = watch(net(), frames)
    fig = contact_sheet(frames, maps, 4, mass=0.5, count=3, truth=masks)
    fig.savefig(tmp_path / "sheet.png")
    assert [ax.get_title() for ax in fig.axes[:3]] == ["frame 1", "frame 3", "frame 5"] and fig.axes[6].get_ylabel() == "mask, 50%"
    assert all(ax.images[0].get_array().shape == (32, 48, 3) for ax in fig.axes)
    assert len(contact_sheet(list(frames[:1]), maps[:1], 4).axes) == 3


def test_real_frames(shared_data, tmp_path):
    "427 x 240 pixels, from an archive of DAVIS."
    import tarfile
    with tarfile.open(shared_data / "davis2016val-240p-small.tar") as archive:
        for i in range(3):
            archive.extract(f"JPEGImages/240p/blackswan/{i:05}.jpg", tmp_path, filter="data")
    clip = read_frames(tmp_path / "JPEGImages" / "240p" / "blackswan")
    maps = film(tmp_path / "look.mp4", clip, net())
    assert maps.shape == (3, 60, 106) and stack(read_frames(tmp_path / "look.mp4")).shape == (3, 3, 240, 3 * 424)


def test_what_draws_and_decodes_is_not_imported_before_it_is_needed():
    code = ("import sys, torchvision; before = set(sys.modules)\n"   # older ones import av themselves
            "import dino_edu.film; assert not {'matplotlib', 'av'} & (set(sys.modules) - before)")
    subprocess.run([sys.executable, "-c", code], check=True)
