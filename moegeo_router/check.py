"""What this library would find in a model of transformers, do to it, and cost. Nothing is trained.

    python -m moegeo_router.check MODEL_OR_FOLDER

reads the configuration of a model (a folder, or a name that transformers finds), builds the model without its weights
and says which routers it has. Router weights are looked at where they lie in the folder.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .control.selection_bias import selection_bias
from .integrations import transformers as integration
from .integrations.checkpoints import weights_in
from .observe.fisher import ProductTap
from .observe.forward import LayerForward
from .observe.hooks import nothing
from .observe.statistics import LayerStatistics
from .observe.taps import tensors_in
from .routers.convert import geometrize
from .routers.experts import Experts, block_of, find_experts
from .routers.find import RouterSite, sites_of

#: Cosine of two rows of a router from which on they are called twins: what they choose is hardly told apart.
TWINS = 0.999


@dataclass(frozen=True)
class Found:
    """A model and what was found in it, derived once for all lines.

    Attributes:
        model: on the meta device.
        sites: its routers.
    """

    model: Any
    sites: Sequence[RouterSite]

    @cached_property
    def experts(self) -> dict[str, Experts | None]:
        """The experts of each router, None where none are found."""
        return {site.name: find_experts(self.model, site) for site in self.sites}

    @cached_property
    def chosen(self) -> dict[str, int | None]:
        """K of each router, None where nobody says it.

        Raises:
            ValueError: more than there are experts.
        """
        return {site.name: _chosen(self.model, site) for site in self.sites}

    @cached_property
    def biases(self) -> list[str]:
        """The names of the biases that only choose."""
        each = (selection_bias(self.model, site) for site in self.sites)
        return [bias[0] for bias in each if bias is not None]

    @cached_property
    def parameters(self) -> int:
        """How many the model has."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def active(self) -> int:
        """How many of them a token meets; where experts or K are not known, at most."""
        resting = 0.0
        for site in self.sites:
            experts = self.experts[site.name]
            if experts is not None:
                own = sum(p.numel() for p in experts.container.parameters())
                resting += own * (1 - min(1.0, (self.chosen[site.name] or site.num_experts) / site.num_experts))
        return int(self.parameters - resting)


class Cost(NamedTuple):
    """What one router costs: bytes that stay, and seconds of a step here."""

    state: int
    router: float
    watching: float
    step: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found; 2 if nothing can be said.

    Args:
        arguments: the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m moegeo_router.check", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder with config.json, or a name that transformers finds")
    parser.add_argument("--select", metavar="PATTERN", help="names of the routers (default: those the rules find)")
    parser.add_argument("--tokens", type=int, default=8192, help="of an optimizer step, for the costs (default: 8192)")
    options = parser.parse_args(arguments)
    try:
        if options.tokens < 1:
            raise ValueError(f"--tokens must be at least 1, got {options.tokens}")
        if options.select == "":
            raise ValueError("--select must name routers, got nothing")
        print("\n".join(report(options.model, options.select, options.tokens)))
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def report(source: str, select: str | None = None, tokens: int = 8192) -> Iterator[str]:
    """Yield the lines of the report.

    Args:
        source: a folder with ``config.json``, or a name that transformers finds.
        select: names of the routers; None: those that the rules find.
        tokens: of an optimizer step.

    Raises:
        ImportError: transformers is not installed.
        OSError: there is no such model.
        ValueError: it has no routers, or such as cannot be served.
    """
    model = skeleton(source)
    found = Found(model, sites_of(model, select))
    yield from _model(found)
    yield ""
    yield "found"
    yield from _routers(found)
    yield from _weights(Path(source), found)
    yield ""
    yield "would be done"
    yield from _plan(found)
    yield ""
    yield "would cost"
    yield from _costs(found, tokens)


