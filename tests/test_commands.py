"""The commands that the documents print: run as they stand, or dry, or listed with the reason why not. A new one cannot be forgotten."""
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

from dino_edu.cli import Ablate, Bench, Score, Training, main
from dino_edu.look import Segment
from dino_edu.recipe import PRESETS, encoder, method
from dino_edu.rows import select
from dino_edu.take import Transfer

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {   # command -> why
    'pip install -e .': "writes into the environment of whoever runs the tests; tests/test_package.py installs into another",
    '.venv/bin/pytest -k 06_loss': "is what tests/test_notebooks.py does",
    'dino-edu score runs/mine --protocols all --out report': "takes minutes; tests/test_report.py writes such a report",
    'dino-edu bench': "takes minutes; tests/test_cli.py measures one arrangement",
    'dino-edu bench imagenette': "the same",
}
LACKING = {   # what this machine does not have -> how a command that needs it ends, once all its options were understood
    "--root IMAGENET": "IMAGENET",
    "--data imagenette": "imagenette2-160.tgz",
    "--base imagenette": "imagenette2-160.tgz",
}


def blocks(path, *languages):
    "The fenced blocks of a document."
    return [text for language, text in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S) if language in languages]


def commands(path):
    "Its commands, without comments, those over several lines in one."
    lines = "\n".join(blocks(path, "", "bash", "sh", "console")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [shlex.join(each) for each in words if each]


COMMANDS = sorted({command for path in DOCUMENTS for command in commands(path)})


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder with what the documents assume: pictures in two classes, a photo, a clip, and a run of two steps."
    folder = tmp_path_factory.mktemp("desk")
    noise = torch.randint(0, 256, (80, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for i, pixels in enumerate(noise):
        (folder / "PICTURES" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "PICTURES" / "ab"[i % 2] / f"{i}.png")
    Image.fromarray(noise[0]).save(folder / "photo.jpg")
    (folder / "clip.mp4").mkdir()   # frames do for a film, too
    for i in range(3):
        Image.fromarray(noise[i, :40, :48]).save(folder / "clip.mp4" / f"{i}.png")
    main([*"train shapes --data shapes:100 --steps 2 --evaluations 1 --batch 16 --out".split(), str(folder / "runs" / "mine")])
    return folder


def understood(words, command, capsys):
    "Run `dino-edu`; training and tables dry; a data set of thousands of generated pictures in small."
    words = ["shapes:60" if before == "--data" and word == "shapes" else word for before, word in zip(["", *words], words)]
    if words[0] in ("train", "ablate") and not {"--dry-run", "--help"} & set(words):
        words.append("--dry-run")
    lacking = next((said for option, said in LACKING.items() if option in command), None)
    if lacking:
        with pytest.raises(SystemExit, match=lacking):
            main(words)
    elif "--help" in words:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
    else:
        main(words)
        assert capsys.readouterr().out.strip()


def by_make(words):
    "`make -n`: the target is there, and so are its variables."
    done = subprocess.run(["make", "-n", *words, "TOOLS=", "PACKAGE="], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode and done.stdout, done.stderr


def by_torchrun(words, command, capsys):
    "Its own options are understood, and `dino-edu`'s, in one process."
    given = get_args_parser().parse_args(words)
    assert given.module and given.training_script == "dino_edu.cli"
    understood(given.training_script_args, command, capsys)


def by_slurm(words, command, capsys):
    "The script is there; what it hands on is understood."
    script = next(i for i, word in enumerate(words) if word.endswith(".sh"))
    assert (ROOT / words[script]).is_file() and '-m dino_edu.cli "$@"' in (ROOT / words[script]).read_text()
    understood(words[script + 1 :], command, capsys)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in NOT_RUN])
def test_command(command, desk, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(desk)
    monkeypatch.setattr("dino_edu.data.downloads", lambda root: tmp_path)
    program, *words = shlex.split(command)
    known = {"make": lambda: by_make(words), "dino-edu": lambda: understood(words, command, capsys),
             "torchrun": lambda: by_torchrun(words, command, capsys), "sbatch": lambda: by_slurm(words, command, capsys)}
    assert program in known, f"nobody runs `{command}`: teach this test to, or list it with the reason why not"
    known[program]()


def test_every_reason_has_a_command():
    assert not set(NOT_RUN) - set(COMMANDS)
    assert not [option for option in LACKING if not any(option in command for command in COMMANDS)]
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.parent.name == "docs" and blocks(path, "python")], ids=lambda path: path.stem)
def test_recipes(path):
    "Python in a guide makes recipes that can be built."
    for text in blocks(path, "python"):
        names = {}
        exec(text, names)
        assert method(names["recipe"]).encoders()["teacher"].embed_dim == encoder(names["recipe"]).embed_dim


# What one GPU shows

def part_by_part(part, tmp_path, **environment):
    "Run gpu.sh with a `python3` that writes down what it is asked for, and ends well."
    (tmp_path / "bin").mkdir(exist_ok=True)
    program = tmp_path / "bin" / "python3"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/asked.txt\n')
    program.chmod(0o755)
    known = os.environ | dict(PATH=f"{program.parent}:{os.environ['PATH']}", **environment)
    return subprocess.run(["bash", ROOT / "data" / "gpu.sh", part, "PICTURES", str(tmp_path / "out")], env=known, capture_output=True, text=True)


@pytest.mark.parametrize("part, least", [("bench", 4), ("tables", 2), ("weights", 3), ("best", 3), ("siamese", 1), ("transfer", 1)])
def test_the_gpus_commands_are_understood(part, least, tmp_path, monkeypatch):
    "Every option is one that there is, and every row; what was done is not done again."
    assert part_by_part(part, tmp_path, DAVIS="DAVIS", STEPS="200").returncode == 0
    asked, seen = (tmp_path / "asked.txt").read_text().splitlines(), []
    assert len(asked) == least and all(line.startswith("-m dino_edu.cli ") for line in asked)
    for command in (Training, Bench, Score, Segment, Transfer):
        monkeypatch.setattr(command, "__call__", lambda run: seen.append(run))
    monkeypatch.setattr(Ablate, "__call__", lambda table: seen.append(select(PRESETS[table.base](), table.table, table.rows)))
    for line in asked:
        main(line.split()[2:])
    assert len(seen) == least
    assert part_by_part(part, tmp_path).returncode == 0
    again = len((tmp_path / "asked.txt").read_text().splitlines()) - least
    assert again == (0 if part in ("bench", "weights", "best") else least)   # the others know by themselves what is finished


def test_the_gpus_time_is_limited(tmp_path):
    done = part_by_part("bench", tmp_path, MINUTES="0")
    assert done.returncode == 75 and "run the same again" in done.stderr and not (tmp_path / "asked.txt").exists()
    assert part_by_part("dance", tmp_path).returncode == 2
