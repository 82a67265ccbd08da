"""Where metrics go: one small protocol and its back ends (JSON lines, Weights & Biases, several at once, none)."""

from .base import Logger, MultiLogger, NullLogger
from .jsonl import JSONLLogger, read_jsonl
from .wandb import WandbLogger

__all__ = ["JSONLLogger", "Logger", "MultiLogger", "NullLogger", "WandbLogger", "read_jsonl"]