def skeleton(source: str) -> Any:
    """Return a model of transformers without its weights, on the meta device.

    Args:
        source: a folder with ``config.json``, or a name that transformers finds.

    Raises:
        ImportError: transformers is not installed.
        OSError: there is no such model.
        ValueError: transformers does not know its architecture.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("transformers is not installed: pip install 'moegeo-router[transformers]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        try:
            return _built(transformers, source)
        except (ImportError, OSError, ValueError):
            raise
        except Exception as error:  # a configuration that is wrong fails anywhere in transformers
            name = type(error).__name__
            raise ValueError(
                f"transformers builds no model from the configuration of {source}: {name}: {error}"
            ) from error


def _built(transformers: Any, source: str) -> Any:
    # Names of models have one slash at most: transformers would complain of the rest as names.
    if (source.startswith(("/", "./", "../")) or source.count("/") > 1) and not Path(source).exists():
        raise OSError(f"there is no such folder: {source}")
    # A model's own code is never run, nor is anyone asked whether it may be.
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    named: list[Any] = [getattr(transformers, name, None) for name in config.architectures or ()]
    classes = [found for found in named if hasattr(found, "_from_config")]
    # A quantised checkpoint is looked at as if it were not: its quantisation does not change where things are.
    quantised = getattr(config, "quantization_config", None)
    config.quantization_config = None
    with torch.device("meta"):
        if classes:
            model = classes[0]._from_config(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    config.quantization_config = quantised
    return model


def _model(found: Found) -> Iterator[str]:
    model, known = found.model, None not in (*found.experts.values(), *found.chosen.values())
    active = ("" if known else "at most ") + _count(found.active)
    yield f"{type(model).__name__}: {_count(found.parameters)} parameters, {active} active for a token, {_dtype(model)}"
    if quantised := getattr(model.config, "quantization_config", None):
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised.quant_method
        yield f"  quantised ({method}): its experts are left alone; routers can be trained where they are not quantised"


def _routers(found: Found) -> Iterator[str]:
    sites, experts = found.sites, found.experts
    kinds = Counter((type(site.module).__name__, site.num_experts, site.in_features) for site in sites)
    for (name, rows, width), count in kinds.items():
        yield f"  {count} router{'s' * (count > 1)} {name}, {rows} experts, {width} inputs"
    yield f"  {_shortened([site.name for site in sites])}"
    for routing, chosen in dict.fromkeys((site.routing, found.chosen[site.name]) for site in sites):
        number = "unknown" if chosen is None else f"{chosen} a token"
        yield f"  scores: {routing.scores}; chosen experts: {number}; gates multiply the experts' {routing.gates}"
    yield f"  bias for choosing only: {_shortened(found.biases) if found.biases else 'none'}"
    names = [beside.name for beside in experts.values() if beside is not None]
    lacking = [name for name, beside in experts.items() if beside is None]
    yield f"  experts: {_shortened(names) if names else 'not found'}" + (
        f"; none beside {_shortened(lacking)}" if names and lacking else ""
    )


def _weights(folder: Path, found: Found) -> Iterator[str]:
    """Look at the routers' weights in a folder."""
    names = {site.name: f"{site.name}.{_name_of_weight(site)}" for site in found.sites}
    try:
        weights = weights_in(folder, found.model, names.values())
    except Exception as error:  # of files that are damaged, in any way
        yield f"  weights: cannot be read, {type(error).__name__}: {' '.join(str(error).split())}"
        return
    if not weights:
        yield "  weights: not looked at (no safetensors with them in a folder)"
        return
    norms = torch.cat([weight.float().norm(dim=-1).reshape(-1) for weight in weights.values()])
    least, most = float(norms.min()), float(norms.max())
    yield f"  weights in the folder ({len(weights)}): norms of rows {least:.3g} to {most:.3g}"
    for site in found.sites:
        weight = weights.get(names[site.name])
        if weight is None:
            yield f"    {site.name}: not in the folder"
        elif weight.shape != site.weight.shape:
            expected = tuple(site.weight.shape)
            yield f"    {site.name}: is {tuple(weight.shape)}, where the configuration says {expected}"
        else:
            for what, count in _ill(weight.float()).items():
                if count:
                    yield f"    {site.name}: {count} {what}"


def _name_of_weight(site: RouterSite) -> str:
    return next(name for name, parameter in site.module.named_parameters() if parameter is site.weight)


def _ill(rows: Tensor) -> dict[str, int]:
    unit = torch.nn.functional.normalize(rows, dim=1)
    return {
        "rows that are not finite": int((~rows.isfinite()).any(dim=1).sum()),
        "rows that are zero": int((rows == 0).all(dim=1).sum()),
        "pairs of rows that point the same way": int(((unit @ unit.T).triu(1) > TWINS).sum()),
    }


def _plan(found: Found) -> Iterator[str]:
    model, sites, experts = found.model, found.sites, found.experts
    weights = "1 weight becomes a manifold parameter" if len(sites) == 1 else f"{len(sites)} weights on manifolds"
    yield f"  mg.geometrize(model): {weights}, in place; the same function, the same state-dict keys"
    yield "  mg.attach(model, optimizer): watched, stepped by natural gradients, regularized by 0.01 FSI² a layer"
    stacked = [beside for beside in experts.values() if beside is not None and beside.stacked]
    lacking = [name for name, beside in experts.items() if beside is None]
    if lacking:
        yield f"    no FHS by 'parameters' and no new start for dead experts of {_shortened(lacking)}: not found"
    elif stacked:
        reasons = {reason for beside in stacked if (reason := _unobserved(beside)) is not None}
        yield "    FHS by 'parameters': " + (
            "; ".join(sorted(reasons)) if reasons else "possible, from stacked experts"
        )
    if found.biases:
        yield "    bias_speed=0.001 balances the biases for choosing, which transformers never updates"
    plan = getattr(model, "_tp_plan", None) or getattr(model.config, "base_model_tp_plan", None)
    if plan and any("experts" in key for key in plan):
        yield "    not with tp_plan or expert parallelism: sharded models are refused"
    yield "  geometry.detach(), mg.export(model): as if never there"


