"""Runs that are really stopped: by signals, by kill -9 at any moment, by full disks; and odd data, bad input, other backbones, real pictures."""
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

import dino_edu.fit
from dino_edu.checkpoint import WATCHING, load_checkpoint, load_encoder, restore
from dino_edu.cli import main
from dino_edu.core import cosine, seed_everything, warmup_cosine
from dino_edu.data import load
from dino_edu.fit import Interrupted, fit, noted_signals
from dino_edu.methods import METHODS
from dino_edu.recipe import PRESETS, Recipe, method, override, shapes
from dino_edu.rows import siamese
from dino_edu.run import Run
from dino_edu.weights import save_snapshot, snapshots

ROOT = Path(__file__).parents[1]
SHORT = override(shapes(), steps=4, evaluations=2, batch=16, log_every=1, patch_size=8, n_local=2, out_dim=32, hidden=32, bottleneck=16)


@pytest.fixture(scope="module")
def pictures():
    return load("shapes", n=60)


@pytest.fixture(autouse=True)
def blank_curves(request, monkeypatch):
    "Drawing takes longer than most of these runs."
    if "run_folder" not in request.node.name:
        monkeypatch.setattr(dino_edu.fit, "plot_curves", lambda *_: Figure(figsize=(1, 1)))


def quietly(recipe, pictures, folder, say=str, **more):
    "`fit` without linear probe and words."
    return fit(recipe, *pictures, folder, linear=False, say=say, **more)


def paint(folder, name, n, size=(60, 50)):
    "A folder of noisy pictures."
    place = folder / name
    place.mkdir(parents=True)
    chance = np.random.default_rng(len(name))
    for i in range(n):
        Image.fromarray(chance.integers(0, 255, (*size, 3), dtype=np.uint8)).save(place / f"{i}.png")


def at(step, accident):
    "What `fit` should say its lines to, for an accident at the evaluation after `step`, before its checkpoint is written."
    return lambda line: accident() if line.startswith(f"step {step} ") else None


class PlugPulled(Exception):
    "Stands for anything that ends a process."


def pull_the_plug():
    raise PlugPulled


def send(signum):
    return partial(os.kill, os.getpid(), signum)


def same(a, b):
    "Are two nests of dicts, lists and tensors equal in every bit?"
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def untimed(folder):
    "The log without the seconds."
    return [{name: value for name, value in line.items() if name != "seconds"} for line in Run(folder).lines()]


def assert_same_end(one, other):
    "Weights, teacher, loss, optimiser, chance, log and scores of two runs are equal, and nothing is left over from an accident."
    for name in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(folder / name) for folder in (one, other))
        assert all(same(a[part], b[part]) for part in ("step", "method", "optimizer", "chance")), name
    assert untimed(one) == untimed(other)
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    assert json.loads((one / "summary.json").read_text())["metrics"] == json.loads((other / "summary.json").read_text())["metrics"]


# Going on

CASES = METHODS | dict(
    student_copy=dict(teacher="student_copy"), previous_iteration=dict(teacher="previous_iteration"),
    previous_epoch=dict(teacher="previous_epoch", targets="softmax_batch"), accumulate=dict(accumulate=2, head_bn=False),
    **{name: siamese(SHORT)[name].changes for name in ("siamese_im", "as_published", "mae")},
)


@pytest.mark.parametrize("name", CASES)
def test_resumed_is_straight(name, pictures, tmp_path):
    "Stopped by a signal, by a plug pulled before a checkpoint, on and off the marks, across the ends of epochs (3 steps): equal in every bit."
    recipe = override(SHORT, steps=8, queue=64, drop_path=0.2, save_every=3, **CASES[name])
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    quietly(recipe, pictures, straight)
    with pytest.raises(Interrupted, match="after step 4 of 8"):
        quietly(recipe, pictures, parts, at(4, send(signal.SIGTERM)))
    with pytest.raises(PlugPulled):
        quietly(recipe, pictures, parts, at(8, pull_the_plug))
    assert load_checkpoint(parts / "last.pt")["step"] == 6
    quietly(recipe, pictures, parts)
    assert_same_end(straight, parts)


