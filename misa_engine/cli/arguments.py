"""What ``misa train`` accepts: flags and YAML, one parser for both.

Four dataclasses hold our own options (the last is made from MisaConfig, so that an option exists once); TRL's
SFTConfig holds the rest. A YAML file is turned into the same tokens as the command line, so types, choices and errors
are the same, and a flag replaces the file's value. TRL and transformers are imported only when a run is parsed: the
import takes 5 s, ``misa train --help`` 0.1 s.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, make_dataclass
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from misa_engine.cli.evaluation_data import EVAL_DATA, check_evaluation_data
from misa_engine.cli.objective import check_objective
from misa_engine.cli.resident_options import check_residents
from misa_engine.errors import UserError, bad_input, did_you_mean
from misa_engine.method.config import CHOICES, PRESET_OPTIONS, MisaConfig
from misa_engine.trainer.compat import (
    CHECKPOINTING_KWARGS,
    FROM_ARGUMENTS,
    NON_REENTRANT,
    asks_reentrant,
    checkpointing_option,
    compiled_modules_follow,
    shared_options,
)

if TYPE_CHECKING:
    from trl import SFTConfig

RECIPES = Path(__file__).parents[1] / "recipes"

#: Where SFTConfig's own defaults would hurt, and the value used unless the user gives one.
SFT_DEFAULTS: dict[str, Any] = {
    "learning_rate": MisaConfig.lr,
    "bf16": False,  # autocast; a bf16 model needs none and MISA keeps its exact fp32 master (TRL's default: on)
    "report_to": "none",
    "save_total_limit": 2,  # a checkpoint of an 8B model takes 16 GB
}

#: Names under which torch's allocator is configured; the older two are read first, so ours must not hide behind them.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def option(help: str, default: Any = None, **metadata: Any) -> Any:
    """A dataclass field that HfArgumentParser can turn into a flag."""
    metadata["help"] = help
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """Model."""

    model_name_or_path: str | None = option(
        "directory or Hub id of a causal language model (required)", aliases=["--model"]
    )
    tokenizer_name_or_path: str | None = option("directory or Hub id of the tokenizer, if it is not with the model")
    dtype: str | None = option(
        "bfloat16, float32 or auto, the checkpoint's own (default: bfloat16 on a GPU, auto on a CPU)",
    )
    attn_implementation: str | None = option("sdpa, eager, flash_attention_2, ... (default: transformers' choice)")
    residents: str | None = option(
        "int8, fp8 or int8_row: what is not drawn rests in 8 bits on the card, exact in host memory (default: none)"
    )
    from_scratch: bool = option("start from random weights; only the configuration is read", default=False)
    config_overrides: dict[str, Any] | str | None = option("JSON object of model configuration fields to replace")


@dataclass
class DataArguments:
    """Data."""

    dataset: list[str] = option(
        "a .jsonl, .json, .parquet, .csv, .tsv or plain text file (also .gz), a directory of such files, or a Hub id; "
        "several, or the option again, are put together (required)",
        default=[],
        action="extend",
    )
    dataset_weights: list[float] = option(
        "how many times each record of each --dataset is taken, one number a data set; 0.5: half of its records, "
        "drawn by --seed",
        default=[],
        action="extend",
    )
    columns: str | None = option("which columns of the data are which: prompt=q,completion=a")
    dataset_config: str | None = option("name of the Hub data set's configuration")
    dataset_split: str = option("split to train on", default="train")
    dataset_streaming: bool = option("read a Hub data set while training on it; needs --max_steps", default=False)
    eval_dataset: list[str] = option(
        "evaluate on this file, directory or Hub id, before, during and after training", default=[], action="extend"
    )
    eval_split: str | None = option("evaluate on this split of --eval_dataset, or else of --dataset")
    eval_fraction: float | None = option("hold out this share of the training data for evaluation, drawn by --seed")
    max_eval_samples: int | None = option("evaluate on the first this many records only")


@dataclass
class RunArguments:
    """Run."""

    optimizer: str = option("misa, or adamw: torch's fused AdamW on all weights, to compare with", default="misa")
    objective: str = option(
        "sft (next tokens of texts, prompts with completions, messages), or dpo: preferences (chosen, rejected)",
        default="sft",
    )
    beta: float | None = option("of dpo: how far the model may move from where it starts (default: 0.1)")
    dpo_options: dict[str, Any] | str | None = option("JSON object of more options of TRL's DPOConfig")
    resize_embeddings: bool = option(
        "give the model a row for each token of a larger tokenizer; embedding and head are then always trained",
        default=False,
    )
    overwrite_output_dir: bool = option("delete the run that --output_dir holds; other files stay", default=False)
    max_vram_gb: float | None = option(
        "GiB that the run may take: fills in micro-batch, checkpointing, state_dtype and delta where they are not "
        "given, or refuses before anything is loaded"
    )
    dry_run: bool = option("print units, budget, first draw and memory, then stop; nothing is written", default=False)


def attribute_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, which Python itself throws away."""
    docs: dict[str, str] = {}
    for part in (kind for kind in cls.__mro__ if is_dataclass(kind)):
        body = ast.parse(inspect.getsource(part)).body[0].body  # type: ignore[attr-defined]
        for entry, following in zip(body, body[1:], strict=False):
            if isinstance(entry, ast.AnnAssign) and isinstance(following, ast.Expr):
                text = " ".join(ast.literal_eval(following.value).split())
                docs.setdefault(entry.target.id, text)  # type: ignore[union-attr]
    return docs


