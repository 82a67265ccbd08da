"""Which tokens count, and what each belongs to: masks, packed sequences, domains of the forward that is running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .forward import flat_tokens
from .hooks import Failed, Hook, recomputing


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What is known of the tokens of one forward pass of the model; (B, L) tensors, or (B,) for whole sequences.

    Attributes:
        mask: True where a token counts.
        decoder_mask: the same for the decoder's tokens of an encoder-decoder model.
        segments: the packed sequence of each token, 0 for padding.
        domains: the domain of each token.
        shape: (B, L) of the model's input.
    """

    mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    segments: Tensor | None = None
    domains: Tensor | None = None
    shape: tuple[int, int] | None = None

    def of_layer(self, layer: str, tokens: int) -> dict[str, Tensor | None]:
        """Return ``mask``, ``domains`` and ``sequences`` (T,) for the T tokens that a layer saw.

        Raises:
            ValueError: a mask, segments or domains for another number of tokens.
        """
        if "decoder" in layer.split(".") and self.decoder_mask is not None:
            return {"mask": flat_tokens(self.decoder_mask, tokens, "decoder_attention_mask")}
        try:
            mask = flat_tokens(self.mask, tokens, "attention_mask")
        except ValueError as error:
            raise ValueError(f"{error}: pass the mask with geometry.tokens(mask=...) or record(mask=...)") from None
        segments = flat_tokens(self.segments, tokens, "segment_ids")
        if mask is None and segments is not None:
            mask = segments > 0
        domains = flat_tokens(self.domains, tokens, "domains")
        return {"mask": mask, "domains": domains, "sequences": self._sequences(segments, tokens)}

    def _sequences(self, segments: Tensor | None, tokens: int) -> Tensor | None:
        if self.shape is None or self.shape[0] * self.shape[1] != tokens:
            return None
        rows, length = self.shape
        device = None if segments is None else segments.device
        row_T = torch.arange(rows, device=device).repeat_interleave(length)
        if segments is None:
            return row_T
        # Numbered so that no two rows share a sequence; there are at most as many in a row as it has tokens.
        return row_T * (length + 1) + segments.long()


class TokenTap:
    """Hooks on the whole model that hold ``Tokens`` while its forward runs.

    They come from the keyword arguments ``attention_mask`` (B, L), ``decoder_attention_mask`` and ``segment_ids``
    (packed sequences, 0 for padding; a mask of whole numbers is read the same way), or from ``given``.

    Args:
        model: the module that is called.
        begins: called whenever its forward begins.
        failed: what is done with an error of the hooks.
        sequences: whether the tokens' sequences are wanted.
    """

    def __init__(self, model: nn.Module, begins: Callable[[], None], failed: Failed, sequences: bool = False) -> None:
        self._begins, self._sequences = begins, sequences
        self._given: dict[str, Tensor | None] = {}
        self._running: Tokens | None = None
        self._latest: Tokens | None = None
        self._handles = [
            model.register_forward_pre_hook(Hook(self._before, failed), with_kwargs=True),
            model.register_forward_hook(Hook(self._after, failed), always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def given(self, **tokens: Tensor | None) -> Iterator[None]:
        """Say what the tokens of the forwards inside are: ``mask``, ``segments``, ``domains``."""
        before, self._given = self._given, tokens
        try:
            yield
        finally:
            self._given = before

    def of_layer(self, layer: str, tokens: int, recomputed: bool) -> dict[str, Tensor | None]:
        """Return what is known of a layer's tokens, see ``Tokens.of_layer``.

        Args:
            layer: its name.
            tokens: T.
            recomputed: inside the backward pass; then it is the latest forward that is computed again.
        """
        known = self._latest if recomputed else self._running
        if known is None:
            known = Tokens(**self._given)  # type: ignore[arg-type]
        return known.of_layer(layer, tokens)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recomputing():
            return
        mask = _matrix(kwargs.get("attention_mask"))
        segments = _matrix(kwargs.get("segment_ids"))
        if segments is None and mask is not None and not mask.is_floating_point() and mask.dtype != torch.bool:
            segments = mask
        found = {
            "mask": None if mask is None else mask > 0,
            "decoder_mask": _truth(kwargs.get("decoder_attention_mask")),
            "segments": segments,
            "shape": _input_shape(args, kwargs) if self._sequences else None,
        }
        given = {name: value for name, value in self._given.items() if value is not None}
        self._running = self._latest = Tokens(**(found | given))  # type: ignore[arg-type]
        self._begins()

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not recomputing():
            self._running = None


def _matrix(mask: Any) -> Tensor | None:
    # Only a padding mask (B, L) says which tokens are real; (B, H, L, L) says who sees whom.
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _truth(mask: Any) -> Tensor | None:
    matrix = _matrix(mask)
    return None if matrix is None else matrix > 0


def _input_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim in (2, 3):  # ids (B, L) or embeddings (B, L, D), no images
            return value.shape[0], value.shape[1]
    return None
