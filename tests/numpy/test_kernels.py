"""Who serves a call."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from batchnorm.numpy import BatchNormalization


@pytest.mark.parametrize("training", [False, True])
def test_fused_says_which_kernel_serves(training: bool) -> None:
    x = np.random.default_rng(0).normal(size=(4, 2, 2, 3)).astype(np.float32)
    served: dict[bool | None, str | None] = {}
    for fused in (None, True, False):
        layer = BatchNormalization(fused=fused)
        assert layer.kernel is None
        layer(x, training=training)
        served[fused] = layer.kernel
    assert served == {None: "cpu", True: "cpu", False: "composed"}


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({"axis": [1, 2]}, "cpu"),
        ({"axis": [1, 3]}, "cpu"),
        ({"axis": [1, 3], "renorm": True}, "cpu"),
        ({"axis": [1, 3], "virtual_batch_size": 2}, "composed"),
        ({"axis": 1, "renorm": True, "virtual_batch_size": 2}, "cpu"),
        ({"adjustment": lambda shape: (np.ones(3), 0.5)}, "cpu"),
        ({"adjustment": lambda shape: (np.ones((4, 1, 1, 1)), 0.5)}, "composed"),
    ],
    ids=[
        "side by side",
        "apart",
        "apart and renorm",
        "apart and virtual batches",
        "renorm and virtual batches",
        "by feature",
        "by sample",
    ],
)
def test_the_cpu_kernels_serve_whatever_is_one_map_per_feature_over_two_runs_of_axes(
    options: dict[str, Any], kernel: str
) -> None:
    layer = BatchNormalization(**options)
    layer(np.random.default_rng(0).normal(size=(4, 2, 5, 3)), training=True)
    assert layer.kernel == kernel


def test_memory_does_not_grow_with_the_number_of_shapes() -> None:
    layer = BatchNormalization()
    tracemalloc.start()
    try:
        for size in range(1, 2_000):
            layer(np.zeros((size, 2), np.float32), training=size % 2 == 0)
        before, _ = tracemalloc.get_traced_memory()
        for size in range(2_000, 5_000):
            layer(np.zeros((size, 2), np.float32), training=size % 2 == 0)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000  # 30 bytes a shape; what is remembered of one takes a thousand
