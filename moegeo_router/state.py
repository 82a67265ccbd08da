"""The form of the state that ``Geometry.state_dict()`` returns, checked before anything of it is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_PARTS: Mapping[str, tuple[type, ...]] = {
    "experts": (Mapping,),
    "sums": (Tensor, type(None)),
    "sensitivities": (Mapping,),
    "routers": (Mapping,),
}
#: States of earlier versions are without them.
_LATER: Mapping[str, tuple[type, ...]] = {
    "before": (Tensor, type(None)),
    "references": (Tensor, type(None)),
    "numbers": (Mapping,),
    "control": (Mapping, type(None)),
}


def check_state(state: Any, expected: int) -> None:
    """Raise a ValueError that says what a state lacks or holds that it should not.

    Args:
        state: as it was loaded.
        expected: its format.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"geometry's state must be what state_dict() returned, got {type(state).__name__}")
    if state.get("format") != expected:
        raise ValueError(f"geometry's state has format {state.get('format')!r}, expected {expected}")
    if missing := [part for part in _PARTS if part not in state]:
        raise ValueError(f"geometry's state lacks {', '.join(missing)}")
    for part, types in {**_PARTS, **_LATER}.items():
        if part in state and not isinstance(state[part], types):
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(f"geometry's state: {part} must be a {names}, got {type(state[part]).__name__}")
    _check_values("experts", state["experts"], int)
    _check_values("sensitivities", state["sensitivities"], Tensor)
    _check_values("numbers", state.get("numbers", {}), Tensor)
    _check_values("routers", state["routers"], Mapping)


def _check_values(part: str, values: Mapping[str, Any], kind: type) -> None:
    for name, value in values.items():
        if not isinstance(value, kind):
            raise ValueError(
                f"geometry's state: {part}[{name!r}] must be a {kind.__name__}, got {type(value).__name__}"
            )
