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
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the system the way of Linux")


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


@pytest.mark.parametrize("name", ["garbage", "AVX2", "avx", "0"])
def test_an_unknown_instruction_set_is_said_and_counts_as_none(name: str) -> None:
    code = """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import importlib, batchnorm.cpu
            importlib.reload(batchnorm.cpu)
        print(library.instruction_set(), *{str(each.message) for each in caught})
    """
    found, said = run(code, BATCHNORM_ISA=name).split(maxsplit=1)
    assert found == instruction_sets()[-1]
    assert "BATCHNORM_ISA must be avx512bf16, avx512, avx2 or baseline" in said
    assert f"received {name!r}" in said


@pytest.mark.parametrize("name", ["", *instruction_sets()])
def test_a_known_instruction_set_is_not_worth_a_word(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import batchnorm"],
        env={**os.environ, "BATCHNORM_ISA": name},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ---- How many threads there are by default.


needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")


@needs_affinity
def test_by_default_there_are_as_many_threads_as_processors_that_the_process_may_use() -> None:
    code = """
        if len(sys.argv) > 1:
            os.sched_setaffinity(0, {int(sys.argv[1])})
        print(library.processors(), library.num_threads())
    """
    some = min(os.sched_getaffinity(0))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for arguments in ((), (str(some),)):
        done = subprocess.run(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *arguments],
            env=environment, cwd=ROOT, text=True, capture_output=True, check=True,
        )  # fmt: skip
        processors, threads = map(int, done.stdout.split())
        assert processors == threads
        assert processors <= (1 if arguments else len(os.sched_getaffinity(0)))
    assert run(code, str(some), OMP_NUM_THREADS="3").split() == ["1", "3"]  # whoever asks, knows


UNLIMITED = 10**6
SECOND, FIRST = "sys/fs/cgroup", "sys/fs/cgroup/cpu"
QUOTAS: dict[str, tuple[str, dict[str, str], float]] = {
    "none": ("0::/a/b\n", {}, UNLIMITED),
    "no groups at all": ("", {f"{SECOND}/cpu.max": "100 100\n"}, UNLIMITED),
    "version 2": ("0::/a/b\n", {f"{SECOND}/a/b/cpu.max": "100000 100000\n"}, 1),
    "version 2, a part of one": ("0::/a/b\n", {f"{SECOND}/a/b/cpu.max": "5000 100000\n"}, 1),
    "version 2, one and a half": ("0::/a/b\n", {f"{SECOND}/a/b/cpu.max": "150000 100000\n"}, 2),
    "version 2, unlimited": ("0::/a/b\n", {f"{SECOND}/a/b/cpu.max": "max 100000\n"}, UNLIMITED),
    "version 2, above": (
        "0::/a/b\n",
        {f"{SECOND}/a/b/cpu.max": "max 100000\n", f"{SECOND}/a/cpu.max": "100000 100000\n"},
        1,
    ),
    "version 2, in a container": ("0::/\n", {f"{SECOND}/cpu.max": "50000 50000\n"}, 1),
    "version 2, another group": ("0::/a\n", {f"{SECOND}/b/cpu.max": "50000 50000\n"}, UNLIMITED),
    "version 1": (
        "5:memory:/m\n4:cpu,cpuacct:/a\n1:name=systemd:/s\n",
        {f"{FIRST}/a/cpu.cfs_quota_us": "100000\n", f"{FIRST}/a/cpu.cfs_period_us": "100000\n"},
        1,
    ),
    "version 1, unlimited": (
        "4:cpu:/a\n",
        {f"{FIRST}/a/cpu.cfs_quota_us": "-1\n", f"{FIRST}/a/cpu.cfs_period_us": "100000\n"},
        UNLIMITED,
    ),
    "version 1, in a container": (
        "4:cpuacct,cpu:/docker/123\n",
        {f"{FIRST}/cpu.cfs_quota_us": "70000\n", f"{FIRST}/cpu.cfs_period_us": "100000\n"},
        1,
    ),
    "version 1, sets of processors only": (
        "4:cpuset:/a\n",
        {f"{FIRST}/a/cpu.cfs_quota_us": "70000\n", f"{FIRST}/a/cpu.cfs_period_us": "100000\n"},
        UNLIMITED,
    ),
    "nonsense": ("::\n4\nx:cpu:\n0::a\n", {f"{SECOND}/cpu.max": "many\n", f"{SECOND}/a/cpu.max": "7 0\n"}, UNLIMITED),
}


@needs_affinity
@pytest.mark.parametrize("case", QUOTAS)
def test_the_quota_of_a_control_group_limits_the_default(case: str, tmp_path: pathlib.Path) -> None:
    groups, files, expected = QUOTAS[case]
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert library.processors(str(tmp_path)) == min(expected, len(os.sched_getaffinity(0)))


@linux
def test_where_the_framework_s_threads_are_not_found_its_number_of_threads_is_kept_to_all_the_same() -> None:
    code = """
        library.use_openmp(0)
        library.set_num_threads(1)
        view = View(5_003, 1, 1, 17, 1)
        x = drawn(view, TYPES[0], 0)
        y, mean, variance = np.empty_like(x), *np.empty((2, 17))
        before = len(os.listdir("/proc/self/task"))
        for threads in (1, 4):
            kernel(view, x.dtype).forward_at(
                threads=threads, x=x.ctypes.data, y=y.ctypes.data, mean=mean.ctypes.data, variance=variance.ctypes.data)
            print(len(os.listdir("/proc/self/task")) - before)
    """
    assert run(code).split() == ["0", "3"]


# ---- The end of a process.


@pytest.mark.parametrize("attempt", range(3))
def test_a_program_may_end_while_daemon_threads_are_in_a_kernel(attempt: int) -> None:
    code = """
        import time
        library.set_num_threads(2)
        jobs = [(View(200_000, 1, 1, 16, 1), 0), (View(50, 1, 1, 3, 1), 0)]

        def forever(view):
            x = drawn(view, TYPES[0], 0)
            y, mean, variance = np.empty_like(x), *np.empty((2, view.features))
            call, addresses = kernel(view, x.dtype), dict(
                threads=1, x=x.ctypes.data, y=y.ctypes.data, mean=mean.ctypes.data, variance=variance.ctypes.data)
            while True:
                call.forward(x=x, y=y, mean=mean, variance=variance)
                call.forward_at(**addresses)

        for view, _ in jobs * 2:
            threading.Thread(target=forever, args=[view], daemon=True).start()
        time.sleep(0.2)
        print("done")
    """
    assert run(code).strip() == "done"


# ---- Processes that fork, and memory that runs out.


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
