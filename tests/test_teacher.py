"""The teacher: what it must not share with the student, what it must remember, and what it refuses."""
import copy

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from dino_edu.teacher import KINDS, Teacher, frozen, move
from dino_edu.vit import ViT

every_kind = pytest.mark.parametrize("kind", KINDS)


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 2))


def run(student, teacher, first, last, total=12):
    "Steps `first` to `last` - 1 with chance that depends on the step only: teacher forward, student moves, teacher follows."
    for n in range(first, last):
        chance = torch.Generator().manual_seed(n)
        teacher(torch.randn(16, 4, generator=chance))
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn(p.shape, generator=chance), alpha=0.1)
        teacher.follow(student, (n + 1) / total)


@every_kind
def test_resumes_to_the_bit(kind):
    "A state_dict holds everything: interrupted at an awkward step (7 of an epoch of 5), the rest is the same."
    student = network()
    again = copy.deepcopy(student)
    straight = Teacher(student, kind, momentum=0.8, every=5)
    run(student, straight, 0, 12)

    interrupted = Teacher(again, kind, momentum=0.8, every=5)
    run(again, interrupted, 0, 7)
    resumed = Teacher(network(), kind, momentum=0.8, every=5)
    resumed.load_state_dict(interrupted.state_dict())
    run(again, resumed, 7, 12)
    a, b = straight.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@every_kind
def test_shares_nothing_and_takes_no_gradient(kind):
    student = network()
    teacher = Teacher(student, kind)
    x = torch.randn(16, 4, requires_grad=True)
    assert not teacher(x).requires_grad and student(x).requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    (student(x) - teacher(x)).square().sum().backward()
    assert all(p.grad is None for p in teacher.parameters()) and all(p.grad is not None for p in student.parameters())
    assert not {p.data_ptr() for p in student.state_dict().values()} & {p.data_ptr() for p in teacher.state_dict().values()}


@every_kind
def test_follows_parameters_but_not_batchnorm_statistics(kind):
    student = network()
    teacher = Teacher(student, kind, momentum=0.5, momentum_end=0.5)
    student(100 + torch.randn(64, 4))
    buffers = {name: b.clone() for name, b in teacher.network.named_buffers()}
    for _ in range(3):
        with torch.no_grad():
            student[0].weight += 1
        teacher.follow(student, 0.5)
    assert all(torch.equal(buffers[name], b) for name, b in teacher.network.named_buffers())
    assert (teacher.network[0].weight - student[0].weight).abs().max() < 1.5
    assert not torch.equal(teacher.network[1].running_mean, student[1].running_mean)


def test_kinds_that_should_coincide():
    student = network()
    copying, epochs_of_one = Teacher(student, "student_copy"), Teacher(student, "previous_epoch", every=1)
    no_memory, all_memory = Teacher(student, momentum=0.0, momentum_end=0.0), Teacher(student, momentum=1.0, momentum_end=1.0)
    start = student[0].weight.detach().clone()
    with torch.no_grad():
        student[0].weight.normal_()
    for teacher in (copying, epochs_of_one, no_memory, all_memory):
        teacher.follow(student, 0.3)
    assert all(torch.equal(t.network[0].weight, student[0].weight) for t in (copying, epochs_of_one, no_memory))
    assert torch.equal(all_memory.network[0].weight, start)


def test_frozen_vit_drops_no_paths():
    torch.manual_seed(0)
    student = ViT(img_size=16, patch_size=8, width=16, depth=3, heads=2, drop_path=0.5).train()
    teacher, x = frozen(student), torch.randn(8, 3, 16, 16)
    assert torch.equal(teacher(x), teacher(x)) and not torch.equal(student(x), student(x))
    assert torch.allclose(teacher(x), student.eval()(x), atol=1e-5)
    assert max(m.drop_prob for m in student.modules() if isinstance(m, DropPath)) == 0.5   # the student's are untouched


def test_frozen_switches_dropout_off_and_keeps_tied_weights_tied():
    student = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).train()
    student[2].weight = student[0].weight
    teacher, x = frozen(student), torch.randn(8, 4)
    assert torch.equal(teacher(x), teacher(x)) and student[1].p == 0.5
    assert teacher[2].weight is teacher[0].weight
    with torch.no_grad():
        student[0].weight += 1
    move(teacher, student, keep=0.75)
    assert torch.allclose(teacher[0].weight, student[0].weight - 0.75)   # moved once, not twice


def test_refuses():
    with pytest.raises(ValueError, match="'sister' is not one of momentum, student_copy"):
        Teacher(network(), "sister")
    with pytest.raises(ValueError, match="every 0"):
        Teacher(network(), "previous_epoch", every=0)
