"""Every family of transformers that has a router, and what is around its training: generation, checkpoints, leaving."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from tests.support import tiny_transformers as tiny
from tests.support.families import (
    LR,
    Stock,
    attach,
    blind,
    close,
    families,
    four,
    known_warnings,
    same,
)
from tests.support.tiny_families import FAMILIES
from tests.support.tiny_transformers import backward, batch, gradients, run
from tests.support.witness import hooks_of, router_names

pytest.importorskip("transformers")


@pytest.mark.parametrize("family", [name for name in tiny.available() if FAMILIES[name].generates])
def test_generation_is_the_same_and_not_counted(stock, family):
    model = stock(family).copy()

    def generate() -> Tensor:
        torch.manual_seed(0)
        ids = batch(model)["input_ids"][:1]
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)

    before = generate()
    mg.geometrize(model)
    geometry = attach(model)
    assert torch.equal(generate(), before)
    assert geometry.metrics() == {}
    model.eval()
    assert torch.equal(generate(), before)
    assert geometry.metrics() == {}


@families
def test_checkpointing_counts_once_and_injects_once(stock, family):
    model = stock(family).copy()
    flagged = any(hasattr(module, "gradient_checkpointing") for module in model.modules())
    if not (flagged and model.supports_gradient_checkpointing):
        pytest.skip("the family has no gradient checkpointing")
    if four() and family == "GptOss":
        pytest.skip("its routers return scattered scores: regularizers come by loss(), injecting them is an error")
    on = mg.Regularizers(fsi=0.0, z=0.1, balance=0.0 if blind(family) else 0.1)
    found: list[dict[str, float]] = []
    joined: list[dict[str, Tensor]] = []
    for reentrant in (None, False, True):
        checkpointed = stock(family).copy()
        mg.geometrize(checkpointed)
        if reentrant is not None:
            older = checkpointed.gradient_checkpointing_enable  # transformers 4
            getattr(checkpointed, "activation_checkpointing_enable", older)({"use_reentrant": reentrant})
            checkpointed.enable_input_require_grads()
        with known_warnings(family):
            geometry = attach(checkpointed, inject=True, regularizers=on, per_layer=True)
            backward(checkpointed)
            found.append(geometry.metrics())
        joined.append(gradients(checkpointed))
        geometry.detach()
    for other, own in zip(found[1:], joined[1:], strict=True):
        close(other, found[0])
        assert own.keys() == joined[0].keys()
        for name, gradient in own.items():
            torch.testing.assert_close(gradient, joined[0][name], rtol=1e-4, atol=1e-5)
    theirs = router_gradients_of(stock(family))
    assert any(not torch.allclose(joined[0][name], g, rtol=1e-3) for name, g in theirs.items())


def router_gradients_of(before: Stock) -> dict[str, Tensor]:
    return {n: g for n, g in before.gradients.items() if n in router_names(before.model).values() and g.any()}


@families
def test_captured_router_logits_are_the_same(stock, family):
    model = stock(family).copy()
    if not hasattr(model.config, "output_router_logits"):
        pytest.skip("the family returns no router logits")
    if four() and family == "JetMoe":
        pytest.skip("its own auxiliary loss fails there")

    def captured() -> list[Tensor]:
        torch.manual_seed(2)
        found = model(**batch(model), output_router_logits=True)
        names = ("router_logits", "encoder_router_logits", "decoder_router_logits")
        return [t.detach() for t in flatten([getattr(found, name, None) for name in names])]

    before = captured()
    if not before:
        pytest.skip("the model class hands none out")
    mg.geometrize(model)
    with known_warnings(family):
        geometry = attach(model)
        after = captured()
        geometry.detach()
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def flatten(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from flatten(value)


@families
def test_a_save_in_the_middle_is_a_stock_checkpoint(stock, family, tmp_path):
    from safetensors import safe_open

    model = stock(family).copy()
    model.save_pretrained(tmp_path / "before")
    mg.geometrize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    with known_warnings(family):
        geometry = attach(model, optimizer)
        backward(model)
        optimizer.step()
        model.save_pretrained(tmp_path / "during")
    keys = []
    for folder in ("before", "during"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            keys.append(sorted(file.keys()))
    assert keys[0] == keys[1]
    loaded = type(model).from_pretrained(tmp_path / "during").float().train()
    assert all(type(p) is nn.Parameter for p in loaded.parameters())
    assert torch.equal(run(loaded), run(model))
    geometry.detach()


@families
def test_detach_leaves_no_hook_and_the_plain_step(stock, family):
    model, twin = stock(family).copy(), stock(family).copy()
    run(model)  # capturing hooks of transformers come with the first forward
    before = hooks_of(model)
    mg.geometrize(model)
    optimizer, plain = (torch.optim.AdamW(m.parameters(), lr=LR) for m in (model, twin))
    with known_warnings(family):
        geometry = attach(model, optimizer)
        assert hooks_of(model) != before
        geometry.detach()
    mg.export(model)
    assert hooks_of(model) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    for stepped, own in ((model, optimizer), (twin, plain)):
        backward(stepped)
        own.step()
    assert same(model.state_dict(), twin.state_dict())
