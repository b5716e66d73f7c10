"""The vision transformer against timm, and files of weights: every wrapping, and every way in which one can be wrong."""
import argparse
import zipfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from dino_edu.vit import Timm, ViT, attend, attention_weights, backbone, load_weights, pick_network, read_file, resize_positions, vit


def noisy(model):
    "Every parameter random, so that no zero bias hides a mistake."
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def oracle(**options):
    options = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0) | options
    return noisy(timm.models.VisionTransformer(**options))


def small(**options):
    return noisy(ViT(**dict(img_size=32, patch_size=8, width=48, depth=3, heads=3) | options))


def pair(**options):
    theirs, ours = oracle(**options), small()
    load_weights(ours, theirs.state_dict())
    return ours, theirs


# Against timm

@pytest.mark.parametrize("name, patch", [("vit_tiny", 16), ("vit_tiny", 8), ("vit_small", 16)])
def test_timm_native(name, patch):
    theirs = noisy(timm.create_model(f"{name}_patch16_224", patch_size=patch, num_classes=0))
    ours = vit(name, patch_size=patch).eval()
    load_weights(ours, theirs.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    with torch.enable_grad():  # the path that training takes
        assert torch.allclose(ours(x), theirs(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("height, width", [(32, 32), (16, 16), (64, 64), (24, 72), (8, 40)])
def test_timm_other_sizes(height, width):
    ours, theirs = pair(dynamic_img_size=True)
    x = torch.randn(2, 3, height, width)
    assert torch.allclose(ours.tokens(x), theirs.forward_features(x), atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (2, 2), (9, 3)])
def test_resize_positions(grid):
    positions = torch.randn(1, 17, 24)
    assert torch.allclose(resize_positions(positions, *grid), resample_abs_pos_embed(positions, list(grid), num_prefix_tokens=1), atol=1e-6)


def test_positions_that_are_no_square():
    with pytest.raises(ValueError, match="16 positions"):
        resize_positions(torch.randn(1, 16, 8), 2, 2)


def test_timm_layers():
    ours, theirs = pair()
    x = torch.randn(2, 3, 32, 32)
    expected = theirs.get_intermediate_layers(x, n=2, norm=True)
    for mine, patches in zip(ours.layers(x, 2), expected, strict=True):
        assert torch.allclose(mine[:, 1:], patches, atol=1e-5)
    assert torch.equal(ours.layers(x, 3)[-1], ours.tokens(x))
    assert torch.allclose(ours(x), ours.tokens(x)[:, 0], atol=1e-6)   # not bit by bit: the last block is computed for one token only


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -3])
def test_timm_attention(layer):
    ours, theirs = pair()
    block, seen = theirs.blocks[layer].attn, []
    block.fused_attn = False
    block.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(2, 3, 32, 32)
    theirs(x)
    weights = ours.attention(x, layer)
    assert torch.allclose(weights, seen[0], atol=1e-6)
    assert torch.allclose(ours.attention(x, layer, token=5)[:, :, 0], seen[0][:, :, 5], atol=1e-6)


def test_timm_gradients():
    ours, theirs = pair()
    x = torch.randn(2, 3, 32, 32)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, atol=1e-3, rtol=1e-3), name


# Attention

def test_fused_and_plain_attention_agree():
    q, k, v = torch.randn(3, 2, 4, 50, 16, dtype=torch.float64).unbind(0)
    fused = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attend(q, k, v), fused)
    assert torch.allclose(attention_weights(q, k) @ v, fused)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    others = [t.clone().requires_grad_() for t in (q, k, v)]
    plain = attend(*inputs)
    assert torch.allclose(plain, fused) and plain.grad_fn.name() != F.scaled_dot_product_attention(*others).grad_fn.name()
    plain.square().sum().backward()
    F.scaled_dot_product_attention(*others).square().sum().backward()
    assert all(torch.allclose(a.grad, b.grad) for a, b in zip(inputs, others))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attention_on_a_gpu():
    q, k, v = torch.randn(3, 2, 4, 50, 16, device="cuda").unbind(0)
    assert torch.allclose(attend(q.requires_grad_(), k, v), attention_weights(q, k) @ v, atol=1e-3)


def test_keep():
    net, x = small(), torch.randn(2, 3, 32, 32)
    keep = torch.stack([torch.randperm(16)[:6] for _ in range(2)])
    expected = net.embed(x).gather(1, torch.cat([torch.zeros(2, 1, dtype=torch.long), keep + 1], 1)[:, :, None].expand(-1, -1, 48))
    assert torch.equal(net.embed(x, keep), expected)
    assert torch.allclose(net.tokens(x, torch.arange(16).expand(2, -1)), net.tokens(x), atol=1e-6)


