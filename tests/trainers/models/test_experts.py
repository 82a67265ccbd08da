"""The expert functions against a token-by-token oracle that shares no code with them."""

import pytest
import torch
from torch import Tensor

from trainers.models import experts as E
from trainers.models.experts import SwiGLUExperts

torch.set_num_threads(1)

DIM, HIDDEN = 8, 16
FAST = [E.split, E.grouped, E.batched, E.auto]
# tokens, experts, chosen, how the ids are made
CASES = {
    "usual": (23, 5, 2, "random"),
    "empty experts": (6, 16, 2, "random"),
    "every expert chosen": (9, 4, 4, "random"),
    "one expert": (7, 1, 1, "random"),
    "all on one expert": (11, 6, 1, "last"),
    "no tokens": (0, 4, 2, "random"),
    "one token": (1, 3, 2, "random"),
}


def _inputs(tokens: int, num_experts: int, top_k: int, how: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if how == "last":
        ids = torch.full((tokens, top_k), num_experts - 1)
    else:
        ids = torch.rand(tokens, num_experts, generator=generator).argsort(dim=-1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).to(dtype)
    x = normal(tokens, DIM)
    w_gate, w_up = normal(num_experts, DIM, HIDDEN), normal(num_experts, DIM, HIDDEN)
    return [x, weights, ids, w_gate, w_up, normal(num_experts, HIDDEN, DIM)]


def _oracle(x: Tensor, weights: Tensor, ids: Tensor, stacks: E.Stacks) -> Tensor:
    """One token, one expert, one matrix-vector product at a time."""
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros_like(x[t])
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            gate = stacks.gate[e].T @ x[t]
            hidden = gate / (1 + torch.exp(-gate)) * (stacks.up[e].T @ x[t])
            row = row + weights[t, k] * (stacks.down[e].T @ hidden)
        rows.append(row)
    return torch.stack(rows) if rows else x * 1


def _value_and_gradients(function: E.ExpertFunction, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    y = function(*inputs[:3], E.Stacks(*inputs[3:]))
    # A different factor for every entry: an error in one row or column cannot cancel in the sum.
    factors = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    wanted = [t for t in inputs if t.is_floating_point()]
    # An input that the function does not reach (no token, no product) has a zero gradient.
    gradients = torch.autograd.grad((y * factors).sum(), wanted, allow_unused=True, materialize_grads=True)
    return [y.detach(), *gradients]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("function", [E.loop, E.split, E.batched, E.auto], ids=lambda f: f.__name__)
def test_values_and_all_gradients_in_float64(function, case):
    inputs = _inputs(*case, dtype=torch.float64)
    expected = _value_and_gradients(_oracle, inputs)
    got = _value_and_gradients(function, inputs)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("function", FAST, ids=lambda f: f.__name__)
def test_values_and_all_gradients_in_float32(function, case):
    inputs = _inputs(*case, dtype=torch.float32)
    expected = _value_and_gradients(_oracle, inputs)
    got = _value_and_gradients(function, inputs)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [E.loop, *FAST], ids=lambda f: f.__name__)
def test_bfloat16_tokens_keep_their_dtype_and_accuracy(function):
    inputs = _inputs(40, 5, 2, "random", torch.float64)
    exact = _oracle(*inputs[:3], E.Stacks(*inputs[3:]))
    low = [t.bfloat16() if t.is_floating_point() else t for t in inputs]
    low[1] = inputs[1].float()  # the gates stay in float32
    y = function(*low[:3], E.Stacks(*low[3:]))
    assert y.dtype is torch.bfloat16
    assert (y.double() - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("function", [E.loop, *FAST], ids=lambda f: f.__name__)
def test_sum_over_experts_is_not_rounded_to_bfloat16(function):
    # Both experts answer 1024, so the gated parts are 256.9 and 0.2. bfloat16 counts in steps of 2 there: the sum
    # 257.1 is 258, but a part, or a gate, rounded before the sum gives 256.
    x = torch.tensor([[16.0] + [0.0] * 7], dtype=torch.bfloat16)
    one = torch.zeros(2, 8, 8, dtype=torch.bfloat16)
    one[:, 0, 0] = 1.0
    weights = torch.tensor([[256.9 / 1024, 0.2 / 1024]])
    y = function(x, weights, torch.tensor([[0, 1]]), E.Stacks(4 * one, one, one))  # silu(64) · 16 = 1024
    assert y[0, 0].item() == 258.0


@pytest.mark.parametrize("compute", ["auto", "split", "grouped", "batched", "loop"])
def test_autocast_computes_in_bfloat16_and_returns_the_dtype_of_x(compute):
    torch.manual_seed(0)
    layer = SwiGLUExperts(4, 16, 24, compute)
    layer.reset_parameters(0.3, 0.3)
    x = torch.randn(30, 16, requires_grad=True)
    weights, ids = torch.rand(30, 2), torch.rand(30, 4).argsort(-1)[:, :2]
    exact = layer(x, weights, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, weights, ids)
    assert y.dtype is torch.float32
    error = ((y - exact).norm() / exact.norm()).item()
    assert 1e-4 < error < 0.02  # bfloat16 was used, and used well
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.float32
    assert layer.w_down.grad is not None


def test_module_hands_the_right_weight_to_the_right_place():
    inputs = _inputs(10, 3, 2, "random", torch.float64)
    layer = SwiGLUExperts(3, DIM, HIDDEN, "loop").double()
    with torch.no_grad():
        for parameter, value in zip((layer.w_gate, layer.w_up, layer.w_down), inputs[3:], strict=True):
            parameter.copy_(value)
    torch.testing.assert_close(layer(*inputs[:3]), _oracle(*inputs[:3], E.Stacks(*inputs[3:])))


def test_reset_parameters_scales_the_output_weight_apart():
    torch.manual_seed(0)
    layer = SwiGLUExperts(4, 64, 64)
    layer.reset_parameters(0.5, 0.1)
    assert layer.w_gate.std().item() == pytest.approx(0.5, rel=0.05)
    assert layer.w_up.std().item() == pytest.approx(0.5, rel=0.05)
    assert layer.w_down.std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("name", ["num_experts", "dim", "hidden"])
def test_sizes_below_one_are_named(name):
    sizes = {"num_experts": 2, "dim": 8, "hidden": 8, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        SwiGLUExperts(**sizes)


def test_unknown_compute_is_named():
    with pytest.raises(ValueError, match="experts must be one of auto, split, grouped, batched, loop, got 'fast'"):
        SwiGLUExperts(2, 8, 8, "fast")


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 8), (torch.float32, 6)])
def test_grouped_says_what_it_cannot_take(dtype, dim):
    layer = SwiGLUExperts(2, dim, 8, "grouped").to(dtype)
    x = torch.zeros(3, dim, dtype=dtype)
    with pytest.raises(ValueError, match="experts='grouped' needs float32"):
        layer(x, torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("device", "dtype", "hidden", "chosen"),
    [
        ("cpu", torch.float32, 16, "split"),
        ("cpu", torch.bfloat16, 16, "split"),
        ("meta", torch.bfloat16, 16, "grouped"),  # meta stands for any accelerator
        ("meta", torch.bfloat16, 12, "batched"),  # grouped products need whole 16 bytes
        ("meta", torch.float32, 16, "batched"),
    ],
)
def test_auto_takes_the_function_made_for_the_device(monkeypatch, device, dtype, hidden, chosen):
    for name in ("split", "grouped", "batched"):
        monkeypatch.setattr(E, name, lambda *_, name=name: name)
    x, w = torch.empty(4, DIM, device=device, dtype=dtype), torch.empty(2, DIM, hidden, device=device, dtype=dtype)
    assert E.auto(x, x, x, E.Stacks(w, w, w)) == chosen