def test_watching_changes_nothing_else(pictures, tmp_path):
    "How often one looks may change between start and end of a run: the weights do not."
    recipe = override(SHORT, steps=8, drop_path=0.2)
    quietly(recipe, pictures, tmp_path / "straight")
    with pytest.raises(Interrupted):
        quietly(override(recipe, save_every=2), pictures, tmp_path / "parts", at(4, send(signal.SIGINT)))
    fit(override(recipe, evaluations=4, log_every=3, save_every=None), *pictures, tmp_path / "parts", say=str)
    ends = [load_checkpoint(tmp_path / name / "last.pt") for name in ("straight", "parts")]
    assert same(ends[0]["method"], ends[1]["method"]) and same(ends[0]["optimizer"], ends[1]["optimizer"])


def test_nothing_else_may_change(pictures, tmp_path):
    quietly(override(SHORT, steps=1, evaluations=1), pictures, tmp_path)
    state, recipe = load_checkpoint(tmp_path / "last.pt"), override(SHORT, steps=1)
    for field in fields(Recipe):
        if field.name in WATCHING:
            continue
        with pytest.raises(ValueError, match=f"made with {field.name} = .* asks for 'something else'.*another output folder"):
            restore(state, None, None, override(recipe, **{field.name: "something else"}), 0)


def test_another_recipe_in_the_same_folder_is_refused(pictures, tmp_path):
    quietly(SHORT, pictures, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="teacher_temperature = 0.04.*0.05.*another output folder"):
        quietly(override(SHORT, teacher_temperature=0.05), pictures, tmp_path)
    with pytest.raises(ValueError, match="seed = 0"):
        quietly(SHORT, pictures, tmp_path, seed=1)
    assert contents(tmp_path) == before


def test_a_finished_run_is_not_run_again(pictures, tmp_path):
    first = fit(SHORT, *pictures, tmp_path, say=str)
    assert fit(SHORT, *pictures, tmp_path, say=str)["metrics"] == first["metrics"]


def test_killed_between_the_last_checkpoint_and_the_summary(pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(PlugPulled):
        patch.setattr(dino_edu.fit, "save_encoder", lambda *_, **__: pull_the_plug())
        quietly(SHORT, pictures, tmp_path)
    assert quietly(SHORT, pictures, tmp_path)["steps"] == 4 and (tmp_path / "curves.png").exists()


# Snapshots

@pytest.mark.parametrize("name", ["dino", "mocov2", "supervised", "averaged", "resnet18"])
def test_snapshots_change_nothing(name, pictures, tmp_path):
    "With and without: the same weights, moments, chance, log and scores, to the last bit."
    changes = dict(supervised=dict(loss="labels", out_dim=10), averaged=dict(teacher="previous_iteration", average=True), resnet18=dict(encoder="resnet18"))
    recipe = override(SHORT, drop_path=0.2, queue=64, **(changes | METHODS)[name])
    quietly(recipe, pictures, tmp_path / "without")
    quietly(recipe, pictures, tmp_path / "with", snapshots=3)
    kept = list(snapshots(tmp_path / "with"))
    assert [step for step, _ in kept] == [0, 1, 4] and {"teacher", "student"} <= set(kept[0][1])
    shutil.move(tmp_path / "with" / "snapshots", tmp_path / "elsewhere")
    assert_same_end(tmp_path / "without", tmp_path / "with")


def halved(net):
    return {name: t.half().to(t.dtype) for name, t in net.state_dict().items()}


def test_snapshots_from_the_untrained_network_to_the_last(pictures, tmp_path):
    quietly(SHORT, pictures, tmp_path, snapshots=20, seed=5)
    kept = dict(snapshots(tmp_path))
    assert list(kept) == [0, 1, 2, 3, 4]
    seed_everything(5)
    fresh = method(SHORT).encoders()
    assert all(same(dict(kept[0][name].state_dict()), halved(fresh[name])) for name in ("teacher", "student"))
    assert same(dict(kept[4]["teacher"].state_dict()), halved(load_encoder(tmp_path / "encoder.safetensors")[0]))
    tokens = [nets["student"].cls_token for nets in kept.values()]
    assert all(not torch.equal(a, b) for a, b in zip(tokens, tokens[1:]))


def files(folder):
    "Tensors by the name of the snapshot (the order of what is written beside them is not fixed)."
    return {path.name: load_file(path) for path in sorted((folder / "snapshots").iterdir())}


def test_snapshots_of_a_resumed_run(pictures, tmp_path):
    "Stopped on request, and by a plug pulled after snapshots that no checkpoint holds: those that hold stay, the others are taken again."
    recipe = override(SHORT, steps=8, save_every=3)
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    quietly(recipe, pictures, straight, snapshots=5)
    with pytest.raises(Interrupted, match="after step 4 of 8"):
        quietly(recipe, pictures, parts, at(4, send(signal.SIGTERM)), snapshots=5)
    assert list(files(parts)) == ["000000.safetensors", "000002.safetensors", "000004.safetensors"]
    os.utime(parts / "snapshots" / "000002.safetensors", (1, 1))
    with pytest.raises(PlugPulled), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dino_edu.fit, "save_snapshot", lambda *args: (save_snapshot(*args), pull_the_plug() if args[1] == 8 else None))
        quietly(recipe, pictures, parts, snapshots=5)
    assert load_checkpoint(parts / "last.pt")["step"] == 6 and "000008.safetensors" in files(parts)
    (parts / "snapshots" / "000008.safetensors").write_bytes(b"of another machine")
    (parts / "snapshots" / ".000008.safetensors.1.partial").touch()
    quietly(recipe, pictures, parts, snapshots=5)
    assert_same_end(straight, parts)
    assert same(files(straight), files(parts)) and (parts / "snapshots" / "000002.safetensors").stat().st_mtime == 1


