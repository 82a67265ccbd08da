import errno
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trainers.checkpoint import Checkpoint, CheckpointError, latest, load, load_optimizer, save

FILES = ["model.safetensors", "training.pt", "meta.json", "manifest.json"]
ROOT = Path(__file__).parents[2]


def make(step, version=0, **kwargs):
    state = {"model": {"weight": torch.full((4, 3), float(version))}, "training": {"version": version}, "meta": {}}
    return Checkpoint(step=step, **state | kwargs)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def same_bytes(a, b):
    """Equal to the bit, NaN payloads and the sign of zero included."""
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.reshape(-1).view(torch.uint8).equal(
        b.reshape(-1).view(torch.uint8)
    )


def test_model_tensors_come_back_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 5, generator=generator)
    model = OrderedDict(
        weight=base,
        tied=base,
        view=base[1:3],
        flat=base.view(-1),
        transposed=base.T,
        expanded=base[:1].expand(4, 5),
        requires_grad=nn.Parameter(base.clone()),
        bf16=base.bfloat16(),
        f16=base.half(),
        f64=base.double() / 3,
        i64=torch.arange(5),
        mask=base > 0,
        scalar=torch.tensor(1e-40),
        empty=torch.empty(0, 3),
        also_empty=torch.empty(0),
        special=torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]),
    )
    path = save(tmp_path / "new" / "folder", make(1200, model=model))
    assert path == tmp_path / "new" / "folder" / "step-00001200"
    assert names(path) == sorted(FILES)
    loaded = load(path)
    assert loaded.step == 1200
    assert loaded.model.keys() == load_file(path / FILES[0]).keys() == model.keys()  # every key, for any reader
    for name, tensor in model.items():
        assert same_bytes(loaded.model[name], tensor), name


def test_the_memory_of_saved_tensors_is_not_touched(tmp_path):
    base = torch.randn(4, 4)
    model = {"a": base, "b": base.T}
    save(tmp_path, make(1, model=model))
    assert model["a"] is base
    assert model["b"].data_ptr() == base.data_ptr()


def test_training_state_and_meta_keep_their_types(tmp_path):
    training = {
        "betas": (0.9, 0.95),
        "counts": [1, 2**70, -3],
        "nothing": None,
        "flag": True,
        "name": "ü",
        "raw": b"\x00\xff",
        "nan": float("inf"),
        3: OrderedDict(x=torch.arange(3)),
        "rng": torch.get_rng_state(),
    }
    meta = {"config": {"lr": 1e-3, "layers": [1, 2]}, "corpus": "sha256:ü", "none": None}
    loaded = load(save(tmp_path, make(0, training=training, meta=meta)))
    assert loaded.meta == meta
    assert loaded.training.keys() == training.keys()
    assert isinstance(loaded.training["betas"], tuple)
    assert same_bytes(loaded.training.pop("rng"), training.pop("rng"))
    assert same_bytes(loaded.training.pop(3)["x"], training.pop(3)["x"])
    assert loaded.training == training


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), amsgrad=True)


def riemannian_adam(model):
    import geoopt

    model[2].weight = geoopt.ManifoldParameter(model[2].weight.detach(), manifold=geoopt.Sphere())
    with torch.no_grad():
        model[2].weight.proj_()
    return geoopt.optim.RiemannianAdam(model.parameters(), lr=0.01, amsgrad=True)


