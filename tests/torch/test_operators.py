"""The registered operators, called by hand: whatever does not fit is refused before any memory is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import batchnorm.torch  # noqa: F401 - registers the operators


def arguments(operator: str) -> dict[str, Any]:
    """What is accepted, with renorm."""
    x = torch.randn(8, 3, 4, 4)
    values = {"x": x, "factor": torch.ones(3), "offset": torch.zeros(3)}
    if operator == "forward":
        values |= {"renorm_mean": torch.zeros(3), "renorm_stddev": torch.ones(3)}
        values |= {"limits": torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), "weights": torch.rand(8, 4, 4)}
    else:
        moments = torch.stack([torch.zeros(1, 3), torch.ones(1, 3)]).double()
        values = {"dy": torch.randn(8, 3, 4, 4), **values, "moments": moments, "correction": torch.ones(2, 3)}
        values |= {"weights": torch.rand(8, 4, 4), "counts": torch.full((2, 1), 9.0)}
    return {**values, "epsilon": 1e-3, "axes": [1], "virtual_batch_size": None}


def call(operator: str, values: dict[str, Any]) -> Any:
    return getattr(torch.ops.batchnorm, operator)(*values.values())


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("operator", ["forward", "backward"])
def test_what_the_tests_of_refusals_change_is_accepted_as_it_is(operator: str) -> None:
    for value in call(operator, arguments(operator)):
        assert torch.isfinite(value).all()


TENSORS = [
    *(("forward", name) for name in ("factor", "offset", "renorm_mean", "renorm_stddev", "limits")),
    *(("backward", name) for name in ("dy", "factor", "offset", "moments", "correction", "counts")),
]


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_a_tensor_of_another_size_is_refused(operator: str, name: str) -> None:
    values = arguments(operator)
    for other in (values[name].repeat(2, *(1,) * (values[name].dim() - 1)), values[name].reshape(-1)[:-1]):
        with pytest.raises(ValueError, match=f"^{name} must have"):
            call(operator, {**values, name: other})


@pytest.mark.parametrize(("operator", "name"), [pair for pair in TENSORS if pair[1] != "limits"])
def test_a_tensor_of_integers_is_refused(operator: str, name: str) -> None:
    values = arguments(operator)
    with pytest.raises(TypeError, match=f"^{name} must be of"):
        call(operator, {**values, name: values[name].to(torch.int64)})


@pytest.mark.parametrize("name", ["dy", "moments", "correction", "counts"])
def test_what_the_kernels_read_as_it_is_must_be_of_its_type(name: str) -> None:
    values = arguments("backward")
    other = torch.float16 if name == "moments" else torch.float64  # both float32 and float64 hold moments
    with pytest.raises(TypeError, match=f"^{name} must be of torch.float32; received {other}"):
        call("backward", {**values, name: values[name].to(other)})


READ = [pair for pair in TENSORS if pair not in (("forward", "limits"), ("backward", "offset"))]
"""What the kernels read by address; the gradient of an offset does not depend on it."""


@pytest.mark.parametrize(("operator", "name"), [("forward", "x"), ("backward", "x"), *READ])
def test_a_tensor_without_memory_is_refused(operator: str, name: str) -> None:
    values = arguments(operator)
    with pytest.raises((ValueError, RuntimeError)):
        call(operator, {**values, name: freed(values[name])})


@pytest.mark.parametrize("operator", ["forward", "backward"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.ones(8, 3, 4, 4, dtype=torch.int32)}, TypeError, "x must be of a type among"),
        ({"axes": [4]}, ValueError, "axis must be in"),
        ({"axes": [1, 1]}, ValueError, "axis must name each axis once"),
        ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size must be None or at least 1"),
        ({"virtual_batch_size": -2}, ValueError, "virtual_batch_size must be None or at least 1"),
        ({"axes": [1, 3], "virtual_batch_size": 4}, ValueError, "two runs of axes at most, one with virtual batches;"),
        ({"epsilon": -1.0}, ValueError, "epsilon must be finite and at least 0"),
        ({"epsilon": float("nan")}, ValueError, "epsilon must be finite and at least 0"),
        ({"axes": [0]}, ValueError, "must have"),
    ],
)
def test_what_tells_how_the_input_is_seen_is_checked(
    operator: str, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(operator, arguments(operator) | changed)


@pytest.mark.parametrize("name", ["renorm_mean", "renorm_stddev"])
def test_renorm_is_refused_by_half(name: str) -> None:
    with pytest.raises(ValueError, match="must be given together"):
        call("forward", {**arguments("forward"), name: None})


def test_negative_axes_count_from_the_end() -> None:
    values = arguments("forward")
    for found, expected in zip(call("forward", {**values, "axes": [-3]}), call("forward", values), strict=True):
        assert torch.equal(found, expected)
