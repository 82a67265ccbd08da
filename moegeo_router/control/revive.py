"""Reviving dead experts: a copy of a live one (or new weights), beside it, where it serves its tokens worst.

Shape legend: n rows (tokens), E experts, D width.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import check_choice, check_not_negative
from ..geometry.simplex import widen
from ..observe.statistics import world_size
from ..optim.stack import bias_of
from ..routers.find import RouterSite
from ..routers.tag import manifold_of
from .expert_weights import ExpertWeights, Slice, load_moments, moments_reason, reset_moments, save_moments, view
from .placement import Placement, donors_for, place_row, turned_row, with_newcomer
from .plant import Applied, Intervention, Order, Plant
from .probe import LayerProbe, Look, Paused

Mode = Literal["copy", "fresh"]

#: Of E experts, no more than this share is revived at once.
SHARE = 0.25


class _Newcomer(NamedTuple):
    """A dead expert, the live one it is placed beside, and where."""

    expert: int
    donor: int
    placement: Placement


class Revive(Intervention):
    """Gives dead experts new weights and a place in the router where tokens reach them.

    A dead expert gets the weights of the most loaded live one with a little noise (``"copy"``), or weights drawn as
    large as those of the live ones (``"fresh"``); no momentum, and second moments of the same origin; and a router row
    beside its donor's, towards the tokens that the donor serves worst (``place_row``). At most a quarter of the experts
    are revived at once, the deadest first. What no placement within the bound would bring tokens stays dead. Where the
    layer's output changes by more than ``change_limit`` all is taken back and tried once more with a quarter of
    ``most``, then given up.

    All ranks end with the same weights. A prior over the experts is left alone.

    Args:
        mode: ``"copy"`` or ``"fresh"``.
        noise: of copies, relative to the root mean square of each tensor.
        most: bound on the change of the gates, the mean total variation over tokens; all newcomers together. Copies
            and donors count as one.
        change_limit: bound on the change of the layer's output, ``‖Δy‖ / ‖y‖`` over the tokens last seen.
        renormalize: whether a token's gates are divided by their sum, for layers that do not show their gates.
        paused: makes a context in which the watch counts nothing (``Geometry.pause``), for running the layer again.

    Raises:
        ValueError: an unknown mode, or a number out of range.
    """

    name = "revive"
    cost = "two to four forward passes of the layer, and the writes to the experts revived"
    looks = True

    def __init__(
        self,
        mode: Mode = "copy",
        noise: float = 0.02,
        most: float = 0.05,
        change_limit: float = 0.25,
        renormalize: bool = True,
        paused: Paused = nullcontext,
    ) -> None:
        check_choice("mode", mode, get_args(Mode))
        check_not_negative("noise", noise)
        for name, value in (("most", most), ("change_limit", change_limit)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.mode, self.noise, self.most, self.change_limit = mode, noise, most, change_limit
        self.renormalize, self._paused = renormalize, paused

    def unavailable(self, plant: Plant, layer: str) -> str | None:
        """Return why no expert of this layer can be revived; None if they can."""
        site, experts = plant.sites.get(layer), plant.experts.get(layer)
        if site is None:
            return f"there is no router {layer}"
        if experts is None:
            return f"no experts found beside router {layer}"
        if site.num_experts < 2:
            return f"router {layer} has one expert"
        try:
            weights = ExpertWeights(experts, site.num_experts)
        except ValueError as error:
            return str(error)
        return next(_reasons(plant, site, weights), None)

    @torch.no_grad()
    def apply(self, plant: Plant, order: Order) -> Applied:
        """Revive the deadest of ``order.dead``; nothing is changed where it cannot be done."""
        reason = self.unavailable(plant, order.layer)
        chosen = [] if reason is not None else _deadest(order)
        if not chosen:
            return _refused(reason or "no expert is dead")
        live = [e for e in range(len(order.load)) if e not in order.dead and order.load[e] > 0]
        if not live:
            return _refused("no live expert has a load")
        # The other dead ones are named too, so that none of them is anybody's donor.
        found = donors_for([*chosen, *(expert for expert in order.dead if expert not in chosen)], order.load)
        donors = {expert: found[expert] for expert in chosen}
        applied = self._attempt(plant, order, live, donors, self.most)
        if "output_change" in applied.detail and not applied.done:
            # The output changes with the root of what moves: once more, by half.
            again = self._attempt(plant, order, live, donors, self.most / 4)
            applied = again if again.done or "output_change" in again.detail else applied
        return applied

    @torch.no_grad()
    def undo(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> None:
        """Put weights, moments and rows back as they were before; what other experts learnt since then stays."""
        _Work(plant, plant.sites[layer]).load(memory)
        _forget(plant, layer, memory["experts"])

    def release(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> None:
        """Leave all as it is: what was revived has learnt since, and serves tokens."""

    def _attempt(
        self, plant: Plant, order: Order, live: Sequence[int], donors: Mapping[int, int], most: float
    ) -> Applied:
        """Revive experts and look what it did; take it back if that is too much."""
        site, probe = plant.sites[order.layer], plant.probes.get(order.layer)
        newcomers = self._places(plant, order, None if probe is None else probe.look, donors, most)
        placed = [newcomer for newcomer in newcomers if newcomer.placement.share != 0]
        if not placed:
            return _refused(f"no place within most={most} reaches a token", experts=list(donors))
        work = _Work(plant, site)
        memory = work.save([newcomer.expert for newcomer in placed])
        before = _rerun(probe, self._paused)
        for newcomer in placed:
            self._write(work, newcomer, order, live)
        change = _change(before, None if before is None else _rerun(probe, self._paused), plant, site)
        # NaN is no change within the limit.
        if change is not None and not change <= self.change_limit:
            work.load(memory)
            reason = f"the layer's output changed by {change:.3g}, more than change_limit={self.change_limit}"
            number = change if math.isfinite(change) else None
            return _refused(reason, experts=list(donors), output_change=number)
        _forget(plant, order.layer, memory["experts"])
        return Applied(done=True, detail=self._detail(newcomers, placed, change), memory=memory)

    def _places(
        self, plant: Plant, order: Order, look: Look | None, donors: Mapping[int, int], most: float
    ) -> list[_Newcomer]:
        """Place all newcomers one after the other, as rank 0 sees its tokens."""
        table, placements, left = _Table(plant, order, look, self.renormalize), [], most
        for number, (expert, donor) in enumerate(donors.items()):
            placement = table.place(expert, donor, left / (len(donors) - number), merged=self.mode == "copy")
            table.seat(expert, placement)
            left -= placement.moved or 0.0
            placements.append(placement)
        placements = _of_rank_0(placements, plant.group)
        return [_Newcomer(*pair, placement) for pair, placement in zip(donors.items(), placements, strict=True)]

    def _write(self, work: _Work, newcomer: _Newcomer, order: Order, live: Sequence[int]) -> None:
        expert, donor, placement = newcomer
        generator = _generator(order, expert, "weights")
        if self.mode == "copy":
            work.weights.copy(donor, expert, self.noise, generator)
        else:
            work.weights.fresh(expert, live, generator)
        models = [donor] if self.mode == "copy" else live
        work.reset_moments(expert, donor, models)
        row, *bias = work.router(expert)
        view(row).copy_(placement.row)
        for piece in bias:
            view(piece).fill_(placement.bias)

    def _detail(
        self, newcomers: Sequence[_Newcomer], placed: Sequence[_Newcomer], change: float | None
    ) -> dict[str, Any]:
        moved = [newcomer.placement.moved for newcomer in placed]
        return {
            "experts": [newcomer.expert for newcomer in placed],
            "donors": [newcomer.donor for newcomer in placed],
            "left_dead": [newcomer.expert for newcomer in newcomers if newcomer not in placed],
            "mode": self.mode,
            "share": [newcomer.placement.share for newcomer in placed],
            "moved": None if None in moved else sum(m for m in moved if m is not None),
            "output_change": change,
        }


class _Table:
    """A router and the rows last seen of it, as newcomers take their places one after the other.

    Args:
        plant: the run.
        order: of this intervention.
        look: the rows; None where there are none.
        renormalize: whether gates are divided by their sum, where the rows do not show it.
    """

    def __init__(self, plant: Plant, order: Order, look: Look | None, renormalize: bool) -> None:
        self._order, self._scores, self._site = order, plant.scores, plant.sites[order.layer]
        self._renormalize = renormalize
        bias = bias_of(self._site)
        self._weight_ED = widen(self._site.weight.detach()).clone()
        self._bias_E = None if bias is None else widen(bias.detach()).clone()
        fits = look is not None and look.x is not None and look.x.shape[-1] == self._site.in_features
        self._look = look if fits else None

    def place(self, expert: int, donor: int, most: float, merged: bool) -> Placement:
        """Return where a newcomer goes."""
        look, found = self._look, None
        if look is not None and look.x is not None:
            found = place_row(
                look.x,
                look.logits,
                look.hurt,
                self._weight_ED,
                self._bias_E,
                donor=donor,
                dead=expert,
                k=self._order.k,
                scores=self._scores,
                most=most,
                renormalize=self._renormalize if look.renormalized is None else look.renormalized,
                merged=merged,
                unit=isinstance(manifold_of(self._site.weight), _unit_rows()),
            )
        if found is None:
            found = turned_row(self._weight_ED, self._bias_E, donor, _generator(self._order, expert, "row"))
        return found

    def seat(self, expert: int, placement: Placement) -> None:
        """Put a newcomer there."""
        look = self._look
        if look is not None and look.x is not None:
            logits = with_newcomer(look.x, look.logits, self._weight_ED, self._bias_E, expert, placement)
            self._look = replace(look, logits=logits)
        self._weight_ED[expert] = placement.row
        if self._bias_E is not None:
            self._bias_E[expert] = placement.bias


class _Work:
    """All that belongs to single experts of a layer: their weights, their router rows and biases, their moments."""

    def __init__(self, plant: Plant, site: RouterSite) -> None:
        experts = plant.experts[site.name]
        assert experts is not None
        self.weights = ExpertWeights(experts, site.num_experts)
        self._optimizers, self._site = plant.optimizers, site

    def router(self, expert: int) -> list[Slice]:
        """Return an expert's row, and its bias where there is one that is trained."""
        bias = bias_of(self._site)
        return [(self._site.weight, expert), *([] if bias is None else [(bias, expert)])]

    def all(self, expert: int) -> list[Slice]:
        """Return all that is an expert's."""
        return [*self.weights.slices(expert), *self.router(expert)]

    def reset_moments(self, expert: int, donor: int, models: Sequence[int]) -> None:
        """Give the moments of an expert's weights those of its models', those of its row its donor's."""
        slices = self.weights.slices
        reset_moments(slices(expert), [slices(model) for model in models], self._optimizers)
        reset_moments(self.router(expert), [self.router(donor)], self._optimizers)

    def save(self, experts: Sequence[int]) -> dict[str, Any]:
        """Return all that ``load`` needs to put experts back."""
        return {
            "experts": list(experts),
            "weights": [self.weights.save(expert) for expert in experts],
            "rows": [[view(piece).clone() for piece in self.router(expert)] for expert in experts],
            "moments": [save_moments(self.all(expert), self._optimizers) for expert in experts],
        }

    def load(self, memory: Mapping[str, Any]) -> None:
        """Put experts back, bit for bit."""
        for number, expert in enumerate(memory["experts"]):
            self.weights.load(expert, memory["weights"][number])
            for piece, values in zip(self.router(expert), memory["rows"][number], strict=True):
                view(piece).copy_(values)
            load_moments(self.all(expert), memory["moments"][number], self._optimizers)


