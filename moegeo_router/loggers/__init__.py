"""Where metrics go: one small protocol and its back ends (JSON lines, wandb, TensorBoard, several at once, none)."""

from .base import Logger, MultiLogger, NullLogger
from .jsonl import JSONLLogger, read_jsonl
from .tensorboard import TensorBoardLogger
from .wandb import WandbLogger

__all__ = ["JSONLLogger", "Logger", "MultiLogger", "NullLogger", "TensorBoardLogger", "WandbLogger", "read_jsonl"]
