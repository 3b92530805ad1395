"""Arguments that are refused."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from batchnorm.numpy import BatchNormalization

from .cases import INITIALIZED

BAD: list[tuple[str, Any, type[Exception]]] = [
    ("axis", 1.5, TypeError),
    ("momentum", 2.0, ValueError),
    ("epsilon", -1.0, ValueError),
    ("center", "no", TypeError),
    ("scale", "no", TypeError),
    *((f"{name}_initializer", "glorot", ValueError) for name in INITIALIZED),
    *((f"{name}_{kind}", 1.0, TypeError) for name in ("gamma", "beta") for kind in ("regularizer", "constraint")),
    ("renorm", "no", TypeError),
    ("renorm_clipping", {"amax": 1}, ValueError),
    ("renorm_momentum", -1.0, ValueError),
    ("fused", "no", TypeError),
    ("trainable", "no", TypeError),
    ("virtual_batch_size", 0, ValueError),
    ("adjustment", 3, TypeError),
    ("dtype", np.int32, TypeError),
    ("skip_nonfinite", "no", TypeError),
    ("masked", "no", ValueError),
]


@pytest.mark.parametrize(("argument", "value", "error"), BAD, ids=lambda part: str(part)[:24])
def test_a_bad_argument_is_refused_under_its_own_name(argument: str, value: Any, error: type[Exception]) -> None:
    options: dict[str, Any] = {argument: value}
    with pytest.raises(error, match=f"^{argument}") as caught:
        BatchNormalization(**options)
    assert (np.dtype(value).name if argument == "dtype" else repr(value)) in str(caught.value)


def test_every_argument_that_can_be_bad_has_a_bad_value_in_the_table() -> None:
    arguments = set(inspect.signature(BatchNormalization).parameters)
    assert {argument for argument, _, _ in BAD} == arguments - {"name"}


@pytest.mark.parametrize("dtype", [np.int32, bool, complex, "S1", np.longdouble])
def test_a_type_that_is_not_floating_point_is_refused(dtype: Any) -> None:
    with pytest.raises(
        TypeError, match=f"dtype must be of a floating-point type of up to 64 bits; received {np.dtype(dtype).name}"
    ):
        BatchNormalization(dtype=dtype)


@pytest.mark.parametrize("dtype", ["no type", 3])
def test_what_is_no_type_is_refused_by_name(dtype: Any) -> None:
    for make in (lambda: BatchNormalization(dtype=dtype), lambda: BatchNormalization().build((None, 3), dtype)):
        with pytest.raises(TypeError, match=f"^dtype must be of a floating-point type.*received {dtype!r}"):
            make()


@pytest.mark.parametrize(
    ("initializer", "error"),
    [("glorot", ValueError), (True, TypeError), (None, TypeError), ({"zeros": 1}, TypeError), ([1j], TypeError)],
)
def test_a_bad_initializer_is_refused_by_value(initializer: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^gamma_initializer") as caught:
        BatchNormalization(gamma_initializer=initializer)
    assert repr(initializer) in str(caught.value)
