"""The probe: which rows it keeps, their gradient, the block run again, and that it costs nothing while it is off."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moegeo_router as mg
from moegeo_router.control.probe import LayerProbe
from moegeo_router.observe.forward import LayerForward
from tests.control.revival import E, ListBlock, Model, StackBlock, Watched, tokens

BLOCKS = {"list": ListBlock, "stack": StackBlock}


@pytest.fixture(params=BLOCKS.values(), ids=list(BLOCKS))
def watched(request) -> Watched:
    return Watched(Model(request.param()).train(), [])


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())


def test_off_it_sees_nothing_and_has_no_hooks(watched):
    before = hooks(watched.model)
    watched.model(tokens()[0])
    assert watched.probe.look is None
    assert watched.probe.rerun(watched.pause) is None
    watched.probe.on()
    watched.probe.on()  # twice is once
    assert hooks(watched.model) == before + 1
    watched.probe.off()
    assert hooks(watched.model) == before
    assert watched.errors == []


def test_rows_are_those_of_the_forward_and_hurt_is_their_gradient(watched):
    x, y = tokens(1000)
    watched.probe.on()
    out = watched.model(x)
    look = watched.probe.look
    assert look.hurt is None
    (out - y).square().mean().backward()
    kept = torch.arange(512) * 1000 // 512
    assert torch.equal(look.x, x[kept])
    assert look.logits.shape == (512, E)
    assert not look.logits.requires_grad
    assert torch.allclose(look.logits, watched.site.module(x[kept]).detach(), atol=1e-6)
    # The same loss as a function of the logits: nudged by a little, in float64, at one row.
    row = int(look.hurt.abs().sum(-1).argmax())
    expected = gradient_of_logits(watched, x, y)[kept[row]]
    assert torch.allclose(look.hurt[row], expected, rtol=1e-3, atol=1e-9)


def gradient_of_logits(watched: Watched, x: Tensor, y: Tensor) -> Tensor:
    """By autograd through a router that returns a leaf."""
    logits = watched.site.module(x).detach().requires_grad_()
    handle = watched.site.module.register_forward_hook(lambda *_: logits)
    with watched.pause():
        (watched.model(x) - y).square().mean().backward()
    handle.remove()
    return logits.grad


def test_the_newest_forward_is_kept_and_an_old_gradient_does_not_reach_it(watched):
    watched.probe.on()
    first, second = (watched.model(tokens(seed=seed)[0]) for seed in (0, 1))
    look = watched.probe.look
    assert torch.equal(look.x, tokens(seed=1)[0])
    first.sum().backward()
    assert look.hurt is None
    second.sum().backward()
    assert look.hurt is not None


def test_masked_tokens_are_left_out():
    site = mg.find_routers(Model(ListBlock()))[0]
    probe = LayerProbe(site, None, print, limit=4)
    probe.on()
    logits = torch.arange(10 * E, dtype=torch.float32).view(10, E)
    mask = torch.tensor([True] * 5 + [False] * 3 + [True] * 2)
    probe.see(LayerForward(layer="block.gate", logits=logits, mask=mask))
    assert (probe.look.logits[:, 0] / E).tolist() == [0, 1, 3, 8]  # of the seven: 0, 1, 3, 5
    assert probe.look.x is None
    assert probe.look.tokens == 10


def test_half_precision_rows_are_widened_and_what_the_model_overwrites_is_not_lost():
    model = Model(ListBlock()).bfloat16().train()
    watched = Watched(model, [])
    watched.probe.on()
    x = tokens()[0].bfloat16()
    model(x)
    before = x.clone()
    x.zero_()
    assert watched.probe.look.x.dtype == torch.float32
    assert torch.equal(watched.probe.look.x, before.float())


def test_a_cosine_router_shows_what_its_logits_are_linear_in():
    watched = Watched(Model(StackBlock(manifold="sphere")).train(), [])
    watched.probe.on()
    watched.model(tokens()[0])
    look = watched.probe.look
    assert torch.allclose(look.x @ watched.site.weight.detach().T, look.logits, atol=1e-5)


def test_a_forward_without_a_graph_has_rows_and_no_gradient(watched):
    watched.probe.on()
    site = watched.site
    logits = site.module(tokens()[0]).detach()
    watched.probe.see(LayerForward(layer=watched.layer, logits=logits, x=tokens()[0]))
    assert watched.probe.look.hurt is None
    watched.probe.see(LayerForward(layer=watched.layer, logits=logits[:3], recomputed=True))
    assert watched.probe.look.tokens == 240  # what checkpointing runs again is not looked at


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Checkpointed(Model):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=reentrant)

    watched = Watched(Checkpointed(ListBlock()).train(), [])
    watched.probe.on()
    x = tokens()[0].requires_grad_()
    out = watched.model(x)
    look = watched.probe.look
    out.sum().backward()
    assert watched.probe.look is look  # not that of the recomputation
    assert torch.equal(look.x, x.detach())
    assert (look.hurt is None) == reentrant  # its first forward leaves no graph
    assert torch.equal(watched.probe.rerun(watched.pause), out.detach())
    assert watched.errors == []


def test_eval_mode_is_no_training(watched):
    watched.probe.on()
    watched.model.eval()(tokens()[0])
    assert watched.probe.look is None
    assert watched.probe.rerun(watched.pause) is None


def test_the_block_runs_again_and_nobody_notices(watched):
    watched.probe.on()
    x = tokens()[0]
    out = watched.model(x)
    out.sum().backward()
    look, seen, state = watched.probe.look, watched.seen, torch.get_rng_state()
    pauses = []

    @contextmanager
    def paused() -> Iterator[None]:
        with watched.pause():
            pauses.append(watched._is_active())
            yield

    again = watched.probe.rerun(paused)
    assert pauses == [False]
    assert torch.equal(again, out.detach())
    assert not again.requires_grad
    assert watched.probe.look is look
    assert watched.seen == seen  # by the watch
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        watched.site.weight.neg_()
    assert not torch.equal(watched.probe.rerun(watched.pause), again)


class Noisy(ListBlock):
    """Dropout, and an input changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(nn.functional.dropout(x, 0.5, self.training))
        with torch.no_grad():
            x.mul_(2)
        return out


