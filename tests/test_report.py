"""One report of all protocols: paired intervals, what is missing or fails, three forms of one text."""
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from dino_edu import retrieve
from dino_edu.data import Pictures, load
from dino_edu.judge import PROTOCOLS, Protocol, Section, Task, choose_protocols, compare, plot_confusion, plot_neighbours, seen_before
from dino_edu.report import _facts, markdown_table, published, report, write_report
from dino_edu.vit import vit
from dino_edu.weights import find_encoder


@pytest.fixture(scope="module")
def task():
    train, val = load("shapes", n=400, seed=77)
    return Task(find_encoder("shapes_vit_nano"), train, val, inits=1)


# Values to intervals

def test_compare_by_hand():
    a, b = torch.tensor([90.0, 80, 70]), torch.tensor([88.0, 79, 66])
    rows, metrics = compare(dict(a=a, b=b))
    half = 4.3027 * (a - b).std().item() / 3**0.5   # a printed table, 2 degrees of freedom
    assert metrics["a"] == 80 and metrics["less_b"] == pytest.approx(7 / 3)
    assert metrics["less_b_interval"] == pytest.approx([7 / 3 - half, 7 / 3 + half], abs=1e-3)
    assert rows[0]["a less this"] == "" and rows[1]["a less this"].endswith("not told apart")
    assert compare(dict(a=a, b=a - torch.tensor([1.0, 1.2, 1.1])))[0][1]["a less this"].endswith("above")
    assert compare(dict(a=a, b=a + torch.tensor([1.0, 1.2, 1.1])))[0][1]["a less this"].endswith("below")


def test_groups_count_once():
    values = torch.tensor([0.0, 0, 0, 0, 100])
    assert compare(dict(a=values), ["x"] * 4 + ["y"])[1]["a"] == 50


# Figures

def test_confusion_in_percent_of_the_truth():
    figure = plot_confusion(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1]), ["cat", "dog"])
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[75, 25], [0, 100]]
    assert {text.get_text() for text in axes.texts} == {"75", "25", "100"} and [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog"]


def test_neighbours_frames():
    pictures = Pictures.stack(torch.zeros(6, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 0, 0, 1, 1, 1]))
    index = torch.tensor([[1, 2, 3, 4, 5]] * 6)
    figure = plot_neighbours(pictures, pictures, index)
    colours = [tuple(round(x, 2) for x in ax.spines["left"].get_edgecolor()[:3]) for ax in figure.axes]
    assert len(colours) == 12 and colours[1] == colours[2] != colours[3] and colours[7] == colours[8] == colours[3]


# What runs

def test_protocols_by_name():
    assert choose_protocols(["knn"]) == ["knn"] and choose_protocols(["video", "knn"]) == ["knn", "video"] and choose_protocols(["all"]) == list(PROTOCOLS)
    with pytest.raises(ValueError, match="no protocol kmeans: there are knn, "):
        choose_protocols(["kmeans", "knn"])
    with pytest.raises(ValueError, match="no protocol was named"):
        choose_protocols([])


def test_every_protocol_of_the_generated_set(task, tmp_path):
    sections = report(task, "shapes_vit_nano", ["all"], tmp_path)
    assert list(sections) == list(PROTOCOLS)
    found = json.loads((tmp_path / "report.json").read_text())["protocols"]
    assert sections["video"].said == ["Not run: no videos; name DAVIS with --davis."] and not sections["video"].metrics
    for name in ("knn", "linear", "retrieval"):
        assert found[name]["less_untrained_interval"][0] > 0, f"trained is not above untrained in {name}"
    for name in ("knn", "linear", "low_shot", "retrieval", "copies", "attention"):
        assert sections[name].rows and sections[name].seconds > 0 and not sections[name].said[0].startswith(("Not run", "Failed"))
    page = (tmp_path / "report.md").read_text()
    for figure in re.findall(r"\]\((figures/\w+\.png)\)", page):
        with Image.open(tmp_path / figure) as image:
            assert image.width > 200
    assert len(list((tmp_path / "figures").iterdir())) == len(re.findall(r"\]\(figures/", page)) >= 9


def test_knn_is_that_of_chapter_08(task):
    from dino_edu.score import knn
    section = PROTOCOLS["knn"].judge(task)
    (z, q), = task.features("trained")
    assert section.metrics["trained"] == pytest.approx(knn(z, task.train.labels, q, task.val.labels, [20])[20][0])
    assert section.metrics["top1_k20_T0.07"] == pytest.approx(section.metrics["trained"])


