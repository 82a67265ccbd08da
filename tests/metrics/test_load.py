"""Load metrics: values derived by hand, plain Python loops, the bounds of top-k routing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moegeo_router.metrics import expert_counts
from moegeo_router.metrics.load import (
    coefficient_of_variation,
    dead_fraction,
    drop_rate,
    gini,
    load_share,
    max_load,
    max_violation,
    never_used_fraction,
    utilization_entropy,
)

SCALARS = {
    "max_load": max_load,
    "max_violation": max_violation,
    "gini": gini,
    "coefficient_of_variation": coefficient_of_variation,
    "utilization_entropy": utilization_entropy,
    "dead_fraction": dead_fraction,
    "never_used_fraction": never_used_fraction,
}
DIFFERENTIABLE = ("max_load", "max_violation", "gini", "coefficient_of_variation", "utilization_entropy")
SEVENTHS = torch.tensor([4, 0, 1, 2])


def naive(counts):
    """Every metric of one layer by its definition, pair by pair, in Python numbers."""
    n = [float(x) for x in counts]
    experts, total = len(n), sum(n)
    mean = total / experts
    share = [x / total for x in n]
    return {
        "max_load": max(n) / mean,
        "max_violation": (max(n) - mean) / mean,
        "gini": sum(abs(a - b) for a in n for b in n) / (2 * experts * total),
        "coefficient_of_variation": math.sqrt(sum((x - mean) ** 2 for x in n) / experts) / mean,
        "utilization_entropy": -sum(f * math.log(f) for f in share if f) / math.log(experts) if experts > 1 else 1.0,
        "dead_fraction": sum(f < 0.1 / experts for f in share) / experts,
        "never_used_fraction": sum(x == 0 for x in n) / experts,
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("max_load", 16 / 7),
        ("max_violation", 9 / 7),
        ("gini", 26 / (2 * 4 * 7)),  # |differences| over unordered pairs: 4 + 3 + 2 + 1 + 2 + 1 = 13
        ("coefficient_of_variation", math.sqrt(5 / 7)),  # mean 7/4, variance 21/4 - 49/16 = 35/16
        ("utilization_entropy", (math.log(7) - 10 / 7 * math.log(2)) / math.log(4)),
        ("dead_fraction", 1 / 4),
        ("never_used_fraction", 1 / 4),
    ],
)
def test_values_by_hand(name, expected):
    assert SCALARS[name](SEVENTHS).item() == pytest.approx(expected, abs=1e-15)


def test_load_share_by_hand():
    shares = load_share(torch.tensor([[4, 0, 1, 3], [0, 0, 0, 0], [5, 5, 5, 5]]))
    assert shares.tolist() == [[0.5, 0, 0.125, 0.375], [0, 0, 0, 0], [0.25] * 4]


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("experts", [1, 2, 5, 64])
def test_against_the_naive_reference(name, experts):
    counts = torch.randint(0, 1000, (6, experts)) * torch.randint(0, 2, (6, experts))
    counts[:, 0] += 3
    expected = [naive(row)[name] for row in counts]
    for dtype, tolerance in ((torch.int64, 1e-12), (torch.int32, 1e-12), (torch.float64, 1e-12), (torch.float32, 2e-6)):
        values = SCALARS[name](counts.to(dtype))
        assert values.dtype == (torch.float32 if dtype == torch.float32 else torch.float64)
        assert values.tolist() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("name", [*SCALARS, "load_share"])
def test_leading_dimensions_are_a_batch(name):
    metric = SCALARS.get(name, load_share)
    counts = torch.randint(1, 50, (2, 3, 5))
    counts[1, 2] = 0
    values = metric(counts)
    assert values.shape == ((2, 3, 5) if name == "load_share" else (2, 3))
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(values[i, j], metric(counts[i, j]), rtol=1e-12, atol=1e-15)
    assert metric(counts[:0]).shape == (0, *values.shape[1:])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float32])
@pytest.mark.parametrize("experts", [2, 3, 7, 49, 64])
def test_perfect_balance(dtype, experts):
    counts = torch.full((experts,), 10007).to(dtype)
    for name, expected in {"max_load": 1, "max_violation": 0, "gini": 0, "coefficient_of_variation": 0}.items():
        assert SCALARS[name](counts).item() == expected
    assert utilization_entropy(counts).item() == pytest.approx(1, abs=1e-6)
    assert dead_fraction(counts).item() == never_used_fraction(counts).item() == 0
    assert dead_fraction(counts, below=1).item() == 0


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 2), (9, 4), (5, 5), (1, 1)])
def test_collapse_on_k_of_e_experts_reaches_the_bounds(experts, k):
    counts = torch.zeros(experts).double()
    counts[experts - k :] = 100
    assert max_load(counts).item() == pytest.approx(experts / k)
    assert max_violation(counts).item() == pytest.approx(experts / k - 1)
    assert gini(counts).item() == pytest.approx(1 - k / experts)
    assert coefficient_of_variation(counts).item() == pytest.approx(math.sqrt(experts / k - 1))
    assert utilization_entropy(counts).item() == pytest.approx(math.log(k) / math.log(experts) if experts > 1 else 1)
    assert dead_fraction(counts).item() == never_used_fraction(counts).item() == pytest.approx(1 - k / experts)


def test_first_choices_of_a_top_k_router_are_no_load():
    """moewatch 0.1.0 counted first choices of a top-2 router of 8: "max/mean 7.1x", where 4.0x is the maximum."""
    ids = torch.tensor([0, 1]).repeat(1000, 1)
    ids[900:] = torch.tensor([1, 0])
    assert max_load(expert_counts(ids, 8)).item() == pytest.approx(4.0)
    assert max_load(expert_counts(ids[:, :1], 8)).item() == pytest.approx(7.2)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), experts=st.integers(1, 12), tokens=st.integers(1, 30), spread=st.floats(0, 20))
def test_bounds_of_top_k_routing(data, experts, tokens, spread):
    k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    skew = spread * torch.randn(experts, generator=generator)
    counts = expert_counts((torch.randn(tokens, experts, generator=generator) + skew).topk(k).indices, experts)
    slack = 1e-9
    assert 1 - slack <= max_load(counts) <= experts / k + slack
    assert -slack <= max_violation(counts) <= experts / k - 1 + slack
    assert 0 <= gini(counts) <= 1 - k / experts + slack
    assert 0 <= coefficient_of_variation(counts) <= math.sqrt(experts / k - 1) + slack
    lowest = math.log(k) / math.log(experts) if experts > 1 else 1
    assert lowest - slack <= utilization_entropy(counts) <= 1 + slack
    assert 0 <= dead_fraction(counts) <= 1 - 1 / experts + slack
    assert 0 <= never_used_fraction(counts) <= min(1 - k / experts + slack, dead_fraction(counts).item())
    assert load_share(counts).sum().item() == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 10**6), min_size=1, max_size=10).filter(any),
    factor=st.integers(2, 9),
    seed=st.integers(0, 99),
)
def test_scale_and_order_do_not_matter(counts, factor, seed):
    n = torch.tensor(counts)
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    for metric in SCALARS.values():
        assert metric(factor * n[order]).item() == pytest.approx(metric(n).item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float32])
@pytest.mark.parametrize("experts", [1, 4])
def test_nothing_routed(dtype, experts):
    counts = torch.zeros(2, experts, dtype=dtype)
    for name, metric in SCALARS.items():
        assert metric(counts).tolist() == [1.0 if name in ("dead_fraction", "never_used_fraction") else 0.0] * 2
    assert load_share(counts).tolist() == counts.tolist()


def test_large_integers_keep_their_digits():
    """In fp32 2^24 + 1 is 2^24, and this imbalance would be 0."""
    assert max_violation(torch.tensor([2**24 + 1, 2**24 - 1])).item() == pytest.approx(2**-24, rel=1e-6)


def test_half_precision_is_computed_in_fp32():
    """A bf16 sum of 512 ones would stop at 256."""
    for dtype in (torch.bfloat16, torch.float16):
        share = load_share(torch.ones(512, dtype=dtype))
        assert share.dtype == torch.float32
        assert share[0].item() == 1 / 512


def test_dead_experts_are_below_the_bound():
    counts = torch.tensor([1, 3, 2, 2])  # shares 1/8, 3/8, 1/4, 1/4
    assert dead_fraction(counts, below=0.5).item() == 0  # 1/8 is not below 0.5/4
    assert dead_fraction(counts, below=0.51).item() == 0.25
    assert dead_fraction(counts, below=1).item() == 0.25
    at_default = torch.tensor([[25, 325, 325, 325], [24, 326, 325, 325]])
    assert dead_fraction(at_default).tolist() == [0, 0.25]
    assert never_used_fraction(at_default).tolist() == [0, 0]


def test_never_used_needs_the_window_not_its_steps():
    steps = torch.eye(4).repeat(3, 1)
    assert never_used_fraction(steps).tolist() == [0.75] * 12
    assert never_used_fraction(steps.sum(dim=0)).item() == 0


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient(name):
    counts = torch.tensor([[3.0, 1.0, 7.0, 2.0], [0.5, 4.0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SCALARS[name], counts)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("row", [(5.0, 5.0, 5.0), (9.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_gradient_is_finite_at_balance_collapse_and_nothing(name, row):
    """vmoe#218: a standard deviation has a NaN gradient at perfect balance."""
    counts = torch.tensor(row, requires_grad=True)
    (gradient,) = torch.autograd.grad(SCALARS[name](counts), counts)
    assert gradient.isfinite().all()
    if name == "coefficient_of_variation" and row[1] == row[0]:
        assert gradient.abs().max() == 0


