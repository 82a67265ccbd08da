"""Probes: what a trained model is evaluated on besides its validation split. Each is a file of ``configs/probes``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from trainers import build
from trainers.data.base import Data
from trainers.data.text import TextData
from trainers.data.wikipedia import to_evaluate_on
from trainers.evaluation import Evaluation, evaluate


def text(data: Data, *, name: str, split: str, root: str | None = None, valid_tokens: int | None = 200_000) -> TextData:
    """Return a text to evaluate on, in the tokens and windows of the data that is trained on.

    Args:
        data: what is trained on.
        name: "wikitext2" or "enwiki".
        split: "valid" or "test".
        root: folder of the data sets; None reads MOEGEO_DATA.
        valid_tokens: as in ``TextData``.

    Raises:
        ValueError: data that are no text, an unknown name or split, or as in ``TextData``.
        FileNotFoundError: a file is missing.
    """
    if not isinstance(data, TextData):
        raise ValueError(f"{name} is text, and {data.name} is none: its model cannot read it")
    with _tokenizer_of(data) as tokenizer:
        return to_evaluate_on(
            name,
            root=root,
            split=split,
            batch_size=data.batch_size,
            length=data.length,
            valid_tokens=valid_tokens,
            tokenizer=tokenizer,
        )


@contextmanager
def _tokenizer_of(data: TextData) -> Iterator[str]:
    """The name of a data set's tokenizer, a file where it was fitted."""
    if data.tokenizer_json is None:
        yield "bytes"
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(data.tokenizer_json, encoding="utf-8")
        yield str(path)


def build_probes(config: DictConfig, data: Data) -> dict[str, Data]:
    """Return the data sets of ``config.probes`` by name, for a model that is trained on ``data``.

    Raises:
        ValueError: a probe that the model cannot see, or as in its constructor; the message names it.
        FileNotFoundError: its file is missing.
    """
    probes: dict[str, Data] = {}
    for name in config.get("probes") or {}:
        try:
            probes[name] = build.build(config.probes, name)(data)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"probes={name}: {error}") from None
    return probes


def evaluate_probes(
    model: nn.Module, probes: Mapping[str, Data], device: torch.device, precision: str = "fp32"
) -> dict[str, Evaluation]:
    """Evaluate a model on each probe; arguments as in ``evaluate``."""
    return {name: evaluate(model, data, device, precision, routing=False) for name, data in probes.items()}


def probe_scalars(found: Mapping[str, Evaluation]) -> dict[str, float]:
    """Return flat keys: ``probe/NAME/loss``, and ``…/bits_per_byte`` of language or ``…/accuracy`` of vision."""
    flat: dict[str, float] = {}
    for name, evaluation in found.items():
        flat[f"probe/{name}/loss"] = evaluation.loss
        if evaluation.bits_per_byte is None:
            flat[f"probe/{name}/accuracy"] = evaluation.accuracy
        else:
            flat[f"probe/{name}/bits_per_byte"] = evaluation.bits_per_byte
    return flat


def probe_lines(found: Mapping[str, Evaluation]) -> list[str]:
    """Return a line for each probe, for the terminal."""
    lines = []
    for name, evaluation in found.items():
        bits = evaluation.bits_per_byte
        last = f"accuracy {evaluation.accuracy:.1%}" if bits is None else f"{bits:.3f} bits per byte"
        lines.append(f"probe {name}: loss {evaluation.loss:.4f} nats, {last}")
    return lines
