"""What leaves the package: features, weights for timm, the notebooks, and what the doctor says. Chapters 17d and 17e show the usual cases."""
import csv
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dino_edu.carry import as_timm, embed, proved, write_features, write_weights
from dino_edu.checkpoint import save_encoder
from dino_edu.cli import main
from dino_edu.recipe import encoder, override, shapes
from dino_edu.score import features
from dino_edu.take import Doctor, Embed, Export, check_data, check_packages, shipped_notebooks
from dino_edu.vit import ViT

SMALL = override(shapes(), global_size=16, picture_size=20, patch_size=4)


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(value).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return encoder(SMALL).eval()


@pytest.fixture
def weights(net, tmp_path):
    save_encoder(tmp_path / "net.safetensors", net, SMALL)
    return tmp_path / "net.safetensors"


# Features

def test_train_and_val_are_both_there(net, tmp_path):
    for i, name in enumerate(["train/a/1.png", "train/b/2.png", "train/b/3.png", "val/a/4.png", "val/b/5.png"]):
        picture(tmp_path / "set" / name, i)
    found = embed(net, tmp_path / "set", 16, 20)
    assert found["splits"].tolist() == ["train"] * 3 + ["val"] * 2
    assert found["paths"].tolist() == ["a/1.png", "b/2.png", "b/3.png", "a/4.png", "b/5.png"]
    assert found["labels"].tolist() == [0, 1, 1, 0, 1] and found["classes"].tolist() == ["a", "b"]
    assert np.unique(found["features"], axis=0).shape == (5, 64)


