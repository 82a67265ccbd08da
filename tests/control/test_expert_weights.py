"""Weights and moments of single experts: told apart, copied, drawn, reset, put back; nobody else's touched."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moegeo_router.control.expert_weights import (
    ExpertWeights,
    load_moments,
    moments_reason,
    reset_moments,
    save_moments,
    view,
)
from moegeo_router.routers.experts import Experts

E, D = 4, 6


class Stack(nn.Module):
    def __init__(self, **more: tuple[int, ...]) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, D, 3))
        self.bias = nn.Parameter(torch.randn(E, D))
        self.scale = nn.Parameter(torch.randn(E))
        for name, shape in more.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


def listed() -> Experts:
    modules = nn.ModuleList(nn.Sequential(nn.Linear(D, 3), nn.LayerNorm(3)) for _ in range(E))
    return Experts(name="experts", container=modules, modules=tuple(modules))


def stacked(**more: tuple[int, ...]) -> Experts:
    return Experts(name="experts", container=Stack(**more))


KINDS = {"list": listed, "stack": stacked}


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def weights(request) -> ExpertWeights:
    return ExpertWeights(request.param(), E)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everything(weights: ExpertWeights) -> list[list[Tensor]]:
    return [weights.save(expert) for expert in range(E)]


def changed(before: list[list[Tensor]], after: list[list[Tensor]]) -> list[int]:
    pairs = zip(before, after, strict=True)
    return [e for e, (a, b) in enumerate(pairs) if any(not torch.equal(*pair) for pair in zip(a, b, strict=True))]


def test_slices_are_views_of_one_expert(weights):
    before = everything(weights)
    with torch.no_grad():
        for piece in weights.slices(2):
            view(piece).add_(1)
    assert changed(before, everything(weights)) == [2]
    assert sum(view(p).numel() for e in range(E) for p in weights.slices(e)) == sum(
        p.numel() for p in weights.parameters
    )


def test_a_copy_without_noise_is_the_donor_bit_for_bit(weights):
    before = everything(weights)
    weights.copy(1, 3, 0.0, generator())
    after = everything(weights)
    assert changed(before, after) == [3]
    assert all(torch.equal(a, b) for a, b in zip(after[3], before[1], strict=True))


@given(noise=st.floats(1e-3, 1.0), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_noise_is_relative_to_each_tensor(noise, seed):
    torch.manual_seed(seed)
    stack = Stack(large=(E, 40, 40))
    with torch.no_grad():
        stack.large.mul_(100)
    weights = ExpertWeights(Experts(name="experts", container=stack), E)
    weights.copy(0, 1, noise, generator(seed))
    for source, target in zip(weights.save(0), weights.save(1), strict=True):
        relative = float((target - source).square().mean().sqrt() / source.square().mean().sqrt())
        assert 0 < relative < 5 * noise
    large = stack.large.detach()
    assert float((large[1] - large[0]).std() / large[0].std()) == pytest.approx(noise, rel=0.1)
    again = ExpertWeights(Experts(name="experts", container=stack), E)
    first = again.save(1)
    again.copy(0, 1, noise, generator(seed))
    assert all(torch.equal(a, b) for a, b in zip(first, again.save(1), strict=True))


def test_fresh_weights_are_as_large_as_the_live_ones():
    stack = Stack(large=(E, 60, 60), ones=(E, 3))
    with torch.no_grad():
        for expert, size in enumerate((1.0, 3.0, 100.0, 100.0)):
            stack.large[expert].mul_(size).add_(5 * size)
        stack.ones.fill_(1)
        stack.ones[3] = 7
    weights = ExpertWeights(Experts(name="experts", container=stack), E)
    before = everything(weights)
    expected = (before[0][3].square().mean().sqrt() + before[1][3].square().mean().sqrt()) / 2
    weights.fresh(3, [0, 1], generator())
    assert changed(before, everything(weights)) == [3]
    large = stack.large[3].detach()
    assert float(large.square().mean().sqrt()) == pytest.approx(float(expected), rel=0.05)
    assert abs(float(large.mean())) < 0.05 * float(expected)  # not the mean of the others: drawn around 0
    assert stack.ones[3].tolist() == [1, 1, 1]


def test_half_precision_is_computed_in_fp32():
    stack = Stack(large=(E, 300, 300)).half()
    with torch.no_grad():
        stack.large.mul_(1000)  # their squares are no halves
    weights = ExpertWeights(Experts(name="experts", container=stack), E)
    weights.copy(0, 1, 0.01, generator())
    weights.fresh(2, [0], generator())
    assert bool(stack.large.isfinite().all())
    assert stack.large.dtype == torch.float16
    assert float(stack.large[2].detach().float().std()) == pytest.approx(1000, rel=0.05)


def test_saved_weights_come_back(weights):
    before = everything(weights)
    weights.fresh(1, [0, 2], generator())
    weights.load(1, before[1])
    assert changed(before, everything(weights)) == []


def tied() -> Experts:
    modules = nn.ModuleList(nn.Linear(D, 3) for _ in range(E))
    modules[1].weight = modules[0].weight
    return Experts(name="experts", container=modules, modules=tuple(modules))


def unlike() -> Experts:
    modules = nn.ModuleList(nn.Linear(D, 3 + (e == 2)) for e in range(E))
    return Experts(name="experts", container=modules, modules=tuple(modules))


def buffered() -> Experts:
    modules = nn.ModuleList(nn.BatchNorm1d(D) for _ in range(E))
    return Experts(name="experts", container=modules, modules=tuple(modules))


def nested() -> Experts:
    stack = Stack()
    stack.add_module("inner", Stack())
    return Experts(name="experts", container=stack)


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (Experts(name="experts", container=nn.Linear(D, E * D)), "a way of their own"),
        (stacked(odd=(E + 1, D)), r"parameter odd of experts must be \(4, …\), got \(5, 6\)"),
        (stacked(odd=()), "parameter odd"),
        (nested(), "modules inside"),
        (tied(), "share parameters"),
        (unlike(), "expert 2 of experts has other parameters"),
        (buffered(), "buffers"),
    ],
    ids=["opaque", "another length", "scalar", "nested", "tied", "unlike", "buffers"],
)
def test_refused(experts, reason):
    with pytest.raises(ValueError, match=reason):
        ExpertWeights(experts, E)


def test_arguments_are_checked(weights):
    with pytest.raises(ValueError, match=r"expert must lie in 0..3, got 4"):
        weights.slices(4)
    with pytest.raises(ValueError, match="noise must be at least 0"):
        weights.copy(0, 1, -1.0, generator())
    with pytest.raises(ValueError, match="like must name"):
        weights.fresh(0, [], generator())
    with pytest.raises(ValueError, match="tensors, got 0"):
        weights.load(0, [])
    with pytest.raises(ValueError, match="experts has 4 modules, the router 5"):
        ExpertWeights(listed(), E + 1)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1),
}


def stepped(kind: str, experts: Experts, steps: int = 3) -> tuple[ExpertWeights, torch.optim.Optimizer]:
    weights = ExpertWeights(experts, E)
    optimizer = OPTIMIZERS[kind](weights.parameters)
    for _ in range(steps):
        for parameter in weights.parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return weights, optimizer


def moments(weights: ExpertWeights, optimizer: torch.optim.Optimizer) -> list[list[dict[str, Tensor]]]:
    return [save_moments(weights.slices(expert), [optimizer]) for expert in range(E)]


def moments_changed(before, after) -> list[int]:
    return [
        e
        for e in range(E)
        if any(not torch.equal(a[n], b[n]) for a, b in zip(before[e], after[e], strict=True) for n in a)
    ]


SIZES = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum")


@pytest.mark.parametrize("experts", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_moments_of_a_copy(kind, experts):
    weights, optimizer = stepped(kind, experts())
    assert moments_reason(weights.parameters, [optimizer]) is None
    before = moments(weights, optimizer)
    reset_moments(weights.slices(1), [weights.slices(0)], [optimizer])
    after = moments(weights, optimizer)
    assert moments_changed(before, after) == ([] if kind == "plain SGD" else [1])
    for own, donor in zip(after[1], before[0], strict=True):
        for name, values in own.items():
            expected = donor[name] if name in SIZES else torch.zeros_like(values)
            assert torch.equal(values, expected), name
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in weights.parameters)
    load_moments(weights.slices(1), before[1], [optimizer])
    assert not any(
        not torch.equal(a[n], b[n]) for a, b in zip(before[1], moments(weights, optimizer)[1], strict=True) for n in a
    )


def test_moments_of_fresh_weights_are_the_mean_of_the_live_ones():
    weights, optimizer = stepped("AdamW", stacked())
    before = moments(weights, optimizer)
    reset_moments(weights.slices(3), [weights.slices(0), weights.slices(2)], [optimizer])
    for own, a, b in zip(moments(weights, optimizer)[3], before[0], before[2], strict=True):
        assert torch.allclose(own["exp_avg_sq"], (a["exp_avg_sq"] + b["exp_avg_sq"]) / 2)
        assert not own["exp_avg"].any()


def test_the_first_steps_are_no_longer_than_the_donors():
    """From second moments of 0, late in a run, they would be (1 - β₁) / √(1 - β₂) = 3.2 rates long."""
    weights, optimizer = stepped("AdamW", stacked(), steps=300)
    reset_moments(weights.slices(1), [weights.slices(0)], [optimizer])
    before = weights.save(1)
    for parameter in weights.parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    length = max(float((a - b).abs().mean()) for a, b in zip(before, weights.save(1), strict=True))
    assert length < 0.1  # the rate


@pytest.mark.parametrize(("own", "others"), [(2, 50), (50, 2)], ids=["behind", "ahead"])
def test_second_moments_are_the_donors_as_the_bias_correction_sees_them(own, others):
    weights = ExpertWeights(listed(), E)
    optimizer = torch.optim.Adam(weights.parameters, lr=0.1, betas=(0.9, 0.999))
    for step in range(max(own, others)):
        for expert, last in ((0, others), (1, own)):
            for parameter, _ in weights.slices(expert):
                parameter.grad = torch.randn_like(parameter) if step < last else None
        optimizer.step()
    reset_moments(weights.slices(1), [weights.slices(0)], [optimizer])
    for (target, _), (donor, _) in zip(weights.slices(1), weights.slices(0), strict=True):
        corrected = [
            optimizer.state[p]["exp_avg_sq"] / (1 - 0.999 ** float(optimizer.state[p]["step"])) for p in (target, donor)
        ]
        assert torch.allclose(*corrected, rtol=1e-4)
        assert float(optimizer.state[target]["step"]) == own


def test_weights_that_were_never_stepped_have_no_moments_and_get_none():
    weights = ExpertWeights(listed(), E)
    optimizer = torch.optim.AdamW(weights.parameters)
    for parameter, _ in weights.slices(0):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert moments_reason(weights.parameters, [optimizer]) is None
    reset_moments(weights.slices(1), [weights.slices(0)], [optimizer])
    assert all(parameter not in optimizer.state for parameter, _ in weights.slices(1))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.Adafactor(p), r"Adafactor's state 'row_var' is \(4, 6, 1\) for a parameter \(4, 6, 3\)"),
        (lambda p: torch.optim.ASGD(p), "ASGD's state 'ax'"),
    ],
    ids=["factored", "unknown"],
)
def test_moments_that_cannot_be_reset(make, reason):
    weights = ExpertWeights(stacked(), E)
    optimizer = make(weights.parameters)
    assert moments_reason(weights.parameters, [optimizer]) is None
    for parameter in weights.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = moments_reason(weights.parameters, [optimizer])
    assert found is not None
    assert re.search(reason, found), found
