"""What the notebook of chapter 00 does not show: two real processes, DataLoader workers, devices."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dino_edu.core import (_product_time, cosine, entropy, full_precision, keys, kl, log_softmax, permutation, pick_device, ramp, seed_everything, softmax,
                           uniform, warmup_cosine)

ROOT = Path(__file__).parents[1]

TWO_RANKS = """
import gc, json, sys, time
import torch, torch.distributed as dist
from dino_edu.core import distributed, gather_rows, keys, mean_over_ranks, permutation, rank, sum_over_ranks, uniform, world_size

number, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
x = torch.tensor([[1.0, 2.0], [3.0, 5.0]]) * 10**number
kept, learnt = x.clone(), x.clone().requires_grad_()
index = permutation(8, 3, 1)[rank() :: world_size()]
out = dict(
    rank=rank(), world=world_size(), distributed=distributed(),
    sum=sum_over_ranks(x).tolist(), mean=mean_over_ranks(x).tolist(), rows=gather_rows(x.T).tolist(),
    untouched=torch.equal(x, kept), gradient=torch.autograd.grad((10**number * sum_over_ranks(learnt)).sum(), learnt)[0].tolist(),
    index=index.tolist(), chance=uniform(keys(3, 1, index), 2).tolist(),
)
with open(f"{folder}/{number}.json", "w") as file:
    json.dump(out, file)
gc.collect()
time.sleep(0.5)   # as launch.process_group does
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    "What two gloo processes wrote. Their exit codes are not asked: gloo now and then aborts while the interpreter shuts down."
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-c", TWO_RANKS, str(number), str(folder)], env=environment, stderr=subprocess.PIPE)
               for number in range(2)]
    try:
        errors = [process.communicate(timeout=120)[1].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    written = [folder / f"{number}.json" for number in range(2)]
    assert all(path.exists() for path in written), "\n".join(errors)
    return [json.loads(path.read_text()) for path in written]


def test_sums_over_two_ranks(ranks):
    assert [(out["rank"], out["world"], out["distributed"]) for out in ranks] == [(0, 2, True), (1, 2, True)]
    for out in ranks:
        assert out["sum"] == [[11, 22], [33, 55]] and out["mean"] == [[5.5, 11], [16.5, 27.5]]
        assert out["rows"] == [[1, 3], [2, 5], [10, 30], [20, 50]]   # also from memory that is not contiguous
        assert out["untouched"] and out["gradient"] == [[11, 11], [11, 11]]   # 1 from rank 0's result and 10 from rank 1's


def test_two_ranks_see_what_one_process_sees(ranks):
    order = permutation(8, 3, 1)
    assert [place for pair in zip(*(out["index"] for out in ranks)) for place in pair] == order.tolist()
    chance = dict(zip(order.tolist(), uniform(keys(3, 1, order), 2).tolist()))
    assert all(chance[i] == numbers for out in ranks for i, numbers in zip(out["index"], out["chance"]))


def test_one_thread_measures_products(monkeypatch):
    "With several, a busy machine would choose between float32 and bfloat16, and another time choose otherwise."
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr("dino_edu.core.perf_counter", lambda: seen.append(torch.get_num_threads()) or float(len(seen)))
    try:
        torch.set_num_threads(2)
        assert _product_time("cpu", torch.float32) == 1 and set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Draws(Dataset):
    "What a worker's three generators give."

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])


def test_workers_follow_the_seed():
    def epoch(seed):
        seed_everything(seed)
        return torch.cat(list(DataLoader(Draws(), batch_size=2, num_workers=2)))
    first = epoch(5)
    assert torch.equal(first, epoch(5)) and not torch.equal(first, epoch(6))
    assert (first[:2] != first[2:]).all(), "the two workers draw different numbers"


def test_seeds_beyond_32_bits():
    seed_everything(2**40 + 1)
    assert torch.initial_seed() == 2**40 + 1


def test_keys_of_extreme_numbers():
    index = torch.tensor([0, 1, 2**40, 2**62])
    key = keys(2**31, 10**6, index)
    assert key.dtype == torch.int64 and len(key.unique()) == 4
    numbers = uniform(torch.tensor([-(2**63), -1, 0, 2**63 - 1]), 1000)
    assert numbers.min() >= 0 and numbers.max() < 1 and 0.45 < numbers.mean() < 0.55


def test_chance_of_views_as_rows():
    key = keys(0, 0, torch.arange(5))
    together = uniform(key + torch.arange(3)[:, None], 4)
    assert together.shape == (3, 5, 4) and torch.equal(together[2], uniform(key + 2, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_chance_is_the_same_on_the_gpu():
    index = torch.arange(1000)
    assert torch.equal(uniform(keys(1, 2, index.cuda()), 50).cpu(), uniform(keys(1, 2, index), 50))


def test_pick_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU"):
        pick_device("cuda:1")
    with pytest.raises(ValueError, match="no device 'gpu'"):
        pick_device("gpu")


def test_pick_device_of_a_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device() == torch.device("cuda", 3)


def test_schedules_of_tiny_runs():
    "Twenty steps, no warm-up, all warm-up: nothing divides by zero, ends are met."
    for warmup in (0.0, 0.1, 1.0):
        values = [warmup_cosine(i / 20, 1.0, 0.01, warmup) for i in range(21)]
        assert max(values) == pytest.approx(1) and all(0 <= v <= 1 + 1e-9 for v in values)
    assert warmup_cosine(1.0, 1.0, 0.01, 0.1) == pytest.approx(0.01) and ramp(0.0, 1.0, 2.0, 1.0) == 1
    assert cosine(1.0, 5.0, 5.0) == 5


def test_gradients_at_the_corners():
    "A probability of exactly zero must not give a gradient that is not a number."
    logits = torch.tensor([[0.0, -1e4, 3.0]], requires_grad=True)
    target = torch.tensor([[0.0, 0.0, 1.0]])
    kl(target, log_softmax(full_precision(logits), 0.1)).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert entropy(softmax(logits)).isfinite()
