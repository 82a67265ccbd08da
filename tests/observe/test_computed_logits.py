"""Routers that return choices and gates only, as those of DeepSeek-V3 in transformers 4: their logits are computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from tests.support.witness import fsi_of, p_of

D, E, K, T = 8, 4, 2, 24


class ChoosingRouter(nn.Module):
    """Returns ids (T, K) and gates (T, K), in half precision or full, from fp32 logits."""

    def __init__(self, scores: str, k: int = K, norm: bool = False, crooked: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))
        self.scores, self.k, self.norm, self.crooked = scores, k, norm, crooked

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = nn.functional.linear(x.float(), self.weight.float())
        z = z + self.crooked * torch.tanh(z.flip(-1))
        scores = z.softmax(-1) if self.scores == "softmax" else z.sigmoid()
        gates, ids = scores.topk(self.k)
        return ids, 2.5 * (gates / gates.sum(-1, keepdim=True) if self.norm else gates)


class Block(nn.Module):
    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__()
        self.router = ChoosingRouter(*arguments, **options)  # type: ignore[arg-type]
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        ids, gates = self.router(x)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        chosen = outputs.gather(1, ids[..., None].expand(*ids.shape, D))
        return x + (gates.to(x.dtype)[..., None] * chosen).sum(1)


def attached(block: nn.Module, **options: object) -> mg.Geometry:
    return mg.attach(block, config=mg.GeometryConfig(per_expert=True, controller=None, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_logits_are_computed_in_full_precision(scores, norm, dtype):
    block, x = Block(scores, norm=norm).to(dtype), torch.randn(T, D).to(dtype)
    geometry = attached(block, scores=scores, on_error="raise")
    block(x).float().square().mean().backward()
    found = geometry.metrics()
    geometry.detach()
    p = p_of(x.double() @ block.router.weight.detach().double().T, scores).mean(dim=0)
    ours = [found[key_of(found, f"p/{e}")] for e in range(E)]
    torch.testing.assert_close(torch.tensor(ours).double(), p, rtol=0, atol=1e-6)
    assert found["geometry/fsi"] == pytest.approx(fsi_of(p), rel=1e-4)
    ids, _ = block.router(x)
    load = torch.bincount(ids.flatten(), minlength=E) / ids.numel()
    assert [found[key_of(found, f"load/{e}")] for e in range(E)] == pytest.approx(load.tolist())
    assert found["geometry/fhs"] > 0


def key_of(found: dict[str, float], end: str) -> str:
    return next(key for key in found if key.endswith(end))


@pytest.mark.parametrize("options", [{"crooked": 2.0}, {"k": 1}])
def test_gates_that_computed_logits_do_not_explain_are_an_error(options):
    block = Block("softmax", **options)
    attached(block, on_error="raise")
    with pytest.raises(ValueError, match=r"router router returned no logits \(\.\.\., 4\): torch\.int64"):
        block(torch.randn(T, D))


def test_regularizers_reach_the_router_through_computed_logits():
    block, x = Block("softmax"), torch.randn(T, D)
    block(x).sum().backward()
    before = block.router.weight.grad.clone()
    block.zero_grad()
    geometry = attached(block, regularizers=mg.Regularizers(fsi=0.0, z=0.5), on_error="raise")
    (block(x).sum() + geometry.loss()).backward()
    z = (x @ block.router.weight.detach().T).requires_grad_()
    (0.5 * z.logsumexp(-1).square().mean()).backward()
    torch.testing.assert_close(block.router.weight.grad - before, z.grad.T @ x, rtol=1e-4, atol=1e-5)


def test_no_tokens_are_no_error():
    block = Block("softmax")
    geometry = attached(block, on_error="raise")
    block(torch.randn(0, D)).sum().backward()
    assert geometry.metrics() == {}
    block(torch.randn(T, D)).square().mean().backward()
    assert geometry.metrics()["geometry/fsi"] > 0
