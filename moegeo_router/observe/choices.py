"""Finding the chosen experts and their gates among the tensors that a router returns, or its experts are called with.

Shape legend: T tokens (any leading dimensions), E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..routers.find import RouterSite
from ..routers.gating import ScoreFunction, gate_errors
from .forward import rows

#: Gates whose shares are off by less, in the mean, are those that a score function makes of the logits.
EXPLAINED = 0.02


class ChoicesFinder:
    """Says which tensors are the chosen experts of a layer, and which are the gates.

    Integers (..., K) with K < E are chosen experts. Integers (..., E) may be a mask or an order of the tokens: they are
    chosen experts where every row names each expert once, and gates stand beside them. Gates are floating point of the
    same shape; of several, those that the logits explain. What values must tell is found out once, in the first forward
    whose logits tell the experts apart, because looking at them waits for an accelerator.

    Args:
        site: the router.
    """

    def __init__(self, site: RouterSite) -> None:
        self._site = site
        #: By position of the integers and number of tensors of their shape: which of these are the gates, None if the
        #: integers are no choices.
        self._decided: dict[tuple[int, int], int | None] = {}

    def find(self, tensors: Sequence[Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Return ``ids`` (..., K), and ``gates`` (..., K) where there are some; nothing if there are no choices.

        Args:
            tensors: those to look through.
            logits: (..., E) of the same forward.
        """
        if self._site.routing.top_k is not None:
            return {}  # a family whose routers show logits only; other integers are masks, or an order of the tokens
        experts = logits.shape[-1]
        for position, ids in enumerate(tensors):
            if ids.is_floating_point() or ids.dtype == torch.bool or not ids.ndim:
                continue
            if ids.shape[-1] > experts or ids.numel() != logits.numel() // experts * ids.shape[-1]:
                continue
            gates = [t for t in tensors if t.is_floating_point() and t.shape == ids.shape and t is not logits]
            if not gates and ids.shape[-1] < experts:
                return {"ids": ids}
            if gates and (which := self._gates(position, ids, gates, logits)) is not None:
                return {"ids": ids, "gates": gates[which]}
        return {}

    def _gates(self, position: int, ids: Tensor, gates: Sequence[Tensor], logits: Tensor) -> int | None:
        if len(gates) == 1 and ids.shape[-1] < logits.shape[-1]:
            return 0
        key = position, len(gates)
        if key not in self._decided:
            with torch.no_grad():
                which = _choose(rows(ids), [rows(t) for t in gates], rows(logits))
                if not _tells_experts_apart(rows(logits)):
                    return which
            self._decided[key] = which
        return self._decided[key]


def misfit(logits_TE: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> float:
    """Return how far gates are from the scores of the logits, whichever score function fits better: 0 … 1, or NaN."""
    every: tuple[ScoreFunction, ...] = ("softmax", "sigmoid")
    return min(float(gate_errors(logits_TE, ids_TK, gates_TK.float(), scores).nanmean()) for scores in every)


def _choose(ids_TK: Tensor, gates: Sequence[Tensor], logits_TE: Tensor) -> int | None:
    """Return which of the tensors (T, K) are the gates, None if the integers are no choices."""
    chosen, experts = ids_TK.shape[-1], logits_TE.shape[-1]
    if chosen == experts and not _names_each_once(ids_TK):
        return None
    misfits = torch.tensor([misfit(logits_TE, ids_TK, gates_TK) for gates_TK in gates]).nan_to_num(nan=torch.inf)
    if chosen == experts == 2 and misfits.min() > EXPLAINED:  # the rows of a one-hot mask of two name each once, too
        return None
    # Gates before and after they are renormalised fit alike, up to rounding: the first, then.
    return int((misfits <= misfits.min() + 0.005 / chosen).nonzero()[0])


def _names_each_once(ids_TE: Tensor) -> bool:
    return bool((ids_TE.sort(dim=-1).values == torch.arange(ids_TE.shape[-1], device=ids_TE.device)).all())


def _tells_experts_apart(logits_TE: Tensor) -> bool:
    """Whether there are tokens, and logits far enough apart that scores of different experts differ."""
    alone = logits_TE.shape[-1] == 1
    return len(logits_TE) > 0 and (alone or float((logits_TE.amax(dim=-1) - logits_TE.amin(dim=-1)).max()) > 0.1)
