"""Streaming: a set that stays on disk gives what a decoded one gives, in any number of processes, and survives broken files."""

import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from dino_edu.data import Pictures, load, read_folder
from dino_edu.files import read_classes
from dino_edu.stream import Streamed, prefetched, stream_folder, to_index

ROOT = Path(__file__).parents[1]
SIZES = [(40, 30), (30, 40), (33, 33), (64, 20), (20, 90), (51, 37)]  # width and height


def photo(seed, size):
    "Random blots, so that resizing and JPEG leave something to compare."
    small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def folder_of(root, names, grey=False):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image = photo(i, SIZES[i % len(SIZES)])
        (image.convert("L") if grey or i % 5 == 4 else image).save(root / name)
    return root


def class_names(classes="cat dog", count=10, prefix="", ending="jpg"):
    return [f"{prefix}{c}/{i:02}.{ending}" for c in classes.split() for i in range(count)]


def same(streamed, pictures):
    "Whether a streamed set and a decoded one are the same, byte for byte."
    assert len(streamed) == len(pictures) and streamed.channels == pictures.channels and streamed.classes == pictures.classes
    assert streamed.paths == pictures.paths and streamed.name == pictures.name
    assert (streamed.labels is None) == (pictures.labels is None)
    assert streamed.labels is None or (torch.equal(streamed.labels, pictures.labels) and streamed.labels.dtype == torch.int64)
    index = torch.randperm(len(pictures))[:12]
    for one, other in zip(streamed.batch(index), pictures.batch(index), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert all(torch.equal(streamed[i], pictures[i]) for i in (0, len(pictures) - 1, -1))
    return True


def both(root, size=24, **options):
    for streamed, pictures in zip(stream_folder(root, size, **options), read_folder(root, size, **options), strict=True):
        assert (streamed is None) == (pictures is None)
        assert streamed is None or same(streamed, pictures)
    return stream_folder(root, size, **options)


# ---------------------------------------------------------------- the same set as read_folder's

@pytest.mark.parametrize("size", [24, 96])
@pytest.mark.parametrize("channels", [3, 1])
def test_held_out_share(tmp_path, size, channels):
    folder_of(tmp_path, class_names(count=20))
    train, val = both(tmp_path, size, channels=channels)
    assert len(train) == 34 and len(val) == 6 and train[0].shape[0] == channels
    assert both(tmp_path, share=0)[1] is None and len(both(tmp_path, share=.5)[1]) == 20


def test_grey_files_and_formats(tmp_path):
    folder_of(tmp_path, class_names(count=4, ending="png"), grey=True)
    folder_of(tmp_path, class_names("eel", 4, ending="gif"))
    photo(3, (30, 20)).convert("CMYK").save(tmp_path / "cat" / "print.jpg")
    Image.new("RGBA", (30, 20), (9, 9, 9, 0)).save(tmp_path / "cat" / "clear.png")
    train, _ = both(tmp_path, share=0)
    assert torch.equal(train[train.paths.index("cat/clear.png")].unique(), torch.tensor([255], dtype=torch.uint8))
    both(tmp_path, channels=1)


def test_own_sizes(tmp_path):
    folder_of(tmp_path, class_names(count=3))  # the first three sizes: none is longer than twice its shorter side
    photo(9, (37, 51)).save(tmp_path / "dog/01.jpg")
    photo(9, (20, 40)).save(tmp_path / "dog/00.jpg")
    photo(9, (37, 51)).save(tmp_path / "dog/02.jpg")
    both(tmp_path, None)


def test_train_and_val_folders(tmp_path):
    folder_of(tmp_path / "wrap", class_names(count=5, prefix="Train/") + class_names(count=3, prefix="valid/") + class_names(count=1, prefix="extra/"))
    train, val = both(tmp_path)
    assert len(train) == 10 and len(val) == 6 and train.paths[0] == "cat/00.jpg" and train.file(0) == tmp_path / "wrap/Train/cat/00.jpg"
    assert len(both(tmp_path / "wrap", split="train", share=0)[0]) == 10
    assert both(tmp_path, labelled=False)[0].labels is None


def test_classes(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("dog  a good dog\ncat\n")
    folder_of(tmp_path / "set", class_names("ant cat dog"))
    train, val = both(tmp_path / "set", classes=mine)
    assert train.classes == ("a good dog", "cat") and train.paths[0].startswith("cat") and train.labels[0] == 1
    mine.write_text("fox\n")
    with pytest.raises(ValueError, match="1 of 1 classes of the list are missing: fox"):
        stream_folder(tmp_path / "set", classes=mine)


def test_flat_folder_has_no_labels(tmp_path):
    folder_of(tmp_path, [f"{i}.jpg" for i in range(7)])
    train, val = both(tmp_path)
    assert val is None and train.labels is None and train.classes == () and len(train) == 7
    assert train.subset([3, 1]).labels is None and train.masks is None and train.uniform is False


def test_names_beyond_ascii(tmp_path):
    folder_of(tmp_path, class_names("été 猫", 3, ending="png"))
    assert both(tmp_path, share=0)[0].classes == ("été", "猫")


def test_what_is_refused(tmp_path):
    folder_of(tmp_path / "set", class_names())
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(tmp_path / "set", "set")
    with pytest.raises(ValueError, match="set.tar is not a folder: unpack an archive"):
        stream_folder(tmp_path / "set.tar")
    with pytest.raises(FileNotFoundError, match="no such folder: .*nowhere"):
        stream_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="channels must be 1 or 3"):
        stream_folder(tmp_path / "set", channels=4)
    with pytest.raises(IndexError):
        stream_folder(tmp_path / "set", 8, share=0)[0].batch([20])


def test_nothing_to_learn_from(tmp_path):
    folder_of(tmp_path, class_names("ant", 2, "train/") + class_names("cat", 2, "val/"))
    mine = tmp_path / "mine.txt"
    mine.write_text("cat\n")
    with pytest.raises(ValueError, match="no picture to learn from"):
        stream_folder(tmp_path, classes=mine)


def test_subset_pickle_and_repr(tmp_path):
    train, _ = stream_folder(folder_of(tmp_path, class_names()), 24, share=0)
    part = train.subset([12, 3, 4])
    assert part.labels.tolist() == [1, 0, 0] and part.paths == ("dog/02.jpg", "cat/03.jpg", "cat/04.jpg") and torch.equal(part[1], train[3])
    assert len(train.subset(train.labels == 1)) == 10 and to_index(train.labels == 1).tolist() == list(range(10, 20))
    assert to_index(range(3)).dtype == torch.int64
    again = pickle.loads(pickle.dumps(train))
    assert isinstance(again, Streamed) and again.paths == train.paths and torch.equal(again.batch([5, 11])[0], train.batch([5, 11])[0])
    assert repr(train) == f"Streamed({tmp_path.name} train: 20 of 3 channels, shorter side 24, 2 classes)"
    assert "many sizes" in repr(stream_folder(tmp_path)[0]) and sum(1 for _ in train) == 20


def test_memory_of_a_picture():
    names = np.array([f"train/n{i:08}/n{i:08}_{i:05}.JPEG".encode() for i in range(10_000)])
    many = Streamed("set", names, 256, 3, torch.zeros(10_000, dtype=torch.int64), name="many", depth=1)
    assert len(pickle.dumps(many)) < 46 * len(many)
    assert many.paths[7] == "n00000007/n00000007_00007.JPEG"


def test_long_panorama(tmp_path):
    folder_of(tmp_path, [f"{i}.png" for i in range(3)])
    wide = photo(7, (4000, 40))
    wide.save(tmp_path / "wide.png")
    wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "high.png")
    assert stream_folder(tmp_path, 20)[0].batch(range(5))[0].shape == (5, 3, 40, 40)
    both(tmp_path, 20)
    train, _ = stream_folder(tmp_path)
    middle = torch.from_numpy(np.array(wide)).permute(2, 0, 1)[:, :, 1960:2040]
    assert torch.equal(train[train.paths.index("wide.png")], middle)
    assert torch.equal(train[train.paths.index("high.png")], middle.rot90(1, (1, 2)))
    assert max(train.batch(range(5))[0].shape[2:]) == 80