def only(monkeypatch, **protocols):
    "Let there be no other protocols."
    for name in list(PROTOCOLS):
        monkeypatch.delitem(PROTOCOLS, name)
    for name, protocol in protocols.items():
        monkeypatch.setitem(PROTOCOLS, name, protocol)


def test_retrieval_is_that_of_chapter_14(task, monkeypatch):
    "From the same features: embedded again, in batches of another size, near ties change places."
    known = {net: found for name, nets in task.nets.items() for net, found in zip(nets, task.features(name))}
    monkeypatch.setattr(retrieve, "features", lambda net, pictures, *_: known[net][pictures is task.val])
    found, ours = retrieve.retrieval(task.nets, task.train, task.val, task.size)["metrics"], PROTOCOLS["retrieval"].judge(task).metrics
    assert {name: ours[name] for name in ("trained", "less_untrained", "p5", "chance")} == pytest.approx(
        {name: found[other] for name, other in dict(trained="map_trained", less_untrained="less_untrained", p5="p5_trained", chance="chance").items()})


def test_a_failure_takes_nothing_with_it(task, tmp_path, monkeypatch):
    def broken(task):
        raise ValueError("the features contain NaN")
    only(monkeypatch, bad=Protocol("Bad", broken), knn=PROTOCOLS["knn"])
    told = []
    sections = report(task, "mine", ["all"], tmp_path, told.append)
    assert sections["bad"].said == ["Failed: the features contain NaN."] and sections["knn"].metrics
    assert len(told) == 2 and "contain NaN" in (tmp_path / "index.html").read_text()


def test_what_was_found_is_kept_when_stopped(task, tmp_path, monkeypatch):
    def stopped(task):
        raise KeyboardInterrupt
    only(monkeypatch, knn=PROTOCOLS["knn"], stopped=Protocol("Stopped", stopped))
    with pytest.raises(KeyboardInterrupt):
        report(task, "mine", ["all"], tmp_path)
    assert list(json.loads((tmp_path / "report.json").read_text())["protocols"]) == ["knn"]


def test_unlabelled_pictures_are_refused():
    train, val = load("shapes", n=60, seed=1)
    for sets in ((replace(train, labels=None), val), (train, None)):
        with pytest.raises(ValueError, match="has no labels"):
            Task(find_encoder("shapes_vit_nano"), *sets, inits=1)
    with pytest.raises(ValueError, match="0 untrained networks are nothing"):
        Task(find_encoder("shapes_vit_nano"), train, val, inits=0)


# What the network may have seen

def test_seen_before(task):
    blank = Pictures.stack(torch.zeros(3, 3, 4, 4, dtype=torch.uint8))
    val = replace(blank, paths=("n01440764/n01440764_36.jpg", "n01440764/ILSVRC2012_val_00000293.jpg", "cat_7.jpg"))
    assert "1 of these 3" in seen_before("dino_vitb8", val)
    assert seen_before("runs/mine", val) == "" == seen_before("dino_vitb8", blank)


# Three forms

def test_tables():
    assert markdown_table([dict(a=1, b=None), dict(a="x", c=1234.5)]).splitlines() == ["| a | b | c |", "| --- | --- | --- |", "| 1 |  |  |", "| x |  | 1,234.5 |"]


class Page(HTMLParser):
    "Tags that are open, pictures, and text."

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_escaped(tmp_path):
    figure = plot_confusion(torch.tensor([0, 1]), torch.tensor([0, 1]), ["a", "b"])
    sections = dict(knn=Section(["1 < 2 & 3"], [{"network": "<script>", "score (%)": "1.0"}], dict(x=1.0), dict(confusion=figure), "Nearest <b>"))
    write_report(tmp_path, dict(weights="dino_vits16", data="imagenet val"), sections, ["seen & known"])
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and "<script" not in text and "http" not in text.split("<style>")[0]
    assert "1 < 2 & 3" in page.text and "<script>" in page.text and "seen & known" in page.text
    assert [(tmp_path / image["src"]).exists() and image["alt"] for image in page.images] == ["knn: confusion"]
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Published for dino_vits16" in markdown and "| imagenet | 74.5 | 77.0 |" in markdown and "> seen & known" in markdown
    assert json.loads((tmp_path / "report.json").read_text())["facts"]["weights"] == "dino_vits16"


@pytest.mark.parametrize("speed, said", [(0.0, None), (99.6, 100)])
def test_a_speed_that_nobody_measured_is_not_reported(task, monkeypatch, speed, said):
    monkeypatch.setattr(task, "speed", speed)
    found = _facts(task, "mine")
    assert found.get("images/s") == said and found["weights"] == "mine" and found["train"] == len(task.train)


