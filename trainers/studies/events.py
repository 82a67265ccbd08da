"""What the controller said and did in a run, from the events of its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainers.studies.rows import Row

#: Levels of alerts from which on they count as warnings and as critical.
WARNING, CRITICAL = ("warning", "error"), ("error",)


def alerts(row: Row) -> list[Mapping[str, Any]]:
    """Return the alerts; rows from before there were any have none."""
    return [event for event in row.get("events", []) if event["event"] == "alert"]


def orders(row: Row) -> list[Mapping[str, Any]]:
    """Return the interventions that were ordered, those included that were then found impossible."""
    events = [event for event in row.get("events", []) if event["event"] == "action" and event.get("kind") == "apply"]
    return [event for event in events if event.get("taken", True)]


def decisions(row: Row, kind: str) -> list[Mapping[str, Any]]:
    """Return the decisions of a kind that were carried out."""
    events = [event for event in row.get("events", []) if event["event"] != "alert" and event.get("kind") == kind]
    refused = [_identity(event) for event in events if "reason" in event]  # ordered, then found impossible
    return [event for event in events if event.get("taken", True) and _identity(event) not in refused]


def first_alert(row: Row, levels: Sequence[str]) -> int | None:
    """Return the steps from the beginning of a row's fault to its first alert of these levels; None without one."""
    onset = row["labels"]["onset"]
    found = [event["step"] for event in alerts(row) if event["level"] in levels and event["step"] > onset]
    return min(found) - onset if found else None


def failures(row: Row) -> set[str]:
    """Return the failure modes that warnings after the beginning of a row's fault named."""
    onset = row["labels"]["onset"]
    found = [event for event in alerts(row) if event["level"] in WARNING and event["step"] > onset]
    return {str(event.get("failure")) for event in found}


def _identity(event: Mapping[str, Any]) -> tuple[Any, ...]:
    return event["step"], event.get("layer"), event.get("name")
