"""How fast is it? ``python -m trainers.speed`` prints one table, every ratio measured side by side in one run.

A ratio is (their time) / (our time), so 2.00 means that ours is twice as fast. Times vary by tens of percent
between moments of a shared machine; the two sides of one pair follow each other within milliseconds, so the ratio of
a pair does not, and the table gives the median over pairs and their range.
"""

import argparse
import copy
import functools
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.control.config import Mode
from moegeo_router.control.damper import Damper
from moegeo_router.control.guard import Guard
from moegeo_router.control.loop import ControlLoop
from moegeo_router.loggers import NullLogger
from moegeo_router.observe.forward import LayerForward
from trainers import speed_arms, speed_transformers
from trainers.data.base import Batch
from trainers.data.planted import PlantedText
from trainers.loop import LoopConfig, Trainer
from trainers.models.experts import SwiGLUExperts
from trainers.models.language import LanguageModel
from trainers.models.transformer import SwiGLU
from trainers.optimizers import adamw
from trainers.pairs import Comparison, Measurement, Part, measure
from trainers.plain import PlainLanguageModel, plain_step

TOKENS, DIM, HIDDEN, TOP_K = 4096, 128, 256, 2
WARM = 60  # steps after which the controller judges all that it sees


def compare_router(device: torch.device, num_experts: int = 8) -> Comparison:
    """Forward of a geometrized ``nn.Linear`` router against the same router left alone."""
    plain = nn.ModuleDict({"router": nn.Linear(DIM, num_experts, bias=False)}).to(device)
    ours = copy.deepcopy(plain)
    mg.geometrize(ours)
    x_TD = torch.randn(TOKENS, DIM, device=device)
    return Comparison(
        name=f"router forward, {num_experts} experts: geometrized vs nn.Linear",
        ours=lambda: ours["router"](x_TD),
        theirs=lambda: plain["router"](x_TD),
        goal=0.95,
    )


class ModuleListExperts(nn.Module):
    """A competent loop over experts with weights of their own, as many code bases have it; no stacked gradient."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU(DIM, HIDDEN) for _ in range(num_experts))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """Return the gated sum of each token's experts, (T, D)."""
        y_TD = torch.zeros_like(x_TD)
        for index, expert in enumerate(self.experts):
            rows, slots = (ids_TK == index).nonzero(as_tuple=True)
            y_TD.index_add_(0, rows, expert(x_TD.index_select(0, rows)) * weights_TK[rows, slots, None])
        return y_TD


