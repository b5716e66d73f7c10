"""The losses: against a double loop in many shapes, resumed, accumulated, shared between two processes, and at their limits."""
import copy

import pytest
import torch

from dino_edu.core import full_precision, log_softmax, rank, world_size
from dino_edu.loss import Centering, Cosine, CrossEntropy, InfoNCE, Sinkhorn, sinkhorn

K = 12
LOSSES = dict(
    centering=lambda: CrossEntropy(Centering(K)),
    sinkhorn=lambda: CrossEntropy(Sinkhorn(3), teacher_temperature=0.05, warmup_temperature=0.05),
    softmax_batch=lambda: CrossEntropy(Sinkhorn(1)),
    cosine=lambda: Cosine(),
    cosine_centered=lambda: Cosine(Centering(K)),
    infonce=lambda: InfoNCE(K, queue=32),   # two steps of 2 x 8 outputs, so that a step never leaves the queue by halves
)
every_loss = pytest.mark.parametrize("name", LOSSES)


def make(name, seed=0):
    torch.manual_seed(seed)
    return LOSSES[name]().double()


def outputs(step, views=4, n=8):
    "Student and teacher outputs of a step, the same wherever they are asked for: `[V, n, K]` and `[2, n, K]`."
    chance = torch.Generator().manual_seed(step)
    return torch.randn(views, n, K, generator=chance, dtype=torch.float64), torch.randn(2, n, K, generator=chance, dtype=torch.float64)


def sorted_queue(state):
    "A queue's rows in the order of their first number: the order within a step means nothing to a sum over the queue."
    return {name: x[x[:, 0].argsort()] if name == "queue" else x for name, x in state.items()}


def same_state(a, b, **tolerance):
    return a.keys() == b.keys() and all(torch.allclose(a[k].double(), b[k].double(), **tolerance) for k in a)


# Against a double loop

def algorithm_1(student, teacher, center, tau_t, tau_s):
    total, terms = 0, 0
    for i in range(len(teacher)):
        for j in range(len(student)):
            if i != j:
                p = torch.softmax((teacher[i] - center) / tau_t, 1)
                total, terms = total - (p * torch.log(torch.softmax(student[j] / tau_s, 1))).sum(1).mean(), terms + 1
    assert terms == len(teacher) * (len(student) - 1)
    return total / terms


@pytest.mark.parametrize("T, V", [(1, 2), (2, 2), (2, 3), (2, 10), (3, 3)])
def test_cross_entropy_is_algorithm_1(T, V):
    student = torch.randn(V, 5, K, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(T, 5, K, dtype=torch.float64, requires_grad=True)
    loss_of = CrossEntropy(Centering(K), student_temperature=0.2, teacher_temperature=0.07, warmup_temperature=0.04, warmup=0.5).double()
    loss_of.targets.center.normal_()
    for t, tau in ((0.0, 0.04), (0.25, 0.055), (0.5, 0.07), (1.0, 0.07)):
        assert abs(loss_of.temperature(t) - tau) < 1e-12
        loss, expected = loss_of(student, teacher, t), algorithm_1(student, teacher.detach(), loss_of.targets.center, tau, 0.2)
        assert torch.allclose(loss, expected, rtol=1e-12)
        assert torch.allclose(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)), atol=1e-12)
    assert torch.autograd.grad(loss_of(student, teacher), teacher, allow_unused=True) == (None,)


@every_loss
def test_no_view_predicts_itself(name):
    "One global view: the student's own version of it has no part in the loss; with two, it has."
    student, teacher = outputs(0)
    student.requires_grad_()
    alone, = torch.autograd.grad(make(name)(student, teacher[:1]), student)
    both, = torch.autograd.grad(make(name)(student, teacher), student)
    assert not alone[0].any() and alone[1:].any(-1).all() and both.any(-1).all()


@every_loss
def test_takes_half_precision_and_says_float32(name):
    student, teacher = (x.bfloat16() for x in outputs(0))
    loss = make(name).float()(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, make(name).float()(student.float(), teacher.float()))


