"""Checkpoints that a kill at any moment cannot damage, and that load without unpickling code.

directory/
  step-00001200/             complete: it got this name, in one rename, after its last byte was on disk
    model.safetensors        the model's state dict
    training.pt              optimizer, RNG, metrics, ... (torch.save; read with weights_only)
    meta.json                {"step": 1200, "meta": {...}}
    manifest.json            {"format": 1, "sha256": {file: digest}}, written last
  step-00001200.replaced/    the former save of this step, while the new one takes its name
  .partial-*/                what killed saves left; the next save removes it
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
MODEL, TRAINING, META, MANIFEST = "model.safetensors", "training.pt", "meta.json", "manifest.json"
REPLACED = ".replaced"
PARTIAL = ".partial-"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or refused; the message names the file and the reason."""


@dataclass(frozen=True, kw_only=True, eq=False)  # eq: comparing dicts of tensors has no truth value
class Checkpoint:
    """Everything a run needs to go on.

    Args:
        step: optimizer steps done, >= 0.
        model: the model's state dict.
        training: the rest of the state (optimizer state dicts, RNG states, data position, metrics): tensors, numbers,
            strings, bytes and None in lists, tuples and dicts.
        meta: what a person or another program wants to read (config, data fingerprint, versions): plain JSON.
    """

    step: int
    model: dict[str, Tensor]
    training: dict[str, Any]
    meta: dict[str, Any]


def save(directory: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Save a checkpoint atomically, then remove older ones.

    Saving the same step again replaces it; ``latest`` finds the former or the new one at every moment. Tensors that
    share memory are each written out, so that the model file holds every key for any safetensors reader.

    Args:
        directory: the folder of all checkpoints of a run; made if missing. One process saves into it at a time.
        checkpoint: what to save.
        keep: how many checkpoints stay, this one included, counting back from this step. Later steps (of a run that
            was taken back to an earlier checkpoint) are left alone.

    Returns:
        The checkpoint's folder, ``directory/step-00001200``.

    Raises:
        ValueError: the checkpoint holds something that could not be loaded again, or ``keep`` < 1.
        OSError: it could not be written (disk full, not allowed); the earlier checkpoints are intact.
    """
    _check(checkpoint, keep)
    final = directory / f"step-{checkpoint.step:08d}"
    partial = directory / (PARTIAL + final.name)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _clean(directory)
        _write(partial, checkpoint)
        _publish(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            message = f"checkpoint {final} was not saved, earlier ones are intact: {_one_line(error)}"
            raise OSError(message) from error
        raise
    for _, path in [found for found in _folders(directory) if found[0] <= checkpoint.step][keep:]:
        _discard(path)
    return final


def load(path: Path) -> Checkpoint:
    """Load a checkpoint whose every file has the digest its manifest names.

    Args:
        path: a folder that ``save`` returned.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: a file is missing, altered, or holds more than plain data.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"path: expected a checkpoint folder, got {path}, which does not exist")
    _verify(path)
    with _reading(path, MODEL) as file:
        model = load_file(file)
    with _reading(path, TRAINING) as file:
        training = torch.load(file, map_location="cpu", weights_only=True)
    with _reading(path, META) as file:
        description = json.loads(file.read_bytes())
        step, meta = description["step"], description["meta"]
    return Checkpoint(step=step, model=model, training=training, meta=meta)


