"""Two machines are one machine: the same weights, the same data, the same run, whatever starts, stops or kills its processes.

A process counts as done when it has written its result. Exit statuses are not asked where gloo takes part: it may abort while the interpreter ends.
"""
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dino_edu.augment import Views
from dino_edu.checkpoint import load_checkpoint
from dino_edu.core import across_ranks, asset, keys, rank, world_size
from dino_edu.data import Pictures, load
from dino_edu.fit import fit
from dino_edu.launch import together, torchrun
from dino_edu.loss import Centering, Cosine, CrossEntropy, InfoNCE, Sinkhorn
from dino_edu.methods import METHODS, Siamese, mlp
from dino_edu.recipe import augmentation, encoder, method, override, shapes
from dino_edu.rows import unigrad
from dino_edu.score import features
from dino_edu.train import batches, optimizer, train

ROOT = Path(__file__).parents[1]

# A few steps, the same views for everybody

STEPS = 6
TINY = override(
    shapes(), global_size=16, local_size=8, n_local=2, patch_size=4, stem="patch", precision="fp32", batch=8, steps=STEPS, lr=0.006,
    out_dim=32, hidden=32, bottleneck=16, head_bn=False, momentum=0.9, freeze_last_layer=0.2,
    queue=40,   # neither a multiple of a step's 16 keys nor a divisor
)
RUNS = METHODS | dict(
    head_bn=dict(head_bn=True),
    previous_iteration=dict(teacher="previous_iteration"),
    previous_epoch=dict(teacher="previous_epoch", teacher_every=2),
    softmax_batch=dict(targets="softmax_batch"),
    resnet=dict(encoder="resnet10t", optimizer="sgd", lr=1.0, n_local=0),
    siamese_im=dict(loss="features", n_local=0, mask=0.0, decoder_width=32, decoder_heads=2, decoder_depth=1, projector_depth=1, penalty=0.5),
    **{name: unigrad()[name].changes for name in ("simclr", "barlow_twins")},
)   # nothing is masked: each rank would draw masks of its own
BATCHNORM = ("byol", "mocov2", "head_bn", "siamese_im", "simclr", "barlow_twins")
NO_BATCHNORM = dict(   # what is learnt from, and whether by DINO's head or by an MLP
    centering=lambda: CrossEntropy(Centering(16)),
    sinkhorn=lambda: CrossEntropy(Sinkhorn()),
    cosine=lambda: Cosine(),
    cosine_centered=lambda: Cosine(Centering(16)),
    infonce=lambda: InfoNCE(16, 40),
    dino=None,
    swav=None,
)


def whole_batches(recipe, dtype):
    "Views of whole batches of noise, in float32 as they always are, then in the precision of the run."
    augment, chance = augmentation(recipe), torch.Generator().manual_seed(1)
    for step in range(STEPS):
        images = torch.randint(0, 256, (recipe.batch, 3, 24, 24), generator=chance, dtype=torch.uint8)
        views = augment(images, torch.full((recipe.batch, 2), 24), keys(0, step, torch.arange(recipe.batch)))
        yield Views([image.to(dtype) for image in views.images], views.boxes, views.flips)


def share(views):
    "This rank's pictures of a whole batch, as `batches` deals them."
    mine = slice(rank(), None, world_size())
    return Views([image[mine] for image in views.images], views.boxes[:, mine], views.flips[:, mine])


def build(name, recipe):
    "A method of the recipe, or one with an MLP without BatchNorm."
    if NO_BATCHNORM.get(name) is None:
        return method(recipe)
    net = encoder(recipe)
    return Siamese(net, mlp([net.embed_dim, 32, 16], std=None), NO_BATCHNORM[name](), mlp([16, 32, 16], std=None), momentum=0.9)


@cache
def run(name, dtype=torch.float64, accumulate=1):
    "Everything that a method holds after a few steps of the real loop."
    recipe = override(TINY, accumulate=accumulate, **RUNS.get(name, {}))
    torch.manual_seed(0)
    model = build(name, recipe).to(dtype)
    shares = (share(views) for views in whole_batches(recipe, dtype))
    steps = list(train(model, shares, recipe, STEPS, optimizer(model, recipe)))
    assert len(steps) == STEPS
    return model.state_dict()


def difference(a, b):
    "The largest difference of two states; names and shapes must be the same."
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def distance(a, b):
    "The length of the difference of two students' weights (not BatchNorm's statistics), as a share of the weights'."
    names = [name for name in a if name.startswith("student") and "running" not in name and "tracked" not in name]
    vectors = [torch.cat([state[name].double().flatten() for name in names]) for state in (a, b)]
    return ((vectors[0] - vectors[1]).norm() / vectors[1].norm()).item()


