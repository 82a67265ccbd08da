"""The sums of the step that is being made, and the way of the last step's sums to the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .statistics import LayerStatistics, RoutingStatistics, world_size


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
        self._arrived: tuple[RoutingStatistics, dict[str, Tensor]] | None = None
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
        complete = RoutingStatistics.zeros(sorted(self.experts.items()), device, self._num_domains)
        for layer, sums in self._sums.items():
            complete.add(layer, sums.to(device))  # the layers of a model may be on several
        complete.failures += failed
        self._sums = {}
        return complete.all_reduce(self._group)

    def post(self, reduced: RoutingStatistics, numbers: Mapping[str, Tensor]) -> None:
        """Send reduced sums, and other numbers of the step, vectors by name, to the host."""
        vector = torch.cat([reduced.flat(), *(values.to(reduced.failures) for values in numbers.values())])
        sizes = {name: len(values) for name, values in numbers.items()}
        if vector.device.type != "cuda":
            self._arrive(reduced, sizes, vector.cpu())
            return
        host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
        host.copy_(vector, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._underway = (reduced, sizes, host, event)

    def newest(self, wait: bool) -> tuple[RoutingStatistics, dict[str, Tensor]] | None:
        """Return the newest sums and numbers that are on the host, None before the first.

        Args:
            wait: for the last ones posted.
        """
        if self._underway is not None:
            reduced, sizes, host, event = self._underway
            if wait:
                event.synchronize()
            if event.query():
                self._arrive(reduced, sizes, host)
        return self._arrived

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

    def _arrive(self, reduced: RoutingStatistics, sizes: Mapping[str, int], host: Tensor) -> None:
        self.previous = None if self._arrived is None else self._arrived[0]
        own, *others = host.split([len(host) - sum(sizes.values()), *sizes.values()])
        self._arrived, self._underway = (reduced.unflat(own), dict(zip(sizes, others, strict=True))), None
