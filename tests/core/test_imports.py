"""Who may import whom, and who does arithmetic."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(batchnorm.__file__).parent
FRAMEWORKS = {"tensorflow", "keras", "tf_keras", "torch", "jax", "flax", "mxnet", "cupy"}


COMPUTED = "a module whose name is computed"


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it, by its absolute name."""
    package = ["batchnorm", *path.relative_to(ROOT).parent.parts]
    return imported_by(path.read_text(encoding="utf-8"), package)


def imported_by(text: str, package: list[str]) -> set[str]:
    """Every module that a text in a package imports: by a statement, or by a call that does the same."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                whole = [*module, alias.name]
                names.add(".".join(whole if is_module(whole) else module))
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            names.add(name if isinstance(name, str) and not name.startswith(".") else COMPUTED)
    return names


def called(node: ast.Call) -> str:
    """The name of what is called, without what it belongs to."""
    return str(getattr(node.func, "attr", getattr(node.func, "id", "")))


def is_module(parts: list[str]) -> bool:
    """Tell whether this package has a module of that name; another's contents belong to what they come from."""
    place = ROOT.joinpath(*parts[1:])
    return parts[0] == "batchnorm" and (place.is_dir() or place.with_suffix(".py").is_file())


def strangers(path: Path, *allowed: str) -> set[str]:
    """What a file imports beyond the standard library and the modules allowed, and what is within those."""
    return {
        name
        for name in imported(path)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(name == module or name.startswith(f"{module}.") for module in allowed)
    }


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


SURFACES = ("flax", "jax", "keras", "numpy", "tensorflow", "torch")


def test_there_are_files_to_look_at() -> None:
    expected = {
        "core": {"algebra.py", "geometry.py", "normalize.py", "options.py", "passes.py", "schedules.py", "state.py"},
        "flax": {"linen.py"},
        "jax": {"functional.py", "namespace.py", "primitives.py"},
        "keras": {"backends.py", "layer.py", "namespace.py", "serialization.py"},
        "numpy": {"compute.py", "layer.py", "namespace.py"},
        "tensorflow": {"base.py", "compute.py", "installing.py", "layer.py", "namespace.py", "operations.py"},
        "torch": {"autograd.py", "cpu.py", "functional.py", "layout.py", "modules.py", "namespace.py", "operators.py"},
    }
    for folder, names in expected.items():
        assert {path.name for path in files(folder)} >= names


def test_imports_are_found_by_their_absolute_names() -> None:
    found = imported(ROOT / "tensorflow" / "compute.py")
    assert {"tensorflow", "batchnorm.core.algebra", "batchnorm.core.options", "batchnorm.tensorflow.namespace"} <= found
    found = imported(ROOT / "numpy" / "compute.py")
    assert {"numpy", "batchnorm.cpu", "batchnorm.core.algebra"} <= found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import torch.nn", "torch.nn"),
        ("from torch import nn", "torch"),
        ("from batchnorm import torch", "batchnorm.torch"),
        ("from batchnorm.torch import layout", "batchnorm.torch.layout"),
        ("from batchnorm.torch import BatchNorm", "batchnorm.torch"),
        ("from .. import torch", "batchnorm.torch"),
        ("from ..torch import layout", "batchnorm.torch.layout"),
        ("from . import layer", "batchnorm.numpy.layer"),
        ("def f():\n    import torch", "torch"),
        ("class A:\n    if TYPE_CHECKING:\n        from torch import Tensor", "torch"),
        ("try:\n    import torch\nexcept ImportError:\n    pass", "torch"),
        ("torch = importlib.import_module('torch.nn')", "torch.nn"),
        ("torch = import_module('torch')", "torch"),
        ("torch = __import__('torch')", "torch"),
        ("module = importlib.import_module(name)", COMPUTED),
        ("module = importlib.import_module(f'{name}.nn')", COMPUTED),
        ("module = importlib.import_module('..torch', __name__)", COMPUTED),
    ],
)
def test_an_import_is_found_however_it_is_written(text: str, name: str) -> None:
    assert imported_by(text, ["batchnorm", "numpy"]) == {name}


@pytest.mark.parametrize("path", files("core"), ids=lambda path: path.name)
def test_core_imports_the_standard_library_and_itself(path: Path) -> None:
    assert strangers(path, "batchnorm.core") == set()


@pytest.mark.parametrize("path", files("numpy"), ids=lambda path: path.name)
def test_the_numpy_layer_imports_numpy_core_and_itself(path: Path) -> None:
    assert strangers(path, "numpy", "batchnorm.core", "batchnorm.cpu", "batchnorm.numpy") == set()


