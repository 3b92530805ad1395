"""Small networks learn scans of digits with every option, and what TensorFlow has an argument for has its own way."""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parametrize

from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, ClippingSchedule


def noise(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """A little of the adjustment that the original layer's documentation gives as an example."""
    sizes = (shape[0],) + (1,) * (len(shape) - 1)
    return torch.empty(sizes).uniform_(0.93, 1.07), torch.empty(sizes).uniform_(-0.1, 0.1)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"fused": False},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"renorm": True, "renorm_momentum": 0.1},
    {"renorm": True, "renorm_clipping": {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}},
    {"renorm": True, "renorm_clipping": ClippingSchedule(5, 3.0, 20, 5.0, 15)},
    {"virtual_batch_size": 16},
    {"renorm": True, "renorm_momentum": 0.1, "virtual_batch_size": 8},
    {"adjustment": noise},
    {"renorm": True, "renorm_momentum": 0.1, "adjustment": noise, "fused": False},
]


def name_of(options: dict[str, Any]) -> str:
    off = {id(False): "=False", id(None): "=None"}
    return "+".join(name + off.get(id(value), "") for name, value in options.items()) or "plain"


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)


def batches(number: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = digits()
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        chosen = torch.randint(len(labels), (size,), generator=generator)
        yield images[chosen], labels[chosen]


def convolutional(**options: Any) -> nn.Module:
    layers = (
        nn.Conv2d(1, 8, 3),
        BatchNorm2d(8, **options),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2),
        BatchNorm2d(8, **options),
    )
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))


def perceptron(**options: Any) -> nn.Module:
    layers = (nn.Flatten(), nn.Linear(64, 32), BatchNorm1d(32, **options), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(32, 16), BatchNorm(16, axis=-1, **options), nn.ReLU(), nn.Linear(16, 10))


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for x, labels in batches(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("make", [convolutional, perceptron])
def test_networks_learn(make: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = make(**options)
    losses = train(model, 40)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    images, labels = digits()
    with torch.no_grad():
        right = model.eval()(images).argmax(1) == labels
    assert right.float().mean() > 0.75


# --- what TensorFlow has an argument for ---

OF_EVERY_KIND: list[dict[str, Any]] = [
    {},
    {"fused": False},
    {"renorm": True, "renorm_clipping": {"rmax": 1.5, "dmax": 0.5}},
    {"virtual_batch_size": 4},
    {"adjustment": lambda shape: (torch.full([shape[0], 1], 1.1), torch.zeros(1))},
]
every_kind = pytest.mark.parametrize("options", OF_EVERY_KIND, ids=name_of)
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.arange(y.numel()).reshape(y.shape).cos()).pow(2).sum()


def differentiate(y: Tensor) -> None:
    torch.autograd.backward(loss_of(y))


@every_kind
def test_initializers_are_functions_of_torch_nn_init(options: dict[str, Any]) -> None:
    layer = BatchNorm1d(3, **options)
    nn.init.constant_(layer.weight, 0.5)
    nn.init.normal_(layer.bias)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    nn.init.constant_(layer.running_mean, 3.0)
    nn.init.constant_(layer.running_var, 4.0)
    torch.testing.assert_close(layer.eval()(X), 0.5 * (X - 3) / (4 + layer.eps) ** 0.5 + layer.bias)
    unscaled = BatchNorm1d(3, affine=False, **options)
    torch.testing.assert_close(layer.train()(X), 0.5 * unscaled(X) + layer.bias)
    torch.testing.assert_close(layer.running_mean, 0.9 * 3 + 0.1 * X.mean(0))


@every_kind
def test_a_regularizer_is_a_term_of_the_loss_or_the_weight_decay_of_a_group(options: dict[str, Any]) -> None:
    penalized = BatchNorm1d(3, **options)
    nn.init.uniform_(penalized.weight, 1.0, 2.0)
    decayed = copy.deepcopy(penalized)
    torch.autograd.backward(loss_of(penalized(X)) + 0.5 * 0.3 * penalized.weight.square().sum())
    torch.optim.SGD(penalized.parameters(), 0.01).step()
    differentiate(decayed(X))
    groups: list[dict[str, Any]] = [{"params": [decayed.weight], "weight_decay": 0.3}, {"params": [decayed.bias]}]
    torch.optim.SGD(groups, 0.01).step()
    torch.testing.assert_close(dict(penalized.state_dict()), dict(decayed.state_dict()))


class NonNegative(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.clamp(min=0)


@every_kind
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_constraint_is_a_parametrization(options: dict[str, Any], training: bool) -> None:
    layer = BatchNorm1d(3, **options).train(training)
    free = torch.tensor([-1.0, 0.5, 2.0])
    with torch.no_grad():
        layer.weight.copy_(free)
    twin = copy.deepcopy(layer)
    parametrize.register_parametrization(layer, "weight", NonNegative())
    with torch.no_grad():
        twin.weight.clamp_(min=0)
    y, expected = layer(X), twin(X)
    torch.testing.assert_close(y, expected)
    differentiate(y)
    differentiate(expected)
    parametrizations: Any = layer.parametrizations
    assert twin.weight.grad is not None
    torch.testing.assert_close(parametrizations.weight.original.grad, twin.weight.grad * (free > 0))
    torch.testing.assert_close(layer.running_mean, twin.running_mean)
    optimizer = torch.optim.SGD(layer.parameters(), 10.0)
    optimizer.step()
    assert (layer.weight >= 0).all()


@every_kind
def test_not_trainable_means_that_parameters_need_no_gradient(options: dict[str, Any]) -> None:
    frozen, twin = BatchNorm1d(3, **options).requires_grad_(False), BatchNorm1d(3, **options)
    x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
    differentiate(frozen(x))
    differentiate(twin(z))
    assert all(parameter.grad is None for parameter in frozen.parameters())
    torch.testing.assert_close(x.grad, z.grad)
    torch.testing.assert_close(dict(frozen.named_buffers()), dict(twin.named_buffers()))
    assert not frozen(X).requires_grad


@every_kind
def test_eval_freezes_statistics_and_parameters_train_on(options: dict[str, Any]) -> None:
    layer = BatchNorm1d(3, **options)
    layer(X)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.eval()
    differentiate(layer(X))
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert not torch.equal(layer.weight, torch.ones(3))
    assert not torch.equal(layer.bias, torch.zeros(3))


def test_a_name_is_where_a_layer_is_in_its_module() -> None:
    layer = BatchNorm1d(3, renorm=True)
    model = nn.Sequential(collections.OrderedDict(linear=nn.Linear(2, 3), normalize=layer))
    assert dict(model.named_modules())["normalize"] is layer
    assert [name for name in model.state_dict() if name.startswith("normalize.")] == [
        f"normalize.{name}"
        for name in (
            "weight",
            "bias",
            "running_mean",
            "running_var",
            "num_batches_tracked",
            "renorm_mean",
            "renorm_stddev",
        )
    ]


@every_kind
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_updates_happen_in_the_call_and_need_no_other_step(context: Any, options: dict[str, Any]) -> None:
    layer = BatchNorm1d(3, **options)
    for number in range(1, 3):
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        with context():
            layer(X)
        assert all(not torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
        assert layer.num_batches_tracked == number
    torch.testing.assert_close(layer.running_mean, (1 - 0.9**2) * X.mean(0))
