"""Text to token ids and back to a file: bytes, or a byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Tokenizer(Protocol):
    """Turns a document into tokens.

    ``end_of_document`` is an id no text can produce; ``json`` rebuilds the tokenizer, None where there is nothing
    to keep.
    """

    name: str
    vocab_size: int
    end_of_document: int
    json: str | None

    def encode(self, text: bytes) -> Tensor:
        """The tokens of one document's utf-8 bytes, (N,), without the end-of-document token."""
        ...


class ByteTokenizer(Tokenizer):
    """A token is a byte; byte 0, which occurs in no text, ends a document: 256 tokens."""

    name = "bytes"
    vocab_size = 256
    end_of_document = 0
    json = None

    def encode(self, text: bytes) -> Tensor:
        """The bytes of a document.

        Args:
            text: utf-8 bytes.

        Returns:
            (N,) uint8.
        """
        return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


class BPETokenizer(Tokenizer):
    """A byte-level BPE of the ``tokenizers`` library plus one id, the last, that ends a document.

    That id is not a token of the BPE, so that no text, whatever it contains, can produce it.

    Args:
        json: the serialized ``tokenizers.Tokenizer``.

    Raises:
        ValueError: if the JSON is not a tokenizer.
    """

    def __init__(self, json: str) -> None:
        from tokenizers import Tokenizer as HFTokenizer

        try:
            self._bpe = HFTokenizer.from_str(json)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"tokenizer: expected the JSON of a tokenizer, got {json[:40]!r}… ({error})") from error
        self.json = json
        self.end_of_document = self._bpe.get_vocab_size()
        self.vocab_size = self.end_of_document + 1
        self.name = f"bpe {self.vocab_size}"

    def encode(self, text: bytes) -> Tensor:
        """The BPE tokens of a document.

        Args:
            text: utf-8 bytes.

        Returns:
            (N,) int32.
        """
        (encoding,) = self._bpe.encode_batch_fast([text.decode()], add_special_tokens=False)
        return torch.tensor(encoding.ids, dtype=torch.int32)


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> BPETokenizer:
    """Fit a byte-level BPE.

    Args:
        texts: the training documents, utf-8.
        vocab_size: tokens in all: 256 bytes, the merges, and the end of a document.

    Returns:
        The tokenizer; the same texts give the same one.

    Raises:
        ValueError: if the vocabulary is smaller than 257, or larger than the texts have merges for.
    """
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"vocab_size: expected at least 257 (the bytes and the end of a document), got {vocab_size}")
    bpe: Any = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((text.decode() for text in texts), trainer)
    tokenizer = BPETokenizer(bpe.to_str())
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"vocab_size: the train split has merges for {tokenizer.vocab_size} tokens, got {vocab_size}; take fewer"
        )
    return tokenizer


def build_tokenizer(tokenizer: str, vocab_size: int | None, train: Iterable[bytes] | None) -> Tokenizer:
    """The tokenizer that the options of a text data set name.

    Args:
        tokenizer: "bytes", "bpe" (fitted on the train split), or the path of a saved tokenizer (ending in
            .json).
        vocab_size: tokens in all; "bpe" needs it, elsewhere it must agree if given.
        train: the train documents, utf-8; None where a data set has none.

    Returns:
        The tokenizer.

    Raises:
        ValueError: on an unknown name, a vocabulary size missing or out of place, or "bpe" without a train
            split.
        FileNotFoundError: if the saved tokenizer is missing.
    """
    if tokenizer == "bpe":
        if vocab_size is None:
            raise ValueError("vocab_size: tokenizer 'bpe' needs one (e.g. data.vocab_size=4096), got None")
        if train is None:
            raise ValueError(
                "tokenizer: 'bpe' is fitted on a train split and there is none; give the path of a saved one"
            )
        return train_bpe(train, vocab_size)
    if tokenizer == "bytes":
        built: Tokenizer = ByteTokenizer()
    elif str(tokenizer).endswith(".json"):
        if not Path(tokenizer).is_file():
            raise FileNotFoundError(f"tokenizer: no file {tokenizer}")
        built = BPETokenizer(Path(tokenizer).read_text(encoding="utf-8"))
    else:
        raise ValueError(f"tokenizer: expected 'bytes', 'bpe' or the path of a saved .json, got {tokenizer!r}")
    if vocab_size not in (None, built.vocab_size):
        raise ValueError(f"vocab_size: expected None, or {built.vocab_size} as {tokenizer} has, got {vocab_size!r}")
    return built
