"""``GeometricRouter`` against dense formulas, finite differences and ``nn.Linear`` itself."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from moegeo_router import GeometricRouter
from moegeo_router.routers import manifold_of

MANIFOLDS = ("polar", "sphere", "orthonormal", "euclidean")
NAMES = {"polar": "PolarRows", "sphere": "UnitRows", "orthonormal": "OrthonormalRows", "euclidean": "EuclideanRows"}
D, E = 7, 4


@pytest.fixture(params=MANIFOLDS)
def manifold(request):
    return request.param


def on_manifold(weight, manifold, atol=1e-5):
    """Whether the rows satisfy the definition of the manifold, by hand."""
    w = weight.detach().double()
    if manifold == "sphere":
        return torch.allclose(w.square().sum(-1), torch.ones(len(w), dtype=w.dtype), atol=atol)
    if manifold == "orthonormal":
        return torch.allclose(w @ w.T, torch.eye(len(w), dtype=w.dtype), atol=atol)
    return bool(w.isfinite().all() and (w.square().sum(-1) > 0).all())


def dense_logits(router, x):
    """The table of the class docstring, token by token, in float64 and without torch.nn."""
    w, rows = router.weight.detach().double(), x.detach().double().reshape(-1, x.shape[-1])
    out = torch.zeros(len(rows), len(w), dtype=torch.float64)
    for t, row in enumerate(rows):
        for e, w_e in enumerate(w):
            dot = sum(float(a) * float(b) for a, b in zip(row, w_e, strict=True))
            if router.manifold == "sphere":
                share = 1 / (1 + math.exp(-router.temperature_logit.item()))
                tau = 0.01 ** (1 - share) * 10.0**share
                dot /= math.sqrt(float(row @ row)) * math.sqrt(float(w_e @ w_e)) * tau
            out[t, e] = dot + (0.0 if router.bias is None else router.bias[e].item())
    return out.reshape(*x.shape[:-1], len(w))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_logits_are_the_dense_formula(manifold, lead, dtype, bias):
    router = GeometricRouter(D, E, manifold=manifold, bias=bias, dtype=dtype)
    x = (3 * torch.randn(*lead, D)).to(dtype)
    logits = router(x)
    assert logits.shape == (*lead, E)
    assert logits.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(logits.double(), dense_logits(router, x), rtol=tolerance, atol=2 * tolerance)


def test_no_tokens_works_like_linear(manifold):
    router = GeometricRouter(D, E, manifold=manifold)
    x = torch.randn(2, 0, D, requires_grad=True)
    logits = router(x)
    assert logits.shape == (2, 0, E)
    logits.sum().backward()
    assert torch.equal(router.weight.grad, torch.zeros(E, D))


def test_non_contiguous_input(manifold):
    router = GeometricRouter(D, E, manifold=manifold)
    x = torch.randn(D, 3, 10)[:, :, ::2].permute(2, 1, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(router(x), router(x.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize(("num_experts", "in_features"), [(1, 7), (4, 4), (1, 2)])
def test_one_expert_and_square(manifold, num_experts, in_features):
    router = GeometricRouter(in_features, num_experts, manifold=manifold)
    x = torch.randn(3, in_features)
    torch.testing.assert_close(router(x).double(), dense_logits(router, x), rtol=1e-5, atol=1e-5)
    assert on_manifold(router.weight, manifold)


@pytest.mark.parametrize("name", ["polar", "euclidean"])
def test_starts_like_linear_bit_for_bit(name):
    torch.manual_seed(3)
    linear = nn.Linear(D, E)
    torch.manual_seed(3)
    router = GeometricRouter(D, E, manifold=name)
    assert torch.equal(router.weight, linear.weight)
    assert torch.equal(router.bias, linear.bias)
    x = torch.randn(9, D)
    assert torch.equal(router(x), linear(x))


def test_cosine_and_orthonormal_start_from_the_directions_of_linear():
    torch.manual_seed(3)
    linear = nn.Linear(D, E)
    torch.manual_seed(3)
    cosine = GeometricRouter(D, E, manifold="sphere")
    w = linear.weight / linear.weight.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(cosine.weight.detach(), w.detach())
    # τ = 1/(√D · mean ‖w_e‖): for an input of norm √D the logits are as large as the linear ones.
    expected = 1 / (math.sqrt(D) * linear.weight.norm(dim=-1).mean().item())
    assert cosine.temperature.item() == pytest.approx(expected, rel=1e-5)
    torch.manual_seed(3)
    orthonormal = GeometricRouter(D, E, manifold="orthonormal")
    u, _, vt = torch.linalg.svd(linear.weight, full_matrices=False)
    torch.testing.assert_close(orthonormal.weight.detach(), (u @ vt).detach(), rtol=1e-4, atol=1e-5)


def test_gradients_against_finite_differences(manifold):
    router = GeometricRouter(5, 3, manifold=manifold, dtype=torch.float64)
    if manifold == "sphere":  # off the sphere the forward normalises, and the gradient knows
        router.weight.data.mul_(1.7)
    parameters = list(router.parameters())
    names = [name for name, _ in router.named_parameters()]

    def logits(x, *values):
        return torch.func.functional_call(router, dict(zip(names, values, strict=True)), (x,))

    inputs = [torch.randn(2, 5, dtype=torch.float64), *(p.detach().clone() for p in parameters)]
    assert torch.autograd.gradcheck(logits, [v.requires_grad_() for v in inputs], eps=1e-6, atol=1e-7)


def test_cosine_logits_ignore_the_length_of_input_and_rows():
    router = GeometricRouter(D, E, manifold="sphere", bias=False)
    x = torch.randn(6, D)
    before = router(x)
    torch.testing.assert_close(router(100 * x), before, rtol=1e-5, atol=1e-5)
    router.weight.data.mul_(5)
    torch.testing.assert_close(router(x), before, rtol=1e-5, atol=1e-5)
    # At the direction of row e its logit is 1/τ, and no logit is larger.
    own = router(router.weight.detach())
    torch.testing.assert_close(own.diagonal(), (1 / router.temperature).expand(E), rtol=1e-5, atol=1e-5)
    assert own.abs().max().item() <= (1 / router.temperature).item() * (1 + 1e-5)


@pytest.mark.parametrize("value", [-1e30, -1e4, -15.0, 0.0, 15.0, 1e4, 1e30])
def test_temperature_stays_within_its_bounds(value):
    router = GeometricRouter(D, E, manifold="sphere")
    router.temperature_logit.data.fill_(value)
    tau = router.temperature.item()
    assert 0.01 * (1 - 1e-6) <= tau <= 10 * (1 + 1e-6)
    if value == 0:
        assert tau == pytest.approx(math.sqrt(0.01 * 10), rel=1e-6)  # the geometric middle
    router.temperature.sum().backward()
    gradient = float(router.temperature_logit.grad)
    assert math.isfinite(gradient)
    if abs(value) <= 15:
        assert gradient > 0


@pytest.mark.parametrize(("scale", "bound"), [(1e-10, 10.0), (1e6, 0.01)])
def test_extreme_weights_leave_the_temperature_a_gradient(scale, bound):
    linear = nn.Linear(D, E)
    linear.weight.data.mul_(scale)
    router = GeometricRouter.from_linear(linear, manifold="sphere", allow_change=True)
    assert router.temperature.item() == pytest.approx(bound, rel=0.08)
    router.temperature.sum().backward()
    assert float(router.temperature_logit.grad) > 1e-4
    assert on_manifold(router.weight, "sphere")


def test_temperature_only_exists_on_the_sphere(manifold):
    router = GeometricRouter(D, E, manifold=manifold)
    keys = ["weight", "bias"] + (["temperature_logit"] if manifold == "sphere" else [])
    assert list(router.state_dict()) == keys
    if manifold == "sphere":
        assert router.temperature.shape == router.temperature_logit.shape == (1,)
    else:
        with pytest.raises(AttributeError, match="temperature"):
            router.temperature


def assert_same(twin, router, x):
    assert type(twin.weight) is type(router.weight)
    assert type(twin.weight.manifold).__name__ == NAMES[router.manifold]
    assert twin.weight is not router.weight
    assert twin.weight.requires_grad
    assert torch.equal(twin(x), router(x))


def test_deepcopy_and_pickle(manifold):
    router, x = GeometricRouter(D, E, manifold=manifold), torch.randn(3, D)
    assert_same(copy.deepcopy(router), router, x)
    assert_same(pickle.loads(pickle.dumps(router)), router, x)


def test_state_dict_holds_plain_tensors_and_loads(manifold):
    router, x = GeometricRouter(D, E, manifold=manifold), torch.randn(3, D)
    buffer = io.BytesIO()
    torch.save(router.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert all(type(value) is torch.Tensor for value in state.values())
    other = GeometricRouter(D, E, manifold=manifold)
    weight = other.weight
    other.load_state_dict(state)
    assert other.weight is weight
    assert_same(other, router, x)


def test_a_linear_checkpoint_loads():
    linear, router, x = nn.Linear(D, E), GeometricRouter(D, E), torch.randn(3, D)
    router.load_state_dict(linear.state_dict())
    assert torch.equal(router(x), linear(x))
    linear.load_state_dict(GeometricRouter(D, E).state_dict())


def test_moving_dtypes_keeps_the_manifold(manifold):
    router = GeometricRouter(D, E, manifold=manifold)
    weight = router.weight
    assert router.to(torch.float64) is router
    assert router.weight is weight
    assert weight.dtype == torch.float64
    assert type(manifold_of(weight)).__name__ == NAMES[manifold]
    assert router(torch.randn(3, D, dtype=torch.float64)).dtype == torch.float64


def test_meta_device_then_reset(manifold):
    router = GeometricRouter(D, E, manifold=manifold, device="meta")
    assert all(p.is_meta for p in router.parameters())
    assert router(torch.randn(3, D, device="meta")).shape == (3, E)
    router.to_empty(device="cpu").reset_parameters()
    assert type(manifold_of(router.weight)).__name__ == NAMES[manifold]
    assert on_manifold(router.weight, manifold)
    assert router(torch.randn(3, D)).isfinite().all()


def test_reset_keeps_the_parameters_an_optimizer_holds(manifold):
    router = GeometricRouter(D, E, manifold=manifold)
    before = list(router.parameters())
    old = router.weight.detach().clone()
    router.reset_parameters()
    assert all(a is b for a, b in zip(before, router.parameters(), strict=True))
    assert not torch.equal(router.weight, old)
    assert on_manifold(router.weight, manifold)


def test_compiles_without_graph_breaks(manifold):
    router = GeometricRouter(D, E, manifold=manifold)
    x = torch.randn(5, D)

    def gradients(function):
        router.zero_grad()
        inputs = x.clone().requires_grad_()
        logits = function(inputs)
        logits.square().sum().backward()
        return [logits.detach(), inputs.grad, *(p.grad.clone() for p in router.parameters())]

    torch._dynamo.reset()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), gradients(router))


def test_a_riemannian_step_moves_the_weight_along_the_manifold(manifold):
    from geoopt.optim import RiemannianAdam

    router, x = GeometricRouter(D, E, manifold=manifold), torch.randn(64, D)
    target = torch.randint(E, (64,))
    optimizer = RiemannianAdam(router.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        before = router.weight.detach().clone()
        loss = nn.functional.cross_entropy(router(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert not torch.equal(router.weight, before)
        assert on_manifold(router.weight, manifold)
    assert losses[-1] < losses[0] - 0.02


def test_from_and_to_linear_are_exact_copies():
    linear, x = nn.Linear(D, E), torch.randn(9, D)
    for name in ("polar", "euclidean"):
        router = GeometricRouter.from_linear(linear, manifold=name)
        back = router.to_linear()
        assert type(back) is nn.Linear
        assert torch.equal(router(x), linear(x))
        assert torch.equal(back(x), linear(x))
        assert type(back.weight) is nn.Parameter
        router.weight.data.zero_()
        assert not torch.equal(back(x), router(x))
        assert linear.weight.abs().sum().item() > 0


def test_to_linear_of_a_cosine_router_agrees_at_norm_root_d():
    router = GeometricRouter(D, E, manifold="sphere")
    router.temperature_logit.data.fill_(-0.3)
    x = torch.randn(9, D)
    x = x / x.norm(dim=-1, keepdim=True) * math.sqrt(D)
    torch.testing.assert_close(router.to_linear(allow_change=True)(x), router(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"normalises its input, nn\.Linear does not: pass allow_change=True"):
        router.to_linear()


def test_from_linear_keeps_flags():
    linear = nn.Linear(D, E, dtype=torch.bfloat16).eval()
    linear.bias.requires_grad_(False)
    router = GeometricRouter.from_linear(linear)
    assert (router.weight.dtype, router.training) == (torch.bfloat16, False)
    assert router.weight.requires_grad
    assert not router.bias.requires_grad
    assert not router.to_linear().bias.requires_grad
    linear = nn.Linear(D, E, bias=False)
    linear.weight.requires_grad_(False)
    router = GeometricRouter.from_linear(linear)
    assert router.bias is None
    assert not router.weight.requires_grad


def test_from_linear_of_a_cosine_router_needs_permission():
    cosine = GeometricRouter(D, E, manifold="sphere")
    with pytest.raises(ValueError, match="pass allow_change=True"):
        GeometricRouter.from_linear(cosine)
    x = torch.randn(9, D)
    x = x / x.norm(dim=-1, keepdim=True) * math.sqrt(D)
    router = GeometricRouter.from_linear(cosine, allow_change=True)
    torch.testing.assert_close(router(x), cosine(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sphere", "orthonormal"])
def test_from_linear_asks_before_it_changes_the_function(name):
    with pytest.raises(ValueError, match=f"{name} rows change the function .*allow_change=True"):
        GeometricRouter.from_linear(nn.Linear(D, E), manifold=name)
    router = GeometricRouter.from_linear(nn.Linear(D, E), manifold=name, allow_change=True)
    assert on_manifold(router.weight, name)


def test_bad_input(manifold):
    router = GeometricRouter(D, E, manifold=manifold)
    with pytest.raises(ValueError, match=r"expects inputs \(\.\.\., 7\), got \(3, 6\)"):
        router(torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"expects inputs \(\.\.\., 7\), got \(\)"):
        router(torch.tensor(1.0))
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        GeometricRouter(D, 0, manifold=manifold)
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        GeometricRouter(0, E, manifold=manifold)


def test_bad_manifolds():
    with pytest.raises(
        ValueError, match="manifold must be 'polar', 'sphere', 'orthonormal' or 'euclidean', got 'torus'"
    ):
        GeometricRouter(D, E, manifold="torus")
    with pytest.raises(ValueError, match=r"num_experts <= in_features, got 4 > 3$"):
        GeometricRouter(3, 4, manifold="orthonormal")
    with pytest.raises(ValueError, match=r"a weight \(4, 1\) does not fit manifold='sphere'"):
        GeometricRouter(1, 4, manifold="sphere")
    with pytest.raises(TypeError, match=r"from_linear takes an nn\.Linear, got Conv1d"):
        GeometricRouter.from_linear(nn.Conv1d(1, 1, 1))
    linear = nn.Linear(D, E)
    linear.weight.data[2] = 0
    with pytest.raises(ValueError, match="1 of 4 rows are zero and have no direction"):
        GeometricRouter.from_linear(linear, manifold="sphere", allow_change=True)


def test_repr_names_sizes_and_manifold(manifold):
    text = repr(GeometricRouter(D, E, manifold=manifold, bias=False))
    assert text == f"GeometricRouter(in_features=7, num_experts=4, manifold='{manifold}', bias=False)"


def test_cosine_keeps_full_precision_under_autocast():
    router, x = GeometricRouter(D, E, manifold="sphere"), torch.randn(5, D)
    with torch.no_grad():
        router.temperature_logit.fill_(-5.0)  # τ near 0.01: a cosine rounded to bf16 would be off by 0.3 in the logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = router(x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, router(x).to(torch.bfloat16), rtol=0, atol=0)


def test_zero_token_has_no_gradient_on_the_cosine_router():
    router, x = GeometricRouter(D, E, manifold="sphere"), torch.zeros(2, D, requires_grad=True)
    logits = router(x)
    logits.sum().backward()
    assert torch.equal(logits, router.bias.expand(2, E))
    assert torch.equal(x.grad, torch.zeros(2, D))


def test_conversion_leaves_the_random_state_alone(manifold):
    linear = torch.nn.Linear(D, E)
    before = torch.get_rng_state()
    GeometricRouter.from_linear(linear, manifold=manifold, allow_change=True).to_linear(allow_change=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_from_linear_refuses_a_forward_of_its_own():
    class Gate(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="Gate has a forward of its own"):
        GeometricRouter.from_linear(Gate(D, E))


def test_integer_input_is_refused(manifold):
    with pytest.raises(ValueError, match=r"floating point inputs, got torch\.int64"):
        GeometricRouter(D, E, manifold=manifold)(torch.zeros(2, D, dtype=torch.int64))


def test_replaced_parameters_come_back_to_their_manifold(manifold):
    router = GeometricRouter(D, E, manifold=manifold)
    values = {name: value.clone() for name, value in router.state_dict().items()}
    router.load_state_dict(values, assign=True)
    assert type(manifold_of(router.weight)).__name__ == NAMES[manifold]
    assert torch.equal(router.weight, values["weight"])
    assert manifold_of(router.to_empty(device="cpu").weight) is not None
