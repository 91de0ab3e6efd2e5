"""What the kernel benchmarks share: options, the ``measure`` fixture, and results with bytes and environment.

Loaded by ``pytest bench/`` only; the commands are in test_kernels.py.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from misa_engine.bench.measure import environment, synchronize

#: Parameters of the updates, by device.
SIZES = {"cuda": "4M,16M,64M,240M", "cpu": "1M,4M,8M"}
SUFFIXES = {"k": "e3", "M": "e6"}
#: Shape of the models and layers, by device; "tiny" when every size asked for is below 1M.
SHAPE_OF = {"cuda": "large", "cpu": "small"}
#: Bytes from here on do not change a copy's bandwidth, and two buffers of half of it fit beside any arena.
LARGEST_COPY = 1 << 31

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
not_run = pytest.StashKey[list[dict[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--sizes`` and ``--rounds``."""
    group = parser.getgroup("kernel benchmarks")
    group.addoption("--sizes", default=SIZES[DEVICE.type], help="parameters of each update, as in 4M,240M or 20k")
    group.addoption("--rounds", type=int, default=15, help="timed runs of each benchmark, after 3 for warm-up")


def sizes_asked_for(config: pytest.Config) -> dict[str, int]:
    """The numbers of ``--sizes`` by what was written."""
    sizes = {}
    for text in config.getoption("--sizes").split(","):
        try:
            sizes[text] = round(float(text[:-1] + SUFFIXES.get(text[-1:], text[-1:])))
        except ValueError:
            raise pytest.UsageError(f"--sizes: {text!r} is no number of parameters; write 4M, 20k or 20000") from None
    return sizes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give tests with ``parameters`` every size, tests with ``shape`` the one that suits the device."""
    sizes = sizes_asked_for(metafunc.config)
    if "parameters" in metafunc.fixturenames:
        metafunc.parametrize("parameters", sizes.values(), ids=list(sizes))
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", ["tiny" if max(sizes.values()) < 10**6 else SHAPE_OF[DEVICE.type]])


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return DEVICE


# ---- time ----


def seconds_of(work: Callable[[], object]) -> float:
    """How long ``work`` takes; it runs many times.

    On a GPU the median between two events, so that synchronisation does not count, with the second-level cache flushed
    before each run as the backward pass before an update would. On a CPU the shortest of 30 runs: what else a machine
    does only ever makes it slower.
    """
    if DEVICE.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(work, return_mode="median")) / 1e3
    return min(timeit.repeat(work, number=1, repeat=30))


@cache
def copy_bandwidth(size: int) -> float:
    """Bytes per second of a copy that reads and writes ``size`` bytes together."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.ones_like(source)
    return size / seconds_of(lambda: target.copy_(source))


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest):
    """``measure(work, nbytes, group, scheme)`` times ``work`` and records bytes, GB/s and % of the copy bandwidth.

    The time of the table is by the clock, with one synchronisation in each run. GB/s and % use it on a CPU; on a GPU
    they use the time between two events where ``work`` may run any number of times, else the clock too: ``timed_by``.
    The copy moves as many bytes to the next power of two: below the size of a cache both would run from the cache.
    """
    on_gpu = DEVICE.type == "cuda"

    def run(
        work: Callable[[], object],
        nbytes: float | Callable[[], float],
        group: str,
        scheme: str,
        setup: Callable[[], None] | None = None,
        facts: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        rounds = request.config.getoption("--rounds")
        benchmark.group = group
        held_bytes = 0

        def timed() -> None:
            work()
            synchronize(DEVICE)

        def prepare() -> None:
            nonlocal held_bytes
            if setup is not None:
                setup()
            synchronize(DEVICE)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(DEVICE)
                held_bytes = torch.cuda.memory_allocated(DEVICE)

        benchmark.pedantic(timed, setup=prepare, rounds=rounds, warmup_rounds=min(3, rounds))
        info = benchmark.extra_info
        if on_gpu:  # what the last run allocated on top
            info["allocated_mb"] = (torch.cuda.max_memory_allocated(DEVICE) - held_bytes) / 1e6
        moved = nbytes() if callable(nbytes) else nbytes  # of a switch known only afterwards
        info |= {"scheme": scheme, "bytes": round(moved), **facts()}
        if benchmark.disabled:
            return
        by_events = on_gpu and setup is None
        seconds = seconds_of(work) if by_events else benchmark.stats.stats.median
        percent = (
            100 * moved / seconds / copy_bandwidth(min(LARGEST_COPY, max(1 << 12, 1 << round(moved).bit_length())))
        )
        info |= {"timed_by": "events" if by_events else "clock", "seconds": seconds}
        info |= {"gb_per_s": moved / seconds / 1e9, "percent_of_copy": percent}

    yield run
    # written after each benchmark, so that whatever ends the run leaves the rows
    session = request.config._benchmarksession  # type: ignore[attr-defined]
    if session.json and not session.disabled:
        level, session.logger.level = session.logger.level, session.logger.QUIET
        session.handle_saving()
        session.logger.level = level
    if on_gpu:
        torch.cuda.empty_cache()  # the next benchmark has buffers of other sizes


# ---- results ----


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Make too little memory a result: the other benchmarks still run."""
    try:
        return (yield)
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Remember what was skipped: an absent package is part of the result."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        item.config.stash.setdefault(not_run, []).append({"name": item.name, "reason": reason})
    return report


@cache
def here() -> dict[str, Any]:
    """The environment, asked for once: the results are written after each benchmark."""
    return environment(DEVICE)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Neither the host's name nor a list of processor features."""
    return {"machine": here()["hardware"]}


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    """The commit, without calling git each time."""
    return {"id": here()["commit"], "dirty": str(here()["commit"]).endswith("-dirty"), "branch": None}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add environment and what did not run; leave out single rounds, of which median and IQR are kept."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
    output_json["environment"] = {**here(), "command": " ".join(["pytest", *config.invocation_params.args])}
    output_json["not_run"] = config.stash.get(not_run, [])
