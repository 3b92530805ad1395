"""Who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(batchnorm.__file__).parent
FRAMEWORKS = {"tensorflow", "keras", "tf_keras", "torch", "jax", "flax", "mxnet", "cupy"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it, by its absolute name."""
    package = ["batchnorm", *path.relative_to(ROOT).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names |= {".".join(module)} if node.module else {".".join([*module, alias.name]) for alias in node.names}
    return names


def strangers(path: Path, *allowed: str) -> set[str]:
    """What a file imports beyond the standard library and the modules allowed, and what is within those."""
    return {
        name
        for name in imported(path)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(name == one or name.startswith(f"{one}.") for one in allowed)
    }


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_there_are_files_to_look_at() -> None:
    assert {path.name for path in files("core")} >= {
        "algebra.py",
        "geometry.py",
        "kernels.py",
        "options.py",
        "state.py",
    }
    assert {path.name for path in files("tensorflow")} >= {"layer.py", "namespace.py", "normalization.py"}
    assert {path.name for path in files("torch")} >= {"functional.py", "modules.py", "native.py"}


def test_imports_are_found_by_their_absolute_names() -> None:
    assert {"tensorflow", "batchnorm.core.options", "batchnorm.tensorflow.layer"} <= imported(
        ROOT / "tensorflow" / "normalization.py"
    )
    assert {"batchnorm.core.algebra", "batchnorm.core", "numpy"} & imported(ROOT / "numpy.py") >= {
        "batchnorm.core.algebra",
        "numpy",
    }


@pytest.mark.parametrize("path", files("core"), ids=lambda path: path.name)
def test_core_imports_the_standard_library_and_itself(path: Path) -> None:
    assert strangers(path, "batchnorm.core") == set()


def test_the_numpy_layer_imports_numpy_and_core() -> None:
    assert strangers(ROOT / "numpy.py", "numpy", "batchnorm", "batchnorm.core", "batchnorm.native") == set()


@pytest.mark.parametrize("path", files("tensorflow"), ids=lambda path: path.name)
def test_the_tensorflow_layer_imports_tensorflow_core_and_itself(path: Path) -> None:
    assert (
        strangers(
            path, "tensorflow", "numpy", "batchnorm", "batchnorm.core", "batchnorm.native", "batchnorm.tensorflow"
        )
        == set()
    )


@pytest.mark.parametrize("path", files("torch"), ids=lambda path: path.name)
def test_the_pytorch_layer_imports_pytorch_core_and_itself(path: Path) -> None:
    assert strangers(path, "torch", "batchnorm.core", "batchnorm.native", "batchnorm.torch") == set()


def test_the_package_itself_imports_nothing_but_the_native_kernels() -> None:
    assert strangers(ROOT / "__init__.py", "batchnorm.native") == set()
    assert strangers(ROOT / "native.py") == set()


@pytest.mark.parametrize("module", ["batchnorm", "batchnorm.core.kernels", "batchnorm.numpy"])
def test_importing_a_module_without_a_framework_loads_none(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "batchnorm" in loaded
    assert loaded & FRAMEWORKS == set()
    assert ("numpy" in loaded) == (module == "batchnorm.numpy")
