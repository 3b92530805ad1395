"""Programs of others that look for, trace, export, fuse, quantize or freeze batch normalization layers."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import fuse_modules, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, convert, revert

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True},
    "virtual batches": {"virtual_batch_size": 2},
    "adjustment": {"adjustment": lambda shape: (torch.tensor(1.5), torch.tensor(0.5))},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
with_options = pytest.mark.parametrize("options", list(OPTIONS.values())[1:], ids=list(OPTIONS)[1:])
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 1


def network(**options: Any) -> Any:
    """A convolution, our layer with averages that have moved, and something nonlinear."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4, **options), nn.ReLU())
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    for step in range(3):
        model(X + step)
    return model


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# --- found by class ---


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(BatchNorm1d, nn.BatchNorm1d), (BatchNorm2d, nn.BatchNorm2d), (BatchNorm3d, nn.BatchNorm3d)],
)
def test_a_layer_is_of_the_class_that_programs_look_for(ours: Any, theirs: Any) -> None:
    assert isinstance(ours(3, renorm=True), theirs)
    assert not isinstance(BatchNorm(3), theirs)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what it imports
@every_option
def test_fvcore_estimates_precise_statistics(options: dict[str, Any]) -> None:
    from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats

    model = network(**options)
    assert get_bn_modules(model) == [model[1]]
    features = [model[0](X + step).detach() for step in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        update_bn_stats(model, [X + step for step in range(3)], num_iters=3, progress=None)
    assert_close(model[1].running_mean, torch.cat(features).mean((0, 2, 3)))


@every_option
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what it imports
def test_timm_freezes_a_layer_in_evaluation_and_averages_its_state(options: dict[str, Any], timm: Any) -> None:
    model = network(**options)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    before = copy.deepcopy(average.module.state_dict())
    model(X + 5)
    average.update(model)
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            assert_close(value, (before[name] + model.state_dict()[name]) / 2)
    expected = model.eval()(X)
    frozen = timm.layers.freeze_batch_norm_2d(model.train())
    assert type(frozen[1]).__name__ == "FrozenBatchNorm2d"
    assert_close(frozen(X), expected)


# --- traced symbolically ---


@every_option
def test_symbolic_traces_keep_a_layer_as_one_call_of_it(options: dict[str, Any]) -> None:
    model = network(**options)
    traced = fx.symbolic_trace(model)
    calls = [traced.get_submodule(str(node.target)) for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == [model[0], model[1], model[2]]
    twin = copy.deepcopy(model)
    assert_close(traced(X), twin(X))
    assert_close(dict(traced.state_dict()), dict(twin.state_dict()))
    assert_close(traced.eval()(X), twin.eval()(X))


def test_a_layer_alone_is_not_traced_symbolically_and_says_what_to_trace() -> None:
    with pytest.raises(TypeError, match=r"BatchNorm2d cannot be traced by itself.*torch\.nn\.Sequential"):
        fx.symbolic_trace(BatchNorm2d(3))


# --- recorded by torch.jit and for ONNX ---


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (functools.partial(BatchNorm2d, 4), (2, 4, 5, 3)),
        (functools.partial(BatchNorm2d, 4, fused=False), (2, 4, 5, 3)),
        (functools.partial(BatchNorm2d, 4, renorm=True, virtual_batch_size=4), (2, 4, 5, 3)),
        (functools.partial(BatchNorm, 4, axis=-1), (2, 5, 5, 4)),
        (functools.partial(BatchNorm, (4, 5), axis=(1, 2)), (2, 4, 5, 3)),
    ],
)
def test_a_trace_of_evaluation_is_saved_and_takes_other_batches(
    make: Callable[[], Any], shape: tuple[int, ...]
) -> None:
    layer = make()
    x = torch.randn(8, *shape[1:]) + 1
    layer(x)
    layer.eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, torch.randn(shape)), file)  # type: ignore[no-untyped-call]
    loaded = torch.jit.load(io.BytesIO(file.getvalue()))  # type: ignore[no-untyped-call]
    assert_close(loaded(x), layer(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_of_plain_training_trains() -> None:
    layer, twin = BatchNorm2d(3), BatchNorm2d(3)
    traced = torch.jit.trace(layer, X, check_trace=False)  # type: ignore[no-untyped-call]
    layer.load_state_dict(twin.state_dict())
    assert_close(traced(X), twin(X))
    assert_close(traced.running_var, twin.running_var)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@with_options
def test_a_trace_of_training_with_an_option_is_refused_and_moves_nothing(options: dict[str, Any]) -> None:
    model = network(**options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotImplementedError, match=r"cannot be exported or recorded.*model\.eval\(\)"):
        torch.jit.trace(model, X)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@every_option
def test_a_script_of_evaluation_is_saved(options: dict[str, Any]) -> None:
    model = network(**options).eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    loaded = torch.jit.load(io.BytesIO(file.getvalue()))  # type: ignore[no-untyped-call]
    assert_close(loaded(X), model(X))
    assert type(model[1]) is BatchNorm2d


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("layer", [BatchNorm2d(3), BatchNorm(3, axis=-1).eval()], ids=["training", "another axis"])
def test_a_script_of_anything_else_is_refused(layer: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"in evaluation and with axis=1.*torch\.jit\.trace"):
        torch.jit.script(layer)


@every_option
def test_the_older_onnx_export_has_a_batch_normalization_in_evaluation(options: dict[str, Any]) -> None:
    file: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.onnx.export(network(**options).eval(), (X,), file, dynamo=False, do_constant_folding=False)
    graph = onnx.load(io.BytesIO(file.getvalue())).graph
    assert graph.input
    # It folds what follows a convolution into it.
    assert {node.op_type for node in graph.node} <= {"Conv", "BatchNormalization", "Relu", "Identity"}


@with_options
def test_the_older_onnx_export_refuses_training_with_an_option(options: dict[str, Any]) -> None:
    file: Any = io.BytesIO()
    training = torch.onnx.TrainingMode.TRAINING
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NotImplementedError, match="cannot be exported or recorded"):
            torch.onnx.export(network(**options), (X,), file, dynamo=False, training=training)


# --- exported ---


def test_an_exported_plain_layer_is_moved_to_evaluation_by_torchao() -> None:
    from torchao.quantization.pt2e import move_exported_model_to_eval

    model = network()
    exported: Any = torch.export.export(model, (X,)).module()
    move_exported_model_to_eval(exported)
    assert_close(exported(X), model.eval()(X))


@with_options
def test_an_export_of_training_with_an_option_is_refused(options: dict[str, Any]) -> None:
    model = network(**options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Exception, match=r"cannot be exported or recorded.*model\.eval\(\)"):
        torch.export.export(model, (X,))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# --- after revert ---


def reverted(**options: Any) -> tuple[Any, Tensor]:
    model = network(**options).eval()
    expected = model(X)
    return revert(model), expected


@every_option
def test_eager_fusion_takes_a_reverted_model(options: dict[str, Any]) -> None:
    model, expected = reverted(**options)
    fused: Any = fuse_modules(model, ["0", "1", "2"])  # type: ignore[no-untyped-call]
    assert isinstance(fused[1], nn.Identity)
    assert_close(fused(X), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what it imports
@every_option
def test_fusion_in_graphs_takes_a_reverted_model(options: dict[str, Any]) -> None:
    from torch.fx.experimental.optimization import fuse

    model, expected = reverted(**options)
    fused = fuse(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert_close(fused(X), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantization_takes_a_reverted_model() -> None:
    model, expected = reverted(renorm=True)
    prepared = prepare_fx(model, get_default_qconfig_mapping("fbgemm"), (X,))
    prepared(X)
    quantized = convert_fx(prepared)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in quantized.modules())
    assert (quantized(X) - expected).abs().max() < 0.05 * expected.abs().max()


# --- models of others ---


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what it imports
def test_timm_s_models_convert_and_name_what_is_left(timm: Any) -> None:
    model = timm.create_model("resnet18", num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    assert_close(convert(model, renorm=True)(x), expected)
    assert sum(isinstance(layer, BatchNorm2d) for layer in model.modules()) == 20
    with pytest.warns(UserWarning, match=r"not converted: .*\(BatchNormAct2d\)"):
        convert(timm.create_model("efficientnet_lite0", num_classes=3), renorm=True)


def test_torchrl_s_and_sb3_contrib_s_networks_convert() -> None:
    from sb3_contrib.common.torch_layers import BatchRenorm1d
    from torchrl.modules import MLP

    model = MLP(4, 2, num_cells=[8, 8], norm_class=nn.BatchNorm1d, norm_kwargs=[{"num_features": 8}] * 2)
    converted = convert(model, renorm=True)
    assert [type(layer) for layer in converted.modules() if isinstance(layer, nn.BatchNorm1d)] == [BatchNorm1d] * 2
    assert converted(torch.randn(16, 4)).shape == (16, 2)

    theirs = BatchRenorm1d(8)
    ours = BatchNorm1d(8, eps=theirs.eps, renorm=True)
    with torch.no_grad():
        for name, value in (("running_mean", theirs.ra_mean), ("running_var", theirs.ra_var)):
            value.uniform_(0.5, 1.5)
            getattr(ours, name).copy_(value)
    x = torch.randn(16, 8)
    assert_close(ours.eval()(x), theirs.eval()(x))
