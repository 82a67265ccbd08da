"""What a person sees while it trains: lines in a file, a bar in a terminal."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainers import progress
from trainers.progress import Bar, Lines, Silent, for_terminal, layer_lines

SCALARS = {
    "train/loss": 1.23456,
    "train/tokens_per_second": 1000.0,
    "geometry/fsi": 0.0625,
    "geometry/fhs": 1.25,
    "geometry/dead_fraction": 0.375,
}
LAYERS = {f"geometry/layer{i}/{name}": i / 8 + x for name, x in (("fsi", 0.0), ("fhs", 1.0)) for i in range(4)}


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_has_the_loss_the_speed_fsi_and_the_dead(capsys):
    with Lines(20) as lines:
        lines.update(1, SCALARS)
    assert capsys.readouterr().out == "step 1/20  loss 1.235  1,000 tokens/s  dead 38%  FSI 0.062  FHS 1.250\n"


def test_layers_have_lines_of_their_own(capsys):
    assert layer_lines(SCALARS) == ["FSI 0.062  FHS 1.250"]
    assert layer_lines(SCALARS | LAYERS) == [
        "FSI by layer 0.000 0.125 0.250 0.375",
        "FHS by layer 1.000 1.125 1.250 1.375",
    ]
    assert layer_lines({"geometry/fsi": 0.5}) == ["FSI 0.500"]  # without Fisher traces there is no FHS
    assert layer_lines({}) == []
    many = {f"geometry/layer{i}/fhs": 1.0 for i in range(40)}
    assert layer_lines(many) == ["FHS by layer " + "1.000 " * 12 + "…"]
    Lines(20).update(1, SCALARS | LAYERS)
    assert capsys.readouterr().out.endswith(
        "dead 38%  FSI by layer 0.000 0.125 0.250 0.375  FHS by layer 1.000 1.125 1.250 1.375\n"
    )


def test_lines_come_every_so_many_seconds_and_at_the_end(clock, capsys):
    lines = Lines(20, seconds=10)
    for step in range(1, 21):
        lines.update(step, SCALARS)
        clock[0] += 3
    steps = re.findall(r"step (\d+)/20", capsys.readouterr().out)
    assert steps == ["1", "5", "9", "13", "17", "20"]


def test_a_mark_is_a_line_at_once(clock, capsys):
    with Lines(20, seconds=10) as lines:
        lines.update(1, SCALARS)
        lines.mark(2, "layer0: [bold]collapse[/bold]")
        lines.update(2, SCALARS)
    assert capsys.readouterr().out.splitlines()[1:] == ["step 2  layer0: [bold]collapse[/bold]"]


def test_the_speed_shown_is_smoothed_over_time_not_over_speeds(capsys):
    lines = Lines(2, seconds=0)
    lines.update(1, SCALARS)
    lines.update(2, SCALARS | {"train/tokens_per_second": 100.0})
    # Seconds a token: 0.001 + 0.1 (0.01 - 0.001) = 0.0019.
    assert "  526 tokens/s" in capsys.readouterr().out


def test_silence(capsys):
    with Silent() as silent:
        silent.update(1, SCALARS)
        silent.mark(1, "something")
    assert capsys.readouterr().out == ""


def test_output_that_is_no_terminal_gets_lines(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(for_terminal(3), Lines)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(for_terminal(3, 1), Bar)


def test_the_bar_is_left_when_the_run_is():
    def run() -> None:
        with bar:
            assert bar._bar.live.is_started
            raise RuntimeError("stop")

    bar = Bar(5)
    with pytest.raises(RuntimeError, match="stop"):
        run()
    assert not bar._bar.live.is_started


PROGRAM = """
from trainers.progress import Bar, for_terminal
bar = for_terminal(40, 10)
assert isinstance(bar, Bar)
with bar:
    bar.update(11, {scalars})
    bar.mark(11, "layer0: [bold]collapse[/bold] :warning:")
    bar.update(12, {scalars})
"""


def test_a_terminal_gets_a_bar_with_all_of_it_in_80_columns():
    main, side = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(scalars=SCALARS | LAYERS)],
        cwd=Path(progress.__file__).parents[1],
        env=environment | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
        stdout=side,
        stderr=subprocess.PIPE,
    )
    os.close(side)
    shown = b""
    try:
        while part := os.read(main, 4096):
            shown += part
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(main)
    assert process.communicate()[1] == b""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert text.count("step 11  layer0: [bold]collapse[/bold] :warning:") == 1
    bar, *layers = re.split(r"[\r\n]+", text.strip())[-3:]
    for part in ("training", "12/40", "loss 1.235", "1,000 tokens/s", "dead 38%"):
        assert part in bar, (part, bar)
    assert [line.rstrip() for line in layers] == layer_lines(LAYERS)
