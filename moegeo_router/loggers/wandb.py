"""A log as a Weights & Biases run, offline or online, with the keys of the JSON-lines log."""

from __future__ import annotations

import json
import os
import secrets
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from .base import Level, bin_values, check_alert, check_event, check_heatmap, check_histogram, check_metrics
from .picture import heatmap_caption, heatmap_picture

if TYPE_CHECKING:
    from wandb import Run, Table

Mode = Literal["auto", "offline", "online", "disabled"]

QUIET = {
    "silent": True,  # its lines would tear the progress bar; `how_to_open` says what a person needs
    "console": "off",
    "x_disable_stats": True,
    "disable_git": True,
    "save_code": False,
}
"""Settings with which wandb records what it is given and nothing else."""

FINISH_TIMEOUT_S = 60.0
"""How long ``close`` waits for an upload; what is not uploaded by then stays on disk for ``wandb sync``."""

TABLE = "geometry/events"
"""The key of the table of alerts."""

COLUMNS = ("step", "kind", "level", "title", "text", "fields")
"""Its columns; the fields are JSON text."""

PARTS = 99
"""The most parts of a table: of more, wandb's page shows the newest, and each row names all parts before it."""

TITLE_CHARACTERS = 63
"""The longest title that wandb sends to a person."""


class WandbLogger:
    """Write rows to a Weights & Biases run of its own; ``WandbLogger.of(run)`` writes to one that is open.

    The x axis of every chart is the key "step", not wandb's row counter: wandb's own counter can only grow, so after
    a resume it would refuse the rows since the checkpoint. An event is a row `{"event/<kind>": 1,
    "event/<kind>/<field>": value}`; numbers and texts stay, anything nested becomes JSON text.
    An alert is such a row without its text, a row of the table "geometry/events", which has all of it, and a
    notification, for which wandb takes alerts of one title within a minute for one. The table goes on after a resume,
    an offline one included as long as the folders of the earlier runs are there.

    Args:
        project: wandb project.
        name: display name of the run; None lets wandb choose.
        directory: folder in which wandb makes its own ``wandb/``; made if missing.
        config: what the run was started with; nested mappings are fine.
        mode: "auto" is online when the user is logged in (WANDB_API_KEY, identity token, netrc or wandb's settings;
            decided without the network), else offline. The environment variable WANDB_MODE, if set, wins.
            Online without a reachable, accepting server falls back to offline with one RuntimeWarning
            (under a new run id if it was reached and refused).
        run_id: id of the run to continue; None starts a new one.
        tags: wandb tags.
        init_timeout: seconds to wait for the server before the run goes offline.

    Attributes:
        run_id: id of the run; keep it in the checkpoint to continue the same run after a resume.

    Raises:
        ImportError: wandb is not installed.
        ValueError: unknown mode, or a directory that cannot be written.
        wandb.errors.UsageError: mode "online" and nobody is logged in.
    """

    def __init__(
        self,
        *,
        project: str,
        name: str | None = None,
        directory: str | Path,
        config: Mapping[str, Any],
        mode: Mode = "auto",
        run_id: str | None = None,
        tags: Sequence[str] = (),
        init_timeout: float = 20.0,
    ) -> None:
        wandb = _import_wandb()
        mode = _requested_mode(mode)
        init = {
            "project": project,
            "name": name,
            "dir": str(_writable(Path(directory))),
            "config": dict(config),
            "id": run_id or secrets.token_hex(4),
            "resume": "allow",
            "tags": list(tags),
            "reinit": "create_new",
            "settings": wandb.Settings(**QUIET, init_timeout=init_timeout, finish_timeout=FINISH_TIMEOUT_S),
        }
        self._write_to(_start(wandb, mode, init), Path(directory), "step", own=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @classmethod
    def of(cls, run: Run, *, step_metric: str | None = None) -> WandbLogger:
        """Write to a run that is open; ``close`` leaves it open.

        Args:
            run: from ``wandb.init``.
            step_metric: the key of the run's x axis, if its charts have one ("train/global_step" in the Trainer of
                transformers): every row is then written with it. None: what is written joins the row that the caller
                writes next, or the one of the caller's newest ``step=``; where a later step comes before any row of the
                caller, the former becomes a row of its own. So nothing is lost, and steps stay right which the caller
                counts like those here; a caller whose ``step=`` counts fewer (epochs) needs an axis.

        Raises:
            TypeError: no run of wandb.
        """
        wandb = _import_wandb()
        if not isinstance(run, wandb.Run):
            raise TypeError(f"run: expected what wandb.init() returns, got {type(run).__name__}")
        logger = cls.__new__(cls)
        logger._write_to(run, Path(run.dir).parents[2], step_metric, own=False)
        return logger

    def _write_to(self, run: Run, directory: Path, step_metric: str | None, *, own: bool) -> None:
        self._run, self._directory, self._step_metric, self._own = run, directory, step_metric, own
        self.run_id: str = run.id
        self._table: Table | None = None
        self._parts = 0
        # Step and wandb's row counter of what was written last; a run that several processes share has no counter.
        self._open: tuple[int, int] | None = None
        self._counted = run.settings.mode != "shared"

    def _write(self, row: Mapping[str, object], step: int) -> None:
        if self._step_metric is not None:
            self._run.log({self._step_metric: step, **row})
            return
        if self._counted:
            self._end_row_before(step)
        self._run.log(dict(row), commit=False)

    def _end_row_before(self, step: int) -> None:
        """End the row of an earlier step if the caller has not: what has the same key would take its place."""
        if self._open is not None and step <= self._open[0]:
            return
        count = self._run.step
        if self._open is not None and count == self._open[1]:
            self._run.log({}, commit=True)
            count += 1
        self._open = step, count

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one row of numbers (see ``Logger.log``)."""
        check_metrics(metrics, step)
        self._write(metrics, step)

    def event(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Write one event (see ``Logger.event``)."""
        check_event(kind, fields, step)
        self._write(_event_row(kind, fields), step)

    def record(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Check the row and keep nothing of it (see ``Logger.record``)."""
        check_event(kind, fields, step)

    def alert(self, kind: str, title: str, text: str, level: Level, fields: Mapping[str, object], step: int) -> None:
        """Write one alert, and have wandb notify whoever asked it to (see ``Logger.alert``)."""
        check_alert(kind, title, text, level, fields, step)
        levels = _import_wandb().AlertLevel
        names = {"info": levels.INFO, "warning": levels.WARN, "error": levels.ERROR}
        self._run.alert(_shortened(title), text, level=names[level])
        # Begun again by itself, the table of a run that wandb resumed would have the rows of the former run twice.
        if self._table is None or (self._parts == PARTS and not self._run.resumed):
            self._table, self._parts = self._begin_table(), 0
        self._table.add_data(step, kind, level, title, text, json.dumps(dict(fields)))
        row = _event_row(kind, {**fields, "level": level, "title": title})
        self._write({**row, TABLE: self._table}, step)
        self._parts += 1

    def histogram(self, key: str, values: Sequence[float], step: int) -> None:
        """Write one distribution (see ``Logger.histogram``)."""
        check_histogram(key, values, step)
        self._write({key: _import_wandb().Histogram(np_histogram=bin_values(values))}, step)

    def heatmap(self, key: str, rows: Sequence[Sequence[float]], labels: Sequence[str], step: int) -> None:
        """Write one matrix as a picture, with labels and scale in its caption (see ``Logger.heatmap``)."""
        check_heatmap(key, rows, labels, step)
        picture = _import_wandb().Image(heatmap_picture(rows), caption=heatmap_caption(rows, labels))
        self._write({key: picture}, step)

    def close(self, exit_code: int = 0) -> None:
        """End a run of its own, failed if the exit code is not 0; wandb may write its last rows a moment later."""
        if self._own:
            self._run.finish(exit_code=exit_code)

    @property
    def how_to_open(self) -> str:
        """One line that tells a person how to see the logs."""
        if self._run.disabled:
            return "wandb is disabled: nothing was written"
        if not self._run.offline:
            return f"wandb: {self._run.url}"
        folder = Path(self._run.dir).parent
        return f"wandb (offline): `wandb leet {folder}` shows it here, `wandb sync {folder}` uploads it"

    def _begin_table(self) -> Table:
        """Return a table of the alerts so far, earlier runs included where wandb does not go on from them."""
        # Incremental: each log writes a part, the new rows.
        table = _import_wandb().Table(columns=list(COLUMNS), log_mode="INCREMENTAL")
        if not self._run.resumed:  # False offline, where wandb asks no server what the run was
            for row in _earlier_rows(self._directory, self.run_id):
                table.add_data(*row)
        return table


def _import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError:
        raise ImportError("WandbLogger needs wandb: pip install moegeo-router[train]") from None
    return wandb


def _requested_mode(mode: Mode) -> Mode:
    source, wanted = "mode", mode
    if environment := os.environ.get("WANDB_MODE"):
        source, wanted = "WANDB_MODE", environment  # type: ignore[assignment]
    if wanted not in get_args(Mode):
        raise ValueError(f"{source}: expected one of {', '.join(get_args(Mode))}, got {wanted!r}")
    return wanted


def _writable(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):  # wandb itself would move to the system's temporary folder
        raise ValueError(f"directory: expected a writable folder, got {directory}")
    return directory


def _start(wandb: ModuleType, mode: Mode, init: Mapping[str, Any]) -> Run:
    if mode in ("offline", "disabled"):
        return wandb.init(mode=mode, **init)
    try:
        if mode == "auto" and not _is_logged_in(wandb):
            return wandb.init(mode="offline", **init)
        _ask_server(wandb.setup().settings.base_url, timeout=init["settings"].init_timeout)
    except (OSError, wandb.errors.AuthenticationError) as error:
        return _start_offline(wandb, init, error)
    try:
        return wandb.init(mode="online", **init)
    except wandb.errors.CommError as error:
        # wandb's service holds the id of the failed attempt until the process ends: another one is needed.
        return _start_offline(wandb, {**init, "id": secrets.token_hex(4)}, error)


def _start_offline(wandb: ModuleType, init: Mapping[str, Any], error: Exception) -> Run:
    reason = str(error).splitlines()[0]
    message = f"wandb: no run on the server ({reason}); logging offline instead, `wandb sync` uploads it later"
    warnings.warn(message, RuntimeWarning, stacklevel=4)
    return wandb.init(mode="offline", **init)


def _ask_server(url: str, timeout: float) -> None:
    """Raise OSError if no server answers; asked first, because a failed ``wandb.init`` leaves its id in use."""
    try:
        urllib.request.urlopen(url, timeout=timeout).close()
    except urllib.error.HTTPError as answer:
        answer.close()


def _is_logged_in(wandb: ModuleType) -> bool:
    # wandb.login() would be the public question, but it asks the server and rewrites the user's settings file.
    from wandb.sdk.lib import wbauth

    host = wandb.setup().settings.base_url
    return wbauth.authenticate_session(host=host, source="WandbLogger", prompt=False, update_session=False) is not None


def _earlier_rows(directory: Path, run_id: str) -> list[tuple[Any, ...]]:
    """Return the rows of the tables that the runs of this id left in their folders, each once, oldest first."""
    folders = sorted(directory.glob(f"wandb/*run-*-{run_id}"), key=lambda folder: folder.name.removeprefix("offline-"))
    rows: dict[tuple[Any, ...], None] = {}  # a run's first part repeats the rows of the runs before it
    for folder in folders:
        parts = (folder / "files/media/table").glob(f"{TABLE}_*.table.json")
        for part in sorted(parts, key=lambda path: int(path.name.split("_")[1])):
            with suppress(ValueError):  # a file that a kill cut short
                rows |= dict.fromkeys(tuple(row) for row in json.loads(part.read_bytes())["data"])
    return list(rows)


def _event_row(kind: str, fields: Mapping[str, object]) -> dict[str, object]:
    return {f"event/{kind}": 1} | {f"event/{kind}/{key}": _scalar(value) for key, value in fields.items()}


def _shortened(title: str) -> str:
    return title if len(title) <= TITLE_CHARACTERS else title[: TITLE_CHARACTERS - 1] + "…"


def _scalar(value: object) -> object:
    return value if isinstance(value, int | float | str) else json.dumps(value)
