"""Checkpoints that are really interrupted: full disks, killed writers, broken and foreign files; and resuming, for every method."""
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dino_edu import checkpoint
from dino_edu.checkpoint import (
    ENCODER_FORMAT, FORMAT, about_encoder, keep, load_checkpoint, load_encoder, restore, save_checkpoint, save_encoder, write_atomically,
)
from dino_edu.core import keys, seed_everything
from dino_edu.methods import METHODS
from dino_edu.recipe import Recipe, augmentation, encoder, method, override, shapes
from dino_edu.shapes import make

ROOT = Path(__file__).parents[1]
TINY = override(shapes(), patch_size=8, drop_path=.3, n_local=2, out_dim=32, hidden=32, bottleneck=16, batch=4, queue=16)
posix = pytest.mark.skipif(os.name != "posix", reason="limits and signals of POSIX")


def begin(recipe, seed=0):
    seed_everything(seed)
    model = method(recipe, steps_per_epoch=3).train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)


def take(model, optimizer, recipe, start, stop):
    "The losses of some steps."
    pictures, _, _ = make(recipe.batch, 0)
    crop, index, losses = augmentation(recipe), torch.arange(recipe.batch), []
    for i in range(start, stop):
        loss = model(crop(pictures, torch.full((recipe.batch, 2), 48), keys(0, i, index)), i / 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(i / 8)
        losses.append(loss.item())
    return losses


def python(code, *args, **options):
    "A Python process that has imported the module under test."
    code = "import sys, torch\nfrom pathlib import Path\nfrom dino_edu.checkpoint import *\nfolder = Path(sys.argv[1])\n" + code
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=environment, text=True, stdout=subprocess.PIPE, **options)


@pytest.fixture
def saved(tmp_path):
    "A checkpoint after two steps, and what it was made of."
    model, optimizer = begin(TINY)
    take(model, optimizer, TINY, 0, 2)
    save_checkpoint(tmp_path / "last.pt", model, optimizer, TINY, seed=0, step=2, seconds=1.5, notes=("a", [1, 2]))
    return tmp_path / "last.pt", model, optimizer


def alone(path):
    "Is the file the only one in its folder, hidden ones included?"
    return [other.name for other in path.parent.iterdir()] == [path.name]


# Writing

def test_write_atomically(tmp_path):
    path = tmp_path / "text"
    for text in ("old", "new"):
        write_atomically(path, lambda temporary: temporary.write_text(text))  # noqa: B023
        assert path.read_text() == text
    assert alone(path)


def test_text_path_is_taken_too(tmp_path):
    write_atomically(str(tmp_path / "text"), lambda temporary: temporary.write_text("new"))
    assert (tmp_path / "text").read_text() == "new"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 704 vs 598")])
def test_failed_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "text"
    path.write_text("old")

    def half(temporary):
        temporary.write_text("ne")
        raise error
    with pytest.raises(OSError, match="could not write .*text.*untouched.*[Ff]ree some space") as caught:
        write_atomically(path, half)
    assert str(error) in str(caught.value) and caught.value.__cause__ is error
    assert path.read_text() == "old" and alone(path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_other_errors_pass_and_leave_nothing(tmp_path, error):
    path = tmp_path / "text"
    path.write_text("old")

    def half(temporary):
        temporary.write_text("ne")
        raise error
    with pytest.raises(error):
        write_atomically(path, half)
    assert path.read_text() == "old" and alone(path)


def test_crash_before_the_rename_keeps_the_old_file(saved, monkeypatch):
    path, model, optimizer = saved

    def crash(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, model, optimizer, TINY, seed=0, step=3)
    assert load_checkpoint(path)["step"] == 2 and alone(path)


def test_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    "The order that survives a power cut: the file's bytes, its new name, the folder."
    events, flush, replace = [], os.fsync, os.replace

    def note_flush(place):
        events.append("folder" if stat.S_ISDIR(os.fstat(place).st_mode) else "file")
        flush(place)

    def note_replace(*args):
        events.append("rename")
        replace(*args)
    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "replace", note_replace)
    write_atomically(tmp_path / "text", lambda temporary: temporary.write_text("new"))
    assert events[:2] == ["file", "rename"]
    assert os.name != "posix" or events == ["file", "rename", "folder"]


