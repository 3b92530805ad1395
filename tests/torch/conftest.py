from __future__ import annotations

import pytest
import torch

# The tests run in several processes, whose threads would wait for each other; the CPU kernels have their own.
torch.set_num_threads(1)


@pytest.fixture
def force_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU kernels serve also where PyTorch's own operator takes less time."""
    monkeypatch.setattr("batchnorm.torch.functional.SMALL", 0)
