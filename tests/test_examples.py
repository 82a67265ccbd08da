"""The examples run as they are, from any folder, and show what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moegeo_router import replay

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("example", "shows"),
    [
        ("replace_linear_router.py", "exported: Parameter in a plain Linear"),
        ("log_geometry_to_wandb.py", "wandb leet"),
        ("watch_transformers.py", "the same training as without watching: True"),
        ("finetune_transformers.py", "saved; stock transformers loads it: Qwen3MoeForCausalLM"),
        ("own_router_family.py", "dispatch: sigmoid scores"),
        ("own_signal_and_intervention.py", "turn_apart in gate helped: well"),
    ],
)
def test_example_runs(example, shows, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / "examples" / example)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert shows in done.stdout
    for log in tmp_path.glob("runs/own_signal*/metrics.jsonl"):
        assert replay.main([str(log)]) == 0