# What two ranks do


def normalised(net, rows, dtype=torch.float64):
    "Output, gradients and running statistics of a network in training, for its rows of a batch."
    torch.manual_seed(0)
    net = net().to(dtype if dtype == torch.float64 else torch.float32).train()
    x = rows.to(dtype).requires_grad_()
    out = net(x)
    weight = torch.linspace(-1, 1, out[0].numel(), dtype=torch.float64).view(out[0].shape)
    (out.double() * weight).square().sum().backward()
    return dict(out=out.detach(), input=x.grad, buffers={name: b.clone() for name, b in net.named_buffers()},
                parameters={name: p.grad for name, p in net.named_parameters()})


def across_norm(kind):
    "A plain BatchNorm with values of its own, exchanged for one across ranks."
    plain = kind(5)
    nn.init.uniform_(plain.weight)
    nn.init.uniform_(plain.bias)
    return across_ranks(nn.Sequential(plain))


def resnet():
    import timm
    return across_ranks(timm.create_model("resnet10t", num_classes=0).double())


LAYERS = {
    "rows": (lambda: across_norm(nn.BatchNorm1d), (7, 5)),
    "sequences": (lambda: across_norm(nn.BatchNorm1d), (7, 5, 3)),
    "pictures": (lambda: across_norm(nn.BatchNorm2d), (7, 5, 3, 4)),
    "resnet10t": (resnet, (5, 3, 32, 32)),
}


def rows_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3 + 1


def mine_of(rows):
    "Of two ranks the first has two rows only, the second the rest."
    return rows if world_size() == 1 else (rows[:2], rows[2:])[rank()]


def epoch_and_a_bit():
    "Pictures and views of this rank over two epochs; 52 pictures make 6 batches of 8, and 4 are left out."
    seen = []

    class Watched(Pictures):
        def batch(self, index):
            seen.append(index)
            return super().batch(index)
    pictures = Watched(**vars(load("shapes", n=52)[0]))
    views = list(islice(batches(pictures, TINY, seed=3), 12))
    return dict(index=torch.stack(seen[:12]), first=views[0].images[0], last=views[-1].images[-1])


def refusal():
    "What is said about a batch that cannot be shared out."
    try:
        next(batches(load("shapes", n=52)[0], override(TINY, batch=7)))
    except ValueError as error:
        return str(error)


def embedded(n):
    torch.manual_seed(0)
    return features(encoder(TINY).double().float(), load("shapes", n=n)[0], 16, batch=7)


def everything():
    "All that is compared, on one process or on each of two."
    return dict(
        runs={name: run(name) for name in RUNS},
        float32={name: run(name, torch.float32) for name in RUNS},
        accumulated={name: run(name, accumulate=2) for name in NO_BATCHNORM},
        layers={name: normalised(net, mine_of(rows_of(shape))) for name, (net, shape) in LAYERS.items()},
        half=normalised(LAYERS["rows"][0], mine_of(rows_of((64, 5))), torch.bfloat16),
        data=epoch_and_a_bit(),
        features={n: embedded(n) for n in (1, 2, 21)},
        refusal=refusal(),
    )


def work(me, folder):
    "One of two processes: do everything, write what came out."
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=me, world_size=2)
    torch.save(everything(), f"{folder}/rank{me}.writing")
    os.rename(f"{folder}/rank{me}.writing", f"{folder}/rank{me}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    "What two gloo processes wrote."
    folder = tmp_path_factory.mktemp("ranks")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=work, args=(me, str(folder)), daemon=True) for me in range(2)]
    for process in processes:
        process.start()
    files, deadline = [folder / f"rank{me}.pt" for me in range(2)], time.monotonic() + 240
    while not all(file.exists() for file in files) and time.monotonic() < deadline and any(p.is_alive() for p in processes):
        time.sleep(0.1)
    for process in processes:
        process.join(10)
        process.kill()
    assert all(file.exists() for file in files), "the two processes did not finish"
    return [torch.load(file) for file in files]


@pytest.fixture(scope="module")
def one_process():
    return everything()


# Equal weights


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one_process(name, two_ranks, one_process):
    "float64: student, teacher, centre, queue and BatchNorm's statistics after six steps."
    a, b = (result["runs"][name] for result in two_ranks)
    assert difference(a, b) == 0
    assert difference(a, one_process["runs"][name]) < 1e-10


def test_the_runs_have_moved(one_process):
    "Nothing would be proved by weights that stand still."
    for name in RUNS:
        torch.manual_seed(0)
        assert distance(one_process["runs"][name], build(name, override(TINY, **RUNS[name])).state_dict()) > 1e-3, name


