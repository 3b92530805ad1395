"""Two wheels of this package beside each other: each in a folder and in processes of its own."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

__all__ = ["Worker", "answer", "install"]

ROOT = pathlib.Path(__file__).resolve().parents[1]


def install(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Put what is in a wheel into a folder, and return the folder."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    subprocess.run([*command, str(wheel.resolve())], check=True)
    return folder


class Worker:
    """A process that runs a module of this folder with one of the wheels, and answers questions.

    Python's -S keeps out what an editable install has put into the site-packages, which would come before any path.
    """

    def __init__(self, folder: pathlib.Path, module: str, *arguments: str, environment: Mapping[str, str]) -> None:
        path = os.pathsep.join([str(folder), str(ROOT), *filter(None, sys.path)])
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process is
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-m", module, str(folder), *arguments],
            env={**environment, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ask(self, question: Any) -> None:
        """Send a question, without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Wait for the answer to the oldest question that has none.

        Raises:
            RuntimeError: If the process has ended, with what it wrote to standard error.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"a process with one of the wheels ended:\n{self._log.read()}")
        return json.loads(line)

    def close(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


def answer(respond: Any, folder: str) -> None:
    """Answer every question of the other side by a function, in the process of a `Worker`."""
    package = importlib.import_module("batchnorm")
    if not pathlib.Path(str(package.__file__)).is_relative_to(folder):
        raise AssertionError(f"batchnorm must be the wheel's in {folder}; it is {package.__file__}.")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what frameworks print is no answer
    for line in sys.stdin:
        answers.write(json.dumps(respond(json.loads(line))) + "\n")
        answers.flush()
