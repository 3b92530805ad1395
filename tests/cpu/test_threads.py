"""Threads, processes and memory."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
from typing import Any

import numpy as np
import pytest

from .cases import BUSY, NEAR, TYPES, View, check_near, everything, library, same

# ---- Threads.


@pytest.mark.parametrize("view", BUSY, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads_beyond_rounding(view: View, dtype: np.dtype[Any]) -> None:
    library.set_num_threads(1)
    alone = everything(view, dtype)
    for threads in (2, 3, 8):
        library.set_num_threads(threads)
        check_near(everything(view, dtype), alone, NEAR[dtype.name])


@pytest.mark.parametrize("view", BUSY, ids=str)
def test_the_same_call_gives_the_same_bits(view: View) -> None:
    for threads in (1, 3):
        library.set_num_threads(threads)
        first = everything(view)
        assert all(same(first, everything(view)) for _ in range(5))


def test_many_python_threads_at_once_get_what_one_gets() -> None:
    library.set_num_threads(3)
    jobs = list(itertools.product(BUSY, TYPES, range(3)))
    expected = [everything(*job) for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found, alone in zip(pool.map(lambda job: everything(*job), jobs), expected, strict=True):
            assert same(found, alone)


def test_the_number_of_threads_may_change_while_calls_run() -> None:
    # How a call is cut into pieces goes by that number, and so does the memory for their sums.
    expected = {view: everything(view) for view in BUSY}
    stop = threading.Event()

    def change() -> None:
        for threads in itertools.cycle([1, 7, 2, 16, 3]):
            if stop.wait(0.0005):  # which also leaves the interpreter to the others
                return
            library.set_num_threads(threads)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            for view, found in zip(BUSY * 6, pool.map(everything, BUSY * 6), strict=True):
                check_near(found, expected[view], NEAR["float32"])
    finally:
        stop.set()
        changing.join()


@pytest.mark.parametrize("threads", [0, -1, -(2**40)])
def test_fewer_than_one_thread_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        library.set_num_threads(threads)
    assert library.num_threads() == 2


@pytest.mark.parametrize("threads", ["2", 2.5, None])
def test_a_number_of_threads_that_is_no_int_is_refused(threads: Any) -> None:
    with pytest.raises(TypeError):
        library.set_num_threads(threads)
    assert library.num_threads() == 2


# ---- Processes of their own.


PREAMBLE = "from tests.cpu.cases import *\nimport os, sys, threading\n"
ROOT = pathlib.Path(__file__).parents[2]


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        timeout=120,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def instruction_sets() -> list[str]:
    """Those of this processor."""
    try:
        flags = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ["baseline"]
    found = ["baseline"]
    if {"avx2", "fma", "f16c"} <= flags:
        found.append("avx2")
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        found.append("avx512")
        if "avx512_bf16" in flags:
            found.append("avx512bf16")
    return found


def test_the_best_instruction_set_serves_unless_another_is_asked_for() -> None:
    if not os.environ.get("BATCHNORM_ISA"):
        assert library.instruction_set() == instruction_sets()[-1]


@pytest.mark.parametrize("name", instruction_sets())
def test_every_instruction_set_gives_the_same_within_rounding(name: str, tmp_path: pathlib.Path) -> None:
    code = """
        library.set_num_threads(2)
        results = [found.astype(np.float64) for view in BUSY for dtype in TYPES for found in everything(view, dtype)]
        np.savez(sys.argv[1], *results)
        print(library.instruction_set())
    """
    assert run(code, str(tmp_path / "found.npz"), BATCHNORM_ISA=name).strip() == name
    with np.load(tmp_path / "found.npz") as file:
        found = iter([file[key] for key in file])
        for view, dtype in itertools.product(BUSY, TYPES):
            expected = everything(view, dtype)
            check_near([next(found) for _ in expected], expected, NEAR[dtype.name])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    code = """
        import multiprocessing, signal, time, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what this is about
        library.set_num_threads(3)
        view = View(5_003, 1, 1, 17, 1)
        expected = everything(view)
        stop = threading.Event()

        def busy():
            while not stop.is_set():
                everything(view)

        others = [threading.Thread(target=busy) for _ in range(2)]
        for round in range(6):
            if round == 3:  # from here on while other threads hold the pool
                for other in others: other.start()
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                os._exit(0 if all(same(everything(view), expected) for _ in range(3)) else 1)
            assert os.waitpid(child, 0)[1] == 0, "forked"
            assert round > 2 or same(everything(view), expected)
        stop.set()
        for other in others: other.join()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for found in pool.map_async(everything, [view] * 4).get(60):
                assert same(found, expected)
        print("done")
    """
    assert run(code).strip() == "done"


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory the way of Linux")
LIMIT = """
    import resource

    def limit(more):
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))
"""


@linux
def test_where_no_more_threads_are_to_be_had_those_there_are_do_it() -> None:
    code = """
        view = View(60_000, 1, 1, 3, 1)
        x = drawn(view, TYPES[0], 0)
        expected, mean, variance = moments(view, x), *moments(view, x)
        mean[:] = variance[:] = 0
        library.set_num_threads(10**9)
        assert library.num_threads() == 1024
        limit(100 << 20)
        kernel(view, x.dtype).moments(x=x, mean=mean, variance=variance)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert len(os.listdir("/proc/self/task")) < 100
        check_near([mean, variance], list(expected), NEAR["float32"])
        print("done")
    """
    assert run(textwrap.dedent(LIMIT) + textwrap.dedent(code)).strip() == "done"


@linux
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_memory_that_is_not_to_be_had_is_an_error_of_the_caller_whichever_thread_asks(threads: int) -> None:
    code = """
        threads = int(sys.argv[1])
        library.set_num_threads(threads)
        small = View(5_003, 1, 1, 17, 1)
        expected = everything(small)
        view = View(8, 8, 1, 4_000_000, 1)  # needs more than 100 MB
        x, y = np.zeros(view.size, np.float32), np.zeros(view.size, np.float32)
        mean, variance = np.zeros(view.statistics, np.float32), np.zeros(view.statistics, np.float32)
        arrays = dict(x=x, y=y, mean=mean, variance=variance)
        for _ in range(3):
            limit(20 << 20)
            try:
                kernel(view, x.dtype).forward(**arrays)
            except MemoryError:
                pass
            else:
                raise AssertionError("there was enough")
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert same(everything(small), expected)
        kernel(view, x.dtype).forward(**arrays)
        print("done")
    """
    assert run(textwrap.dedent(LIMIT) + textwrap.dedent(code), str(threads)).strip() == "done"


@linux
def test_a_few_wide_rows_need_no_memory_for_every_thread() -> None:
    code = """
        view = View(2, 1, 1, 4_000_000, 1)
        x = drawn(view, TYPES[0], 0)
        mean, variance = np.zeros(view.statistics, np.float32), np.zeros(view.statistics, np.float32)
        library.set_num_threads(16)
        limit(400 << 20)  # for what is 128 MB, and threads
        kernel(view, x.dtype).moments(x=x, mean=mean, variance=variance)
        assert np.allclose(mean, x.reshape(2, -1).mean(axis=0), atol=1e-5)
        print("done")
    """
    assert run(textwrap.dedent(LIMIT) + textwrap.dedent(code)).strip() == "done"
