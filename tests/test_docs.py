"""The site: built once, without a network, then looked through: pages, names, links, pictures."""
import ast
import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb") if path.stem != "index")
MODULES = sorted(path for path in (ROOT / "dino_edu").glob("*.py") if not path.name.startswith("_"))
GUIDES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


class Page(HTMLParser):
    "What a page refers to, and which places in it can be referred to."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.sources = set(), set(), set()
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given["id"]} if given.get("id") else set()
        self.links |= {given["href"]} if tag == "a" and given.get("href") else set()
        here = given.get("src") or (given.get("href") if tag == "link" and "stylesheet" in given.get("rel", "") else None)
        self.sources |= {here} if here else set()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The built folder. Sphinx itself fails at a name or a page that is not there."
    for name in ("sphinx", "myst_nb", "sphinx_book_theme", "latex2mathml"):
        pytest.importorskip(name, reason="the site needs pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site") / "docs"
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "build.py"), str(out)], cwd=out.parent, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


def test_every_notebook_and_guide_has_a_page(site, pages):
    wanted = {f"nbs/{name}.html" for name in CHAPTERS} | {f"docs/{name}.html" for name in GUIDES} | {"index.html", "search.html", "CHANGELOG.html", "data/README.html"}
    assert wanted <= {path.relative_to(site).as_posix() for path in pages}
    home = pages[site / "index.html"]
    assert {f"docs/{name}.html" for name in GUIDES} <= home.links, "a guide is in no table of contents"
    chapters = pages[site / "nbs" / "index.html"].text
    assert "What does a temperature do to a softmax?" in chapters and "The small arithmetic that every later chapter leans on" in chapters


def exported(path):
    "A module's `__all__`."
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return next(ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")


def test_every_public_name_is_in_the_reference(site, pages):
    wanted = {(path.stem, f"dino_edu.{path.stem}.{name}") for path in MODULES for name in exported(path)}
    assert len(wanted) > 400 and not {name for module, name in wanted if name not in pages[site / "api" / f"{module}.html"].ids}


def test_arguments_are_explained(site, pages):
    "Type, default and comment of an argument, of what comes back, and of a field of a dataclass."
    text = html.unescape(re.sub(r"<[^>]+>", " ", pages[site / "api" / "loss.html"].text))
    assert re.search(r"iterations\s+3\s+1 is the paper.{20,40}\s+int", text) and re.search(r"returns\s+target probabilities[^T]+Tensor", text)
    fields = html.unescape(re.sub(r"<[^>]+>", " ", pages[site / "api" / "recipe.html"].text))
    assert re.search(r"n_local\s+8\s+number of local views; 0 turns multi-crop off\s+int", fields)


def test_what_nobody_should_see_is_not_there(pages):
    "Lines for nbdev, and markup that was not understood."
    found = {path.name: mark for path, page in pages.items() for mark in ("#| export", "#| default_exp", "{py:", "WARNING: ") if mark in page.text and path.stem != "CONTRIBUTING"}
    assert not found


def test_formulas_are_drawn(site, pages):
    text = pages[site / "nbs" / "06_loss.html"].text
    assert text.count("<math") > 20 and r"\frac" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.S)


def target(link, path, site):
    "File and place that an internal link leads to; None for other sites."
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    return (file / "index.html" if file.is_dir() else file), unquote(parts.fragment)


def test_links_and_pictures_lead_somewhere(site, pages):
    site, dead = site.resolve(), []
    known = {path.resolve(): page for path, page in pages.items()}
    for path, page in known.items():
        for link in page.links | page.sources:
            if found := target(link, path, site):
                file, place = found
                if not file.is_file() or (place and file in known and place not in known[file].ids):
                    dead.append(f"{path.relative_to(site)} -> {link}")
    assert not dead
    assert sum(len(page.links) for page in known.values()) > 1000   # it has looked


def test_nothing_is_fetched(pages):
    "Scripts, styles, fonts and pictures lie in the site; other sites are linked to, no more."
    elsewhere = {source for page in pages.values() for source in page.sources if urlsplit(source).netloc}
    assert not elsewhere
    outside = sorted({link for page in pages.values() for link in page.links if urlsplit(link).scheme in ("http", "https")})
    print(*outside, sep="\n")
    assert "https://arxiv.org/abs/2104.14294" in outside


def test_no_path_of_a_machine(pages, site):
    machine = re.compile(r"(?<![\w/+.:])/(?:work|root|tmp|home|Users)/\w")
    found = {path.name: match[0] for path, page in pages.items() if (match := machine.search(page.text))}
    assert not found
    assert not [path for path in pages if str(ROOT) in pages[path].text or str(site.parent) in pages[path].text]


def test_quoted_messages_exist():
    "What troubleshooting says that we say, we say."
    code = "".join(path.read_text(encoding="utf-8") for path in MODULES)
    quoted = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("our own messages")[2], re.M)
    assert len(quoted) > 15 and not [message for message in quoted if message not in code]
