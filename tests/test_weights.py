"""Encoders by name: ours in every stage, files of the authors, released ones without a network, and every way in which a name can be wrong."""
import subprocess
import sys
from dataclasses import asdict

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from dino_edu import weights
from dino_edu.checkpoint import load_encoder, save_checkpoint, save_encoder
from dino_edu.core import asset, seed_everything
from dino_edu.data import load
from dino_edu.recipe import method, override, shapes
from dino_edu.score import features, knn
from dino_edu.vit import ViT, backbone, vit
from dino_edu.weights import INSIDE, RELEASED, Found, encoder, find_encoder, find_encoders, forget_snapshots, pack_snapshots, save_snapshot, snapshot_steps, snapshots

RECIPE = override(shapes(), patch_size=8, out_dim=32, hidden=32, bottleneck=16)


def noisy(net):
    "Every parameter random, so that no two networks are alike."
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


def learnt(recipe=RECIPE):
    "A method whose encoders differ."
    model = method(recipe)
    for net in model.encoders().values():
        noisy(net)
    return model


def same(net, other, size=32, channels=3):
    x = torch.randn(2, channels, size, size)
    with torch.no_grad():
        return torch.equal(net(x), other.eval()(x))


def authors_checkpoint(student, teacher):
    "What main_dino.py writes: the student wrapped by DistributedDataParallel, heads beside both backbones."
    def names(net, prefix):
        head = {"head.mlp.0.weight": torch.zeros(4, 4), "head.last_layer.weight_g": torch.ones(8, 1)}
        return {prefix + name: tensor for name, tensor in ({f"backbone.{name}": t for name, t in net.state_dict().items()} | head).items()}
    return dict(student=names(student, "module."), teacher=names(teacher, ""), epoch=3, dino_loss=dict(center=torch.zeros(1, 8)))


# Ours

def test_shipped():
    found = find_encoder("shapes_vit_nano")
    assert isinstance(found, Found) and not found.net.training and found.recipe.global_size == 32
    assert same(found.net, load_encoder(asset("shapes_vit_nano.safetensors"))[0]) and same(encoder("shapes_vit_nano"), found.net)
    assert str(found.loaded).startswith("shapes_vit_nano.safetensors: 50 tensors loaded")


def test_real_pictures_ship():
    found = find_encoder("imagenette_vit_micro")
    assert sum(p.numel() for p in found.net.parameters()) > 3e5 and found.recipe.global_size == 64
    assert asset("imagenette_vit_micro.safetensors").stat().st_size < 12e6
    course = dict(snapshots("imagenette_vit_micro_course"))
    assert list(course) == [0, 543, 2173, 4889, 11000]
    assert same(course[11000]["teacher"], found.net) and not same(course[0]["teacher"], found.net)


def test_a_stand_in_says_so():
    found = find_encoder("imagenette_vit_tiny")
    assert same(found.net, encoder("imagenette_vit_micro"))
    assert str(found.loaded).startswith("imagenette_vit_micro.safetensors in place of imagenette_vit_tiny, which is not trained yet: 66")


def test_the_shipped_one_knows_real_pictures(shared_data):
    "Its card says 66.2 % on all 3,925 pictures; here 600 of them, by 3,000 of the training set."
    train, val = load(shared_data / "imagenette96-full.tar", 80)
    few, many = torch.arange(0, len(val), 6)[:600], torch.arange(0, len(train), 3)[:3000]
    train, val, net = train.subset(many), val.subset(few), encoder("imagenette_vit_micro")
    top1, _ = knn(features(net, train, 64), train.labels, features(net, val, 64), val.labels, ks=[20])[20]
    assert top1 > 55


@pytest.mark.parametrize("changes", [{}, dict(loss="labels", out_dim=10), dict(teacher="previous_epoch", average=True), dict(encoder="resnet18")])
def test_a_run_before_its_end(tmp_path, changes):
    recipe = override(RECIPE, **changes)
    model = learnt(recipe)
    save_checkpoint(tmp_path / "last.pt", model, torch.optim.SGD(model.student.parameters()), recipe, seed=0, step=3)
    for which, net in model.encoders().items():
        for place in (tmp_path, tmp_path / "last.pt"):
            found = find_encoder(place, which) if which != "teacher" else find_encoder(place)
            assert same(found.net, net) and found.recipe == recipe and not found.net.training
            assert found.loaded.source == f"{which} of last.pt, step 3"
    assert set(model.encoders()) <= set(INSIDE)


