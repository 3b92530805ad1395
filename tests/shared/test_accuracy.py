"""In float32 a mean of 1e4 beside a spread of 1 costs nothing, wherever we compute, and not another's operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batchnorm.core.passes import COMPOSED
from batchnorm.cpu import KERNEL
from tests.oracle import Oracle

from .dialects import ALL, Dialect

EPSILON = 1e-3
OURS = (KERNEL, COMPOSED)
LAYOUTS: dict[str, dict[str, Any]] = {
    "table": {"shape": (96, 3), "axis": 1},
    "features last": {"shape": (24, 4, 3, 3), "axis": -1},
    "features first": {"shape": (24, 3, 4, 3), "axis": 1},
    "axes side by side": {"shape": (24, 3, 2, 3), "axis": (1, 2)},
    "axes apart": {"shape": (24, 3, 4, 2), "axis": (1, 3)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True},
    "limited renorm": {"renorm": True, "renorm_clipping": {"rmin": 0.5, "rmax": 2.0, "dmax": 0.5}},
    "virtual batches": {"virtual_batch_size": 12},
    "renorm and virtual batches": {"renorm": True, "virtual_batch_size": 12},
    "adjustment by feature": {"adjustment": "by feature"},
    "adjustment by sample": {"adjustment": "by sample", "renorm": True},
}
THEIRS = {
    ("TensorFlow", "FusedBatchNormV3"),  # plain inference
    ("PyTorch", "torch"),  # training on few values, and inference
}
"""Who serves where we do not, to which no bound of ours applies."""


@pytest.mark.parametrize("fused", [None, False], ids=["fastest", "composed"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dialect", ALL, ids=lambda dialect: dialect.__name__)
def test_training_and_inference_are_right_where_the_mean_is_large_beside_the_spread(
    dialect: type[Dialect], layout: str, options: str, fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchnorm.torch.functional.SMALL", 0)  # so that the CPU kernels serve few values, too
    shape, axis = LAYOUTS[layout]["shape"], LAYOUTS[layout]["axis"]
    asked = dict(OPTIONS[options])
    rng = np.random.default_rng(0)
    kind = asked.pop("adjustment", None)
    if kind is not None:
        axes = {each % len(shape) for each in (axis if isinstance(axis, tuple) else (axis,))}
        kept = axes if kind == "by feature" else {0}
        size = tuple(size if at in kept else 1 for at, size in enumerate(shape))
        pair = tuple(value.astype(np.float32) for value in (rng.uniform(0.5, 1.5, size), rng.uniform(-0.5, 0.5, size)))
        asked["adjustment"] = lambda _: pair
    limits = asked.get("renorm_clipping", {})
    oracle = Oracle.build(
        shape,
        axis,
        epsilon=EPSILON,
        **{key: value for key, value in (asked | limits).items() if key != "renorm_clipping"},
    )
    for name, value in oracle.variables.items():
        low, high = (1e4 - 1, 1e4 + 1) if name.endswith("mean") else (-1, 1) if name == "beta" else (0.7, 1.3)
        oracle.variables[name] = rng.uniform(low, high, value.shape).astype(np.float32).astype(np.float64)
    variables = {name: value.astype(np.float32) for name, value in oracle.variables.items()}
    layer = dialect(shape, variables, axis=axis, epsilon=EPSILON, fused=fused, **asked)
    x, then = (rng.normal(1e4, 1.0, shape).astype(np.float32) for _ in range(2))
    inferred = layer(then, training=False)
    expected = [oracle.infer(then.astype(np.float64)), oracle.train(x.astype(np.float64))]
    trained = layer(x, training=True)
    assert trained.kernel in OURS
    for found, right in zip((inferred, trained), expected, strict=True):
        assert found.y.dtype == np.float32
        if found.kernel in OURS:
            np.testing.assert_allclose(found.y, right, rtol=0, atol=1e-5)
        else:
            assert (dialect.__name__, found.kernel) in THEIRS
            assert fused is not False


@pytest.mark.parametrize("fused", [None, False], ids=["fastest", "composed"])
@pytest.mark.parametrize("options", ["plain", "renorm", "virtual batches", "renorm and virtual batches"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dialect", ALL, ids=lambda dialect: dialect.__name__)
def test_gradients_are_right_where_the_mean_is_large_beside_the_spread(
    dialect: type[Dialect], layout: str, options: str, fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchnorm.torch.functional.SMALL", 0)
    shape, axis = LAYOUTS[layout]["shape"], LAYOUTS[layout]["axis"]
    rng = np.random.default_rng(0)
    oracle = Oracle.build(shape, axis, epsilon=EPSILON, **OPTIONS[options])
    for name, value in oracle.variables.items():
        low, high = (1e4 - 1, 1e4 + 1) if name.endswith("mean") else (-1, 1) if name == "beta" else (0.7, 1.3)
        oracle.variables[name] = rng.uniform(low, high, value.shape).astype(np.float32).astype(np.float64)
    variables = {name: value.astype(np.float32) for name, value in oracle.variables.items()}
    layer = dialect(shape, variables, axis=axis, epsilon=EPSILON, fused=fused, **OPTIONS[options])
    x, dy = rng.normal(1e4, 1.0, shape).astype(np.float32), (1 + 0.1 * rng.normal(size=shape)).astype(np.float32)
    exact = x.astype(np.float64)
    used = oracle.corrections(oracle.averages(oracle.moments(exact)))
    expected = oracle.gradients(exact, dy.astype(np.float64), used, None)
    for found, right in zip(layer.gradients(x, dy), (expected.x, expected.gamma, expected.beta), strict=True):
        np.testing.assert_allclose(found.reshape(right.shape), right, rtol=2e-5, atol=2e-5)