def test_snapshots_asked_for_later(pictures, tmp_path):
    "Of a run that is over there is the last step; one that starts afresh, its checkpoint gone, has none of the old ones."
    quietly(SHORT, pictures, tmp_path)
    assert not (tmp_path / "snapshots").exists()
    quietly(SHORT, pictures, tmp_path, snapshots=3)
    assert list(files(tmp_path)) == ["000004.safetensors"]
    (tmp_path / "last.pt").unlink()
    quietly(SHORT, pictures, tmp_path)
    assert files(tmp_path) == {}


# The best

@contextmanager
def scores(monkeypatch, *values):
    "The scores that a run will be given, the untrained network's first."
    with monkeypatch.context() as patch:
        given = iter(values)
        patch.setattr(dino_edu.fit, "score", lambda *_, **__: dict(knn_teacher=next(given)))
        yield patch


def steps_of(folder):
    return [load_checkpoint(folder / name)["step"] for name in ("best.pt", "last.pt")]


def test_best_is_that_of_the_highest_score(pictures, tmp_path, monkeypatch):
    with scores(monkeypatch, 60, 20, 50, 40, 45):
        quietly(override(SHORT, evaluations=4, save_every=1), pictures, tmp_path)
    assert steps_of(tmp_path) == [2, 4]


def test_best_of_a_real_run(pictures, tmp_path):
    quietly(override(SHORT, steps=8, evaluations=8), pictures, tmp_path)
    scored = {line["i"]: line["knn_teacher"] for line in Run(tmp_path).lines() if "knn_teacher" in line}
    assert len(scored) == 8 and scored[steps_of(tmp_path)[0]] == max(scored.values())


def test_killed_before_the_best_got_its_name(pictures, tmp_path, monkeypatch):
    recipe = override(SHORT, evaluations=4)
    with scores(monkeypatch, 60, 20, 50) as patch, pytest.raises(PlugPulled):
        patch.setattr(dino_edu.fit, "keep", lambda path, name: pull_the_plug() if load_checkpoint(path)["step"] == 2 else None)
        quietly(recipe, pictures, tmp_path)
    with scores(monkeypatch, 40, 45):
        quietly(recipe, pictures, tmp_path)
    assert steps_of(tmp_path) == [2, 4]


# Asked to stop

def test_signals_are_noted_and_given_back():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    for signum in (signal.SIGINT, signal.SIGTERM):
        with noted_signals() as asked:
            assert asked() == 0
            send(signum)(), send(signum)()   # a second one at once is the same request, as from a terminal and a launcher
            assert asked() == signum
    with pytest.raises(PlugPulled), noted_signals():
        pull_the_plug()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_stops_at_once(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(dino_edu.fit, "noted_signals", partial(noted_signals, patience=0))

    def impatient():
        send(signal.SIGINT)()
        time.sleep(0.01)
        send(signal.SIGINT)()
    with pytest.raises(KeyboardInterrupt) as stopped:
        quietly(SHORT, pictures, tmp_path, at(4, impatient))
    assert not isinstance(stopped.value, Interrupted) and load_checkpoint(tmp_path / "last.pt")["step"] == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_takes_no_notes():
    seen, before = [], signal.getsignal(signal.SIGTERM)

    def inside():
        with noted_signals() as asked:
            seen.extend([signal.getsignal(signal.SIGTERM), asked()])
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before, 0]