def latest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """Load the newest checkpoint that is intact.

    Args:
        directory: the folder of all checkpoints of a run; it need not exist.

    Returns:
        The checkpoint (None if there is no intact one), and why each newer one was passed over.
    """
    damaged: list[str] = []
    for _, path in _folders(directory):
        try:
            return load(path), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state dict so that it goes on bit for bit.

    Optimizers that count their steps in a Python int (geoopt's RiemannianAdam) get a float32 tensor from torch's own
    ``load_state_dict``, and other last bits in the bias correction 1 - beta^step; here the numbers stay as saved.

    Args:
        optimizer: over the same parameters in the same groups as the one that was saved.
        state: its ``state_dict()``.

    Raises:
        ValueError: the groups do not fit (from torch).
    """
    optimizer.load_state_dict(state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = [name for group in state["param_groups"] for name in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        for key, value in state["state"].get(name, {}).items():
            if not isinstance(value, Tensor):
                optimizer.state[parameter][key] = value


def _check(checkpoint: Checkpoint, keep: int) -> None:
    step = checkpoint.step
    if type(step) is not int or step < 0:
        raise ValueError(f"checkpoint.step: expected an int >= 0, got {step!r}")
    if keep < 1:
        raise ValueError(f"keep: expected at least 1, got {keep}")
    for name, tensor in checkpoint.model.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"checkpoint.model[{name!r}]: expected a tensor, got {type(tensor).__name__}")
    _check_plain(checkpoint.training, "checkpoint.training")
    try:
        same = json.loads(json.dumps(checkpoint.meta, allow_nan=False)) == checkpoint.meta
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint.meta: expected plain JSON, got {error}") from None
    if not same:
        raise ValueError("checkpoint.meta: expected plain JSON, got tuples or keys that are not strings")


def _check_plain(value: object, where: str) -> None:
    # Exact types: numpy's float64 is a float, but weights_only refuses it, and would do so when it is too late.
    kind = type(value)
    if kind in (Tensor, torch.nn.Parameter, bool, int, float, str, bytes, type(None)):
        return
    if isinstance(value, list | tuple) and kind in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif isinstance(value, dict) and kind in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    else:
        raise ValueError(f"{where}: expected tensors, numbers, strings, lists, tuples or dicts, got {kind.__name__}")


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    folder.mkdir()
    save_file(_without_sharing(checkpoint.model), folder / MODEL)
    buffer = io.BytesIO()  # torch hides a full disk behind an internal error when it writes the file itself
    torch.save(checkpoint.training, buffer)
    (folder / TRAINING).write_bytes(buffer.getbuffer())
    (folder / META).write_text(json.dumps({"step": checkpoint.step, "meta": checkpoint.meta}, indent=1))
    digests = {name: _sha256(folder / name) for name in (MODEL, TRAINING, META)}
    for name in digests:
        _sync(folder / name)
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": digests}, indent=1))
    _sync(folder / MANIFEST)
    _sync(folder)


def _publish(partial: Path, final: Path) -> None:
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        os.rename(final, replaced)  # a folder cannot be renamed over another; `latest` reads this name too
    os.rename(partial, final)
    _sync(final.parent)
    if replaced.exists():
        _discard(replaced)


def _clean(directory: Path) -> None:
    for path in directory.glob(PARTIAL + "*"):
        shutil.rmtree(path)
    for path in directory.glob("step-*" + REPLACED):
        final = path.with_name(path.name.removesuffix(REPLACED))
        if final.exists():
            _discard(path)
        else:
            os.rename(path, final)


def _discard(folder: Path) -> None:
    # Renamed first: killed halfway through the files, it must not pass for a damaged checkpoint.
    leftover = folder.with_name(PARTIAL + folder.name)
    with suppress(OSError):  # the new checkpoint is complete; what could not go now goes at the next save
        os.rename(folder, leftover)
        shutil.rmtree(leftover)


def _folders(directory: Path) -> list[tuple[int, Path]]:
    """List (step, folder), newest first; a step's complete folder comes before its replaced one."""
    if not directory.exists():
        return []
    found = []
    for path in directory.iterdir():
        if match := re.fullmatch(rf"step-(\d{{8,}})({re.escape(REPLACED)})?", path.name):
            found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _without_sharing(model: dict[str, Tensor]) -> dict[str, Tensor]:
    independent, storages = {}, set()
    for name, tensor in model.items():
        tensor = tensor.detach().contiguous()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        independent[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return independent


def _verify(path: Path) -> None:
    with _reading(path, MANIFEST) as file:
        manifest = json.loads(file.read_bytes())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"format {manifest['format']!r} is not supported, expected {FORMAT}")
        digests = {name: manifest["sha256"][name] for name in (MODEL, TRAINING, META)}
    for name, digest in digests.items():
        with _reading(path, name) as file:
            if _sha256(file) != digest:
                raise CheckpointError("its SHA-256 is not the one in the manifest")


@contextmanager
def _reading(path: Path, name: str) -> Iterator[Path]:
    """Turn whatever goes wrong while a file is read into a CheckpointError that names the file."""
    try:
        yield path / name
    except FileNotFoundError:
        reason = "is missing"
    except pickle.UnpicklingError:
        reason = "is refused: it is no torch file or holds more than plain data, which could run code"
    except Exception as error:  # the readers raise nearly anything on damaged bytes
        reason = f"is damaged: {_one_line(error)}"
    else:
        return
    raise CheckpointError(f"checkpoint {path}: {name} {reason}")


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