def compare_experts(device: torch.device, num_experts: int, theirs: str, goal: float | None) -> Comparison:
    """Forward and backward of the expert layer against a loop over experts, at a random routing.

    Args:
        device: where.
        num_experts: E.
        theirs: "loop" is the plain loop over the same stacked weights, "modules" one over separate modules.
        goal: see ``Comparison``.
    """
    layer = SwiGLUExperts(num_experts, DIM, HIDDEN).to(device)
    if theirs == "loop":
        other: nn.Module = SwiGLUExperts(num_experts, DIM, HIDDEN, "loop").to(device)
        other.load_state_dict(layer.state_dict())
    else:
        other = ModuleListExperts(num_experts).to(device)
    x_TD = torch.randn(TOKENS, DIM, device=device, requires_grad=True)
    logits_TE = torch.randn(TOKENS, num_experts, device=device)
    weights_TK, ids_TK = (t.detach() for t in logits_TE.softmax(dim=-1).topk(TOP_K))
    gradient_TD = torch.randn_like(x_TD)

    def work(layer: nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        inputs = (x_TD, weights_TK.clone().requires_grad_(), *layer.parameters())
        return lambda: torch.autograd.grad(layer(x_TD, inputs[1], ids_TK), inputs, gradient_TD)

    return Comparison(
        name=f"expert layer forward + backward, {num_experts} experts: sorted vs {theirs}",
        ours=work(layer),
        theirs=work(other),
        goal=goal,
    )


def _training_step(
    device: torch.device, geometry: mg.GeometryConfig, batch_size: int, dim: int = DIM, layers: int = 4
) -> tuple[Trainer, Batch, Callable[[], object]]:
    """A trainer of the demo model, a batch, and what takes a step on it."""
    torch.manual_seed(0)
    data = PlantedText(alphabet=255, documents=200, batch_size=batch_size)
    model = LanguageModel(
        data.vocab_size,
        functools.partial(mg.GeometricRouter, bias=False),
        length=data.length,
        dim=dim,
        layers=layers,
        expert_hidden=2 * dim,
    )
    trainer = Trainer(
        model.to(device),
        data,
        adamw(model, routers=geometry.step),
        LoopConfig(),
        geometry=geometry,
        logger=NullLogger(),
        directory=Path(),
        device=device,
    )
    batch = data.train_batch(0)
    return trainer, batch, lambda: trainer.train_step(batch)


def compare_training(device: torch.device, batch_size: int = 16) -> Comparison:
    """A step of the demo model by our trainer (geometry, metrics, clipping, penalty) against the plain-torch twin's."""
    trainer, batch, ours = _training_step(device, mg.GeometryConfig(), batch_size)
    inputs_BL, targets_BL = batch.inputs.to(device), batch.targets.to(device)
    twin = PlainLanguageModel(256, length=inputs_BL.shape[1])
    twin.load_state_dict({name.removeprefix("trunk."): value for name, value in trainer.model.state_dict().items()})
    step = plain_step(twin.to(device))
    return Comparison(
        name=f"training step of the demo model, {batch_size}x{inputs_BL.shape[1]} tokens: ours vs plain torch",
        ours=ours,
        theirs=lambda: step(inputs_BL, targets_BL),
        goal=0.9,
    )


def compare_traces(device: torch.device, batch_size: int = 16) -> Comparison:
    """A step of the demo model by our trainer with exact Fisher traces against the same without any."""
    *_, ours = _training_step(device, mg.GeometryConfig(fisher="parameters"), batch_size)
    *_, theirs = _training_step(device, mg.GeometryConfig(fisher=None), batch_size)
    return Comparison(
        name=f"training step of the demo model, {batch_size}x256 tokens: exact FHS vs none", ours=ours, theirs=theirs
    )


def compare_watching(device: torch.device, batch_size: int = 16) -> Comparison:
    """A plain-torch training step with all that ``attach`` does by default around it against the same step without."""
    torch.manual_seed(0)
    watched = PlainLanguageModel(256).to(device)
    alone = copy.deepcopy(watched)
    mg.geometrize(watched)
    inputs_BL, targets_BL = torch.randint(256, (2, batch_size, 256), device=device)
    optimizer = torch.optim.AdamW(watched.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    geometry, other = mg.attach(watched, optimizer), plain_step(alone)

    def step() -> dict[str, float]:
        loss = F.cross_entropy(watched(inputs_BL).flatten(0, 1), targets_BL.flatten())
        (loss + geometry.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return geometry.metrics()

    return Comparison(
        name=f"training step of plain torch, {batch_size}x256 tokens: attached vs left alone",
        ours=step,
        theirs=lambda: other(inputs_BL, targets_BL),
        goal=0.98,
    )


def compare_controller(device: torch.device, mode: Mode, batch_size: int = 16) -> Comparison:
    """A step of the demo model with two layers, controlled, against the same step with nothing but the scalars."""
    *_, ours = _training_step(device, mg.GeometryConfig(controller=mode), batch_size, layers=2)
    *_, theirs = _training_step(device, mg.GeometryConfig(controller=None), batch_size, layers=2)
    return Comparison(
        name=f"training step, 2 layers, {batch_size}x256 tokens: controller={mode} vs none", ours=ours, theirs=theirs
    )


def part_of_controller(device: torch.device, mode: Mode, batch_size: int = 16, warm: int = WARM) -> Part:
    """All that a controller does in a healthy step, the scalars it reads included, as a part of that step."""

    def build() -> Callable[[], object]:
        trainer, _, step = _training_step(device, mg.GeometryConfig(controller=mode), batch_size, layers=2)

        def healthy_step() -> None:
            step()
            if acted := [event.line for event in trainer.geometry.events() if event.kind == "action"]:
                raise RuntimeError(f"the controller acted, so that step was not a healthy one: {acted[0]}")

        for _ in range(warm):
            healthy_step()
        return healthy_step

    return Part(
        name=f"controller={mode}, scalars and all, vs its whole training step, 2 layers",
        build=build,
        functions=[
            *((ControlLoop, name) for name in ("record_loss", "observe", "end_step")),
            (Guard, "_check"),
            (Damper, "_keep"),
        ],
        calls=5,
        goal=100,  # 1% of a training step
    )


def _natural_steps(
    width: int, num_experts: int, layers: int, tokens: int, device: torch.device
) -> Callable[[], object]:
    """As many natural steps of a model's routers as lie between two inversions of the factors, one of them included."""
    routers = nn.ModuleDict({f"router{i}": nn.Linear(width, num_experts, bias=False) for i in range(layers)}).to(device)
    select = "router*"
    mg.geometrize(routers, select=select)
    optimizer = mg.NaturalGradient(routers, select=select)
    x_TD = torch.randn(tokens, width, device=device)
    seen = [LayerForward(layer=name, logits=router(x_TD).detach(), x=x_TD) for name, router in routers.items()]
    for parameter in routers.parameters():
        parameter.grad = torch.randn_like(parameter) / tokens

    def steps() -> object:
        for _ in range(mg.NaturalConfig().refresh_every):
            for forward in seen:
                optimizer.observe(forward)
            optimizer.step()
        return optimizer.movement

    steps()  # the first ones refresh more often
    return steps


def compare_natural_step(device: torch.device, width: int = 256, layers: int = 4, batch_size: int = 16) -> Comparison:
    """All natural steps between two inversions against one training step of the model whose routers they are of."""
    _, batch, theirs = _training_step(device, mg.GeometryConfig(), batch_size, width)
    every = mg.NaturalConfig().refresh_every
    return Comparison(
        name=f"{every} natural steps (1 refresh) vs 1 training step, d={width}, 8 experts, {layers} layers",
        ours=_natural_steps(width, 8, layers, batch.inputs.numel(), device),
        theirs=theirs,
        goal=1 / (0.03 * every),  # 3% of a training step
    )


def compare_wide_natural_step(device: torch.device, width: int = 1024, num_experts: int = 64) -> Comparison:
    """The same at d = 1,024 against forward and backward of the one expert layer alone, a part of a training step."""
    tokens, every = 8192, mg.NaturalConfig().refresh_every
    layer = SwiGLUExperts(num_experts, width, width).to(device)
    x_TD = torch.randn(tokens, width, device=device, requires_grad=True)
    weights_TK, ids_TK = torch.randn(tokens, num_experts, device=device).softmax(dim=-1).topk(TOP_K)
    inputs = (x_TD, *layer.parameters())
    return Comparison(
        name=f"{every} natural steps (1 refresh) vs 1 expert layer, d={width}, {num_experts} experts, {tokens} tokens",
        ours=_natural_steps(width, num_experts, 1, tokens, device),
        theirs=lambda: torch.autograd.grad(layer(x_TD, weights_TK, ids_TK).sum(), inputs),
        goal=1 / (0.01 * every),  # 1% of a training step, of which that layer is the greater part
    )


def comparisons(device: torch.device) -> list[Comparison | Part]:
    """All rows of the table, in order."""
    return [
        compare_router(device),
        compare_experts(device, 8, "loop", goal=None),
        compare_experts(device, 32, "loop", goal=1.5),
        compare_experts(device, 32, "modules", goal=None),
        compare_training(device),
        compare_watching(device),
        compare_traces(device),
        compare_natural_step(device),
        compare_wide_natural_step(device),
        *speed_transformers.rows(device),
        *speed_arms.rows(device),
        *(compare_controller(device, mode) for mode in ("observe", "act")),
        *(part_of_controller(device, mode) for mode in ("observe", "act")),
    ]


def table(measurements: Iterable[Measurement]) -> str:
    """The measurements as text: both times in milliseconds, the ratio, its range over pairs, the goal."""
    lines = [f"{'':<66} {'ours ms':>9} {'theirs ms':>9} {'ratio':>6} {'min..max':>11} {'goal':>6}"]
    for m in measurements:
        ours, theirs = (1e3 * statistics.median(times) for times in (m.ours, m.theirs))
        spread = f"{min(m.ratios):.2f}..{max(m.ratios):.2f}"
        goal = "-" if m.comparison.goal is None else f"{m.comparison.goal:.2f}"
        verdict = {None: "", True: "  met", False: "  MISSED"}[m.met]
        lines.append(
            f"{m.comparison.name:<66} {ours:>9.3f} {theirs:>9.3f} {m.ratio:>6.2f} {spread:>11} {goal:>6}{verdict}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure every comparison and print the table.

    Args:
        arguments: the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m trainers.speed", description="Speed against plain torch.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (more than 1 needs an idle machine)")
    parser.add_argument("--repeats", type=int, default=20, help="pairs measured per row")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the rows whose name has this in it")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print(f"ratio = their time / our time; median of {options.repeats} interleaved pairs; {TOKENS} tokens")
    rows = [row for row in comparisons(device) if options.only in row.name]
    print(table(measure(row, options.repeats, synchronize) for row in rows))


if __name__ == "__main__":
    main()
