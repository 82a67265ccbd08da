"""What is said, once, about what a layer shows or does not show."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import GeometryConfig
from ..routers.gating import ScoreFunction, gate_errors
from .forward import LayerForward, rows

#: Why a router that has a gradient was not seen.
UNSEEN = (
    "no training forward of theirs was seen (the model in eval mode? attached after the first compiled call, or "
    "another model of its class was compiled before: torch.compiler.reset()? a weight used without calling its module?)"
)


class Findings:
    """Warns of what is missing or suspicious, each kind once.

    Args:
        config: of the ``attach``.

    Attributes:
        seen: the layers of which a forward pass was ever seen.
    """

    def __init__(self, config: GeometryConfig) -> None:
        self._config = config
        self.seen: set[str] = set()
        self._looked_at: set[str] = set()
        self._said: set[str] = set()

    def of(self, seen: LayerForward) -> None:
        """Look at the first forward pass of a layer, as it shows itself."""
        self.seen.add(seen.layer)
        if seen.layer in self._looked_at or not seen.size:
            return
        self._looked_at.add(seen.layer)
        if seen.ids is not None and seen.gates is not None and seen.num_experts > 1:
            gates_TK = rows(seen.gates.detach()).float()
            self._constant_gates(seen.layer, gates_TK)
            self._scores(seen, gates_TK)

    def missing(self, seen: LayerForward) -> None:
        """Say what a layer does not show and what that disables."""
        outputs = self._config.fisher == "outputs"
        if seen.ids is None:
            so = "no load metrics" + (", no FHS by outputs" if outputs else "")
            ours, other = self._scores_and_other()
            self._say(
                "ids",
                f"layer {seen.layer} shows logits, not the experts chosen: {so} (GeometryConfig(top_k=...) takes the k "
                f"largest logits for them); p is made by {ours} scores (GeometryConfig(scores={other!r}) otherwise)",
            )
        elif outputs and seen.gates is None:
            why = "no FHS by outputs (fisher='parameters' needs none)"
            self._say("gates", f"layer {seen.layer} shows the experts chosen, not their gates: {why}")
        elif outputs and seen.output is None:
            self._say("output", f"layer {seen.layer} has no block whose output was seen: no FHS by outputs")

    def recorded(self, layer: str) -> None:
        """Say what cannot be known of a layer that is recorded, not tapped."""
        if self._config.fisher in ("parameters", "minibatch"):
            why = "which looks inside the experts of a model with hooks: take fisher='outputs' and record(output=...)"
            self._say("recorded", f"layer {layer} is recorded: no FHS by {self._config.fisher}, {why}")

    def lost(self, layer: str) -> None:
        """Say that the gradient of a recorded output never comes."""
        self._say(
            "lost",
            f"layer {layer}: gradients reach its logits, but not the output that was recorded: no FHS by outputs; give "
            "record(output=...) the very tensor that the block returns, not a view or a copy of it",
        )

    def unseen(self, layers: Sequence[str]) -> None:
        """Say that routers were trained without being seen."""
        if layers:
            self._say("unseen", f"the routers {', '.join(layers)} have gradients, but {UNSEEN}")

    def unseen_step(self, layers: Sequence[str]) -> None:
        """Say that routers were trained in a step in which no layer was seen at all."""
        if layers:
            self._say(
                "unseen step",
                f"the routers {', '.join(layers)} have gradients, but no training forward was seen since the last step "
                "(the model still in eval mode? trained inside of pause()?): nothing is measured or regularized, and "
                "natural steps leave them where they are",
            )

    def _constant_gates(self, layer: str, gates_TK: Tensor) -> None:
        if gates_TK.shape[-1] == 1 and bool(torch.all(gates_TK == 1)):
            self._say(
                "constant gates",
                f"layer {layer}: top-1 gates that are renormalised are exactly 1, so the loss gives the router no "
                "gradient: weigh the chosen expert by its probability",
            )

    def _scores(self, seen: LayerForward, gates_TK: Tensor) -> None:
        """Compare the gates with what the score function makes of the logits: only their ratios, whatever the scale."""
        assert seen.ids is not None
        ours, other = self._scores_and_other()
        if gates_TK.shape[-1] == 1:
            return
        logits_TE, ids_TK = rows(seen.logits.detach()), rows(seen.ids)

        def misfit(scores: ScoreFunction) -> float:
            return float(gate_errors(logits_TE, ids_TK, gates_TK, scores).nanmean())

        if misfit(ours) > 0.02 and misfit(other) < 0.005:
            self._say(
                "scores",
                f"layer {seen.layer}: the gates are {other} scores of the logits, not {ours} ones: set "
                f"GeometryConfig(scores={other!r})",
            )

    def _scores_and_other(self) -> tuple[ScoreFunction, ScoreFunction]:
        return ("softmax", "sigmoid") if self._config.routing.scores == "softmax" else ("sigmoid", "softmax")

    def _say(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(message, stacklevel=6)
