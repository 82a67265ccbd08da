"""The same numbers and the same gradients whatever the loop does with the global batch.

The reference is one forward of the whole batch in plain autograd, at a learning rate of 0: then the means of the step
before are those of this step, and the linearised regularizers must have the gradient of the regularizers themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import moegeo_router as mg
from moegeo_router.metrics import dispersion_from_means, fhs_squared, information_from_means
from tests.support.moe import Block, E, L, LinearGateBlock, Model, batch, build, padding, token_loss
from tests.support.ranks import on_two_ranks

WEIGHTS = mg.Regularizers(
    fsi=0.3, fsi_target=0.05, fhs=0.2, dispersion=0.7, dispersion_floor=0.9, information=0.4, information_floor=0.9,
    balance=0.1, z=0.05,
)  # fmt: skip


def routings(model: Model, x: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Every block's logits, gates, ids of the unmasked tokens, and its output, on one graph."""
    keep = torch.ones(x.shape[0] * L, dtype=torch.bool) if mask is None else mask.reshape(-1).bool()
    for block in model.blocks:
        if isinstance(block, Block):
            logits, gates, ids = block.router(x)
        else:
            logits = block.gate(x).reshape(-1, E)
            gating = mg.topk_gating(logits, 2)
            gates, ids = gating.weights, gating.ids
        x = block(x)
        yield logits[keep], gates[keep], ids[keep], x


def reference(model: Model, x: Tensor, mask: Tensor | None) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of the second step by dense autograd: task loss + the regularizers of the whole batch."""
    parts = list(routings(model, x, mask))
    outputs = [part[-1] for part in parts]
    task = token_loss(model.head(outputs[-1]), mask)
    z_loss = sum(0.05 * logits.logsumexp(-1).square().mean() for logits, *_ in parts)
    # In the first step only the z-loss needs no reference; its traces are what the regularizer of FHS starts from.
    first = [normalized(t, s) for t, s in traces(parts, task + z_loss, mask)]
    total = z_loss + sum(regularizers(*part[:3], c) for part, c in zip(parts, first, strict=True))
    second = traces(parts, task + total, mask)
    after = [0.9 * c + 0.1 * normalized(t, s) for c, (t, s) in zip(first, second, strict=True)]
    value = z_loss + sum(regularizers(*part[:3], c) for part, c in zip(parts, after, strict=True))
    (task + total).backward()
    p = [logits.detach().softmax(-1) for logits, *_ in parts]
    counts = [torch.bincount(ids.flatten(), minlength=E).double() for _, _, ids, _ in parts]
    metrics = {
        "fsi": sum(float(mg.fsi(q, normalized=True)) for q in p) / 2,
        "dispersion_1": sum(float(dispersion_from_means(q.mean(0), q.sqrt().mean(0))) for q in p) / 2,
        "fhs": max(float(mg.fhs(t)) for t, _ in second),
        "max_violation": max(float(n.max() / n.mean() - 1) for n in counts),
        "regularizer": float(value.detach()),
    }
    return {f"geometry/{name}": value for name, value in metrics.items()}, gradients(model)


def regularizers(logits: Tensor, gates: Tensor, ids: Tensor, sensitivity: Tensor) -> Tensor:
    """WEIGHTS without the z-loss, on a layer's whole routing."""
    p = logits.softmax(-1)
    mean, root, entropy = p.mean(0), p.sqrt().mean(0), -(p * p.log()).sum(-1).mean()
    load = torch.bincount(ids.flatten(), minlength=E) / ids.numel()
    squares = torch.zeros(len(p), E, dtype=p.dtype).scatter(1, ids, gates).square().mean(0)
    return (
        0.3 * (mg.fsi(p) - 0.05 * mg.fsi_max(E)).relu().square()
        + 0.2 * fhs_squared(sensitivity * squares)
        + 0.7 * (0.9 - dispersion_from_means(mean, root)).relu().square()
        + 0.4 * (0.9 - information_from_means(mean, entropy, normalized=True)).relu().square()
        + 0.1 * E * (load * mean).sum()
    )


