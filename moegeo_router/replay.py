"""Replay a run's decisions from its log: ``python -m moegeo_router.replay LOG [--config OTHER]``.

The log is the JSON-lines file of a run that was watched by a controller. Its readings are fed to a new controller: with
the run's own configuration it must come to the same alerts and decisions, with another one it tells what that would
have seen (and, as far as its actions would have changed the run, only that: what came after them is the old run's).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .control.config import ControlConfig
from .control.controller import Controller, Event
from .control.reading import Reading
from .loggers.jsonl import read_jsonl

KINDS = ("alert", "action", "outcome")


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay a log; the exit status is 1 where the decisions differ from the log's, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m moegeo_router.replay", description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="metrics.jsonl of a run, or its folder")
    parser.add_argument("--config", type=Path, metavar="OTHER", help="JSON: fields of ControlConfig, and mode")
    options = parser.parse_args(arguments)
    try:
        rows = read_jsonl(options.log / "metrics.jsonl" if options.log.is_dir() else options.log)
        other = None if options.config is None else json.loads(options.config.read_text())
        events = list(replay(rows, other))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for event in events:
        print(f"step {event.step}  {event.line}")
    if other is not None:
        print(f"{len(events)} events under another configuration")
        return 0
    differing = differences(rows, events)
    print("\n".join(differing) or f"{len(events)} events, the same as in the log")
    return 1 if differing else 0


def replay(rows: Sequence[Mapping[str, Any]], other: Mapping[str, Any] | None = None) -> Iterator[Event]:
    """Yield the events that a log's readings lead to.

    Args:
        rows: of the log.
        other: fields of ``ControlConfig`` (and ``mode``) to take instead of the run's.

    Raises:
        ValueError: the log has no controller's readings, or a configuration that does not fit.
    """
    controller: Controller | None = None
    refused = {_key(row): row["reason"] for row in rows if row.get("event") == "outcome" and "reason" in row}
    for row in rows:
        if row.get("event") == "controller" and controller is None:
            changes = dict(other or {})
            mode = changes.pop("mode", row["mode"])
            config = ControlConfig.of_fields(dict(row["config"]) | changes)
            controller = Controller(config, mode, row["available"])
        elif row.get("event") == "reading":
            if controller is None:
                raise ValueError("the log has readings, but no row that says how the controller was configured")
            turn = controller.update(Reading.of_fields(row))
            yield from turn.events
            for decision, _ in turn.orders:
                key = (decision.step, decision.layer, decision.name)
                if decision.kind == "apply" and key in refused:
                    yield controller.refuse(decision, refused[key])
    if controller is None:
        raise ValueError("the log has no readings of a controller (GeometryConfig(controller=...), log_control)")


def differences(rows: Sequence[Mapping[str, Any]], events: Sequence[Event]) -> list[str]:
    """Return in what the events of a replay differ from those in the log, however either puts them in words."""
    logged = [row for row in rows if row.get("event") in KINDS]
    for number, (row, event) in enumerate(zip(logged, events, strict=False), start=1):
        if not _agree(row, event):
            log, own = f"step {row['optimizer_step']}  {row['text']}", f"step {event.step}  {event.line}"
            return [f"event {number} differs:", f"  log:    {log}", f"  replay: {own}"]
    if len(logged) != len(events):
        return [f"the log has {len(logged)} events, the replay {len(events)}"]
    return []


def _agree(row: Mapping[str, Any], event: Event) -> bool:
    """Return whether a row says of an event what is known of it; a log may know more (what was done), or less."""
    return row["event"] == event.kind and all(row.get(name, value) == value for name, value in event.fields.items())


def _key(row: Mapping[str, Any]) -> tuple[int, str, str]:
    return int(row["optimizer_step"]), str(row["layer"]), str(row["name"])


if __name__ == "__main__":
    sys.exit(main())
