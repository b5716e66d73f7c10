"""Every notebook runs from top to bottom in its fast profile. One of them: `pytest tests/test_notebooks.py -k 06_loss`."""
import re
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

NBS = Path(__file__).parents[1] / "nbs"
NOTEBOOKS = sorted(NBS.glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.stem != "index"]
BUDGET = 240  # seconds for a whole notebook, on a busy machine


def run(path, kernel, folder, cwd):
    "Run a notebook; a failure names the cell as the source file knows it."
    deadline, out, message = time.monotonic() + BUDGET, folder / path.name, None
    try:
        papermill.execute_notebook(path, out, dict(profile="fast"), kernel_name=kernel, cwd=cwd, progress_bar=False,
                                   timeout_func=lambda cell: max(1, int(deadline - time.monotonic())))
    except PapermillExecutionError as error:
        message = describe(error, path, out)
    except (CellTimeoutError, DeadKernelError) as error:
        message = f"{path.name}: {type(error).__name__} (the budget is {BUDGET} s)\n{error}"
    if message:  # outside `except`, so that the report is the message alone
        pytest.fail(message, pytrace=False)


def describe(error, path, out):
    "Index, id and source of the cell that failed, and its traceback in plain text."
    executed = nbformat.read(out, as_version=4).cells
    failed = next(cell.id for cell in executed if any(o.output_type == "error" for o in cell.get("outputs", [])))
    index = [cell.id for cell in nbformat.read(path, as_version=4).cells].index(failed)
    traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    return f"{path.name}, cell {index}, id {failed}:\n\n{error.source}\n\n{traceback}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, kernel, tmp_path):
    run(path, kernel, tmp_path, cwd=NBS)


def test_runs_from_elsewhere(kernel, tmp_path):
    run(CHAPTERS[0], kernel, tmp_path, cwd=tmp_path)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_profile_is_injected(path):
    "Without the tag papermill injects at the top, the notebook's own profile wins, and a full run is silently a fast one."
    cells = papermill.execute_notebook(path, None, dict(profile="full"), prepare_only=True).cells
    tags = [cell.metadata.get("tags", []) for cell in cells]
    default = tags.index(["parameters"])
    assert cells[default].source == 'profile = "fast"'
    assert tags[default + 1] == ["injected-parameters"]
