"""Bad input: PyTorch's errors where its layers have them, ours by name elsewhere; and nothing has changed after."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.core.options import Clipping, Options
from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, batch_norm, convert

PAIRS = [(BatchNorm1d, nn.BatchNorm1d), (BatchNorm2d, nn.BatchNorm2d), (BatchNorm3d, nn.BatchNorm3d)]


def caught(call: Callable[..., Any], *arguments: Any, **options: Any) -> Exception:
    with pytest.raises(Exception) as info:  # noqa: PT011  # whatever it is, it is compared
        call(*arguments, **options)
    assert isinstance(info.value, Exception)
    return info.value


def unchanged(layer: nn.Module, before: dict[str, Tensor]) -> None:
    now = layer.state_dict()
    assert list(now) == list(before)
    for name, value in now.items():
        assert torch.equal(value, before[name]), name


def copied(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


# What PyTorch refuses


SMALL, LARGE = (4, 3, 2, 2), (4, 3, 60, 61)
INPUTS: dict[str, Callable[[], Any]] = {
    "no axis": lambda: torch.zeros(()),
    "one axis": lambda: torch.zeros(3),
    "two axes": lambda: torch.zeros(4, 3),
    "three axes": lambda: torch.zeros(4, 3, 2),
    "four axes": lambda: torch.zeros(SMALL),
    "five axes": lambda: torch.zeros(*SMALL, 2),
    "six axes": lambda: torch.zeros(*SMALL, 2, 2),
    "one value": lambda: torch.zeros(1, 3, 1, 1),
    "one value, too many features": lambda: torch.zeros(1, 4, 1, 1),
    "no value for any feature": lambda: torch.zeros(4, 0, 2, 2),
    "too many features": lambda: torch.zeros(4, 4, 2, 2),
    "too few features": lambda: torch.zeros(4, 2, 60, 61),
    "one feature": lambda: torch.zeros(4, 1, 2, 2),
    "int64": lambda: torch.zeros(SMALL, dtype=torch.int64),
    "bool": lambda: torch.zeros(SMALL, dtype=torch.bool),
    "complex": lambda: torch.zeros(SMALL, dtype=torch.complex64),
    "wider than the layer": lambda: torch.zeros(SMALL, dtype=torch.float64),
    "large, int64": lambda: torch.zeros(LARGE, dtype=torch.int64),
    "large, wider than the layer": lambda: torch.zeros(LARGE, dtype=torch.float64),
    "a list": lambda: [1.0],
    "nothing": lambda: None,
    "another device": lambda: torch.zeros(SMALL, device="meta"),
}
MIXED = [name for name in INPUTS if "int64" in name or "layer" in name or name in ("bool", "complex", "another device")]
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not affine": {"affine": False},
    "no bias": {"bias": False},
    "no tracking": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "epsilon 0": {"eps": 0.0},
    "simple average": {"momentum": None},
    "float64": {"dtype": torch.float64},
    "float16": {"dtype": torch.float16},
}


def outcome(layer: nn.Module, x: Any) -> tuple[Any, ...]:
    """The error, or what came out."""
    try:
        y = layer(x)
    except Exception as error:
        return type(error), str(error)
    return None, y.dtype, y.shape


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("path", ["default", "cpu", "composed"])
@pytest.mark.parametrize("options", LAYERS)
def test_inputs_are_refused_as_by_torch_and_change_nothing(
    options: str, path: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "cpu":
        monkeypatch.setattr("batchnorm.torch.functional.SMALL", 0)
    refused, differences = 0, []
    for ours, theirs in PAIRS:
        for name, make in INPUTS.items():
            layer = ours(3, fused=False if path == "composed" else None, **LAYERS[options]).train(training)
            before = copied(layer)
            actual, expected = outcome(layer, make()), outcome(theirs(3, **LAYERS[options]).train(training), make())
            wrong = actual != expected
            if path == "composed":  # its operations mix types, which PyTorch's layer does not, and say other things
                mixed = name in MIXED or "dtype" in LAYERS[options]
                wrong = expected[0] is not None and actual[0] is None and not mixed
            if wrong:
                differences.append(f"{ours.__name__}, {name}: {actual} and not {expected}")
            if actual[0] is not None:
                unchanged(layer, before)
                refused += 1
    assert refused > 30
    assert not differences, "\n".join(differences)


def test_features_that_are_no_size_are_refused_as_by_torch() -> None:
    for ours, theirs in PAIRS:
        for features in ("3", 2.5, None, -1):
            actual, expected = (caught(kind, features) for kind in (ours, theirs))
            assert (type(actual), str(actual)) == (type(expected), str(expected))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("wrong", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_function_refuses_other_sizes_as_torch_does(
    wrong: str, size: int, shape: tuple[int, ...], training: bool
) -> None:
    tensors = {name: torch.ones(3) for name in ("running_mean", "running_var", "weight", "bias")}
    tensors[wrong] = torch.ones(size)
    x = torch.zeros(shape)
    actual, expected = (caught(one, x, **tensors, training=training) for one in (batch_norm, functional.batch_norm))
    assert (type(actual), str(actual)) == (type(expected), str(expected))
    assert all(torch.equal(value, torch.ones_like(value)) for value in tensors.values())


def test_evaluation_without_statistics_is_refused_by_the_function_as_by_torch() -> None:
    actual, expected = (caught(one, torch.zeros(4, 3), None, None) for one in (batch_norm, functional.batch_norm))
    assert (type(actual), str(actual)) == (type(expected), str(expected))


# Options


KINDS: list[Any] = [BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d]
# One value for each argument, to see that it gets where it is checked; tests/core/test_options.py has the others.
BAD: dict[str, tuple[Any, type[Exception]]] = {
    "eps": (-1e-3, ValueError),
    "momentum": (1.01, ValueError),
    "renorm": ("True", TypeError),
    "renorm_clipping": ({"max": 3}, ValueError),
    "renorm_momentum": (-0.01, ValueError),
    "virtual_batch_size": (0, ValueError),
    "adjustment": (1.0, TypeError),
    "fused": ("True", TypeError),
    "skip_nonfinite": ("True", TypeError),
    "synchronized": ("True", TypeError),
    "process_group": ("gloo", TypeError),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_refused_by_name_and_value_before_a_layer_has_anything(name: str, kind: Any) -> None:
    value, error = BAD[name]
    layer = kind.__new__(kind)
    with pytest.raises(error, match=f"^{name} ") as info:
        layer.__init__(3, **{name: value})
    assert repr(value) in str(info.value)
    assert not vars(layer).get("_parameters")
    assert not vars(layer).get("_buffers")


def test_every_argument_that_can_be_bad_has_a_bad_value_in_the_table() -> None:
    own = set(inspect.signature(BatchNorm2d.__init__).parameters) - set(inspect.signature(nn.BatchNorm2d).parameters)
    assert own - {"self", "bias"} | {"eps", "momentum"} == set(BAD)


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("eps", "momentum")])
def test_a_conversion_with_a_bad_option_is_refused_and_converts_nothing(name: str) -> None:
    value, error = BAD[name]
    model = nn.Sequential(nn.BatchNorm2d(3), BatchNorm1d(3, virtual_batch_size=2))
    layers = list(model)
    with pytest.raises(error, match=f"^{name} "):
        convert(model, **{name: value})
    assert [before is now for before, now in zip(layers, model, strict=True)] == [True, True]


@pytest.mark.parametrize("name", BAD)
def test_setting_a_bad_value_leaves_the_layer_as_it_was(name: str) -> None:
    value, error = BAD[name]
    layer: Any = BatchNorm2d(3, renorm=True, momentum=0.2, eps=1e-3)
    before, options, given = copied(layer), layer.options, getattr(layer, name)
    with pytest.raises(error, match=f"^{name} "):
        setattr(layer, name, value)
    assert getattr(layer, name) == given
    assert layer.options == options
    unchanged(layer, before)
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), BatchNorm2d(3, renorm=True, momentum=0.2, eps=1e-3)(x))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("eps", "1e-3", TypeError),
        ("eps", None, TypeError),
        ("eps", float("nan"), ValueError),
        ("momentum", "0.1", TypeError),
        ("momentum", True, TypeError),
        ("renorm_momentum", None, TypeError),
    ],
)
def test_the_arguments_of_torch_are_checked_when_they_are_given_and_when_they_are_set(
    name: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"^{name} must be.*{value}"):
        BatchNorm1d(3, **{name: value})
    layer = BatchNorm1d(3)
    with pytest.raises(error, match=f"^{name} must be.*{value}"):
        setattr(layer, name, value)


def test_the_options_of_a_layer_are_what_it_would_do_now() -> None:
    layer: Any = BatchNorm2d(3, eps=1e-4, momentum=0.25)
    asked = Options(axis=1, decay=0.75, epsilon=1e-4, renorm_decay=0.99)
    assert layer.options == asked
    steps: list[tuple[str, Any, dict[str, Any]]] = [
        ("eps", 1e-2, {"epsilon": 1e-2}),
        ("momentum", 0.5, {"decay": 0.5}),
        ("weight", None, {"scale": False}),
        ("bias", None, {"center": False}),
        ("renorm", True, {"renorm": True}),
        ("renorm_momentum", 0.25, {"renorm_decay": 0.75}),
        ("renorm_clipping", {"rmax": 3.0}, {"renorm_clipping": Clipping(rmax=3.0)}),
        ("virtual_batch_size", 2, {"virtual_batch_size": 2}),
        ("fused", False, {"fused": False}),
        ("momentum", None, {"decay": Options.decay, "cumulative": True}),
        ("momentum", 0.0, {"decay": 1.0, "cumulative": False}),
        ("renorm", False, {"renorm": False}),
    ]
    for name, value, changes in steps:
        setattr(layer, name, value)
        asked = dataclasses.replace(asked, **changes)
        assert layer.options == asked, name
    assert BatchNorm((3, 4), axis=(1, -1), affine=False).options.axis == (1, -1)
    assert not BatchNorm1d(3, affine=False).options.scale
    assert not BatchNorm1d(3, bias=False).options.center


def test_what_is_set_takes_effect_at_the_next_call() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    layer: Any = BatchNorm1d(3)
    layer.eps, layer.momentum = 0.5, 1.0
    torch.testing.assert_close(layer(x), (x - x.mean(0)) / (x.var(0, correction=0) + 0.5) ** 0.5)
    torch.testing.assert_close(layer.running_var, x.var(0))


@pytest.mark.parametrize(
    ("name", "value"), [(name, BAD[name][0]) for name in BAD if name not in ("eps", "renorm", "adjustment")]
)
def test_the_function_refuses_a_bad_option_by_name(name: str, value: Any) -> None:
    state: dict[str, Any] = {
        name: torch.ones(3) for name in ("running_mean", "running_var", "renorm_mean", "renorm_stddev")
    }
    with pytest.raises(BAD[name][1], match=f"^{name} "):
        batch_norm(torch.zeros(4, 3), training=True, **state, **{name: value})
    assert all(torch.equal(average, torch.ones(3)) for average in state.values())


def test_a_bad_axis_is_refused_by_name() -> None:
    bad: Any = 1.5
    for call in (
        lambda: BatchNorm(3, axis=bad),
        lambda: batch_norm(torch.zeros(4, 3), None, None, training=True, axis=bad),
    ):
        with pytest.raises(TypeError, match=r"^axis.*1\.5"):
            call()


@pytest.mark.parametrize(
    ("features", "axis"),
    [((3, 4), 1), ((3, 4), (1,)), (3, (1, 2)), ((3,), (1, 2)), ((3, 4, 5), (1, 2)), ((), 1)],
    ids=str,
)
def test_there_is_one_number_of_features_for_each_axis(features: Any, axis: Any) -> None:
    with pytest.raises(ValueError, match=r"^num_features") as info:
        BatchNorm(features, axis)
    assert repr(features) in str(info.value)


EXCLUSIVE: dict[str, tuple[dict[str, Any], str]] = {
    "adjusted virtual batches": ({"adjustment": lambda shape: (1, 0), "virtual_batch_size": 2}, "adjustment"),
    "renorm without statistics": ({"renorm": True, "track_running_stats": False}, "track_running_stats"),
}


@pytest.mark.parametrize(("options", "named"), EXCLUSIVE.values(), ids=EXCLUSIVE)
@pytest.mark.parametrize("kind", KINDS)
def test_options_that_exclude_each_other_are_both_named(kind: Any, options: dict[str, Any], named: str) -> None:
    layer = kind.__new__(kind)
    with pytest.raises(ValueError, match=named) as info:
        layer.__init__(3, **options)
    assert all(name in str(info.value) for name in options)
    assert not vars(layer).get("_parameters")


def test_the_batch_s_axis_has_no_virtual_batches() -> None:
    layer = BatchNorm(4, axis=0, virtual_batch_size=2)
    before = copied(layer)
    for axis in (0, -2, (0, 1)):
        sizes = (4, 3) if axis == (0, 1) else 4
        for call in (
            lambda axis=axis, sizes=sizes: BatchNorm(sizes, axis, virtual_batch_size=2)(torch.zeros(4, 3)),
            lambda axis=axis: batch_norm(torch.zeros(4, 3), None, None, training=True, axis=axis, virtual_batch_size=2),
        ):
            with pytest.raises(ValueError, match=r"^axis.*virtual_batch_size=2"):
                call()
    unchanged(layer, before)


def test_the_averages_of_renorm_are_given_together_and_beside_running_statistics() -> None:
    x, one = torch.zeros(4, 3), torch.ones(3)
    averages: list[dict[str, Any]] = [{"renorm_mean": one}, {"renorm_stddev": one}]
    for given in averages:
        with pytest.raises(ValueError, match=r"renorm_mean.*renorm_stddev"):
            batch_norm(x, one, one, training=True, **given)
    averages = [{"running_mean": None, "running_var": one}, {"running_mean": one, "running_var": None}]
    for given in averages:
        with pytest.raises(ValueError, match=r"renorm_mean.*running_mean.*running_var"):
            batch_norm(x, **given, training=True, renorm_mean=one, renorm_stddev=one)
    assert torch.equal(one, torch.ones(3))


# Batches that do not fit the options


def never(shape: Any) -> Any:
    raise RuntimeError("no adjustment today")


UNFIT: dict[str, tuple[dict[str, Any], tuple[int, ...], type[Exception], str]] = {
    "one value in the last": ({"virtual_batch_size": 2}, (5, 3), ValueError, r"Expected more than 1.*\[5, 3\].*size=2"),
    "one value": ({"virtual_batch_size": 1}, (4, 3), ValueError, "Expected more than 1 value per channel"),
    "one value, renorm": ({"renorm": True}, (1, 3, 1), ValueError, "Expected more than 1 value per channel"),
    "features, renorm": ({"renorm": True}, (4, 5, 2), ValueError, r"\(5,\).*\(3,\)"),
    "features, virtual": ({"virtual_batch_size": 2}, (4, 5, 2), ValueError, r"\(5,\).*\(3,\)"),
    "one feature": ({"renorm": True}, (4, 1, 2), ValueError, r"\(1,\).*\(3,\)"),
    "features, other axis": ({"axis": -1}, (4, 3, 2), ValueError, r"\(2,\).*\(3,\)"),
    "epsilon": ({"renorm": True, "eps": 0.0}, (4, 3), ValueError, "eps must be positive.*0.0"),
    "no pair": ({"adjustment": lambda shape: (1.0,)}, (4, 3), ValueError, r"^adjustment.*pair.*\(1.0,\)"),
    "too long": (
        {"adjustment": lambda shape: (torch.ones(5), 0.0)},
        (4, 3),
        ValueError,
        r"^adjustment.*\(4, 3\).*\(5,\)",
    ),
    "failing adjustment": ({"adjustment": never}, (4, 3), RuntimeError, "no adjustment today"),
    "failing schedule": ({"renorm": True, "renorm_clipping": never}, (4, 3), RuntimeError, "no adjustment today"),
    "unknown limit": (
        {"renorm": True, "renorm_clipping": lambda batches: {"amax": 1}},
        (4, 3),
        ValueError,
        "^renorm_clipping.*amax",
    ),
    "no limits": ({"renorm": True, "renorm_clipping": lambda batches: 3}, (4, 3), TypeError, "^renorm_clipping.*3"),
    "negative limit": (
        {"renorm": True, "renorm_clipping": lambda batches: {"dmax": -1}},
        (4, 3),
        ValueError,
        r"^renorm_clipping\['dmax'\].*-1",
    ),
    "axis beyond": ({"axis": 3}, (4, 3, 3), ValueError, r"^axis.*axis=3.*\(4, 3, 3\)"),
    "axis before": ({"axis": -4}, (4, 3, 3), ValueError, r"^axis.*axis=-4.*\(4, 3, 3\)"),
    "the same axis twice": (
        {"axis": (1, -2), "num_features": (3, 3)},
        (4, 3, 5),
        ValueError,
        "^axis.*once",
    ),
    "integers, renorm": ({"renorm": True}, (4, 3), TypeError, "^input.*int64"),
    "integers, last axis": ({"axis": -1}, (4, 2, 3), TypeError, "^input.*int64"),
}


@pytest.mark.parametrize("fused", [None, False], ids=["cpu", "composed"])
@pytest.mark.parametrize("name", UNFIT)
def test_a_batch_that_does_not_fit_the_options_is_refused_and_changes_nothing(name: str, fused: bool | None) -> None:
    options, shape, error, message = UNFIT[name]
    layer: Any = BatchNorm(**{"num_features": 3, **options, "fused": fused})
    before = copied(layer)
    x = torch.ones(shape, dtype=torch.int64 if "integers" in name else torch.float32)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        layer(x)
    unchanged(layer, before)


@pytest.mark.parametrize("name", [name for name in UNFIT if "axis" in name or "features" in name])
def test_evaluation_refuses_what_does_not_fit_too(name: str) -> None:
    options, shape, _, _ = UNFIT[name]
    layer: Any = BatchNorm(**{"num_features": 3, **options}).eval()
    before = copied(layer)
    with pytest.raises((ValueError, TypeError, RuntimeError)) as info:
        layer(torch.ones(shape, dtype=torch.int64 if "integers" in name else torch.float32))
    assert not isinstance(info.value, IndexError)
    unchanged(layer, before)


def test_evaluation_takes_any_batch_whatever_the_options_of_training() -> None:
    for options in ({"virtual_batch_size": 3}, {"adjustment": never}, {"renorm": True, "renorm_clipping": never}):
        layer: Any = BatchNorm2d(3, **options).eval()
        x = torch.randn(1, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), x / (1 + layer.eps) ** 0.5)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "renorm_stddev"])
@pytest.mark.parametrize("fused", [None, False])
def test_what_is_on_another_device_is_refused_by_name(name: str, fused: bool | None) -> None:
    layer = BatchNorm2d(3, renorm=True, fused=fused)
    with torch.no_grad():
        moved = getattr(layer, name).to("meta")
    setattr(layer, name, torch.nn.Parameter(moved) if name in ("weight", "bias") else moved)
    with pytest.raises(ValueError, match=f"{name} must be on the input's device, cpu; received one on meta"):
        layer(torch.ones(4, 3, 2, 2))
    assert layer.num_batches_tracked == 0


def test_an_adjustment_on_another_device_is_refused() -> None:
    layer = BatchNorm2d(3, adjustment=lambda shape: (torch.ones(1, device="meta"), torch.zeros(1)))
    with pytest.raises(ValueError, match="adjustment must return tensors on the input's device, cpu"):
        layer(torch.ones(4, 3, 2, 2))


# A call that raises leaves no trace


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("options", [{"renorm": True}, {"virtual_batch_size": 2}, {"fused": False}, {}], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 3, 200, 60)], ids=["small", "large"])
def test_a_call_that_cannot_be_recorded_for_its_gradient_moves_nothing(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    layer: Any = BatchNorm2d(3, **options)
    before = copied(layer)
    with torch.inference_mode():
        x = torch.ones(shape)
    if layer.fused is not False:  # composed, nothing is saved that comes from outside
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            layer(x)
        unchanged(layer, before)
    if options or math.prod(shape) > 1 << 17:  # PyTorch's own operator has moved them by then
        with (
            torch.autograd.graph.saved_tensors_hooks(interrupt, lambda value: value),
            pytest.raises(KeyboardInterrupt),
        ):
            layer(torch.ones(shape))
        unchanged(layer, before)


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"renorm": True}, {"renorm": True, "fused": False}], ids=str)
def test_statistics_of_inference_mode_are_not_moved_outside_of_it(options: dict[str, Any]) -> None:
    for name in ("running_var", "num_batches_tracked", *(["renorm_stddev"] if options.get("renorm") else [])):
        layer: Any = BatchNorm2d(3, **options)
        with torch.inference_mode():
            layer._buffers[name] = getattr(layer, name).clone()
        if name != "num_batches_tracked" and layer.fused is not False:
            continue  # the kernels move them as PyTorch's own operator does
        before = copied(layer)
        with pytest.raises(RuntimeError, match=f"{name} must not be moved outside of inference mode"):
            layer(torch.rand(4, 3, 2, 2))
        unchanged(layer, before)
        with torch.inference_mode():
            layer(torch.rand(4, 3, 2, 2))
        assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["running_mean", "running_var", "renorm_mean", "renorm_stddev"])
@pytest.mark.parametrize("fused", [None, False])
def test_expanded_statistics_are_refused_before_others_move(name: str, fused: bool | None) -> None:
    statistics: dict[str, Any] = {
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "renorm_mean": torch.zeros(3),
        "renorm_stddev": torch.ones(3),
    }
    statistics[name] = torch.ones(1).expand(3)
    before = {key: value.clone() for key, value in statistics.items()}
    with pytest.raises(ValueError, match=rf"^{name} must have memory for each of its values.*strides \(0,\)"):
        batch_norm(torch.rand(4, 3), training=True, fused=fused, **statistics)
    assert all(torch.equal(value, before[key]) for key, value in statistics.items())


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "options",
    [{}, {"fused": False}, {"renorm": True}, {"virtual_batch_size": 4}, {"renorm": True, "fused": False}],
    ids=str,
)
@pytest.mark.parametrize(
    ("kept", "given", "name"),
    [
        (torch.float32, torch.float64, "float64"),
        (torch.float64, torch.float32, "float32"),
        (torch.bfloat16, torch.float32, "float32"),
        (torch.float16, torch.bfloat16, "bfloat16"),
    ],
    ids=str,
)
def test_a_type_that_is_not_the_layer_s_is_refused_whatever_the_options(
    kept: torch.dtype, given: torch.dtype, name: str, options: dict[str, Any], training: bool
) -> None:
    layer = BatchNorm1d(3, dtype=kept, **options).train(training)
    before = copied(layer)
    with pytest.raises((RuntimeError, TypeError), match=f"for an input of torch.{name}|expect|share same datatype"):
        layer(torch.rand(8, 3).to(given))
    unchanged(layer, before)
