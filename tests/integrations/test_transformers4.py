"""The tests of families in transformers 4.57, which is installed for them into a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINNED = ROOT / "constraints-transformers4.txt"


@pytest.fixture(scope="module")
def packages() -> Path:
    """The folder, made anew where the pins have changed: packages that go before those of the environment."""
    folder, pins = ROOT / "build" / "transformers4", PINNED.read_text("utf-8")
    mark = folder / "pins.txt"
    if not mark.exists() or mark.read_text("utf-8") != pins:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), "-r", str(PINNED)], check=True, timeout=250)
        mark.write_text(pins, "utf-8")
    return folder


def run(packages: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)]), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_is_transformers_4(packages):
    says = "import transformers, moegeo_router; print(transformers.__version__, moegeo_router.__file__)"
    version, ours = run(packages, "-c", says).split()
    assert f"transformers=={version}" in PINNED.read_text("utf-8")
    assert Path(ours).is_relative_to(ROOT)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_families_of_transformers_4_are_served(packages):
    files = [f"tests/integrations/{name}.py" for name in ("test_families", "test_families_around")]
    said = run(packages, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None
    # 29 families, eleven tests of each; families that are all skipped would not be noticed otherwise.
    assert int(passed.group(1)) > 290
