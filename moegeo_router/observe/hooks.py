"""What every hook of ours has in common: it never stops the model, and it stays with the model it was put on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: What is done with an error of a hook.
Failed = Callable[[Exception], None]


class Hook:
    """A module hook: errors go to ``failed``, and a copy of the module (an average of weights, say) is not watched.

    The compiler does not look inside: a compiled model is cut there and gives the same numbers.

    Args:
        call: what the hook does; returns the module's new output, or None.
        failed: what is done with its errors.
        exclusive: whether another watch of the same module is to be refused.
    """

    def __init__(self, call: Callable[..., Any], failed: Failed, exclusive: bool = True) -> None:
        self._call, self._failed, self.exclusive = call, failed, exclusive

    @torch.compiler.disable
    def __call__(self, *args: Any) -> Any:
        """Run."""
        try:
            return self._call(*args)
        except Exception as error:
            self._failed(error)
            return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        """Return a hook that does nothing."""
        return nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        """Pickle as a hook that does nothing."""
        return _make_nothing, ()


class Pausable:
    """What sees something, except inside of ``pause()``."""

    _paused = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """See nothing inside."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _is_active(self) -> bool:
        return not self._paused


def nothing(*_: Any) -> None:
    """Do nothing."""


def _make_nothing() -> Callable[..., None]:
    return nothing


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing computing again what was counted."""
    # The autograd engine's task id is the only sign that both kinds of checkpointing give.
    return torch._C._current_graph_task_id() != -1