def test_drop_rate():
    rates = drop_rate(torch.tensor([0, 3, 8, 0]), torch.tensor([10, 12, 8, 0]))
    assert rates.dtype == torch.float64
    assert rates.tolist() == [0, 0.25, 1, 0]
    assert drop_rate(torch.tensor(1.0), torch.tensor(4.0)).dtype == torch.float32
    assert drop_rate(torch.tensor(1.0), torch.tensor(4.0)).item() == 0.25


@pytest.mark.parametrize("metric", [*SCALARS.values(), load_share])
def test_bad_counts(metric):
    for shape in ((), (0,), (3, 0)):
        with pytest.raises(ValueError, match=r"^counts must be \(\.\.\., E\) with at least one expert, got \("):
            metric(torch.ones(shape))
    for wrong, shown in ((-2.0, "-2"), (math.nan, "nan"), (math.inf, "inf")):
        with pytest.raises(ValueError, match=f"^counts must be finite and not negative, got {shown}$"):
            metric(torch.tensor([[1.0, 2.0], [3.0, wrong]]))
    with pytest.raises(ValueError, match=r"^counts must be finite and not negative, got -1$"):
        metric(torch.tensor([3, -1]))
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"^counts must be real numbers, got {dtype}$"):
            metric(torch.ones(3, dtype=dtype))