def test_folder_that_cannot_be_flushed(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError("no")
    monkeypatch.setattr(checkpoint.os, "open", refuse)
    write_atomically(tmp_path / "text", lambda temporary: temporary.write_text("new"))
    assert (tmp_path / "text").read_text() == "new"


def test_leftovers_of_killed_writers_are_swept(tmp_path):
    for name in (".text.123.partial", ".other.123.partial", ".text"):
        (tmp_path / name).write_text("left over")
    write_atomically(tmp_path / "text", lambda temporary: temporary.write_text("new"))
    assert {path.name for path in tmp_path.iterdir()} == {"text", ".other.123.partial", ".text"}


def test_leftovers_are_swept_before_their_space_is_needed(tmp_path):
    "Even one of the same process number, as in a container, where every run may be number 1."
    leftover = tmp_path / f".text.{os.getpid()}.partial"
    leftover.write_text("left over")
    seen = []
    write_atomically(tmp_path / "text", lambda temporary: (seen.extend(tmp_path.iterdir()), temporary.write_text("new")))
    assert seen == [] and alone(tmp_path / "text")


def test_keep(tmp_path):
    "A second name, of the present file only; twice is as once, and a writer that was killed is no hindrance."
    last, best = tmp_path / "last.pt", tmp_path / "best.pt"
    last.write_text("one")
    os.link(last, tmp_path / f".best.pt.{os.getpid()}.partial")
    for _ in range(2):
        keep(last, "best.pt")
    assert best.samefile(last) and len(list(tmp_path.iterdir())) == 2
    write_atomically(last, lambda temporary: temporary.write_text("two"))
    assert (best.read_text(), last.read_text()) == ("one", "two")
    keep(last, "best.pt")
    assert best.read_text() == "two" and len(list(tmp_path.iterdir())) == 2


def test_keep_where_files_have_one_name(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError("no links here")
    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "last.pt").write_text("one")
    keep(tmp_path / "last.pt", "best.pt")
    assert (tmp_path / "best.pt").read_text() == "one"


@pytest.mark.parametrize("place", ["absent/last.pt", "file/last.pt"])
def test_no_such_folder(tmp_path, saved, place):
    (tmp_path / "file").write_text("not a folder")
    _, model, optimizer = saved
    with pytest.raises(OSError, match=f"could not write .*{place}"):
        save_checkpoint(tmp_path / place, model, optimizer, TINY, seed=0, step=2)


@posix
def test_modes_follow_the_umask(saved):
    "Others may read what the user lets them read (temporary files are often private, and stay so when renamed)."
    path, model, _ = saved
    save_encoder(path.with_name("encoder.safetensors"), model.student.encoder, TINY)
    write_atomically(path.with_name("text"), lambda temporary: temporary.write_text("new"))
    mask = os.umask(0)
    os.umask(mask)
    assert {other.name: stat.S_IMODE(other.stat().st_mode) for other in path.parent.iterdir()} == dict.fromkeys(
        ("last.pt", "encoder.safetensors", "text"), 0o666 & ~mask)


FILL = """
from torch import nn
from dino_edu.recipe import *
recipe = override(shapes(), patch_size=8)
net = encoder(recipe)
optimizer = torch.optim.SGD(net.parameters())
path, shipped = folder / "last.pt", folder / "encoder.safetensors"
save_checkpoint(path, net, optimizer, recipe, 0, 1)
save_encoder(shipped, net, recipe)
{limit}
for name, write in dict(a=lambda: save_checkpoint(path, net, optimizer, recipe, 0, 2, more=torch.zeros(10**6)),
                        b=lambda: save_encoder(shipped, nn.Linear(1000, 1000), recipe),
                        c=lambda: write_atomically(folder / "log", lambda temporary: temporary.write_text("x" * 4 * 10**6))).items():
    try:
        write()
        print("no error", name)
    except OSError as error:
        print("OSError", error)
print(load_checkpoint(path)["step"], load_encoder(shipped)[1] == recipe, sorted(p.name for p in folder.iterdir()))
"""


def check_filled(output, folder):
    *errors, last = output.strip().splitlines()
    assert len(errors) == 3 and last == "1 True ['encoder.safetensors', 'last.pt']", output
    for error, name in zip(errors, ("last.pt", "encoder.safetensors", "log")):
        assert error.startswith(f"OSError could not write {folder / name}"), output


@posix
def test_file_that_grows_beyond_a_limit(tmp_path):
    "The system refuses to write more than 3 MB to a file: the error comes from the very functions that write."
    process = python(FILL.format(limit="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 10**6,) * 2)"), tmp_path)
    check_filled(process.communicate(timeout=120)[0], tmp_path)


def test_full_disk(tmp_path):
    "A file system of 3 MB, where the test may make one."
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True) if os.name == "posix" else None
    if done is None or done.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        process = python(FILL.format(limit=""), tmp_path)
        check_filled(process.communicate(timeout=120)[0], tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@posix
def test_writers_killed_at_random_moments(tmp_path):
    "kill -9 in the middle of saving: what is there is whole, and no older than the last one that was finished."
    code = """
for step in range(10**6):
    write_atomically(folder / "last.pt", lambda path: torch.save(dict(format=FORMAT, recipe={}, method={}, step=step, x=torch.full((10**6,), step)), path))
    print(step, flush=True)
"""
    folders = [tmp_path / str(i) for i in range(3)]
    for folder in folders:
        folder.mkdir()
    writers = [python(code, folder) for folder in folders]
    for writer, folder in zip(writers, folders):
        finished = [int(writer.stdout.readline())]
        time.sleep(random.uniform(.05, .5))
        writer.send_signal(signal.SIGKILL)
        finished += [int(line) for line in writer.communicate(timeout=60)[0].split()]
        state = load_checkpoint(folder / "last.pt")
        assert finished[-1] <= state["step"] <= finished[-1] + 1
        assert (state["x"] == state["step"]).all()
        write_atomically(folder / "last.pt", lambda temporary: torch.save(state, temporary))  # noqa: B023
        assert alone(folder / "last.pt")


# Reading

def test_round_trip_is_exact(saved):
    path, model, optimizer = saved
    chance = torch.get_rng_state()
    state = load_checkpoint(path)
    assert state["recipe"] == {name: getattr(TINY, name) for name in state["recipe"]} and Recipe(**state["recipe"]) == TINY
    assert (state["step"], state["seconds"], state["notes"]) == (2, 1.5, ("a", [1, 2]))
    other, moments = begin(TINY, seed=1)
    assert restore(state, other, moments, TINY, seed=0) == 2
    assert torch.equal(torch.get_rng_state(), chance)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    stored, again = optimizer.state_dict(), moments.state_dict()
    assert stored["param_groups"] == again["param_groups"]
    for i, values in stored["state"].items():
        assert all(torch.equal(value, again["state"][i][name]) for name, value in values.items())


@pytest.mark.parametrize("size", [0, 10, 1000, -10])
def test_truncated(saved, size):
    path, *_ = saved
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"last\.pt is broken"):
        load_checkpoint(path)


