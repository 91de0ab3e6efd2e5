"""What the kernel benchmarks share: options, the ``measure`` fixture, and results with bytes and environment.

Loaded by ``pytest bench/`` only; the commands are in test_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from misa_engine.bench.bandwidth import CopyBandwidth, event_seconds
from misa_engine.bench.measure import environment, synchronize
from misa_engine.bench.tables import kernel_page

#: Parameters of the updates, by device.
SIZES = {"cuda": "4M,16M,64M,240M", "cpu": "1M,4M,8M"}
SUFFIXES = {"k": 10**3, "M": 10**6}
#: Shape of the models and layers, by device; "tiny" when every size asked for is below 1M.
SHAPE_OF = {"cuda": "large", "cpu": "small"}

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
not_run = pytest.StashKey[list[dict[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--sizes`` and ``--rounds``."""
    group = parser.getgroup("kernel benchmarks")
    group.addoption("--sizes", default=SIZES[DEVICE.type], help="parameters of each update, as in 4M,240M or 20k")
    group.addoption("--rounds", type=int, default=15, help="timed runs of each benchmark, after 3 for warm-up")


def pytest_configure(config: pytest.Config) -> None:
    """Show medians and spreads unless the caller chose columns."""
    config.stash[not_run] = []
    if not config.getoption("benchmark_columns", default=None):
        config.option.benchmark_columns = ["median", "iqr", "min", "max", "rounds"]
    if config.getoption("benchmark_sort", default="min") == "min":
        config.option.benchmark_sort = "median"


def sizes_asked_for(config: pytest.Config) -> dict[str, int]:
    """The numbers of ``--sizes`` by what was written."""
    sizes = {}
    for text in config.getoption("--sizes").split(","):
        number, factor = (text[:-1], SUFFIXES[text[-1]]) if text[-1:] in SUFFIXES else (text, 1)
        try:
            sizes[text] = round(float(number) * factor)
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


@pytest.fixture(scope="session")
def copy_bandwidth(device: torch.device) -> CopyBandwidth:
    """Bandwidths of copies, each size measured once a session."""
    return CopyBandwidth(device)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest, device: torch.device, copy_bandwidth: CopyBandwidth):
    """``measure(work, nbytes, group, scheme)`` times ``work`` and records bytes, GB/s and % of the copy bandwidth.

    The time of the table is by the clock, with one synchronisation in each run. GB/s and % use it on a CPU; on a GPU
    they use the time between two events where ``work`` may run any number of times, else the clock too: ``timed_by``.
    """

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
            synchronize(device)

        def prepare() -> None:
            nonlocal held_bytes
            if setup is not None:
                setup()
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                held_bytes = torch.cuda.memory_allocated(device)

        benchmark.pedantic(timed, setup=prepare, rounds=rounds, warmup_rounds=min(3, rounds))
        if device.type == "cuda":  # what the last run allocated on top
            extra_bytes = torch.cuda.max_memory_allocated(device) - held_bytes
            benchmark.extra_info.update(allocated_mb=extra_bytes / 1e6)
        moved = nbytes() if callable(nbytes) else nbytes  # of a switch known only afterwards
        benchmark.extra_info.update(scheme=scheme, bytes=round(moved), **facts())
        if benchmark.disabled:
            return
        by_events = device.type == "cuda" and setup is None
        seconds = event_seconds(work) if by_events else benchmark.stats.stats.median
        benchmark.extra_info.update(
            timed_by="events" if by_events else "clock",
            seconds=seconds,
            gb_per_s=moved / seconds / 1e9,
            percent_of_copy=100 * moved / seconds / copy_bandwidth(moved),
        )

    yield run
    save_so_far(request.config)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the next benchmark has buffers of other sizes


def save_so_far(config: pytest.Config) -> None:
    """Write what ``--benchmark-json`` asks for after each benchmark, so that whatever ends the run leaves the rows."""
    session = config._benchmarksession  # type: ignore[attr-defined]
    if session.json and not session.disabled:
        level, session.logger.level = session.logger.level, session.logger.QUIET
        session.handle_saving()
        session.logger.level = level


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
        item.config.stash[not_run].append({"name": item.name, "reason": reason})
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
    command = " ".join(["pytest", *config.invocation_params.args])
    output_json["environment"] = {**here(), "command": command}
    output_json["not_run"] = config.stash[not_run]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table that pytest-benchmark has no columns for."""
    session = getattr(config, "_benchmarksession", None)
    if session is None or session.disabled:
        return
    rows = [row.as_dict(include_data=False) for row in session.benchmarks if not row.has_error]
    if rows:
        terminalreporter.write_line("")
        terminalreporter.write_line(kernel_page({"benchmarks": rows, "not_run": config.stash[not_run]}))