@pytest.mark.parametrize("patch", [2, 4, 8, 16])
def test_conv_stem_makes_the_same_grid(patch):
    net = ViT(img_size=32, patch_size=patch, width=32, depth=1, heads=2, stem="conv", in_chans=1)
    assert net.tokens(torch.randn(2, 1, 16, 48)).shape == (2, 1 + 16 * 48 // patch**2, 32)


def test_half_precision_positions():
    net = small().bfloat16()
    assert net(torch.randn(1, 3, 16, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_drop_path_only_in_training():
    net, x = small(drop_path=0.5), torch.randn(8, 3, 32, 32)
    assert torch.equal(net(x), net(x))
    assert [getattr(block.drop_path, "drop_prob", 0) for block in net.blocks] == [0, 0.25, 0.5]
    assert not torch.equal(net.train()(x), net(x))


# Bad arguments

@pytest.mark.parametrize("options, message", [
    (dict(patch_size=5), "patches of 5 do not fill"),
    (dict(heads=5), "5 heads"),
    (dict(stem="linear"), "linear"),
    (dict(patch_size=12, img_size=36, stem="conv"), "power of two"),
    (dict(global_pool="max"), "global_pool is token or avg, not 'max'"),
])
def test_bad_architecture(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("height, width", [(30, 32), (32, 33), (4, 4), (0, 32)])
def test_bad_picture_size(height, width):
    with pytest.raises(ValueError, match=f"{height} x {width} pixels cannot be cut into patches of 8"):
        small()(torch.randn(1, 3, height, width))


def test_bad_layer():
    net, x = small(), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="no layer 3"):
        net.attention(x, 3)
    with pytest.raises(ValueError, match="1 to 3, not 0"):
        net.layers(x, 0)


def test_unknown_backbone():
    with pytest.raises(ValueError, match="vit_huge"):
        vit("vit_huge")
    with pytest.raises(ValueError, match="no_such_net"):
        backbone("no_such_net")


# Files of weights

def prefixed(net, prefix):
    return {prefix + name: value for name, value in net.state_dict().items()}


def authors_checkpoint(teacher, student):
    "Everything that the authors' training script stores, NumPy's learning rates and argparse's namespace included."
    head = {"head.mlp.0.weight": torch.randn(8, 48), "head.last_layer.weight_g": torch.ones(4, 1)}
    return dict(
        student=prefixed(student, "module.backbone.") | {f"module.{name}": value for name, value in head.items()},
        teacher=prefixed(teacher, "backbone.") | head,
        optimizer=dict(state={}, param_groups=[dict(lr=np.float64(5e-4), weight_decay=np.float32(0.04), betas=(0.9, 0.999))]),
        epoch=3, args=argparse.Namespace(arch="vit_small", lr=5e-4, local_crops_scale=(0.05, 0.4)),
        dino_loss=dict(center=torch.zeros(1, 4)), fp16_scaler=dict(scale=65536.0),
    )


def equal(ours, theirs):
    x = torch.randn(1, 3, 32, 32)
    return torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_state_dict_of_timm(tmp_path):
    theirs, ours = oracle(num_classes=10), small()
    for name in ("weights.pth", "weights.safetensors"):
        if name.endswith("pth"):
            torch.save(theirs.state_dict(), tmp_path / name)
        else:
            save_file(theirs.state_dict(), tmp_path / name)
        report = load_weights(ours, tmp_path / name)
        assert set(report.dropped) == {"head.weight", "head.bias"} and set(report.used) == set(ours.state_dict())
        assert torch.allclose(theirs.head(ours(torch.ones(1, 3, 32, 32))), theirs(torch.ones(1, 3, 32, 32)), atol=1e-4)
    assert "weights.safetensors: 42 tensors loaded; dropped head." in str(report)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_full_checkpoint_of_the_authors(tmp_path, which):
    nets, ours = dict(teacher=small(), student=small()), small()
    torch.save(authors_checkpoint(**nets), tmp_path / "checkpoint.pth")
    report = load_weights(ours, tmp_path / "checkpoint.pth", which=which)
    assert equal(ours, nets[which]) and which in report.source
    assert report.dropped == ("head.mlp.0.weight", "head.last_layer.weight_g")


def test_reading_and_picking_are_two_steps(tmp_path):
    "What a file holds, then one network of it under plain names; both say where it is from."
    nets = dict(teacher=small(), student=small())
    torch.save(authors_checkpoint(**nets), tmp_path / "checkpoint.pth")
    stored = read_file(tmp_path / "checkpoint.pth")
    found, origin = pick_network(stored, "student", "mine")
    assert origin == "student of mine" and torch.equal(found["norm.bias"], nets["student"].norm.bias)
    assert set(found) - {"head.mlp.0.weight", "head.last_layer.weight_g"} == set(nets["student"].state_dict())
    assert load_weights(small(), found, origin=origin).source == "student of mine"
    with pytest.raises(ValueError, match="^mine does not fit this model"):
        load_weights(small(stem="conv"), found, origin="mine")


def test_scalars_under_numpy_1s_name(tmp_path):
    "Old files say numpy.core where NumPy 2 says numpy._core."
    net, ours, new, old = small(), small(), tmp_path / "new.pth", tmp_path / "old.pth"
    torch.save(authors_checkpoint(net, net), new)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    load_weights(ours, old)
    assert equal(ours, net)


@pytest.mark.parametrize("wrap", [
    lambda net: net.state_dict(),
    lambda net: dict(model=net.state_dict(), epoch=3),
    lambda net: dict(state_dict=prefixed(net, "module.")),
    lambda net: prefixed(net, "_orig_mod."),
    lambda net: prefixed(net, "module.backbone."),
])
def test_other_wrappings(wrap):
    net, ours = small(), small()
    report = load_weights(ours, wrap(net))
    assert equal(ours, net) and not report.dropped and not report.resized


def test_our_own_encoder_in_half_precision(tmp_path):
    net, ours = small(stem="conv"), small(stem="conv")
    save_file({name: value.half() for name, value in net.state_dict().items()}, tmp_path / "encoder.safetensors", dict(recipe="{}"))
    load_weights(ours, tmp_path / "encoder.safetensors")
    assert ours.pos_embed.dtype == torch.float32 and torch.equal(ours.pos_embed, net.pos_embed.half().float())


def test_other_backbones(tmp_path):
    theirs, ours = timm.create_model("resnet18", pretrained=False, num_classes=7), backbone("resnet18")
    report = load_weights(ours, theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert isinstance(ours, Timm) and report.dropped == ("fc.weight", "fc.bias")
    assert torch.allclose(theirs.eval().fc(ours.eval()(x)), theirs(x), atol=1e-5)
    again = backbone("resnet18")
    load_weights(again, ours.state_dict())
    assert torch.equal(again.eval()(x), ours(x))


def test_resized_positions_are_asked_for_and_reported():
    net, larger = small(), small(img_size=64)
    with pytest.raises(ValueError, match=r"pos_embed is \[1, 17, 48\] in the file, \[1, 65, 48\] in the model; resize=True"):
        load_weights(larger, net.state_dict())
    report = load_weights(larger, net.state_dict(), resize=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(larger(x), net(x), atol=1e-5)
    assert report.resized == ("pos_embed from 4 x 4 to 8 x 8 patches",) and "4 x 4 to 8 x 8" in str(report)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("norm.bias"), "missing: norm.bias"),
    (lambda s: s.update(dist_token=torch.zeros(1)), "unexpected: dist_token"),
    (lambda s: s.update({"norm.weight": torch.zeros(7)}), r"norm.weight is \[7\] in the file, \[48\] in the model"),
    (lambda s: s.clear(), "missing: cls_token, pos_embed, patch_embed.proj.weight, patch_embed.proj.bias and 38 more"),
    (lambda s: s.update({"module.norm.bias": torch.zeros(48)}), "several networks"),
    (lambda s: s.update(epoch=3), "no tensors under epoch"),
])
def test_what_does_not_fit_changes_nothing(change, message):
    net, ours = small(), small()
    state, before = dict(net.state_dict()), {name: value.clone() for name, value in ours.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        load_weights(ours, state)
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


def test_another_architecture_is_named():
    with pytest.raises(ValueError, match="missing: .*unexpected: "):
        load_weights(small(), backbone("resnet18").state_dict())


def test_checkpoint_without_that_network():
    with pytest.raises(ValueError, match="no 'teacher': it holds student"):
        load_weights(small(), dict(student={}, epoch=1))


class Rogue:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_broken_files(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken{suffix} cannot be read as weights"):
        load_weights(small(), path)


def test_truncated_file(tmp_path):
    torch.save(small().state_dict(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="half.pth cannot be read as weights; is it complete"):
        load_weights(small(), tmp_path / "half.pth")


def test_nothing_else_is_unpickled(tmp_path, capsys):
    torch.save(dict(teacher=Rogue()), tmp_path / "rogue.pth")
    with pytest.raises(ValueError, match="rogue.pth cannot be read"):
        load_weights(small(), tmp_path / "rogue.pth")
    assert "unpickled" not in capsys.readouterr().out


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_weights(small(), tmp_path / "nowhere.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth holds a list"):
        load_weights(small(), tmp_path / "list.pth")
