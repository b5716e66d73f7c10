"""Heads, `Siamese` and the four methods, where a notebook would bore: several steps against a literal transcription, every variant, the authors' names."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dino_edu.augment import MultiCrop, Views
from dino_edu.core import cosine, keys, seed_everything
from dino_edu.loss import Centering, Cosine, CrossEntropy
from dino_edu.methods import METHODS, PLAIN, TWO_VIEWS, DINOHead, Method, Network, Prototypes, Siamese, mlp
from dino_edu.recipe import Recipe, method, override, shapes
from dino_edu.shapes import make
from dino_edu.teacher import KINDS

TINY = override(shapes(), patch_size=8, n_local=2, out_dim=32, hidden=32, bottleneck=16, batch=4, queue=16)


class Mean(nn.Module):
    "An encoder in one line: the mean of every channel, mapped to 12 features."

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 12)

    def forward(self, x):
        return self.layer(x.mean((2, 3)))


def random_views(sizes, batch=4, dtype=torch.float32):
    images = [torch.randn(batch, 3, size, size, dtype=dtype) for size in sizes]
    return Views(images, torch.zeros(len(sizes), batch, 4), torch.zeros(len(sizes), batch, dtype=torch.bool))


def crops(recipe, seed=0):
    pictures, _, _ = make(recipe.batch, seed)
    crop = MultiCrop(32, 16, recipe.n_local, recipe.global_scale, (.25, .6))
    return crop(pictures, torch.full((recipe.batch, 2), 48), keys(seed, 0, torch.arange(recipe.batch)))


# Heads

@pytest.mark.parametrize("bn, names", [(False, ["0", "2", "4"]), (True, ["0", "1", "3", "4", "6"])])
def test_names_of_the_authors_checkpoint(bn, names):
    "The keys of a released full checkpoint, less `module.head.`: linear layers, BatchNorm, and the last layer's two."
    head = DINOHead(24, 40, hidden=32, bottleneck=8, bn=bn)
    learnt = {f"mlp.{n}.{kind}" for n in names for kind in ("weight", "bias")} | {"last_layer.weight_g", "last_layer.weight_v"}
    assert {name for name, _ in head.named_parameters()} == learnt
    assert head.last_layer.weight_g.shape == (40, 1) and head.last_layer.weight_v.shape == (40, 8)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_depth_of_the_head(layers):
    head = DINOHead(24, 40, hidden=32, bottleneck=8, layers=layers)
    assert sum(isinstance(module, nn.Linear) for module in head.mlp) == layers
    assert isinstance(head.mlp[-1], nn.Linear)   # the bottleneck is not squashed
    assert head(torch.randn(3, 24)).shape == (3, 40)


def test_initialisation_of_the_head():
    seed_everything(0)
    head, default = DINOHead(256, 512, hidden=512, bottleneck=64), DINOHead(256, 512, hidden=512, bottleneck=64, std=None)
    for i in (0, 2, 4):
        assert abs(head.mlp[i].weight.std() - .02) < .001 and not head.mlp[i].bias.any()
        bound = default.mlp[i].in_features ** -.5
        assert .99 * bound < default.mlp[i].weight.abs().max() <= bound and default.mlp[i].bias.any()
    for prototypes in (head.last_layer, default.last_layer):
        assert .99 / 8 < prototypes.weight_v.abs().max() <= 1 / 8
        assert (prototypes.weight_g == 1).all()


def test_gain_frozen_or_free():
    frozen, free = Prototypes(8, 5), Prototypes(8, 5, freeze_gain=False)
    assert not frozen.weight_g.requires_grad and free.weight_g.requires_grad
    assert frozen.weight_v.requires_grad


def test_prototypes_against_pytorch():
    "Weight normalisation of PyTorch, in float64: outputs and gradients."
    ours, x = Prototypes(8, 5, freeze_gain=False).double(), torch.randn(7, 8, dtype=torch.float64)
    oracle = nn.utils.parametrizations.weight_norm(nn.Linear(8, 5, bias=False).double())
    gain, direction = oracle.parameters()
    with torch.no_grad():
        gain.copy_(ours.weight_g.uniform_(.5, 2))
        direction.copy_(ours.weight_v)
    for layer in (ours, oracle):
        layer(x).pow(3).sum().backward()
    torch.testing.assert_close(ours(x), oracle(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.weight_g.grad, gain.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.weight_v.grad, direction.grad, rtol=1e-12, atol=1e-12)


def test_head_can_be_copied_after_a_backward_pass():
    head = DINOHead(12, 16, hidden=8, bottleneck=4)
    head(torch.randn(3, 12)).sum().backward()
    other, x = copy.deepcopy(head), torch.randn(3, 12)
    assert torch.equal(head(x), other(x))


# Network

@pytest.mark.parametrize("sizes", [(32, 32, 16, 16, 16), (32, 16, 32), (16,)])
def test_network_keeps_the_order_of_the_views(sizes):
    network, views = Network(Mean(), nn.Linear(12, 7)), random_views(sizes)
    expected = torch.stack([network.head(network.encoder(image)) for image in views.images])
    torch.testing.assert_close(network(views.images), expected)


def test_network_groups_crops_of_one_size():
    network, calls = Network(Mean(), nn.Linear(12, 7)), []
    network.encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    network(random_views((32, 32, 16, 16, 16)).images)
    assert calls == [8, 12]


# Siamese

def test_three_steps_of_dino_by_hand():
    "Student, teacher, center and loss of three steps in float64, spelt out, are those of `Siamese`."
    seed_everything(0)
    model = Siamese(Mean(), DINOHead(12, 16, hidden=8, bottleneck=4, std=None), CrossEntropy(Centering(16)), momentum=.9, momentum_end=1.).double()
    student = copy.deepcopy(model.student)
    teacher, center = copy.deepcopy(student), torch.zeros(16, dtype=torch.float64)
    learning = [p for p in model.parameters() if p.requires_grad]
    ours, by_hand = (torch.optim.SGD(ps, lr=.5) for ps in (learning, [p for p in student.parameters() if p.requires_grad]))
    for i in range(3):
        t, views = i / 3, random_views((32, 32, 16), dtype=torch.float64)
        loss = model(views, t)
        ours.zero_grad()
        loss.backward()
        ours.step()
        model.after_step(t)

        with torch.no_grad():
            said = [teacher.head(teacher.encoder(image)) for image in views.images[:2]]
        terms = []
        for j, target in enumerate(said):
            for v, image in enumerate(views.images):
                if v != j:
                    guess = student.head(student.encoder(image))
                    terms.append(F.cross_entropy(guess / .1, torch.softmax((target - center) / .04, 1)))
        expected = sum(terms) / len(terms)
        by_hand.zero_grad()
        expected.backward()
        by_hand.step()
        keep = cosine(t, .9, 1.)
        for a, b in zip(teacher.parameters(), student.parameters()):
            a.data = keep * a.data + (1 - keep) * b.data
        center = .9 * center + .1 * torch.cat(said).mean(0)
        assert abs(loss - expected).item() < 1e-12
    for a, b in zip(model.student.parameters(), student.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(model.teacher.network.parameters(), teacher.parameters()):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.loss.targets.center, center, rtol=1e-12, atol=1e-12)


def test_predictor_is_on_the_student_side_only():
    class Opposite(nn.Module):
        def forward(self, x):
            return -x

    views = random_views((32, 32))
    plain = Siamese(Mean(), nn.Linear(12, 7), Cosine())
    turned = Siamese(plain.student.encoder, plain.student.head, Cosine(), Opposite())
    torch.testing.assert_close(turned(views, 0.), 4 - plain(views, 0.))   # 2 + 2 cos instead of 2 - 2 cos


def test_teacher_arguments_pass_through():
    model = Siamese(Mean(), nn.Linear(12, 7), Cosine(), kind="previous_epoch", every=3)
    assert (model.teacher.kind, model.teacher.every) == ("previous_epoch", 3)
    with pytest.raises(ValueError, match="future"):
        Siamese(Mean(), nn.Linear(12, 7), Cosine(), kind="future")
    with pytest.raises(TypeError, match="momentun"):
        Siamese(Mean(), nn.Linear(12, 7), Cosine(), momentun=.9)


def test_encoders_and_prototypes():
    head = DINOHead(12, 16, hidden=8, bottleneck=4)
    model = Siamese(Mean(), head, CrossEntropy(Centering(16)))
    assert model.encoders()["student"] is model.student.encoder and model.encoders()["teacher"] is model.teacher.network.encoder
    assert {id(p) for p in model.prototypes()} == {id(head.last_layer.weight_g), id(head.last_layer.weight_v)}
    assert Siamese(Mean(), mlp([12, 7]), Cosine()).prototypes() == []


# The four methods

def test_rows_are_those_of_the_paper():
    "Table 7, rows 1, 7, 8 and 9: momentum, Sinkhorn, multi-crop, loss, predictor."
    def columns(recipe):
        return (recipe.teacher == "momentum", recipe.targets == "sinkhorn", recipe.n_local > 0, recipe.loss, recipe.predictor)
    rows = {name: columns(override(Recipe(), **changes)) for name, changes in METHODS.items()}
    assert rows == dict(
        dino=(True, False, True, "cross_entropy", False),
        byol=(True, False, False, "cosine", True),
        mocov2=(True, False, False, "infonce", False),
        swav=(False, True, True, "cross_entropy", False),
    )


def test_rows_state_their_setting():
    for name in ("byol", "mocov2", "swav"):
        recipe = override(Recipe(), **METHODS[name])
        assert recipe.weight_decay == recipe.weight_decay_end == .05 and recipe.clip is None
        assert PLAIN.items() <= METHODS[name].items()
    for name in ("byol", "mocov2"):
        assert override(Recipe(), **METHODS[name]).global_scale == TWO_VIEWS["global_scale"] == (.14, 1.)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_steps_with_every_teacher(name, kind):
    recipe = override(TINY, **METHODS[name] | dict(teacher=kind))
    seed_everything(0)
    model = method(recipe).train()
    assert isinstance(model, Method)
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in learning} == ({"student", "predictor"} if recipe.predictor else {"student"})
    loss = model(crops(recipe), 0.)
    loss.backward()
    assert loss.shape == () and torch.isfinite(loss)
    assert all(p.grad is not None for p in learning.values())
    assert all(p.grad is None for p in model.teacher.parameters())
    torch.optim.SGD(learning.values(), lr=.1).step()
    model.after_step(0.)
    again = method(recipe)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(crops(recipe), .5), again.train()(crops(recipe), .5))
