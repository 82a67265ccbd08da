"""Worker processes that train runs side by side, one thread each; one that dies takes only its run with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from trainers.loop import Interrupted
from trainers.progress import Silent
from trainers.studies.runs import DataCache, Outcome, StudyError, disk_is_full, failure, train_run

READY = "ready"

#: How often a run is begun whose worker dies.
ATTEMPTS = 2


class _WhileParentLives(Silent):
    """Ends the worker at the next step when the study's process is gone: nobody would take its result."""

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """End the process if its parent has ended."""
        if os.getppid() != self._parent:
            sys.exit(1)


def work(connection: Connection, parent: int, folder: str) -> None:
    """Train the configurations that arrive until the other side closes: the main function of a worker.

    Args:
        connection: gives configurations and takes outcomes, or a text that says why the study cannot go on.
        parent: process id of the other side.
        folder: for the runs' folders, each deleted after its run.
    """
    torch.set_num_threads(1)
    data, progress = DataCache(), _WhileParentLives(parent)
    with suppress(EOFError, ConnectionError, Interrupted):
        connection.send(READY)
        while True:
            config = connection.recv()
            answer: Outcome | str
            try:
                with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as directory:
                    answer = train_run(config, Path(directory), data, progress)
            except Exception as error:
                if not disk_is_full(error):
                    raise
                answer = f"the folder of temporary files ({folder}) is full"
            connection.send(answer)


class _Worker:
    """The study's side of one worker process."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, os.getpid(), str(folder)), daemon=True)
        with ctrl_c_ignored():  # children inherit it: Ctrl-C is for the study, which then ends them
            self._process.start()
        theirs.close()  # so that the death of the worker is the end of the pipe
        self.ready = False
        self.task: int | None = None

    def give(self, config: Mapping[str, Any]) -> None:
        with suppress(ConnectionError):  # it has died: its end of the pipe is going to say so
            self.connection.send(config)

    def receive(self) -> Outcome | str | None:
        """Return what it says; None if it has died."""
        try:
            message: Outcome | str = self.connection.recv()
        except (EOFError, ConnectionError):
            self.stop(patience=5.0)  # the pipe may close a moment before the process has its exit status
            return None
        self.ready = True
        return message

    def why_it_died(self) -> str:
        code = self._process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        return f"the worker process {how}{', out of memory?' if code == -signal.SIGKILL else ''}"

    def stop(self, patience: float = 0.0) -> None:
        self._process.join(patience)
        self._process.kill()
        self._process.join()
        self.connection.close()


@contextmanager
def ctrl_c_ignored() -> Iterator[None]:
    """Have the processes that are started inside ignore Ctrl-C: it is for the one that started them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python sets signals in the main thread only
        return
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


class Workers:
    """Trains configurations in worker processes, which end with its context.

    Args:
        configs: whole resolved configurations.
        processes: how many at a time.
        folder: an existing folder for the runs' temporary files.
        more: whether another run may begin; those that have begun are finished.
    """

    def __init__(
        self,
        configs: Sequence[Mapping[str, Any]],
        processes: int,
        folder: Path,
        more: Callable[[], bool] = lambda: True,
    ) -> None:
        self._configs, self._folder, self._more = configs, folder, more
        self._waiting, self._deaths = deque(range(len(configs))), Counter[int]()
        self._workers: list[_Worker] = []
        self._processes = min(processes, len(configs))

    def __enter__(self) -> Workers:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes, whatever they are doing."""
        for worker in self._workers:
            worker.stop()

    def outcomes(self) -> Iterator[tuple[int, Outcome]]:
        """Train.

        Yields:
            The index of a configuration and its outcome, as they finish. A run whose worker dies is begun once more,
            and is ``failed`` if that one dies, too.

        Raises:
            StudyError: a worker could not start, or the disk is full.
        """
        for _ in range(self._processes):
            self._workers.append(_Worker(self._folder))
        while self._waiting or any(worker.task is not None for worker in self._workers):
            for connection in wait([worker.connection for worker in self._workers]):
                yield from self._hear(next(w for w in self._workers if w.connection is connection))

    def _hear(self, worker: _Worker) -> Iterator[tuple[int, Outcome]]:
        message = worker.receive()
        task, worker.task = worker.task, None
        if message is None:
            yield from self._bury(worker, task)
            return
        self._drop_if_no_more()
        if not isinstance(message, str) and message["status"] == "failed":
            self._replace(worker)  # what it left behind goes with it: after an error CUDA serves a process no more
        elif self._waiting:
            worker.task = self._waiting.popleft()
            worker.give(self._configs[worker.task])
        if task is None:
            return  # it has just started
        if isinstance(message, str):
            raise StudyError(message)
        yield task, message

    def _replace(self, worker: _Worker) -> None:
        worker.stop()
        self._workers.remove(worker)
        if self._waiting:
            self._workers.append(_Worker(self._folder))

    def _bury(self, worker: _Worker, task: int | None) -> Iterator[tuple[int, Outcome]]:
        if not worker.ready:
            raise StudyError("a worker process could not start; what it said is above")
        if task is not None:
            self._deaths[task] += 1
            if self._deaths[task] < ATTEMPTS:
                self._waiting.appendleft(task)
            else:
                yield task, failure(f"{worker.why_it_died()}, {ATTEMPTS} times")
        self._drop_if_no_more()
        self._replace(worker)

    def _drop_if_no_more(self) -> None:
        if not self._more():
            self._waiting.clear()
