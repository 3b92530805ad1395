"""The layers within the machinery of PyTorch: compiled, exported, transformed, copied, distributed, and so on."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import functools
import importlib
import io
import logging
import pathlib
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, stack_module_state, vmap
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, ClippingSchedule

Make = functools.partial[Any]


def tilt(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """An adjustment that is different for every sample, without chance and for any rank."""
    ramp = 0.1 * torch.arange(shape[0]).reshape([-1] + [1] * (len(shape) - 1))
    return 0.8 + ramp, ramp - 0.3


# The averages move far in every step, so that their values of before and after a step cannot be mistaken.
RENORM: dict[str, Any] = {"renorm": True, "renorm_momentum": 0.5}
CLIPPED: dict[str, Any] = {**RENORM, "renorm_clipping": {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}}
SCHEDULED: dict[str, Any] = {**RENORM, "renorm_clipping": ClippingSchedule(1, 3.0, 3, 5.0, 4)}
LAYERS: dict[str, Make] = {
    "plain": functools.partial(BatchNorm2d, 4),
    "composed": functools.partial(BatchNorm2d, 4, fused=False),
    "cumulative": functools.partial(BatchNorm2d, 4, momentum=None),
    "untracked": functools.partial(BatchNorm2d, 4, track_running_stats=False),
    "not affine": functools.partial(BatchNorm2d, 4, affine=False),
    "renorm": functools.partial(BatchNorm2d, 4, **CLIPPED),
    "schedule": functools.partial(BatchNorm2d, 4, **SCHEDULED),
    "composed renorm": functools.partial(BatchNorm2d, 4, momentum=None, **SCHEDULED, fused=False),
    "virtual": functools.partial(BatchNorm2d, 4, virtual_batch_size=2),
    "virtual renorm": functools.partial(BatchNorm2d, 4, virtual_batch_size=4, **RENORM),
    "adjustment": functools.partial(BatchNorm2d, 4, adjustment=tilt),
    "last axis": functools.partial(BatchNorm, 5, axis=-1),
    "two axes": functools.partial(BatchNorm, (4, 5), axis=(1, 3), **CLIPPED),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=list(LAYERS))
of_channels = {name: make for name, make in LAYERS.items() if make.func is BatchNorm2d}
every_layer_of_channels = pytest.mark.parametrize("make", of_channels.values(), ids=list(of_channels))
BATCHES = [torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step)) + step for step in range(3)]


def network(make: Make) -> Any:
    """A convolution to [..., 4, 5, 5], a layer whose parameters are not 0 and 1, and something nonlinear."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), make(), nn.Tanh())
    for parameter in model[1].parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def trained(make: Make) -> Any:
    model = network(make)
    train(model)
    return model


