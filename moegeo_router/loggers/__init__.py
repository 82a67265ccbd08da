"""Where metrics go: one small protocol and its back ends (JSON lines, Weights & Biases, several at once, none)."""

from moegeo_router.loggers.base import Logger, MultiLogger, NullLogger
from moegeo_router.loggers.jsonl import JSONLLogger, read_jsonl
from moegeo_router.loggers.wandb import WandbLogger

__all__ = ["JSONLLogger", "Logger", "MultiLogger", "NullLogger", "WandbLogger", "read_jsonl"]