# ---------------------------------------------------------------- broken files

def test_a_broken_file_is_replaced_and_named_once(tmp_path):
    names = class_names(count=20)
    train, _ = stream_folder(folder_of(tmp_path, names), 16, share=0)
    whole = [train[i] for i in range(40)]
    for i, content in ((19, b"no"), (20, b""), (21, (tmp_path / names[21]).read_bytes()[:200])):
        (tmp_path / names[i]).write_bytes(content)
    train.max_broken = .1
    with pytest.warns(UserWarning) as caught:
        images, sizes = train.batch(range(40))
        again = [train[i] for i in (19, 20, 21)]
    assert sorted(str(w.message).split(":")[0] for w in caught) == [str(tmp_path / names[i]) for i in (19, 20, 21)]
    assert caught[0].filename == __file__ or sys.version_info >= (3, 12)
    for i, j in ((19, 0), (20, 22), (21, 22)):  # the next one of its class, round the end
        h, w = sizes[i].tolist()
        assert torch.equal(images[i, :, :h, :w], whole[j]) and torch.equal(again[i - 19], whole[j])
    assert torch.equal(images[0, :, :sizes[0, 0], :sizes[0, 1]], whole[0]) and set(train.broken) == {names[i] for i in (19, 20, 21)}


def test_no_one_of_the_class_is_left(tmp_path):
    names = class_names("ant", 1) + class_names("bee", 30)
    train, _ = stream_folder(folder_of(tmp_path, names), 16, share=0)
    (tmp_path / names[0]).unlink()
    with pytest.warns(UserWarning, match="ant/00.jpg.*No such file.*stands in"):
        assert torch.equal(train[0], train[1])


