"""The sums of the step that is being made, and the way of the last step's sums to the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .statistics import LayerStatistics, RoutingStatistics, world_size

#: Sums of a step and other numbers of it, on the host.
Arrived = tuple[RoutingStatistics, dict[str, Tensor]]


class Window:
    """Collects the sums of one optimizer step; ``close`` reduces them over ranks and begins the next.

    Nothing waits for an accelerator: closed sums are copied to the host while it works on, and ``newest`` gives those
    that have arrived (``previous`` those before them).

    Args:
        num_domains: D of the sums.
        group: the data-parallel process group.
    """

    def __init__(self, num_domains: int, group: Any) -> None:
        self.experts: dict[str, int] = {}
        self._num_domains, self._group = num_domains, group
        self._sums: dict[str, LayerStatistics] = {}
        self._arrived: Arrived | None = None
        self._underway: tuple[RoutingStatistics, dict[str, int], Tensor, Any] | None = None
        self.previous: RoutingStatistics | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that have sums in this step so far."""
        return tuple(self._sums)

    def add(self, layer: str, statistics: LayerStatistics) -> None:
        """Add one forward pass's sums."""
        known = self._sums.get(layer)
        self._sums[layer] = statistics if known is None else known + statistics

    def add_traces(self, layer: str, traces_E: Tensor) -> None:
        """Add one backward pass's Fisher traces (E,)."""
        sums = self._sums.get(layer)
        if sums is None:
            sums = LayerStatistics.zeros(len(traces_E), traces_E.device, self._num_domains)
        self._sums[layer] = sums.with_traces(sums.traces + traces_E)

    def close(self, failed: bool) -> RoutingStatistics:
        """End the step: return its sums, reduced over ranks, on their device. With ranks, all must call it."""
        device = next((sums.p.device for sums in self._sums.values()), None)
        # Recorded layers may come in another order on every rank.
        complete = RoutingStatistics({name: self._complete(name, device) for name in sorted(self.experts)})
        complete.failures += failed
        self._sums = {}
        return complete.all_reduce(self._group)

    def post(self, reduced: RoutingStatistics, numbers: Mapping[str, Tensor]) -> None:
        """Send reduced sums, and other numbers of the step, vectors by name, to the host."""
        others = {name: values.to(reduced.failures) for name, values in numbers.items()}
        if reduced.failures.device.type == "cpu":
            self._arrive(reduced, others)
            return
        vector, sizes = torch.cat([reduced.flat(), *others.values()]), {n: len(values) for n, values in others.items()}
        if vector.device.type != "cuda":
            self._unpack(reduced, sizes, vector.cpu())
            return
        host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
        host.copy_(vector, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._underway = (reduced, sizes, host, event)

    def newest(self, wait: bool) -> Arrived | None:
        """Return the newest sums and numbers that are on the host, None before the first.

        Args:
            wait: for the last ones posted.
        """
        if self._underway is not None:
            reduced, sizes, host, event = self._underway
            if wait:
                event.synchronize()
            if event.query():
                self._unpack(reduced, sizes, host)
        return self._arrived

    def state(self) -> dict[str, Any]:
        """Return the last step's sums and numbers, and the sums before them: plain tensors."""
        reduced, numbers = self.newest(wait=True) or (None, {})
        before = self.previous  # on an accelerator, what the controller reads next is against these
        return {
            "experts": {} if reduced is None else {name: sums.num_experts for name, sums in reduced.layers.items()},
            "sums": None if reduced is None else reduced.flat(),
            "before": None if before is None else before.flat(),
            "numbers": {name: values.clone() for name, values in numbers.items()},
        }

    def restored(self, state: Mapping[str, Any]) -> RoutingStatistics | None:
        """Return the sums that ``state()`` held, to be posted again; those before them are posted here.

        Raises:
            ValueError: the sums of another number of domains.
        """
        if state["sums"] is None:
            return None
        empty = RoutingStatistics.zeros(state["experts"].items(), num_domains=self._num_domains)
        if len(empty.flat()) != len(state["sums"]):
            raise ValueError(f"geometry's state was saved with another num_domains than {self._num_domains}")
        self.experts |= state["experts"]
        if (before := state.get("before")) is not None and len(before) == len(state["sums"]):
            self.post(empty.unflat(before), {})
            self.newest(wait=True)
        return empty.unflat(state["sums"])

    @property
    def order(self) -> tuple[str, ...]:
        """The layers in the order in which they came up."""
        return tuple(self.experts)

    def forget(self) -> None:
        """Drop what was collected."""
        self._sums = {}

    @property
    def distributed(self) -> bool:
        """Whether other ranks take part."""
        return world_size(self._group) > 1

    def _complete(self, layer: str, device: torch.device | None) -> LayerStatistics:
        """Return a layer's sums; those over no tokens if it has none in this step, so that every rank has the same."""
        sums, experts = self._sums.get(layer), self.experts[layer]
        if sums is None:
            return LayerStatistics.zeros(experts, device, self._num_domains)
        if sums.num_experts != experts:
            raise ValueError(f"layer {layer} has {experts} experts, got sums over {sums.num_experts}")
        return sums.to(device)  # the layers of a model may be on several

    def _unpack(self, like: RoutingStatistics, sizes: Mapping[str, int], host: Tensor) -> None:
        own, *others = host.split([len(host) - sum(sizes.values()), *sizes.values()])
        self._arrive(like.unflat(own), dict(zip(sizes, others, strict=True)))

    def _arrive(self, reduced: RoutingStatistics, numbers: dict[str, Tensor]) -> None:
        self.previous = None if self._arrived is None else self._arrived[0]
        self._arrived, self._underway = (reduced, numbers), None