def test_a_signal_in_the_last_step_lets_the_run_end(pictures, tmp_path):
    assert quietly(SHORT, pictures, tmp_path, at(4, send(signal.SIGTERM)))["steps"] == 4


# The command, in processes that are really killed

STEPS = 24
WORDS = ["train", "shapes", "--data", "shapes:64", "--steps", f"{STEPS}", "--batch", "16", "--evaluations", "3", "--log-every", "1", "--save-every", "1",
         "--patch-size", "8", "--n-local", "2", "--drop-path", ".2", "--out-dim", "64", "--hidden", "64", "--bottleneck", "32", "--device", "cpu"]


def command(out, talk, words, limit):
    "`dino-edu` in a process of its own, what it says in two files of a folder that is never full."
    if limit:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.stdout, sys.stderr = (open(talk / name, "w") for name in ("said", "complained"))
    main([*WORDS, "--out", str(out), *words])


class Command:
    "A process that runs the command; forked from one that has imported everything, so that it starts at once."

    def __init__(self, server, out, *words, limit=None):
        self.out, self.talk = Path(out), Path(tempfile.mkdtemp())
        self.process = server.Process(target=command, args=(out, self.talk, words, limit))
        self.began = self.progress()
        self.process.start()

    def progress(self):
        "Changes when the run logs a line."
        log = self.out / "log.jsonl"
        return log.stat().st_size if log.exists() else 0

    def wait_for(self, condition):
        "Until it holds, or the process has ended."
        deadline = time.monotonic() + 120
        while not condition() and self.process.is_alive():
            assert time.monotonic() < deadline

    def wait_for_steps(self, n):
        "Until so many new lines are logged."
        self.wait_for(lambda: self.progress() > self.began + 300 * n)

    def kill(self, signum=signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signum)
        return self.end()

    def end(self):
        "The exit status."
        self.process.join(120)
        return self.process.exitcode

    def complaint(self):
        return (self.talk / "complained").read_text()


@pytest.fixture(scope="module")
def server():
    "Where commands are forked from."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dino_edu.cli", "dino_edu.fit", "dino_edu.estimate", "dino_edu.launch", "matplotlib.figure"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        yield context


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    "The folder of a run that nothing happens to."
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run = Command(server, folder)
    assert run.end() == 0, run.complaint()
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def held(folder):
    "The step that the last checkpoint holds, and the log up to there."
    step = load_checkpoint(folder / "last.pt")["step"] if (folder / "last.pt").exists() else -1
    return step, [line for line in Run(folder).lines() if line["i"] <= step]


def test_killed_at_random_moments(server, undisturbed, tmp_path):
    "kill -9 again and again, also while a checkpoint is written: no step that a checkpoint holds is taken twice, and the end is the same."
    chance, out, torn, before = random.Random(0), tmp_path / "run", 0, (-1, [])
    for attempt in range(7):
        run = Command(server, out)
        if attempt:   # the first is killed before it has done anything
            run.wait_for_steps(1)
        if attempt % 2:
            run.wait_for(lambda: any(out.glob(".*.partial")))
        else:
            time.sleep(chance.uniform(0, 0.3))
        assert run.kill() == -signal.SIGKILL, run.complaint()
        torn += any(out.glob(".last.pt.*.partial"))
        now = held(out)
        assert now[0] >= before[0] and now[1][: len(before[1])] == before[1]   # the seconds in the lines would tell
        before = now
    assert torn and 4 < before[0] < STEPS, (torn, before[0])
    run = Command(server, out)
    assert run.end() == 0, run.complaint()
    assert held(out)[1][: len(before[1])] == before[1]
    assert [line["i"] for line in Run(out).lines() if "loss" in line] == list(range(1, STEPS + 1))
    assert_same_end(undisturbed, out)