def train(model, optimizer, generator, steps):
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator)
        loss = (model(x) - x.sum(-1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("make_optimizer", [adamw, riemannian_adam])
def test_a_reloaded_run_goes_on_bit_for_bit(tmp_path, make_optimizer):
    def start(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        return model, make_optimizer(model), torch.Generator().manual_seed(seed)

    model, optimizer, generator = start(seed=0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})  # one that never gets a gradient
    train(model, optimizer, generator, steps=3)
    training = {"optimizer": optimizer.state_dict(), "rng": generator.get_state()}
    save(tmp_path, make(3, model=model.state_dict(), training=training))
    unbroken = train(model, optimizer, generator, steps=4)

    resumed, resumed_optimizer, resumed_generator = start(seed=1)
    resumed_optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    checkpoint, damaged = latest(tmp_path)
    assert damaged == []
    resumed.load_state_dict(checkpoint.model)
    load_optimizer(resumed_optimizer, checkpoint.training["optimizer"])
    resumed_generator.set_state(checkpoint.training["rng"])
    assert same_bytes(train(resumed, resumed_optimizer, resumed_generator, steps=4), unbroken)
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert same_bytes(ours, theirs)


def test_latest_is_the_highest_step_and_keep_counts_back_from_the_saved_one(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, make(step), keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000010"]
    save(tmp_path, make(123456789), keep=3)
    assert latest(tmp_path)[0].step == 123456789
    save(tmp_path, make(5), keep=1)  # a run taken back to step 2: later steps are not its business
    assert names(tmp_path) == ["step-00000005", "step-00000010", "step-123456789"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, make(4, version=1))
    save(tmp_path, make(5, version=1))
    save(tmp_path, make(5, version=2))
    assert names(tmp_path) == ["step-00000004", "step-00000005"]
    assert latest(tmp_path)[0].training == {"version": 2}


def test_between_the_two_renames_of_a_replacement_the_new_one_counts(tmp_path):
    save(tmp_path, make(5, version=1)).rename(tmp_path / "step-00000005.replaced")
    assert latest(tmp_path)[0].training == {"version": 1}
    save(tmp_path / "other", make(5, version=2)).rename(tmp_path / "step-00000005")
    assert latest(tmp_path)[0].training == {"version": 2}


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    for name in ("step-1", "step-00000009.bak", "best", "xstep-00000009"):
        (tmp_path / name).mkdir()
    assert latest(tmp_path) == (None, [])
    save(tmp_path, make(3), keep=1)
    assert len(names(tmp_path)) == 5
    assert latest(tmp_path)[0].step == 3


def test_a_renamed_checkpoint_loads(tmp_path):
    path = save(tmp_path, make(3))
    assert load(path.rename(tmp_path / "best")).step == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def delete(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, empty, flip, delete])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_used(tmp_path, name, damage):
    save(tmp_path, make(1, version=1))
    path = save(tmp_path, make(2, version=2))
    damage(path / name)
    with pytest.raises(CheckpointError, match=r"step-00000002: [\w.]+ is \w+") as error:
        load(path)
    if damage is delete or name != "manifest.json":  # an altered digest in the manifest speaks against another file
        assert f": {name} is {'missing' if damage is delete else 'damaged'}" in str(error.value)
    checkpoint, damaged = latest(tmp_path)
    assert checkpoint.training == {"version": 1}
    assert damaged == [str(error.value)]
    assert "\n" not in damaged[0]


@pytest.mark.parametrize("name", ["manifest.json", "meta.json"])
def test_no_flipped_byte_changes_what_is_loaded(tmp_path, name):
    path = save(tmp_path, make(7, meta={"lr": 1}))
    content = (path / name).read_bytes()
    refused = 0
    for position in range(len(content)):
        for bit in (1, 32):
            altered = bytearray(content)
            altered[position] ^= bit
            (path / name).write_bytes(altered)
            try:
                loaded = load(path)
            except CheckpointError:
                refused += 1
            else:
                assert (loaded.step, loaded.meta, loaded.training) == (7, {"lr": 1}, {"version": 0})
    assert refused > len(content)


def test_all_damaged_is_none_with_every_reason_newest_first(tmp_path):
    for step in (1, 2):
        delete(save(tmp_path, make(step)) / "meta.json")
    checkpoint, damaged = latest(tmp_path)
    assert checkpoint is None
    assert ["step-00000002" in damaged[0], "step-00000001" in damaged[1], len(damaged)] == [True, True, 2]


def test_missing_folders(tmp_path):
    assert latest(tmp_path / "none") == (None, [])
    assert latest(tmp_path) == (None, [])
    with pytest.raises(FileNotFoundError, match="path: expected a checkpoint folder"):
        load(tmp_path / "none")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_malicious_pickle_with_a_fitting_manifest_is_refused_and_does_not_run(tmp_path, writer):
    marker = tmp_path / "ran"
    path = save(tmp_path / "run", make(1))
    if writer == "torch":
        torch.save({"optimizer": Malicious(str(marker))}, path / "training.pt")
    else:
        (path / "training.pt").write_bytes(pickle.dumps(Malicious(str(marker)), protocol=2))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["training.pt"] = hashlib.sha256((path / "training.pt").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"training\.pt is refused.*could run code"):
        load(path)
    assert latest(tmp_path / "run")[0] is None
    assert not marker.exists()


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path, make(1))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(CheckpointError, match="format 2 is not supported, expected 1"):
        load(path)


@pytest.mark.parametrize(
    "target", ["trainers.checkpoint.save_file", "pathlib.Path.write_bytes", "pathlib.Path.write_text", "os.rename"]
)
def test_a_full_disk_is_one_clear_line_and_the_old_checkpoint_stays(tmp_path, monkeypatch, target):
    save(tmp_path, make(1, version=1))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(OSError, match=r"step-00000002 was not saved, earlier ones are intact.*No space") as error:
            save(tmp_path, make(2, version=2), keep=1)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["step-00000001"]
    assert latest(tmp_path)[0].training == {"version": 1}
    save(tmp_path, make(2, version=2), keep=1)
    assert names(tmp_path) == ["step-00000002"]


def test_a_full_disk_while_a_step_is_replaced_keeps_the_former_one(tmp_path, monkeypatch):
    save(tmp_path, make(1, version=1))
    rename, calls = os.rename, []

    def full_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", full_at_the_second)
        with pytest.raises(OSError, match="earlier ones are intact"):
            save(tmp_path, make(1, version=2))
    assert latest(tmp_path)[0].training == {"version": 1}
    save(tmp_path, make(2, version=3))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert load(tmp_path / "step-00000001").training == {"version": 1}


def test_ctrl_c_during_a_save_leaves_no_trace(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainers.checkpoint.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, make(1))
    assert names(tmp_path) == []


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="was not saved"):
        save(tmp_path / "file", make(1))


