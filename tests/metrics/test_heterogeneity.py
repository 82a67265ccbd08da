"""FHS: hand-derived values, a numpy float64 reference, finite differences, planted per-token strengths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moegeo_router.metrics.heterogeneity import (
    fhs,
    fhs_per_token,
    fhs_squared,
    participation_ratio,
    starved_fraction,
)

FAMILY = {"fhs": fhs, "fhs_squared": fhs_squared, "participation_ratio": participation_ratio}


def positive(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).mul(1.5).exp().to(dtype)


def naive_per_token(traces, tokens, rare=1):
    strength = [t / n for t, n in zip(traces.tolist(), tokens.tolist(), strict=True) if n >= rare]
    return np.std(strength) / np.mean(strength)


@pytest.mark.parametrize(
    ("traces", "score", "effective"),
    [
        ((1, 1, 0, 0), 1, 2),
        ((0, 0, 5, 0), math.sqrt(3), 1),
        ((2, 2, 2, 2), 0, 4),
        ((3, 1), 0.5, 1.6),  # mean 2, std 1; 16 / 10
        ((7,), 0, 1),
        ((4, 0, 1, 1), 1, 2),  # mean 1.5, variance 18/4 - 9/4; 36 / 18
    ],
)
def test_values_by_hand(traces, score, effective):
    t = torch.tensor(traces, dtype=torch.float64)
    assert fhs(t).item() == pytest.approx(score, abs=1e-15)
    assert fhs_squared(t).item() == pytest.approx(score**2, abs=1e-15)
    assert participation_ratio(t).item() == pytest.approx(effective, abs=1e-15)


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 3), (8, 4), (8, 5), (8, 8), (1, 1)])
def test_k_equal_survivors(experts, k):
    t = torch.zeros(experts, dtype=torch.float64)
    t[:k] = 0.3
    assert fhs(t).item() == pytest.approx(math.sqrt(experts / k - 1), abs=1e-12)
    assert participation_ratio(t).item() == pytest.approx(k)


@pytest.mark.parametrize("experts", [2, 5, 64])
def test_against_numpy(experts):
    t = positive(3, 4, experts)
    array = t.numpy()
    expected = {
        "fhs": array.std(-1) / array.mean(-1),
        "fhs_squared": experts * (array**2).sum(-1) / array.sum(-1) ** 2 - 1,
        "participation_ratio": array.sum(-1) ** 2 / (array**2).sum(-1),
    }
    for name, metric in FAMILY.items():
        values = metric(t)
        assert values.dtype == torch.float64
        np.testing.assert_allclose(values.numpy(), expected[name], rtol=1e-12)
        single = metric(t.float())
        assert single.dtype == torch.float32
        np.testing.assert_allclose(single.numpy(), expected[name], rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(traces=st.lists(st.floats(0, 1e6), min_size=1, max_size=12).filter(lambda x: max(x) > 1e-6))
def test_bounds(traces):
    t = torch.tensor(traces, dtype=torch.float64)
    experts = len(traces)
    score, effective = fhs(t).item(), participation_ratio(t).item()
    assert 0 <= score <= math.sqrt(experts - 1) + 1e-12
    assert 1 - 1e-12 <= effective <= experts + 1e-12
    # FHS² = E/PR - 1, so FHS > 1 says that fewer than E/2 effective experts learn.
    assert fhs_squared(t).item() == pytest.approx(score**2, abs=1e-12)
    assert score**2 == pytest.approx(experts / effective - 1, abs=1e-12 * experts)
    if abs(score - 1) > 1e-9:
        assert (score > 1) == (effective < experts / 2)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_loss_cancels_in_fp32(scale):
    """Traces are squares: their squares would be 0 or inf."""
    t = torch.tensor([1.0, 1.0, 0.0, 0.0]) * scale
    assert fhs(t).item() == pytest.approx(1)
    assert fhs_squared(t).item() == pytest.approx(1)
    assert participation_ratio(t).item() == pytest.approx(2)
    assert fhs_per_token(t, torch.tensor([10, 10, 10, 10])).item() == pytest.approx(1)


def test_half_precision_is_computed_in_fp32():
    t = positive(16).bfloat16()
    for metric in (*FAMILY.values(), lambda t: fhs_per_token(t, torch.arange(1, 17))):
        assert metric(t).dtype == torch.float32
        assert metric(t).item() == pytest.approx(metric(t.double()).item(), rel=1e-5)


def test_no_signal_is_nan_and_stays_in_its_row():
    t = torch.tensor([[0.0, 0.0], [3.0, 1.0]], dtype=torch.float64, requires_grad=True)
    n = torch.tensor([[5, 5], [1, 1]])
    for metric in (*FAMILY.values(), lambda t: fhs_per_token(t, n)):
        values = metric(t)
        assert values.isnan().tolist() == [True, False]
        (gradient,) = torch.autograd.grad(values[1], t)
        assert gradient[1].isfinite().all()
        assert metric(t.detach() * math.nan).isnan().all()
    assert starved_fraction(t, n).isnan().tolist() == [True, False]
    assert starved_fraction(t * math.nan, n).isnan().all()


@pytest.mark.parametrize("metric", [*FAMILY.values(), lambda t: fhs_per_token(t, torch.arange(15).view(3, 5), 2)])
def test_gradient(metric):
    assert torch.autograd.gradcheck(metric, positive(3, 5).requires_grad_())


@pytest.mark.parametrize("traces", [(2.0, 2.0, 2.0), (4.0, 0.0, 0.0), (4.0, 2.0, 0.0)])
def test_gradient_of_the_square_by_hand(traces):
    """d/dt_e [E Σt²/(Σt)² - 1] = 2E (t_e Σt - Σt²) / (Σt)³, at the kink of the score as well."""
    t = torch.tensor(traces, dtype=torch.float64, requires_grad=True)
    total, squares = sum(traces), sum(x * x for x in traces)
    expected = [2 * len(traces) * (x * total - squares) / total**3 for x in traces]
    (gradient,) = torch.autograd.grad(fhs_squared(t), t)
    assert gradient.tolist() == pytest.approx(expected, abs=1e-13)
    slope = 2 * math.sqrt(fhs_squared(t).item())
    (gradient,) = torch.autograd.grad(fhs(t), t)
    assert gradient.tolist() == pytest.approx([x / slope if slope else 0 for x in expected], abs=1e-13)


def test_descending_the_square_evens_the_traces():
    z = torch.tensor([3.0, 0.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    before = fhs(z.exp()).item()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(fhs_squared(z.exp()), z)
        z = (z - 0.3 * gradient).detach().requires_grad_()
    assert before > 1
    assert fhs(z.exp()).item() < 0.1


def test_per_token_is_strength_not_exposure():
    """A token of the last expert teaches twice as much, however many tokens the experts get."""
    tokens = torch.tensor([1, 10, 100, 1000])
    strength = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    assert fhs_per_token(strength * tokens, tokens).item() == pytest.approx(math.sqrt(3) / 5)  # mean 5/4, var 3/16
    assert fhs_per_token(tokens.double(), tokens).item() == pytest.approx(0, abs=1e-15)
    assert fhs(tokens.double()).item() > 1.5


def test_rare_experts_are_omitted():
    t = torch.tensor([1.0, 3.0, 100.0, 0.0], dtype=torch.float64)
    n = torch.tensor([1, 1, 0, 0])
    assert fhs_per_token(t, n).item() == pytest.approx(0.5)  # of (1, 3), not of (1, 3, 0, 0)
    n = torch.tensor([4, 4, 3, 0])
    assert fhs_per_token(t, n, rare=4).item() == pytest.approx(0.5)
    assert fhs_per_token(t, n, rare=3).item() == pytest.approx(naive_per_token(t, n, 3))
    assert fhs_per_token(t, n, rare=3).item() != pytest.approx(0.5)
    assert fhs_per_token(t, n, rare=5).isnan()
    assert fhs_per_token(t, torch.zeros(4)).isnan()


def test_per_token_is_blind_to_collapse():
    t, n = torch.tensor([0.0, 9.0, 0.0, 0.0]), torch.tensor([0, 500, 0, 0])
    assert fhs_per_token(t, n).item() == 0
    assert fhs(t).item() == pytest.approx(math.sqrt(3))


def test_an_omitted_expert_does_not_reach_value_or_gradient():
    n = torch.tensor([8, 4, 2, 0])
    for broken in (0.0, 1e9, math.nan, math.inf):
        t = torch.tensor([1.0, 3.0, 2.0, broken], dtype=torch.float64, requires_grad=True)
        value = fhs_per_token(t, n)
        assert value.item() == pytest.approx(naive_per_token(t[:3], n[:3]))
        (gradient,) = torch.autograd.grad(value, t)
        assert gradient.isfinite().all()
        assert gradient[3] == 0
        assert gradient[:3].abs().max() > 0


@pytest.mark.parametrize("rare", [1, 40])
def test_per_token_against_numpy_in_batches(rare):
    t, n = positive(2, 3, 9), torch.randint(0, 100, (2, 3, 9))
    for counts in (n, n.double(), n.float()):
        values = fhs_per_token(t, counts, rare)
        assert values.shape == (2, 3)
        assert values.dtype == torch.float64
        expected = [[naive_per_token(t[i, j], n[i, j], rare) for j in range(3)] for i in range(2)]
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6 if counts.dtype == torch.float32 else 1e-12)
    assert fhs_per_token(t.float(), n, rare).dtype == torch.float32


@pytest.mark.parametrize(
    ("traces", "tokens", "starved"),
    [
        ((10, 10, 10, 10), (1, 1, 1, 1), 0),
        ((30, 10, 0, 0), (5, 5, 5, 1), 0.25),  # shares of the load: 5/16 and 1/16, which is below 1/8 = 0.5/4
        ((30, 10, 0, 0), (3, 3, 1, 1), 0.5),  # exactly half the fair load is chosen
        ((39, 0.9, 0.1, 0), (1, 1, 1, 1), 0.75),  # below 1 = 0.1/4 of 40
        ((39, 1, 0, 0), (1, 1, 1, 0), 0.25),  # exactly a tenth is not starved, and who is not chosen is not, either
        ((0, 40, 40, 0), (8, 0, 0, 0), 0.25),
        ((5,), (3,), 0),
        ((1, 2), (0, 0), 0),
    ],
)
def test_starved_by_hand(traces, tokens, starved):
    t = torch.tensor(traces, dtype=torch.float64)
    for scale in (1, 1e-300):
        assert starved_fraction(scale * t, torch.tensor(tokens)).item() == starved
    assert starved_fraction(t.float(), torch.tensor(tokens).float()).item() == pytest.approx(starved)


def test_starved_against_a_loop_in_batches():
    generator = torch.Generator().manual_seed(3)
    t = torch.rand(40, 3, 9, generator=generator, dtype=torch.float64) ** 6
    n = (torch.rand(40, 3, 9, generator=generator) ** 2 * 50).long()
    expected = [
        [
            sum(m / sum(ms) >= 0.5 / 9 and x / sum(xs) < 0.1 / 9 for x, m in zip(xs, ms, strict=True)) / 9
            for xs, ms in zip(*pair, strict=True)
        ]
        for pair in zip(t.tolist(), n.tolist(), strict=True)
    ]
    found = starved_fraction(t, n)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-15)
    assert len(found.unique()) > 3


@pytest.mark.parametrize(
    "metric",
    [*FAMILY.values(), *(lambda t, of=of: of(t, torch.ones(t.shape)) for of in (fhs_per_token, starved_fraction))],
)
def test_bad_traces(metric):
    for shape in ((), (0,), (3, 0)):
        with pytest.raises(ValueError, match=r"^traces must be \(\.\.\., E\) with at least one expert, got \("):
            metric(torch.ones(shape))
    with pytest.raises(ValueError, match=r"^traces must be floating point, got torch\.int64$"):
        metric(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^traces must not be negative, got -0\.5$"):
        metric(torch.tensor([[1.0, 2.0], [3.0, -0.5]]))


def test_other_bad_input():
    t = torch.ones(4)
    with pytest.raises(ValueError, match=r"^tokens must be \(4,\), got \(3,\)$"):
        fhs_per_token(t, torch.ones(3))
    with pytest.raises(ValueError, match=r"^counts must be \(4,\), got \(3,\)$"):
        starved_fraction(t, torch.ones(3))
    for rare in (0, -1, math.nan):
        with pytest.raises(ValueError, match=f"^rare must be positive, got {rare}$"):
            fhs_per_token(t, torch.ones(4), rare)
    with pytest.raises(ValueError, match=r"^tokens must be finite and not negative, got -1$"):
        fhs_per_token(t, torch.tensor([1, 2, -1, 3]))
    with pytest.raises(ValueError, match=r"^counts must be finite and not negative, got -1$"):
        starved_fraction(t, torch.tensor([1, 2, -1, 3]))


def test_no_value_is_read_back_off_the_cpu():
    """A meta tensor has no values: whoever reads one fails."""
    t = torch.ones(2, 4, device="meta")
    for metric in (*FAMILY.values(), lambda t: fhs_per_token(t, t), lambda t: starved_fraction(t, t)):
        assert metric(t).shape == (2,)


def test_compiles_without_graph_breaks():
    t, n = positive(2, 4, dtype=torch.float32), torch.tensor([[3, 0, 1, 9], [1, 1, 1, 1]])

    def family(t, n):
        return *(metric(t) for metric in FAMILY.values()), fhs_per_token(t, n), starved_fraction(t, n)

    torch._dynamo.reset()
    compiled = torch.compile(family, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t, n), family(t, n))
