"""Processes that tests start, and end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS = 240
"""After which a test gives up."""


def outputs(*commands: Sequence[str | Path], cwd: Path, env: Mapping[str, str] | None = None) -> list[str]:
    """Run commands beside each other, and return what each printed; raise unless all of them succeed.

    Each has a session of its own, so that none of the processes that it starts outlives the test.
    """
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUTF8": "1"} | dict(env or {})
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    with contextlib.ExitStack() as stack:
        processes = []
        for command in commands:
            how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            process = subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **how)
            processes.append(stack.enter_context(process))
            stack.callback(_end, process)
        printed = []
        for process in processes:
            printed.append(process.communicate(timeout=SECONDS)[0])
            assert process.returncode == 0, printed[-1][-3000:]
    return printed


def _end(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