def _misa_arguments() -> type:
    """MisaConfig as flags: tuples become lists, dictionaries JSON, and what SFTConfig has is left to it."""
    hints, docs = get_type_hints(MisaConfig), attribute_docs(MisaConfig)
    members: list[tuple[str, Any, Field]] = []
    for entry in fields(MisaConfig):
        if entry.name in FROM_ARGUMENTS:
            continue
        hint, help = hints[entry.name], docs[entry.name].replace("``", "").replace("%", "%%")
        choices = CHOICES.get(entry.name, ())
        if not all(choice in help for choice in choices):
            help += f" One of {', '.join(choices)}."
        default = entry.default
        if entry.name in PRESET_OPTIONS:
            help, default = f"{help} (default: the preset's)", None
        if hint == tuple[str, ...]:
            members.append((entry.name, list[str], option(help, default=[], action="extend")))
        elif entry.name in ("parameter_groups", "static_weights"):
            shape = "list of objects" if entry.name == "parameter_groups" else "object"
            members.append((entry.name, dict[str, Any] | str | None, option(f"JSON {shape}. {help}")))
        else:
            members.append((entry.name, hint, option(help, default=default)))
    made = make_dataclass("MisaArguments", members)
    made.__doc__ = "MISA."
    return made


MisaArguments = _misa_arguments()
OURS: tuple[Any, ...] = (ModelArguments, DataArguments, RunArguments, MisaArguments)
#: Second names of options, as a YAML file has them.
ALIASES = {
    alias.lstrip("-"): entry.name
    for cls in OURS
    for entry in fields(cls)
    for alias in entry.metadata.get("aliases", ())
}