@pytest.mark.parametrize("path", files("tensorflow"), ids=lambda path: path.name)
def test_the_tensorflow_layer_imports_tensorflow_core_and_itself(path: Path) -> None:
    own = ("tensorflow", "numpy", "batchnorm.core", "batchnorm.cpu", "batchnorm.tensorflow")
    # That module looks for whatever generation of layers there is.
    assert strangers(path, *own) == ({COMPUTED} if path.name == "installing.py" else set())


@pytest.mark.parametrize("path", files("torch"), ids=lambda path: path.name)
def test_the_pytorch_layer_imports_pytorch_core_and_itself(path: Path) -> None:
    assert strangers(path, "torch", "tqdm", "batchnorm.core", "batchnorm.cpu", "batchnorm.torch") == set()


@pytest.mark.parametrize("path", files("jax"), ids=lambda path: path.name)
def test_the_jax_layer_imports_jax_core_and_itself(path: Path) -> None:
    assert strangers(path, "jax", "numpy", "batchnorm.core", "batchnorm.cpu", "batchnorm.jax") == set()


@pytest.mark.parametrize("path", files("flax"), ids=lambda path: path.name)
def test_the_flax_layers_import_flax_jax_core_and_the_function(path: Path) -> None:
    assert strangers(path, "flax", "jax", "batchnorm.core", "batchnorm.jax", "batchnorm.flax") == set()


@pytest.mark.parametrize("path", files("keras"), ids=lambda path: path.name)
def test_the_keras_layer_imports_keras_and_core_and_what_computes_in_one_place(path: Path) -> None:
    own = ("keras", "numpy", "h5py", "batchnorm.core", "batchnorm.cpu", "batchnorm.keras")
    frameworks = ("tensorflow", "torch", "batchnorm.tensorflow", "batchnorm.torch", "batchnorm.jax")
    assert strangers(path, *own, *(frameworks if path.name == "backends.py" else ())) == set()


def test_the_package_itself_imports_nothing_but_the_cpu_kernels() -> None:
    assert strangers(ROOT / "__init__.py", "batchnorm.cpu") == set()
    assert strangers(ROOT / "cpu.py", "batchnorm.core") == {"batchnorm._cpu"}


ARITHMETIC = {
    "sum", "mean", "var", "std", "sqrt", "rsqrt", "reduce_sum", "reduce_mean", "reduce_variance", "moments", "var_mean",
    "lerp_", "square", "pow",
}  # fmt: skip
"""What core alone calls, over the namespace that it is given."""


def arithmetic(tree: ast.AST) -> list[str]:
    """Find calls that sum, average or take roots, and powers of one half, with their lines."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = called(node)
            if name in ARITHMETIC:
                found.append(f"{name} in line {node.lineno}")
        elif isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Pow):
            power = node.right if isinstance(node, ast.BinOp) else node.value
            if isinstance(power, ast.UnaryOp):
                power = power.operand
            if isinstance(power, ast.Constant) and power.value == 0.5:
                found.append(f"** 0.5 in line {node.lineno}")
    return found


@pytest.mark.parametrize(
    "text",
    [f"x.{name}(0)" for name in sorted(ARITHMETIC)]
    + [f"torch.{name}(x, dim=0)" for name in sorted(ARITHMETIC)]
    + [f"y = [{name}(x) for x in batch]" for name in sorted(ARITHMETIC)]
    + ["sigma = (v + epsilon) ** 0.5", "def f(v):\n    return 2 * v**-0.5", "v **= 0.5", "tf.nn.moments(x, [0])"],
)
def test_arithmetic_is_found_wherever_it_is(text: str) -> None:
    assert len(arithmetic(ast.parse(text))) == 1


@pytest.mark.parametrize(
    "text", ["x.summary()", "mean = variance", "x**2", "x * 0.5", "v1.nn.fused_batch_norm(x)", "xp.sqrt"]
)
def test_what_is_none_is_not(text: str) -> None:
    assert arithmetic(ast.parse(text)) == []


def test_core_is_where_arithmetic_is() -> None:
    found = {path.name for path in files("core") if arithmetic(ast.parse(path.read_text(encoding="utf-8")))}
    assert found >= {"algebra.py", "passes.py", "normalize.py"}


@pytest.mark.parametrize(
    "path",
    [path for folder in SURFACES for path in files(folder) if path.name != "namespace.py"],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_no_framework_s_folder_sums_averages_or_takes_roots_of_a_batch(path: Path) -> None:
    assert arithmetic(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("module", ["batchnorm", "batchnorm.core.normalize", "batchnorm.numpy"])
def test_importing_a_module_without_a_framework_loads_none(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "batchnorm" in loaded
    assert loaded & FRAMEWORKS == set()
    assert ("numpy" in loaded) == (module == "batchnorm.numpy")
