"""Checks of options that several rooms have: one error that names the option, what was expected and what was got."""

from __future__ import annotations

import math


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise a ValueError if a value is none of the choices."""
    if value not in choices:
        *first, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r}")


def check_whole(name: str, value: object, least: int) -> None:
    """Raise a ValueError if a value is no whole number, or below the least."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_not_negative(name: str, value: float) -> None:
    """Raise a ValueError if a number is negative or not finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0, got {value}")