@pytest.mark.parametrize("name", NO_BATCHNORM)
def test_accumulation_is_the_whole_batch(name, one_process):
    expected = run(name)
    assert difference(one_process["accumulated"][name], expected) < 1e-10
    assert difference(run(name, accumulate=4), expected) < 1e-10


@pytest.mark.parametrize("name", NO_BATCHNORM)
def test_accumulation_on_two_ranks_is_the_whole_batch(name, two_ranks):
    "The gradients of the first part wait (DDP's no_sync); those of both are exchanged once."
    a, b = (result["accumulated"][name] for result in two_ranks)
    assert difference(a, b) == 0 and difference(a, run(name)) < 1e-10


def test_accumulation_with_batchnorm_is_another_thing(one_process):
    assert distance(run("head_bn", accumulate=2), one_process["runs"]["head_bn"]) > 1e-4


def test_accumulation_with_batchnorm_warns(tmp_path):
    pictures = load("shapes", n=32)
    recipe = override(TINY, steps=1, evaluations=1, accumulate=2)
    with pytest.warns(UserWarning, match="BatchNorm sees one part"):
        fit(override(recipe, head_bn=True), *pictures, tmp_path / "bn", linear=False, say=str)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(recipe, *pictures, tmp_path / "none", linear=False, say=str)


@pytest.mark.parametrize("name", RUNS)
def test_drift_in_float32(name, two_ranks, one_process):
    """float32 adds in another order, and weights drift apart. Most of all where something is decided by rounding errors alone: a bias before BatchNorm,
    whose gradient they are; one ReLU of the ResNet in the first step, whose argument is -5e-7 in float64, and its gradient there or gone."""
    a, b = (result["float32"][name] for result in two_ranks)
    assert difference(a, b) == 0
    assert 0 < distance(a, one_process["float32"][name]) < (1e-3 if name in (*BATCHNORM, "resnet") else 1e-4)


# BatchNorm across ranks


@pytest.mark.parametrize("name", LAYERS)
def test_batchnorm_on_two_ranks(name, two_ranks, one_process):
    "Two rows on one rank, five on the other: outputs, gradients and statistics are those of a plain BatchNorm in one process."
    one, parts = one_process["layers"][name], [result["layers"][name] for result in two_ranks]
    for key in ("out", "input"):
        assert torch.allclose(torch.cat([part[key] for part in parts]), one[key], rtol=0, atol=1e-9)
    for key in one["parameters"]:
        assert torch.allclose(sum(part["parameters"][key] for part in parts), one["parameters"][key], rtol=1e-9, atol=1e-9)
    for part in parts:
        assert all(torch.allclose(part["buffers"][key], one["buffers"][key], rtol=0, atol=1e-10) for key in one["buffers"])


@pytest.mark.parametrize("name, plain", [("rows", nn.BatchNorm1d), ("sequences", nn.BatchNorm1d), ("pictures", nn.BatchNorm2d)])
def test_one_process_has_a_plain_batchnorm(name, plain, one_process):
    "So that the test above compares with PyTorch's own."
    def net():
        layer = plain(5)
        nn.init.uniform_(layer.weight)
        nn.init.uniform_(layer.bias)
        return nn.Sequential(layer)
    ours, theirs = one_process["layers"][name], normalised(net, rows_of(LAYERS[name][1]))
    assert torch.equal(ours["out"], theirs["out"]) and torch.equal(ours["input"], theirs["input"])


def test_batchnorm_of_half_precision(two_ranks, one_process):
    "bf16 in, bf16 out; statistics and products in float32."
    one, parts = one_process["half"], [result["half"] for result in two_ranks]
    out = torch.cat([part["out"] for part in parts])
    assert out.dtype == one["out"].dtype == torch.bfloat16
    assert torch.allclose(out, one["out"], rtol=2**-7, atol=2**-7)
    assert torch.allclose(parts[0]["buffers"]["0.running_var"], one["buffers"]["0.running_var"], rtol=1e-4)


# The data


def test_every_batch_is_shared_out(two_ranks, one_process):
    "Over two epochs: the two ranks' pictures of a step are those of one process, in turns, and none is seen twice in an epoch."
    whole, parts = one_process["data"]["index"], [result["data"]["index"] for result in two_ranks]
    assert torch.equal(torch.stack(parts, 2).flatten(1), whole)
    for epoch in whole.split(6):
        assert len(epoch.unique()) == epoch.numel() == 48