def test_a_file_that_comes_back(tmp_path):
    names = [f"{i:02}.png" for i in range(30)]
    train, _ = stream_folder(folder_of(tmp_path, names), 16)
    (tmp_path / "03.png").rename(tmp_path / "away")
    with pytest.warns(UserWarning, match="03.png"):
        assert torch.equal(train[3], train[4])
    (tmp_path / "away").rename(tmp_path / "03.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.equal(train[3], train[4])


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken(tmp_path, workers):
    names = class_names(count=20)
    folder_of(tmp_path, names)
    for name in names[::8]:
        (tmp_path / name).write_bytes(b"no picture")
    train, _ = stream_folder(tmp_path, 16, share=0)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"3 pictures cannot be read, after 40 .*cat/00.jpg.*max_broken=5%") as error:
        warnings.simplefilter("ignore")
        list(prefetched(train, [torch.arange(40)], workers))
    assert "Traceback" not in str(error.value) and not multiprocessing.active_children()
    with warnings.catch_warnings(), pytest.raises(ValueError, match="max_broken"):
        warnings.simplefilter("ignore")
        train.batch(range(40))
        train[0]  # who goes on after the error gets it again


def test_all_broken_ends(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="3 pictures cannot be read"):
        stream_folder(tmp_path, max_broken=1)[0][0]


