"""Regularizers against closed forms, finite differences and loops over tokens; finite everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import moegeo_router as mg
from moegeo_router.losses import Linearization, Means, additive_loss, linearize, load_balance
from moegeo_router.metrics import fhs_squared
from moegeo_router.observe import LayerForward, LayerStatistics

E, K, T = 5, 2, 24
ON = {
    "fsi": mg.Regularizers(fsi=1.0),
    "fsi hinge": mg.Regularizers(fsi=1.0, fsi_target=0.1),
    "fhs": mg.Regularizers(fsi=0.0, fhs=1.0),
    "dispersion": mg.Regularizers(fsi=0.0, dispersion=1.0, dispersion_floor=0.9),
    "information": mg.Regularizers(fsi=0.0, information=1.0, information_floor=0.9),
    "balance": mg.Regularizers(fsi=0.0, balance=1.0),
    "z": mg.Regularizers(fsi=0.0, z=1.0),
}


def routing(seed: int = 0, experts: int = E, k: int = K) -> LayerForward:
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(T, experts, generator=generator, dtype=torch.float64) + torch.arange(experts)).clone()
    gating = mg.topk_gating(logits.requires_grad_(), k, renormalize=False)
    return LayerForward(layer="a", logits=logits, ids=gating.ids, gates=gating.weights)


def statistics(seen: LayerForward) -> LayerStatistics:
    return LayerStatistics.of(seen.logits.detach(), seen.ids, seen.mask, gates=seen.gates.detach())


def by_hand(name: str, means: Means, counts: Tensor, sensitivity: Tensor) -> float:
    """The regularizers as they are written in the docstring, in Python floats."""
    p = means.p.tolist()
    u, largest = 1 / len(p), 2 * math.acos(1 / math.sqrt(len(p)))
    distance = 2 * math.acos(min(1.0, sum(math.sqrt(x * u) for x in p)))
    overlap = sum(math.sqrt(x) * r for x, r in zip(p, means.root_p.tolist(), strict=True))
    information = -sum(x * math.log(x) for x in p) - float(means.entropy)
    traces = [s * g for s, g in zip(sensitivity.tolist(), means.gates_squared.tolist(), strict=True)]
    mean = sum(traces) / len(traces)
    load = (counts / counts.sum()).tolist()
    return {
        "fsi": distance**2,
        "fsi hinge": max(0.0, distance - 0.1 * largest) ** 2,
        "fhs": sum((t / mean - 1) ** 2 for t in traces) / len(traces),
        "dispersion": max(0.0, 0.9 - (2 * math.acos(overlap) / largest) ** 2) ** 2,
        "information": max(0.0, 0.9 - information / math.log(len(p))) ** 2,
        "balance": len(p) * sum(f * x for f, x in zip(load, p, strict=True)),
        "z": float(means.z_squared),
    }[name]


@pytest.mark.parametrize("name", ON)
def test_values_and_slopes(name):
    sums = statistics(routing())
    sensitivity = torch.linspace(0.5, 1.5, E, dtype=torch.float64)
    found = linearize(ON[name], sums, sensitivity)
    means = Means.of(sums)
    assert float(found.value) == pytest.approx(by_hand(name, means, sums.counts, sensitivity), rel=1e-9)
    for index, mean in enumerate(means):
        flat = mean.reshape(-1)
        expected = torch.zeros_like(flat)
        for coordinate in range(len(flat)):
            ends = []
            for sign in (1, -1):
                moved = flat.clone()
                moved[coordinate] += sign * 1e-6
                other = Means(*(moved.reshape(mean.shape) if i == index else m for i, m in enumerate(means)))
                ends.append(by_hand(name, other, sums.counts, sensitivity))
            expected[coordinate] = (ends[0] - ends[1]) / 2e-6
        slopes = found.slopes[index].reshape(-1)
        if index == 0:  # p sums to 1: a slope that all experts share is no slope
            slopes, expected = slopes - slopes.mean(), expected - expected.mean()
        torch.testing.assert_close(slopes, expected, rtol=1e-4, atol=1e-7)
    along = sum(float((slope * mean).sum()) for slope, mean in zip(found.slopes, means, strict=True))
    assert float(found.offset) + along == pytest.approx(float(found.value), rel=1e-9)


@pytest.mark.parametrize(
    "weights",
    [
        mg.Regularizers(fsi=1.0, fsi_target=0.9),
        mg.Regularizers(fsi=0.0, dispersion=1.0, dispersion_floor=0.01),
        mg.Regularizers(fsi=0.0, information=1.0, information_floor=0.01),
    ],
)
def test_hinges_do_nothing_where_they_are_met(weights):
    found = linearize(weights, statistics(routing()))
    assert float(found.value) == 0
    assert not any(bool(slope.any()) for slope in found.slopes)


@pytest.mark.parametrize("name", [name for name in ON if name != "fhs"])
def test_at_the_reference_itself_the_loss_is_the_regularizer(name):
    seen = routing()
    reference = linearize(ON[name], statistics(seen))
    assert float(additive_loss(seen, ON[name], reference).detach()) == pytest.approx(float(reference.value), rel=1e-9)


def test_the_value_has_the_balance_whatever_its_scope():
    sums = statistics(routing())
    values = [
        float(linearize(mg.Regularizers(balance=1.0, balance_scope=scope), sums).value)
        for scope in ("global", "micro_batch", "sequence")
    ]
    assert values[0] == values[1] == values[2] > 1


def test_means_over_tokens_and_over_tokens_with_gates_are_two():
    logits = routing().logits.detach()
    sums = LayerStatistics.of(logits) + statistics(routing(seed=1))
    means = Means.of(sums)
    assert float(means.p.sum()) == pytest.approx(1)
    p = torch.cat([logits.softmax(-1), routing(seed=1).logits.detach().softmax(-1)])
    torch.testing.assert_close(means.root_p, p.sqrt().mean(0))
    gates, ids = routing(seed=1).gates.detach(), routing(seed=1).ids
    torch.testing.assert_close(means.gates_squared, torch.zeros(T, E).double().scatter(1, ids, gates).square().mean(0))


def test_ids_of_any_integer_type():
    seen = routing()
    weights = mg.Regularizers(fhs=1.0, balance=1.0, balance_scope="micro_batch")
    reference = linearize(weights, statistics(seen), torch.linspace(0.5, 1.5, E, dtype=torch.float64))
    narrow = LayerForward(layer="a", logits=seen.logits, ids=seen.ids.to(torch.int32), gates=seen.gates)
    torch.testing.assert_close(additive_loss(narrow, weights, reference), additive_loss(seen, weights, reference))
    of_narrow = LayerStatistics.of(seen.logits.detach(), narrow.ids, gates=seen.gates.detach())
    torch.testing.assert_close(of_narrow.flat(), statistics(seen).flat())


def test_nothing_is_rounded_to_half_precision_under_autocast_or_for_bf16_logits():
    everything = mg.Regularizers(fsi=1, dispersion=1, information=1, balance=1, z=1)
    logits = routing().logits.detach().bfloat16()
    exact = LayerForward(layer="a", logits=logits.double(), ids=routing().ids)
    reference = linearize(everything, statistics(routing(seed=1)))
    expected = float(additive_loss(exact, everything, reference))
    low = LayerForward(layer="a", logits=logits, ids=routing().ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = additive_loss(low, everything, reference)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_slopes_of_fhs_are_those_of_its_square():
    seen = routing()
    sums, sensitivity = statistics(seen), torch.linspace(0.5, 1.5, E, dtype=torch.float64)
    reference = linearize(ON["fhs"], sums, sensitivity)
    (found,) = torch.autograd.grad(additive_loss(seen, ON["fhs"], reference), seen.gates, retain_graph=True)
    squares = torch.zeros(T, E, dtype=torch.float64).scatter(1, seen.ids, seen.gates).square().mean(0)
    (expected,) = torch.autograd.grad(fhs_squared(sensitivity * squares), seen.gates)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("experts", [1, 2, 8])
@pytest.mark.parametrize("state", ["balance", "collapse", "one-hot balance", "equal tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_perfect_balance_and_at_total_collapse(state, experts, dtype):
    logits = {
        "balance": torch.zeros(16, experts),
        "collapse": torch.full((16, experts), -300.0).index_fill(1, torch.tensor([0]), 300.0),
        "one-hot balance": 200.0 * torch.eye(experts).repeat(16, 1)[:16],
        "equal tokens": torch.randn(experts).expand(16, experts).clone(),
    }[state]
    logits = logits.to(dtype).requires_grad_()
    k = min(2, experts)
    gating = mg.topk_gating(logits, k, renormalize=False)
    seen = LayerForward(layer="a", logits=logits, ids=gating.ids, gates=gating.weights)
    everything = mg.Regularizers(fsi=1, fhs=1, dispersion=1, information=1, balance=1, z=1e-6)
    for sensitivity in (None, torch.ones(experts), torch.zeros(experts)):
        reference = linearize(everything, statistics(seen), sensitivity)
        loss = additive_loss(seen, everything, reference)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert bool(loss.isfinite())
        assert bool(gradient.isfinite().all())
        assert all(bool(slope.isfinite().all()) for slope in reference.slopes)


@pytest.mark.parametrize("k", [1, 2])
def test_load_balance_is_1_at_balance_and_e_over_k_where_k_experts_take_all(k):
    balanced = torch.eye(4).repeat(4, 1) + torch.eye(4).roll(1, 1).repeat(4, 1) * (k - 1)
    collapsed = torch.zeros(16, 4).index_fill(1, torch.arange(k), 1.0)
    for chosen, expected in ((balanced, 1.0), (collapsed, 4 / k)):
        ids = chosen.topk(k).indices
        seen = LayerForward(layer="a", logits=30 * chosen, ids=ids, sequences=torch.arange(16) // 4)
        for scope in ("micro_batch", "sequence"):
            assert float(load_balance(seen, seen.logits.softmax(-1), scope)) == pytest.approx(expected)


def test_load_balance_of_sequences_by_a_loop():
    seen = routing()
    mask = torch.arange(T) % 5 != 0
    sequences = torch.tensor([0] * 7 + [3] * 12 + [9] * 5)
    seen = LayerForward(layer="a", logits=seen.logits, ids=seen.ids, mask=mask, sequences=sequences)
    p, expected = seen.logits.softmax(-1), []
    for sequence in (0, 3, 9):
        chosen = (sequences == sequence) & mask
        load = torch.bincount(seen.ids[chosen].flatten(), minlength=E) / (K * chosen.sum())
        expected.append(E * (load * p[chosen].mean(0)).sum())
    found = load_balance(seen, p, "sequence")
    torch.testing.assert_close(found, torch.stack(expected).mean())
    of_all = torch.bincount(seen.ids[mask].flatten(), minlength=E) / (K * mask.sum())
    torch.testing.assert_close(load_balance(seen, p), E * (of_all * p[mask].mean(0)).sum())


def test_what_is_masked_has_no_part_whatever_it_holds():
    seen = routing()
    mask = torch.arange(T) % 3 != 0
    everything = mg.Regularizers(fsi=1, dispersion=1, information=1, balance=1, balance_scope="micro_batch", z=1)
    reference = linearize(everything, statistics(seen))
    alone = LayerForward(layer="a", logits=seen.logits[mask], ids=seen.ids[mask])
    expected = additive_loss(alone, everything, reference)
    broken = seen.logits.detach().masked_fill(~mask[:, None], math.nan).requires_grad_()
    masked = LayerForward(layer="a", logits=broken, ids=seen.ids, mask=mask)
    found = additive_loss(masked, everything, reference)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, broken)
    assert bool(gradient.isfinite().all())
    assert not bool(gradient[~mask].any())


def test_without_a_reference_only_what_needs_none_is_on():
    seen = routing()
    assert float(additive_loss(seen, mg.Regularizers(fsi=1, dispersion=1, balance=1), None).detach()) == 0
    z = float(seen.logits.detach().logsumexp(-1).square().mean())
    assert float(additive_loss(seen, mg.Regularizers(z=0.5), None).detach()) == pytest.approx(0.5 * z)


def test_a_given_number_of_tokens_divides():
    seen = routing()
    weights = mg.Regularizers(fsi=1, balance=1, balance_scope="micro_batch", z=1)
    reference = linearize(weights, statistics(routing(seed=1)))
    alone = additive_loss(seen, weights, reference)
    torch.testing.assert_close(additive_loss(seen, weights, reference, tokens=3 * T), alone / 3)


def test_sigmoid_scores():
    seen = routing()
    p = seen.logits.sigmoid() / seen.logits.sigmoid().sum(-1, keepdim=True)
    sums = LayerStatistics.of(seen.logits.detach(), seen.ids, scores="sigmoid")
    reference = linearize(ON["fsi"], sums)
    found = additive_loss(seen, ON["fsi"], reference, scores="sigmoid")
    (gradient,) = torch.autograd.grad(found, seen.logits, retain_graph=True)
    (expected,) = torch.autograd.grad(mg.fsi(p).square(), seen.logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision(dtype, tolerance):
    exact = routing()
    reference = linearize(ON["fsi"], statistics(exact))
    low = LayerForward(layer="a", logits=exact.logits.detach().to(dtype), ids=exact.ids)
    found = additive_loss(low, ON["fsi"], reference)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(additive_loss(exact, ON["fsi"], reference).detach()), abs=tolerance)


def test_statistics_and_losses_compile_without_a_break():
    everything = mg.Regularizers(fsi=1, fhs=1, dispersion=1, information=1, balance=1, z=1)
    seen = routing()
    reference = linearize(everything, statistics(seen), torch.ones(E))

    def step(logits: Tensor, ids: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        now = LayerForward(layer="a", logits=logits, ids=ids, gates=gates)
        flat = LayerStatistics.of(logits, ids, gates=gates).flat()
        return additive_loss(now, everything, reference), flat

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    inputs = seen.logits, seen.ids, seen.gates.detach().requires_grad_()
    for found, expected in zip(compiled(*inputs), step(*inputs), strict=True):
        torch.testing.assert_close(found, expected)
    torch.compiler.reset()


def test_no_tokens_is_no_regularizer():
    empty = linearize(mg.Regularizers(fsi=1, dispersion=1, information=1, balance=1, z=1), LayerStatistics.zeros(E))
    assert isinstance(empty, Linearization)
    assert float(empty.value) == float(empty.offset) == 0
    # The slope of z-loss is the same everywhere; the others are not known.
    assert float(empty.slopes.z_squared) == 1
    assert not any(bool(slope.any()) for slope in empty.slopes._replace(z_squared=torch.zeros(())))
    seen = LayerForward(layer="a", logits=torch.zeros(0, E).requires_grad_(), ids=torch.zeros(0, K, dtype=torch.long))
    for scope in ("global", "micro_batch"):
        loss = additive_loss(seen, mg.Regularizers(z=1, balance=1, balance_scope=scope), empty)
        assert float(loss.detach()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsi": -1}, r"regularizers\.fsi must be a weight of at least 0, got -1"),
        ({"z": math.nan}, r"regularizers\.z must be a weight"),
        ({"fsi_target": 1.0}, r"regularizers\.fsi_target must be in \[0, 1\)"),
        ({"fsi": math.inf}, r"regularizers\.fsi must be a weight"),
        ({"dispersion_floor": 0.0}, r"regularizers\.dispersion_floor must be in \(0, 1\]"),
        ({"dispersion_floor": 1.1}, r"regularizers\.dispersion_floor must be in \(0, 1\]"),
        ({"information_floor": 0.0}, r"regularizers\.information_floor must be in \(0, 1\]"),
        ({"information_floor": 2.0}, r"regularizers\.information_floor must be in \(0, 1\]"),
        ({"balance_scope": "layer"}, r"regularizers\.balance_scope must be one of"),
    ],
)
def test_bad_weights(options, message):
    with pytest.raises(ValueError, match=message):
        mg.Regularizers(**options)


def test_what_a_scope_needs_is_said():
    seen = LayerForward(layer="a", logits=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="layer a: the load-balance loss needs the chosen experts"):
        load_balance(seen, seen.logits.softmax(-1))
    seen = LayerForward(layer="a", logits=torch.zeros(4, 2), ids=torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"balance_scope='sequence' needs the sequences"):
        load_balance(seen, seen.logits.softmax(-1), "sequence")


def test_a_reference_of_a_collapse_in_double_precision_is_finite_in_single():
    logits = torch.full((16, E), -300.0, dtype=torch.float64)
    logits[:, 0] = 300.0
    weights = mg.Regularizers(fsi=1.0, dispersion=1.0, information=1.0)
    reference = linearize(weights, LayerStatistics.of(logits))
    assert all(float(slope.abs().max()) < 1e7 for slope in reference.slopes)
    low = logits.float().requires_grad_()
    loss = additive_loss(LayerForward(layer="a", logits=low), weights, reference)
    (gradient,) = torch.autograd.grad(loss, low)
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", ["dispersion", "information"])
def test_one_expert_can_neither_disperse_nor_inform(name):
    found = linearize(mg.Regularizers(fsi=0.0, **{name: 1.0}), LayerStatistics.of(torch.randn(8, 1)))
    assert float(found.value) == float(found.offset) == 0
