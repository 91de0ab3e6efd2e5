"""What can be known to be missing at once: data files, packages of trackers. Looked at before a model is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from misa_engine.cli.data_files import is_data_name
from misa_engine.cli.hub import is_path
from misa_engine.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from misa_engine.cli.arguments import TrainArguments

#: Value of --report_to -> the packages of which one is needed, and what pip calls it.
TRACKERS = {
    "azure_ml": (("azureml",), "azureml-sdk"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "kubeflow": ((), ""),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}


def check_early(arguments: TrainArguments) -> None:
    """Data files and trackers; raises UserError for the first that is missing."""
    check_trackers(arguments.sft.report_to)
    for source in (*arguments.data.dataset, *arguments.data.eval_dataset):
        check_there(source)


def check_trackers(wanted: str | Iterable[str] | None) -> None:
    """Raise UserError for a tracker that transformers does not know or whose package is missing."""
    for name in [wanted] if isinstance(wanted, str) else wanted or ():
        if name in ("none", "all"):
            continue
        if name not in TRACKERS:
            hint = did_you_mean(name, TRACKERS)
            raise UserError(f"--report_to {name}: known are {', '.join(TRACKERS)} and none.{hint}")
        packages, pip = TRACKERS[name]
        if packages and not any(find_spec(package) for package in packages):
            raise UserError(f"--report_to {name}: {packages[0]} is not installed: pip install {pip}")


def check_there(source: str) -> None:
    """Raise UserError for what looks like a local file or directory and is none."""
    path = Path(source).expanduser()
    looks_local = is_data_name(path) or is_path(source)
    if looks_local and not path.exists():
        raise UserError(f"data file {source} does not exist (looked in {Path.cwd()}).")
