"""Networks change their batch norms: `convert` there and back, and state dicts between our layers and torch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm.torch as ours
from batchnorm.torch import convert, revert

OURS = (ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d, ours.BatchNorm)
RENORM = ["renorm_mean", "renorm_stddev"]


class Block(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)])
        self.shortcut = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        for module in self.second:
            y = module(y)
        result: Tensor = (y + self.shortcut(x)).relu()
        return result


class Network(nn.Module):
    """Batch norms of two ranks at several depths; one of them in two places, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=0.3))
        self.blocks = nn.Sequential(Block(4, 4), Block(4, 8))
        self.norms = nn.ModuleDict({"again": self.stem[1]})
        self.head = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6, eps=1e-3), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms["again"](self.stem(x).relu())
        y: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return y


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Network()


def without_sharing() -> Any:
    """A network whose running statistics are each of one place."""
    torch.manual_seed(0)
    head = (nn.Flatten(), nn.Linear(200, 6), nn.BatchNorm1d(6, eps=1e-3), nn.ReLU(), nn.Linear(6, 3))
    return nn.Sequential(Block(4, 4), Block(4, 8), *head)


def batches(number: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Noise about three means, each as often as the others: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(number):
        labels = torch.arange(24) % 3
        x = 2 * torch.randn(24, 4, 5, 5, generator=generator) + labels[:, None, None, None] + 3
        result.append((x, labels))
    return result


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for x, labels in data:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(steps: int = 10) -> tuple[Any, torch.optim.Optimizer]:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, batches(steps))
    return model, optimizer


