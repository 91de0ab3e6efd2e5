"""Plain ``pytest`` runs in two processes; whatever is named on the command line runs as it says."""

from types import SimpleNamespace

import pytest

import conftest

TESTPATHS, ARGS = pytest.Config.ArgsSource.TESTPATHS, pytest.Config.ArgsSource.ARGS


def start(monkeypatch: pytest.MonkeyPatch, source=TESTPATHS, worker: bool = False, **options) -> SimpleNamespace:
    """The options after the hook has seen them."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    if worker:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    option = SimpleNamespace(**{"numprocesses": None, "dist": "no", "benchmark_disable": False, **options})
    config = SimpleNamespace(
        option=option, args_source=source, getoption=lambda name, default=None: getattr(option, name, default)
    )
    conftest.pytest_cmdline_main(config)
    return option


def test_the_whole_suite_runs_in_two_processes_without_benchmarks(monkeypatch):
    option = start(monkeypatch)
    assert (option.numprocesses, option.dist, option.benchmark_disable) == (2, "worksteal", True)


@pytest.mark.parametrize(
    "given",
    [
        {"source": ARGS},
        {"worker": True},  # or each process would start two more, for ever
        {"numprocesses": 0},
        {"numprocesses": 5, "dist": "load"},
        {"usepdb": True},
        {"collectonly": True},
    ],
    ids=str,
)
def test_anything_else_is_left_as_it_was_asked_for(monkeypatch, given):
    option = start(monkeypatch, **given)
    assert option.numprocesses == given.get("numprocesses") and option.dist == given.get("dist", "no")
    assert not option.benchmark_disable


@pytest.mark.parametrize("marker", ["exhaustive", "soak"])
@pytest.mark.parametrize("chosen", [True, False])
def test_long_tests_run_only_when_they_are_asked_for(marker, chosen):
    added: list = []
    item = SimpleNamespace(keywords=set(), get_closest_marker=[marker].count, add_marker=added.append)
    config = SimpleNamespace(getoption=lambda name: marker if chosen else "not gpu")
    conftest.pytest_collection_modifyitems(config, [item])
    assert len(added) == (0 if chosen else 1)