def test_published_tables():
    tables = published()
    (frameworks,) = (rows for title, rows in tables.items() if title.startswith("Frameworks"))
    assert {"method": "DINO", "architecture": "ViT-S", "parameters": 21, "images_per_second": 1007, "linear": 77.0, "knn": 74.5} in frameworks
    assert {title.split(",")[0]: len(rows) for title, rows in tables.items()} == {
        "Frameworks": 15, "Across architectures": 10, "Retrieval": 5, "Copies": 5, "Transfer by fine-tuning": 4, "Video segmentation": 5}


@pytest.fixture
def oxford(tmp_path):
    "Six photos in two colours, two queries."
    (tmp_path / "oxford" / "jpg").mkdir(parents=True)
    for name, colour in dict(a="red", b="red", c="darkred", d="blue", e="blue", f="navy", q="red", r="blue").items():
        Image.new("RGB", (40, 32), colour).save(tmp_path / "oxford" / "jpg" / f"{name}.jpg", quality=95)
    gnd = [dict(bbx=[0, 0, 40, 32], easy=[0, 1], hard=[2], junk=[]), dict(bbx=[0, 0, 40, 32], easy=[3, 4], hard=[5], junk=[])]
    (tmp_path / "oxford" / "gnd_roxford5k.json").write_text(json.dumps(dict(imlist=list("abcdef"), qimlist=["q", "r"], gnd=gnd)))
    return tmp_path / "oxford"


def test_places(task, oxford):
    found = find_encoder("shapes_vit_nano")
    assert "name the folder" in PROTOCOLS["places"].lacks(task) and "gnd_roxford5k" in PROTOCOLS["places"].lacks(Task(found, task.train, task.val, inits=1, places=oxford / "jpg"))
    here = Task(found, task.train, task.val, inits=2, places=oxford)
    assert not PROTOCOLS["places"].lacks(here)
    section = PROTOCOLS["places"].judge(here)
    wanted = retrieve.retrieve_places(found.net, oxford, retrieve.read_truth(oxford / "gnd_roxford5k.json"), **retrieve.PROTOCOLS["roxford5k"])["metrics"]
    assert section.metrics["roxford5k_trained_map_medium"] == pytest.approx(wanted["map_medium"]) and wanted["map_easy"] == 100
    assert [(row["photos"], row["network"], row["mAP easy (%)"]) for row in section.rows][0] == ("roxford5k", "trained", "100.0") and len(section.rows) == 2
    assert "2 queries, 6 photos" in section.said[0]


def test_copydays(task, tmp_path):
    "Its layout, from pictures of our own: the copies are crops."
    for i in range(6):
        image = to_pil_image(task.val[i])
        for name, picture in {f"original/20{i:02}00": image, f"strong/20{i:02}01": image.crop((4, 4, 44, 44))}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            picture.save(tmp_path / f"{name}.jpg", quality=95)
    rest = task.val.subset(range(6, len(task.val)))
    here = Task(find_encoder("shapes_vit_nano"), task.train, rest, inits=1, copydays=tmp_path)
    section = PROTOCOLS["copydays"].judge(here)
    assert section.metrics["trained"] > 3 * section.metrics["chance"] and section.metrics["queries"] == 6
    assert f"among {6 + len(rest)}" in section.said[0] and "example" in section.figures
    assert "original/" in PROTOCOLS["copydays"].lacks(task)


def test_another_network_beside_it(task):
    "In every protocol that these pictures allow; the first is compared with it, pair by pair."
    found = find_encoder("shapes_vit_nano")
    twin = Task(found, task.train, task.val, inits=1, beside=dict(twin=found.net))
    assert list(twin.nets) == ["trained", "twin", "untrained"]
    for name, protocol in PROTOCOLS.items():
        if name == "low_shot" or protocol.lacks(twin):
            continue
        section = protocol.judge(twin)
        row = next(row for row in section.rows if row["network"] == "twin")
        assert row["trained less this"].startswith("0.0 [0.0, 0.0]"), name
    with pytest.raises(ValueError, match="'untrained' cannot stand beside"):
        Task(found, task.train, task.val, beside=dict(untrained=found.net))
    with pytest.raises(ValueError, match="patches of the same size"):
        Task(found, task.train, task.val, beside=dict(coarse=vit("vit_nano", img_size=32, patch_size=8)))


def test_score_on_davis(shared_data, task, tmp_path):
    found = Task(find_encoder("shapes_vit_nano"), task.train, task.val, inits=1, davis=shared_data / "davis2016val-240p-small.tar")
    section = PROTOCOLS["attention"].judge(found)
    assert section.metrics["groups"] == 20 and section.metrics["objects"] == 141