@pytest.mark.parametrize("which", ["first", "last"])
def test_views_do_not_depend_on_the_rank(which, two_ranks, one_process):
    both = torch.stack([result["data"][which] for result in two_ranks], 1).flatten(0, 1)
    assert torch.allclose(both, one_process["data"][which], rtol=0, atol=1e-5)


def test_a_batch_that_cannot_be_shared_out(two_ranks):
    assert all("a batch of 7 cannot be shared out evenly over 2 processes" in result["refusal"] for result in two_ranks)
    with pytest.raises(ValueError, match="over 1 processes and 3 parts: choose a multiple of 3"):
        next(batches(load("shapes", n=52)[0], override(TINY, accumulate=3)))


@pytest.mark.parametrize("n", [1, 2, 21])
def test_features_of_two_ranks(n, two_ranks, one_process):
    "In order, none twice, also for a number that two does not divide."
    for result in two_ranks:
        assert result["features"][n].shape == one_process["features"][n].shape
        assert torch.allclose(result["features"][n], one_process["features"][n], rtol=0, atol=1e-5)


# The command

WORDS = ["train", "shapes", "--data", "shapes:64", "--steps", "40", "--batch", "8", "--n-local", "0", "--patch-size", "8", "--hidden", "64",
         "--evaluations", "1", "--log-every", "1", "--save-every", "5", "--precision", "fp32", "--device", "cpu"]
ENVIRONMENT = os.environ | dict(
    PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1",
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",   # else a restart may meet addresses of the processes that died (pytorch issue 135712)
)
ALONE = ["--standalone", "--nproc-per-node", 2]


def agent(folder, *options, words=WORDS, environment=ENVIRONMENT):
    "Start torchrun; what it and its processes say goes to files beside the run's folder."
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--redirects", 3, "--log-dir", folder.parent / "logs",
               "-m", "dino_edu.cli", *words, "--out", folder]
    with open(folder.parent / "torchrun.log", "a") as log:
        return subprocess.Popen([str(word) for word in command], env=environment, stdout=log, stderr=log)


def until(condition, seconds=240):
    "Wait for something."
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def finish(*agents, seconds=240):
    "Wait for agents; what is left is asked to stop (torchrun passes that on), then killed."
    try:
        for process in agents:
            process.wait(seconds)
    finally:
        for process in agents:
            process.terminate()
        for process in agents:
            process.wait(60)


def lines(folder):
    "What the log holds so far."
    file = folder / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def step_of(folder):
    return lines(folder)[-1]["i"] if lines(folder) else 0


def weights(folder):
    state = load_checkpoint(folder / "last.pt")
    assert state["step"] == 40
    return state["method"]


def said(folder, attempt):
    "What the processes of one attempt have printed, all ranks together."
    return "".join(path.read_text() for path in (folder.parent / "logs").glob(f"*/attempt_{attempt}/*/stdout.log"))


def worker(process, number):
    "The process of a rank, among the children of torchrun."
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and f"RANK={number}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
        except OSError:   # gone meanwhile
            pass


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in Linux's /proc")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "A run on two processes that nothing disturbs."
    folder = tmp_path_factory.mktemp("straight") / "run"
    text = torchrun(*WORDS, "--out", folder, timeout=240)
    return folder, text


def test_one_run_of_two_processes(straight):
    folder, text = straight
    assert {"log.jsonl", "last.pt", "best.pt", "encoder.safetensors", "summary.json", "curves.png"} == {path.name for path in folder.iterdir()}
    assert [line["i"] for line in lines(folder)] == [0, *range(1, 41), 40]
    assert json.loads((folder / "summary.json").read_text())["world"] == 2
    assert text.count("before training") == text.count("step 40 of 40") == 1


def test_two_processes_learn_what_one_does(straight, tmp_path):
    "The same command without torchrun, in float32: close, and not equal."
    recipe = override(shapes(), **load_checkpoint(straight[0] / "last.pt")["recipe"])
    fit(recipe, *load("shapes:64", 48, 3), tmp_path, device="cpu", linear=False, say=str)
    assert 0 < distance(weights(straight[0]), weights(tmp_path)) < 0.05


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_run_of_two_gpus(tmp_path):
    torchrun(*WORDS[:-1], "cuda", "--out", tmp_path, timeout=300)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["world"] == 2 and summary["device"] != "cpu"


def test_two_agents_are_one(straight, tmp_path):
    "Two machines, played by two agents on this one, meet at an address (c10d)."
    folder, meeting = tmp_path / "run", f"127.0.0.1:{free_port()}"
    options = ["--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint", meeting, "--rdzv-id", "pair",
               "--local-addr", "127.0.0.1"]
    finish(agent(folder, *options), agent(folder, *options))
    assert difference(weights(folder), weights(straight[0])) == 0