def train(model: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Outputs and gradients of some steps of training, and the buffers after them."""
    results = []
    for batch in BATCHES:
        x = batch.clone().requires_grad_()
        model.zero_grad()
        y = (call or model)(x)
        differentiate(y)
        results += [y.detach(), *gradients(x, model)]
    return results + [buffer.clone() for buffer in model.buffers()]


def loss(y: Tensor) -> Tensor:
    return y.pow(3).mean()


def differentiate(y: Tensor) -> None:
    torch.autograd.backward(loss(y))


def gradients(*owners: Tensor | nn.Module) -> list[Tensor]:
    tensors: list[Tensor] = []
    for owner in owners:
        tensors += [owner] if isinstance(owner, Tensor) else list(owner.parameters())
    found = [tensor.grad.clone() for tensor in tensors if tensor.grad is not None]
    assert len(found) == len(tensors)
    return found


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=10 * tolerance, atol=tolerance)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # pytest would format and keep every record of the trace.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    importlib.import_module("torch._dynamo.testing")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- compiled and exported ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["plain", "cumulative", "composed renorm", "schedule", "virtual renorm", "adjustment", "two axes"]
)
@pytest.mark.usefixtures("compiler")
def test_a_model_compiles_once_as_one_graph_and_trains_and_infers_as_without(name: str) -> None:
    model, twin = network(LAYERS[name]), network(LAYERS[name])
    counter: Any = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    assert_close(train(model, compiled), train(twin))
    assert counter.frame_count == 1
    model.eval()
    assert_close(compiled(BATCHES[0]), twin.eval()(BATCHES[0]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what inductor imports
@pytest.mark.usefixtures("compiler")
def test_inductor_s_code_trains_as_without() -> None:
    model, twin = network(LAYERS["composed renorm"]), network(LAYERS["composed renorm"])
    assert_close(train(model, torch.compile(model, fullgraph=True)), train(twin), 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_one_graph_serves_every_batch_size() -> None:
    layer, twin = LAYERS["virtual renorm"](), LAYERS["virtual renorm"]()
    counter: Any = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for size in (8, 12, 16):
        x = torch.randn(size, 4, 5, 7)
        y, expected = compiled(x), twin(x)
        differentiate(y)
        differentiate(expected)
        assert_close(y, expected)
        graphs.append(counter.frame_count)
    assert_close(gradients(layer), gradients(twin))
    assert_close(layer.state_dict(), twin.state_dict())
    assert graphs[0] == graphs[-1]


@pytest.mark.parametrize("name", ["plain", "untracked", "not affine"])
def test_an_exported_model_trains_and_moves_its_buffers(name: str) -> None:
    make = LAYERS[name]
    model, twin = network(make), network(make)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (BATCHES[0],), dynamic_shapes=dynamic).module()
    assert_close(model.state_dict(), twin.state_dict(), 0)
    for batch in (*BATCHES, torch.cat(BATCHES)):
        assert_close(exported(batch), twin(batch))
    expected = dict(twin.named_buffers())
    assert {name: buffer for name, buffer in exported.named_buffers() if name in expected}.keys() == expected.keys()
    for name, buffer in exported.named_buffers():
        assert_close(buffer, expected[name])


@every_layer
def test_an_exported_model_infers_with_torch_s_own_operators_alone(make: Make) -> None:
    model = trained(make).eval()
    program = torch.export.export(model, (BATCHES[0],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {one.namespace for one in called if isinstance(one, torch._ops.OpOverload)} == {"aten"}
    layer = model[1]
    if layer.axis == 1 and layer.fused is not False and layer.track_running_stats:
        # One operator, which every exporter knows: ONNX has BatchNormalization for it.
        aten = torch.ops.aten
        assert called == [aten.conv2d.default, aten.batch_norm.default, aten.tanh.default]
    assert_close(program.module()(BATCHES[1][:5]), model(BATCHES[1][:5]))


@every_layer
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "bfloat16"])
def test_fake_tensors_have_the_form_of_real_ones(make: Make, training: bool, form: str) -> None:
    def forms() -> list[Any]:
        layer = make().train(training)
        x = torch.ones([8, 4, 5, 5], dtype=torch.bfloat16 if form == "bfloat16" else None)
        x = x.to(memory_format=torch.channels_last if form == "channels_last" else torch.preserve_format)
        x.requires_grad_()
        y = layer(x)
        torch.autograd.backward(y.sum())
        results = [y, *gradients(x, layer), *layer.buffers()]
        return [(one.shape, one.stride(), one.dtype, one.device) for one in results]

    with FakeTensorMode():
        fake = forms()
    assert fake == forms()


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every call of an operator of this package, with its arguments as they were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "batchnorm":
            self.calls.append((func, *tree_map_only(Tensor, clone, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("plain", "channels_last"),
        ("not affine", "strided"),
        ("virtual renorm", "bfloat16"),
        ("by feature", "channels_last"),
        ("two axes", "contiguous"),
    ],
)
def test_operators_are_what_they_say(name: str, form: str) -> None:
    by_feature = functools.partial(BatchNorm2d, 4, adjustment=lambda shape: (torch.rand(4, 1, 1), torch.rand(4, 1, 1)))
    layer = LAYERS.get(name, by_feature)()
    x = torch.randn([8, 4, 70, 5], dtype=torch.bfloat16 if form == "bfloat16" else None)
    if form == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if form == "strided":
        x = x.mT.contiguous().mT
    x.requires_grad_()
    with Recorder() as recorder:
        y = layer(x)
        torch.autograd.grad(loss(y), x, create_graph=True)
    assert [str(func) for func, _, _ in recorder.calls] == ["batchnorm.forward.default", "batchnorm.backward.default"]
    for func, args, kwargs in recorder.calls:
        assert args[0].requires_grad
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"fused": False}])
def test_parameters_and_buffers_may_be_parametrized_or_plain_attributes(
    options: dict[str, Any], training: bool
) -> None:
    class Doubled(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

    x = torch.randn(8, 3)
    layer = BatchNorm1d(3, **options).train(training)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.weight.fill_(2)
        assert expected.running_mean is not None
        expected.running_mean.fill_(0.5)
    register_parametrization(layer, "weight", Doubled())
    del layer.running_mean
    layer.running_mean = torch.full((3,), 0.5)
    assert_close(layer(x), expected(x))
    assert_close(layer.running_mean, expected.running_mean)


# --- transformed ---


@every_layer
def test_functional_call_takes_parameters_and_buffers_from_outside(make: Make) -> None:
    model, twin = network(make), network(make)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    before = copy.deepcopy(model.state_dict())
    for batch in BATCHES:
        assert_close(functional_call(model, state, batch), twin(batch))
    assert_close(state, dict(twin.state_dict()))
    assert_close(model.state_dict(), before, 0)


@every_layer
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_grad_differentiates_as_backward_does(make: Make, training: bool) -> None:
    model = trained(make).train(training)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def function(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return loss(functional_call(model, (parameters, buffers), BATCHES[0]))

    found = grad(function)(parameters, buffers)
    model.zero_grad()
    differentiate(model(BATCHES[0]))
    assert_close(list(found.values()), gradients(model))
    assert_close(list(buffers.values()), list(model.buffers()))


def ensemble(make: Make) -> list[Any]:
    models = [trained(make) for _ in range(3)]
    for seed, model in enumerate(models):
        model[1].load_state_dict(
            {
                name: tensor + seed * torch.rand(tensor.shape) if tensor.is_floating_point() else tensor
                for name, tensor in model[1].state_dict().items()
            }
        )
    return models


@every_layer
def test_vmap_runs_an_ensemble_in_evaluation(make: Make) -> None:
    models = [model.eval() for model in ensemble(make)]
    parameters, buffers = stack_module_state(models)
    y = vmap(lambda *state: functional_call(models[0], state, BATCHES[0]))(parameters, buffers)
    assert_close(y, torch.stack([model(BATCHES[0]) for model in models]))


@every_layer
def test_vmap_trains_an_ensemble_whose_statistics_were_taken_away(make: Make) -> None:
    models = [replace_all_batch_norm_modules_(model) for model in ensemble(make)]
    parameters, buffers = stack_module_state(models)

    def function(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return loss(functional_call(models[0], (parameters, buffers), x))

    found = vmap(grad(function))(parameters, buffers, torch.stack(BATCHES))
    for model, batch in zip(models, BATCHES, strict=True):
        model.zero_grad()
        differentiate(model(batch))
    expected = [torch.stack(some) for some in zip(*map(gradients, models), strict=True)]
    assert_close(list(found.values()), expected)


@every_layer
def test_a_layer_whose_statistics_were_taken_away_normalizes_by_the_batch_in_either_mode(make: Make) -> None:
    model = trained(make)
    kind: Any = type(model[1])
    untracked = network(functools.partial(kind, **without_statistics(model[1])))
    untracked.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "n_" not in name}, False)
    before = copy.deepcopy(model.state_dict())
    assert replace_all_batch_norm_modules_(model) is model
    for training in (True, False):
        assert_close(model.train(training)(BATCHES[2]), untracked.train(training)(BATCHES[2]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def without_statistics(layer: Any) -> dict[str, Any]:
    """Arguments of a layer like this one that never had statistics."""
    names = ("num_features", "affine", "virtual_batch_size", "adjustment", *["axis"] * isinstance(layer, BatchNorm))
    return {**{name: getattr(layer, name) for name in names}, "track_running_stats": False}


@every_layer
def test_per_sample_gradients_in_evaluation(make: Make) -> None:
    model = trained(make).eval()
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def function(state: dict[str, Tensor], sample: Tensor) -> Tensor:
        return loss(functional_call(model, state, sample[None]))

    weights = {name: state.pop(name) for name in ["0.weight", "0.bias"]}
    found = vmap(grad(lambda weights, sample: function({**state, **weights}, sample)), (None, 0))(weights, BATCHES[0])
    for index, sample in enumerate(BATCHES[0]):
        model.zero_grad()
        differentiate(model(sample[None]))
        assert_close([one[index] for one in found.values()], gradients(model[0]))


# --- types, devices and places in memory ---


@every_layer
def test_autocast_gives_the_types_that_it_gives_with_torch_s_layer(make: Make) -> None:
    def run(model: Any) -> tuple[Tensor, list[torch.dtype], list[torch.dtype]]:
        x = BATCHES[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model[1](model[0](x))
            value = loss(y)
        torch.autograd.backward(value)
        return y, [one.dtype for one in (y, value, *gradients(x, model))], [one.dtype for one in model.buffers()]

    ours = run(network(make))
    theirs = run(network(functools.partial(nn.BatchNorm2d, 4, affine=make is not LAYERS["not affine"])))
    assert ours[1] == theirs[1]
    assert set(ours[2]) <= set(theirs[2])
    if make in (LAYERS["plain"], LAYERS["composed"], LAYERS["cumulative"]):
        assert_close(ours[0], theirs[0], 2e-2)


@every_layer_of_channels
def test_a_channels_last_model_stays_so_and_computes_the_same(make: Make) -> None:
    twin = network(make)
    model = copy.deepcopy(twin).to(memory_format=torch.channels_last)
    for batch in BATCHES:
        x = batch.clone().requires_grad_()
        z = batch.to(memory_format=torch.channels_last, copy=True).requires_grad_()
        y, expected = model(z), twin(x)
        differentiate(y)
        differentiate(expected)
        assert z.grad is not None
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert z.grad.is_contiguous(memory_format=torch.channels_last)
        assert_close([y, *gradients(z, model)], [expected, *gradients(x, twin)], 1e-5)
    assert_close(list(model.buffers()), list(twin.buffers()))
    assert model.eval()(z).is_contiguous(memory_format=torch.channels_last)


@every_layer
def test_a_layer_is_made_without_memory_and_gets_it_later(make: Make) -> None:
    with torch.device("meta"):
        layer: Any = make()
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
        if layer.momentum is not None:  # which takes the value of a tensor, with torch's layer as well
            y = layer(torch.empty(8, 4, 5, 5))
            assert y.is_meta
            assert y.shape == (8, 4, 5, 5)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert_close(layer.state_dict(), make().state_dict(), 0)
    x = BATCHES[0][:, :1, :5, :5].repeat(1, 4, 1, 1)
    assert_close(layer(x), make()(x), 0)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@every_layer
def test_the_default_type_is_that_of_every_new_tensor(make: Make) -> None:
    with default_dtype(torch.float64):
        layer = make()
        y = layer(torch.randn(8, 4, 5, 5))
    types = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert types.pop("num_batches_tracked", torch.int64) == torch.int64
    assert {y.dtype, *types.values()} == {torch.float64}


# --- copied and saved ---


def through_pickle(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_a_file])
def test_copies_go_on_from_where_the_model_was(make: Make, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = trained(make)
    twin = copied(model)
    before = copy.deepcopy(twin.state_dict())
    expected = train(model)
    assert_close(twin.state_dict(), before, 0)
    assert_close(train(twin), expected, 0)
    assert repr(twin) == repr(model)


@every_layer
def test_state_dicts_pass_through_files_of_weights_only(make: Make, tmp_path: pathlib.Path) -> None:
    model = trained(make)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    twin = network(make)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_close(train(twin), train(model), 0)


# --- distributed, recomputed, averaged, fused ---


DISTRIBUTED = ["plain", "cumulative", "renorm", "virtual renorm", "adjustment"]


def replica(rank: int, directory: str) -> None:
    """Train every model in one of two processes, and save what came of it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{directory}/meeting", rank=rank, world_size=2)
    results = {}
    for name in DISTRIBUTED:
        model = network(LAYERS[name])
        results[name] = distributed_steps([nn.parallel.DistributedDataParallel(model)], [model], [rank])[0]
    torch.save(results, f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


def distributed_steps(calls: list[Any], models: list[Any], ranks: list[int]) -> list[list[Tensor]]:
    """Train models, each on the half batch of its rank; with several, do here what their processes would."""
    results: list[list[Tensor]] = [[] for _ in models]
    for batch in BATCHES:
        for model in models:
            model.zero_grad()
            for buffer, first in zip(model.buffers(), models[0].buffers(), strict=True):
                buffer.copy_(first)
        for result, call, rank in zip(results, calls, ranks, strict=True):
            y = call(batch.chunk(2)[rank])
            differentiate(y)
            result.append(y.detach())
        means = [torch.stack(some).mean(0) for some in zip(*map(gradients, models), strict=True)]
        for result, model in zip(results, models, strict=True):
            with torch.no_grad():
                for parameter, mean in zip(model.parameters(), means, strict=True):
                    parameter.sub_(mean, alpha=0.1)
            result += [mean.clone() for mean in means]
            result += [tensor.detach().clone() for tensor in model.state_dict().values()]
    return results


@pytest.mark.slow
def test_replicas_in_two_processes_average_gradients_and_keep_the_first_one_s_buffers(tmp_path: pathlib.Path) -> None:
    torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
        replica, (str(tmp_path),), nprocs=2
    )
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in DISTRIBUTED:
        models = [network(LAYERS[name]), network(LAYERS[name])]
        expected = distributed_steps(models, models, [0, 1])
        for rank in range(2):
            assert_close(found[rank][name], expected[rank])


@every_layer
def test_recomputed_activations_give_the_same_gradients_and_move_the_averages_again(make: Make) -> None:
    model, twin = network(make), network(make)
    if hasattr(model[1], "renorm_momentum"):
        # Renorm's own averages take part in the output: only where they stay does a second pass compute the same.
        for one in (model, twin):
            one[1].renorm_momentum = 0.0
            if isinstance(one[1].renorm_clipping, ClippingSchedule):
                one[1].renorm_clipping = ClippingSchedule(10, rmax_end=11, dmax_end=11)(0)
    y = checkpoint(model, BATCHES[1], use_reentrant=False)
    differentiate(y)
    differentiate(twin(BATCHES[1]))
    assert_close(gradients(model), gradients(twin), 0)
    twin(BATCHES[1])
    assert_close(list(model.buffers()), list(twin.buffers()), 0)


def test_recomputation_moves_the_averages_as_torch_s_layer_does() -> None:
    ours, theirs = network(LAYERS["plain"]), network(functools.partial(nn.BatchNorm2d, 4))
    for model in (ours, theirs):
        differentiate(checkpoint(model, BATCHES[1], use_reentrant=False))
    assert_close(gradients(ours), gradients(theirs))
    assert_close(ours.state_dict(), theirs.state_dict())


@every_layer
def test_update_bn_estimates_the_statistics_anew(make: Make) -> None:
    model = trained(make)
    layer: Any = model[1]
    momentum = layer.momentum
    batches = [batch + 5 for batch in BATCHES]
    torch.optim.swa_utils.update_bn(batches, model)
    assert layer.momentum == momentum
    if not layer.track_running_stats:
        return
    features = model[0](torch.cat(batches)).detach()
    reduced = {4: (0, 2, 3), 5: (0, 1, 2), (4, 5): (0, 2)}[layer.num_features]
    assert layer.num_batches_tracked == len(batches)
    assert_close(layer.running_mean, features.mean(reduced))
    # The mean of the batches' own variances: less than that of all data, whose batches have different means.
    within = torch.stack([model[0](batch).detach().var(reduced) for batch in batches]).mean(0)
    if layer.virtual_batch_size is None and not layer.renorm:
        assert_close(layer.running_var, within)
    else:
        torch.testing.assert_close(layer.running_var, within, rtol=0.3, atol=0)
    assert model.eval()(batches[0]).isfinite().all()


def test_update_bn_gives_what_it_gives_to_torch_s_layer() -> None:
    ours, theirs = trained(LAYERS["plain"]), trained(functools.partial(nn.BatchNorm2d, 4))
    for model in (ours, theirs):
        torch.optim.swa_utils.update_bn([batch[: 4 + 2 * i] for i, batch in enumerate(BATCHES)], model)
    assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", ["plain", "cumulative", "renorm", "virtual", "adjustment"])
def test_a_layer_can_be_folded_into_the_convolution_before_it(name: str) -> None:
    model: Any = trained(LAYERS[name]).eval()
    assert_close(fuse_conv_bn_eval(model[0], model[1])(BATCHES[0]).tanh(), model(BATCHES[0]), 1e-5)


# --- threads ---


@every_layer
def test_threads_train_their_own_models_and_share_one_that_infers(make: Make) -> None:
    model = network(make)
    expected = train(copy.deepcopy(model))
    shared = trained(make).eval()
    output = shared(BATCHES[0])

    def run(own: nn.Module) -> tuple[list[Tensor], Tensor]:
        return train(own), shared(BATCHES[0])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for results, shared_output in pool.map(run, [copy.deepcopy(model) for _ in range(12)]):
            assert_close(results, expected)
            assert_close(shared_output, output)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "virtual renorm"])
def test_onnx_gets_a_batch_normalization_of_its_own(name: str, tmp_path: pathlib.Path) -> None:
    model = torch.nn.Sequential(torch.nn.ReLU(), LAYERS[name]()).eval()
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(model, (torch.randn(8, 4, 6, 6),), path, dynamo=True, verbose=False)
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes == ["Relu", "BatchNormalization"]
