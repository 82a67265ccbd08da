"""Real processes: a full run, Ctrl-C and kill -9 in the middle, mistakes that hydra finds; and that it learns."""

import math
import signal

import pytest

from moegeo_router.loggers import read_jsonl
from tests.support.processes import start, wait_for_rows
from tests.support.runs import tiny, tiny_overrides, train_rows
from trainers.train import train


@pytest.mark.slow
def test_ctrl_c_and_kill_9_lose_nothing(tmp_path):
    steps = ("loop.steps=250", "loop.checkpoint_every=10")
    directory = tmp_path / "run"
    command = tiny_overrides(directory, *steps)

    process = start(*command)
    wait_for_rows(directory, process, 15)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.startswith("stopped after step ")
    assert error.endswith("The same command with name=run continues.\n")
    assert error.count("\n") == 1
    stopped_at = train_rows(directory)[-1]["step"]

    process = start(*command)
    wait_for_rows(directory, process, stopped_at + 15)
    process.kill()
    process.communicate()
    killed_at = len(train_rows(directory))
    assert stopped_at < killed_at < 250, "the kill came too late to test anything"

    process = start(*command)
    output, error = process.communicate(timeout=200)
    assert (process.returncode, error) == (0, "")
    assert "continuing run after step" in output
    train(tiny(tmp_path / "unbroken", *steps))
    assert train_rows(directory) == train_rows(tmp_path / "unbroken")


@pytest.mark.slow
def test_a_full_run_prints_the_table_and_says_where_the_logs_are(tmp_path):
    directory = tmp_path / "run"
    process = start(*tiny_overrides(directory, "logger=wandb", "logger.wandb=offline"))
    output, error = process.communicate(timeout=200)
    assert (process.returncode, error) == (0, "")
    valid = read_jsonl(directory / "metrics.jsonl")[-1]
    for part in (
        "planted: ",
        "step 12/12  loss ",
        f"validation loss {valid['valid/loss']:.4f} nats, {valid['valid/bits_per_byte']:.3f} bits per byte",
        " of a bigram, add-",
        "fsi_domain",
        "its null",
        "layer1",
        "training throughput ",
        f"log: {directory / 'metrics.jsonl'}: one JSON object a step",
        "wandb sync",
    ):
        assert part in output, part
    assert sorted(path.name for path in directory.iterdir()) == ["checkpoints", "metrics.jsonl", "wandb"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.stepz=5", "error: unknown key loop.stepz; did you mean loop.steps?"),
        ("router=cubic", "error: In 'train': Could not find 'router/cubic' Available options in 'router':"),
    ],
)
def test_unknown_keys_and_choices_are_refused_in_one_line(tmp_path, override, message):
    process = start(*tiny_overrides(tmp_path / "run", override))
    _, error = process.communicate(timeout=100)
    assert process.returncode == 2
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_tiny_model_learns_planted_sources_and_stays_balanced(tmp_path, seed, capsys):
    train(
        tiny(
            tmp_path / "run",
            f"seed={seed}",
            "data.seed=0",
            "data.documents=400",
            "data.batch_size=16",
            "model.layers=1",
            "loop.steps=150",
            "loop.warmup=10",
            "optimizer.lr=0.02",
        )
    )
    found = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert found["valid/loss"] < 0.8 * math.log(9)
    assert "; below the " in capsys.readouterr().out  # a bigram model, which cannot know the source
    assert found["valid/geometry/fsi"] < 0.25
    assert found["valid/geometry/fsi_domain"] > found["valid/geometry/fsi_domain_null"]
    assert found["valid/geometry/dead_experts"] == 0