def test_random_numbers_of_a_rerun_are_its_own_and_always_the_same():
    watched = Watched(Model(Noisy()).train(), [])
    watched.probe.on()
    watched.model(tokens()[0])
    first = watched.probe.rerun(watched.pause)
    torch.rand(3)
    assert torch.equal(watched.probe.rerun(watched.pause), first)
    assert not torch.equal(watched.probe.rerun(watched.pause, seed=1), first)
    assert watched.model.training


def test_a_rerun_is_under_the_autocast_of_the_call():
    watched = Watched(Model(StackBlock()).train(), [])
    watched.probe.on()
    with torch.autocast("cpu", torch.bfloat16):
        out = watched.model(tokens()[0])
    assert torch.equal(watched.probe.rerun(watched.pause), out.detach().float())


def test_a_rerun_leaves_masked_tokens_out():
    watched = Watched(Model(ListBlock()).train(), [])
    watched.probe.on()
    mask = torch.arange(240) < 100
    with watched.taps[0].given(mask=mask):
        out = watched.model(tokens()[0])
    assert torch.equal(watched.probe.rerun(watched.pause), out.detach()[:100])


class Failing(ListBlock):
    broken = False

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            raise RuntimeError("broken")
        return super().forward(x)


def test_a_block_that_fails_stops_nobody():
    watched = Watched(Model(Failing()).train(), [])
    watched.probe.on()
    watched.model(tokens()[0])
    watched.model.block.broken = True
    assert watched.probe.rerun(watched.pause) is None
    assert [str(error) for error in watched.errors] == ["broken"]
    watched.model.block.broken = False
    watched.model(tokens()[0])
    assert watched.probe.rerun(watched.pause) is not None


def test_off_frees_the_memory(watched):
    watched.probe.on()
    watched.model(tokens()[0]).sum().backward()
    kept = weakref.ref(watched.probe.look.x)
    watched.probe.off()
    gc.collect()
    assert kept() is None
    assert watched.probe.look is None


def test_a_forward_with_named_arguments():
    class Named(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(x=x)

    watched = Watched(Named(ListBlock()).train(), [])
    watched.probe.on()
    out = watched.model(tokens()[0])
    assert torch.equal(watched.probe.rerun(watched.pause), out.detach())


def test_the_limit_is_checked():
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        LayerProbe(mg.find_routers(Model(ListBlock()))[0], None, print, limit=0)


@pytest.mark.parametrize("renormalize", [True, False])
def test_whether_gates_are_renormalised_is_seen(renormalize):
    watched = Watched(Model(StackBlock(renormalize=renormalize)).train(), [])
    watched.probe.on()
    watched.model(tokens()[0])
    assert watched.probe.look.renormalized is renormalize
    unseen = Watched(Model(ListBlock(renormalize=renormalize)).train(), [])
    unseen.probe.on()
    unseen.model(tokens()[0])
    assert unseen.probe.look.renormalized is None
