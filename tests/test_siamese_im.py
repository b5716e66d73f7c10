"""Siamese Image Modeling and the masked autoencoder: geometry by pixels, masks by the number, what is hidden, who learns, what is refused."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dino_edu.augment import MultiCrop, Views, resample
from dino_edu.core import seed_everything
from dino_edu.data import Pictures, load
from dino_edu.dense import compare_outlines, localise, mean_iou, outlines, patch_labels, patch_tokens, read_patches, relative_places, scene_patches
from dino_edu.recipe import imagenet_siamese_im, method, override, shapes
from dino_edu.rows import siamese
from dino_edu.segment import Scene
from dino_edu.siamese_im import (
    MaskedAutoencoder, SiameseIM, Tokens, UniGrad, blocks, hide, mask_blocks, mask_patches, masked_autoencoder, patch_pixels, positions, relative,
    siamese_im, visible,
)
from dino_edu.train import batches, optimizer, train
from dino_edu.vit import Timm, vit

BASE = override(shapes(), steps=3, evaluations=1, batch=8)


def recipe_of(row, **more):
    return override(BASE, **siamese(BASE)[row].changes | more)


def views_of(recipe, n=8, seed=0):
    pictures = load("shapes", n=n)[0]
    return next(batches(pictures, override(recipe, batch=n), seed))


# Geometry

def test_places_by_pixels():
    "A picture whose pixels hold their own coordinates, cut and flipped by `resample`: what a patch of the second view shows stands at its place in the first."
    size, n = 64, 200
    chance = torch.Generator().manual_seed(0)
    length = 16 + (32 * torch.rand(2, n, 2, generator=chance)).round()
    start = ((size - length) * torch.rand(2, n, 2, generator=chance)).round()
    boxes, flips = torch.cat([start, length], -1), torch.rand(2, n, generator=chance) < 0.5
    line = (torch.arange(size) + 0.5) / size
    coordinates = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(n, 2, size, size)
    first, second = resample(coordinates, boxes, 32, flips)
    patch_of = [F.avg_pool2d(view, 4).flatten(2).transpose(1, 2) * size for view in (first, second)]   # pixel coordinates of the middle of each patch
    wanted = relative_places(boxes, flips, 8)
    corner, other = patch_of[0][:, 9], patch_of[0][:, 54]   # patches (1, 1) and (6, 6): away from the border, where a resampled line bends
    found = 1 + 5 * (patch_of[1] - corner[:, None]) / (other - corner)[:, None]
    inner = torch.arange(64).view(8, 8)[1:7, 1:7].flatten()
    assert (found - wanted)[:, inner].abs().max() < 0.02


def test_two_flips_are_none():
    boxes = torch.rand(2, 20, 4, generator=torch.Generator().manual_seed(1)) * 10 + 10
    both, none = (Views([], boxes, torch.full((2, 20), flip)) for flip in (True, False))
    a, b = relative(both, 8).unflatten(1, (8, 8)), relative(none, 8).unflatten(1, (8, 8))
    assert torch.allclose(a[..., 0], b[..., 0], atol=1e-4) and torch.allclose(a[..., 1], 7 - b.flip(2)[..., 1], atol=1e-4)   # mirrored as a whole


def test_what_is_not_known():
    views = views_of(recipe_of("siamese_im"))
    pair = Views([], views.boxes[:2], views.flips[:2])
    full, shift, none = (relative(pair, 8, known) for known in ("full", "shift", "none"))
    assert torch.equal(full[..., :2], shift[..., :2]) and full[..., 2:].abs().max() > 0 == shift[..., 2:].abs().max()
    assert none.shape == full.shape and not none.any()


# Masks

@pytest.mark.parametrize("grid, share", [(14, 0.6), (14, 0.75), (8, 0.4), (8, 0.6), (3, 0.5)])
def test_masks_are_exact_and_differ(grid, share):
    hidden = round(share * grid**2)
    for mask in (mask_blocks(64, grid, hidden), mask_patches(64, grid, hidden)):
        assert mask.dtype == torch.bool and (mask.sum(1) == hidden).all()
        assert len(mask.unique(dim=0)) > 32
        assert visible(mask).shape == (64, grid**2 - hidden) and (visible(mask).diff(dim=1) > 0).all()


def test_rectangles_hang_together():
    "Hidden patches have more hidden neighbours than single ones do."
    def together(mask):
        m = mask.view(-1, 14, 14).float()
        return (m[:, 1:] * m[:, :-1]).mean() + (m[:, :, 1:] * m[:, :, :-1]).mean()
    seed_everything(0)
    assert together(mask_blocks(200, 14, 118)) > 1.2 * together(mask_patches(200, 14, 118))


def test_every_place_is_hidden_sometimes():
    seed_everything(0)
    share = mask_blocks(4000, 8, 26).float().mean(0).view(8, 8)
    assert 0.05 < share.min() and share.max() < 0.75
    assert (share - share.T).abs().max() < 0.05 and (share - share.flip(0, 1)).abs().max() < 0.05   # no side before another


@pytest.mark.parametrize("row", ["siamese_im", "as_published", "mae"])
def test_what_is_hidden_does_not_count(row):
    recipe = recipe_of(row)
    seed_everything(0)
    model, views = method(recipe).eval(), views_of(recipe)
    hidden = hide(recipe.mask, recipe.mask_blocks, views, model.student.encoder)
    holes = hidden.view(-1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    painted = Views([torch.where(holes, 5.0, views.images[0]), *views.images[1:]], views.boxes, views.flips)
    def predicted(views):
        return model.predictions(views.images[0] if row == "mae" else views, visible(hidden))
    with torch.no_grad():
        assert torch.equal(predicted(views), predicted(painted))


# The loss

def test_unigrad_is_watched():
    loss = UniGrad(0.1)
    z = loss.aim(torch.randn(1, 8, 16, 12))
    loss.compare(0.5 * z, z)
    assert loss.seen == {}
    loss.watch = True
    value, seen = loss.compare(0.5 * z, z), loss.seen
    assert seen["distance"] + seen["penalty"] == pytest.approx(value.item(), rel=1e-5) and seen["cosine"] == pytest.approx(1, abs=1e-5)
    assert 8 < seen["target_rank"] <= 11 + 1e-3   # LayerNorm has taken one of twelve directions
    same = z[:, :, :1].expand_as(z)[:, :1]
    loss.compare(same, same)
    assert loss.seen["target_rank"] == pytest.approx(1, abs=1e-3) and loss.seen["largest_share"] == pytest.approx(1, abs=1e-5)


# Methods

@pytest.mark.parametrize("row, kind", [("siamese_im", SiameseIM), ("mae", MaskedAutoencoder)])
def test_the_teacher_is_an_average_without_gradient(row, kind):
    recipe = recipe_of(row, momentum=0.9, momentum_end=0.9)
    seed_everything(0)
    model, pictures = method(recipe), load("shapes", n=32)[0]
    assert isinstance(model, kind)
    by_hand = [p.detach().clone() for p in model.student.parameters()]
    for _ in train(model, batches(pictures, recipe), recipe, 3, optimizer(model, recipe)):
        by_hand = [0.9 * old + 0.1 * new.detach() for old, new in zip(by_hand, model.student.parameters())]
        assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert all(torch.allclose(p, expected, atol=1e-6) for p, expected in zip(model.teacher.network.parameters(), by_hand))
    assert not model.targets(views_of(recipe), 1.0).requires_grad and model.prototypes() == []


def test_what_is_fixed_stays(tmp_path):
    seed_everything(0)
    recipe = recipe_of("as_published")
    model, pictures = method(recipe), load("shapes", n=32)[0]
    net = model.student.encoder
    before = net.patch_embed.proj.weight.clone(), net.pos_embed.clone(), net.blocks[0].attn.qkv.weight.clone()
    assert torch.allclose(net.pos_embed[0, 1:], positions(torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)), 64))
    list(train(model, batches(pictures, recipe), recipe, 3, optimizer(model, recipe)))
    after = net.patch_embed.proj.weight, net.pos_embed, net.blocks[0].attn.qkv.weight
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True, True, False]


def test_the_other_view_and_the_same():
    "What is asked for: the patches of the second view, or of the first; one by one, or their mean."
    views = views_of(recipe_of("siamese_im"))
    def asked(row):
        seed_everything(0)
        model = method(recipe_of(row)).eval()
        return model, model.targets(views, 1.0)
    (model, other), (_, own), (_, pooled) = asked("siamese_im"), asked("same_view"), asked("pooled")
    for image, target in ((views.images[1], other), (views.images[0], own)):
        found = model.teacher(image)[:, 1:]
        assert torch.allclose(target[0], F.layer_norm(found, found.shape[-1:]), atol=1e-5)
    assert pooled.shape == (1, 8, 1, 64) and own.shape == (1, 8, 64, 64)


def test_place_matters_unless_it_is_not_told():
    views = views_of(recipe_of("siamese_im"))
    moved = Views(views.images, views.boxes.roll(1, 1), views.flips.roll(1, 1))
    keep = visible(torch.zeros(8, 64, dtype=torch.bool))
    for row, told in (("siamese_im", True), ("no_place", False)):
        seed_everything(0)
        model = method(recipe_of(row)).eval()
        with torch.no_grad():
            assert torch.equal(model.predictions(views, keep), model.predictions(moved, keep)) != told


def test_the_autoencoder_pays_for_hidden_patches_only():
    seed_everything(0)
    recipe = recipe_of("mae")
    model, views = masked_autoencoder(recipe, vit("vit_nano", img_size=32, patch_size=4)).eval(), views_of(recipe)
    seed_everything(1)
    value = model(views, 0.5)
    seed_everything(1)
    hidden = [hide(0.75, False, views, model.student.encoder) for _ in range(2)]
    errors = []
    for image, mask in zip(views.images, hidden):
        wrong = model.predictions(image, visible(mask)) - patch_pixels(image, 4)
        errors += [wrong[b, k].square().mean() for b, k in mask.nonzero()]
    assert value.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_parts_of_a_batch():
    "What is asked is that of the whole batch; without BatchNorm and masks the loss is too, up to the matrix of each part."
    recipe = recipe_of("siamese_im", mask=0.0, penalty=0.0)
    seed_everything(0)
    model, views = method(recipe), views_of(recipe)
    whole = model.targets(views, 0.5)
    assert torch.allclose(model.targets(views, 0.5, parts=4), whole, atol=1e-5)
    shares = [model(part, 0.5, target) for part, target in zip(views.split(4), whole.chunk(4, 1))]
    assert model(views, 0.5).item() == pytest.approx(torch.stack(shares).mean().item(), rel=1e-5)


# What is refused

@pytest.mark.parametrize("make, message", [
    (lambda: Tokens(vit("vit_nano", img_size=32, patch_size=4, stem="conv")), "stem='patch'"),
    (lambda: Tokens(Timm("resnet10t")), "stem='patch'"),
    (lambda: blocks(1, 8, 2, "group"), "token_norm 'group'"),
    (lambda: method(recipe_of("siamese_im", relative="scale")), "relative 'scale' is not one of full, shift, none"),
    (lambda: method(recipe_of("mae", mask=0.0)), "between 0 and 1, not 0.0"),
    (lambda: siamese_im(recipe_of("siamese_im", decoder_heads=5), vit("vit_nano", img_size=32, patch_size=4)), "5 heads do not divide"),
])
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The paper's size

def test_the_papers_run():
    "Its shapes: 118 of 196 patches hidden, 275 tokens in the decoder, 768 numbers each; and its rate, momentum and penalty."
    recipe = imagenet_siamese_im()
    model = method(recipe)
    assert model.student.encoder.embed_dim == model.student.widen.out_features == 768 and len(model.student.encoder.blocks) == 12
    assert len(model.decoder) == 4 and not model.student.encoder.patch_embed.proj.weight.requires_grad
    assert round(recipe.mask * 14**2) == 118 and recipe.lr * recipe.batch / 256 == pytest.approx(1e-3) and recipe.warmup * recipe.epochs == 40
    assert (recipe.momentum, recipe.penalty, recipe.clip, recipe.weight_decay, recipe.token_norm, recipe.n_local) == (0.995, 0.02, 1.0, 0.05, "batch", 0)


# What patches know

def test_no_patches_no_masks():
    pictures = load("shapes", n=4)[0]
    with pytest.raises(ValueError, match="Timm has no features of patches"):
        patch_tokens(Timm("resnet10t"), pictures, 32)
    with pytest.raises(ValueError, match="labelled by masks and classes"):
        patch_labels(replace(pictures, masks=None), 32, 4)


def test_readers_find_what_is_there():
    "Patches whose vector is their class, up to noise: all right; vectors of noise: no better than one in three."
    chance = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (40, 16), generator=chance)
    told = F.one_hot(labels, 3).float() + 0.1 * torch.randn(40, 16, 3, generator=chance)
    noise = torch.randn(40, 16, 3, generator=chance)
    good, bad = (read_patches((z[:30], labels[:30]), (z[30:], labels[30:])) for z in (told, noise))
    assert min(good.values()) > 97 and max(bad["patch_linear"], bad["patch_knn"]) < 40
    assert mean_iou(labels, labels) == 100


def test_a_network_that_knows_the_place():
    "An oracle whose patches are the coordinates that the picture's pixels hold finds all places that can be found."
    class Oracle(torch.nn.Module):
        patch_size = 4
        def tokens(self, x):
            y, x = F.avg_pool2d(x[:, :2], 4).flatten(2).transpose(1, 2).unbind(-1)
            y, x = (4 * (v - v.amin()) / (v.amax() - v.amin()) for v in (y, x))   # angles, in this batch's own units
            rows = torch.stack([y.cos(), y.sin(), x.cos(), x.sin()], -1)
            return torch.cat([rows[:, :1], rows], 1)
    line = torch.arange(48, dtype=torch.uint8) * 5
    pictures = Pictures.stack(torch.stack([*torch.meshgrid(line, line, indexing="ij"), 0 * line.expand(48, 48)]).repeat(64, 1, 1, 1))
    plain = MultiCrop(global_size=32, n_local=0, global_scale=(0.3, 1.0), jitter_p=0.0, grey_p=0.0, solarize_p=0.0, blur_p=(0.0, 0.0, 0.0))
    found = localise(Oracle(), pictures, plain)
    assert found["localised"] > 99 and found["by_chance"] < 10 < found["by_place"] < 60


def test_views_are_those_of_the_seed():
    net, pictures = vit("vit_nano", img_size=32, patch_size=4).eval(), load("shapes", n=32)[0]
    augment = MultiCrop(global_size=32, n_local=0)
    assert localise(net, pictures, augment, seed=1) == localise(net, pictures, augment, seed=1) != localise(net, pictures, augment, seed=2)


class Colours(torch.nn.Module):
    "A patch's vector is its mean colour, the class token nothing."
    patch_size = 4

    def tokens(self, x):
        colours = F.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        return torch.cat([torch.zeros_like(colours[:, :1]), colours], 1)


def films(inside_out=lambda film: False):
    "Six films of three frames: a red square of four patches that moves on grey; or the square grey, and all around it red."
    chance, found = torch.Generator().manual_seed(0), []
    for film in range(6):
        for frame in range(3):
            top, left = (4 * torch.randint(0, 5, (2,), generator=chance)).tolist()
            image, mask = torch.randint(90, 110, (3, 32, 32), generator=chance, dtype=torch.uint8), torch.zeros(1, 32, 32)
            mask[:, top:top + 8, left + 4 * frame:left + 4 * frame + 8] = 1
            image[0, (mask[0] > 0) != inside_out(film)] = 250
            found.append(Scene(image, mask, str(film), f"{film}/{frame}"))
    return found


def test_outlines_of_what_colour_tells():
    found = outlines(Colours(), films())
    assert found["linear"].min() > 90 and found["knn"].min() > 90


def test_outlines_are_learnt_from_other_films():
    "Every second film is inside out, and dealt into the other fold: what was learnt elsewhere is wrong."
    unlike = outlines(Colours(), films(lambda film: film % 2 == 1), folds=2)
    assert unlike["linear"].max() < 15 and unlike["knn"].max() < 15


def test_outlines_by_hand():
    "Every overlap, at every share of votes, from counts; the share is chosen by the other films."
    scenes = films()
    encoder = Colours()
    vectors, truth = zip(*scene_patches(encoder, scenes))
    table = []
    for i in range(len(scenes)):
        others = [j for j in range(len(scenes)) if scenes[j].group != scenes[i].group]
        z, labels = F.normalize(torch.cat([vectors[j] for j in others]), dim=1), torch.cat([truth[j] for j in others])
        near = (F.normalize(vectors[i], dim=1) @ z.T).topk(20)
        weight = (near.values / 0.07).exp()
        share = (weight * labels[near.indices]).sum(1) / weight.sum(1)
        line = []
        for percent in range(5, 100, 5):
            called = [float(s) >= percent / 100 for s in share]
            both = sum(c and bool(t) for c, t in zip(called, truth[i]))
            line.append(both / sum(c or bool(t) for c, t in zip(called, truth[i])))
        table.append(line)
    wanted = []
    for i in range(len(scenes)):
        other = [table[j] for j in range(len(scenes)) if scenes[j].group != scenes[i].group]
        best = max(range(19), key=lambda c: (round(sum(line[c] for line in other), 9), -c))
        wanted.append(100 * table[i][best])
    assert torch.allclose(outlines(encoder, scenes, folds=6)["knn"], torch.tensor(wanted), atol=1e-3)


def test_comparing_outlines_pairs_films():
    blind = Colours()
    blind.tokens = lambda x: Colours.tokens(blind, x) * 0 + torch.randn(x.shape[0], 65, 3, generator=torch.Generator().manual_seed(0))
    scenes = films()
    scenes.append(Scene(scenes[0].image, torch.zeros(1, 32, 32), "0", "nothing to be found"))
    found = compare_outlines(dict(sees=[Colours()], blind=[blind, blind]), scenes)
    assert set(found) == {f"{how}_{name}" for how in ("linear", "knn") for name in ("sees", "blind", "less_blind")}
    assert found["linear_less_blind"].low > 50 and found["linear_less_blind"].n == 6
    assert found["knn_less_blind"].mean == pytest.approx(found["knn_sees"].mean - found["knn_blind"].mean, abs=1e-3)
    with pytest.raises(ValueError, match="to learn by: there is only one group"):
        outlines(Colours(), scenes[:3])