@every_loss
def test_autocast_does_not_reach_the_loss(name):
    student, teacher = (x.float() for x in outputs(0))
    plain = make(name).float()(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(make(name).float()(student, teacher), plain)


@every_loss
def test_refuses_views_without_pairs(name):
    student, teacher = outputs(0)
    with pytest.raises(ValueError, match="1 student and 1 teacher views make no pairs"):
        make(name)(student[:1], teacher[:1])
    with pytest.raises(ValueError, match="1 student and 2 teacher views make no pairs"):
        make(name)(student[:1], teacher)
    with pytest.raises(ValueError, match="3 student and 4 teacher"):
        make(name)(student[:3], student)


# State

@every_loss
def test_resumes_to_the_bit(name):
    straight, interrupted = make(name), make(name)
    for step in range(3):
        for loss_of in (straight, interrupted):
            loss_of(*outputs(step))
            loss_of.after_step()
    resumed = make(name, seed=1)
    resumed.load_state_dict(copy.deepcopy(interrupted.state_dict()))
    for step in range(3, 6):
        assert torch.equal(straight(*outputs(step)), resumed(*outputs(step)))
        straight.after_step()
        resumed.after_step()
    assert same_state(straight.state_dict(), resumed.state_dict(), rtol=0, atol=0)


@every_loss
def test_evaluation_leaves_no_trace(name):
    loss_of = make(name)
    loss_of.after_step()                 # nothing seen yet: nothing to do
    loss_of.eval()
    loss_of(*outputs(0))
    loss_of.train().after_step()
    assert same_state(loss_of.state_dict(), make(name).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["centering", "cosine", "cosine_centered", "infonce"])
def test_accumulation_is_the_whole_batch(name):
    "Several forwards, one step: the mean of the parts' losses, and the state after it, are those of the whole batch."
    whole, parts = make(name), make(name)
    for step in range(3):
        student, teacher = outputs(step)
        loss = torch.stack([parts(s, t) for s, t in zip(student.split(2, 1), teacher.split(2, 1))]).mean()
        assert torch.allclose(loss, whole(student, teacher), rtol=1e-12)
        whole.after_step()
        parts.after_step()
    assert same_state(sorted_queue(whole.state_dict()), sorted_queue(parts.state_dict()), atol=1e-12)


# Many prototypes

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_slices_change_neither_value_nor_gradient(dtype, tolerance, rows, monkeypatch):
    "Against the plain expression in float64, for any size of slice, with a factor on the loss."
    torch.manual_seed(0)
    student, target = torch.randn(5, 7, K).to(dtype), torch.softmax(torch.randn(2, 7, K, dtype=torch.float64) * 5, -1)
    monkeypatch.setattr("dino_edu.loss._rows", lambda _: rows)
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    log_p = log_softmax(exact, 0.1)
    expected = -(target * (log_p.sum(0) - log_p[:2])).sum(-1).mean() / 4
    found = CrossEntropy(Centering(K)).compare(ours, full_precision(target.to(dtype)))
    assert torch.isclose(found.double(), expected, rtol=tolerance)
    (3 * found).backward()
    (3 * expected).backward()
    assert ours.grad.dtype == dtype and torch.allclose(ours.grad.double(), exact.grad, atol=tolerance * exact.grad.abs().max())


def test_gradient_by_differences():
    torch.manual_seed(0)
    student, target = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True), torch.rand(2, 3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: CrossEntropy(Centering(6)).compare(s, target), student)


# Limits

def test_sinkhorn_survives_what_underflows():
    "Rows and columns far below the largest logit, against Sinkhorn-Knopp on logarithms all the way."
    torch.manual_seed(0)
    logits = torch.randn(30, K, dtype=torch.float64) * 10
    logits[3] -= 500
    logits[:, 5] -= 500
    x = logits / 0.04
    for _ in range(3):
        x = x - torch.logsumexp(x, 0)
        x = x - torch.logsumexp(x, 1, keepdim=True)
    assert torch.allclose(sinkhorn(logits, 0.04), x.exp(), atol=1e-12)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        p = sinkhorn(logits.to(dtype), 0.04)
        assert torch.isfinite(p).all() and torch.allclose(p.sum(1), torch.ones(30), atol=1e-5)


def test_sinkhorn_refuses_no_iterations():
    with pytest.raises(ValueError, match="not 0"):
        sinkhorn(torch.randn(4, K), 0.1, iterations=0)


# Two processes

STEPS = 3


def steps_of(name):
    "Losses, what is seen, and the state at the end, on this rank's share of the pictures (every second one of two ranks)."
    loss_of, losses, seen = make(name), [], []
    loss_of.watch = True
    for step in range(STEPS):
        student, teacher = (x[:, rank() :: world_size()] for x in outputs(step))
        losses.append(loss_of(student, teacher))
        seen.append(dict(loss_of.seen))
        loss_of.after_step()
    return dict(losses=torch.stack(losses), seen=seen, state=loss_of.state_dict())


def work(me):
    "What one of two processes makes of every loss."
    return {name: steps_of(name) for name in LOSSES} | dict(rows=sinkhorn(outputs(0)[1][0, me::2], 0.05))


@pytest.fixture(scope="module")
def two_ranks(in_two_processes):
    "What both made."
    return in_two_processes(work)


@every_loss
def test_two_ranks_are_one(name, two_ranks):
    "Halves of every batch on two ranks: the mean loss, what is seen and the state are those of one process."
    one, (a, b) = steps_of(name), (result[name] for result in two_ranks)
    assert torch.allclose((a["losses"] + b["losses"]) / 2, one["losses"], rtol=0, atol=1e-10)
    for x, y, z in zip(a["seen"], b["seen"], one["seen"]):
        assert x.keys() == y.keys() == z.keys()
        assert all(torch.equal(x[k], y[k]) and torch.allclose(x[k], z[k], rtol=0, atol=1e-10) for k in z)
    assert all(torch.equal(a["state"][k], b["state"][k]) for k in a["state"])
    state, expected = sorted_queue(a["state"]), sorted_queue(one["state"])
    assert all(torch.allclose(state[k], expected[k], rtol=0, atol=1e-10) for k in expected)


def test_sinkhorn_on_two_ranks_is_sinkhorn_on_all_rows(two_ranks):
    rows = torch.empty(8, K, dtype=torch.float64)
    rows[0::2], rows[1::2] = (result["rows"] for result in two_ranks)
    assert torch.allclose(rows, sinkhorn(outputs(0)[1][0], 0.05), rtol=0, atol=1e-10)
