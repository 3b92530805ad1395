"""Which statistics normalize and whether they move: `hold`, `freeze`, `recalibrate`, on our layers and on torch's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm.torch as ours
from batchnorm.torch import freeze, hold, recalibrate, unfreeze

MAKE: dict[str, Any] = {
    "torch": lambda: nn.BatchNorm2d(3),
    "plain": lambda: ours.BatchNorm2d(3),
    "cumulative": lambda: ours.BatchNorm2d(3, momentum=None),
    "renorm": lambda: ours.BatchNorm2d(3, renorm=True),
    "composed renorm": lambda: ours.BatchNorm2d(3, renorm=True, fused=False),
    "virtual batches": lambda: ours.BatchNorm2d(3, virtual_batch_size=2),
    "adjustment": lambda: ours.BatchNorm2d(3, adjustment=lambda shape: (torch.tensor(1.5), torch.tensor(0.5))),
    "two axes": lambda: ours.BatchNorm((3, 5), axis=(1, 2), renorm=True),
}
every_layer = pytest.mark.parametrize("make", MAKE.values(), ids=list(MAKE))
LARGE = (4, 3, 5, 2500)


def batch(step: int = 0, shape: tuple[int, ...] = (4, 3, 5, 2)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 2 + step


def trained(make: Any) -> Any:
    layer = make()
    for step in range(3):
        layer(batch(step))
    return layer


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_same(layer: nn.Module, before: dict[str, Tensor]) -> None:
    now = layer.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in now.items())


# --- hold ---


@pytest.mark.parametrize("shape", [(4, 3, 5, 2), LARGE], ids=["small", "large"])
@every_layer
def test_held_layers_normalize_by_the_batch_and_move_nothing(make: Any, shape: tuple[int, ...]) -> None:
    layer = trained(make)
    twin, before = copy.deepcopy(layer), state(layer)
    x, twin_x = (batch(3, shape).requires_grad_() for _ in range(2))
    with hold(layer) as held:
        assert held is layer
        y = layer(x)
    expected = twin(twin_x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.autograd.backward(y.square().sum())
    torch.autograd.backward(expected.square().sum())
    torch.testing.assert_close(x.grad, twin_x.grad, rtol=0, atol=0)
    assert_same(layer, before)
    layer(x.detach())
    assert_same(layer, state(twin))


@every_layer
def test_an_error_ends_the_hold(make: Any) -> None:
    layer = trained(make)
    with pytest.raises(KeyError), hold(layer):
        raise KeyError
    before = state(layer)
    layer(batch(5))
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1


def test_evaluation_is_not_concerned_and_holds_nest() -> None:
    layer = trained(MAKE["renorm"]).eval()
    expected = layer(batch(3))
    with hold(layer), hold(nn.Sequential(layer)):
        assert torch.equal(layer(batch(3)), expected)
        assert layer.options.renorm
        layer.eps = layer.eps
    assert layer.track_running_stats
    untracked = ours.BatchNorm2d(3, track_running_stats=False)
    with hold(untracked):
        untracked(batch())
    assert not untracked.track_running_stats


def test_the_second_pass_of_sam_counts_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), ours.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    twin = copy.deepcopy(model)
    twin(batch(1))
    model(batch(1))
    with hold(model):
        model(batch(1))
    assert_same(model, state(twin))


@pytest.mark.slow
def test_a_held_layer_compiles() -> None:
    layer, twin = trained(MAKE["renorm"]), trained(MAKE["renorm"])
    torch._dynamo.reset()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    before = state(layer)
    with hold(layer), hold(twin):
        torch.testing.assert_close(compiled(batch(3)), twin(batch(3)))
        assert_same(layer, before)
    compiled(batch(3))
    assert layer.num_batches_tracked == 4


# --- freeze ---


@every_layer
def test_frozen_layers_normalize_as_in_evaluation_whatever_the_mode(make: Any) -> None:
    layer = trained(make)
    expected, before = copy.deepcopy(layer).eval()(batch(3)), state(layer)
    assert freeze(freeze(layer)) is layer
    for change in (layer.eval, layer.train):
        change()
        for other in (layer, copy.deepcopy(layer), *([pickle.loads(pickle.dumps(layer))] if _pickles(layer) else [])):
            other.train(layer.training)
            y = other(batch(3))
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
            torch.autograd.backward(y.sum())
            assert other.bias.grad is not None
            assert_same(other, before)


def _pickles(layer: nn.Module) -> bool:
    return getattr(layer, "adjustment", None) is None  # a lambda


@every_layer
def test_unfrozen_layers_train_again(make: Any) -> None:
    model, twin = (nn.Sequential(trained(make)) for _ in range(2))
    unfreeze(freeze(model))
    torch.testing.assert_close(model(batch(4)), twin(batch(4)), rtol=0, atol=0)
    assert_same(model, state(twin))
    assert not model[0]._forward_pre_hooks
    assert not unfreeze(freeze(model.eval()))[0].training


def test_a_layer_without_statistics_cannot_be_frozen_and_then_none_is() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), ours.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"model must have running statistics.*; 1 \(BatchNorm2d\) has none"):
        freeze(model)
    assert not model[0]._forward_pre_hooks
    assert model[0].training


# --- recalibrate ---


def moments(data: list[Tensor], axes: tuple[int, ...]) -> tuple[Any, Any, int]:
    values = np.concatenate([x.double().numpy() for x in data])
    reduced = tuple(axis for axis in range(values.ndim) if axis not in axes)
    count = int(np.prod([values.shape[axis] for axis in reduced]))
    return values.mean(reduced), values.var(reduced), count


@every_layer
def test_recalibrated_statistics_are_those_of_all_data_together(make: Any) -> None:
    layer = trained(make)
    data = [batch(step, (size, 3, 5, 2)) + 100 for step, size in enumerate((4, 3, 7, 2))]
    mean, variance, count = moments(data, layer.axes(data[0]) if hasattr(layer, "axes") else (1,))
    before = state(layer)
    frozen = freeze(trained(make))
    model = nn.Sequential(layer, frozen).eval()
    assert recalibrate(model, data) is model
    renorm = getattr(layer, "renorm", False)
    expected = {"running_mean": mean, "running_var": variance if renorm else variance * count / (count - 1)}
    if renorm:
        expected |= {"renorm_mean": mean, "renorm_stddev": np.sqrt(variance + layer.eps)}
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(layer, name).numpy(), value, rtol=2e-6)
    assert layer.num_batches_tracked == before["num_batches_tracked"]
    assert not layer.training
    assert layer.track_running_stats
    assert_same(frozen, before)


def test_recalibration_normalizes_by_the_batch_and_leaves_other_modules_as_they_are() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Dropout(), ours.BatchNorm1d(2)).eval()
    data = [torch.randn(64, 2) * 3 + step for step in range(3)]
    recalibrate(model, [(x, None) for x in data])
    np.testing.assert_allclose(model[0].running_mean, moments(data, (1,))[0], rtol=1e-5)
    # Of the second layer all inputs have mean 0 and variance 1 in each batch.
    torch.testing.assert_close(model[2].running_mean, torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(model[2].running_var, torch.full([2], 192 / 191), atol=1e-3, rtol=0)


def test_recalibration_takes_any_call_and_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    layer = ours.BatchNorm1d(1)
    recalibrate(layer, [{"x": torch.tensor([[1.0], [2.0], [6.0]])}], call=lambda model, batch: model(input=batch["x"]))
    assert layer.running_mean == 3
    assert layer.running_var == 7


@every_layer
def test_a_recalibration_that_fails_or_sees_nothing_changes_nothing(make: Any) -> None:
    layer = trained(make)
    before = state(layer)
    recalibrate(layer, [])
    assert_same(layer, before)

    def failing() -> Any:
        yield batch(1)
        raise KeyError

    with pytest.raises(KeyError):
        recalibrate(layer, failing())
    assert_same(layer, before)
    assert layer.training
    assert layer.track_running_stats
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize(
    "call",
    [
        lambda: hold("x").__enter__(),  # type: ignore[type-var]
        lambda: freeze("x"),  # type: ignore[type-var]
        lambda: unfreeze("x"),  # type: ignore[type-var]
        lambda: recalibrate("x", []),  # type: ignore[type-var]
    ],
)
def test_what_is_no_model_is_refused(call: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; received 'x' of type str"):
        call()
