"""Reading pictures: formats, folders, archives, splits, cache, named sets. Every test makes its own files."""

import io
import os
import struct
import tarfile
import time
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import dino_edu.data as data
from dino_edu.core import asset
from dino_edu.data import Pictures, load, read_folder
from dino_edu.files import EXTENSIONS, HELD_OUT, assign, contents, decode, holdout, opened, read_classes
from dino_edu.shapes import NAMES, make

RED, GREEN, BLUE, WHITE = (200, 30, 40), (20, 160, 60), (30, 60, 210), (255, 255, 255)


def quarters(size=(64, 48)):
    "Red, green, blue and white quarters: any turn or mirror shows."
    width, height = size
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    image.paste(WHITE, (width // 2, height // 2, width, height))
    return image


def corners(x):
    "The colours of the four quarters of `[C, H, W]`: top left, top right, bottom left, bottom right."
    _, h, w = x.shape
    places = [(h // 4, w // 4), (h // 4, 3 * w // 4), (3 * h // 4, w // 4), (3 * h // 4, 3 * w // 4)]
    return [tuple(x[:, i, j].tolist()) for i, j in places]


def near(found, wanted, within):
    return all(abs(a - b) <= within for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True))


def folder_of(root, names, size=(20, 16)):
    "Write a small picture under each name; the colour depends on the name."
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, tuple(zlib.crc32(name.encode()).to_bytes(4, "big")[:3])).save(file)
    return root


def class_names(classes="cat dog", count=10, prefix=""):
    return [f"{prefix}{c}/{i:02}.png" for c in classes.split() for i in range(count)]


def tar_of(folder, path, top="", mode="w"):
    with tarfile.open(path, mode) as archive:
        archive.add(folder, top or ".")
    return path


def png16(path, rgb):
    "A PNG with 16 bits a channel, written by hand (Pillow cannot)."
    height, width, _ = rgb.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


# ---------------------------------------------------------------- formats

PLAIN = [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("file, options, within", [("a.png", {}, 0), ("a.bmp", {}, 0), ("a.tif", {}, 0), ("a.ppm", {}, 0),
    ("a.webp", dict(lossless=True), 0), ("a.jpg", dict(quality=95), 6), ("a.jpg", dict(quality=95, progressive=True), 6)])
def test_rgb_formats(tmp_path, file, options, within):
    quarters().save(tmp_path / file, **options)
    x = decode(tmp_path / file)
    assert x.dtype == torch.uint8 and x.shape == (3, 48, 64) and x.is_contiguous()
    assert near(corners(x), PLAIN, within)


def test_grey_palette_cmyk_bits(tmp_path):
    image = quarters()
    luma = [tuple([round(.299 * r + .587 * g + .114 * b)] * 3) for r, g, b in PLAIN]
    image.convert("L").save(tmp_path / "l.png")
    assert near(corners(decode(tmp_path / "l.png")), luma, 1)
    assert near(corners(decode(tmp_path / "l.png", channels=1)), [v[:1] for v in luma], 1)
    image.quantize(8).save(tmp_path / "p.png")
    assert near(corners(decode(tmp_path / "p.png")), PLAIN, 1)
    image.save(tmp_path / "p.gif")
    assert near(corners(decode(tmp_path / "p.gif")), PLAIN, 6)
    image.convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    assert near(corners(decode(tmp_path / "c.jpg")), PLAIN, 8)
    image.convert("CMYK").save(tmp_path / "c.tif")
    assert near(corners(decode(tmp_path / "c.tif")), PLAIN, 1)
    image.convert("L").point(lambda v: 255 * (v > 128), "1").save(tmp_path / "one.png")
    assert {v for c in corners(decode(tmp_path / "one.png")) for v in c} <= {0, 255}


def test_sixteen_bits_use_the_full_range(tmp_path):
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16).repeat(24, 0).repeat(32, 1)
    wanted = [(0,) * 3, (100,) * 3, (200,) * 3, (255,) * 3]
    Image.fromarray(values).save(tmp_path / "l.png")
    Image.fromarray(values).save(tmp_path / "l.tif")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "i.tif")
    (tmp_path / "big.pgm").write_bytes(b"P5 64 48 65535\n" + values.astype(">u2").tobytes())
    for file in ("l.png", "l.tif", "i.tif", "big.pgm"):
        assert corners(decode(tmp_path / file)) == wanted, file
    png16(tmp_path / "rgb.png", np.asarray(quarters()).astype(np.uint16) * 257)
    assert near(corners(decode(tmp_path / "rgb.png")), PLAIN, 1)


def test_transparent_becomes_white(tmp_path):
    alpha = Image.new("L", (64, 48), 255)
    alpha.paste(0, (0, 0, 32, 24))
    alpha.paste(128, (32, 0, 64, 24))
    image = quarters()
    image.putalpha(alpha)
    half = tuple(round(c * 128 / 255 + 127) for c in GREEN)
    image.save(tmp_path / "a.png")
    assert near(corners(decode(tmp_path / "a.png")), [WHITE, half, BLUE, WHITE], 1)
    image.convert("LA").save(tmp_path / "la.png")
    assert corners(decode(tmp_path / "la.png"))[0] == WHITE
    palette = quarters().quantize(8)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((5, 5)))
    assert near(corners(decode(tmp_path / "p.png")), [WHITE, GREEN, BLUE, WHITE], 1)
    quarters().save(tmp_path / "key.png", transparency=RED)
    assert near(corners(decode(tmp_path / "key.png")), [WHITE, GREEN, BLUE, WHITE], 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    T = Image.Transpose
    undo = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE,
            8: T.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = quarters() if undo is None else quarters().transpose(undo)
    for file in ("a.jpg", "a.png"):
        image.save(tmp_path / file, exif=exif)
        x = decode(tmp_path / file, size=24)
        assert x.shape == (3, 24, 32) and near(corners(x), PLAIN, 8)


def test_size(tmp_path):
    quarters((300, 200)).save(tmp_path / "a.png")
    quarters((90, 900)).save(tmp_path / "long.jpg", quality=95)
    Image.new("L", (3, 2)).save(tmp_path / "tiny.png")
    assert decode(tmp_path / "a.png", 64).shape == (3, 64, 96)
    x = decode(tmp_path / "long.jpg", 45)
    assert x.shape == (3, 90, 45) and near(corners(x), PLAIN, 8)
    assert decode(tmp_path / "tiny.png", 32, channels=1).shape == (1, 32, 48)
    with pytest.raises(ValueError, match="channels must be 1 or 3"):
        decode(tmp_path / "a.png", channels=4)


def test_resize_is_antialiased_and_draft_agrees(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "n.png")
    x = decode(tmp_path / "n.png", 32).float()
    assert x.std() < 12 and abs(x.mean() - 127.5) < 2
    images, _, _ = make(1, seed=0, size=512)
    photo = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    photo.save(tmp_path / "p.png")
    photo.save(tmp_path / "p.jpg", quality=97)
    assert (decode(tmp_path / "p.png", 48).float() - decode(tmp_path / "p.jpg", 48)).abs().mean() < 3


@pytest.mark.parametrize("file", ["a.jpg", "a.png"])
def test_broken_picture_names_the_file(tmp_path, file):
    quarters((200, 200)).save(tmp_path / file)
    whole = (tmp_path / file).read_bytes()
    for part in (whole[:len(whole) // 2], b"", b"not a picture", whole[:30]):
        (tmp_path / file).write_bytes(part)
        with pytest.raises(ValueError, match=f"{file}: not a readable picture"):
            decode(tmp_path / file, 32)


def test_float_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="no agreed white"):
        decode(tmp_path / "f.tif")


# ---------------------------------------------------------------- Pictures

def mixed():
    xs = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((4, 6), (8, 5), (4, 4))]
    starts = torch.tensor([0] + [x.numel() for x in xs]).cumsum(0)[:3]
    sizes = torch.tensor([x.shape[1:] for x in xs])
    return xs, Pictures(torch.cat([x.flatten() for x in xs]).numpy(), starts, sizes, 3, torch.tensor([0, 1, 1]), ("a", "b"), paths=("x", "y", "z"))


def test_batch_pads_at_the_bottom_and_right():
    xs, pictures = mixed()
    batch, sizes = pictures.batch([1, 2])
    assert batch.shape == (2, 3, 8, 5) and sizes.tolist() == [[8, 5], [4, 4]] and not pictures.uniform
    assert torch.equal(batch[0], xs[1]) and torch.equal(batch[1, :, :4, :4], xs[2])
    assert batch[1, :, 4:].sum() == 0 and batch[1, :, :, 4:].sum() == 0
    assert torch.equal(pictures[0], xs[0]) and torch.equal(pictures[-1], xs[2])


def test_subset_and_stack():
    xs, pictures = mixed()
    part = pictures.subset(torch.tensor([False, True, True]))
    assert len(part) == 2 and part.labels.tolist() == [1, 1] and part.paths == ("y", "z") and torch.equal(part[1], xs[2])
    assert torch.equal(pictures.subset([2]).batch([0])[0][0], xs[2])  # one size, but not at a multiple of it
    images, labels, masks = make(50, seed=3)
    whole = Pictures.stack(images, labels, NAMES, masks, "s")
    order = torch.randperm(50)
    assert whole.uniform and torch.equal(whole.batch(order)[0], images[order])
    part = whole.subset(order[:7])
    assert torch.equal(part.batch([6, 0])[0], images[order[[6, 0]]]) and torch.equal(part.masks, masks[order[:7]])
    assert torch.equal(part.labels, labels[order[:7]]) and part.pixels is whole.pixels
    part[0].zero_()
    assert torch.equal(whole.batch(range(50))[0], images)  # a picture is a copy
    assert "50" in repr(whole) and "48x48" in repr(whole) and "many sizes" in repr(pictures)
    with pytest.raises(IndexError):
        whole.batch([50])


def test_batch_is_fast():
    images = torch.zeros(2000, 3, 48, 48, dtype=torch.uint8)
    pictures, index = Pictures.stack(images), torch.randperm(2000)[:64]
    start = time.perf_counter()
    for _ in range(50):
        pictures.batch(index)
    rate = 50 * 64 / (time.perf_counter() - start)
    print(f"{rate:,.0f} pictures a second")
    assert rate > 10_000


# ---------------------------------------------------------------- splits and layouts

def test_holdout():
    labels = torch.tensor([0] * 100 + [1] * 20 + [2] * 2 + [3])
    kept, held = holdout(labels)
    assert labels[held].bincount(minlength=4).tolist() == [15, 3, 1, 0]
    assert sorted(kept.tolist() + held.tolist()) == list(range(123))
    assert torch.equal(held, holdout(labels)[1]) and not torch.equal(held, holdout(labels, seed=1)[1])
    assert len(holdout(labels, share=0)[1]) == 0
    names = [f"{i}.png" for i in range(123)]
    turned = holdout(labels.flip(0), names=names[::-1])[1]
    assert {names[i] for i in holdout(labels, names=names)[1].tolist()} == {names[::-1][i] for i in turned.tolist()}
    with pytest.raises(ValueError, match="share"):
        holdout(labels, share=1.)


def split_of(root, **options):
    train, val = read_folder(root, **options)
    return (set(train.paths), None if val is None else set(val.paths), train.classes)


def test_labelled_folder_is_split_by_class(tmp_path):
    folder_of(tmp_path, class_names(count=20))
    train, val = read_folder(tmp_path)
    assert train.classes == val.classes == ("cat", "dog") and val.labels.bincount().tolist() == [3, 3]
    assert not set(train.paths) & set(val.paths) and len(train) + len(val) == 40
    for pictures in (train, val):
        for i, path in enumerate(pictures.paths):
            assert path.startswith(pictures.classes[pictures.labels[i]])
            assert corners(pictures[i])[0] == tuple(zlib.crc32(path.encode()).to_bytes(4, "big")[:3])
    folder_of(tmp_path, class_names(count=22))
    again, _ = read_folder(tmp_path)
    assert len(set(train.paths) - set(again.paths)) <= 2  # hardly anybody changes sides
    assert read_folder(tmp_path, share=0)[1] is None


def test_flat_folder_has_no_labels(tmp_path):
    folder_of(tmp_path, [f"{i}.png" for i in range(5)])
    train, val = read_folder(tmp_path)
    assert val is None and train.labels is None and train.classes == () and len(train) == 5


@pytest.mark.parametrize("held", HELD_OUT)
def test_split_folders(tmp_path, held):
    folder_of(tmp_path, class_names(count=4, prefix="train/") + class_names(count=2, prefix=f"{held}/") + class_names(count=1, prefix="extra/"))
    train, val = read_folder(tmp_path)
    assert len(train) == 8 and len(val) == 4 and train.classes == ("cat", "dog") and val.labels.tolist() == [0, 0, 1, 1]
    assert len(read_folder(tmp_path, split="train", share=0)[0]) == 8 and len(read_folder(tmp_path, split="val", share=0)[0]) == 4


def test_layouts(tmp_path):
    a = folder_of(tmp_path / "a", class_names(prefix="wrap/"))
    assert split_of(a)[2] == ("cat", "dog")
    b = folder_of(tmp_path / "b", class_names("boat train"))
    assert split_of(b)[2] == ("boat", "train")
    c = folder_of(tmp_path / "c", class_names("cat dog", 20, prefix="train/"))
    assert split_of(c)[2] == ("cat", "dog") and len(split_of(c)[1]) == 6
    d = folder_of(tmp_path / "d", class_names("cat"))
    assert split_of(d)[2] == ("cat",)
    e = folder_of(tmp_path / "e", ["train/1.png", "train/2.png", "val/3.png"])
    assert split_of(e) == ({"1.png", "2.png"}, None, ())
    f = folder_of(tmp_path / "f", class_names(count=2) + ["loose.png"])
    with pytest.raises(ValueError, match="'loose.png' lies in no class folder"):
        read_folder(f)
    assert len(read_folder(f, labelled=False)[0]) == 5
    g = folder_of(tmp_path / "g", class_names(prefix="train/") + ["val/1.png"])
    with pytest.raises(ValueError, match="split='train'"):
        read_folder(g)
    assert read_folder(g, split="train")[1] is not None
    with pytest.raises(ValueError, match="no test/"):
        read_folder(g, split="test")


def test_junk_is_ignored(tmp_path):
    folder_of(tmp_path, class_names(count=3))
    for name in ("__MACOSX/cat/._00.png", "cat/._01.png", ".hidden/x/1.png", "cat/notes.txt", "cat/.DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"junk")
    train, val = read_folder(tmp_path)
    assert len(train) + len(val) == 6 and train.classes == ("cat", "dog")


def test_links_in_a_folder_are_followed_and_loops_are_not(tmp_path):
    folder_of(tmp_path / "real", [f"{i}.png" for i in range(4)])
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "set" / "cat")
    os.symlink(tmp_path / "set", tmp_path / "real" / "loop")
    assert len(read_folder(tmp_path / "set", share=0)[0]) == 4


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="no pictures in it.*jpg.*png") as error:
        read_folder(tmp_path)
    assert str(tmp_path) in str(error.value) and all(e in str(error.value) for e in EXTENSIONS)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_folder(tmp_path / "nowhere")


