"""What the tests of the trainers run under."""

import signal

import pytest


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    """As in a terminal: a shell starts its background jobs with SIGINT ignored, and so these tests where it does."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)