@dataclass(frozen=True)
class TrainArguments:
    """One parsed and validated run."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    misa: MisaConfig
    sft: SFTConfig
    given: frozenset[str]
    """Options that the user set, in the file or on the command line."""


def parse_train(argv: Sequence[str], config: str | None = None) -> TrainArguments:
    """Parse flags over a YAML file or recipe; raise UserError for anything unknown or invalid."""
    values = read_config(config) if config else {}
    set_environment(values.pop("env", None) or {})
    parser = build_parser()
    merged = parse_tokens(parser, _yaml_tokens(parser, values, config), f"{config}: ") if values else {}
    hints = {name: hint for cls in parser.dataclass_types for name, hint in get_type_hints(cls).items()}
    # null says None where None means something (max_length), and otherwise that the option is not set
    merged.update({key: None for key, value in values.items() if value is None and NoneType in get_args(hints[key])})
    merged.update(parse_tokens(parser, argv))
    given = frozenset(merged)
    _check_together(merged)
    _fill_defaults(merged, parser)
    with bad_input():
        model, data, run, misa, sft = parser.parse_dict(merged)
    for text, where in (
        (model, "config_overrides"),
        (run, "dpo_options"),
        (misa, "parameter_groups"),
        (misa, "static_weights"),
    ):
        setattr(text, where, _from_json(where, getattr(text, where)))
    return TrainArguments(model, data, run, misa_config(misa, sft), sft, given)


def set_environment(wanted: Mapping[str, Any]) -> None:
    """The configuration's variables where the shell has none, and growing memory segments unless either says otherwise.

    To be called before torch is imported: its allocator reads the environment once.
    """
    for name, value in wanted.items():
        os.environ.setdefault(name, str(value))
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        # sequences of changing length split fixed segments: a peer saw 16.4 GiB reserved become 10.8 (torchtune#1185)
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def build_parser() -> Any:
    """TRL's parser over our dataclasses and SFTConfig, without abbreviations, defaults or argparse's own exit."""
    from trl import SFTConfig, TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> Any:
            raise UserError(message)

    classes: list[Any] = [*OURS, SFTConfig]
    parser = Parser(classes, prog="misa train", allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # what is found is what the user gave; defaults come from the dataclasses
        if action.dest == "resume_from_checkpoint":  # SFTConfig's takes a path only
            action.nargs, action.const = "?", "true"
        if action.dest == "report_to":
            action.nargs = "+"
        if getattr(action.type, "__name__", "") == "string_to_bool":  # --bf16 alone, whose default is None
            action.nargs, action.const = "?", True
    return parser


def parse_tokens(parser: Any, tokens: Sequence[str], where: str = "") -> dict[str, Any]:
    """What ``tokens`` set, and nothing else."""
    options = {action.dest for action in parser._actions if action.dest != "help"}
    try:
        found, rest = parser.parse_known_args(list(tokens))
    except UserError as error:
        raise UserError(f"{where}{error}") from None
    unknown = [token for token in rest if token.startswith("--")] or rest
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            raise UserError(f"{where}unexpected value {name!r}: every option starts with --")
        raise UserError(f"{where}{_unknown(name.lstrip('-').replace('-', '_'), options, '--')}")
    return vars(found)


def _unknown(name: str, options: set[str], prefix: str) -> str:
    theirs = f" and {prefix}".join(FROM_ARGUMENTS.get(name, ()))
    hint = f" Use {prefix}{theirs}." if theirs else did_you_mean(name, options, prefix)
    return f"unknown option {prefix}{name}.{hint} 'misa train --help' lists the options, --help_all all of them."


def read_config(config: str) -> dict[str, Any]:
    """A YAML mapping from a file, or from a packaged recipe by name."""
    import yaml

    path = Path(config).expanduser()
    recipe = RECIPES / f"{config.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        if not recipe.is_file():
            raise UserError(f"--config {config}: neither a file nor a recipe. Recipes: {', '.join(recipe_names())}.")
        path = recipe
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config {config} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {config} must hold 'option: value' lines; it holds {type(values).__name__}.")
    env = values.get("env") or {}
    if not isinstance(env, dict):
        raise UserError(f"--config {config}: env must map names of environment variables to values; got {env!r}.")
    named = ((str(key).replace("-", "_"), value) for key, value in values.items())
    return {ALIASES.get(name, name): value for name, value in named}


def recipe_names() -> list[str]:
    """Names that ``--config`` takes without a path."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _yaml_tokens(parser: Any, values: Mapping[str, Any], config: str | None) -> list[str]:
    """The command line that says the same as ``values``."""
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    tokens = []
    for key, value in values.items():
        if key not in actions:
            raise UserError(f"{config}: {_unknown(key, set(actions), '')}")
        if value is None:
            continue
        items = value if isinstance(value, list) and actions[key].nargs == "+" else [value]
        if actions[key].nargs == "+" and type(actions[key]).__name__ != "_ExtendAction":
            tokens += [f"--{key}", *map(_yaml_text, items)]
        else:
            tokens += [f"--{key}={_yaml_text(item)}" for item in items]
    return tokens