def test_assign_names_classes_of_imagenet(tmp_path):
    found, classes = assign(tmp_path, "x", ["n02111889/1.jpg", "n02088364/1.jpg"], None, None, True, 0)
    assert classes == ("beagle", "Samoyed") and found["n02111889/1.jpg"] == ("train", 1, "n02111889/1.jpg")


# ---------------------------------------------------------------- archives

@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "zip"])
def test_archives_give_what_the_folder_gives(tmp_path, ending):
    folder = folder_of(tmp_path / "set", class_names() + ["cat/._junk.png"])
    path = tmp_path / f"pets.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*"), reverse=True):
                archive.write(file, f"pets/{file.relative_to(folder)}")
    else:
        tar_of(folder, path, "pets", "w:" + ending.replace("tar", "").replace("tgz", "gz").strip("."))
    for one, other in zip(read_folder(path, 12), read_folder(folder, 12), strict=True):
        assert one.paths == other.paths and one.classes == other.classes and torch.equal(one.labels, other.labels)
        assert all(torch.equal(one[i], other[i]) for i in range(len(one)))
    assert not [p for p in tmp_path.iterdir() if p not in (folder, path)]  # nothing was unpacked


def test_flat_archive_in_a_folder_of_its_name(tmp_path):
    folder = folder_of(tmp_path / "set", [f"{i}.png" for i in range(3)])
    train, val = read_folder(tar_of(folder, tmp_path / "pics.tar", "pics"))
    assert train.labels is None and val is None and len(train) == 3
    train, _ = read_folder(tar_of(folder, tmp_path / "other.tar", "."))
    assert train.labels is None and len(train) == 3


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png", "C:\\evil.png", "..\\evil.png"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_point_outside_are_refused(tmp_path, name, kind):
    buffer = io.BytesIO()
    quarters().save(buffer, "PNG")
    path = tmp_path / f"bad.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(buffer.getvalue())
            archive.addfile(info, io.BytesIO(buffer.getvalue()))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, buffer.getvalue())
    with pytest.raises(ValueError, match="points outside the archive; refused") as error:
        read_folder(path)
    assert str(path) in str(error.value) and "evil.png" in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        info = tarfile.TarInfo("cat/1.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ValueError, match="bad.tar: member 'cat/1.png' is a link or a device"):
        read_folder(tmp_path / "bad.tar")


def test_link_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        info = zipfile.ZipInfo("cat/1.png")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="bad.zip: member 'cat/1.png' is a link"):
        read_folder(tmp_path / "bad.zip")


