"""Install the source distribution as users do, in clean environments, and look at what came of it.

For each Python from 3.10 to 3.13 that is found: with a compiler and without, with Python's headers and without, and in
each of these with the oldest and the newest NumPy. What `info` says and what a small program computes must be right.
Then the cure of an installation without kernels; and the source distribution must be whole.

    python tools/check_install.py [--only 3.12] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
OLDEST_NUMPY = {"3.13": "2.1.0"}  # the first that is built for it; elsewhere the oldest that the package allows
NO_COMPILER = {"CXX": "/nowhere/c++", "CC": "/nowhere/cc"}
CURE = ("--force-reinstall", "--no-cache-dir", "--no-deps")
EXPECTED = {  # by compiler and headers: what info says, and who serves
    (True, True): ("CPU kernels: (avx|baseline)", "cpu"),
    (True, False): ("CPU kernels: for TensorFlow only", "composed"),
    (False, True): ("CPU kernels: not built", "composed"),
    (False, False): ("CPU kernels: not built", "composed"),
}
PROGRAM = """
import importlib.resources, sys
import numpy as np
import batchnorm.numpy

served, operations = sys.argv[1:]
x = np.random.default_rng(0).normal(3.0, 2.0, (64, 8, 8, 16)).astype(np.float32)
layer = batchnorm.numpy.BatchNormalization(momentum=0.0)
y, gradient = layer.vjp(x, training=True)
exact = x.astype(np.float64)
mean, sigma = exact.mean((0, 1, 2)), np.sqrt(exact.var((0, 1, 2)) + 1e-3)
np.testing.assert_allclose(y, (exact - mean) / sigma, atol=1e-5)
np.testing.assert_allclose(layer(x), (exact - mean) / sigma, atol=1e-5)
np.testing.assert_allclose(gradient(y).gamma, (y.astype(np.float64) ** 2).sum((0, 1, 2)), rtol=1e-5)
assert layer.kernel == served, layer.kernel
found = (importlib.resources.files("batchnorm") / "_tensorflow_ops.so").is_file()
assert found == (operations == "True"), found
print(f"numpy {np.__version__}, served by {layer.kernel}")
"""


def run(*command: str | Path, **environment: str) -> str:
    """Run a command and return its output; without the variables that would lead it elsewhere."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        command, env=clean | environment, cwd="/", text=True, capture_output=True, check=False, errors="replace"
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def interpreters(wanted: list[str]) -> Iterator[tuple[str, Path]]:
    """Find Pythons, in the folders of pyenv or on the path."""
    for version in wanted:
        found = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python{version}"))
        on_path = shutil.which(f"python{version}")
        if not found and on_path is None:
            print(f"Python {version}: not found, so nothing is known about it", flush=True)
            continue
        yield version, found[-1] if found else Path(str(on_path))


def without_headers(python: Path, version: str, folder: Path) -> Path:
    """Make a Python that has everything but its headers: a copy of the program beside the same library."""
    prefix = Path(run(python, "-c", "import sys; print(sys.base_prefix)").strip())
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").symlink_to(prefix / "lib")
    copied = folder / "bin" / f"python{version}"
    shutil.copy(python.resolve(), copied)
    told = run(copied, "-c", "import sys, sysconfig; print(sys.base_prefix, sysconfig.get_path('include'))").split()
    assert told[0] == str(folder), told
    assert not Path(told[1]).exists(), told
    return copied


class Environment:
    """A virtual environment, with a folder for what pip keeps."""

    def __init__(self, python: Path, folder: Path, cache: Path) -> None:
        run(python, "-m", "venv", folder)
        self.python, self.cache = folder / "bin" / "python", cache

    def pip(self, *arguments: str | Path, **environment: str) -> str:
        """Install."""
        return run(self.python, "-m", "pip", "install", "--cache-dir", self.cache, *arguments, **environment)

    def check(self, compiler: bool, headers: bool) -> str:
        """Look at what was installed."""
        said, served = EXPECTED[compiler, headers]
        info = run(self.python, "-m", "batchnorm", "info")
        assert re.search(said, info), info
        assert ("--no-cache-dir" in info) == (served != "cpu"), info
        return run(self.python, "-c", PROGRAM, served, str(compiler)).strip()


def check_python(version: str, python: Path, source: Path, folder: Path, cache: Path) -> None:
    """Install in every way for one Python."""
    bare = without_headers(python, version, folder / "bare")
    for compiler, headers in EXPECTED:
        shutil.rmtree(cache / "wheels", ignore_errors=True)  # or the wheel of the last installation would be taken
        environment = Environment(python if headers else bare, folder / f"{compiler}{headers}", cache)
        environment.pip(source, **({} if compiler else NO_COMPILER))
        results = [environment.check(compiler, headers)]
        environment.pip("--only-binary=numpy", f"numpy=={OLDEST_NUMPY.get(version, '1.26.0')}")
        results.append(environment.check(compiler, headers))
        title = f"{'compiler' if compiler else 'no compiler'}, {'headers' if headers else 'no headers'}"
        print(f"Python {version}, {title}: {'; '.join(results)}", flush=True)


def check_cure(version: str, python: Path, source: Path, folder: Path, cache: Path) -> None:
    """Install with a compiler after an installation without one, whose wheel pip may have kept."""
    environment = Environment(python, folder / "cured", cache)
    named = f"batchnorm @ {source.as_uri()}"  # by its name, as from an index, or pip would not look for what it kept
    environment.pip(named)
    kept = "not built" in run(environment.python, "-m", "batchnorm", "info")
    environment.pip(*CURE, named)
    found = environment.check(True, True)
    print(f"Python {version}, {'kept without kernels and then ' if kept else ''}cured: {found}", flush=True)


def check_source(source: Path) -> None:
    """The source distribution must hold what is under version control, and tell an index nothing of relative links."""
    with tarfile.open(source) as archive:
        top = source.name.removesuffix(".tar.gz")
        held = {name.removeprefix(f"{top}/") for name in archive.getnames()}
        description = archive.extractfile(f"{top}/PKG-INFO")
        assert description is not None
        text = email.message_from_bytes(description.read()).get_payload()
    assert isinstance(text, str)
    assert "# batchnorm" in text
    relative = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("https:")]
    assert not relative, relative
    if (ROOT / ".git").exists():
        tracked = run("git", "-C", ROOT, "ls-files").split()
        missing = [name for name in tracked if name not in held and not name.startswith(".ci/")]
        assert not missing, missing
    print(f"{source.name}: {len(held)} files, whole", flush=True)


def main() -> None:
    """Check everything."""
    parser = argparse.ArgumentParser(description="Install in clean environments, and look at what came of it.")
    parser.add_argument("--only", action="append", choices=PYTHONS, help="a Python; by default all")
    parser.add_argument("--keep", type=Path, help="folder to work in, which is kept")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="batchnorm-install-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        cache = folder / "cache"
        builder = Environment(Path(sys.executable), folder / "builder", cache)
        builder.pip("build")
        run(builder.python, "-m", "build", "--sdist", "--outdir", folder / "dist", ROOT)
        (source,) = (folder / "dist").glob("*.tar.gz")
        check_source(source)
        found = list(interpreters(options.only or list(PYTHONS)))
        for version, python in found:
            check_python(version, python, source, folder / version, cache)
        for version, python in found[-1:]:
            check_cure(version, python, source, folder / version, cache)
    finally:
        if options.keep is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
