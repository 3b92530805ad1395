"""Masks and weights, beside loops in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batchnorm.numpy import BatchNormalization
from tests.oracle import Oracle

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "composed": {"fused": False},
    "renorm": {"renorm": True, "renorm_clipping": {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}},
    "virtual batches": {"virtual_batch_size": 3},
    "virtual batches, renorm": {"virtual_batch_size": 4, "renorm": True},
    "adjustment": {"adjustment": lambda shape: (np.full(shape, 1.5), np.full(shape, 0.5))},
    "no parameters": {"center": False, "scale": False},
}
SHAPES: dict[str, tuple[tuple[int, ...], Any]] = {
    "tabular": ((7, 3), -1),
    "features last": ((7, 5, 3), -1),
    "features first": ((6, 3, 4, 2), 1),
    "axes apart": ((6, 2, 4, 3), (1, 3)),
}
MASKS = ("some", "all", "one", "nothing", "a group of nothing", "weights", "none")


def masks(kind: str, sizes: tuple[int, ...]) -> Any:
    """A mask of a kind, one value for each position."""
    rng = np.random.default_rng(0)
    if kind == "none":
        return None
    if kind == "weights":
        return rng.random(sizes) * (rng.random(sizes) < 0.7)
    if kind == "one":
        return np.arange(np.prod(sizes)).reshape(sizes) == 4
    if kind == "a group of nothing":
        kept = np.arange(sizes[0]) % 3 > 0
        return np.broadcast_to(kept.reshape(-1, *[1] * (len(sizes) - 1)), sizes)
    return rng.random(sizes) < {"some": 0.6, "all": 2.0, "nothing": -1.0}[kind]


def near(actual: Any, expected: Any, dtype: str) -> None:
    tolerance = 1e-9 if dtype == "float64" else 2e-4
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("masked", ["zero", "normalized"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_gradients_and_inference_are_those_of_loops(
    shape: str, options: str, kind: str, dtype: str, masked: Any
) -> None:
    sizes, axis = SHAPES[shape]
    given: dict[str, Any] = {"epsilon": 1e-3, "momentum": 0.7, "renorm_momentum": 0.8, **OPTIONS[options]}
    layer = BatchNormalization(axis=axis, masked=masked, **given)
    adjustment = given.get("adjustment")
    known = {key: given[key] for key in ("epsilon", "momentum", "renorm_momentum")}
    oracle = Oracle.build(
        sizes, axis, center=given.get("center", True), scale=given.get("scale", True), masked=masked,
        renorm=given.get("renorm", False), virtual_batch_size=given.get("virtual_batch_size"), adjustment=adjustment,
        **known, **given.get("renorm_clipping", {}),
    )  # fmt: skip
    positions = tuple(size for at, size in enumerate(sizes) if at not in oracle.axes)
    mask = masks(kind, positions)
    weights = None
    if mask is not None:
        kept = tuple(1 if at in oracle.axes else size for at, size in enumerate(sizes))
        weights = mask.reshape(kept).astype(np.float64)
    rng = np.random.default_rng(1)
    for _ in range(2):
        x, dy = rng.normal(size=sizes) * 2 + 1, rng.normal(size=sizes)
        if weights is not None and masked == "zero":
            x = np.where(weights > 0, x, np.nan)
        before = {name: value.copy() for name, value in oracle.variables.items()}
        used = oracle.corrections(oracle.averages(oracle.moments(x, weights)))
        expected = oracle.gradients(x, dy, used, oracle.adjust(sizes), weights)
        y, gradient = layer.vjp(x.astype(dtype), training=True, mask=mask)
        near(y, oracle.train(x, weights), dtype)
        apart = shape == "axes apart" and "virtual" in options  # too many groups for the kernels
        assert layer.kernel == ("composed" if apart or options in ("composed", "adjustment") else "cpu")
        found = gradient(dy)
        near(found.inputs, expected.x, dtype)
        for name in ("gamma", "beta"):
            if name in oracle.variables:
                near(np.reshape(getattr(found, name), oracle.sizes), getattr(expected, name), dtype)
        for name, value in layer.variables.items():
            near(value.reshape(oracle.sizes), oracle.variables[name], dtype)
            if kind == "nothing":
                assert (oracle.variables[name] == before[name]).all()
    near(layer(x.astype(dtype), mask=mask), oracle.infer(x, weights), dtype)
    before = {name: value.copy() for name, value in layer.variables.items()}
    layer(x.astype(dtype), training=True, mask=mask, update=False)
    assert all((value == before[name]).all() for name, value in layer.variables.items())


def test_inference_has_the_gradients_of_finite_differences_under_a_mask() -> None:
    rng = np.random.default_rng(0)
    x, dy, mask = rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), np.array([True, False, True, True])
    layer = BatchNormalization(moving_mean_initializer=0.5, moving_variance_initializer=2.0)
    _, gradient = layer.vjp(x, mask=mask)
    found = gradient(dy)
    for index in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-6
        slope = ((layer(x + step, mask=mask) - layer(x - step, mask=mask)) * dy).sum() / 2e-6
        assert abs(found.inputs[index] - slope) < 1e-8
    assert found.beta is not None
    np.testing.assert_allclose(found.beta, dy[mask].sum(0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.ones(3), ValueError, r"mask must have shape \(8,\) or \(8, 1\) for inputs of shape \(8, 3\)"),
        (np.ones((8, 3)), ValueError, r"mask must have shape .*; received shape \(8, 3\)"),
        (-np.ones(8), ValueError, "mask must hold finite numbers that are not negative"),
        (np.full(8, np.nan), ValueError, "mask must hold finite numbers"),
        (np.ones(8, complex), TypeError, "mask must hold booleans or real numbers; received complex128"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_and_makes_nothing(
    mask: Any, error: type[Exception], message: str, training: bool
) -> None:
    layer = BatchNormalization()
    with pytest.raises(error, match=message):
        layer(np.ones((8, 3)), training, mask)
    assert layer.variables == {}