def test_share_is_of_what_was_read(tmp_path):
    "A large set: 50 broken ones among the first thousand are borne, not 51; later more are."
    names = np.array([f"{i:05}.png".encode() for i in range(3000)])
    train = Streamed(tmp_path, names, 16, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(50):
            train._judge(i, ValueError("x"))
        with pytest.raises(ValueError, match="51 pictures"):
            train._judge(50, ValueError("x"))
        train.reads = 2000
        for i in range(51, 100):
            train._judge(i, ValueError("x"))
        train.reads = 10**9
        with pytest.raises(ValueError, match="151 pictures"):
            for i in range(100, 3000):
                train._judge(i, ValueError("x"))


# ---------------------------------------------------------------- worker processes

@pytest.fixture
def train(tmp_path):
    return stream_folder(folder_of(tmp_path / "set", class_names(count=15)), 24, share=0)[0]


@pytest.mark.parametrize("kind", ["streamed", "pictures"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_order(train, workers, kind):
    pictures = train if kind == "streamed" else read_folder(train.folder, 24, share=0)[0]
    plan = [torch.randperm(30)[:n] for n in (7, 1, 5, 7, 3, 7, 30, 2)]
    state = torch.get_rng_state()
    found = list(prefetched(pictures, plan, workers, pin=True))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used up
    for (images, sizes, index), wanted in zip(found, plan, strict=True):
        assert torch.equal(index, wanted)
        assert all(torch.equal(x, y) for x, y in zip((images, sizes), train.batch(wanted), strict=True))
    assert not multiprocessing.active_children()


def test_endless_plan_is_drawn_only_a_little_ahead_and_closing_ends_the_workers(train):
    drawn = []

    def plan():
        while True:
            drawn.append(torch.tensor([len(drawn) % 30]))
            yield drawn[-1]

    batches = prefetched(train, plan(), workers=2, ahead=3)
    assert not multiprocessing.active_children()  # nothing starts before it is asked for
    for step in range(5):
        assert next(batches)[2].item() == step
    assert len(multiprocessing.active_children()) == 2 and len(drawn) <= 5 + 2 * 3
    start = time.perf_counter()
    batches.close()
    assert not multiprocessing.active_children() and time.perf_counter() - start < 5


def test_shared_out_indices(train):
    "A rank's share of a batch is a slice with a step."
    order = torch.randperm(30)
    for images, _, index in prefetched(train, [order[1::2], order[::3]], workers=1):
        assert torch.equal(images, train.batch(index)[0])


class Reporter:
    "What a worker sees of itself, in the shape of a batch."
    def batch(self, index):
        info = get_worker_info()
        warnings.warn("told once", stacklevel=1)
        return torch.full((len(index), 1, 1, 1), torch.get_num_threads()), torch.tensor([[os.getpid(), info.id if info else -1]])


def test_workers_have_one_thread_and_tell_warnings_once():
    with pytest.warns(UserWarning, match="told once") as caught:
        found = list(prefetched(Reporter(), torch.arange(12).split(2), workers=2))
    assert all((images == 1).all() for images, _, _ in found)
    pids = {sizes[0, 0].item() for _, sizes, _ in found}
    assert len(pids) == 2 and os.getpid() not in pids and len(caught) == 1 and caught[0].filename == __file__


def test_a_workers_broken_file_is_told_here(train):
    train.file(4).write_bytes(b"no")
    with pytest.warns(UserWarning, match="cat/04.jpg.*stands in") as caught:
        found = list(prefetched(train, [torch.tensor([3, 4])] * 6, workers=2))
    assert len(caught) == 1 and len(found) == 6
    assert all(torch.equal(images, found[0][0]) for images, _, _ in found)
    with pytest.warns(UserWarning, match="cat/04.jpg"):
        assert torch.equal(train.batch([3, 4])[0], found[0][0])


@pytest.mark.parametrize("error", [ValueError("bad value"), OSError(5, "bad disk"), IndexError("bad place")])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_arrives_as_itself(error, workers):
    class Failing:
        def batch(self, index):
            raise error
    with pytest.raises(type(error)) as found:
        next(prefetched(Failing(), [torch.arange(3)], workers))
    assert str(found.value) == str(error) and not multiprocessing.active_children()


def test_a_plan_that_fails(train):
    def plan():
        yield torch.arange(3)
        raise ValueError("no such epoch")
    with pytest.raises(ValueError, match="^no such epoch$"):
        list(prefetched(train, plan(), workers=1))
    assert not multiprocessing.active_children()


def test_a_set_travels_to_a_process_that_was_not_forked(train):
    "Where processes are not forked, the set is pickled: macOS, Windows and newer Pythons."
    code = ("import multiprocessing, pickle, sys, torch\n"
            "from dino_edu.stream import prefetched\n"
            "if __name__ == '__main__':\n"
            "    multiprocessing.set_start_method('spawn')\n"
            "    train = pickle.load(sys.stdin.buffer)\n"
            "    (images, _, _), = prefetched(train, [torch.tensor([4, 1])], workers=1)\n"
            "    assert torch.equal(images, train.batch([4, 1])[0])\n"
            "    print('same')\n")
    script = train.folder.parent / "spawn.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], input=pickle.dumps(train), capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == b"same", done.stderr.decode()


# ---------------------------------------------------------------- load

def test_load(tmp_path):
    folder_of(tmp_path / "set", class_names())
    train, val = load(tmp_path / "set", 16, stream=True, share=.3)
    assert isinstance(train, Streamed) and same(train, load(tmp_path / "set", 16, share=.3)[0]) and len(val) == 6
    assert isinstance(load(tmp_path / "set", 16)[0], Pictures)
    assert load(str(tmp_path / "set"), 16, 1, stream=True, labelled=False)[0].labels is None


def test_load_imagenet(tmp_path):
    buffer = io.BytesIO()
    photo(0, (20, 16)).save(buffer, "JPEG")
    for folder in read_classes("imagenet100"):
        for split in ("train", "val"):
            (tmp_path / split / folder).mkdir(parents=True)
            (tmp_path / split / folder / f"{folder}_1.JPEG").write_bytes(buffer.getvalue())
    train, val = load("imagenet100", 8, root=tmp_path, stream=True)
    assert len(train) == len(val) == 100 and train.classes[0] == "bonnet" and train[0].shape == (3, 8, 10)
    with pytest.raises(FileNotFoundError, match="pass root="):
        load("imagenet", stream=True)


def test_load_refuses(tmp_path):
    for source in ("shapes", "shapes:50", "cifar10", "stl10", "imagenette"):
        with pytest.raises(ValueError, match=f"stream.*folders.*not .*{source}"):
            load(source, stream=True, root=tmp_path)
    with pytest.raises(ValueError, match="cache"):
        load(folder_of(tmp_path / "set", class_names()), stream=True, cache=tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="no known set"):
        load(tmp_path / "nowhere", stream=True)
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="x.zip is not a folder"):
        load(tmp_path / "x.zip", stream=True)
