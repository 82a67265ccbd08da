"""Kill a process with SIGKILL before each of its filesystem operations in ``checkpoint.save``, one after the other.

``python -m tests.support.killed_saves FOLDER STEP KEEP`` starts each round from intact checkpoints of steps 1 and 2,
lets a forked child save STEP until its n-th operation, and prints one JSON line a round: what ``latest`` finds
afterwards, the damaged checkpoints, and the folders left by the next save. It ends with the first round in which the
child was not killed.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from trainers.checkpoint import Checkpoint, CheckpointError, latest, load, save

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def checkpoint(step, version):
    model = {"weight": torch.full((50,), float(version))}
    return Checkpoint(step=step, model=model, training={"version": version}, meta={"version": version})


def save_until(operation, folder, step, keep):
    seen = 0

    def kill(event, _):
        nonlocal seen
        if event in OPERATIONS:
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    save(folder, checkpoint(step, version="3"), keep)
    os._exit(0)


def is_intact(path):
    try:
        return load(path) is not None
    except CheckpointError:
        return False


def play_round(operation, folder, step, keep):
    shutil.rmtree(folder, ignore_errors=True)
    save(folder, checkpoint(1, version="1"))
    save(folder, checkpoint(2, version="2"))
    child = os.fork()
    if child == 0:
        save_until(operation, folder, step, keep)
    _, status = os.waitpid(child, 0)
    found, _ = latest(folder)
    damaged = [path.name for path in folder.glob("step-*") if not is_intact(path)]
    contents = [found.model["weight"].unique().item(), float(found.training["version"]), float(found.meta["version"])]
    save(folder, checkpoint(9, version="9"), keep=1)
    after = sorted(path.name for path in folder.iterdir())
    row = {
        "killed": os.WIFSIGNALED(status),
        "step": found.step,
        "contents": contents,
        "damaged": damaged,
        "after": after,
    }
    print(json.dumps(row))
    return row["killed"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # SIGKILL, unlike a power cut, loses nothing that was written; the rounds are many
    operation = 1
    while play_round(operation, Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):
        operation += 1
