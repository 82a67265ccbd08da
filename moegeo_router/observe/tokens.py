"""Which tokens count, and what each belongs to: masks, packed sequences, domains of the forward that is running."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations import peft
from .forward import flat_tokens
from .hooks import Failed, Hook, recomputing

#: Arguments of a forward that say something about its tokens.
ARGUMENTS = ("attention_mask", "decoder_attention_mask", "segment_ids")

# Of the function that runs whenever a module is called.
_CALL = nn.Module._wrapped_call_impl.__code__

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What is known of the tokens of one forward pass of the model; (B, L) tensors, or (B,) for whole sequences.

    Attributes:
        mask: True where a token counts.
        decoder_mask: the same for the decoder's tokens of an encoder-decoder model.
        segments: the packed sequence of each token, 0 for padding.
        domains: the domain of each token.
        shape: (B, L) of the model's input.
        trained: whether the forward leaves a graph: one under ``no_grad`` is no training.
        given: which of these ``geometry.tokens(...)`` said, not the model's arguments.
    """

    mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    segments: Tensor | None = None
    domains: Tensor | None = None
    shape: tuple[int, int] | None = None
    trained: bool = True
    given: frozenset[str] = frozenset()

    def of_encoder(self, tokens: int) -> dict[str, Tensor | None]:
        """Return ``mask``, ``domains`` and ``sequences`` (T,) for the T tokens that a layer saw.

        Raises:
            ValueError: a mask, segments or domains for another number of tokens.
        """
        mask = self._flat("mask", "attention_mask", tokens)
        segments = self._flat("segments", "segment_ids", tokens)
        if mask is None and segments is not None:
            mask = segments > 0
        domains = flat_tokens(self.domains, tokens, "domains")
        return {"mask": mask, "domains": domains, "sequences": self._sequences(segments, tokens)}

    def of_decoder(self, tokens: int) -> dict[str, Tensor | None]:
        """Return the same for a decoder's layer beside an encoder: the encoder's mask says nothing of its tokens."""
        by_row = self.domains if self.domains is not None and self.domains.ndim == 1 else None
        return {
            "mask": flat_tokens(self.decoder_mask, tokens, "decoder_attention_mask"),
            "domains": flat_tokens(by_row, tokens, "domains"),
        }

    def _flat(self, name: str, argument: str, tokens: int) -> Tensor | None:
        if name in self.given:
            return flat_tokens(getattr(self, name), tokens, f"geometry.tokens({name}=...)")
        try:
            return flat_tokens(getattr(self, name), tokens, argument)
        except ValueError as error:
            raise ValueError(f"{error}: pass the {name} with geometry.tokens({name}=...)") from None

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
    """Hooks on a model, and on the modules around its layers, that hold ``Tokens`` while their forward runs.

    They come from the arguments ``attention_mask`` (B, L), ``decoder_attention_mask`` and ``segment_ids`` (packed
    sequences, 0 for padding; a mask of whole numbers is read the same way) of whichever of these modules has them, by
    name or by position, the innermost first; or from ``given``.

    Args:
        model: the module whose routers are watched.
        layers: the names of its layers.
        begins: called with the arguments when a forward of training begins that is inside of no other.
        failed: what is done with an error of the hooks.
        sequences: whether the tokens' sequences are wanted.
        active: whether anything is to be seen now.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        begins: Callable[[Mapping[str, Any]], None],
        failed: Failed,
        *,
        sequences: bool = False,
        active: Callable[[], bool] = lambda: True,
    ) -> None:
        self._begins, self._sequences, self._active = begins, sequences, active
        names = {part for name, _ in peft.modules_in_use(model) for part in name.split(".")}
        self._two_sides = {"encoder", "decoder"} <= names
        self._given: dict[str, Any] = {}
        self._running: list[Tokens] = []
        self._modules: list[nn.Module] = []
        #: By layer, what checkpointing may run again: an encoder's tokens are not those of the decoder that ran last.
        self._latest: dict[str, Tokens] = {}
        self._handles = []
        self._names: dict[nn.Module, list[str]] = {}
        for module in _around(model, layers):
            self._names[module] = [
                name for name, parameter in _signature(module).items() if parameter.kind in _BY_POSITION
            ]
            self._handles += [
                module.register_forward_pre_hook(Hook(self._before, failed, exclusive=False), with_kwargs=True),
                module.register_forward_hook(Hook(self._after, failed, exclusive=False), always_call=True),
            ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def given(self, **tokens: Tensor | None) -> Iterator[None]:
        """Say what the tokens of the forwards inside are: ``mask``, ``segments``, ``domains``."""
        before, known = self._given, {name: value for name, value in tokens.items() if value is not None}
        self._given = known | {"given": frozenset(known)}
        try:
            yield
        finally:
            self._given = before

    @property
    def trained(self) -> bool:
        """Whether the running forward leaves a graph (inside of reentrant checkpointing it does not seem to)."""
        return self._running[0].trained if self._running else torch.is_grad_enabled()

    def of_layer(self, layer: str, tokens: int, recomputed: bool) -> dict[str, Tensor | None]:
        """Return ``mask``, ``domains`` and ``sequences`` (T,), as far as they are known, for the tokens of a layer.

        Args:
            layer: its name.
            tokens: T.
            recomputed: inside the backward pass; then it is the layer's latest forward that is computed again.

        Raises:
            ValueError: a mask, segments or domains for another number of tokens.
        """
        known = self._latest.get(layer) if recomputed else self._running[-1] if self._running else None
        if known is None:
            known = Tokens(**self._given)
        if not recomputed:
            self._latest[layer] = known
        decoder = self._two_sides and "decoder" in layer.split(".")
        return known.of_decoder(tokens) if decoder else known.of_encoder(tokens)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recomputing():
            return
        names = self._names[module]
        # Positions beyond the names (*args) keep numbers for names: their shapes may be wanted.
        by_position = {names[i] if i < len(names) else str(i): value for i, value in enumerate(args)}
        arguments = by_position | kwargs
        self._forget_broken(module)
        # A forward that does not count (eval mode, no_grad) takes nothing away from the one before it.
        if not self._running and self._active() and module.training and torch.is_grad_enabled():
            self._begins(arguments)
        outer = self._running[-1] if self._running else Tokens(trained=torch.is_grad_enabled())
        # What the caller gave outranks what the model's arguments say.
        self._running.append(replace(outer, **(self._found(arguments, outer) | self._given)))
        self._modules.append(module)

    def _forget_broken(self, module: nn.Module) -> None:
        """Drop what a forward left that Ctrl-C broke off: torch runs no hook then, however it is registered."""
        if module in self._modules and not _calls_itself(module):
            place = self._modules.index(module)
            del self._running[place:], self._modules[place:]

    def _found(self, arguments: Mapping[str, Any], outer: Tokens) -> dict[str, Any]:
        mask, segments = _matrix(arguments.get("attention_mask")), _matrix(arguments.get("segment_ids"))
        whole = mask is not None and not mask.is_floating_point() and mask.dtype != torch.bool
        if segments is None and whole and "mask" not in self._given:  # what is given may be for other tokens
            segments = mask
        decoder_mask = _matrix(arguments.get("decoder_attention_mask"))
        found = {
            "mask": None if mask is None else mask > 0,
            "decoder_mask": None if decoder_mask is None else decoder_mask > 0,
            "segments": segments,
            "shape": _input_shape(arguments.values()) if self._sequences and outer.shape is None else None,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not recomputing() and self._running:
            self._running.pop()
            self._modules.pop()


def _calls_itself(module: nn.Module) -> bool:
    """Return whether a forward of a module runs inside of another one of the same module."""
    frame, calls = sys._getframe(1), 0
    while (frame := frame.f_back) is not None and calls < 2:  # type: ignore[assignment]
        calls += frame.f_code is _CALL and frame.f_locals.get("self") is module
    return calls > 1


def _around(model: nn.Module, layers: Iterable[str]) -> list[nn.Module]:
    """Return the model, and those modules around its layers whose forward takes one of ``ARGUMENTS``."""
    found = {id(model): model}
    for layer in layers:
        parts = layer.split(".")
        for end in range(1, len(parts)):
            module = peft.submodule(model, ".".join(parts[:end]))
            if set(ARGUMENTS) & set(_signature(module)):
                found.setdefault(id(module), module)
    return list(found.values())


def _signature(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # a forward without a Python signature
        return {}


def _matrix(mask: Any) -> Tensor | None:
    # Only a padding mask (B, L) says which tokens are real; (B, H, L, L) says who sees whom.
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _input_shape(arguments: Iterable[Any]) -> tuple[int, int] | None:
    for value in arguments:
        if isinstance(value, Tensor) and value.ndim in (2, 3):  # ids (B, L) or embeddings (B, L, D), no images
            return value.shape[0], value.shape[1]
    return None