@pytest.mark.parametrize(
    ("changes", "keep", "message"),
    [
        ({"step": -1}, 1, "checkpoint.step: .*got -1"),
        ({"step": 1.0}, 1, "checkpoint.step: .*got 1.0"),
        ({}, 0, "keep: .*got 0"),
        ({"model": {"a": 1.0}}, 1, r"checkpoint.model\['a'\]: .*got float"),
        ({"training": {"rng": [np.zeros(2)]}}, 1, r"checkpoint.training\['rng'\]\[0\]: .*got ndarray"),
        ({"training": {"loss": np.float64(1)}}, 1, r"checkpoint.training\['loss'\]: .*got float64"),
        ({"training": {"path": Path()}}, 1, r"checkpoint.training\['path'\]: .*got \w*Path"),
        ({"training": {(1, Path()): 1}}, 1, r"a key of checkpoint.training\[1\]: .*got \w*Path"),
        ({"meta": {"lr": float("nan")}}, 1, "checkpoint.meta: expected plain JSON"),
        ({"meta": {"betas": (1, 2)}}, 1, "checkpoint.meta: expected plain JSON, got tuples"),
        ({"meta": {1: 2}}, 1, "checkpoint.meta: expected plain JSON, got tuples or keys"),
    ],
)
def test_what_could_not_be_loaded_again_is_refused_before_anything_is_written(tmp_path, changes, keep, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path, make(**{"step": 1} | changes), keep=keep)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("step", "keep"), [(2, 1), (3, 2)], ids=["replace", "add"])
def test_a_kill_before_any_operation_leaves_an_intact_checkpoint(tmp_path, step, keep):
    command = [sys.executable, "-m", "tests.support.killed_saves", str(tmp_path / "run"), str(step), str(keep)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120)
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) > 15
    outcomes = []
    for row in rounds:
        assert row["damaged"] == []
        assert row["contents"] in ([2.0] * 3, [3.0] * 3)  # the former or the new one, never a mixture
        assert row["step"] == (2 if row["contents"] == [2.0] * 3 else step)
        assert row["after"] == ["step-00000009"]  # whatever the kill left is gone
        outcomes.append(row["contents"][0])
    assert outcomes == sorted(outcomes)
    assert {2.0, 3.0} == set(outcomes)
    assert [row["killed"] for row in rounds] == [True] * (len(rounds) - 1) + [False]


def test_a_kill_at_a_random_moment_of_a_loop_of_saves(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.support.killed_saves import checkpoint, save\n"
        "for step in range(10**6): save(Path(sys.argv[1]), checkpoint(step // 2, str(step))); print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    saved = [int(process.stdout.readline()) for _ in range(5)]
    time.sleep(int.from_bytes(os.urandom(1)) / 2000)
    process.send_signal(signal.SIGKILL)
    saved += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    process.stdout.close()
    process.wait()
    checkpoint, damaged = latest(tmp_path)
    assert damaged == []
    assert int(checkpoint.meta["version"]) in (saved[-1], saved[-1] + 1)  # the one in progress may be complete
    assert checkpoint.step == int(checkpoint.meta["version"]) // 2
