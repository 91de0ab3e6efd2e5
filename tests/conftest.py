import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
torch.set_num_threads(1)  # faster than two for tiny models, and the same sums on every machine


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("-m")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none is visible"))
        if "exhaustive" in item.keywords and "exhaustive" not in chosen:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m exhaustive"))