@pytest.mark.parametrize("ending, mode", [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz"), ("zip", "")])
def test_half_an_archive(tmp_path, ending, mode):
    folder = folder_of(tmp_path / "set", class_names(), size=(90, 90))
    path = tmp_path / f"half.{ending}"
    if mode:
        tar_of(folder, path, mode=mode)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.rglob("*.png"):
                archive.write(file, f"{file.parent.name}-{file.name}")
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2 + 77])
    with pytest.raises(ValueError, match=f"half.{ending}: not a folder, nor a whole tar or zip"):
        read_folder(path)


def test_a_file_that_is_no_archive(tmp_path):
    quarters().save(tmp_path / "one.png")
    with pytest.raises(ValueError, match="one.png: not a folder, nor a whole tar or zip"):
        read_folder(tmp_path / "one.png")


def test_damaged_member_of_a_zip_is_only_one_broken_file(tmp_path):
    folder = folder_of(tmp_path / "set", class_names(count=15))
    path = tmp_path / "z.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, f"{file.parent.name}/{file.name}")
        where = archive.getinfo("cat/03.png").header_offset
    raw = bytearray(path.read_bytes())
    raw[where + 30 + len("cat/03.png") + 40] ^= 255
    path.write_bytes(raw)
    with opened(path) as (files, read):
        bad = [name for name, content in contents(files, read, files) if isinstance(content, Exception)]
    assert bad == ["cat/03.png"]
    with pytest.warns(UserWarning, match="1 of 30 pictures cannot be read: cat/03.png"):
        train, val = read_folder(path)
    assert len(train) + len(val) == 29