def free_port(first=29000):
    "A port between 20000 and 29999 that nobody listens on."
    for port in range(first, 20000, -1):
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)):
                return port


@needs_proc
def test_a_killed_rank_starts_again(straight, tmp_path):
    "kill -9 for rank 1 in mid-run: torchrun starts both again, from the last checkpoint, and the end is the same to the bit."
    folder = tmp_path / "run"
    process = agent(folder, *ALONE, "--max-restarts", 1)
    try:
        until(lambda: step_of(folder) >= 12)
        os.kill(worker(process, 1), signal.SIGKILL)
        assert 10 <= load_checkpoint(folder / "last.pt")["step"] < 40
    finally:
        finish(process)
    assert "before training" in said(folder, 0) and "before training" not in said(folder, 1) and "step 40" in said(folder, 1)
    assert difference(weights(folder), weights(straight[0])) == 0
    assert [line["i"] for line in lines(folder)] == [0, *range(1, 41), 40]


def test_asked_to_stop(straight, tmp_path):
    "SIGTERM for torchrun: the step ends, a checkpoint is written, and the same command goes on. Those who fetch pictures keep fetching."
    folder, words = tmp_path / "run", [*WORDS, "--workers", "1"]
    process = agent(folder, *ALONE, words=words)
    try:
        until(lambda: step_of(folder) >= 12)
        process.terminate()
    finally:
        finish(process)
    step = load_checkpoint(folder / "last.pt")["step"]
    assert 12 <= step < 40 and step == step_of(folder)
    finish(agent(folder, *ALONE, words=words))
    assert difference(weights(folder), weights(straight[0])) == 0


SRUN = """#!/bin/bash
# Two nodes, both this computer.
shift   # an option of srun
"$@" & "$@" & wait
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames nodes[1-2]" ] && printf '127.0.0.1\\nnode2\\n'
"""


def test_slurm_script(straight, tmp_path):
    "The script that ships, with a cluster of two nodes on this computer."
    folder, programs = tmp_path / "run", tmp_path / "programs"
    programs.mkdir()
    for name, text in dict(srun=SRUN, scontrol=SCONTROL).items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    python = str(Path(sys.executable).parent)
    job = dict(SLURM_JOB_NODELIST="nodes[1-2]", SLURM_NNODES="2", SLURM_JOB_ID=str(70000 + free_port(28000) % 10000),
               PROCESSES="1", RESTARTS="0", OPTIONS="--local-addr 127.0.0.1", PATH=os.pathsep.join([str(programs), python, os.environ["PATH"]]))
    environment = {name: value for name, value in (ENVIRONMENT | job).items() if name != "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}
    subprocess.run(["bash", "-n", asset("slurm.sh")], check=True)
    with open(tmp_path / "said", "w") as log:
        finish(subprocess.Popen(["bash", asset("slurm.sh"), *WORDS, "--out", folder], env=environment, stdout=log, stderr=log))
    assert (folder / "last.pt").exists(), (tmp_path / "said").read_text()
    assert difference(weights(folder), weights(straight[0])) == 0


# From a notebook


def three_numbers(start, many):
    import torch
    from dino_edu.core import gather_rows, rank, world_size
    mine = torch.tensor([start + rank()])
    return dict(all=gather_rows(mine), rank=rank(), world=world_size(), many=many)


def goes_wrong():
    from dino_edu.core import rank
    if rank() == 1:
        raise ValueError("the second process does not like this")
    return rank()


def sleeps():
    import time
    time.sleep(100)


def test_together():
    "A function's text is run on both; each returns what it has."
    for number, result in enumerate(together(three_numbers, 5, ["a", 2.5], timeout=120)):
        assert result["all"].tolist() == [5, 6] and (result["rank"], result["world"]) == (number, 2) and result["many"] == ["a", 2.5]


def test_together_says_what_went_wrong():
    with pytest.raises(RuntimeError, match="(?s)goes_wrong on 2 processes ended with status 1.*process 1: .*does not like this"):
        together(goes_wrong, timeout=120)


def test_together_ends_in_time():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="sleeps on 1 processes did not end within 8 s"):
        together(sleeps, processes=1, timeout=8)
    assert time.monotonic() - start < 60


def test_torchrun_says_what_went_wrong(tmp_path):
    with pytest.raises(RuntimeError, match="(?s)2 processes of `dino-edu train shapes.*fewer than a batch"):
        torchrun("train", "shapes", "--data", "shapes:4", "--out", tmp_path, timeout=120)