def ends_soon(group):
    "Is nobody left of a process group, within seconds?"
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_asked_to_stop_in_a_shell(server, undisturbed, tmp_path):
    """`python -m dino_edu.cli` and a signal to it and to its workers, as a terminal and a scheduler send them:
    the exit status that shells expect, one line that says how to go on, and it does go on."""
    started = {}
    for signum in (signal.SIGINT, signal.SIGTERM):
        words = [sys.executable, "-m", "dino_edu.cli", *WORDS, "--workers", "1", "--out", str(tmp_path / signum.name)]
        started[signum] = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    waiting = dict(started)
    while waiting:   # neither may come to its end while the other is waited for
        time.sleep(0.02)
        for signum, process in list(waiting.items()):
            if (tmp_path / signum.name / "last.pt").exists() or process.poll() is not None:
                os.killpg(waiting.pop(signum).pid, signum)
    for signum, process in started.items():
        out, complaint = tmp_path / signum.name, process.communicate(timeout=120)[1]
        step = load_checkpoint(out / "last.pt")["step"]
        assert process.returncode == 128 + signum, complaint
        assert complaint == f"dino-edu: stopped after step {step} of {STEPS}; {out / 'last.pt'} holds it: the same command goes on from there\n"
        assert [line["i"] for line in Run(out).lines() if "loss" in line] == list(range(1, step + 1)) and step < STEPS
        assert ends_soon(process.pid), "processes were left behind"
    runs = [Command(server, tmp_path / signum.name) for signum in started]
    assert [run.end() for run in runs] == [0, 0]
    for run in runs:
        assert_same_end(undisturbed, run.out)


# Disks

@pytest.fixture
def disk(tmp_path):
    "A function that mounts a small file system, where the test may; `remount` changes it."
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode:
            pytest.skip("no right to mount a small file system")
        return place
    yield mount
    while os.path.ismount(place):
        subprocess.run(["umount", place], check=True)


def assert_one_line(run, *words):
    "The command ended with status 1 and one line that holds these words."
    line = run.complaint()
    assert run.process.exitcode == 1 and line.startswith("dino-edu: ") and line.count("\n") == 1, line
    assert all(word in line for word in words), line


def test_full_disk(server, undisturbed, disk):
    "Space for a little more than two checkpoints; a third is needed as soon as the best is not the last. Then space is made."
    size = (undisturbed / "last.pt").stat().st_size
    place = disk(f"size={16 * size}")
    (place / "filler").write_bytes(bytes(int(13.4 * size)))
    run = Command(server, place / "run")
    run.end()
    assert_one_line(run, f"could not write {run.out / 'last.pt'}", "Is the disk full?", f"the last good checkpoint is {run.out / 'last.pt'}")
    step, log = held(run.out)
    assert 0 < step < STEPS and not list(run.out.glob(".*.partial"))
    run = Command(server, run.out)   # nothing has changed: the same error, and nothing is lost
    run.end()
    assert_one_line(run, "could not write")
    assert held(run.out) == (step, log)
    (place / "filler").unlink()
    run = Command(server, run.out)
    assert run.end() == 0, run.complaint()
    assert held(run.out)[1][: len(log)] == log
    assert_same_end(undisturbed, run.out)