@pytest.mark.parametrize("place", [.1, .5, .9])
def test_rotten_byte(saved, place):
    "One wrong byte in a tensor would go unnoticed by torch.load."
    path, *_ = saved
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"last\.pt is broken"):
        load_checkpoint(path)


class Code:
    "Something that runs when it is unpickled."

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("content, message", [
    (b"once upon a time", "is broken"),
    (dict(student={}, teacher={}, epoch=3), "is not a checkpoint of dino_edu"),
    ([torch.zeros(3)], "is not a checkpoint of dino_edu"),
    (dict(format="pt"), "is not a checkpoint of dino_edu"),
    (dict(format=FORMAT + 1, version="9.9", recipe={}, method={}), rf"has format {FORMAT + 1} \(dino_edu 9\.9\)"),
    (Code(), "is broken"),
])
def test_foreign(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "foreign.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=rf"foreign\.pt {message}"):
        load_checkpoint(path)
    assert not (tmp_path / "unpickled").exists()


def test_absent_or_unreadable(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(OSError, match=str(tmp_path)):
        load_checkpoint(tmp_path)


def test_what_cannot_be_read_back_is_not_written(saved):
    path, model, optimizer = saved
    with pytest.raises(ValueError, match="holds tensors, numbers"):
        save_checkpoint(path, model, optimizer, TINY, seed=0, step=3, seconds=np.float64(2))
    assert load_checkpoint(path)["step"] == 2 and alone(path)


@pytest.mark.parametrize("changes, seed, message", [
    (dict(lr=1e-9, batch=64), 0, "batch = 4, this run asks for 64"),
    (dict(encoder="vit_tiny"), 0, "encoder = 'vit_nano', this run asks for 'vit_tiny'"),
    (dict(global_scale=(.1, .9)), 0, r"global_scale = \(0\.5, 1\.0\)"),
    (dict(), 7, "seed = 0, this run asks for 7"),
])
def test_restore_refuses_another_run(saved, changes, seed, message):
    path, model, optimizer = saved
    with pytest.raises(ValueError, match=message):
        restore(load_checkpoint(path), model, optimizer, override(TINY, **changes), seed)


def test_restore_refuses_a_field_that_is_gone(saved):
    path, model, optimizer = saved
    state = load_checkpoint(path)
    state["recipe"]["forgotten"] = 3
    with pytest.raises(ValueError, match="forgotten = 3, this run asks for None"):
        restore(state, model, optimizer, TINY, 0)


@pytest.mark.parametrize("changes", [dict(encoder="vit_micro"), dict(out_dim=64), dict(predictor=True), dict(loss="infonce")])
def test_restore_refuses_another_architecture_and_touches_nothing(saved, changes):
    path, *_ = saved
    model, optimizer = begin(override(TINY, **changes), seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the checkpoint is of another architecture: \S+ is .* in this network"):
        restore(load_checkpoint(path), model, optimizer, TINY, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Resuming

@pytest.mark.parametrize("changes", [*METHODS.values(), dict(teacher="previous_iteration"), dict(teacher="previous_epoch", targets="softmax_batch"),
                                     dict(teacher="student_copy"), dict(loss="cosine")], ids=lambda changes: "-".join(map(str, changes)) or "dino")
def test_resumed_is_straight(tmp_path, changes):
    "N steps equal N / 2 steps, a file, and N / 2 steps, in every bit."
    recipe = override(TINY, **changes)
    model, optimizer = begin(recipe)
    losses = take(model, optimizer, recipe, 0, 4)
    save_checkpoint(tmp_path / "last.pt", model, optimizer, recipe, seed=0, step=4)
    losses += take(model, optimizer, recipe, 4, 8)
    other, moments = begin(recipe, seed=1)
    assert restore(load_checkpoint(tmp_path / "last.pt"), other, moments, recipe, seed=0) == 4
    assert take(other, moments, recipe, 4, 8) == losses[4:]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


# Encoders

@pytest.mark.parametrize("changes", [dict(), dict(in_chans=1, stem="patch"), dict(encoder="resnet18", global_size=32)])
def test_encoder_round_trip(tmp_path, changes):
    recipe, path = override(TINY, **changes), tmp_path / "encoder.safetensors"
    seed_everything(0)
    net = encoder(recipe).eval()
    save_encoder(path, net, recipe, data="shapes", seed=0)
    again, found = load_encoder(path)
    assert found == recipe and not again.training
    x = torch.randn(2, recipe.in_chans, 32, 32)
    with torch.no_grad():
        assert torch.equal(net(x), again(x))
    with safe_open(path, "pt") as file:
        assert file.metadata()["data"] == "shapes" and file.metadata()["seed"] == "0"


def test_several_encoders_in_one_file(tmp_path):
    "Each under its name, strictly: a file whose names do not say what it holds is refused."
    nets, x = nn.ModuleDict({name: encoder(TINY) for name in ("one", "other")}), torch.randn(2, 3, 32, 32)
    training = {name: net.training for name, net in nets.items()}
    save_encoder(tmp_path / "both", nets, TINY, step=3)
    assert {name: net.training for name, net in nets.items()} == training
    again, found = load_encoder(tmp_path / "both")
    assert list(again) == ["one", "other"] and found == TINY and about_encoder(tmp_path / "both")["step"] == "3"
    with torch.no_grad():
        assert all(torch.equal(again[name](x), nets[name].eval()(x)) and not again[name].training for name in nets)
    with safe_open(tmp_path / "both", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, tmp_path / "wrong", about_encoder(tmp_path / "both") | dict(networks="one"))
    with pytest.raises(ValueError, match="wrong is of another architecture: other"):
        load_encoder(tmp_path / "wrong")


def test_about_files_of_others(tmp_path):
    save_file(dict(a=torch.zeros(1)), tmp_path / "foreign")
    assert about_encoder(tmp_path / "foreign") == {}
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken is broken, or no safetensors file"):
        about_encoder(tmp_path / "broken")
    with pytest.raises(FileNotFoundError, match="absent"):
        about_encoder(tmp_path / "absent")


def test_half_precision(tmp_path):
    net = encoder(TINY).eval()
    for half in (False, True):
        save_encoder(tmp_path / str(half), net, TINY, half=half)
    again, _ = load_encoder(tmp_path / "True")
    for a, b in zip(again.parameters(), net.parameters()):
        assert a.dtype == torch.float32 and torch.equal(a, b.half().float())
    assert (tmp_path / "True").stat().st_size < .53 * (tmp_path / "False").stat().st_size


def test_about_cannot_replace_the_recipe(tmp_path):
    save_encoder(tmp_path / "x", encoder(TINY), TINY, format="mine", version="mine")
    assert load_encoder(tmp_path / "x")[1] == TINY


def described(**changes):
    "Metadata as `save_encoder` writes them, with changes; a change to None takes a key out."
    recipe = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
    metadata = dict(format=str(ENCODER_FORMAT), version="9.9", recipe=json.dumps(recipe)) | changes
    return {name: value for name, value in metadata.items() if value is not None}


@pytest.mark.parametrize("metadata, tensors, message", [
    ({}, dict(weight=torch.zeros(3)), "holds no recipe"),
    (described(recipe=None), dict(weight=torch.zeros(3)), "holds no recipe"),
    (described(format="7"), dict(weight=torch.zeros(3)), r"has format 7 \(dino_edu 9\.9\)"),
    (described(recipe=json.dumps(dict(patch=8))), dict(weight=torch.zeros(3)), "another version of dino_edu: .*no field 'patch'"),
    (described(), dict(weight=torch.zeros(3)), "of another architecture: cls_token is missing there"),
    (described(), encoder(TINY).state_dict() | dict(more=torch.zeros(3)), r"of another architecture: more is \(3,\) there, missing"),
    (described(), {n: t for n, t in encoder(TINY).state_dict().items() if n != "norm.bias"}, "architecture: norm.bias is missing there"),
    (described(), encoder(override(TINY, patch_size=4)).state_dict(), r"architecture: pos_embed is \(1, 65, 64\) there, \(1, 17, 64\)"),
])
def test_foreign_encoder(tmp_path, metadata, tensors, message):
    path = tmp_path / "encoder.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(path)
    assert str(path) in str(caught.value)


def test_broken_encoder(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder(TINY), TINY)
    for size in (0, 5, 1000, -10):
        path.with_name("cut").write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="cut is broken"):
            load_encoder(path.with_name("cut"))
    with pytest.raises(ValueError, match="is broken, or no safetensors file"):
        load_encoder(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_encoder(tmp_path / "absent")


def test_encoder_out_of_space(tmp_path, monkeypatch):
    path, net = tmp_path / "encoder.safetensors", encoder(TINY)
    save_encoder(path, net, TINY)

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"could not write .*encoder\.safetensors .*No space left"):
        save_encoder(path, nn.Linear(3, 3), TINY)
    assert load_encoder(path)[1] == TINY and alone(path)
