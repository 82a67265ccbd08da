import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moegeo_router.loggers import MultiLogger, NullLogger
from moegeo_router.loggers.base import bin_values


class Recorder:
    def __init__(self):
        self.rows, self.exit_codes = [], []

    def log(self, metrics, step):
        self.rows.append((step, dict(metrics)))

    def event(self, kind, fields, step):
        self.rows.append((step, kind, dict(fields)))

    def record(self, kind, fields, step):
        self.rows.append((step, "record", kind, dict(fields)))

    def alert(self, kind, title, text, level, fields, step):
        self.rows.append((step, kind, title, text, level, dict(fields)))

    def histogram(self, key, values, step):
        self.rows.append((step, key, list(values)))

    def heatmap(self, key, rows, labels, step):
        self.rows.append((step, key, rows, labels))

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

    def record(self, kind, fields, step):
        self.event(kind, fields, step)

    def alert(self, kind, title, text, level, fields, step):
        self.event(kind, fields, step)

    def histogram(self, key, values, step):
        self.event(key, {}, step)

    def heatmap(self, key, rows, labels, step):
        self.event(key, {}, step)


class FailingClose(Recorder):
    def close(self, exit_code=0):
        raise OSError("gone")


def test_every_logger_gets_every_row_in_order():
    first, second = Recorder(), Recorder()
    logger = MultiLogger([first, NullLogger(), second])
    logger.log({"train/loss": 1.5, "train/tokens": 7}, step=0)
    logger.event("checkpoint", {"path": "a"}, step=1)
    logger.histogram("load", [0.5, 0.5], step=2)
    logger.heatmap("loads", [[0.5, 0.5], [1.0]], ["layer0", "layer1"], step=3)
    logger.record("reading", {"layer": "0"}, step=4)
    logger.alert("rollback", "Went back", "To step 3.", "error", {"layer": "0"}, step=5)
    logger.close(exit_code=3)
    expected = [
        (0, {"train/loss": 1.5, "train/tokens": 7}),
        (1, "checkpoint", {"path": "a"}),
        (2, "load", [0.5, 0.5]),
        (3, "loads", [[0.5, 0.5], [1.0]], ["layer0", "layer1"]),
        (4, "record", "reading", {"layer": "0"}),
        (5, "rollback", "Went back", "To step 3.", "error", {"layer": "0"}),
    ]
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
    assert [warning.filename for warning in caught] == [__file__]  # one, and it points at the caller
    assert [step for step, _ in sound.rows] == [1, 2, 3]
    assert [step for step, _ in failing.rows] == [1]
    assert failing.exit_codes == [1]  # closed when dropped, and only then


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("event", ("checkpoint", {})),
        ("histogram", ("load", [0.5])),
        ("heatmap", ("loads", [[0.5]], ["layer0"])),
        ("alert", ("rollback", "Went back", "", "info", {})),
    ],
)
def test_a_failing_row_of_any_kind_drops_its_logger_with_a_one_line_reason(method, arguments):
    failing, sound = Failing(), Recorder()
    logger = MultiLogger([failing, sound])
    with pytest.warns(RuntimeWarning, match="Failing failed at step 4 .*first line") as caught:
        getattr(logger, method)(*arguments, step=4)
    assert "\n" not in str(caught[0].message)
    assert [warning.filename for warning in caught] == [__file__]
    assert sound.rows == [(4, *arguments)]
    assert logger.loggers == [sound]


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
        ({"histogram": 1.0}, 0, r"metrics: .*got 'histogram'"),
        ({"heatmap": 1.0}, 0, r"metrics: .*got 'heatmap'"),
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


@pytest.mark.parametrize(
    ("kind", "fields", "step", "message"),
    [
        ("", {}, 0, "kind: .*got ''"),
        ("reading", {"time": 1}, 0, "fields: .*got 'time'"),
        ("reading", {"where": object()}, 0, r"fields\['where'\].*JSON"),
        ("reading", {}, -1, r"step: .*got -1"),
    ],
)
def test_a_mistaken_record_is_an_error_and_drops_nobody(kind, fields, step, message):
    recorder = Recorder()
    logger = MultiLogger([recorder])
    with pytest.raises(ValueError, match=message):
        logger.record(kind, fields, step)
    assert (logger.loggers, recorder.rows) == ([recorder], [])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": None}, "kind: .*got None"),
        ({"title": ""}, "title: expected one line, got ''"),
        ({"title": "a\nb"}, "title: expected one line"),
        ({"title": 3}, "title: expected one line, got 3"),
        ({"text": None}, "text: expected a string, got NoneType"),
        ({"level": "warn"}, "level: expected one of info, warning, error, got 'warn'"),
        ({"fields": {"text": 1}}, "fields: expected keys other than .*got 'text'"),
        ({"fields": {"event": 1}}, "fields: expected string keys other than .*got 'event'"),
        ({"fields": {"where": np.zeros(2)}}, r"fields\['where'\].*JSON"),
        ({"step": 1.5}, r"step: .*got 1.5"),
    ],
)
def test_a_mistaken_alert_is_an_error_and_drops_nobody(changed, message):
    alert = {"kind": "stop", "title": "a", "text": "", "level": "error", "fields": {}, "step": 0}
    recorder = Recorder()
    logger = MultiLogger([recorder])
    logger.alert(**alert)
    with pytest.raises(ValueError, match=message):
        logger.alert(**alert | changed)
    assert (logger.loggers, len(recorder.rows)) == ([recorder], 1)


