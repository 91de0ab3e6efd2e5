import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
torch.set_num_threads(1)  # faster than two for tiny models, and the same sums on every machine

#: Processes of plain `pytest`. A fixed number: 16 at 1 GB each would not fit a small machine with many cores.
WORKERS = 2


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in WORKERS processes; what is named on the command line runs in this one (or as -n says).

    Each process begins with its half of the files and takes from the other's end when it is done. pytest-benchmark
    cannot measure then and would warn; `pytest bench/ --benchmark-only` names a directory and is not touched.
    """
    worker = "PYTEST_XDIST_WORKER" in os.environ  # its own command line says nothing of -n
    alone = worker or config.getoption("usepdb", False) or config.getoption("collectonly", False)
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS or alone:
        return
    if config.getoption("numprocesses", None) is None and config.getoption("dist", None) == "no":
        config.option.numprocesses, config.option.dist = WORKERS, "worksteal"
        config.option.benchmark_disable = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("-m")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none is visible"))
        for marker, length in (("exhaustive", "minutes"), ("soak", "minutes to hours")):
            # by marker: keywords also hold the names of folders, and tests/soak is one
            if item.get_closest_marker(marker) and marker not in chosen:
                item.add_marker(pytest.mark.skip(reason=f"takes {length}; run with -m {marker}"))