# ---------------------------------------------------------------- broken files

def test_broken_files_are_named_and_counted(tmp_path):
    folder_of(tmp_path, class_names(count=20))
    (tmp_path / "cat/07.png").write_bytes(b"no")
    with pytest.warns(UserWarning, match="1 of 40 pictures cannot be read.*07.png"):
        train, val = read_folder(tmp_path)
    assert len(train) + len(val) == 39 and not any("cat/07" in p for p in train.paths + val.paths)
    for name in class_names("dog", 5):
        (tmp_path / name).write_bytes(b"no")
    with pytest.raises(ValueError, match="6 of 40 pictures cannot be read.*max_broken=5%"):
        read_folder(tmp_path)
    with pytest.warns(UserWarning, match="6 of 40"):
        assert sum(map(len, read_folder(tmp_path, max_broken=.2))) == 34


def test_nothing_left_to_learn_from(tmp_path):
    folder_of(tmp_path, ["val/a/0.png", "val/b/0.png"])
    for name in ("train/a/0.png", "train/b/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="2 of 4"), pytest.raises(ValueError, match="no picture to learn from"):
        read_folder(tmp_path, max_broken=.9)


def test_all_broken(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="1 of 1 pictures cannot be read"):
        read_folder(tmp_path, max_broken=1.)


# ---------------------------------------------------------------- cache

def test_cache_round_trip_and_invalidation(tmp_path, monkeypatch):
    folder, cache = folder_of(tmp_path / "set", class_names(), (30, 20)), tmp_path / "cache"
    folder_of(folder, ["cat/wide.png"], (80, 20))
    plain = read_folder(folder, 16)
    first = read_folder(folder, 16, cache=cache)
    calls = []
    monkeypatch.setattr(data, "decode", lambda *a: calls.append(a) or decode(*a))
    second = read_folder(folder, 16, cache=cache)
    assert not calls and isinstance(second[0].pixels, np.memmap)
    for pictures in (first, second):
        for a, b in zip(pictures, plain, strict=True):
            assert a.paths == b.paths and a.classes == b.classes and a.name == b.name and a.channels == b.channels
            assert torch.equal(a.labels, b.labels) and torch.equal(a.sizes, b.sizes)
            assert torch.equal(a.batch(range(len(a)))[0], b.batch(range(len(b)))[0])
    assert len(list(cache.iterdir())) == 1
    read_folder(folder, 12, cache=cache)
    read_folder(folder, 16, channels=1, cache=cache)
    assert calls and len(list(cache.iterdir())) == 3
    calls.clear()
    quarters().save(folder / "cat/00.png")
    third = read_folder(folder, 16, cache=cache)
    assert calls and sum(map(len, third)) == 21
    calls.clear()
    (folder / "dog/00.png").unlink()
    assert sum(map(len, read_folder(folder, 16, cache=cache))) == 20 and calls


def test_memmap_is_uniform_and_does_not_write_back(tmp_path):
    folder, cache = folder_of(tmp_path / "set", class_names()), tmp_path / "cache"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, _ = read_folder(folder, 16, cache=cache)
        batch, _ = train.batch(range(len(train)))
    assert train.uniform and train._rows is not None and torch.equal(batch[0], train[0])
    batch.zero_()
    assert torch.equal(read_folder(folder, 16, cache=cache)[0][0], train[0]) and train[0].sum() > 0


def test_damaged_cache_is_made_afresh(tmp_path):
    folder, cache = folder_of(tmp_path / "set", class_names()), tmp_path / "cache"
    train, _ = read_folder(folder, cache=cache)
    whole = train.batch(range(len(train)))[0]
    for file, content in (("train.u8", b"short"), ("train.npz", b"PK"), ("val.npz", b"")):
        home, = cache.iterdir()
        (home / file).unlink()
        (home / file).write_bytes(content)
        assert torch.equal(read_folder(folder, cache=cache)[0].batch(range(len(train)))[0], whole)


def test_cache_of_unlabelled_pictures(tmp_path):
    folder = folder_of(tmp_path / "set", ["a.png", "b.png"])
    for _ in range(2):
        train, val = read_folder(folder, cache=tmp_path / "cache")
        assert train.labels is None and val is None and train.classes == () and train.paths == ("a.png", "b.png")


def test_failed_cache_leaves_nothing(tmp_path, monkeypatch):
    folder, cache = folder_of(tmp_path / "set", class_names()), tmp_path / "cache"

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="cannot write the cache.*No space left.*nothing was kept"):
            read_folder(folder, cache=cache)
    assert list(cache.iterdir()) == []
    (folder / "cat/00.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="max_broken"):
        read_folder(folder, max_broken=0, cache=cache)
    assert list(cache.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="another cache="):
        read_folder(folder, max_broken=.2, cache=tmp_path / "file")


# ---------------------------------------------------------------- class lists and names

def test_class_lists(tmp_path):
    imagenet = read_classes("imagenet")
    assert len(imagenet) == len(set(imagenet.values())) == 1000 and list(imagenet) == sorted(imagenet)
    sizes = {"imagenet100": 100, "imagenette": 10, "imagewoof": 10}
    for name, count in sizes.items():
        found = read_classes(name)
        assert len(found) == count and all(imagenet[k] == v for k, v in found.items()), name
        assert found == read_classes(asset(f"{name}.txt"))
    mine = tmp_path / "mine.txt"
    mine.write_text("# two of three\ndog  a good dog # yes\n\ncat\n")
    assert read_classes(mine) == {"dog": "a good dog", "cat": "cat"}
    folder = folder_of(tmp_path / "set", class_names("ant cat dog", prefix="train/") + class_names("ant cat dog", 3, prefix="val/"))
    train, val = read_folder(folder, classes=mine)
    assert train.classes == ("a good dog", "cat") and train.labels.bincount().tolist() == [10, 10] and len(val) == 6
    assert train.paths[0].startswith("cat") and train.labels[0] == 1
    mine.write_text("dog\nfox\n")
    with pytest.raises(ValueError, match="1 of 2 classes of the list are missing: fox"):
        read_folder(folder, classes=mine)
    for text in ("dog\ndog\n", "# nothing\n"):
        mine.write_text(text)
        with pytest.raises(ValueError, match="mine.txt: a class list needs"):
            read_classes(mine)
    with pytest.raises(FileNotFoundError, match="nolist"):
        read_classes("nolist")


def test_load_shapes():
    train, val = load("shapes:60", seed=2)
    images, labels, masks = make(60, seed=4)
    assert len(val) == 12 and torch.equal(train.batch(range(60))[0], images) and torch.equal(train.labels, labels)
    assert torch.equal(train.masks, masks) and train.classes == NAMES and torch.equal(val.labels, make(12, seed=5)[1])
    assert load("shapes", n=10, size=32, channels=1)[0].batch([0])[0].shape == (1, 1, 32, 32)
    for bad in ("shapes:many", "shapes:0"):
        with pytest.raises(ValueError, match="shapes:500"):
            load(bad)
    with pytest.raises(ValueError, match="split.*only for folders"):
        load("shapes:10", split="train")


def test_load_names(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="'imagenete' is no known set .*shapes, imagenette, imagewoof, cifar10.*no such folder"):
        load("imagenete")
    with pytest.raises(ValueError, match="n= is for shapes"):
        load("imagenette", n=5)
    with pytest.raises(FileNotFoundError, match="download=True.*imagewoof2-160.tgz"):
        load("imagewoof", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="imagenette2-320.tgz"):
        load("imagenette", size=224, root=tmp_path)
    with pytest.raises(FileNotFoundError, match="cifar10 is not in .*download=True"):
        load("cifar10", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="pass root="):
        load("imagenet100")
    monkeypatch.chdir(folder_of(tmp_path / "here", class_names(prefix="shapes/")))
    assert load(data.Path("shapes"))[0].classes == load("./shapes")[0].classes == ("cat", "dog")


def test_load_imagenette_and_ilsvrc(tmp_path, monkeypatch):
    wnids = " ".join(read_classes("imagenette"))
    tree = folder_of(tmp_path / "tree", class_names(wnids, 3, "train/") + class_names(wnids, 1, "val/"))
    asked = []

    def download(url, root, filename, md5):
        asked.append((url, md5))
        tar_of(tree, data.Path(root) / filename, "imagenette2-160", "w:gz")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    train, val = load("imagenette", 16, root=tmp_path, download=True)
    assert len(train) == 30 and len(val) == 10 and train.classes[:2] == ("tench", "English springer")
    assert len(load("imagenette", 16, root=tmp_path)[0]) == 30 and len(asked) == 1
    assert asked[0] == ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412")
    assert not list(tmp_path.glob("*.part"))
    everything = class_names(" ".join(read_classes("imagenet100")), 2)
    ilsvrc = folder_of(tmp_path / "ilsvrc", ["train/" + n for n in everything] + ["val/" + n for n in everything] + ["train/n00000000/1.png"])
    train, val = load("imagenet100", 8, root=ilsvrc)
    assert len(train) == len(val) == 200 and train.classes[0] == "bonnet" and (train.labels.bincount() == 2).all()
    assert load(ilsvrc, 8, classes="imagenet100")[0].classes == train.classes

    def broken(*_):
        raise RuntimeError("File not found or corrupted.")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", broken)
    with pytest.raises(ConnectionError, match="imagewoof2-160.tgz could not be fetched.*checksum"):
        load("imagewoof", root=tmp_path, download=True)


def test_checksums_are_torchvisions():
    torchvision = pytest.importorskip("torchvision.datasets")
    known = torchvision.Imagenette._ARCHIVES
    for side, name in ((160, "160px"), (320, "320px"), (9999, "full")):
        file, md5 = data.ARCHIVES["imagenette"][side]
        assert (data.FASTAI + file, md5) == known[name]
    assert data.read_classes("imagenette") == {k: v[0] for k, v in torchvision.Imagenette._WNID_TO_CLASS.items()}


class FakeCIFAR:
    def __init__(self, root, download, train):
        self.data = np.full((6, 32, 32, 3), (10, 200, 30), np.uint8)
        self.targets, self.classes = [0, 1, 2, 0, 1, 2], ["a", "b", "c"]


class FakeSTL:
    def __init__(self, root, download, split):
        self.data = np.full((4, 3, 96, 96), 7, np.uint8)
        self.labels, self.classes = np.array([0, 1, 0, 1], np.uint8), ["a", "b"]


def test_torchvision_sets(monkeypatch, tmp_path):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCIFAR)
    monkeypatch.setattr("torchvision.datasets.STL10", FakeSTL)
    train, val = load("cifar10", root=tmp_path)
    assert corners(train[0])[0] == (10, 200, 30) and train.classes == ("a", "b", "c") and val.labels.tolist() == [0, 1, 2, 0, 1, 2]
    grey, _ = load("cifar10", size=16, channels=1, root=tmp_path)
    assert grey.batch([0])[0].shape == (1, 1, 16, 16) and abs(int(grey[0][0, 8, 8]) - round(.299 * 10 + .587 * 200 + .114 * 30)) <= 1
    train, val = load("stl10", root=tmp_path, size=48)
    assert train[0].shape == (3, 48, 48) and train.labels.dtype == torch.int64
    train, val = load("stl10-unlabeled", root=tmp_path)
    assert train.labels is None and val is None and train.classes == ()


# ---------------------------------------------------------------- real pictures, where they are at hand

def test_imagenette_balanced(shared_data, tmp_path):
    path = shared_data / "imagenette128-balanced.tar"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    start = time.perf_counter()
    train, val = load(path, size=64, cache=tmp_path)
    middle = time.perf_counter()
    again, _ = load(path, size=64, cache=tmp_path)
    print(f"{len(train) + len(val)} pictures decoded in {middle - start:.1f} s, mapped in {time.perf_counter() - middle:.2f} s")
    assert (len(train), len(val)) == (5700, 2400) and train.classes == tuple(read_classes("imagenette").values())
    assert train.uniform and (train.labels.bincount() == 570).all() and (val.labels.bincount() == 240).all()
    assert torch.equal(again.batch(range(64))[0], train.batch(range(64))[0])
    batch = train.batch(torch.arange(0, 5700, 10))[0].float()
    assert 90 < batch.mean() < 140 and 50 < batch.std() < 90