def _reasons(plant: Plant, site: RouterSite, weights: ExpertWeights) -> Iterator[str]:
    """Yield why experts that can be told apart cannot be revived."""
    from ..geometry.rows import OrthonormalRows

    if not all(parameter.requires_grad for parameter in weights.parameters):
        yield f"the experts of router {site.name} are frozen"
    if not site.weight.requires_grad:
        yield f"router {site.name} is frozen"
    if isinstance(manifold_of(site.weight), OrthonormalRows):
        yield f"the rows of router {site.name} are orthonormal: none can be moved alone"
    bias = bias_of(site)
    parameters = [*weights.parameters, site.weight, *([] if bias is None else [bias])]
    if _shared(plant, site, parameters):
        yield f"router {site.name} or its experts share weights with another layer"
    reason = moments_reason(parameters, plant.optimizers)
    if reason is not None:
        yield f"the optimizer's moments cannot be reset: {reason}"


def _shared(plant: Plant, site: RouterSite, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether parameters are of two modules, or their module of two layers."""
    own = {id(parameter) for parameter in parameters}
    owners = [id(p) for module in plant.model.modules() for p in module._parameters.values() if id(p) in own]
    twice = len(set(owners)) < len(owners)
    experts = plant.experts[site.name]
    others = [name for name in plant.sites if name != site.name]
    return twice or any(
        plant.sites[name].weight is site.weight
        or (plant.experts.get(name) is not None and plant.experts[name].container is experts.container)  # type: ignore[union-attr]
        for name in others
    )


def _deadest(order: Order) -> list[int]:
    """Return the dead experts to revive now, those of least load first."""
    ranked = sorted(set(order.dead), key=lambda expert: (order.load[expert], expert))
    return ranked[: max(1, int(SHARE * len(order.load)))]


def _refused(reason: str, **detail: Any) -> Applied:
    return Applied(done=False, detail={"reason": reason, **detail})


def _unit_rows() -> type:
    from ..geometry.rows import UnitRows

    return UnitRows


def _generator(order: Order, expert: int, what: str) -> torch.Generator:
    """Return a generator that is the same on every rank and in a run that is resumed."""
    return torch.Generator().manual_seed(zlib.crc32(f"{order.layer}/{order.step}/{expert}/{what}".encode()))


def _forget(plant: Plant, layer: str, experts: Sequence[int]) -> None:
    if plant.steps is not None and layer in plant.steps.names:
        plant.steps.forget(layer, experts)


def _of_rank_0(placements: Sequence[Placement], group: Any) -> list[Placement]:
    """Return rank 0's placements on every rank."""
    if world_size(group) == 1:
        return list(placements)
    numbers = [[torch.nan if n is None else n for n in (p.bias, p.share, p.moved)] for p in placements]
    rows = torch.stack([placement.row for placement in placements]).double()
    sent = torch.cat([rows, torch.tensor(numbers, dtype=torch.float64, device=rows.device)], dim=-1)
    dist.broadcast(sent, group_src=0, group=group)
    found = []
    for row, placement in zip(sent, placements, strict=True):
        bias, share, moved = (None if value != value else value for value in row[-3:].tolist())
        found.append(Placement(row[:-3].to(placement.row), bias or 0.0, share, moved))
    return found


def _rerun(probe: LayerProbe | None, paused: Paused) -> Tensor | None:
    return None if probe is None else probe.rerun(paused)


def _change(before: Tensor | None, after: Tensor | None, plant: Plant, site: RouterSite) -> float | None:
    """Return ``‖Δy‖ / ‖y‖`` over the tokens of all ranks; None where no rank could see its layer's output."""
    sums = torch.zeros(2, dtype=torch.float64, device=site.weight.device)
    if before is not None and after is not None:
        difference = (after - before).double().square().sum()
        sums = torch.stack([difference, before.double().square().sum()])
    if world_size(plant.group) > 1:
        dist.all_reduce(sums, group=plant.group)
    changed, size = sums.tolist()
    if not size and not changed:
        return None
    return (changed / size) ** 0.5 if size else float("inf")
