"""The rules that CONTRIBUTING.md states, held by a test. One chapter's: `pytest tests/test_house.py -k 06_loss`."""
import ast
import base64
import configparser
import io
import json
import re
import statistics
import subprocess
import sys
import tokenize
import tomllib
import warnings
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.stem != "index"]
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)

LIBRARIES = {"torch", "torchvision", "timm", "numpy", "PIL", "safetensors"}
MORE_LIBRARIES = {"cli": {"tyro"}, "look": {"tyro"}, "take": {"tyro"}, "picker": {"anywidget", "traitlets"}, "map": {"ipywidgets", "matplotlib"}, "explore": {"ipywidgets", "matplotlib"}}
LINES_OF_CODE = 250
MEGABYTE = 2**20
GREEN, ALIKE = (44, 160, 44), dict(orange=(255, 127, 14), red=(214, 39, 40), brown=(140, 86, 75))  # matplotlib's
CLASS_MAPS = {("08g_map", "still-map"), ("08i_dense", "labels-picture"), ("08i_dense", "picture"), ("17_explore", "still-map")}


# Reading notebooks and modules

@cache
def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def sources(path, kind):
    "Text of the cells of one kind, `code` or `markdown`."
    return ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == kind]


def code(path):
    "Python of a notebook's code cells, line magics and shell commands left out."
    return [re.sub(r"^\s*[%!].*", "", source, flags=re.M) for source in sources(path, "code") if not source.startswith("%%")]


def module_name(path):
    "What `#| default_exp` says."
    return next(match[1] for source in sources(path, "code") if (match := re.search(r"^#\| default_exp (\w+)", source, re.M)))


def module(path):
    "Text of the module that a notebook exports."
    return (ROOT / "dino_edu" / f"{module_name(path)}.py").read_text(encoding="utf-8")


def tokens(text):
    return tokenize.generate_tokens(io.StringIO(text).readline)


def public(nodes):
    return [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]


# Anatomy of a notebook

@every_notebook
def test_title_and_subtitle(path):
    assert re.match(r"# .+\n+> \S", sources(path, "markdown")[0]), "the first cell is `# title`, then `> one sentence`"


@every_chapter
def test_closing_section(path):
    sections = re.findall(r"^## (.+)$", "\n".join(sources(path, "markdown")), re.M)
    assert "What we know now" in sections


@every_chapter
def test_stored_picture(path):
    outputs = [output for cell in cells(path) for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "run the notebook and keep its outputs"


@every_notebook
def test_stored_form(path):
    ids = [cell["id"] for cell in cells(path)]
    assert len(set(ids)) == len(ids), "cell ids are unique"
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", i) for i in ids)
    assert all(cell.get("execution_count") is None for cell in cells(path))
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]
    assert path.stat().st_size < MEGABYTE


@every_chapter
def test_cells_are_short(path):
    "A hint, not a rule: one idea for each cell."
    median = statistics.median(len(source.splitlines()) for source in sources(path, "code"))
    if median > 6:
        warnings.warn(f"{path.name}: half of its code cells have more than {median:g} lines", stacklevel=1)


# Pictures

@cache
def pictures(path):
    "Stored pictures of a notebook with the ids of their cells, uint8 `[H, W, 4]` each."
    outputs = [(cell["id"], output.get("data", {}).get("image/png")) for cell in cells(path) for output in cell.get("outputs", [])]
    return [(cell, np.asarray(Image.open(io.BytesIO(base64.b64decode("".join(png)))).convert("RGBA"))) for cell, png in outputs if png]


@every_notebook
def test_pictures_are_opaque(path):
    "Each brings its own white paper: its black letters could not be read on a dark page."
    assert not [cell for cell, picture in pictures(path) if picture[..., 3].min() < 255], "give the figure facecolor='white'"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs" / "images").glob("*.png")), ids=lambda path: path.stem)
def test_images_are_opaque(path):
    assert np.asarray(Image.open(path).convert("RGBA"))[..., 3].min() == 255


@every_notebook
def test_colours_are_told_apart(path):
    """No green beside orange, red or brown, as matplotlib gives them to a third and a fourth line: about one man in twelve hardly tells them apart.
    Blue, orange, black and grey differ for nearly everyone. Maps of ten classes are let off: no ten colours do."""
    for cell, picture in pictures(path):
        amount = {name: (picture[..., :3] == colour).all(-1).sum() for name, colour in dict(green=GREEN, **ALIKE).items()}
        alike = [name for name in ALIKE if amount[name] > 15]
        assert amount["green"] <= 15 or not alike or (path.stem, cell) in CLASS_MAPS, f"{cell}: green and {', '.join(alike)}"