def _yaml_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)


def _from_json(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"--{name} needs JSON; got {value[:200]!r} ({error})") from error


def _check_together(given: Mapping[str, Any]) -> None:
    """Refuse what MISA cannot honour instead of ignoring it."""
    optimizer = given.get("optimizer", "misa")
    if optimizer not in ("misa", "adamw"):
        raise UserError(f"--optimizer must be misa or adamw; got {optimizer!r}")
    if given.get("fp16"):
        raise UserError("--fp16 needs loss scaling, which MISA's exact master weights make needless: use --bf16.")
    for name in CHECKPOINTING_KWARGS:
        if asks_reentrant(given.get(name)):
            raise UserError(
                f"--{name}: use_reentrant=True cannot run backward past frozen layers; leave it out (it is False)."
            )
    if given.get("torch_compile") and optimizer == "misa" and not compiled_modules_follow(version("torch")):
        raise UserError(
            f"--torch_compile needs torch 2.13 or newer; this is {version('torch')}, whose compiled layers may miss "
            "that other matrices are active in the next round: leave it out, or upgrade torch."
        )
    if optimizer == "misa":
        for name in ("optim", "optim_args", "optim_target_modules", "deepspeed"):
            if given.get(name):
                raise UserError(f"--{name} chooses another optimizer; leave it out, or say --optimizer adamw.")
    for name in ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"):
        if given.get(name) is not None and given[name] < 1:
            raise UserError(f"--{name} must be at least 1; got {given[name]}")
    check_evaluation_data(given)
    check_residents(given)
    if given.get("dataset_streaming") and not given.get("max_steps"):
        raise UserError("--dataset_streaming needs --max_steps: the length of a streamed data set is unknown.")
    check_objective(given)


def _fill_defaults(merged: dict[str, Any], parser: Any) -> None:
    """Our defaults for SFTConfig where the user said nothing."""
    known = {action.dest for action in parser._actions}
    new = checkpointing_option(known)
    for suffix in ("", "_kwargs"):
        old = merged.pop(f"gradient_checkpointing{suffix}", None)
        if merged.get(f"{new}{suffix}") is None and old is not None:
            merged[f"{new}{suffix}"] = old
    merged.setdefault(new, True)
    kwargs = _from_json(f"{new}_kwargs", merged.get(f"{new}_kwargs")) or {}
    merged[f"{new}_kwargs"] = {**NON_REENTRANT, **kwargs}
    if any(merged.get(name) for name in EVAL_DATA):
        merged.setdefault("eval_strategy", "steps")
        merged.setdefault("eval_on_start", True)
        if merged["eval_strategy"] == "steps":
            merged.setdefault("eval_steps", 0.1)
    for name, value in SFT_DEFAULTS.items():
        merged.setdefault(name, value)
    if "per_device_train_batch_size" in merged:  # evaluation must not need more memory than training (TRL's default: 8)
        merged.setdefault("per_device_eval_batch_size", merged["per_device_train_batch_size"])
    if merged["bf16"]:
        import torch

        if not torch.accelerator.is_available():
            merged.setdefault("use_cpu", True)  # transformers takes bf16 on a CPU only when the CPU is asked for


def misa_config(misa: Any, sft: SFTConfig) -> MisaConfig:
    """The engine's options from ours and from those that SFTConfig has."""
    options = {entry.name: getattr(misa, entry.name) for entry in fields(misa)}
    options = {name: value for name, value in options.items() if value is not None}
    with bad_input():
        return MisaConfig.from_dict({**options, **shared_options(sft)})
