"""Chapter 17 in a real browser: JupyterLab and voila in headless Chromium, every control moved. Screenshots are kept in build/browser."""
import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SHOTS = ROOT / "build" / "browser"
CELLS = [cell["id"] for cell in json.loads((ROOT / "nbs" / "17_explore.ipynb").read_text(encoding="utf-8"))["cells"]]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
SETTINGS = {
    "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False, doNotDisturbMode=True),
    "notebook-extension/tracker": dict(windowingMode="none"),   # all cells are in the page, also those that nobody scrolls to
}

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


# A server, a browser, a page

@contextmanager
def serving(folder, command, ready):
    "Start a server on a free port in a folder, wait until it answers, and end it and its kernels."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    env = os.environ | dict(
        PYTHONPATH=str(ROOT), JUPYTER_CONFIG_DIR=str(folder / "config"), JUPYTERLAB_SETTINGS_DIR=str(folder / "settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(folder / "workspaces"), JUPYTER_RUNTIME_DIR=str(folder / "runtime"), IPYTHONDIR=str(folder / "ipython"))
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", *command, f"--port={port}"], cwd=folder / "nbs", env=env, stdout=log,
                                  stderr=subprocess.STDOUT, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(url + ready) or server.poll() is not None, 90)
        assert server.poll() is None and answers(url + ready), (folder / "log").read_text()[-3000:]
        yield url
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def answers(url):
    "Does somebody answer there?"
    try:
        urllib.request.urlopen(url, timeout=2)
    except OSError:
        return False
    return True


def wait_until(true, seconds=30):
    "Ask again and again."
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    return true()


@pytest.fixture
def page():
    "A page of a browser of its own."
    with playwright.sync_playwright() as start:
        browser = start.chromium.launch(executable_path=CHROMIUM, headless=True, args=QUIET)
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.set_default_timeout(60_000)
        yield page
        browser.close()


@pytest.fixture
def book(tmp_path):
    "A folder with a copy of the chapter, which a server may save."
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "17_explore.ipynb", tmp_path / "nbs")
    return tmp_path


# What one does in a page

class Widget:
    "One widget of the page: where its controls and pictures are."

    def __init__(self, page, root):
        self.page, self.root = page, root

    def picture(self, n=0):
        "What the n-th picture shows, `[H, W, 3]`."
        image = self.root.locator(".dino-picker img").nth(n)
        url = image.evaluate("""async image => {
            const blob = await (await fetch(image.src)).blob(), reader = new FileReader();
            return await new Promise(done => { reader.onload = () => done(reader.result); reader.readAsDataURL(blob); });
        }""")
        return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))

    def caption(self, n=0):
        "The line under the n-th picture."
        return self.root.locator(".dino-picker [aria-live]").nth(n).inner_text()

    def row(self, label):
        "The line with a control."
        return self.root.locator(f'.widget-inline-hbox:has(label:text-is("{label}"))')

    def press(self, label, key, times=1, handle=0):
        "Move a slider by the keyboard."
        handle = self.row(label).locator(".noUi-handle").nth(handle)
        handle.scroll_into_view_if_needed()
        handle.focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def choose(self, label, option):
        "Choose from a list."
        self.row(label).locator("select").select_option(label=option)

    def changes(self, act, says="", n=0):
        "Do something: the n-th picture must become another one, and its caption come to say something. Both of them, then."
        before = self.picture(n)
        act()
        def done():
            now = self.picture(n)
            return (now.shape != before.shape or (now != before).any()) and says in self.caption(n)
        assert wait_until(done), f"no other picture that says {says!r}: {self.caption(n)}"
        return self.picture(n), self.caption(n)


def click_share(page, image, x, y):
    "Click on a picture, at shares of its width and height."
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])


def pale(picture):
    "Share of a picture that is nearly white: what a mask has taken away."
    return (picture.min(2) > 200).mean()


# The seven, one by one

def check_temperature(widget):
    def entropies(key, label, says):
        caption = widget.changes(lambda: widget.press(label, key), says)[1]
        return [float(re.search(pattern, caption)[1]) for pattern in (r"entropy ([\d.]+)", r"([\d.]+) of their mean")]
    (cold, _), (hot, spread) = entropies("Home", "temperature tau", "tau 0.01,"), entropies("End", "temperature tau", "tau 1,")
    assert cold < 0.5 * hot
    entropies("Home", "temperature tau", "tau 0.01,")
    assert entropies("Home", "share of the center", ", 0% of the center")[1] < 0.9 * spread   # all pictures choose alike
    entropies("End", "prototypes K", "K 128:")
    entropies("End", "another batch", "K 128:")


def check_crops(widget):
    widget.changes(lambda: widget.press("local boxes", "ArrowLeft", 3), "5 local views")
    widget.changes(lambda: widget.press("area of global boxes", "ArrowRight", 2), "global boxes cover 50% to 100%")
    widget.changes(lambda: widget.press("area of local boxes", "ArrowLeft", 2, handle=1), "local ones 5% to 30%")
    widget.changes(lambda: widget.press("other boxes", "ArrowRight"))
    widget.changes(lambda: widget.choose("picture", "striped disc 3"))