# Imports

def imports(tree):
    "Names of all imported modules, those of this package as `dino_edu.name`."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, ["dino_edu" if node.level else "", node.module]))
            yield from ([f"dino_edu.{alias.name}" for alias in node.names] if origin == "dino_edu" else [origin])


@every_chapter
def test_imports_earlier_notebooks(path):
    earlier = {"dino_edu", "dino_edu.__version__"} | {f"dino_edu.{module_name(other)}" for other in CHAPTERS if other <= path}
    ours = {name for source in code(path) for name in imports(ast.parse(source)) if name.startswith("dino_edu")}
    assert not ours - earlier, f"later than this chapter, or not there: {ours - earlier}"


@every_chapter
def test_imports_few_libraries(path):
    "Importing a module needs little; what draws or shows is imported by the functions that do so."
    top = ast.parse(module(path))
    for node in ast.walk(top):
        if isinstance(node, ast.FunctionDef):
            node.body = []
    allowed = LIBRARIES | {"dino_edu"} | MORE_LIBRARIES.get(module_name(path), set()) | sys.stdlib_module_names
    more = {name.partition(".")[0] for name in imports(top)} - allowed
    assert not more, f"import {more} inside the functions that need them"


# Modules

def arguments(node):
    "Arguments of a function; of a class, those of its constructor or the fields of its dataclass."
    if isinstance(node, ast.ClassDef):
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            return [field for field in node.body if isinstance(field, ast.AnnAssign)]
        node = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
        return arguments(node)[1:] if node else []
    a = node.args
    return [x for x in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg] if x]


def uncommented(node, commented):
    "Of two or more arguments, those that do not end a line with a comment."
    found = arguments(node)
    last_on_line = {argument.end_lineno: argument for argument in found}
    return [ast.unparse(x) for x in found if last_on_line[x.end_lineno] is not x or x.end_lineno not in commented] if len(found) > 1 else []


@every_chapter
def test_documented(path):
    text = module(path)
    commented = {token.start[0] for token in tokens(text) if token.type == tokenize.COMMENT}
    missing = {}
    for node in public(ast.parse(text).body):
        lacks = ([] if ast.get_docstring(node) else ["docstring"]) + uncommented(node, commented)
        missing |= {node.name: lacks} if lacks else {}
    assert not missing, f"a docstring, and from two arguments up a comment beside each: {missing}"


@cache
def asserted_words():
    "Every word of the notebook cells and the test files that assert something."
    texts = [source for path in NOTEBOOKS for source in sources(path, "code") if not source.startswith("#| export")]
    texts += [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__)]
    return {word for text in texts if re.search(r"\bassert", text) for word in re.findall(r"\w+", text)}


@every_chapter
def test_asserted(path):
    missing = {node.name for node in public(ast.parse(module(path)).body)} - asserted_words()
    assert not missing, f"no assertion, in a notebook or in tests/, names {missing}"


