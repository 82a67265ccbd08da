"""The rules that move a prior, in float64 against formulas with arccos that share no code with the library."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moegeo_router import ExpertPrior, SignBias, fisher_rao_distance

TRANSPORTS = ("exponential", "isometric")


def double_prior(num_experts: int, pi: Tensor | None = None, **options) -> ExpertPrior:
    prior = ExpertPrior(num_experts, **options).double()
    if pi is not None:
        prior.pi.data.copy_(pi)
    return prior


def dirichlet(num_experts: int, concentration: float = 2.0) -> Tensor:
    gamma = torch.distributions.Gamma(torch.full((num_experts,), concentration, dtype=torch.float64), 1.0).sample()
    return (gamma + 0.01) / (gamma + 0.01).sum()


def log_at_uniform(f: Tensor) -> Tensor:
    """``log_u f`` from the definitions: great circle of the square roots, θ by arccos."""
    a, b = torch.full_like(f, 1 / len(f)).sqrt(), f.sqrt()
    theta = math.acos(float(a @ b))
    return 2 * a * (b - math.cos(theta) * a) * theta / math.sin(theta)


def transported(pi: Tensor, f: Tensor, transport: str) -> Tensor:
    v = -log_at_uniform(f)
    if transport == "exponential":  # the score v / u, centred again under π
        score = len(f) * v
        return pi * (score - (pi * score).sum())
    a, b = torch.full_like(f, 1 / len(f)).sqrt(), pi.sqrt()
    theta = math.acos(min(1.0, float(a @ b)))
    if theta < 1e-9:
        return v
    # Rotation in the plane of a and b: what is along the great circle turns with it, the rest stays.
    w, ahead = v / (2 * a), (b - math.cos(theta) * a) / math.sin(theta)
    turned = w + (w @ ahead) * (math.cos(theta) * ahead - math.sin(theta) * a - ahead)
    return 2 * b * turned


def follow(pi: Tensor, v: Tensor) -> Tensor:
    w = v / (2 * pi.sqrt())
    h = float(w.norm())
    return (math.cos(h) * pi.sqrt() + math.sin(h) / h * w).square()


def length(pi: Tensor, v: Tensor) -> float:
    return float((v.square() / pi).sum().sqrt())


def loads(num_experts: int) -> list[Tensor]:
    one_hot = torch.zeros(num_experts, dtype=torch.float64)
    one_hot[1] = 7.0
    half = (torch.arange(num_experts) % 2).double()
    return [100 * dirichlet(num_experts), half, one_hot]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_experts", [2, 8, 64])
def test_the_first_step_is_speed_times_the_fsi_of_the_load(num_experts, transport):
    u = torch.full((num_experts,), 1 / num_experts, dtype=torch.float64)
    for counts in loads(num_experts):
        prior = double_prior(num_experts, speed=0.02, transport=transport)
        prior.update(counts)
        expected = 0.02 * fisher_rao_distance(u, counts / counts.sum())
        assert fisher_rao_distance(u, prior.pi).item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-10)


def test_the_isometric_step_has_that_length_everywhere():
    for counts in loads(8):
        pi = dirichlet(8)
        prior = double_prior(8, pi, speed=0.02, transport="isometric")
        prior.update(counts)
        u = torch.full((8,), 1 / 8, dtype=torch.float64)
        expected = 0.02 * fisher_rao_distance(u, counts / counts.sum())
        assert fisher_rao_distance(pi, prior.pi).item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("where", ["selection", "logits"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_experts", [2, 8, 64])
def test_the_step_is_the_formula(num_experts, transport, where):
    for counts in loads(num_experts):
        pi = dirichlet(num_experts)
        prior = double_prior(num_experts, pi, speed=0.01, transport=transport, where=where)
        prior.update(counts)
        v = 0.01 * transported(pi, counts / counts.sum(), transport)
        assert (v / pi).abs().max() < 1  # nothing is shortened here
        torch.testing.assert_close(prior.pi, follow(pi, v), rtol=1e-10, atol=1e-13)


def test_the_busier_an_expert_the_more_it_loses_and_starved_ones_gain():
    for _ in range(20):
        pi, counts = dirichlet(12), 1000 * dirichlet(12, 0.5)
        counts[:2] = 0
        prior = double_prior(12, pi, speed=0.05)
        prior.update(counts)
        change = (prior.pi / pi).log()
        order = counts.argsort()
        assert (change[order].diff() < 1e-14).all()
        assert change[:2].min() > 0 > change[counts.argmax()]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_overloaded_experts_fall_from_uniform(transport):
    counts = torch.tensor([0, 1, 2, 12, 9, 0], dtype=torch.float64)
    prior = double_prior(6, transport=transport)
    prior.update(counts)
    assert ((prior.pi > 1 / 6) == (counts < 4)).all()


@pytest.mark.parametrize("num_experts", [1, 2, 3, 6, 49])
def test_balance_is_at_rest_bit_for_bit(num_experts):
    for transport in TRANSPORTS:
        prior = ExpertPrior(num_experts, transport=transport)
        prior.pi.copy_(dirichlet(num_experts))
        before = prior.pi.clone()
        prior.update(torch.full((num_experts,), 7))
        assert torch.equal(prior.pi, before)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_experts_have_no_names(transport):
    pi, counts, order = dirichlet(9), 100 * dirichlet(9), torch.randperm(9)
    prior, permuted = (double_prior(9, p, transport=transport) for p in (pi, pi[order]))
    prior.update(counts)
    permuted.update(counts[order])
    torch.testing.assert_close(permuted.pi, prior.pi[order], rtol=1e-13, atol=0)


def test_only_shares_count():
    counts = torch.randint(1, 50, (8,))
    few, many = ExpertPrior(8), ExpertPrior(8)
    few.update(counts)
    many.update((counts * 2**30).double())  # beyond what fp32 counts exactly
    assert torch.equal(few.pi, many.pi)


def test_no_step_is_longer_than_its_limit():
    counts = torch.tensor([0.0, 1.0, 3.0, 4.0], dtype=torch.float64)
    pi = dirichlet(4, 20.0)
    prior = double_prior(4, pi, speed=50.0, limit=0.05)
    prior.update(counts)
    assert fisher_rao_distance(pi, prior.pi).item() == pytest.approx(0.05, rel=1e-10)
    v = transported(pi, counts / counts.sum(), "exponential")
    torch.testing.assert_close(prior.pi, follow(pi, 0.05 * v / length(pi, v)), rtol=1e-10, atol=0)


def test_no_expert_falls_to_less_than_a_seventh_at_once():
    """One expert of 64 that has everything: a step of 0.3 rad would carry it beyond 0."""
    counts = torch.zeros(64, dtype=torch.float64)
    counts[5] = 1
    for speed in (0.05, 1.0, 100.0):
        prior = double_prior(64, speed=speed, limit=100.0)
        prior.update(counts)
        assert 1 / 7 < 64 * prior.pi[5] < math.exp(-1)
        v = transported(torch.full_like(counts, 1 / 64), counts, "exponential")
        v = v * 64 / (64 * 64 * v.abs().max())  # max |v / π| = 1
        torch.testing.assert_close(prior.pi, follow(torch.full_like(counts, 1 / 64), v), rtol=1e-10, atol=0)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ten_thousand_hostile_loads_leave_it_on_the_simplex(transport):
    prior = ExpertPrior(6, speed=2.0, limit=3.0, floor=1e-3, transport=transport)
    generator = torch.Generator().manual_seed(0)
    lowest = 1.0
    for step in range(10_000):
        counts = torch.rand(6, generator=generator).pow(1 + step % 40)
        if step % 3 == 0:  # everything to the expert with the largest prior, or to the one with the smallest
            counts = torch.zeros(6)
            counts[int(prior.pi.argmax() if step // 1000 % 2 else prior.pi.argmin())] = 1
        prior.update(counts)
        lowest = min(lowest, float(prior.pi.min()))
        assert abs(float(prior.pi.double().sum()) - 1) < 1e-6
    assert 1e-3 / 6 * (1 - 1e-6) <= lowest < 2e-3 / 6


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40), st.floats(1e-3, 10))
def test_any_counts_leave_it_on_the_simplex(counts, speed):
    prior = ExpertPrior(len(counts), speed=speed)
    for _ in range(3):
        prior.update(torch.tensor(counts))
        assert prior.pi.isfinite().all()
        assert (prior.pi > 0).all()
        assert float(prior.pi.double().sum()) == pytest.approx(1, abs=1e-6)


def test_a_starved_expert_comes_back_however_long_it_was_pushed_down():
    overloaded, dead = torch.ones(8), torch.ones(8)
    overloaded[3], dead[3] = 8, 0
    for pushed in (400, 2000):
        prior = ExpertPrior(8)
        for _ in range(pushed):
            prior.update(overloaded)
        assert prior.log_prior()[3].item() == pytest.approx(math.log(1e-6), abs=1e-4)
        steps = 0
        while prior.log_prior()[3] < 0:
            prior.update(dead)
            steps += 1
        assert 100 < steps < math.log(1e6) / 0.05


@pytest.mark.parametrize("counts", [[0.0, 0, 0], [1, math.nan, 2], [1, math.inf, 2], [2, -1, 3], [-1, -1, -1]])
def test_counts_that_say_nothing_move_nothing(counts):
    for rule in (ExpertPrior(3), SignBias(3)):
        rule.update(torch.tensor([5, 2, 1]))
        before = {name: value.clone() for name, value in rule.state_dict().items()}
        rule.update(torch.tensor(counts))
        assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())


def test_sign_bias_is_the_published_rule():
    bias = SignBias(4, speed=0.01)
    for counts in ([4, 0, 2, 2], [4, 0, 2, 2], [1, 1, 1, 13]):
        bias.update(torch.tensor(counts))
    assert bias.bias.tolist() == pytest.approx([-0.01, 0.03, 0.01, -0.01])
    bias.update(torch.tensor([3, 3, 3, 3]))
    assert bias.bias.tolist() == pytest.approx([-0.01, 0.03, 0.01, -0.01])


# --- the natural gradient --------------------------------------------------------------------------------------------


def natural(pi: Tensor, **options) -> ExpertPrior:
    return double_prior(len(pi), pi, where="logits", rule="natural", **options)


def test_the_prior_in_the_logits_has_the_gradient_of_finite_differences():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    prior = natural(dirichlet(4))

    def logits_of(z, pi):
        return torch.func.functional_call(prior, {"pi": pi}, (z,)).softmax(-1)

    assert torch.autograd.gradcheck(logits_of, (logits, prior.pi))


def test_the_natural_step_is_the_formula_and_forgets_its_gradient():
    pi, g = dirichlet(6), torch.randn(6, dtype=torch.float64)
    prior = natural(pi, speed=0.03)
    (prior.pi * g).sum().backward()
    prior.step()
    v = -0.03 * (pi * g - pi * (pi * g).sum())
    torch.testing.assert_close(prior.pi.detach(), follow(pi, v), rtol=1e-10, atol=0)
    after = prior.pi.detach().clone()
    assert prior.pi.grad is None
    prior.step(0.5)
    assert torch.equal(prior.pi, after)


def test_the_natural_step_adds_the_centred_gradient_to_the_log_prior_to_first_order():
    """In softmax coordinates: Δ log π = -lr (g - Σ π g), the error quarters as lr halves."""
    pi, g = dirichlet(6), torch.randn(6, dtype=torch.float64)
    errors = []
    for lr in (0.02, 0.01):
        prior = natural(pi, limit=10.0)
        (prior.pi * g).sum().backward()
        prior.step(lr)
        errors.append(float(((prior.pi.detach() / pi).log() + lr * (g - (pi * g).sum())).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_a_limited_natural_step_has_the_divergence_of_its_radius():
    for r in (0.005, 0.02):
        pi = dirichlet(8, 20.0)
        prior = natural(pi, limit=r)
        (prior.pi * torch.randn(8, dtype=torch.float64)).sum().backward()
        prior.step(100.0)
        kl = float((pi * (pi / prior.pi.detach()).log()).sum())
        assert kl == pytest.approx(r * r / 2, rel=0.01)


def test_micro_batches_add_up():
    pi, g = dirichlet(5), torch.randn(3, 5, dtype=torch.float64)
    together, apart = natural(pi), natural(pi)
    (together.pi * g.sum(0)).sum().backward()
    for row in g:
        (apart.pi * row).sum().backward()
    together.step()
    apart.step()
    torch.testing.assert_close(apart.pi, together.pi, rtol=1e-12, atol=0)


def test_natural_steps_find_the_prior_of_the_labels():
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 9 + [3])
    prior = ExpertPrior(4, where="logits", rule="natural", speed=1.0)
    for _ in range(60):
        torch.nn.functional.cross_entropy(prior(torch.zeros(100, 4)), labels).backward()
        prior.step()
    assert prior.pi.tolist() == pytest.approx([0.7, 0.2, 0.09, 0.01], abs=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_forgotten(bad):
    prior = natural(dirichlet(3))
    before = prior.pi.detach().clone()
    prior.pi.grad = torch.tensor([1.0, bad, 0.0], dtype=torch.float64)
    prior.step()
    assert torch.equal(prior.pi, before)
    assert prior.pi.grad is None


# --- one expert, errors ----------------------------------------------------------------------------------------------


def test_one_expert_has_nothing_to_do():
    prior, learned = ExpertPrior(1), ExpertPrior(1, where="logits", rule="natural")
    prior.update(torch.tensor([9]))
    learned(torch.zeros(2, 1)).sum().backward()
    learned.step()
    bias = SignBias(1)
    bias.update(torch.tensor([9]))
    assert prior.pi.tolist() == learned.pi.tolist() == [1.0]
    assert bias.bias.tolist() == prior.log_prior().tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"where": "gates"}, "where must be 'selection' or 'logits', got 'gates'"),
        ({"rule": "sign"}, "rule must be 'balance' or 'natural', got 'sign'"),
        ({"transport": "flat"}, "transport must be 'exponential' or 'isometric', got 'flat'"),
        ({"speed": 0.0}, "speed must be a positive number, got 0.0"),
        ({"limit": math.inf}, "limit must be a positive number, got inf"),
        ({"limit": math.nan}, "limit must be a positive number, got nan"),
        ({"floor": 0.0}, r"floor must lie in \[1e-08, 1\), got 0.0"),
        ({"floor": 1.0}, r"floor must lie in \[1e-08, 1\), got 1.0"),
        ({"rule": "natural"}, "rule='natural' needs where='logits'.* a choice has no gradient"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        ExpertPrior(**{"num_experts": 4} | options)


def test_bad_calls():
    prior, learned = ExpertPrior(4, where="logits"), ExpertPrior(4, where="logits", rule="natural")
    for counts in (torch.ones(5), torch.ones(1, 4), torch.tensor(4)):
        for rule in (prior, SignBias(4)):
            with pytest.raises(ValueError, match=r"counts must be \(4,\), got \("):
                rule.update(counts)
    for module in (prior, ExpertPrior(4), SignBias(4)):
        with pytest.raises(ValueError, match=r"logits must be \(\.\.\., 4\), got \(3, 5\)"):
            module(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="call update"):
        prior.step(0.1)
    with pytest.raises(ValueError, match="call step"):
        learned.update(torch.ones(4))
    with pytest.raises(ValueError, match="lr must be at least 0, got -1"):
        learned.step(-1)
    with pytest.raises(ValueError, match="speed must be a positive number, got -1"):
        SignBias(4, speed=-1)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        SignBias(0)