def norms(model: nn.Module) -> dict[str, Any]:
    """The batch norms by name; one in two places has two."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: one for name, one in model.named_modules(remove_duplicate=False) if isinstance(one, kind)}


def identities(model: nn.Module) -> dict[str, int]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: id(tensor) for name, tensor in tensors}


def assert_same_states(actual: Any, expected: Any) -> None:
    assert list(actual) == list(expected)
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=0)


# --- what stays ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_bare_conversion_changes_the_types_of_batch_norms_and_nothing_else(dtype: torch.dtype) -> None:
    model = trained()[0].to(dtype)
    before, state = identities(model), copy.deepcopy(model.state_dict())
    assert convert(model) is model
    assert identities(model) == before
    assert_same_states(model.state_dict(), state)
    assert {type(one) for one in norms(model).values()} == {ours.BatchNorm1d, ours.BatchNorm2d}
    assert [(one.eps, one.momentum) for one in norms(model).values()] == [
        (one.eps, one.momentum) for one in norms(network()).values()
    ]


def test_a_layer_in_two_places_stays_one_layer() -> None:
    model: Any = convert(network(), renorm=True)
    assert model.stem[1] is model.norms["again"]
    assert len(norms(model)) == 7
    assert len(set(map(id, norms(model).values()))) == 6
    model(batches(1)[0][0])
    assert model.stem[1].num_batches_tracked == 2


def test_modes_frozen_parameters_and_attributes_stay() -> None:
    model = network()
    model.blocks[0].first.eval()
    model.head[1].eval()
    model.blocks[1].first[1].requires_grad_(False)
    model.stem[1].bias.requires_grad_(False)
    model.stem[1].note = "of the stem"
    modes = [module.training for module in model.modules()]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    convert(model, virtual_batch_size=4)
    assert [module.training for module in model.modules()] == modes
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen
    assert model.stem[1].note == "of the stem"


@pytest.mark.parametrize(
    "arguments",
    [{"affine": False}, {"bias": False}, {"momentum": None}, {"track_running_stats": False}, {"device": "meta"}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_arguments_of_every_kind_stay(arguments: dict[str, Any]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, **arguments))
    before = identities(model)
    convert(model)
    assert identities(model) == before
    assert repr(model[0]) == repr(ours.BatchNorm1d(3, **arguments))
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == arguments.get("device", "cpu"), name


def test_hooks_stay_are_called_and_can_still_be_removed() -> None:
    model = network()
    layer: Any = model.head[1]
    called: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_: called.append("forward_pre")),
        layer.register_forward_hook(lambda *_: called.append("forward")),
        layer.register_forward_hook(lambda module, args, kwargs, y: called.append("keywords"), with_kwargs=True),
        layer.register_full_backward_pre_hook(lambda *_: called.append("backward_pre")),
        layer.register_full_backward_hook(lambda *_: called.append("backward")),
        layer.register_state_dict_post_hook(lambda *_: called.append("state_dict")),
        layer.register_load_state_dict_post_hook(lambda *_: called.append("load_state_dict")),
    ]
    convert(model, renorm=True)
    x, _ = batches(1)[0]
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    expected = ["forward_pre", "forward", "keywords", "backward_pre", "backward", "state_dict", "load_state_dict"]
    assert called == expected
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    assert called == expected


@pytest.mark.parametrize(("rank", "sizes"), [("1d", [4, 3]), ("2d", [4, 3, 2, 2]), ("3d", [4, 3, 2, 2, 2])])
def test_a_batch_norm_by_itself_comes_back_as_a_new_one(rank: str, sizes: list[int]) -> None:
    before = getattr(nn, f"BatchNorm{rank}")(3)
    layer = convert(before, renorm=True)
    assert type(layer) is getattr(ours, f"BatchNorm{rank}")
    assert type(before) is getattr(nn, f"BatchNorm{rank}")
    assert layer.weight is before.weight
    assert layer.running_mean is before.running_mean
    assert "renorm_mean" not in before.state_dict()
    layer(torch.randn(sizes))
    with pytest.raises(ValueError, match="input"):
        layer(torch.randn([4, 3, 1, 1, 1, 1]))


class Subclass(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    "layer",
    [Subclass(3), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(3, affine=True), nn.GroupNorm(1, 3)],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.filterwarnings("ignore:Batch normalization layers that were not converted:UserWarning")
def test_other_layers_are_left_as_they_are(layer: nn.Module) -> None:
    model: Any = nn.Sequential(nn.Sequential(layer), nn.BatchNorm2d(3))
    convert(model, virtual_batch_size=2)
    assert model[0][0] is layer
    assert type(model[1]) is ours.BatchNorm2d
    assert convert(layer) is layer


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 2, "synchronized": False}], ids=str)
def test_torch_s_synchronized_layer_is_converted_for_any_rank_and_reverted(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    theirs = nn.SyncBatchNorm(3, eps=1e-3, momentum=0.3)
    theirs.process_group = None
    model: Any = convert(nn.Sequential(theirs), **options)
    assert type(model[0]) is ours.BatchNorm
    assert model[0].axis == 1
    assert model[0].synchronized is options.get("synchronized", True)
    assert (model[0].eps, model[0].momentum) == (1e-3, 0.3)
    assert model[0].weight is theirs.weight
    assert model[0](torch.randn(shape)).shape == shape  # without a process group as any other layer
    if not model[0].synchronized:
        with pytest.warns(UserWarning, match=r"not reverted: 0 \(BatchNorm\)"):
            revert(model)
        return
    reverted: Any = revert(model)[0]  # type: ignore[index]
    assert type(reverted) is nn.SyncBatchNorm
    assert vars(reverted).keys() == vars(theirs).keys()
    assert reverted.running_var is model[0].running_var


def test_a_synchronized_layer_of_a_rank_is_reverted_to_that_of_the_rank() -> None:
    model: Any = convert(nn.Sequential(nn.BatchNorm2d(3)), synchronized=True)
    assert model[0].synchronized
    assert type(revert(model)[0]) is nn.BatchNorm2d  # type: ignore[index]


# --- training goes on ---


def test_a_converted_network_trains_on_as_it_would_have() -> None:
    (model, optimizer), (plain, plain_optimizer) = trained(), trained()
    convert(model)
    more = batches(8, seed=1)
    torch.testing.assert_close(train(model, optimizer, more), train(plain, plain_optimizer, more), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=1e-3, atol=1e-4)
    x, _ = more[0]
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-3, atol=1e-4)


def test_renorm_begins_from_the_running_statistics() -> None:
    model = without_sharing()
    optimizer = optimizer_of(model)
    train(model, optimizer, batches(60))
    plain, cold = copy.deepcopy(model), copy.deepcopy(model)
    convert(model, renorm=True)
    for name, layer in norms(model).items():
        before = norms(plain)[name]
        torch.testing.assert_close(layer.renorm_mean, before.running_mean, rtol=0, atol=0)
        torch.testing.assert_close(layer.renorm_stddev, (before.running_var + before.eps).sqrt())
        assert layer.renorm_mean is not layer.running_mean
    more = batches(4, seed=1)
    losses, expected = (train(one, torch.optim.SGD(one.parameters(), 0.05), more) for one in (model, plain))
    for layer in norms(convert(cold, renorm=True)).values():
        nn.init.zeros_(layer.renorm_mean)
        nn.init.ones_(layer.renorm_stddev)
    worse = train(cold, torch.optim.SGD(cold.parameters(), 0.05), more)
    assert max(abs(one - other) for one, other in zip(losses, expected, strict=True)) < 0.2
    assert worse[0] > 10


# --- our layers, converted again ---


def test_options_that_are_not_named_stay() -> None:
    model = convert(trained()[0], renorm=True, renorm_momentum=0.2, renorm_clipping={"rmax": 2.0}, fused=False)
    train(model, optimizer_of(model), batches(2))
    before, state = identities(model), copy.deepcopy(model.state_dict())
    convert(model, virtual_batch_size=4)
    assert identities(model) == before
    assert_same_states(model.state_dict(), state)
    twin = convert(
        network(), renorm=True, renorm_momentum=0.2, renorm_clipping={"rmax": 2.0}, fused=False, virtual_batch_size=4
    )
    assert repr(model) == repr(twin)
    twin.load_state_dict(state)
    data = batches(3, seed=1)
    assert train(model, optimizer_of(model), data) == train(twin, optimizer_of(twin), data)
    convert(model, virtual_batch_size=None, renorm_clipping=None)
    for layer in norms(model).values():
        assert layer.virtual_batch_size is None
        assert layer.renorm
        assert layer.renorm_momentum == 0.2


def test_a_layer_of_any_axis_keeps_it() -> None:
    model: Any = convert(nn.Sequential(ours.BatchNorm((3, 5), axis=(1, -1))), renorm=True)
    assert type(model[0]) is ours.BatchNorm
    assert model[0].state_dict()["renorm_mean"].shape == (3, 5)
    assert model(torch.randn(4, 3, 2, 5)).shape == (4, 3, 2, 5)


def test_renorm_goes_and_leaves_what_a_plain_network_has() -> None:
    model = convert(trained()[0], renorm=True, virtual_batch_size=4)
    assert sum("renorm" in name for name in model.state_dict()) == 14
    before = {name: one for name, one in identities(model).items() if "renorm" not in name}
    convert(model, renorm=False, virtual_batch_size=None)
    assert identities(model) == before
    plain = network()
    plain.load_state_dict(model.state_dict())
    data = batches(3, seed=1)
    losses = train(model, optimizer_of(model), data)
    torch.testing.assert_close(losses, train(plain, optimizer_of(plain), data), rtol=1e-4, atol=1e-4)


# --- what is refused ---


def adjustment(shape: torch.Size) -> tuple[Tensor, Tensor]:
    return torch.ones(shape), torch.zeros(shape)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"virtual_batchsize": 2}, "virtual_batchsize"),
        ({"num_features": 2}, "num_features"),
        ({"virtual_batch_size": 0}, "virtual_batch_size"),
        ({"virtual_batch_size": 2, "adjustment": adjustment}, "adjustment"),
        ({"adjustment": 2}, "adjustment"),
        ({"renorm": "yes"}, "renorm"),
        ({"renorm": True, "renorm_momentum": 2}, "renorm_momentum"),
        ({"renorm": True, "renorm_clipping": {"rmaks": 2}}, "renorm_clipping"),
        ({"renorm": True, "renorm_clipping": {"rmin": 2, "rmax": 1}}, "renorm_clipping"),
        ({"fused": "no"}, "fused"),
        ({"renorm": True}, "track_running_stats"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("of", ["torch's", "ours"])
def test_bad_options_are_named_and_change_nothing(of: str, options: dict[str, Any], named: str) -> None:
    model = nn.Sequential(network(), nn.BatchNorm1d(3, track_running_stats=named != "track_running_stats"))
    if of == "ours":
        convert(model)
    before, modules = identities(model), [*model.modules()]
    with pytest.raises((TypeError, ValueError), match=named):
        convert(model, **options)
    assert identities(model) == before
    assert [*model.modules()] == modules
    assert not any(getattr(one, "renorm", False) for one in modules)


@pytest.mark.parametrize("change", [convert, revert])
def test_what_is_no_module_is_refused(change: Any) -> None:
    with pytest.raises(TypeError, match=r"^module must be a torch\.nn\.Module; received 'x' of type str\.$"):
        change("x")


# --- state dicts ---


def with_options(**options: Any) -> Any:
    """A network of our layers that never saw a batch."""
    return convert(network(seed=1), **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"virtual_batch_size": 4}, {"adjustment": adjustment}],
    ids=lambda options: "+".join(options) or "plain",
)
def test_state_dicts_go_to_torch_s_layers_and_back(options: dict[str, Any]) -> None:
    model = trained()[0]
    state = model.state_dict()
    converted = with_options(**options)
    converted.load_state_dict(state)
    assert_same_states(converted.state_dict(), state)
    plain = network(seed=1)
    plain.load_state_dict(converted.state_dict())
    assert_same_states(plain.state_dict(), state)
    x, _ = batches(1, seed=1)[0]
    torch.testing.assert_close(converted.eval()(x), model.eval()(x))


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_plain_state_dict_fills_renorm_s_averages(assign: bool) -> None:
    model = trained()[0]
    state = copy.deepcopy(model.state_dict())
    loaded, converted = with_options(renorm=True), convert(trained()[0], renorm=True)
    given = dict(state)
    loaded.load_state_dict(given, assign=assign)
    assert list(given) == list(state)
    assert_same_states(loaded.state_dict(), converted.state_dict())
    data = batches(3, seed=1)
    assert train(loaded, optimizer_of(loaded), data) == train(converted, optimizer_of(converted), data)
    assert_same_states(loaded.state_dict(), converted.state_dict())


def test_a_state_dict_of_renorm_loads_as_it_is() -> None:
    model = convert(trained()[0], renorm=True)
    train(model, optimizer_of(model), batches(2))
    loaded = with_options(renorm=True)
    loaded.load_state_dict(model.state_dict())
    assert_same_states(loaded.state_dict(), model.state_dict())


def test_a_plain_network_says_what_of_renorm_it_has_no_place_for() -> None:
    model = convert(trained()[0], renorm=True)
    plain, converted = network(seed=1), with_options()
    unexpected = {name for name in model.state_dict() if name.split(".")[-1] in RENORM}
    for other in (plain, converted):
        with pytest.raises(RuntimeError, match=r"Unexpected key.*stem\.1\.renorm_mean.*head\.1\.renorm_stddev"):
            other.load_state_dict(model.state_dict())
        keys = other.load_state_dict(model.state_dict(), strict=False)
        assert set(keys.unexpected_keys) == unexpected
        assert not keys.missing_keys
    assert_same_states(converted.state_dict(), plain.state_dict())


@pytest.mark.parametrize("missing", ["weight", "bias", "running_mean", "running_var", "renorm_mean", "renorm_stddev"])
def test_a_missing_entry_is_named(missing: str) -> None:
    layer = ours.BatchNorm1d(3, renorm=True)
    layer(torch.randn(4, 3))
    state = layer.state_dict()
    del state[missing]
    other = ours.BatchNorm1d(3, renorm=True)
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        other.load_state_dict(state)
    keys = other.load_state_dict(state, strict=False)
    assert keys.missing_keys == [missing]
    assert_same_states({**other.state_dict(), missing: 0}, {**layer.state_dict(), missing: 0})


def test_of_a_plain_state_dict_only_its_own_entries_are_missed() -> None:
    state = nn.BatchNorm1d(3).state_dict()
    del state["running_var"]
    other = ours.BatchNorm1d(3, renorm=True)
    with pytest.raises(RuntimeError, match="running_var"):
        other.load_state_dict(state)


@pytest.mark.parametrize("options", [{}, {"renorm": True}], ids=["plain", "renorm"])
def test_state_dicts_of_before_num_batches_tracked_load_as_they_do_into_torch_s_layer(options: dict[str, Any]) -> None:
    old = {name: tensor for name, tensor in trained()[0].state_dict().items() if "num_batches" not in name}
    plain, model = network(seed=1), with_options(**options)
    for one in (plain, model):
        one.stem[1].num_batches_tracked += 5
        one.load_state_dict(old)
    state = model.state_dict()
    assert_same_states({name: state[name] for name in plain.state_dict()}, plain.state_dict())


def test_a_new_state_dict_that_lacks_num_batches_tracked_is_refused_as_torch_s_layer_does() -> None:
    for layer in (nn.BatchNorm1d(3), ours.BatchNorm1d(3), ours.BatchNorm1d(3, renorm=True)):
        state = nn.BatchNorm1d(3).state_dict()
        del state["num_batches_tracked"]
        with pytest.raises(RuntimeError, match="num_batches_tracked"):
            layer.load_state_dict(state)


def test_an_option_that_is_set_later_is_checked_and_takes_effect() -> None:
    layer = ours.BatchNorm2d(3)
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    layer.virtual_batch_size = 2
    torch.testing.assert_close(layer(x), ours.BatchNorm2d(3, virtual_batch_size=2)(x))
    with pytest.raises(ValueError, match="virtual_batch_size"):
        layer.virtual_batch_size = 0
    assert layer.virtual_batch_size == 2
    layer.renorm = True
    assert layer.renorm_mean is not None
    assert layer.running_mean is not None
    assert torch.equal(layer.renorm_mean, layer.running_mean)
    layer.renorm = False
    assert "renorm_mean" not in layer.state_dict()


# --- what is left, and the way back ---


class Rectified(nn.BatchNorm2d):
    """One with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize(
    ("left", "message"),
    [
        (lambda: Rectified(4), r"not converted: 0 \(Rectified\)\.$"),
        (nn.LazyBatchNorm2d, r"not converted: 0 \(LazyBatchNorm2d\); lazy layers can be converted after"),
    ],
    ids=["a subclass", "lazy"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are:UserWarning")
def test_what_is_not_converted_is_named(left: Any, message: str) -> None:
    model = nn.Sequential(left(), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match=message):
        convert(model, renorm=True)
    assert type(model[1]) is ours.BatchNorm2d


@pytest.mark.filterwarnings("ignore:Lazy modules are:UserWarning", "ignore:Batch normalization layers:UserWarning")
def test_a_lazy_layer_is_converted_after_its_first_batch() -> None:
    model: Any = convert(nn.Sequential(nn.LazyBatchNorm2d()))
    model(torch.randn(4, 3, 2, 2))
    convert(model, renorm=True)
    assert model[0].renorm_mean.shape == (3,)


@pytest.mark.parametrize(
    "options",
    [{}, {"renorm": True}, {"virtual_batch_size": 8}, {"adjustment": lambda shape: (torch.ones(1), torch.zeros(1))}],
    ids=["plain", "renorm", "virtual batches", "adjustment"],
)
def test_a_reverted_model_infers_the_same_and_has_the_state_of_a_plain_one(options: Any) -> None:
    model: Any = convert(trained()[0], **options)
    train(model, optimizer_of(model), batches(3, seed=1))
    x = batches(1, seed=2)[0][0]
    expected = model.eval()(x)
    parameters = {name: id(value) for name, value in model.named_parameters()}
    assert id(revert(model)) == id(model)
    assert {type(one) for one in norms(model).values()} == {nn.BatchNorm1d, nn.BatchNorm2d}
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == list(network().state_dict())
    network().load_state_dict(model.state_dict())
    assert {name: id(value) for name, value in model.named_parameters()} == parameters
    assert set(vars(model.stem[1])) == set(vars(network().stem[1]))


def test_a_reverted_layer_keeps_hooks_and_mode_and_the_layer_stays_what_it_was() -> None:
    layer: Any = ours.BatchNorm2d(4, renorm=True).eval()
    seen: list[Any] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(module))
    plain = revert(layer)
    assert type(plain) is nn.BatchNorm2d
    assert not plain.training
    plain(torch.ones(2, 4, 2, 2))
    assert seen == [plain]
    handle.remove()
    assert not plain._forward_hooks
    assert layer.renorm
    assert layer.train()(torch.randn(2, 4, 2, 2)).shape == (2, 4, 2, 2)


def test_what_has_no_counterpart_is_named_and_left() -> None:
    model = nn.Sequential(ours.BatchNorm((4, 5), axis=(1, 2)), ours.BatchNorm2d(4))
    with pytest.warns(UserWarning, match=r"not reverted: 0 \(BatchNorm\)\.$"):
        revert(model)
    assert [type(layer) for layer in model] == [ours.BatchNorm, nn.BatchNorm2d]
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module"):
        revert("model")  # type: ignore[arg-type]