def check_attention(widget, page, photo):
    large, heads = (widget.root.locator(".dino-picker img").nth(n) for n in (0, 1))
    assert "the class token looks, mean" in widget.caption() and widget.row("head").locator("select option:checked").inner_text() == "mean"
    widget.changes(lambda: click_share(page, large, 11.5 / 16, 4.5 / 16), "row 4, column 11")
    widget.changes(lambda: page.keyboard.press("ArrowDown"), "row 5, column 11")
    widget.changes(lambda: page.keyboard.press("ArrowLeft"), "row 5, column 10")
    widget.changes(lambda: page.keyboard.press("Escape"), "the class token looks")

    narrow, _ = widget.changes(lambda: widget.root.get_by_role("button", name="mask").click())
    wide, _ = widget.changes(lambda: widget.press("mass of the mask", "ArrowRight", 6), "90% of it")
    assert pale(wide) < pale(narrow)
    widget.changes(lambda: widget.press("layer", "ArrowLeft"), "layer 2")
    widget.changes(lambda: click_share(page, heads, 0.3, 0.5), "head 2")
    widget.changes(lambda: widget.choose("head", "head 4"), "head 4")
    finer, _ = widget.changes(lambda: widget.press("resolution (pixels)", "ArrowRight", 2), "96 x 96")
    assert finer.shape[1] % 96 == 0
    widget.changes(lambda: widget.choose("network", "untrained"))
    widget.changes(lambda: widget.choose("picture", "checkered square 4"))

    def upload():
        with page.expect_file_chooser() as chooser:
            widget.root.get_by_role("button", name="one of mine").click()
        chooser.value.set_files(photo)
    sent, _ = widget.changes(upload)
    assert widget.row("picture").locator("select option:checked").inner_text() == photo.name
    assert sent.shape[1] > 1.9 * sent.shape[0]   # its own aspect
    widget.root.locator("input[type=text]:visible").first.fill("nowhere.jpg")
    page.keyboard.press("Enter")
    assert wait_until(lambda: "nowhere.jpg" in widget.caption()), widget.caption()


def check_emergence(widget):
    widget.changes(lambda: widget.press("step of the training", "Home"), "after step 0")
    narrow, _ = widget.changes(lambda: widget.choose("show", "mask"), "mask")
    wide, _ = widget.changes(lambda: widget.press("mass of the mask", "End"))
    assert pale(wide) < pale(narrow)
    widget.changes(lambda: widget.choose("show", "map"), "map")
    widget.changes(lambda: widget.choose("head", "head 1"))
    widget.changes(lambda: widget.choose("picture", "striped disc 3"))


def check_neighbours(widget, page):
    image = widget.root.locator(".dino-picker img").first
    widget.changes(lambda: click_share(page, image, 2.5 / 16, 1.5 / 3), "number 18:", n=1)
    widget.changes(lambda: page.keyboard.press("ArrowDown"), "number 34:", n=1)


def check_map(widget, page):
    image = widget.root.locator(".dino-picker img").first
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    seen = set()
    for x, y in [(0.2, 0.2), (0.8, 0.3), (0.5, 0.9)]:
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=3)
        page.wait_for_timeout(300)
        seen.add(widget.caption(1))
    assert len(seen) == 3 and all(re.match(r"number \d+: \w+", said) for said in seen)
    widget.changes(lambda: widget.root.get_by_role("button", name="trained on shapes").click())


def check_collapse(widget):
    widget.root.locator("label", has_text="sharpening").first.click()
    widget.press("steps", "Home")
    widget.root.get_by_role("button", name="train").click()
    assert wait_until(lambda: "over 40 steps; diagnosis: uniform" in widget.caption(), 120), widget.caption()
    widget.root.locator("label", has_text="sharpening").first.click()
    widget.changes(lambda: widget.root.get_by_role("button", name="train").click(), "diagnosis: nothing found")


def test_jupyterlab(page, book, tmp_path):
    "Run the chapter, move every control, click a patch; each picture must change as it should."
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 200, 3), dtype=np.uint8)).save(photo)
    options = ["jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
               "--expose-app-in-browser", "--LabApp.extension_manager=readonly"]
    with serving(book, options, "/api/status") as url:
        page.goto(f"{url}/lab/tree/17_explore.ipynb?reset", wait_until="domcontentloaded")
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
        page.evaluate("async () => { const panel = window.jupyterapp.shell.currentWidget; await panel.context.ready; await panel.sessionContext.ready; }")
        page.set_default_timeout(300_000)
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")   # until the last cell is done
        page.set_default_timeout(30_000)
        failed = page.evaluate("""() => window.jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code')
            .flatMap(cell => cell.model.outputs.toJSON()).filter(output => output.output_type === 'error').map(output => output.evalue)""")
        assert not failed
        def widget(cell):
            return Widget(page, page.locator(".jp-NotebookPanel .jp-Cell").nth(CELLS.index(cell)))
        for name, check in dict(
            temperature=lambda: check_temperature(widget("show-temperature")),
            crops=lambda: check_crops(widget("show-crops")),
            attention=lambda: check_attention(widget("networks"), page, photo),
            emergence=lambda: check_emergence(widget("show-emergence")),
            neighbours=lambda: check_neighbours(widget("show-neighbours"), page),
            map=lambda: check_map(widget("show-map"), page),
            collapse=lambda: check_collapse(widget("show-collapse")),
        ).items():
            try:
                check()
            finally:
                page.screenshot(path=SHOTS / f"{name}.png")   # makes its folder


def test_voila(page, book):
    "The same chapter as an application: no code, and a click is answered."
    with serving(book, ["voila", "--no-browser", "--Voila.ip=127.0.0.1"], "/voila/tree") as url:
        page.goto(f"{url}/voila/render/17_explore.ipynb", wait_until="domcontentloaded", timeout=300_000)
        explorer = page.locator(".jp-OutputArea-output:has(.widget-upload)").first   # the only one to which one can send a picture
        explorer.locator(".dino-picker img").first.wait_for(timeout=300_000)
        assert page.locator(".jp-InputArea-editor:visible").count() == 0
        widget = Widget(page, explorer)
        widget.changes(lambda: click_share(page, explorer.locator(".dino-picker img").first, 3.5 / 16, 8.5 / 16), "row 8, column 3")
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / "voila.png")
