"""What is installed: the modules, the notebooks and the files that ship, from a wheel and from a checkout."""
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

# A bare interpreter: the dependencies' folder, without the packages that its .pth files add, and one folder with what was just installed.
USE = """
import site, sys
site.addsitedir({installed!r})   # first: an editable install of this checkout in the other folder has the same name
sys.path.append({packages!r})
import dino_edu
from dino_edu.core import asset
print(dino_edu.__file__)
print(asset("README.md"))
from dino_edu.take import shipped_notebooks
print(shipped_notebooks()[0])
"""


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--no-build-isolation"], check=True)


def use(installed, cwd):
    "Where the package, one of its files and a notebook are found, run from another folder."
    code = USE.format(packages=sysconfig.get_path("purelib"), installed=str(installed))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE"))}
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def test_wheel(checkout, tmp_path):
    (checkout / "data" / "picture.png").touch()
    (checkout / "data" / "downloads").mkdir()
    (checkout / "data" / "downloads" / "large.txt").touch()
    pip("wheel", str(checkout), "--wheel-dir", str(tmp_path))
    wheel, = tmp_path.glob("*.whl")

    def ships(folder, name, *suffixes):
        return {f"dino_edu/{name}{p.name}" for p in (checkout / folder).iterdir() if p.suffix in suffixes}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == (ships("dino_edu", "", ".py") | ships("nbs", "notebooks/", ".ipynb")
                     | ships("data", "assets/", ".txt", ".md", ".json", ".jsonl", ".safetensors", ".sh"))

    installed = tmp_path / "installed"
    pip("install", str(wheel), "--target", str(installed))
    package, readme, notebook = use(installed, tmp_path)
    assert package == installed / "dino_edu" / "__init__.py"
    assert readme == installed / "dino_edu" / "assets" / "README.md" and readme.is_file()
    assert notebook == installed / "dino_edu" / "notebooks" / "00_core.ipynb" and notebook.is_file()
    assert wheel.stat().st_size < 25e6
    assert (installed / "bin" / "dino-edu").exists()


def test_editable(checkout, tmp_path):
    installed = tmp_path / "installed"
    pip("install", "--editable", str(checkout), "--target", str(installed))
    package, readme, notebook = use(installed, tmp_path)
    assert package == checkout / "dino_edu" / "__init__.py"
    assert readme == checkout / "data" / "README.md"
    assert notebook == checkout / "nbs" / "00_core.ipynb"


def seconds_of(code):
    "Least processor time of three new interpreters."
    import resource

    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime
    times = []
    for _ in range(3):
        before = spent()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(spent() - before)
    return min(times)


def test_importing_costs_little_beside_torch():
    needed = seconds_of("import torch, torchvision, timm")
    assert seconds_of("import dino_edu, dino_edu.cli") < 0.2 * needed
    core = ", ".join(f"dino_edu.{name}" for name in ("data", "augment", "vit", "loss", "methods", "train", "fit", "score", "weights", "launch", "siamese_im"))
    assert seconds_of(f"import {core}") < 1.2 * needed


def test_unknown_asset():
    from dino_edu.core import asset

    with pytest.raises(FileNotFoundError, match="no_such_file.txt"):
        asset("no_such_file.txt")
