"""What only an accelerator can show: the same numbers as on the CPU, and no lost manifold on the way there."""

import functools
from pathlib import Path

import pytest
import torch
from geoopt.optim import RiemannianAdam

import moegeo_router as mg
from moegeo_router.geometry import exp_map, frechet_mean, log_map, random_distributions
from moegeo_router.loggers import NullLogger
from moegeo_router.routers import manifold_of
from trainers.checkpoint import load
from trainers.data.planted import PlantedText
from trainers.loop import LoopConfig, Trainer
from trainers.models.experts import SwiGLUExperts
from trainers.models.language import LanguageModel
from trainers.optimizers import adamw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")


def test_geometry_agrees_with_the_cpu():
    p, q = random_distributions(2, 64, 16, dtype=torch.float64)
    v = log_map(p, q)
    for function, arguments in ((mg.fisher_rao_distance, (p, q)), (exp_map, (p, v)), (frechet_mean, (p,))):
        on_gpu = function(*(x.to(CUDA) for x in arguments)).cpu()
        torch.testing.assert_close(on_gpu, function(*arguments), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("manifold", ["polar", "sphere", "orthonormal", "euclidean"])
def test_router_moves_to_the_device_and_steps_there_as_on_the_cpu(manifold):
    routers = {device: mg.GeometricRouter(32, 8, manifold=manifold) for device in ("cpu", "cuda")}
    routers["cuda"].load_state_dict(routers["cpu"].state_dict())
    x = torch.randn(256, 32)
    for device, router in routers.items():
        router.to(device)
        assert manifold_of(router.weight) is not None
        optimizer = RiemannianAdam(router.parameters(), lr=0.05)
        for _ in range(5):
            p = mg.routing_probabilities(router(x.to(device)))
            (mg.fsi(p).square() - mg.dispersion(p)).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(routers["cuda"].weight.cpu(), routers["cpu"].weight, rtol=1e-3, atol=1e-4)


def test_zero_rows_get_the_same_directions_on_every_device():
    zeros = torch.zeros(8, 32)
    on_cpu, on_gpu = mg.PolarRows(seed=3).projx(zeros), mg.PolarRows(seed=3).projx(zeros.to(CUDA))
    assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("compute", ["auto", "grouped", "batched", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expert_functions_agree_with_the_loop(compute, dtype):
    layer = SwiGLUExperts(8, 64, 128, compute).to(CUDA, dtype)
    definition = SwiGLUExperts(8, 64, 128, "loop").to(CUDA, dtype)
    definition.load_state_dict(layer.state_dict())
    x_TD = torch.randn(512, 64, device=CUDA, dtype=dtype)
    weights_TK, ids_TK = torch.randn(512, 8, device=CUDA).softmax(-1).topk(2)
    outputs = [module(x_TD, weights_TK, ids_TK) for module in (layer, definition)]
    gradients = [
        torch.autograd.grad(y.float().square().sum(), m.parameters())
        for y, m in zip(outputs, (layer, definition), strict=True)
    ]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(*outputs, **tolerance)
    for ours, theirs in zip(*gradients, strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(ours / scale, theirs / scale, **tolerance)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_run_on_the_device_resumes_where_it_stopped(precision, tmp_path):
    data = PlantedText(documents=100, batch_size=8, length=64)

    def trainer(directory: Path) -> Trainer:
        torch.manual_seed(0)
        model = LanguageModel(data.vocab_size, functools.partial(mg.GeometricRouter, bias=False), dim=64, length=64)
        config = LoopConfig(steps=8, warmup=2, precision=precision)
        model.to(CUDA)
        optimizer = adamw(model, routers="riemannian")
        geometry, logger = mg.GeometryConfig(on_error="raise"), NullLogger()
        return Trainer(
            model, data, optimizer, config, geometry=geometry, logger=logger, directory=directory, device=CUDA
        )

    first = trainer(tmp_path)
    losses = [first.train_step(data.train_batch(step))["train/loss"] for step in range(4)]
    saved = load(first.save())
    losses += [first.train_step(data.train_batch(step))["train/loss"] for step in range(4, 8)]
    assert losses[-1] < losses[0]
    second = trainer(tmp_path / "second")
    second.restore(saved)
    again = [second.train_step(data.train_batch(step))["train/loss"] for step in range(4, 8)]
    # Atomic additions on the device are not ordered, so equality is to rounding, not to the bit.
    assert again == pytest.approx(losses[4:], rel=1e-3)


@pytest.mark.parametrize("step", ["riemannian", "natural"])
def test_attach_counts_on_the_device_as_on_the_cpu_and_never_waits_for_it(step):
    data = PlantedText(documents=100, batch_size=8, length=64)
    found, taken = {}, step
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = LanguageModel(data.vocab_size, functools.partial(mg.GeometricRouter, bias=False), dim=64, length=64)
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        weights = mg.Regularizers(fsi=0.1, fhs=0.1, dispersion=0.1, information=0.1, balance=0.1, z=1e-4)
        config = mg.GeometryConfig(on_error="raise", regularizers=weights, num_domains=len(data.domains), step=taken)
        geometry = mg.attach(model, optimizer, config)
        batches = [data.train_batch(step).to(torch.device(device)) for step in range(6)]
        for step, batch in enumerate(batches):
            # The experts' own computation may wait; what is watched and stepped may not, once it has warmed up.
            with geometry.tokens(batch.mask, domains=batch.domains):
                output = model(batch.inputs)
            loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten())
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            total = loss + geometry.loss()
            torch.cuda.set_sync_debug_mode("default")
            total.backward()
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            optimizer.step()
            optimizer.zero_grad()
            geometry.metrics()
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        found[device] = geometry.metrics()
    for name, value in found["cpu"].items():
        assert found["cuda"][name] == pytest.approx(value, rel=0.05, abs=0.02), name


def test_the_taps_themselves_never_wait():
    model = torch.nn.ModuleDict({"router": torch.nn.Linear(32, 8)}).to(CUDA)
    geometry = mg.attach(model, config=mg.GeometryConfig(top_k=2, fisher=None, on_error="raise"))
    x = torch.randn(256, 32, device=CUDA)
    model["router"](x)
    torch.cuda.set_sync_debug_mode("error")
    model["router"](x)
    torch.cuda.set_sync_debug_mode("default")
    assert geometry.metrics()["geometry/fsi"] >= 0
