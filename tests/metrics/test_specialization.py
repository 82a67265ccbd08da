"""The FSI family: hand-derived values, closed forms, and a plain numpy float64 reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moegeo_router import routing_probabilities
from moegeo_router.geometry import entropy
from moegeo_router.metrics import (
    dispersion,
    dispersion_from_means,
    expert_counts,
    flip_rate,
    fsi,
    fsi_load,
    fsi_max,
    fsi_token,
    fsi_velocity,
    information_from_means,
    probe_velocity,
    routing_information,
)


def distance(p, q):
    """The definition, 2 arccos Σ √(p q): good to half the digits near p = q."""
    return 2 * np.arccos(np.clip(np.sqrt(p * q).sum(-1), -1, 1))


def naive(p):
    """Every metric of tokens (T, E) by its formula in geometry.md, token by token."""
    p = p.numpy().reshape(-1, p.shape[-1])
    tokens, experts = p.shape
    mean = sum(p[t] for t in range(tokens)) / tokens
    u = np.full(experts, 1 / experts)
    largest = 2 * math.acos(experts**-0.5)

    def shannon(q):
        return -sum(x * math.log(x) for x in q if x > 0)

    information = shannon(mean) - sum(shannon(p[t]) for t in range(tokens)) / tokens
    return {
        "fsi": distance(mean, u),
        "fsi_normalized": distance(mean, u) / largest,
        "fsi_token": sum(distance(p[t], u) for t in range(tokens)) / tokens / largest,
        "dispersion": sum(distance(p[t], mean) ** 2 for t in range(tokens)) / tokens / largest**2,
        "routing_information": information,
        "routing_information_normalized": information / math.log(experts),
    }


METRICS = {
    "fsi": fsi,
    "fsi_normalized": lambda p: fsi(p, normalized=True),
    "fsi_token": fsi_token,
    "dispersion": dispersion,
    "routing_information": routing_information,
    "routing_information_normalized": lambda p: routing_information(p, normalized=True),
}
NORMALIZED = ("fsi_normalized", "fsi_token", "dispersion", "routing_information_normalized")


def distributions(*shape, scale=2.0, dtype=torch.float64):
    return (scale * torch.randn(*shape, dtype=torch.float64)).softmax(-1).to(dtype)


def one_hot(ids, num_experts):
    return torch.nn.functional.one_hot(torch.as_tensor(ids), num_experts).double()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("shape", [(1, 5), (40, 3), (4, 7, 16), (11, 2), (6,)])
def test_against_the_naive_reference(name, shape):
    p = distributions(*shape)
    value = METRICS[name](p)
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(naive(p)[name], abs=2e-8, rel=1e-9)
    assert METRICS[name](p.float()).item() == pytest.approx(naive(p)[name], abs=1e-6, rel=1e-5)


def test_values_of_the_design():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    assert fsi(p).item() == pytest.approx(0.476014519537, abs=1e-12)
    for experts, value in ((4, 2.094395), (8, 2.418858), (16, 2.636232), (64, 2.890937)):
        assert fsi_max(experts) == pytest.approx(value, abs=5e-7)
    assert fsi_max(1) == 0
    assert fsi_max(2) == pytest.approx(math.pi / 2)
    for experts, share in ((4, 0.75), (8, 0.6494), (64, 0.5434)):
        half_dead = torch.zeros(experts, dtype=torch.float64)
        half_dead[: experts // 2] = 2 / experts
        assert fsi(half_dead, normalized=True).item() == pytest.approx(share, abs=5e-5)


@pytest.mark.parametrize(("live", "experts"), [(1, 4), (2, 4), (3, 8), (8, 8)])
def test_k_live_experts(live, experts):
    """Σ √(1/k · 1/E) over k experts = √(k/E)."""
    mean = torch.zeros(experts, dtype=torch.float64)
    mean[:live] = 1 / live
    expected = 2 * math.acos(math.sqrt(live / experts))
    assert fsi(mean).item() == pytest.approx(expected, abs=1e-12)
    assert fsi_load(100 * mean, 1).item() == pytest.approx(expected, abs=1e-12)


def test_balanced_one_hot_routing():
    """Balanced, decisive, fully specialized: fsi 0, everything else at its maximum."""
    p = one_hot([0, 1, 2, 3] * 3, 4)
    values = {name: metric(p).item() for name, metric in METRICS.items()}
    # Each token is at fsi_max from u: all four token metrics are 1, and the information is log 4.
    expected = {"fsi": 0, "fsi_normalized": 0, "fsi_token": 1, "dispersion": 1}
    expected |= {"routing_information": math.log(4), "routing_information_normalized": 1}
    assert values == pytest.approx(expected, abs=1e-12)


def test_total_collapse():
    p = one_hot([2] * 5, 4)
    values = {name: metric(p).item() for name, metric in METRICS.items()}
    expected = {"fsi": 2 * math.pi / 3, "fsi_normalized": 1, "fsi_token": 1, "dispersion": 0}
    assert values == pytest.approx(
        expected | {"routing_information": 0, "routing_information_normalized": 0}, abs=1e-12
    )


def test_uniform_soft_routing_is_zero_everywhere():
    p = torch.full((7, 8), 1 / 8, dtype=torch.float64)
    assert [metric(p).item() for metric in METRICS.values()] == pytest.approx([0.0] * 6, abs=1e-12)


def test_unbalanced_one_hots():
    """Shares (3/4, 1/4): dispersion Σ p̄_e (2 arccos √p̄_e)² / (π/2)² with √p̄ = cos 30°, cos 60°."""
    p = one_hot([0, 0, 0, 1], 2)
    expected = (0.75 * (math.pi / 3) ** 2 + 0.25 * (2 * math.pi / 3) ** 2) / (math.pi / 2) ** 2
    assert dispersion(p).item() == pytest.approx(expected, abs=1e-12)
    # One pass: Σ √p̄_e p̄_e = .75 cos 30° + .25 cos 60°.
    overlap = 0.75 * math.sqrt(0.75) + 0.25 * 0.5
    one_pass = (2 * math.acos(overlap)) ** 2 / (math.pi / 2) ** 2
    assert dispersion_from_means(p.mean(0), p.sqrt().mean(0)).item() == pytest.approx(one_pass, abs=1e-12)
    information = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert routing_information(p).item() == pytest.approx(information, abs=1e-12)


@pytest.mark.parametrize(("blocks", "size"), [(2, 2), (4, 3), (1, 5)])
def test_block_structured_information(blocks, size):
    """Tokens of block b are uniform over its experts: I = log E - log size = log blocks."""
    p = torch.eye(blocks, dtype=torch.float64).repeat_interleave(size, dim=1).repeat(6, 1) / size
    assert routing_information(p).item() == pytest.approx(math.log(blocks), abs=1e-12)
    overlap_distance = 2 * math.acos(1 / math.sqrt(blocks))
    expected = (overlap_distance / (2 * math.acos(1 / math.sqrt(blocks * size)))) ** 2
    assert dispersion(p).item() == pytest.approx(expected, abs=1e-12)


def test_entropy():
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25] * 4, [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert entropy(p).tolist() == pytest.approx([1.5 * math.log(2), 2 * math.log(2), 0], abs=1e-12)
    assert information_from_means(p[0], torch.tensor(0.5)).item() == pytest.approx(1.5 * math.log(2) - 0.5)
    assert information_from_means(p[0], torch.tensor(0.5), True).item() == pytest.approx(
        (1.5 * math.log(2) - 0.5) / math.log(4)
    )


def test_load():
    counts = torch.tensor([[3, 1, 0, 0], [1, 3, 4, 0]])  # shares (1, 1, 1, 0) / 3 of 12 choices
    expected = 2 * math.acos(math.sqrt(3 / 4))
    assert fsi_load(counts, 2).item() == pytest.approx(expected, abs=1e-6)
    assert fsi_load(counts.sum(0), 2).item() == pytest.approx(expected, abs=1e-6)
    largest = 2 * math.acos(math.sqrt(2 / 4))
    assert fsi_load(counts, 2, normalized=True).item() == pytest.approx(expected / largest, abs=1e-6)
    # The worst k = 2 can do is two experts: normalised 1; k = E cannot vary: 0.
    assert fsi_load(torch.tensor([8, 8, 0, 0]), 2, normalized=True).item() == pytest.approx(1, abs=1e-6)
    assert fsi_load(torch.tensor([5, 5]), 2, normalized=True).item() == 0
    # Large totals, for which shares and not counts matter.
    assert fsi_load(counts.double() * 1e12, 2).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("experts", "k", "tokens"), [(64, 1, 1024), (16, 4, 512), (8, 7, 2048)])
def test_random_balanced_load_reads_its_law(experts, k, tokens):
    """√((E-k)/(kT)) over 64 random balanced routings of k distinct experts a token."""
    generator = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(64):
        ids = torch.rand(tokens, experts, generator=generator).topk(k).indices
        squares.append(fsi_load(expert_counts(ids, experts), k).item() ** 2)
    law = math.sqrt((experts - k) / (k * tokens))
    # d² is a χ² of E - 1 degrees of freedom: the root mean square of 64 draws is within about 4 sigma.
    assert math.sqrt(np.mean(squares)) == pytest.approx(law, rel=4 / math.sqrt(2 * 64 * (experts - 1)) + 0.02)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 12),
    experts=st.integers(2, 9),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 5.0, 50.0]),
    seed=st.integers(0, 2**31),
)
def test_one_pass_dispersion_and_its_bounds(tokens, experts, scale, seed):
    z = scale * torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p = z.softmax(-1)
    one_pass = dispersion_from_means(p.mean(0), p.sqrt().mean(0)).item()
    mean = p.numpy().mean(0)
    overlap = sum(math.sqrt(mean[e]) * np.sqrt(p.numpy()[:, e]).mean() for e in range(experts))
    expected = (2 * math.acos(min(overlap, 1)) / (2 * math.acos(experts**-0.5))) ** 2
    assert one_pass == pytest.approx(expected, abs=1e-13, rel=1e-6)
    exact = dispersion(p).item()
    assert 8 / math.pi**2 * exact - 1e-12 <= one_pass <= exact + 1e-12
    assert exact <= 1 + 1e-12


def test_velocity():
    """From (1/2, 1/2) to (1, 0): 2 arccos √½ = π/2, whatever the tokens."""
    half, collapsed = torch.full((3, 2), 0.5, dtype=torch.float64), one_hot([0, 0], 2)
    assert fsi_velocity(half, collapsed).item() == pytest.approx(math.pi / 2, abs=1e-12)
    assert fsi_velocity(half, half[:1]).item() == 0
    # Two tokens that swap experts: the mean stands still, every token goes all the way.
    before, after = one_hot([0, 1, 0, 1], 2), one_hot([1, 0, 0, 1], 2)
    assert fsi_velocity(after, before).item() == pytest.approx(0, abs=1e-12)
    assert probe_velocity(after, before).item() == pytest.approx(math.pi / 2, abs=1e-12)
    assert flip_rate(after, before).item() == 0.5
    assert flip_rate(before, before).item() == 0
    p, q = distributions(3, 4, 5), distributions(3, 4, 5)
    assert probe_velocity(p, q).item() == pytest.approx(distance(p.numpy(), q.numpy()).mean(), abs=1e-7)
    means = p.numpy().mean((0, 1)), q.numpy().mean((0, 1))
    assert fsi_velocity(p, q).item() == pytest.approx(distance(*means), abs=1e-7)


def test_expert_counts():
    ids = torch.tensor([[[0, 2]], [[2, 3]]])
    assert expert_counts(ids, 5).tolist() == [1, 0, 2, 1, 0]
    assert expert_counts(torch.zeros(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.2, got 0\.\.3"):
        expert_counts(ids, 3)
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.4, got -1\.\.2"):
        expert_counts(ids - torch.eye(2, dtype=torch.int64)[:, None], 5)
    with pytest.raises(ValueError, match="ids must be integers, got torch"):
        expert_counts(ids.float(), 5)


DIFFERENTIABLE = METRICS | {
    "fsi_load": lambda p: fsi_load(p, 2, normalized=True),
    "fsi_squared": lambda p: fsi(p).square(),
    "dispersion_from_means": lambda p: dispersion_from_means(p.mean(0), p.sqrt().mean(0)),
    "fsi_velocity": lambda p: fsi_velocity(p, torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=p.dtype)),
    "probe_velocity": lambda p: probe_velocity(p, p.detach().flip(-1)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_against_finite_differences(name):
    logits = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    if name == "probe_velocity":  # the other batch must stand still
        previous = distributions(6, 4)
        assert torch.autograd.gradcheck(lambda z: probe_velocity(z.softmax(-1), previous), (logits,), atol=1e-7)
    else:
        assert torch.autograd.gradcheck(lambda z: DIFFERENTIABLE[name](z.softmax(-1)), (logits,), atol=1e-7)


HARD = {
    "balance": torch.zeros(5, 4),
    "balanced one-hots": 1e4 * torch.eye(4),
    "collapse": torch.tensor([[1e4, 0.0, 0.0, 0.0]]).repeat(5, 1),
    "underflow": torch.tensor([[0.0, -80.0, -95.0, -1e3], [0.0, -90.0, -102.0, -1e3]]),
    "one token": torch.tensor([[3.0, 1.0, -200.0, -300.0]]),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_stay_finite(name, case, dtype):
    logits = HARD[case].to(dtype, copy=True).requires_grad_()
    p = routing_probabilities(logits)
    if name == "dispersion_from_means":
        value = dispersion_from_means(p.mean(0), (0.5 * logits.log_softmax(-1)).exp().mean(0))
    else:
        value = DIFFERENTIABLE[name](p)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() < 10


def test_sums_first():
    """A batch's metric comes from its added parts, and the mean of the parts' metrics is something else."""
    parts = [distributions(10, 4, scale=3.0) for _ in range(4)]
    whole = torch.cat(parts)
    mean_p = sum(p.sum(0) for p in parts) / 40
    mean_root = sum(p.sqrt().sum(0) for p in parts) / 40
    mean_entropy = sum(entropy(p).sum() for p in parts) / 40
    assert fsi(mean_p).item() == pytest.approx(fsi(whole).item(), rel=1e-12)
    assert information_from_means(mean_p, mean_entropy).item() == pytest.approx(
        routing_information(whole).item(), rel=1e-12
    )
    one_pass = dispersion_from_means(whole.mean(0), whole.sqrt().mean(0))
    assert dispersion_from_means(mean_p, mean_root).item() == pytest.approx(one_pass.item(), rel=1e-12)
    counts = [expert_counts(p.topk(2).indices, 4) for p in parts]
    together = fsi_load(expert_counts(whole.topk(2).indices, 4), 2)
    assert fsi_load(torch.stack(counts), 2).item() == pytest.approx(together.item(), rel=1e-6)
    # d is convex: the mean of the parts is larger.
    assert sum(fsi(p) for p in parts) / 4 > fsi(whole) * 1.05


@pytest.mark.parametrize("name", NORMALIZED)
def test_one_expert_reads_zero(name):
    p = torch.ones(5, 1, requires_grad=True)
    value = METRICS[name](p)
    assert value.item() == 0
    value.backward()
    assert p.grad.isfinite().all()
    assert fsi(p).item() == 0
    assert fsi_load(torch.tensor([7]), 1, normalized=True).item() == 0
    assert dispersion_from_means(torch.ones(1), torch.ones(1)).item() == 0


@pytest.mark.parametrize("name", METRICS)
def test_half_precision_is_computed_in_fp32(name):
    p = distributions(64, 8).to(torch.bfloat16)
    value = METRICS[name](p)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(METRICS[name](p.double()).item(), abs=1e-5)


def test_bf16_tokens_are_summed_in_fp32():
    """A bf16 sum of 4096 equal shares would stop growing at 256 of them."""
    p = torch.tensor([[0.75, 0.25]], dtype=torch.bfloat16).repeat(4096, 1)
    assert fsi(p).item() == pytest.approx(math.pi / 6, abs=1e-6)


@pytest.mark.parametrize("metric", [*METRICS.values(), lambda p: probe_velocity(p, p), lambda p: fsi_velocity(p, p)])
def test_bad_p(metric):
    with pytest.raises(ValueError, match=r"p must hold distributions \(its rows sum to .* on average\): pass prob"):
        metric(torch.randn(100, 4))
    with pytest.raises(ValueError, match="p must hold distributions"):
        metric(torch.tensor([[1.5, -0.5]]))
    with pytest.raises(ValueError, match="p must hold distributions"):
        metric(2 * distributions(3, 4))
    for shape in ((0, 4), (3, 0), (0,), (2, 0, 4)):
        with pytest.raises(ValueError, match=r"p must be .* with at least one token and one expert, got"):
            metric(torch.ones(shape))
    with pytest.raises(ValueError, match=r"got \(\)"):
        metric(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"p must be floating point, got torch\.int64"):
        metric(torch.ones(3, 4, dtype=torch.int64))


def test_other_bad_input():
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        fsi_max(0)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k must be between 1 and the number of experts 4, got {k}"):
            fsi_load(torch.ones(4), k)
    with pytest.raises(ValueError, match="counts must have a positive sum, got 0"):
        fsi_load(torch.zeros(4), 1)
    with pytest.raises(ValueError, match=r"counts must be \(\.\.\., E\) with at least one token and one expert"):
        fsi_load(torch.ones(0), 1)
    p = distributions(3, 4)
    for metric in (probe_velocity, flip_rate):
        with pytest.raises(ValueError, match=r"must have one shape, got \(3, 4\) and \(2, 4\)"):
            metric(p, p[:2])
    with pytest.raises(ValueError, match="experts"):
        fsi_velocity(p, distributions(3, 5))
    for mean_root in (torch.ones(3), torch.ones(1, 4)):
        with pytest.raises(ValueError, match=r"mean_p and mean_root_p must be \(\.\.\., E\), got"):
            dispersion_from_means(torch.ones(4), mean_root)


def test_compiles_without_graph_breaks():
    p = distributions(9, 4, dtype=torch.float32)

    def family(p):
        return fsi(p), fsi_token(p), dispersion(p), routing_information(p), fsi_load(p, 1)

    torch._dynamo.reset()
    compiled = torch.compile(family, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p), family(p))