def test_a_broken_picture_leaves_no_row(net, tmp_path):
    for i in range(30):
        picture(tmp_path / "set" / f"{i:02d}.png", i)
    whole = embed(net, tmp_path / "set", 16, 20)
    (tmp_path / "set" / "07.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="07.png"):
        found = embed(net, tmp_path / "set", 16, 20)
    assert "labels" not in found and found["paths"].tolist() == [f"{i:02d}.png" for i in range(30) if i != 7]
    assert np.allclose(found["features"], np.delete(whole["features"], 7, 0), atol=1e-5)


def test_a_table_of_awkward_names(net, tmp_path, weights):
    "Commas and quotes in a name, pictures in a zip, from the shell."
    names = ['a, "b"/1,2.png', "c/ü.png"]
    for i, name in enumerate(names):
        picture(tmp_path / "set" / name, i)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "set" / name, name)
    main(["embed", str(tmp_path / "set.zip"), "--weights", str(weights), "--out", str(tmp_path / "new" / "table.csv"), "--device", "cpu"])
    with open(tmp_path / "new" / "table.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head[:4] == ["path", "split", "class", "f0"] and [row[0] for row in rows] == names and rows[0][2] == 'a, "b"'
    expected = embed(net, tmp_path / "set", 16, 20)["features"]
    assert np.allclose(np.array([row[3:] for row in rows], dtype=float), expected, atol=1e-5)


def test_another_ending_is_refused_before_the_work(tmp_path, weights):
    with pytest.raises(ValueError, match="features.txt: features are written as .npz or .csv"):
        Embed(tmp_path / "nowhere", str(weights), tmp_path / "features.txt")()
    with pytest.raises(ValueError, match="out.bin: weights are written as .safetensors or .pth"):
        Export("nowhere", tmp_path / "out.bin")()
    with pytest.raises(SystemExit, match="nowhere"):
        main(["embed", str(tmp_path / "nowhere"), "--weights", str(weights), "--out", str(tmp_path / "features.npz")])
    with pytest.raises(ValueError, match="as .npz or .csv"):
        write_features(tmp_path / "features.json", {})
    with pytest.raises(ValueError, match="as .safetensors or .pth"):
        write_weights(tmp_path / "weights.bin", {})


# Weights

@pytest.mark.parametrize("changes, ending", [
    (dict(), ".pth"),
    (dict(stem="patch", in_chans=1, mlp_ratio=4.0), ".safetensors"),
    (dict(encoder="resnet18", in_chans=3), ".pth"),
])
def test_exported_weights_need_nothing_of_ours(tmp_path, changes, ending):
    "The lines that go with the file are run in a process of its own, without this package."
    recipe = override(SMALL, **changes)
    torch.manual_seed(1)
    net = encoder(recipe).eval()
    save_encoder(tmp_path / "net.safetensors", net, recipe)
    main(["export", str(tmp_path / "net.safetensors"), "--out", str(tmp_path / f"out{ending}")])
    x = torch.randn(2, recipe.in_chans, 16, 16)
    torch.save(x, tmp_path / "x.pt")
    program = (tmp_path / "out.py").read_text() + "\nimport sys, torch\nassert not any(name.startswith('dino_edu') for name in sys.modules)\n"
    program += "torch.save(net(torch.load('x.pt')).detach(), 'y.pt')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    with torch.no_grad():
        assert torch.allclose(torch.load(tmp_path / "y.pt"), net(x), atol=1e-5)


def test_another_output_is_no_proof(net):
    twin = ViT(img_size=16, patch_size=4, width=48, depth=2, heads=3).eval()
    assert proved(twin).keys() == as_timm(twin).state_dict().keys()
    twin.norm.eps = 0.5   # timm's network does not know
    with pytest.raises(ValueError, match="gives other outputs"):
        proved(twin)


# The notebooks, and the doctor

def test_own_notes_stay(tmp_path, capsys):
    main(["notebooks", str(tmp_path / "book")])
    assert [path.name for path in sorted((tmp_path / "book").iterdir())] == [path.name for path in shipped_notebooks()]
    mine = tmp_path / "book" / "06_loss.ipynb"
    mine.write_text("my notes")
    with pytest.raises(SystemExit, match="1 notebooks that differ .*06_loss.ipynb"):
        main(["notebooks", str(tmp_path / "book")])
    assert mine.read_text() == "my notes"
    main(["notebooks", str(tmp_path / "book"), "--force"])
    assert mine.read_bytes() == next(path for path in shipped_notebooks() if path.name == mine.name).read_bytes()


def test_the_doctor_trains(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Doctor()()
    told = capsys.readouterr().out
    assert "ok   two steps of training on" in told and "FIX" not in told and "GiB free" in told

    def broken(*_):
        raise RuntimeError("no kernel image is available")
    monkeypatch.setattr("dino_edu.train.train", broken)
    with pytest.raises(SystemExit) as stopped:
        Doctor()()
    assert stopped.value.code == 1 and "FIX  two steps of training on" in (told := capsys.readouterr().out) and "no kernel image" in told


def test_the_doctor_finds_sets(monkeypatch, tmp_path):
    monkeypatch.setattr("dino_edu.data.downloads", lambda root: tmp_path)
    ((fine, said),) = check_data()
    assert fine is None and "no data sets" in said
    (tmp_path / "imagenette2-160.tgz").touch()
    (tmp_path / "imagewoof2-320").mkdir()
    assert check_data() == [(True, f"in {tmp_path}: imagenette, imagewoof")]


def test_an_old_version_is_named(monkeypatch):
    import timm
    monkeypatch.setattr(timm, "__version__", "0.9.16")
    wrong = [said for fine, said in check_packages() if fine is False]
    assert wrong == ["timm 0.9.16 is older than 1.0.12: pip install -U timm"]
    monkeypatch.setattr(timm, "__version__", "1.1.0.dev0")
    assert not [said for fine, said in check_packages() if fine is False]


def test_features_are_those_of_the_scores(net, tmp_path):
    from dino_edu.data import read_folder
    for i in range(4):
        picture(tmp_path / "set" / f"{i}.png", i)
    pictures, _ = read_folder(tmp_path / "set", 20)
    assert np.allclose(embed(net, tmp_path / "set", 16, 20)["features"], features(net, pictures, 16).numpy(), atol=1e-6)