@pytest.mark.parametrize(
    ("key", "values", "step", "message"),
    [
        ("a", [], 0, r"values: .*got none"),
        ("a", [1.0, math.nan], 0, r"values: expected finite plain numbers, got nan"),
        ("a", [-math.inf], 0, r"values: .*got -inf"),
        ("a", np.array([np.inf]), 0, r"values: .*inf"),
        ("a", [10**400], 0, r"values: .*got 1000"),
        ("a", torch.ones(2), 0, r"values: .*got Tensor"),
        ("a", ["1"], 0, r"values: .*got str"),
        ("a", np.ones((2, 2)), 0, r"values: .*got ndarray"),
        ("time", [1.0], 0, r"key: .*got 'time'"),
        (None, [1.0], 0, r"key: .*got None"),
        ("a", [1.0], -1, r"step: .*got -1"),
    ],
)
def test_a_mistaken_histogram_is_one_error_and_drops_nobody(key, values, step, message):
    recorder = Recorder()
    logger = MultiLogger([recorder])
    with pytest.raises(ValueError, match=message) as refused:
        logger.histogram(key, values, step)
    assert len(str(refused.value)) < 200
    assert (logger.loggers, recorder.rows) == ([recorder], [])


@pytest.mark.parametrize(
    ("key", "rows", "labels", "step", "message"),
    [
        ("a", [], [], 0, r"rows: .*got none"),
        ("a", [[], []], ["x", "y"], 0, r"rows: .*got none"),
        ("a", [[1.0], [math.nan]], ["x", "y"], 0, r"rows\[1\]: .*got nan"),
        ("a", [[1.0], [0.0, -0.5]], ["x", "y"], 0, r"rows\[1\]: expected numbers >= 0, got -0.5"),
        ("a", torch.ones(1, 2), ["x"], 0, r"rows\[0\]: .*got Tensor"),
        ("a", [[1.0], [1.0]], ["x"], 0, r"labels: expected a text for each of the 2 rows"),
        ("a", [[1.0]], [0], 0, r"labels: .*got \[0\]"),
        ("event", [[1.0]], ["x"], 0, r"key: .*got 'event'"),
        ("a", [[1.0]], ["x"], 1.0, r"step: .*got 1.0"),
    ],
)
def test_a_mistaken_heatmap_is_one_error_and_drops_nobody(key, rows, labels, step, message):
    recorder = Recorder()
    logger = MultiLogger([recorder])
    with pytest.raises(ValueError, match=message):
        logger.heatmap(key, rows, labels, step)
    assert (logger.loggers, recorder.rows) == ([recorder], [])


def test_a_layer_without_experts_is_a_row():
    MultiLogger([NullLogger()]).heatmap("a", [[], np.ones(2)], ("x", "y"), 0)


def test_bins_go_from_the_least_to_the_greatest_number_and_include_both():
    counts, edges = bin_values([0.0, 1.0, 0.51, 0.05, 1.0])
    assert counts == [1, 1, *[0] * 8, 1, *[0] * 8, 2]
    np.testing.assert_allclose(edges, np.linspace(0, 1, 21), rtol=1e-15)


@pytest.mark.parametrize("value", [0.125, 0, -3, 1e300, sys.float_info.max, -sys.float_info.max, 5e-324])
def test_equal_numbers_have_bins_too(value):
    counts, edges = bin_values([value] * 3)
    assert sorted(counts) == [0] * 19 + [3]
    assert edges[0] <= value <= edges[20]
    assert edges == sorted(set(edges))
    if value == 0.125:
        assert counts[10] == 3
        np.testing.assert_allclose(edges, np.linspace(-0.375, 0.625, 21), rtol=1e-12)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.floats(0, 1), min_size=1, max_size=30))
def test_every_number_is_in_the_bin_between_whose_edges_it_lies(values):
    counts, edges = bin_values(values)
    assert (len(counts), len(edges)) == (20, 21)
    assert all(left < right for left, right in pairwise(edges))
    assert edges[0] <= min(values) <= max(values) <= edges[20]
    inside = [sum(left <= value < right for value in values) for left, right in pairwise(edges)]
    inside[-1] += sum(value == edges[20] for value in values)
    assert counts == inside


def test_numbers_of_other_libraries_and_non_finite_ones_are_welcome():
    MultiLogger([Recorder()]).log({"a": np.float32(1), "b": np.int64(2), "c": math.nan, "d": math.inf}, 0)


def test_importing_the_loggers_imports_no_back_end():
    code = "import sys, moegeo_router.loggers; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "moegeo_router.loggers.tensorboard" in loaded
    assert not {"wandb", "hydra", "rich", "tensorboard", "torch.utils.tensorboard", "PIL"} & set(loaded)
