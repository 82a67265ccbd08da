"""A step with a gradient that is not finite is not taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..observe.statistics import world_size


class Guard:
    """Takes all gradients away before a step if one of them is NaN or inf: the optimizer then changes nothing.

    It reads one number back before every step, for which an accelerator waits. Steps with a closure are not guarded.

    Args:
        optimizers: those that are guarded.
        group: the data-parallel process group; all of its ranks take a step, or none does.
    """

    def __init__(self, optimizers: Sequence[Optimizer], group: Any = None) -> None:
        self._group, self._skipped = group, False
        self._handles = [optimizer.register_step_pre_hook(self._check) for optimizer in optimizers]

    def take(self) -> bool:
        """Return whether the last step was skipped, and forget it."""
        skipped, self._skipped = self._skipped, False
        return skipped

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _check(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            return  # accelerate passes None on as one
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not self._finite(held):
            self._skipped = True
        if self._skipped:
            for parameter in held:
                parameter.grad = None

    def _finite(self, parameters: Sequence[nn.Parameter]) -> bool:
        gradients = [p.grad for p in parameters if p.grad is not None]
        device = gradients[0].device if gradients else None
        # The sum of norms that are each finite could overflow, too: such a gradient is no better.
        bad = (
            ~torch.stack([norm.to(device) for norm in torch._foreach_norm(gradients)]).sum().isfinite()
            if gradients
            else torch.zeros((), dtype=torch.bool)
        ).float()
        if world_size(self._group) > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=self._group)
        return not bool(bad)
