"""What every data set is to the trainers: batches, a fingerprint, a trivial baseline, a description."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's worth of data; B rows, L positions a row. Masked positions hold zeros everywhere.

    Args:
        inputs: language (B, L) int64 token ids; vision (B, C, H, W) float32.
        targets: language (B, L) int64, the token that follows each input; vision (B,) int64 class.
        mask: language (B, L) bool, vision (B,) bool; True where the position is real and not padding.
        domains: language (B, L) int64 domain of each input token; vision (B,) int64.
        documents: language (B, L) int64 document of each input token within its split; vision (B,) image
            within its split.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    domains: Tensor
    documents: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; copies are asynchronous where the memory is pinned.

        Args:
            device: as ``Tensor.to`` takes it.

        Returns:
            A new batch; self if it is there already.
        """
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass(frozen=True)
class Baseline:
    """A trivial model's held-out loss, to be beaten.

    Args:
        name: the model, with its constants, e.g. "bigram, add-0.01".
        loss: mean held-out cross-entropy in nats a target (token or image), on exactly the targets of
            ``valid_batches``.
    """

    name: str
    loss: float


class Data(Protocol):
    """A data set as the training loop sees it.

    ``name``, ``task`` ("language" or "vision") and ``domains`` (names; domain ids index them) say what it is;
    ``batch_size`` is the rows of every batch; ``fingerprint`` is the sha256 of the corpus and of all that shapes
    its content (tokenizer, split), not of how it is cut into batches.
    """

    name: str
    task: str
    domains: tuple[str, ...]
    batch_size: int
    fingerprint: str

    def train_batch(self, step: int) -> Batch:
        """The training batch of ``step``, a pure function of (seed, step): resuming needs only the step."""
        ...

    def valid_batches(self) -> Iterator[Batch]:
        """The held-out batches, always the same, all of one shape: the last is padded, its mask False there."""
        ...

    def baseline(self) -> Baseline:
        """The trivial model's held-out loss on the targets of ``valid_batches``."""
        ...

    def describe(self) -> str:
        """One line for the header of a run."""
        ...


class LanguageData(Data, Protocol):
    """Data of task "language".

    ``length`` is L; ``bytes_per_token`` is measured on the held-out split (each end-of-document token counts as
    one byte), so bits per byte = nats per token / (ln 2 * bytes_per_token); ``tokenizer_json`` rebuilds the
    tokenizer, None for bytes.
    """

    vocab_size: int
    length: int
    bytes_per_token: float
    tokenizer_json: str | None

    def token_counts(self) -> Tensor:
        """How often each token occurs in the train split, (V,); ones where there is none."""
        ...


class VisionData(Data, Protocol):
    """Data of task "vision"; ``image_shape`` is (C, H, W)."""

    num_classes: int
    image_shape: tuple[int, int, int]


def generator(seed: int, stream: str, index: int) -> torch.Generator:
    """A generator that depends on nothing but its three arguments.

    Args:
        seed: the data set's seed.
        stream: what the numbers are for; different streams are independent.
        index: the step or epoch.

    Returns:
        A seeded CPU generator. The seed is the head of sha256(seed, stream, index): neighbouring steps share
        nothing.
    """
    digest = hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def fingerprint(parts: Iterable[Tensor | str]) -> str:
    """The sha256 of a sequence of tensors and strings; shapes, types and order count.

    Args:
        parts: CPU tensors and strings.

    Returns:
        The digest in hexadecimal.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(f"str {len(part)} {part}".encode())
        else:
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def held_out(items: Sequence[tuple[str, str]], fraction: float) -> list[bool]:
    """Which items go to validation: within each domain those whose name hashes below ``fraction``.

    The hash u in [0, 1) is of the name alone. So an item stays on its side when the corpus grows, and items
    of one name in different domains (the code and the comments of one file) go the same way. A domain of two
    or more items keeps at least one on each side: the smallest u is held out, the largest is not. A domain's
    only item is trained on.

    Args:
        items: (domain, name) of each item.
        fraction: the share held out, in (0, 1).

    Returns:
        For each item, True if held out.

    Raises:
        ValueError: if the fraction is not in (0, 1) or two items of one domain have the same name.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"valid_fraction: expected a number in the open interval (0, 1), got {fraction!r}")
    if len(set(items)) < len(items):
        domain, name = next(item for item, count in Counter(items).items() if count > 1)
        raise ValueError(f"documents: expected different names within domain {domain!r}, got {name!r} twice")
    members: dict[str, list[tuple[float, int]]] = {}
    for index, (domain, name) in enumerate(items):
        u = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
        members.setdefault(domain, []).append((u, index))
    result = [False] * len(items)
    for ranked in map(sorted, members.values()):
        below = sum(u < fraction for u, _ in ranked)
        for _, index in ranked[: min(max(below, 1), len(ranked) - 1)]:
            result[index] = True
    return result


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Args:
        name: the argument's name, for the message.
        value: what was given.
        choices: what it may be.

    Raises:
        ValueError: unless it is one of them.
    """
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


def require_integer(name: str, value: object, minimum: int) -> int:
    """``value``, if it is an integer of at least ``minimum``.

    Args:
        name: the argument's name, for the message.
        value: what was given.
        minimum: the smallest value allowed.

    Returns:
        The value.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value!r}")
    return value


def data_file(root: str | None, relative: str) -> Path:
    """The path of a data set's file under the data root.

    Args:
        root: the folder that holds the data sets; None reads the environment variable MOEGEO_DATA.
        relative: the file's place under it.

    Returns:
        The path of an existing file.

    Raises:
        ValueError: if no root is given anywhere.
        FileNotFoundError: if the root or the file is missing.
    """
    folder = root if root is not None else os.environ.get("MOEGEO_DATA")
    if not folder:
        raise ValueError(
            f"root: expected the folder that holds {relative}, as the option data.root or in the "
            "environment variable MOEGEO_DATA; got neither"
        )
    path = Path(folder) / relative
    if not path.is_file():
        raise FileNotFoundError(f"root: no file {relative} under {folder} (option data.root or MOEGEO_DATA)")
    return path
