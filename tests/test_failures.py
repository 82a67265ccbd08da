"""Watching never kills a run: it stops by itself, on all ranks together, and the routers' step goes on."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import moegeo_router as mg
from tests.support.moe import L, LinearGateBlock, Model, batch, build, token_loss
from tests.support.ranks import on_two_ranks


def trained(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, geometry: mg.Geometry, **kwargs: Tensor):
    (token_loss(model(x, **kwargs)) + geometry.loss()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return geometry.metrics()


def attached(model: nn.Module, **options: object) -> tuple[torch.optim.Optimizer, mg.Geometry]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return optimizer, mg.attach(model, optimizer, mg.GeometryConfig(**{"top_k": 2} | options))


def converted() -> Model:
    model = build(LinearGateBlock)
    mg.geometrize(model)
    return model


WRONG = torch.ones(8, L - 1)  # a mask for other tokens than the routers see


def test_an_error_is_one_warning_and_the_run_goes_on_with_its_routers_on_the_manifold():
    model = converted()
    optimizer, geometry = attached(model)
    assert trained(model, batch(), optimizer, geometry)
    with pytest.warns(UserWarning, match=r"watching blocks\.0\.gate failed and is switched off, its regularizers are"):
        trained(model, batch(), optimizer, geometry, attention_mask=WRONG)
    before = [block.gate.weight.detach().clone() for block in model.blocks]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trained(model, batch(), optimizer, geometry) == {}
        assert float(geometry.loss()) == 0
    for block, weight in zip(model.blocks, before, strict=True):
        angle = torch.arccos(torch.cosine_similarity(block.gate.weight.detach(), weight, dim=-1))
        assert (angle > 1e-4).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_fails_itself_leaves_the_watching_in_order():
    """An out-of-memory that the loop survives, say: the next step counts as if nothing had been."""

    class Flaky(LinearGateBlock):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.broken:
                raise MemoryError("out of memory")
            return y

    model = build(Flaky)
    mg.geometrize(model)
    optimizer, geometry = attached(model, on_error="raise")
    expected = trained(model, batch(), optimizer, geometry)
    model = build(Flaky)
    mg.geometrize(model)
    optimizer, geometry = attached(model, on_error="raise")
    model.blocks[1].broken = True
    with pytest.raises(MemoryError):
        model(batch())
    model.blocks[1].broken = False
    geometry.state_dict()
    found = trained(model, batch(), optimizer, geometry)
    assert found["geometry/fhs"] == pytest.approx(expected["geometry/fhs"])


def test_an_error_between_two_steps_does_not_stop_the_run_either(monkeypatch):
    model = converted()
    optimizer, geometry = attached(model)
    trained(model, batch(), optimizer, geometry)
    # What a device that fails, or a bug of ours, looks like from here.
    monkeypatch.setattr(geometry._watch.window, "post", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="watching the sums of a step failed and is switched off.*division by zero"):
        trained(model, batch(), optimizer, geometry)
    before = model.blocks[0].gate.weight.detach().clone()
    assert trained(model, batch(), optimizer, geometry) == {}
    assert not torch.equal(before, model.blocks[0].gate.weight)


def test_one_nan_token_is_left_out_and_counted():
    model = converted()
    optimizer, geometry = attached(model, regularizers=mg.Regularizers(fsi=1.0, dispersion=1.0))
    x = batch().detach()
    trained(model, x, optimizer, geometry)
    broken = x.clone()
    broken[0, 0] = math.nan
    model(broken)  # the loop sees the NaN and skips the step
    found = trained(model, x, optimizer, geometry)
    assert found["geometry/non_finite"] == pytest.approx(1 / (2 * 8 * L))
    assert all(math.isfinite(value) for value in found.values())
    after = trained(model, x, optimizer, geometry)
    assert after["geometry/non_finite"] == 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_an_empty_step_and_a_step_without_watched_forward():
    model = converted()
    optimizer, geometry = attached(model, on_error="raise")
    trained(model, batch(), optimizer, geometry)
    model.head(torch.randn(3, 8, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert geometry.metrics() == {}
    assert trained(model, batch(), optimizer, geometry)["geometry/fsi"] > 0


def test_bf16_models_are_watched_within_their_precision():
    exact, low = converted().float(), converted().bfloat16()
    found = []
    for model in (exact, low):
        optimizer, geometry = attached(model, on_error="raise")
        x = batch().detach().to(model.head.weight.dtype)
        (token_loss(model(x).float()) + geometry.loss()).backward()
        optimizer.step()
        found.append(geometry.metrics())
    for name in ("fsi", "fsi_token", "dispersion_1", "routing_information", "token_entropy", "fhs"):
        assert found[1][f"geometry/{name}"] == pytest.approx(found[0][f"geometry/{name}"], rel=0.1, abs=0.01), name


def test_autocast_does_not_reach_the_statistics_or_the_losses():
    found = []
    for enabled in (False, True):
        model = converted().float()
        optimizer, geometry = attached(model, on_error="raise", regularizers=mg.Regularizers(fsi=1.0, dispersion=1.0))
        x = batch().detach().float()
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                output = model(x)
                loss = geometry.loss()
            assert loss.dtype == torch.float32
            (token_loss(output.float()) + loss).backward()
            optimizer.step()
        found.append((geometry.metrics(), float(loss.detach())))
    assert found[1][0]["geometry/fsi"] == pytest.approx(found[0][0]["geometry/fsi"], abs=0.01)
    assert found[1][1] == pytest.approx(found[0][1], rel=0.05)


def _one_rank_fails(rank: int) -> None:
    model = converted()
    optimizer, geometry = attached(model)
    parallel = DistributedDataParallel(model)
    said = []
    for step in range(6):
        wrong = {"attention_mask": WRONG} if (rank, step) == (1, 2) else {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = trained(parallel, batch(), optimizer, geometry, **wrong)
        said += [(step, str(w.message)) for w in caught if "switched off" in str(w.message)]
        if step < 2:
            assert found["geometry/fsi"] > 0
        if step > 3:
            assert found == {}
    assert len(said) == 1
    (step, message), expected = said[0], {0: "watching on another rank failed", 1: "watching blocks.0.gate failed"}
    assert message.startswith(expected[rank])
    assert step == {0: 3, 1: 2}[rank]
    gathered = [torch.empty_like(model.blocks[0].gate.weight.data) for _ in range(2)]
    dist.all_gather(gathered, model.blocks[0].gate.weight.data)
    assert torch.equal(*gathered)  # the ranks' routers have stayed together


def test_all_ranks_stop_watching_together(tmp_path):
    on_two_ranks(_one_rank_fails, tmp_path)