@every_chapter
def test_module_is_short(path):
    "Comments, docstrings, blank lines and signatures are not counted."
    text, spaces = module(path), {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {line for token in tokens(text) if token.type not in spaces for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines -= set(range(node.lineno, node.body[0].lineno))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    assert len(lines) < LINES_OF_CODE, "split the chapter by letter, as 08, 08a, 08b"


# The project

def test_exported_and_clean(checkout):
    "`make export readme` changes nothing, and no module or README has another origin."
    def tree():
        return {str(path.relative_to(checkout)): path.read_text(encoding="utf-8")
                for path in [*checkout.glob("dino_edu/*.py"), *checkout.glob("nbs/*.ipynb"), checkout / "README.md"]}
    before = tree()
    for path in checkout.glob("dino_edu/*.py"):
        if path.name != "__init__.py":
            path.unlink()
    done = subprocess.run(["make", "export", "readme", "TOOLS=", f"BIN={Path(sys.executable).parent}"],
                          cwd=checkout, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    after = tree()
    assert not [name for name in before | after if before.get(name) != after.get(name)], "run `make export readme`"


def test_settings_agree():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    settings, toml = ini["DEFAULT"], tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, tool = toml["project"], toml["tool"]
    assert project["name"] == settings["lib_name"] == settings["lib_path"]
    assert project["description"] == settings["description"]
    assert project["requires-python"] == f">={settings['min_python']}"
    assert project["dynamic"] == ["version"]
    assert tool["setuptools"]["dynamic"]["version"] == {"attr": "dino_edu.__version__"}
    assert (ROOT / "dino_edu" / "__init__.py").read_text() == f'__version__ = "{settings["version"]}"\n'
    assert tool["nbdev"]["tst_flags"] == settings["tst_flags"]
    assert tool["nbdev"]["allowed_cell_metadata_keys"] == settings["allowed_cell_metadata_keys"].split()


def test_annotations_are_true():
    "As far as mypy can tell; an exception names its code and gives a reason."
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    ignores = [line for path in ROOT.glob("dino_edu/*.py") for line in path.read_text(encoding="utf-8").splitlines() if "type: ignore" in line]
    assert all(re.search(r"# type: ignore\[[\w, -]+\] # \w", line) for line in ignores)


def test_nothing_is_unpickled():
    "What SECURITY.md says. The exception reads what its own processes have just written, by the default of torch 2.6 and later: weights only."
    for path in ROOT.glob("dino_edu/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords} if isinstance(node, ast.Call) else {}
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name == "torch.load" and path.stem != "launch" or name.endswith("load_state_dict_from_url"):
                assert given.get("weights_only") == "True", f"{path.name}, line {node.lineno}"
            assert given.get("allow_pickle", "False") == "False" and given.get("weights_only", "True") == "True"
            assert not re.fullmatch(r"(pickle|dill|cloudpickle|joblib)\.(load|loads|Unpickler)", name), f"{path.name}, line {node.lineno}"


def test_forms():
    "What GitHub reads is read; who publishes has the one right that it needs, and only there."
    forms = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in [*ROOT.glob(".github/*/*.yml"), ROOT / "CITATION.cff"]}
    assert {"cff-version", "message", "title", "authors", "references"} <= forms["CITATION.cff"].keys() and len(forms["CITATION.cff"]["references"]) == 2
    for name in ("bug.yml", "question.yml"):
        assert {"name", "description", "body"} <= forms[name].keys() and "dino-edu doctor" in str(forms[name])
    release = forms["release.yml"]
    assert release["permissions"] == {"contents": "read"} and release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "make stranger" in str(release["jobs"]["build"]) and release["jobs"]["publish"]["needs"] == "build"
    assert "twine check --strict" in (ROOT / "tests" / "stranger.sh").read_text()


def test_everything_in_data_is_accounted_for():
    "What ships stands in the table of data/README.md, and so does whose it is."
    table, licences = (ROOT / "data" / "README.md").read_text(encoding="utf-8").split("## Licences")
    shipped = {path.name for path in (ROOT / "data").iterdir() if path.is_file()} - {"README.md"}
    assert not [name for name in shipped if name not in table]
    owned = re.findall(r"`([\w.*]+)`", licences)
    assert not [name for name in shipped if not any(fnmatch(name, pattern) for pattern in owned)]


PAGES = [*NOTEBOOKS, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data" / "README.md", ROOT / "results" / "README.md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path):
    "Files that a page links to exist, and so does every notebook that prose or code names."
    text = "\n".join("".join(cell["source"]) for cell in cells(path)) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([\w./-]+\.\w+)(?:#[\w-]*)?\)", text)
    assert not [target for target in targets if not (path.parent / target).exists()]
    assert not set(re.findall(r"\w+\.ipynb", text)) - {notebook.name for notebook in NOTEBOOKS}


def test_no_paths_of_one_machine():
    "A folder name that only exists where the file was written; not inside a picture's base64."
    machine = re.compile(r"(?<![\w/+.])/(?:work|root|tmp|home|Users)/")
    patterns = ["*.md", "*.ini", "*.toml", "*.cff", "Makefile", "docs/*.*", ".ci/*", ".github/*/*", "nbs/*.ipynb", "dino_edu/*.py", "tests/*.py", "data/*.*", "results/*.*"]
    binary = {".png", ".safetensors"}
    paths = [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file() and path.suffix not in binary]
    found = {path.name: match[0] for path in paths if (match := machine.search(path.read_text(encoding="utf-8", errors="replace")))}
    assert not found


def test_no_folder_shadows_the_data_module():
    assert not (ROOT / "dino_edu" / "data").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "data").glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_weights_name_no_path(path):
    "What a recipe in a file of weights calls its pictures is a name, wherever they lay when it was trained."
    head = path.read_bytes()
    about = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])["__metadata__"]
    assert not re.search(r"[/\\]", json.loads(about["recipe"])["data"])
