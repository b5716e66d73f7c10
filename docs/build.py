"""Build the site: `python docs/build.py build/docs`.

The pages are collected in a folder that is laid out like the repository, so that links need no translation. Nothing is executed and nothing fetched."""
import json
import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import build_main

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import api  # noqa: E402

ROOT = HERE.parent
CHAPTERS = [path for path in sorted((ROOT / "nbs").glob("*.ipynb")) if path.stem != "index"]
MODULE = re.compile(r"^#\| default_exp (\w+)", re.M)
TAGS = {"hide-input": "remove-input", "answer": "hide-cell", "widget": "widget", "parameters": "parameters"}  # ours -> those of myst-nb
GUIDES = ["paper", "coming_from", "cookbook", "troubleshooting", "glossary", "stability"]
PROJECT = [name for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY") if (ROOT / f"{name}.md").exists()] + ["data/README", "data/imagenette_vit_micro"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def module_of(path: Path) -> str:
    "The module that a chapter exports."
    return next(match[1] for cell in cells(path) if (match := MODULE.search(source(cell))))


def title_and_subtitle(path: Path) -> list[str]:
    "The question of a chapter and the sentence below it."
    return list(re.match(r"# (.+)\n+> (.+)", source(cells(path)[0])).groups())


def as_shown(cell: dict) -> dict | None:
    "A cell without its lines for nbdev; None if a reader should not see it."
    tags, text = cell["metadata"].get("tags", []), source(cell)
    if "hide" in tags or re.search(r"^#\| hide$", text, re.M):
        return None
    shown = re.sub(r"^#\|.*\n?", "", text, flags=re.M).strip("\n") if cell["cell_type"] == "code" else text
    return {**cell, "source": shown, "metadata": dict(tags=[TAGS[tag] for tag in tags])} if shown else None


def chapter(path: Path) -> str:
    "A notebook as its page shows it, with a line that says where it belongs."
    module = module_of(path)
    line = f"*Chapter {path.stem.partition('_')[0]} of the book; it exports [`dino_edu.{module}`](../api/{module}.md).*"
    first, *others = filter(None, map(as_shown, cells(path)))
    note = dict(cell_type="markdown", id="where-it-belongs", metadata={}, source=line)
    about = dict(kernelspec=dict(name="python3", display_name="python3"), language_info=dict(name="python", pygments_lexer="ipython3"))
    return json.dumps(dict(cells=[first, note, *others], metadata=about, nbformat=4, nbformat_minor=5))


def toctree(caption: str, pages: list[str]) -> str:
    return "\n".join(["```{toctree}", f":caption: {caption}", ":hidden:", "", *pages, "```"])


def home() -> str:
    "The README, and the order of all pages."
    books = [f"{path.stem.partition('_')[0]} {title_and_subtitle(path)[0]} <nbs/{path.stem}>" for path in CHAPTERS]
    trees = [toctree("Guides", [f"docs/{name}" for name in GUIDES]), toctree("The book", ["nbs/index", *books]),
             toctree("Reference", ["api/index"]), toctree("Project", PROJECT)]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return "\n\n".join([re.sub(r"!\[([^]]+)\]\(https:[^)]+\)", r"\1", text), *trees])   # badges become words: a page fetches nothing


def table_of_chapters() -> str:
    lines = [f"| [{path.stem}]({path.name}) | {question} | {answer} |" for path in CHAPTERS for question, answer in [title_and_subtitle(path)]]
    return "\n".join(["# The notebooks", "", "Each asks one question and exports the module of its name; each imports only from earlier ones. "
                      "The pages show the outputs that they were stored with.", "", "| notebook | question | what is in it |", "|---|---|---|", *lines])


def table_of_modules(names: list[str]) -> str:
    "The front page of the reference."
    lines = [f"| [`dino_edu.{module_of(path)}`]({module_of(path)}.md) | {title_and_subtitle(path)[1]} |" for path in CHAPTERS]
    pages = "\n".join(["```{toctree}", ":hidden:", "", *names, "```"])
    return "\n".join(["# Reference", "", "Every public name of every module: what stands in its `__all__`. What may change is said in [stability](../docs/stability.md).",
                      "", "| module | what is in it |", "|---|---|", *lines, "", pages])


def collect(folder: Path) -> None:
    "Write all pages, and copy what they show or link to."
    shutil.rmtree(folder, ignore_errors=True)
    written = {"index.md": home(), "nbs/index.md": table_of_chapters(), "api/index.md": table_of_modules([module_of(path) for path in CHAPTERS])}
    written |= {f"nbs/{path.name}": chapter(path) for path in CHAPTERS}
    written |= {f"api/{module_of(path)}.md": api.page(ROOT / "dino_edu" / f"{module_of(path)}.py", path.stem) for path in CHAPTERS}
    for name, text in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    copied = [path for pattern in ("C*.md", "S*.md", "CITATION.cff", "LICENSE", "docs/*.md", "data/*.md", "data/*.jsonl", "data/*.sh", "nbs/images/*", "results/*.png") for path in ROOT.glob(pattern)]
    for path in copied:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def build(out: Path) -> int:
    "Collect the pages beside `out` and have Sphinx build them; any warning is an error. The exit status is Sphinx's."
    pages = out.with_name(f"{out.name}-source")
    collect(pages)
    return build_main(["-b", "html", "-q", "-W", "--keep-going", "-c", str(HERE), "-d", str(pages / ".doctrees"), str(pages), str(out)])


if __name__ == "__main__":
    raise SystemExit(build(Path(sys.argv[1])))
