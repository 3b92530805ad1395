from __future__ import annotations

import importlib
import importlib.util
import pathlib
import re
from typing import Any

import pytest
import torch

# The tests run in several processes, whose threads would wait for each other; the CPU kernels have their own.
torch.set_num_threads(1)


@pytest.fixture
def force_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU kernels serve also where PyTorch's own operator takes less time."""
    monkeypatch.setattr("batchnorm.torch.functional.SMALL", 0)


@pytest.fixture(scope="session")
def timm() -> Any:
    """The package, also beside a torchvision that is built for another PyTorch, and so lacks its operators."""
    try:
        return importlib.import_module("timm")
    except RuntimeError:
        origin = importlib.util.find_spec("torchvision").origin  # type: ignore[union-attr]
        source = pathlib.Path(str(origin)).with_name("_meta_registrations.py").read_text(encoding="utf-8")
        library: Any = torch.library.Library(  # type: ignore[no-untyped-call]
            "torchvision", "DEF"
        )
        for name in dict.fromkeys(re.findall(r"torchvision(?:::|\.)(\w+)|register_meta\(\"(\w+)", source)):
            library.define(f"{name[0] or name[1]}(Tensor x) -> Tensor")
        return importlib.import_module("timm")