def test_other_bad_input():
    for below in (0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match=rf"^below must be in \(0, 1\], got {below}$"):
            dead_fraction(SEVENTHS, below=below)
    with pytest.raises(ValueError, match=r"^dropped and total must have one shape, got \(2,\) and \(\)$"):
        drop_rate(torch.ones(2), torch.tensor(3.0))
    with pytest.raises(ValueError, match=r"^dropped must be at most total, got 5 of 4$"):
        drop_rate(torch.tensor([1, 5]), torch.tensor([4, 4]))
    with pytest.raises(ValueError, match=r"^dropped must be finite and not negative, got -1$"):
        drop_rate(torch.tensor(-1), torch.tensor(4))
    with pytest.raises(ValueError, match=r"^total must be finite and not negative, got nan$"):
        drop_rate(torch.tensor(1.0), torch.tensor(math.nan))


def test_no_value_is_read_back_off_the_cpu():
    """A meta tensor has no values: whoever reads one fails."""
    counts = torch.ones(2, 4, device="meta")
    for metric in SCALARS.values():
        assert metric(counts).shape == metric(counts.long()).shape == (2,)
    assert load_share(counts).shape == drop_rate(counts, counts).shape == (2, 4)


def test_compiles_without_graph_breaks():
    counts = torch.tensor([[4.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])

    def family(counts):
        return *(metric(counts) for metric in SCALARS.values()), load_share(counts), drop_rate(counts, counts + 1)

    torch._dynamo.reset()
    compiled = torch.compile(family, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(counts), family(counts))
