"""The command as the shell sees it: exit status, output, help, bad input."""
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from PIL import Image

from dino_edu.bench import table
from dino_edu.cli import Ablate, Bench, Demo, Diagnose, Score, Training, before_and_after, main, plan
from dino_edu.data import load
from dino_edu.look import Attention, Film, Poster, Segment
from dino_edu.recipe import method, override, shapes
from dino_edu.run import recipe_of
from dino_edu.take import Transfer, may_be_cut_off
from dino_edu.weights import encoder, find_encoder, snapshots

TRAIN = ["train", "shapes", "--data", "shapes:100", "--steps", "2", "--evaluations", "1", "--batch", "16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    main([*TRAIN, "--out", str(folder), "--snapshots", "3", "--record", str(folder.parent / "rows.jsonl")])
    return folder


def refused(*words):
    "The one line that a command ends with."
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert isinstance(end.value.code, str) and end.value.code.startswith("dino-edu: ") and "\n" not in end.value.code
    return end.value.code


def test_help_does_not_import_torch():
    code = "import sys; from dino_edu.cli import main\ntry: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout
    assert out.strip().endswith("False") and "demo" in out


def test_module_is_a_command():
    done = subprocess.run([sys.executable, "-m", "dino_edu.cli", "score", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "linear classifier" in done.stdout


@pytest.mark.parametrize("command, words", [(Training, ["train", "shapes"]), (Bench, ["bench", "small"]), (Ablate, ["ablate"]), (Score, ["score"]), (Attention, ["attention"]), (Film, ["film"]), (Segment, ["segment"]), (Poster, ["poster"]), (Transfer, ["transfer", "shapes"]), (Demo, ["demo"])])
def test_every_option_has_a_help_text(command, words, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    names = [field.name.replace("_", "-") for field in fields(command)]
    options = [name for name in names if re.search(rf"--{name}[ ,]", text)]
    assert len(options) >= 4
    for name in options:
        assert re.search(rf"--{name}(, --no-{name}| \S+) [^(]", text), f"no help for --{name}"


def test_train_writes_a_run_and_a_row(run):
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    row = json.loads((run.parent / "rows.jsonl").read_text())
    assert row["base"] == "shapes" and row["overrides"] == dict(data="shapes:100", steps=2, evaluations=1, batch=16)
    assert {"table", "row", "base", "seed", "overrides", "recipe", "data", "device", "commit", "seconds", "images_per_second", "metrics"} == set(row)


def test_train_keeps_snapshots(run):
    assert [step for step, _ in snapshots(run)] == [0, 2]


def test_dry_run_runs_nothing(tmp_path, capsys):
    main([*TRAIN, "--out", str(tmp_path / "dry"), "--dry-run"])
    assert "2 steps of 16 pictures" in capsys.readouterr().out
    assert list((tmp_path / "dry").iterdir()) == []


def test_plan_finds_what_would_fail(tmp_path):
    with pytest.raises(ValueError, match="no backbone 'vit_nono'"):
        plan(override(shapes(), encoder="vit_nono"), *load("shapes:100"), tmp_path, "cpu")
    with pytest.raises(ValueError, match="optimizer 'adam'"):
        plan(override(shapes(), optimizer="adam"), *load("shapes:100"), tmp_path, "cpu")


def test_diagnose(run, tmp_path, capsys):
    "A run too short to say anything about, its recipe from either file; then one whose targets have gone flat, said by `train` itself."
    assert Diagnose(run)() is None and "nothing found" in capsys.readouterr().out
    (tmp_path / "going").mkdir()
    shutil.copy(run / "last.pt", tmp_path / "going")
    assert recipe_of(tmp_path / "going") == recipe_of(run) == override(shapes(), data="shapes:100", steps=2, evaluations=1, batch=16)
    flat = "train shapes --data shapes:200 --steps 80 --evaluations 1 --n-local 0 --out-dim 64 --no-head-bn --teacher-temperature 1 --warmup-teacher-temperature 1"
    main([*flat.split(), "--global-size", "16", "--patch-size", "8", "--stem", "patch", "--teacher-temperature-warmup", "0", "--out", str(tmp_path / "flat")])
    said = capsys.readouterr().out
    assert "diagnosis: Uniform collapse" in said and "no sharper than the student's own answers" in said
    main(["diagnose", str(tmp_path / "flat")])
    assert capsys.readouterr().out.startswith("Uniform collapse")
    (tmp_path / "flat" / "summary.json").unlink()
    (tmp_path / "flat" / "last.pt").unlink()
    assert "neither summary.json nor last.pt" in refused("diagnose", str(tmp_path / "flat"))
    assert f"no log.jsonl in {tmp_path / 'none'}" in refused("diagnose", str(tmp_path / "none"))


def test_a_lost_run_is_diagnosed(tmp_path, capsys, monkeypatch):
    "A temperature so small that logits divided by it are infinite: what chapter 11 says comes before the line that ends the command."
    monkeypatch.setattr("dino_edu.fit.method", lambda *args: overheated(method(*args)))
    assert "the loss of step" in refused(*TRAIN, "--out", str(tmp_path / "lost"))
    assert "diagnosis: Lost: the loss of step 1 is nan" in capsys.readouterr().out


def overheated(net):
    net.loss.student_temperature = 1e-45
    return net


def test_score(run, tmp_path, capsys):
    main(["score", str(run), "--data", "shapes:100", "--protocols", "knn", "--inits", "1", "--beside", f"twin={run}", "--out", str(tmp_path / "judged")])
    said, found = capsys.readouterr().out, json.loads((tmp_path / "judged" / "report.json").read_text())
    assert "trained less this" in said and "50 tensors loaded" in said and str(tmp_path / "judged" / "index.html") in said
    assert found["protocols"]["knn"]["less_twin"] == 0
    assert {"trained", "untrained", "pixels"} <= found["protocols"]["knn"].keys() and found["facts"]["data"] == "shapes val"
    assert "no protocol kmeans" in refused("score", str(run), "--protocols", "kmeans")


def test_attention_of_a_wide_photograph(tmp_path, capsys):
    "Files of the size that was read, 119 x 64 pixels less what fills no patch of 4, and the report of the weights."
    Image.new("RGB", (130, 70), "orange").save(tmp_path / "photo.jpg")
    main(["attention", str(tmp_path / "photo.jpg"), "--out", str(tmp_path / "maps"), "--size", "64"])
    said = capsys.readouterr().out
    names = ["attention", "head_1", "head_2", "head_3", "head_4", "overlay", "mask"]
    assert said.splitlines()[:-1] == [f"written: {tmp_path / 'maps' / name}.png" for name in names]
    assert said.splitlines()[-1] == "shapes_vit_nano.safetensors: 50 tensors loaded"
    assert {path.stem for path in (tmp_path / "maps").iterdir()} == set(names)
    for name in names[1:]:
        with Image.open(tmp_path / "maps" / f"{name}.png") as picture:
            assert picture.size == (116, 64) and picture.mode == ("L" if name == "mask" else "RGB")


def test_attention_of_borrowed_and_of_earlier_networks(run, tmp_path, capsys):
    "A file of the authors' format, and a run's snapshot."
    Image.new("RGB", (40, 40), "orange").save(tmp_path / "photo.png")
    torch.save({f"backbone.{name}": tensor for name, tensor in encoder("shapes_vit_nano").state_dict().items()}, tmp_path / "theirs.pth")
    for weights, said in {tmp_path / "theirs.pth": "theirs.pth: 50", run / "snapshots" / "000002.safetensors": "teacher of 000002.safetensors: 50"}.items():
        main(["attention", str(tmp_path / "photo.png"), "--weights", str(weights), "--out", str(tmp_path / "maps")])
        assert f"{said} tensors loaded" in capsys.readouterr().out


def test_attention_needs_neither_timm_nor_torchvision(tmp_path):
    "They take longer to import than everything else here takes together."
    Image.new("RGB", (40, 40), "orange").save(tmp_path / "photo.png")
    words = ["attention", str(tmp_path / "photo.png"), "--out", str(tmp_path / "maps")]
    code = f"import sys; from dino_edu.cli import main; main({words}); assert not {{'timm', 'torchvision', 'torch._dynamo'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "mask.png" in done.stdout, done.stderr


def test_film(tmp_path, capsys):
    (tmp_path / "frames").mkdir()
    for i, colour in enumerate(("orange", "teal", "orange")):
        Image.new("RGB", (44, 36), colour).save(tmp_path / "frames" / f"{i}.png")
    main(["film", str(tmp_path / "frames"), "--out", str(tmp_path / "film.gif"), "--head", "2"])
    said = capsys.readouterr().out
    assert "3 frames of frames" in said and "overlap by" in said and "50 tensors loaded" in said
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames >= 2 and film.size[0] >= 3 * 44
    assert "heads are counted from 1" in refused("film", str(tmp_path / "frames"), "--head", "0")
    assert "nowhere" in refused("film", str(tmp_path / "nowhere"))


def test_segment(run, tmp_path, capsys):
    words = ["--data", "shapes:60", "--inits", "1", "--out", str(tmp_path / "curves.png"), "--record", str(tmp_path / "rows.jsonl"), "--row", "short", "--patches", "--layers", "all"]
    main(["segment", str(run), *words])
    table = capsys.readouterr().out.splitlines()
    assert [line.partition(": IoU")[0] for line in table[3:5]] == [f"object or background, patch by patch, by {by}" for by in ("a linear classifier", "nearest patches")]
    assert table[2].startswith("| short | 0 |") and (tmp_path / "curves.png").exists()
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["layers"] == "all" and row["table"] == "segment" and row["row"] == "short" and {"curves", "size", "commit"} <= row.keys() and row["metrics"]["objects"] == 12
    low, high = row["metrics"]["outline_knn_less_untrained_interval"]
    assert (low + high) / 2 == pytest.approx(row["metrics"]["outline_knn_trained"] - row["metrics"]["outline_knn_untrained"], abs=1e-3)
    assert "no preset 'nothing'" in refused("segment", str(run), "--base", "nothing")
    assert "nowhere" in refused("segment", str(run), "--data", str(tmp_path / "nowhere"))


def test_transfer(run, tmp_path, capsys):
    "Two starts and new weights, two rates, a share of the labels; the same command again runs nothing."
    words = ["transfer", "shapes", "--data", "shapes:100", "--size", "24", "--steps", "2", "--batch", "4", "--evaluations", "1", "--weights", f"mine={run}",
             "shapes_vit_nano", "--rates", "1e-4", "1e-3", "--labels", "0.5", "--seeds", "2", "--first-seed", "3", "--global-pool", "avg",
             "--out", str(tmp_path / "out"), "--record", str(tmp_path / "rows.jsonl")]
    main(words)
    table = (tmp_path / "out/travel.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert [line.split(" | ")[:3] for line in table.splitlines()[2:]] == [[f"| {name}", "shapes train", "50"] for name in ("mine", "shapes_vit_nano", "scratch")]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["row"], row["seed"]) for row in rows] == [(name, seed) for seed in (3, 4) for name in ("mine", "shapes_vit_nano", "scratch")]
    assert rows[0]["overrides"] == dict(data="shapes:100", size=24, global_pool="avg", batch=4, steps=2, evaluations=1, labels=0.5, rates=[1e-4, 1e-3])
    assert rows[0]["recipe"]["global_pool"] == "avg" and rows[0]["metrics"]["labels"] == 50 and rows[0]["table"] == "transfer"
    assert {path.name for path in (tmp_path / "out/0.5/3/mine").iterdir()} == {"0", "1"} and (tmp_path / "out/travel.png").stat().st_size > 5000
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("best.pt")}
    main(words)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("best.pt")}
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows   # nor is anything written twice
    held = {rate: json.loads((tmp_path / f"out/0.5/3/mine/{k}/summary.json").read_text())["metrics"]["held_top1"] for k, rate in enumerate((1e-4, 1e-3))}
    assert rows[0]["recipe"]["lr"] == max(held, key=held.get)


def test_poster(run, tmp_path, capsys):
    Image.new("RGB", (90, 60), "blue").save(tmp_path / "sea.png")
    out = tmp_path / "sheet.png"
    main(["poster", str(tmp_path / "sea.png"), "--steps", "2", "--size", "24", "--dpi", "100", "--out", str(out)])
    with Image.open(out) as sheet:
        assert sheet.size == (660, 140)   # a picture, two steps, three findings
    assert "nowhere" in refused("poster", "--course", str(tmp_path / "nowhere"))
    assert "at least one" in refused("poster", "--steps", "0")


def test_shipped_encoder():
    net, recipe, _ = find_encoder("shapes_vit_nano")
    assert recipe.data == "shapes" and not net.training


def test_demo(tmp_path, capsys):
    main(["demo", "--out", str(tmp_path), "--pictures", "200", "--steps", "2"])
    text = capsys.readouterr().out
    assert (tmp_path / "attention.png").exists() and (tmp_path / "summary.json").exists()
    assert "untrained" in text and "attention.png" in text and "Next, try" in text
    assert [step for step, _ in snapshots(tmp_path)] == [0, 1, 2]


def test_before_and_after_differ(run):
    "Three rows of ten classes; training, however short, moves the attention."
    figure = before_and_after(run, find_encoder(run).recipe, load("shapes:100")[1], seed=0)
    rows = [[axes.images[0].get_array() for axes in figure.axes[i : i + 10]] for i in (0, 10, 20)]
    assert len(figure.axes) == 30
    assert all(abs(before - after).max() > 0 for before, after in zip(rows[1], rows[2]))


def test_bad_input_is_one_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "not.png").write_text("text")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    assert "no such folder" in refused("train", "shapes", "--data", "nowhere")
    assert str(tmp_path / "empty") in refused("train", "shapes", "--data", str(tmp_path / "empty"))
    assert "fewer than a batch" in refused("train", "shapes", "--data", "shapes:10")
    assert "no backbone 'vit_nono'" in refused(*TRAIN, "--encoder", "vit_nono", "--out", str(tmp_path / "a"))
    assert "lr = " in refused(*TRAIN, "--lr", "0.5", "--out", str(run))
    assert "no device 'gpu'" in refused(*TRAIN, "--device", "gpu", "--out", str(tmp_path / "b"))
    assert "nowhere" in refused("score", "nowhere")
    assert "broken.safetensors" in refused("score", str(tmp_path / "broken.safetensors"))
    assert "not.png: not a readable picture" in refused("attention", str(tmp_path / "not.png"))
    assert "absent.png: not a readable picture" in refused("attention", str(tmp_path / "absent.png"))
    photo = str(tmp_path / "photo.png")
    Image.new("RGB", (40, 40), "orange").save(photo)
    assert "no encoder 'absent.pth'" in refused("attention", photo, "--weights", "absent.pth")
    assert "holds no encoder.safetensors" in refused("attention", photo, "--weights", str(tmp_path / "empty"))
    assert "not.png" in refused("attention", photo, "--out", str(tmp_path / "not.png"))
    assert "mass is a share" in refused("attention", photo, "--mass", "60", "--out", str(tmp_path / "maps"))
    assert "layer" in refused("attention", photo, "--layer", "7", "--out", str(tmp_path / "maps"))


@pytest.mark.parametrize("words", [["train"], ["train", "shapse"], ["train", "shapes", "--lrr", "1"], ["train", "shapes", "--lr", "fast"], ["sing"]])
def test_wrong_options_end_with_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2


@pytest.fixture
def one_arrangement(monkeypatch):
    "Trying them all takes minutes."
    monkeypatch.setattr("dino_edu.bench.arrangements", lambda *_: [(1, 0)])


def test_bench_without_a_preset(one_arrangement, tmp_path, capsys):
    "The file that a script reads, and the table that a person does."
    main(["bench", "--json", str(tmp_path / "bench.json"), "--record", str(tmp_path / "rows.jsonl"), "--batch", "4", "--n-local", "1", "--rounds", "1", "--seconds", "0.1", "--device", "cpu"])
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["ratio"] == result["ours"]["images_per_second"] / result["plain"]["images_per_second"] > 0
    assert {"augment", "teacher forward", "student forward", "backward", "loss", "optimiser"} <= set(result["parts_ms"])
    assert result["recipe"]["encoder"] == "vit_nano" and result["ours"]["peak_memory"] > 10**7
    assert json.loads((tmp_path / "rows.jsonl").read_text())["metrics"]["ratio"] == result["ratio"]
    printed = capsys.readouterr().out
    assert "ratio" in printed and "teacher forward" in printed
    alone = {key: value for key, value in result.items() if key not in ("plain", "ratio", "ratios")}
    assert "ratio" not in table(alone) and "% of the" in table(alone)


def test_ablate_names_what_there_is():
    assert "no table 'componnt': it is one of component, " in refused("ablate", "componnt")
    assert "no row in component 'byo'" in refused("ablate", "component", "--rows", "byo")
    assert "no preset 'shape'" in refused("ablate", "component", "--base", "shape")


def test_ablate_dry_run(tmp_path, capsys):
    main(["ablate", "teacher", "--data", "shapes:60", "--seeds", "2", "--dry-run", "--out", str(tmp_path)])
    assert "4 rows (student_copy, previous_iteration, previous_epoch, momentum) with seeds [100, 101]" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--help"], ["ablate", "--help"]])
def test_a_reader_who_has_seen_enough(words):
    "As in `dino-edu --help | head -1`: no traceback."
    process = subprocess.Popen([sys.executable, "-m", "dino_edu.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_cut_off_within_a_process(monkeypatch):
    "What is printed into a pipe without a reader ends the program; what else goes wrong goes on its way."
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", nobody)
        with pytest.raises(SystemExit, match="1"), may_be_cut_off():
            print("a line")
    with pytest.raises(ValueError, match="another"), may_be_cut_off():
        raise ValueError("another matter")