def test_a_run_at_its_end(tmp_path):
    "The encoder's file is the teacher's; the student is in the checkpoint only."
    model = learnt()
    save_encoder(tmp_path / "encoder.safetensors", model.encoders()["teacher"], RECIPE)
    assert same(encoder(tmp_path), model.encoders()["teacher"])
    with pytest.raises(FileNotFoundError, match="no encoder.safetensors and no last.pt"):
        encoder(tmp_path, "student")
    with pytest.raises(ValueError, match="encoder.safetensors has no student, only teacher"):
        encoder(tmp_path / "encoder.safetensors", "student")
    save_checkpoint(tmp_path / "last.pt", model, torch.optim.SGD(model.student.parameters()), RECIPE, seed=0, step=3)
    assert same(encoder(tmp_path, "student"), model.encoders()["student"])
    with pytest.raises(ValueError, match="last.pt has no ema, only teacher, student"):
        encoder(tmp_path / "last.pt", "ema")


# Theirs

@pytest.mark.parametrize("options", [
    dict(width=128, depth=2, heads=2, img_size=32, patch_size=8),
    dict(width=192, depth=12, heads=3, img_size=64, patch_size=16),
    dict(width=64, depth=3, heads=4, img_size=32, patch_size=4, stem="conv", mlp_ratio=2.0),
    dict(width=96, depth=4, heads=3, img_size=64, patch_size=8, stem="conv", mlp_ratio=2.0, in_chans=1),
])
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_files_of_the_authors(tmp_path, options, which):
    "Architecture from the shapes, weights from a backbone alone or a full checkpoint: the same outputs, to the last bit."
    nets = dict(teacher=noisy(ViT(**options)), student=noisy(ViT(**options)))
    torch.save(authors_checkpoint(**nets), tmp_path / "checkpoint.pth")
    torch.save(nets[which].state_dict(), tmp_path / "backbone.pth")
    save_file(nets[which].state_dict(), tmp_path / "backbone.safetensors")
    channels = options.get("in_chans", 3)
    for file in ("checkpoint.pth", "backbone.pth", "backbone.safetensors"):
        net, recipe, loaded = find_encoder(tmp_path / file, which)
        assert same(net, nets[which], options["img_size"], channels) and not net.training
        assert net.blocks[0].attn.heads == options["heads"]
        assert (recipe.global_size, recipe.patch_size, recipe.in_chans) == (options["img_size"], options["patch_size"], channels)
        assert set(loaded.used) == set(net.state_dict())
        assert loaded.source == (f"{which} of {file}" if file.startswith("check") else file)
        assert loaded.dropped == (("head.mlp.0.weight", "head.last_layer.weight_g") if file.startswith("check") else ())


def test_known_sizes_are_named(tmp_path):
    for name, net in dict(vit_nano=vit("vit_nano", patch_size=4, img_size=32), vit_tiny=vit("vit_tiny")).items():
        torch.save(net.state_dict(), tmp_path / "net.pth")
        assert find_encoder(tmp_path / "net.pth").recipe.encoder == name
    torch.save(ViT(width=128, depth=1, heads=2, img_size=32).state_dict(), tmp_path / "net.pth")
    assert find_encoder(tmp_path / "net.pth").recipe.encoder == "transformer of width 128 and depth 1"


def test_resnet_50(tmp_path):
    net = noisy(backbone("resnet50"))
    names = {name.removeprefix("model."): tensor for name, tensor in net.state_dict().items()}
    torch.save(names, tmp_path / "resnet.pth")
    found = find_encoder(tmp_path / "resnet.pth")
    assert same(found.net, net, 64) and found.recipe.encoder == "resnet50" and len(found.loaded.used) == len(names)


def test_heads_that_no_shape_tells(tmp_path):
    odd = noisy(ViT(width=48, depth=2, heads=6, img_size=32, patch_size=8))
    torch.save(odd.state_dict(), tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="odd.pth does not say how many heads cut its width of 48: give heads="):
        find_encoder(tmp_path / "odd.pth")
    assert same(find_encoder(tmp_path / "odd.pth", heads=6).net, odd)
    assert not same(find_encoder(tmp_path / "odd.pth", heads=3).net, odd)


# Released

def without_weights(name):
    "What would come from the network, made up: timm's model with random weights."
    place = RELEASED[name][0]
    name, options = ("resnet50", {}) if place.startswith("https") else (place, dict(dynamic_img_size=True))
    return noisy(timm.create_model(name, pretrained=False, num_classes=0, **options))


@pytest.mark.parametrize("name, patch_size, width", [
    ("dino_vits16", 16, 384), ("dino_vits8", 8, 384), ("dino_vitb16", 16, 768), ("dino_vitb8", 8, 768), ("dino_resnet50", None, 2048)])
