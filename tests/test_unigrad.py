"""SimCLR and Barlow Twins as losses of the siamese network: by hand, at their best and worst, and built from a recipe."""
import pytest
import torch

from dino_edu.data import load
from dino_edu.recipe import method, override, shapes
from dino_edu.rows import unigrad
from dino_edu.train import batches, optimizer, train
from dino_edu.unigrad import BatchContrast, Decorrelation, barlow_twins, simclr
from dino_edu.vit import vit

BASE = override(shapes(), steps=3, batch=8, hidden=32, bottleneck=16, patch_size=8)


def test_contrast_of_what_is_found_and_of_what_is_not():
    "Pictures at right angles, both views equal: close to none. All pictures alike: ln of the others."
    loss, views = BatchContrast(0.05), torch.eye(6).expand(2, 6, 6)
    assert loss.compare(views, loss.aim(views)) < 1e-6
    same = torch.ones(2, 6, 6)
    assert loss.compare(same, loss.aim(same)).item() == pytest.approx(torch.tensor(11.0).log().item(), abs=1e-5)


def test_contrast_of_more_views_than_targets():
    loss, views = BatchContrast(), torch.randn(5, 4, 8)
    target, q = loss.aim(views[:2]), torch.nn.functional.normalize(views, dim=-1)
    total = []
    for i in range(5):
        for k in range(2):
            if i != k:
                for b in range(4):
                    keys = [(t, n) for t in range(2) for n in range(4) if (t, n) != (i, b)]
                    scores = torch.stack([q[i, b] @ target[t, n] / 0.2 for t, n in keys])
                    total.append(-scores.log_softmax(0)[keys.index((k, b))])
    assert loss.compare(views, target).item() == pytest.approx(torch.stack(total).mean().item(), rel=1e-5)


def test_decorrelation_at_its_best():
    "Independent coordinates, both views equal: nothing to pay. Equal coordinates: lambda for each pair."
    n = torch.arange(8)
    square = torch.stack([n % 2, n // 2 % 2, n // 4], 1) * 2.0 - 1
    loss, best, worst = Decorrelation(3, 0.5), square.expand(2, 8, 3), square[:, :1].expand(2, 8, 3)
    assert loss.compare(best, loss.aim(best)).item() == pytest.approx(0, abs=1e-6)
    assert loss.compare(worst, loss.aim(worst)).item() == pytest.approx(0.5 * 6 / 3, rel=1e-3)


@pytest.mark.parametrize("row, build, kind", [("simclr", simclr, BatchContrast), ("barlow_twins", barlow_twins, Decorrelation)])
def test_built_from_a_recipe(row, build, kind):
    recipe = override(BASE, **unigrad()[row].changes)
    model = build(recipe, vit("vit_nano", img_size=32, patch_size=8))
    assert isinstance(model.loss, kind) and isinstance(method(recipe).loss, kind)
    losses = [step.loss for step in train(model, batches(load("shapes", n=32)[0], recipe), recipe, 3, optimizer(model, recipe))]
    assert torch.isfinite(torch.stack(losses)).all()
    assert not model.targets(next(batches(load("shapes", n=32)[0], recipe)), 1.0).requires_grad
