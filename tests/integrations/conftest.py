"""Models of transformers' families, each built once for a file of tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.families import Stock, stocks


@pytest.fixture(scope="module")
def stock() -> Callable[[str], Stock]:
    """Build each family once."""
    return stocks()
