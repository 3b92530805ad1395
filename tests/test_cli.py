"""The command line."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

import batchnorm
from batchnorm import cpu, info
from batchnorm.info import OPTIONS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "batchnorm", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_info_tells_versions_frameworks_threads_and_who_serves_what() -> None:
    done = run("info")
    assert done.returncode == 0, done.stderr
    assert f"batchnorm {batchnorm.__version__}" in done.stdout
    assert "tensorflow 2." in done.stdout
    assert "torch 2." in done.stdout
    assert f"CPU kernels: {cpu.instruction_set()}, {cpu.num_threads()} threads" in done.stdout
    found = done.stdout.splitlines()
    for framework in ("NumPy", "TensorFlow", "Keras", "PyTorch"):
        begin = next(at for at, line in enumerate(found) if line.startswith(framework))
        served = dict(line.strip().split("  ", 1) for line in found[begin + 1 : begin + 1 + len(OPTIONS)])
        assert set(served) == set(OPTIONS)
        assert served["renorm"].split()[0] == "cpu"
        assert served["fused=False"].split() == ["composed", "composed"]


@pytest.mark.parametrize(
    ("operations", "said", "wanted"),
    [(None, "not built", "GCC or Clang"), ("_tensorflow_ops.so", "for TensorFlow only", "python3-dev")],
)
def test_info_says_which_kernels_are_missing_and_how_to_get_them(
    operations: str | None, said: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "library", None)
    monkeypatch.setattr(cpu, "binding", lambda to: operations)
    found = list(itertools.takewhile(lambda line: not line.startswith("NumPy, "), info.lines()))
    assert found[-3].startswith(f"CPU kernels: {said}; ")
    assert wanted in found[-2]
    assert found[-1].strip() == "pip install --force-reinstall --no-cache-dir --no-deps batchnorm"


@pytest.mark.parametrize("arguments", [("info", "--no-such-option"), ("no-such-command",), ()], ids=" ".join)
def test_what_is_not_understood_is_an_error(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "usage: batchnorm" in done.stderr


def test_threads_are_set_and_checked_from_the_top() -> None:
    before = batchnorm.num_threads()
    try:
        batchnorm.set_num_threads(3)
        assert batchnorm.num_threads() == 3
    finally:
        batchnorm.set_num_threads(before)
    for wrong, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="threads"):
            batchnorm.set_num_threads(wrong)  # type: ignore[arg-type]
    assert batchnorm.num_threads() == before