def _unobserved(experts: Experts) -> str | None:
    """Return why the products of stacked experts cannot be watched, None if they can."""
    try:
        undo = integration.observe_experts(experts.container, ProductTap(nothing, nothing))
    except ValueError as error:
        return f"not possible, {error}"
    if undo is None:
        return "not possible, the experts are not computed by transformers' experts functions"
    undo()
    return None


def _costs(found: Found, tokens: int) -> Iterator[str]:
    shapes = Counter((site.num_experts, site.in_features, site.weight.dtype) for site in found.sites)
    costs = {shape: cost(*shape, tokens) for shape in shapes}
    state = sum(count * costs[shape].state for shape, count in shapes.items())
    yield f"  memory: {_bytes(state)}, beside {_bytes(12 * found.parameters)} of gradients and moments of AdamW in fp32"
    threads = f"{torch.get_num_threads()} thread" + ("s" if torch.get_num_threads() > 1 else "")
    yield f"  time, measured here ({threads}), of one router and {tokens:,} tokens of a step:"
    for (rows, width, _), each in costs.items():
        yield (
            f"    {rows} experts, {width} inputs: watching {1e3 * each.watching:.1f} ms, natural step "
            f"{1e3 * each.step:.1f} ms; the router's own forward and backward {1e3 * each.router:.1f} ms"
        )
    router = sum(count * 6 * rows * width * tokens for (rows, width, _), count in shapes.items())
    seconds = sum(count * costs[shape].router for shape, count in shapes.items())
    ours = sum(count * (costs[shape].watching + costs[shape].step) for shape, count in shapes.items())
    share = ours / (seconds * 6 * found.active * tokens / router)
    active = _count(found.active)
    yield f"    together about {100 * share:.2g}% of a step, if each of the {active} active parameters costs as"
    yield "    much as one of a router"


def cost(num_experts: int, width: int, dtype: torch.dtype, tokens: int) -> Cost:
    """Return what one router costs, measured on one of its shape.

    Args:
        num_experts: E.
        width: D.
        dtype: of its weight.
        tokens: of a step.
    """
    from .optim import NaturalGradient

    linear = nn.Linear(width, num_experts, bias=False, dtype=dtype)
    model = nn.ModuleDict({"router": linear})
    geometrize(model)
    optimizer = NaturalGradient(model, select="router")
    x_TD = torch.randn(tokens, width, dtype=dtype)

    def forward_and_backward() -> None:
        linear.weight.grad = None
        x = x_TD.detach().requires_grad_()
        linear(x).square().mean().backward()

    logits_TE = linear(x_TD).detach()
    ids_TK = logits_TE.topk(min(2, num_experts)).indices
    forward = LayerForward(layer="router", logits=logits_TE, x=x_TD)
    router_seconds = _seconds(forward_and_backward)
    gradient = None if linear.weight.grad is None else linear.weight.grad.clone()

    def natural_step() -> None:
        linear.weight.grad = None if gradient is None else gradient.clone()
        optimizer.observe(forward)
        optimizer.step()

    for _ in range(4):  # the first steps invert the factors more often than later ones
        natural_step()
    step_seconds = _seconds(natural_step)
    state = sum(t.numel() * t.element_size() for t in tensors_in(optimizer.state_dict()))
    watching = _seconds(lambda: LayerStatistics.of(logits_TE, ids_TK, None, "softmax"))
    return Cost(state, router_seconds, watching, step_seconds)


def _seconds(work: Any, repeats: int = 3) -> float:
    """Return the least time of a few calls."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _chosen(model: Any, site: RouterSite) -> int | None:
    """Return K, as the router, its family, its block, or the configuration says it."""
    block = block_of(model, site)
    says = [getattr(site.module, "top_k", None), site.routing.top_k]
    says += [] if block is None else [getattr(block[1], "top_k", None)]
    says += [getattr(model.config, name, None) for name in ("num_experts_per_tok", "moe_k", "moe_topk")]
    chosen = next((k for k in says if isinstance(k, int)), None)
    if chosen is not None and chosen > site.num_experts:
        raise ValueError(f"router {site.name} is to choose {chosen} of {site.num_experts} experts")
    return chosen


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]} … {names[-1]} ({len(names)})"


def _count(number: int) -> str:
    for unit, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,}"


def _bytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:,.3g} {unit}" if number < 1000 else f"{number:,.0f} {unit}"


def _dtype(model: nn.Module) -> str:
    kinds = Counter(str(p.dtype).removeprefix("torch.") for p in model.parameters())
    return " and ".join(kinds)


if __name__ == "__main__":
    sys.exit(main())