def test_released(monkeypatch, name, patch_size, width):
    theirs, asked = without_weights(name), []
    monkeypatch.setattr(timm, "create_model", fetcher(timm.create_model, theirs, asked))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda address, **_: asked.append(address) or theirs.state_dict())
    net, recipe, loaded = find_encoder(name)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(net(x), theirs(x), atol=1e-4) and net(x).shape == (1, width)
    assert asked == [RELEASED[name][0]] and RELEASED[name][0] in str(loaded)
    assert set(loaded.used) == {key.removeprefix("model.") for key in net.state_dict()} and not net.training
    assert getattr(net, "patch_size", None) == patch_size and (recipe.global_size, recipe.in_chans) == (224, 3)


def fetcher(create, theirs, asked):
    "timm.create_model, but for pretrained weights, which it gives instead of fetching."
    def give(name, pretrained=False, **options):
        if not pretrained:
            return create(name, pretrained=False, **options)
        asked.append(name)
        return theirs
    return give


def test_released_names_are_timms():
    for name, (place, recipe) in RELEASED.items():
        if place.startswith("https"):
            assert place.endswith(".pth") and recipe.encoder == "resnet50"
            continue
        assert place in timm.list_pretrained("*.dino"), name
        config = timm.get_pretrained_cfg(place)
        assert config.hf_hub_id == f"timm/{place}" and config.input_size == (3, recipe.global_size, recipe.global_size)


