"""Text as a stream of tokens: windows, labels, baseline and fingerprint for every language source.

Shapes: B rows of a batch, L positions of a row, N tokens of a split, D documents of a split, W windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from trainers.data.base import Baseline, Batch, fingerprint, generator, require_integer
from trainers.data.bigram import bigram_loss
from trainers.data.documents import Document
from trainers.data.tokenizers import Tokenizer, build_tokenizer


class TextOptions(TypedDict, total=False):
    """The options of every text source, as ``TextData`` takes them."""

    batch_size: int
    length: int
    seed: int
    valid_tokens: int | None
    tokenizer: str
    vocab_size: int | None


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """A split: its documents' tokens end to end, each document closed by the end-of-document token.

    Args:
        tokens: (N,) uint8 or int32 ids.
        starts: (D,) int64 where each document begins; ascending, the first is 0.
        domains: (D,) int64 domain of each document.
    """

    tokens: Tensor
    starts: Tensor
    domains: Tensor

    @classmethod
    def of(cls, documents: Sequence[Tensor], domains: Sequence[int], end_of_document: int) -> TokenStream:
        """Join tokenised documents.

        Args:
            documents: a (n,) tensor of ids each, all of one dtype.
            domains: the domain of each.
            end_of_document: the id put after each.

        Returns:
            The stream.
        """
        if not documents:
            empty = torch.empty(0, dtype=torch.long)
            return cls(tokens=empty, starts=empty, domains=empty)
        end = torch.tensor([end_of_document], dtype=documents[0].dtype)
        lengths = torch.tensor([0, *(len(document) + 1 for document in documents)])
        return cls(
            tokens=torch.cat([part for document in documents for part in (document, end)]),
            starts=lengths.cumsum(0)[:-1],
            domains=torch.tensor(domains, dtype=torch.long),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def windows(self, first_B: Tensor, length: int) -> Batch:
        """Cut windows of L inputs and the targets that follow each.

        Args:
            first_B: (B,) int64 position of each window's first input.
            length: L.

        Returns:
            A batch; positions without a next token are masked, so a window that begins at N - 1 is all
            padding.
        """
        position_BL = first_B[:, None] + torch.arange(length)
        mask_BL = position_BL < len(self) - 1
        position_BL = position_BL.clamp(max=len(self) - 2)
        document_BL = torch.searchsorted(self.starts, position_BL, right=True) - 1
        return Batch(
            inputs=self.tokens[position_BL].long() * mask_BL,
            targets=self.tokens[position_BL + 1].long() * mask_BL,
            mask=mask_BL,
            domains=self.domains[document_BL] * mask_BL,
            documents=document_BL * mask_BL,
        )


def spread_windows(stream: TokenStream, length: int, limit: int | None) -> Tensor:
    """Where the held-out windows begin: all of the split end to end, or a share of them from every domain.

    Under a limit each domain (a block of the stream) gets windows in proportion to its tokens and at least
    one, evenly spaced over the block: a domain is never lost for being small.

    Args:
        stream: the split, its documents ordered by domain.
        length: L.
        limit: tokens in all, None for no limit; exceeded by at most one window a domain.

    Returns:
        (W,) int64 positions, ascending, windows of one domain never overlapping.
    """
    if limit is None or limit >= len(stream) - 1:
        return torch.arange(0, len(stream) - 1, length)
    first_of_domain = torch.cat([torch.ones(1, dtype=torch.bool), stream.domains[1:] != stream.domains[:-1]])
    edges = [*stream.starts[first_of_domain].tolist(), len(stream)]
    first = []
    for begin, end in itertools.pairwise(edges):
        count = max(1, limit // length * (end - begin) // len(stream))
        first.append(begin + torch.arange(count) * ((end - begin) // count))
    return torch.cat(first).clamp(max=len(stream) - 1 - length)


class TokenData:
    """Language data over token streams; what all text and planted sources share.

    Train batches are windows at uniformly random places of the train stream. They may span documents:
    attention is not blocked there, ``documents`` and ``domains`` say which token is whose.

    Args:
        name: the data set's name.
        train: the train split; None for data that can only be evaluated on.
        valid: the held-out split, its documents ordered by domain.
        domains: domain names.
        vocab_size: V.
        batch_size: B.
        length: L.
        seed: of the random windows.
        valid_tokens: limit on the tokens of one validation, spread over all domains; None for the whole
            split.

    Raises:
        ValueError: if an option is out of range or a split is too short for one window.
    """

    task = "language"
    bytes_per_token = 1.0
    tokenizer_json: str | None = None
    note = ""

    def __init__(
        self,
        name: str,
        train: TokenStream | None,
        valid: TokenStream,
        *,
        domains: tuple[str, ...],
        vocab_size: int,
        batch_size: int,
        length: int,
        seed: int,
        valid_tokens: int | None,
    ) -> None:
        self.name, self.domains, self.vocab_size = name, domains, vocab_size
        self.batch_size = require_integer("batch_size", batch_size, 1)
        self.length = require_integer("length", length, 1)
        self.seed = require_integer("seed", seed, 0)
        self.valid_tokens = valid_tokens
        if valid_tokens is not None and require_integer("valid_tokens", valid_tokens, 1) < length:
            raise ValueError(f"valid_tokens: expected at least one window of length {length}, got {valid_tokens}")
        for split, stream in (("train", train), ("valid", valid)):
            if stream is not None and len(stream) <= length:
                raise ValueError(
                    f"length: expected less than the {len(stream)} tokens of {name}'s {split} split, got {length}; "
                    "take a smaller length or more text"
                )
        self._train, self._valid = train, valid
        self.fingerprint = fingerprint(self._content())

    def _content(self) -> Iterator[Tensor | str]:
        yield from (*self.domains, str(self.vocab_size), self.tokenizer_json or "")
        for stream in (self._train, self._valid):
            if stream is not None:
                yield from (stream.tokens, stream.starts, stream.domains)

    def _require_train(self) -> TokenStream:
        if self._train is None:
            raise ValueError(
                f"{self.name} has no train split: train with data=enwiki, then "
                f"`python -m trainers.evaluate run=RUN data={self.name}`"
            )
        return self._train

    def train_batch(self, step: int) -> Batch:
        """The training batch of a step: B windows at random places, a pure function of (seed, step).

        Args:
            step: the step, from 0.

        Returns:
            A batch without padding, (B, L).

        Raises:
            ValueError: if the step is negative or there is no train split.
        """
        require_integer("step", step, 0)
        train = self._require_train()
        source = generator(self.seed, "windows", step)
        first_B = torch.randint(len(train) - self.length, (self.batch_size,), generator=source)
        return train.windows(first_B, self.length)

    def valid_batches(self) -> Iterator[Batch]:
        """The held-out batches, in order, the same every time.

        Yields:
            Batches of (B, L); missing rows of the last, and missing positions at the split's end, are masked.
        """
        first_W = spread_windows(self._valid, self.length, self.valid_tokens)
        for first in first_W.split(self.batch_size):
            padding = torch.full((self.batch_size - len(first),), len(self._valid) - 1)
            yield self._valid.windows(torch.cat([first, padding]), self.length)

    def token_counts(self) -> Tensor:
        """How often each token occurs in the train split.

        Returns:
            (V,) int64; ones where there is no train split.
        """
        if self._train is None:
            return torch.ones(self.vocab_size, dtype=torch.long)
        return torch.bincount(self._train.tokens, minlength=self.vocab_size)

    def baseline(self) -> Baseline:
        """The add-α bigram model fitted on train, on exactly the targets of ``valid_batches`` (see ``bigram_loss``).

        Returns:
            Its name with α, and its loss in nats a token.

        Raises:
            ValueError: if there is no train split.
        """
        train = self._require_train()
        batches = [(batch.inputs[batch.mask], batch.targets[batch.mask]) for batch in self.valid_batches()]
        inputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
        loss, alpha = bigram_loss(train.tokens, inputs, targets, self.vocab_size)
        return Baseline(f"bigram, add-{alpha:g}", loss)

    def describe(self) -> str:
        """One line: the sizes of the splits, the domains with their shares, the vocabulary.

        Returns:
            The line.
        """
        shown = self._valid if self._train is None else self._train
        lengths = torch.diff(shown.starts, append=torch.tensor([len(shown)]))
        shares = torch.bincount(shown.domains, lengths.double(), len(self.domains)) / len(shown)
        listed = sorted(zip(self.domains, shares.tolist(), strict=True), key=lambda item: -item[1])
        names = ", ".join(f"{domain} {share:.0%}" for domain, share in listed[:8])
        sizes = [f"{len(self._train):,} tokens train"] if self._train is not None else ["no train split"]
        return (
            f"{self.name}: {', '.join(sizes)}, {len(self._valid):,} valid; {len(self.domains)} domains "
            f"({names}{', …' if len(listed) > 8 else ''}); vocabulary {self.vocab_size}"
            + (self.note and f"; {self.note}")
        )


class TextData(TokenData):
    """Language data from documents.

    Args:
        name: the data set's name.
        train: the train documents; None for data that can only be evaluated on.
        valid: the held-out documents.
        batch_size: B.
        length: L, tokens.
        seed: of the random windows.
        valid_tokens: limit on the tokens of one validation, spread over all domains; None for the whole
            split.
        tokenizer: "bytes", "bpe" (byte-level, fitted on the train split), or the path of a saved
            tokenizer.json.
        vocab_size: tokens in all; "bpe" needs it, elsewhere it must agree if given.
        note: what else ``describe`` should say.

    Raises:
        ValueError: if an option is out of range, a document holds byte 0, or a split is too short for one
            window.
        FileNotFoundError: if the saved tokenizer is missing.
    """

    def __init__(
        self,
        name: str,
        train: Iterable[Document] | None,
        valid: Iterable[Document],
        *,
        batch_size: int = 32,
        length: int = 256,
        seed: int = 0,
        valid_tokens: int | None = 65536,
        tokenizer: str = "bytes",
        vocab_size: int | None = None,
        note: str = "",
    ) -> None:
        train_documents = None if train is None else list(train)
        valid_documents = sorted(valid, key=lambda document: document.domain)
        domains = tuple(sorted({d.domain for d in (*(train_documents or ()), *valid_documents)}))
        texts = None if train_documents is None else (document.data for document in train_documents)
        encoder = build_tokenizer(tokenizer, vocab_size, texts)
        self.tokenizer_json, self.note = encoder.json, note
        streams = [
            None if documents is None else encode(documents, domains, encoder)
            for documents in (train_documents, valid_documents)
        ]
        valid_stream = streams[1]
        assert valid_stream is not None
        super().__init__(
            name,
            streams[0],
            valid_stream,
            domains=domains,
            vocab_size=encoder.vocab_size,
            batch_size=batch_size,
            length=length,
            seed=seed,
            valid_tokens=valid_tokens,
        )
        self.bytes_per_token = sum(len(document.data) + 1 for document in valid_documents) / len(valid_stream)


def encode(documents: Sequence[Document], domains: tuple[str, ...], tokenizer: Tokenizer) -> TokenStream:
    """Tokenise documents one by one and join them.

    Args:
        documents: the split.
        domains: domain names; a document's domain id is its place here.
        tokenizer: text to ids.

    Returns:
        The stream.

    Raises:
        ValueError: if a document holds byte 0, which ends documents.
    """
    for document in documents:
        if b"\0" in document.data:
            raise ValueError(f"documents: expected text, got byte 0 in {document.name!r} of domain {document.domain!r}")
    index = {domain: i for i, domain in enumerate(domains)}
    tokens = [tokenizer.encode(document.data) for document in documents]
    return TokenStream.of(tokens, [index[document.domain] for document in documents], tokenizer.end_of_document)