def test_files_that_must_not_grow(server, undisturbed, tmp_path):
    "Where nothing can be mounted: the system refuses to write more than half a checkpoint."
    run = Command(server, tmp_path / "run")
    run.wait_for_steps(4)
    run.kill()
    before = held(run.out)
    assert before[0] > 1
    run = Command(server, run.out, limit=(undisturbed / "last.pt").stat().st_size // 2)
    run.end()
    assert_one_line(run, f"could not write {run.out / 'last.pt'}")
    assert held(run.out) == before and not list(run.out.glob(".*.partial"))
    run = Command(server, run.out)
    assert run.end() == 0, run.complaint()
    assert_same_end(undisturbed, run.out)


def test_folder_that_may_not_be_written(server, disk):
    place = disk("size=1m")
    (place / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    for out in (place / "run", place / "new"):   # words go beside the folder, which is read-only
        with pytest.raises(SystemExit, match=f"dino-edu: .*{out}.*Read-only file system"):
            main([*WORDS, "--out", str(out)])


def test_a_folder_that_is_a_file(pictures, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write to the output folder .*file"):
        quietly(SHORT, pictures, tmp_path / "file" / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_log_that_cannot_be_written(pictures, tmp_path):
    def fill(line):
        (tmp_path / "log.jsonl").unlink()
        (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device; there is no checkpoint yet"):
        quietly(SHORT, pictures, tmp_path, fill)


@pytest.mark.parametrize("damage", [
    lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"once upon a time",
    lambda whole: whole[:9000] + bytes([whole[9000] ^ 255]) + whole[9001:],
], ids=["cut", "empty", "foreign", "rotten"])
def test_broken_checkpoint_is_refused_and_nothing_overwritten(pictures, tmp_path, damage):
    with pytest.raises(PlugPulled):
        quietly(SHORT, pictures, tmp_path, at(4, pull_the_plug))
    (tmp_path / "last.pt").write_bytes(damage((tmp_path / "last.pt").read_bytes()))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'last.pt'} is broken, or no checkpoint.*move it away"):
        quietly(SHORT, pictures, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change, message", [(dict(format=1), "has format 1"), (dict(recipe=None), "is not a checkpoint of dino_edu")])
def test_foreign_checkpoint_is_refused_and_nothing_overwritten(pictures, tmp_path, change, message):
    with pytest.raises(PlugPulled):
        quietly(SHORT, pictures, tmp_path, at(4, pull_the_plug))
    state = load_checkpoint(tmp_path / "last.pt") | change
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "last.pt")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'last.pt'} {message}"):
        quietly(SHORT, pictures, tmp_path)
    assert contents(tmp_path) == before


# A loss that is lost

def test_a_lost_loss_keeps_the_last_checkpoint(pictures, tmp_path, monkeypatch):
    "The loss turns into nan at step 3; the checkpoint of step 2 stays usable."
    steps = iter(range(1, 100))

    def poisoned(recipe, *more):
        model = method(recipe, *more)
        forward = model.forward
        model.forward = lambda views, t: forward(views, t) * (float("nan") if next(steps) == 3 else 1.0)
        return model
    monkeypatch.setattr(dino_edu.fit, "method", poisoned)
    with pytest.raises(FloatingPointError, match=f"step 3 is nan.*lower lr.*; the last good checkpoint is {tmp_path / 'last.pt'}"):
        quietly(SHORT, pictures, tmp_path)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2
    assert quietly(SHORT, pictures, tmp_path)["steps"] == 4


def test_a_loss_that_is_really_lost(tmp_path, monkeypatch):
    "A learning rate beyond all reason. The command ends with one line; the checkpoint is that of the step before."
    monkeypatch.setattr("dino_edu.estimate.estimate", lambda *_: "")   # which would lose it first
    with pytest.raises(SystemExit) as end:
        main([*WORDS, "--out", str(tmp_path), "--lr", "1e30", "--clip", "None"])
    step = load_checkpoint(tmp_path / "last.pt")["step"]
    assert re.fullmatch(rf"dino-edu: the loss of step {step + 1} is .*lower lr.*; the last good checkpoint is {tmp_path / 'last.pt'}", end.value.code)


# Compiling, and a batch in parts

def test_a_compiler_that_fails(tmp_path):
    "One warning, and the run goes on. (What PyTorch itself offers, `suppress_errors`, does not help when the backward pass is compiled.)"
    program = (f"from dino_edu.data import load; from dino_edu.fit import fit; from dino_edu.recipe import Recipe\n"
               f"fit({override(SHORT, compile=True, steps=1, evaluations=1)}, load('shapes', n=60)[0], None, {str(tmp_path / 'run')!r})")
    environment = os.environ | dict(CXX=str(tmp_path / "no-compiler"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1, done.stderr
    assert "nothing can be compiled here, so the run goes on without" in done.stderr and done.stderr.count("\n") < 5


def test_compiling_changes_no_names():
    model, plain = method(SHORT), method(SHORT)
    for encoder in model.encoders().values():
        encoder.compile(dynamic=False)   # nothing happens before the first call
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("changes, times", [(METHODS["byol"], 1), (dict(encoder="resnet10t", head_bn=False), 1), (dict(head_bn=False), 0)],
                         ids=["in the head", "in the encoder", "nowhere"])
def test_parts_of_a_batch_and_batchnorm(pictures, tmp_path, changes, times):
    recipe = override(SHORT, steps=1, evaluations=1, accumulate=2, **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quietly(recipe, pictures, tmp_path)
    found = [warning for warning in caught if "BatchNorm sees one part of the batch" in str(warning.message)]
    assert len(found) == times and all(warning.filename == __file__ for warning in found)


# The folder, and odd pictures

def test_run_folder(pictures, tmp_path):
    summary = fit(SHORT, *pictures, tmp_path, seed=3, say=str)
    assert {"log.jsonl", "last.pt", "best.pt", "encoder.safetensors", "summary.json", "curves.png"} == {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"] == summary["metrics"]
    assert set(summary) == {"recipe", "data", "device", "world", "seed", "steps", "seconds", "images_per_second", "metrics"}
    assert {"knn_teacher", "knn_student", "knn_best", "knn_untrained", "knn_pixels", "linear_teacher",
            "attention_untrained", "attention_teacher"} <= set(summary["metrics"])
    net, recipe = load_encoder(tmp_path / "encoder.safetensors")
    teacher = {name.removeprefix("teacher.network.encoder."): value for name, value in load_checkpoint(tmp_path / "last.pt")["method"].items()}
    assert recipe == SHORT and all(torch.equal(value, teacher[name]) for name, value in net.state_dict().items())


def test_log_holds_what_the_schedules_say(pictures, tmp_path):
    recipe = SHORT
    quietly(recipe, pictures, tmp_path)
    lines = [line for line in Run(tmp_path).lines() if "loss" in line]
    assert [line["i"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        t = line["i"] / 4
        assert math.isclose(line["lr"], warmup_cosine(t, recipe.lr * 16 / 256, recipe.lr_end, recipe.warmup))
        assert math.isclose(line["weight_decay"], cosine(t, 0.04, 0.4)) and math.isclose(line["momentum"], cosine(t, 0.98, recipe.momentum_end))
        assert math.isclose(line["loss"], line["target_entropy"] + line["kl"], rel_tol=1e-4)


def accuracies(summary):
    assert "rank_teacher" in summary["metrics"], "the signs of a collapse need no labels"
    return [name for name in summary["metrics"] if name.startswith(("knn", "linear", "attention"))]


def test_pictures_without_labels(tmp_path):
    paint(tmp_path, "holiday", 40)
    train_set, val_set = load(tmp_path / "holiday", 48)
    said = []
    summary = fit(SHORT, train_set, val_set, tmp_path / "run", say=said.append)
    assert val_set is None and "needs labels" in said[0] and not accuracies(summary)
    assert (tmp_path / "run" / "encoder.safetensors").exists()


def test_one_class_trains_and_is_not_scored(tmp_path):
    paint(tmp_path, "pictures/cats", 40)
    summary = fit(SHORT, *load(tmp_path / "pictures", 48), tmp_path / "run", say=str)
    assert not accuracies(summary)


def test_sizes_may_differ(tmp_path):
    paint(tmp_path, "pictures/wide", 20, (40, 90))
    paint(tmp_path, "pictures/tall", 20, (90, 40))
    train_set, val_set = load(tmp_path / "pictures", 48)
    assert not train_set.uniform
    assert "knn_teacher" in quietly(SHORT, (train_set, val_set), tmp_path / "run")["metrics"]


def test_grey_pictures(tmp_path):
    recipe = override(SHORT, in_chans=1)
    assert "knn_teacher" in quietly(recipe, load("shapes", channels=1, n=60), tmp_path)["metrics"]


def test_a_backbone_of_timm(pictures, tmp_path):
    recipe = override(SHORT, encoder="resnet10t", steps=2, evaluations=1, optimizer="lars")
    summary = quietly(recipe, pictures, tmp_path)
    assert "knn_teacher" in summary["metrics"] and "attention_teacher" not in summary["metrics"]
    assert load_encoder(tmp_path / "encoder.safetensors")[1].encoder == "resnet10t"


def test_real_pictures(shared_data, tmp_path):
    "The main job for a few steps: Imagenette from a tar, scored on its own val split."
    train_set, val_set = load(shared_data / "imagenette128-balanced.tar", 48)
    index = torch.arange(0, len(train_set), 20)
    recipe = override(PRESETS["imagenette_cpu"](), steps=3, evaluations=1, batch=32)
    summary = quietly(recipe, (train_set.subset(index), val_set.subset(torch.arange(0, 2400, 40))), tmp_path)
    assert 0 < summary["metrics"]["knn_teacher"] < 100 and summary["recipe"]["encoder"] == "vit_micro"
