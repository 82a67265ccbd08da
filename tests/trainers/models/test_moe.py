"""The MoE layer: gating, routing record, symmetry over experts, degenerate shapes, errors."""

import functools
import warnings

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from trainers.models.moe import MoELayer

torch.set_num_threads(1)

linear = functools.partial(nn.Linear, bias=False)


def _layer(num_experts: int = 5, top_k: int = 2, dim: int = 8, **options) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(dim, 16, num_experts, top_k, linear, **options)
    layer.experts.reset_parameters(0.4, 0.4)
    return layer


def _oracle(layer: MoELayer, x_TD: Tensor, scores: str, renormalize: bool) -> Tensor:
    """Every expert on every token, weighed by hand."""
    z = x_TD @ layer.router.weight.T
    s = z.exp() / z.exp().sum(-1, keepdim=True) if scores == "softmax" else 1 / (1 + (-z).exp())
    # The k largest of each row, by sorting: an expert is chosen when fewer than k score higher.
    chosen = (z[:, :, None] < z[:, None, :]).sum(-1) < layer.top_k
    g = s * chosen
    if renormalize:
        g = g / g.sum(-1, keepdim=True)
    a = torch.einsum("td,edf->tef", x_TD, layer.experts.w_gate)
    h = a * torch.sigmoid(a) * torch.einsum("td,edf->tef", x_TD, layer.experts.w_up)
    return torch.einsum("te,tef,efd->td", g, h, layer.experts.w_down)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (3, 3), (1, 1)])
def test_output_and_gradients_equal_the_dense_mixture(num_experts, top_k, scores, renormalize):
    layer = _layer(num_experts, top_k, scores=scores, renormalize=renormalize).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    y, routing = layer(x)
    expected = _oracle(layer, x.reshape(-1, 8), scores, renormalize).view(3, 4, 8)
    torch.testing.assert_close(y, expected)
    factors = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    ours = torch.autograd.grad((y * factors).sum(), inputs)
    theirs = torch.autograd.grad((expected * factors).sum(), inputs)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-7)
    assert routing.logits.shape == (12, num_experts)
    assert routing.ids.shape == routing.weights.shape == (12, top_k)
    z = x.reshape(-1, 8) @ layer.router.weight.T
    torch.testing.assert_close(routing.logits, z)
    s = z.exp() if scores == "softmax" else 1 / (1 + (-z).exp())
    torch.testing.assert_close(routing.probs, s / s.sum(-1, keepdim=True))


def test_routing_is_on_the_graph_and_reaches_the_router():
    layer = _layer()
    y, routing = layer(torch.randn(2, 3, 8))
    for quantity in (y, routing.logits, routing.weights):
        (gradient,) = torch.autograd.grad(quantity.square().sum(), layer.router.weight, retain_graph=True)
        assert gradient.norm() > 1e-4


def test_permuting_experts_with_their_router_rows_changes_nothing():
    layer, permuted = _layer(6, 3), _layer(6, 3)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    with torch.no_grad():
        for theirs, ours in zip(permuted.parameters(), layer.parameters(), strict=True):
            theirs.copy_(ours[order])
    x = torch.randn(4, 5, 8)
    (y, routing), (y_permuted, routing_permuted) = layer(x), permuted(x)
    torch.testing.assert_close(y_permuted, y)
    torch.testing.assert_close(order[routing_permuted.ids], routing.ids)
    torch.testing.assert_close(routing_permuted.logits, routing.logits[:, order])


def test_strided_input_equals_its_contiguous_copy():
    layer = _layer()
    x = torch.randn(8, 4, 3).permute(2, 1, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x)[0], layer(x.contiguous())[0], rtol=0, atol=0)


@pytest.mark.parametrize("experts", ["auto", "split", "grouped", "batched", "loop"])
def test_empty_batch_gives_empty_output_and_zero_gradients(experts):
    layer = _layer(experts=experts)
    y, routing = layer(torch.zeros(0, 7, 8))
    assert y.shape == (0, 7, 8)
    assert routing.ids.shape == (0, 2)
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("experts", ["auto", "batched", "loop"])
def test_non_finite_tokens_do_not_crash_and_stay_in_their_rows(bad, experts):
    layer = _layer(experts=experts)
    x = torch.randn(6, 8)
    clean, _ = layer(x)
    x[2] = bad
    y, routing = layer(x)
    assert 0 <= routing.ids.min() <= routing.ids.max() < 5
    assert not routing.logits[2].isfinite().all()
    others = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(y[others], clean[others])


def test_dtype_follows_the_input_and_gates_stay_in_float32():
    layer = _layer().bfloat16()
    y, routing = layer(torch.randn(2, 3, 8, dtype=torch.bfloat16))
    assert y.dtype is torch.bfloat16
    assert routing.logits.dtype is torch.bfloat16
    assert routing.weights.dtype is torch.float32


def test_geometric_router_is_a_drop_in():
    torch.manual_seed(0)
    layer = MoELayer(8, 12, 5, 2, mg.GeometricRouter)
    y, routing = layer(torch.randn(2, 3, 8))
    assert y.shape == (2, 3, 8)
    assert routing.logits.shape == (6, 5)


def test_top_one_with_renormalized_gates_warns_that_the_router_does_not_learn():
    with pytest.warns(UserWarning, match="top-1"):
        _layer(top_k=1)(torch.randn(2, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _layer(top_k=1, renormalize=False)(torch.randn(2, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"top_k": 6}, r"top_k must lie in \[1, num_experts = 5\], got 6"),
        ({"top_k": 0}, r"top_k must lie in \[1, num_experts = 5\], got 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"scores": "relu"}, "scores must be 'softmax' or 'sigmoid', got 'relu'"),
        ({"experts": "quick"}, "experts must be one of .*, got 'quick'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        _layer(**options)


def test_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"x must have width 8 in its last dimension, got \(2, 3, 9\)"):
        _layer()(torch.zeros(2, 3, 9))


def test_router_of_the_wrong_size_is_named():
    layer = MoELayer(8, 12, 5, 2, lambda dim, num_experts: nn.Linear(dim, num_experts + 1))
    with pytest.raises(ValueError, match=r"router must return logits \(6, 5\), got \(6, 6\)"):
        layer(torch.zeros(6, 8))