def traces(parts: list, loss: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Each layer's ``Σ g² ‖∂L/∂y‖²`` and ``Σ g²`` by expert."""
    keep = torch.ones(parts[0][-1].shape[:-1]) if mask is None else mask
    found = torch.autograd.grad(loss, [output for *_, output in parts], retain_graph=True)
    result = []
    for (_, gates, ids, _), gradient in zip(parts, found, strict=True):
        squares = torch.zeros(len(ids), E, dtype=gates.dtype).scatter(1, ids, gates.detach()).square()
        strength = gradient.square().sum(-1)[keep.bool()]
        result.append(((squares * strength[:, None]).sum(0), squares.sum(0)))
    return result


def normalized(traces_E: Tensor, squares_E: Tensor) -> Tensor:
    ratio = traces_E / squares_E
    return ratio / ratio.mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def train(model: nn.Module, x: Tensor, mask: Tensor | None, inject: bool, micro: int = 1, **options: object):
    """Two steps at a learning rate of 0; the metrics and gradients of the second."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = {
        "regularizers": WEIGHTS,
        "inject": inject,
        "accumulation": micro if inject else 1,
        "step": None,
        "on_error": "raise",
    }
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(**config | options))
    parts = x.chunk(micro), [None] * micro if mask is None else mask.chunk(micro)
    for _ in range(2):
        optimizer.zero_grad()
        for part, part_mask in zip(*parts, strict=True):
            if micro > 1:  # what happens in between does not matter
                model.eval()
                model((part + 1).detach().requires_grad_())
                model.train()
            loss = token_loss(model(part, attention_mask=part_mask), part_mask)
            (loss / micro if inject else (loss + geometry.loss()) / micro).backward()
        found = gradients(model)
        optimizer.step()
    metrics = geometry.metrics()
    geometry.detach()
    return metrics, found


def compare(found: tuple[dict[str, float], dict[str, Tensor]], expected: tuple[dict[str, float], dict[str, Tensor]]):
    metrics, grads = found
    assert {key: metrics[key] for key in expected[0]} == pytest.approx(expected[0], rel=1e-6, abs=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


SHAPES = [(Block, {}), (LinearGateBlock, {"top_k": 2})]


@pytest.mark.parametrize(("block", "options"), SHAPES, ids=["router module", "linear gate"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("inject", [False, True], ids=["loss()", "inject"])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
def test_as_the_whole_batch_in_plain_autograd(block, options, side, micro, inject, reentrant):
    mask = None if side is None else padding(side)
    model = build(block, reentrant)
    if reentrant and not inject:
        with pytest.raises(RuntimeError, match=r"reentrant activation checkpointing.*inject=True"):
            train(model, batch(), mask, inject, micro, **options)
        return
    compare(train(model, batch(), mask, inject, micro, **options), reference(build(block), batch(), mask))


# The compiler itself reads .grad of intermediate tensors where it breaks the graph at a hook.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("inject", [False, True], ids=["loss()", "inject"])
def test_compiled(inject, backend):
    model = build()
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = mg.GeometryConfig(regularizers=WEIGHTS, inject=inject, step=None, on_error="raise")
    geometry = mg.attach(compiled, optimizer, config)
    for _ in range(2):
        optimizer.zero_grad()
        loss = token_loss(compiled(batch(), attention_mask=padding("left")), padding("left"))
        (loss if inject else loss + geometry.loss()).backward()
        optimizer.step()
    compare((geometry.metrics(), gradients(model)), reference(build(), batch(), padding("left")))
    torch.compiler.reset()


def _rank(rank: int, inject: bool, reentrant: bool | None) -> None:
    x = batch().detach()[rank::2].requires_grad_()
    mask = padding("right").roll(1, 0)[rank::2] if False else None
    expected = reference(build(), batch(), mask)
    compare(train(DistributedDataParallel(build(reentrant=reentrant)), x, mask, inject), expected)


@pytest.mark.parametrize(("inject", "reentrant"), [(False, None), (True, None), (False, False)])
def test_two_ranks(tmp_path, inject, reentrant):
    on_two_ranks(_rank, tmp_path, inject, reentrant)