def test_without_a_network(monkeypatch, tmp_path):
    "What was wanted, from where, why not, and what to do: on one line."
    def refuse(*_, **__):
        raise RuntimeError("no route to host\nmore about it")
    monkeypatch.setattr(timm, "create_model", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(ConnectionError, match=r"dino_vitb8 .*\(no route to host\).*model.safetensors of https://huggingface.co/timm/vit_base_patch8_224.dino .*"
                                              r"dino_vitb8.safetensors, and give its path") as error:
        encoder("dino_vitb8")
    assert "\n" not in str(error.value)
    with pytest.raises(ConnectionError, match=r"Fetch https://dl.fbaipublicfiles.com/.*dino_resnet50.pth, and give its path"):
        encoder("dino_resnet50")
    theirs = noisy(vit("vit_small"))
    save_file(theirs.state_dict(), tmp_path / "dino_vits16.safetensors")   # as the message says
    found = find_encoder(tmp_path / "dino_vits16.safetensors")
    assert same(found.net, theirs, 224) and (found.recipe.encoder, found.recipe.patch_size, found.recipe.global_size) == ("vit_small", 16, 224)


def test_nothing_is_fetched_at_import():
    code = "import sys, dino_edu.weights; assert not {'timm', 'torchvision', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Wrong names and files

def test_wrong_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no encoder 'dino_vit16': .*ships \(imagenette_vit_micro, .*shapes_vit_nano, .*released \(dino_vits16, dino_vits8, dino_vitb16, "):
        encoder("dino_vit16")
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth.*is no file or folder"):
        encoder(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="no encoder.safetensors and no last.pt"):
        encoder(tmp_path)


@pytest.mark.parametrize("content, message", [
    (dict(weight=torch.zeros(3)), r"net\.pth holds neither a vision transformer nor a ResNet-50 \(its first names are weight\)"),
    (dict(student={}), r"net\.pth has no 'teacher'"),
    (dict(a=1), r"net\.pth is not a state dict"),
    ([1], r"net\.pth holds a list"),
    (b"nothing", r"net\.pth cannot be read as weights"),
])
def test_wrong_files(tmp_path, content, message):
    path = tmp_path / "net.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        find_encoder(path)


def test_what_is_missing_is_named(tmp_path):
    state = dict(vit("vit_nano", img_size=32, patch_size=8).state_dict())
    del state["norm.bias"]
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth does not fit this model\. missing: norm\.bias"):
        find_encoder(tmp_path / "net.pth")


def test_checkpoints_of_another_format(tmp_path):
    torch.save(dict(format=99, version="9.9", recipe=asdict(RECIPE), method={}), tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt has format 99"):
        find_encoder(tmp_path)


# Snapshots

def test_snapshot_steps():
    assert snapshot_steps(1500, 20)[:4] == [0, 4, 17, 37] and len(snapshot_steps(1500, 20)) == 20
    for total in (1, 2, 7, 100):
        for n in (1, 2, 3, 20):
            steps = snapshot_steps(total, n)
            assert steps == sorted(set(steps)) and steps[-1] == total and len(steps) <= n and (n == 1 or steps[0] == 0)
            assert n != 20 or total < 20 or all(a <= b for a, b in zip(gaps(steps), gaps(steps)[1:]))
    assert snapshot_steps(100, 0) == []
    with pytest.raises(ValueError, match="-1 snapshots"):
        snapshot_steps(100, -1)


def gaps(steps):
    return [b - a for a, b in zip(steps, steps[1:])]


@pytest.mark.parametrize("changes", [{}, dict(average=True, teacher="student_copy"), dict(encoder="resnet18"), dict(loss="labels")])
def test_snapshots_come_back(tmp_path, changes):
    "Both networks, halved, in order, in evaluation mode; also those with running statistics."
    seed_everything(0)
    recipe = override(RECIPE, **changes)
    kept = {}
    for step in (1200, 0, 7):
        kept[step] = learnt(recipe).encoders()
        save_snapshot(tmp_path, step, kept[step], recipe)
    found = list(snapshots(tmp_path))
    assert [step for step, _ in found] == [0, 7, 1200]
    for step, nets in found:
        assert list(nets) == list(kept[step]) and not any(net.training for net in nets.values())
        for name, net in nets.items():
            expected = kept[step][name].state_dict()
            assert all(torch.equal(t, expected[key].half().to(t.dtype)) for key, t in net.state_dict().items())
            assert same(encoder(tmp_path / "snapshots" / f"{step:06d}.safetensors", name), net)


def test_snapshots_are_small(tmp_path):
    model = learnt()
    save_snapshot(tmp_path, 3, model.encoders(), RECIPE)
    size = (tmp_path / "snapshots" / "000003.safetensors").stat().st_size
    numbers = sum(t.numel() for net in model.encoders().values() for t in net.state_dict().values())
    assert 2 * numbers < size < 2 * numbers + 20_000


def test_a_snapshot_is_written_once(tmp_path):
    first, second = learnt(), learnt()
    for model in (first, second):
        save_snapshot(tmp_path, 3, model.encoders(), RECIPE)
    kept = dict(snapshots(tmp_path))[3]["student"]
    assert torch.equal(kept.cls_token, first.student.encoder.cls_token.half().float())


def test_forget_snapshots(tmp_path):
    "Later ones go, and what a killed writer left; other files stay."
    forget_snapshots(tmp_path, 3)   # where there are none, nothing happens
    (tmp_path / "snapshots").mkdir()
    for name in ("000000.safetensors", "000003.safetensors", "000004.safetensors", "1000000.safetensors", ".000003.safetensors.77.partial", "mine.safetensors"):
        (tmp_path / "snapshots" / name).touch()
    forget_snapshots(tmp_path, 3)
    assert {path.name for path in (tmp_path / "snapshots").iterdir()} == {"000000.safetensors", "000003.safetensors", "mine.safetensors"}
    forget_snapshots(tmp_path, -1)
    assert {path.name for path in (tmp_path / "snapshots").iterdir()} == {"mine.safetensors"}


def test_no_packed_snapshots(tmp_path):
    with pytest.raises(ValueError, match="shapes_vit_nano.safetensors holds no snapshots: pack"):
        snapshots("shapes_vit_nano")
    with pytest.raises(FileNotFoundError, match="no encoder 'nowhere'"):
        snapshots("nowhere")
    with pytest.raises(FileNotFoundError, match="holds no snapshots"):
        pack_snapshots(tmp_path, tmp_path / "course.safetensors")
    assert not (tmp_path / "course.safetensors").exists()


def test_no_snapshots(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no snapshots: train with"):
        snapshots(tmp_path)


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "rank", lambda: 1)
    save_snapshot(tmp_path, 3, nn.ModuleDict(), RECIPE)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "000009.safetensors").touch()
    forget_snapshots(tmp_path, 3)
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["000009.safetensors"]


def test_several_by_name(tmp_path):
    odd = tmp_path / "lr=0.1.safetensors"   # a path may have an equals sign in it
    odd.write_bytes(asset("shapes_vit_nano.safetensors").read_bytes())
    found = find_encoders(["shapes_vit_nano", "again=shapes_vit_nano", str(odd), f"mine={odd}"])
    assert list(found) == ["shapes_vit_nano", "again", odd.name, "mine"]
    assert all(torch.equal(each.net.cls_token, found["again"].net.cls_token) for each in found.values())
    with pytest.raises(ValueError, match="two encoders are called 'again'"):
        find_encoders(["again=shapes_vit_nano", "again=imagenette_vit_micro"])
    with pytest.raises(FileNotFoundError, match="no encoder 'nowhere'"):
        find_encoders(["mine=nowhere"])
    assert find_encoders([]) == {}
