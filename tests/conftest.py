"""What every test has: no network, one thread for each worker, a kernel of this interpreter, a copy of the project to work on."""
import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers, and the kernels that they start, share the cores
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def no_network():
    "Connections to other machines fail: at the socket in this process, at a proxy that is not there in its children."
    connect = socket.socket.connect

    def local_connect(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests use no network, but something asked for {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_connect)
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        patch.setenv("https_proxy", "http://127.0.0.1:9")
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    "Name of a Jupyter kernel that is this interpreter with this checkout, whatever else is installed."
    folder = tmp_path_factory.mktemp("jupyter")
    spec = dict(
        display_name="dino_edu",
        language="python",
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=40"],
        env=dict(PYTHONPATH=str(ROOT), IPYTHONDIR=str(folder / "ipython")),
    )
    path = folder / "kernels" / "dino_edu" / "kernel.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        yield "dino_edu"


@pytest.fixture
def checkout(tmp_path):
    "A copy of the project without git, for commands that write into it."
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "downloads")
    for name in ("nbs", "dino_edu", "data"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("settings.ini", "pyproject.toml", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, copy)
    return copy


def _one_of_two(work, me, folder):
    "Join the other process, work, write what came out."
    import torch
    import torch.distributed as dist
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=me, world_size=2)
    torch.save(work(me), folder / f"rank{me}.writing")
    os.rename(folder / f"rank{me}.writing", folder / f"rank{me}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory):
    "Call a test module's `work(rank)` in two gloo processes. Their exit status says nothing: gloo may abort while the interpreter ends."
    def run(work, seconds=120):
        import torch
        folder, spawn = tmp_path_factory.mktemp("ranks"), multiprocessing.get_context("spawn")
        processes = [spawn.Process(target=_one_of_two, args=(work, me, folder), daemon=True) for me in range(2)]
        for process in processes:
            process.start()
        files, deadline = [folder / f"rank{me}.pt" for me in range(2)], time.monotonic() + seconds
        while not all(file.exists() for file in files) and time.monotonic() < deadline and any(p.is_alive() for p in processes):
            time.sleep(0.1)
        for process in processes:
            process.join(10)
            process.kill()
        assert all(file.exists() for file in files), "the two processes did not finish"
        return [torch.load(file, weights_only=False) for file in files]
    return run


@pytest.fixture(scope="session")
def shared_data():
    "Folder of real data sets, too large for the repository."
    folder = Path(os.environ.get("DINO_EDU_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}: name their folder in DINO_EDU_TEST_DATA")
    return folder
