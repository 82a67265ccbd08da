import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from moegeo_router.loggers import MultiLogger, NullLogger


class Recorder:
    def __init__(self):
        self.rows, self.exit_codes = [], []

    def log(self, metrics, step):
        self.rows.append((step, dict(metrics)))

    def event(self, kind, fields, step):
        self.rows.append((step, kind, dict(fields)))

    def close(self, exit_code=0):
        self.exit_codes.append(exit_code)


class Failing(Recorder):
    """Works until step 2, then its disk is full."""

    def log(self, metrics, step):
        if step >= 2:
            raise OSError(28, "No space left on device")
        super().log(metrics, step)

    def event(self, kind, fields, step):
        raise RuntimeError("first line\nsecond line")


class FailingClose(Recorder):
    def close(self, exit_code=0):
        raise OSError("gone")


def test_every_logger_gets_every_row_in_order():
    first, second = Recorder(), Recorder()
    logger = MultiLogger([first, NullLogger(), second])
    logger.log({"train/loss": 1.5, "train/tokens": 7}, step=0)
    logger.event("checkpoint", {"path": "a"}, step=1)
    logger.close(exit_code=3)
    expected = [(0, {"train/loss": 1.5, "train/tokens": 7}), (1, "checkpoint", {"path": "a"})]
    assert first.rows == second.rows == expected
    assert first.exit_codes == second.exit_codes == [3]


def test_a_failing_logger_is_dropped_with_one_warning_and_the_others_go_on():
    failing, sound = Failing(), Recorder()
    logger = MultiLogger([failing, sound])
    logger.log({"a": 1.0}, step=1)
    with pytest.warns(RuntimeWarning, match=r"Failing failed at step 2 and is dropped.*No space left") as caught:
        logger.log({"a": 2.0}, step=2)
    logger.log({"a": 3.0}, step=3)  # a second warning would be an error here
    logger.close()
    assert len(caught) == 1
    assert [step for step, _ in sound.rows] == [1, 2, 3]
    assert [step for step, _ in failing.rows] == [1]
    assert failing.exit_codes == [1]  # closed when dropped, and only then


def test_a_failing_event_is_dropped_with_a_one_line_reason():
    sound = Recorder()
    with pytest.warns(RuntimeWarning, match="first line") as caught:
        MultiLogger([Failing(), sound]).event("checkpoint", {}, step=4)
    assert "\n" not in str(caught[0].message)
    assert sound.rows == [(4, "checkpoint", {})]


def test_closing_goes_past_a_logger_that_cannot_close():
    sound = Recorder()
    with pytest.warns(RuntimeWarning, match="FailingClose failed at close"):
        MultiLogger([FailingClose(), sound]).close(2)
    assert sound.exit_codes == [2]


@pytest.mark.parametrize(
    ("metrics", "step", "message"),
    [
        ({"a": torch.tensor(1.0)}, 0, r"metrics\['a'\].*got Tensor"),
        ({"a": "1"}, 0, r"metrics\['a'\].*got str"),
        ({"a": None}, 0, r"metrics\['a'\].*got NoneType"),
        ({"step": 1.0}, 0, r"metrics: .*got 'step'"),
        ({3: 1.0}, 0, r"metrics: .*got 3"),
        ({"a": 1.0}, -1, r"step: .*got -1"),
        ({"a": 1.0}, 1.5, r"step: .*got 1.5"),
        ({"a": 1.0}, True, r"step: .*got True"),
    ],
)
def test_a_callers_mistake_is_an_error_and_drops_nobody(metrics, step, message):
    recorder = Recorder()
    logger = MultiLogger([recorder])
    with pytest.raises(ValueError, match=message):
        logger.log(metrics, step)
    assert logger.loggers == [recorder]
    assert recorder.rows == []


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("", {}, "kind: .*got ''"),
        ("stop", {"event": 1}, "fields: .*got 'event'"),
        ("stop", {"where": object()}, r"fields\['where'\].*JSON"),
        ("stop", {"where": np.zeros(2)}, r"fields\['where'\].*JSON"),
    ],
)
def test_a_mistaken_event_is_an_error(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        MultiLogger([Recorder()]).event(kind, fields, 0)


def test_numbers_of_other_libraries_and_non_finite_ones_are_welcome():
    MultiLogger([Recorder()]).log({"a": np.float32(1), "b": np.int64(2), "c": math.nan, "d": math.inf}, 0)


def test_importing_the_loggers_imports_no_back_end():
    code = "import sys, moegeo_router.loggers; sys.exit(bool({'wandb', 'hydra', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
