"""Every test of this folder on every backend, a process for each; and files from one backend to another."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import outputs

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
BACKENDS = ("tensorflow", "jax", "torch", "numpy")
TRAIN = ("tensorflow", "jax", "torch")
"""NumPy neither differentiates nor trains."""


def run(backend: str, *command: str) -> str:
    """Run Python with a backend, and give its output."""
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUTF8": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    if backend == "jax":  # devices to distribute over
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    return done.stdout


def test_every_backend_is_there() -> None:
    assert all(importlib.util.find_spec(backend) is not None for backend in BACKENDS)


@pytest.mark.slow(seconds=100)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_holds_on(backend: str) -> None:
    what = FOLDER if backend in TRAIN else FOLDER / "test_reference.py"
    shown = run(backend, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", str(what))
    assert " passed" in shown
    assert " failed" not in shown


@pytest.mark.slow(seconds=40)
def test_fit_reaches_the_same_statistics_on_every_backend_and_files_of_each_load_on_every_other(tmp_path: Path) -> None:
    exchange = [sys.executable, "-m", "tests.keras.exchange", str(tmp_path), *TRAIN]
    printed = outputs(*(["env", f"KERAS_BACKEND={backend}", *exchange] for backend in TRAIN), cwd=ROOT)
    assert [each.splitlines()[-1] for each in printed] == [f"{backend} is right" for backend in TRAIN]
