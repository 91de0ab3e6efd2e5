"""Model and tokenizer, checked before anything is written and loaded straight to their device and dtype."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.cli.arguments import ModelArguments
from misa_engine.cli.hub import check_reachable, is_path
from misa_engine.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


def check_model_directory(name: str, weights: bool = True) -> None:
    """Look at a local directory before transformers does: its errors speak of the Hub when a path is mistyped."""
    path = Path(name).expanduser()
    if not path.exists():
        if is_path(name):
            raise UserError(f"model directory {name} does not exist; looked in {Path.cwd()}.")
        return
    if not path.is_dir():
        raise UserError(f"--model_name_or_path {name} is a file; name the directory that holds it.")
    try:
        found = sorted(entry.name for entry in path.iterdir())
        config = path / "config.json"
        if not config.is_file():
            raise UserError(
                f"{name} is not a model directory: config.json is missing. Found: {', '.join(found[:8]) or 'nothing'}."
            )
        content = json.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"model directory {name} cannot be read: {error}") from error
    except RecursionError:
        raise UserError(f"{config} is nested too deeply to be a model's configuration: restore the file.") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{config} is not valid JSON: {error}. Restore the file.") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise UserError(f"{config} is no model's configuration: it has no 'model_type'. Restore the file.")
    if weights and not any(list(path.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        raise UserError(
            f"{name} holds no weights (*.safetensors). Found: {', '.join(found[:8])}. "
            "To train from random weights say --from_scratch."
        )


def load_config(arguments: ModelArguments, trust_remote_code: bool, *, option: str = "--model") -> PretrainedConfig:
    """The model's configuration with --config_overrides applied; ``option`` is what the user named the model with."""
    from transformers import AutoConfig

    from misa_engine.planner.worst_case import check_decoder

    name = arguments.model_name_or_path
    assert name is not None
    check_model_directory(name, weights=not arguments.from_scratch)
    check_reachable(name, "config.json", option)
    overrides = arguments.config_overrides or {}
    if not isinstance(overrides, dict):
        raise UserError(f"--config_overrides needs an object of configuration fields; got {overrides!r}")
    try:
        config = AutoConfig.from_pretrained(_place(name), trust_remote_code=trust_remote_code)
        unknown = [key for key in overrides if not hasattr(config, key)]
        if unknown:
            raise UserError(f"--config_overrides: {type(config).__name__} has no field {', '.join(unknown)}.")
        if overrides:  # into the file's own fields, so that what __init__ derives (head_dim) follows the new ones
            stored, _ = type(config).get_config_dict(_place(name))
            config = type(config).from_dict({**stored, **overrides})
            config._name_or_path = name
    except UserError:
        raise
    except Exception as error:  # nonsense in a field raises whatever its first use raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the configuration of {_named(name)} cannot be loaded: {reason}") from error
    if arguments.residents != "fp8":
        check_unquantized(config, name)
    check_decoder(config)
    return config


def check_unquantized(config: Any, name: str) -> None:
    """Refuse weights of 4 or 8 bits before they are loaded or planned for: there is nothing that MISA could update."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return
    fields = found if isinstance(found, dict) else found.to_dict()
    bits = "4 bits" if fields.get("load_in_4bit") or fields.get("bits") == 4 else "few bits"
    raise UserError(
        f"{name} is quantized ({fields.get('quant_method') or 'unknown method'}, {bits} a weight): MISA trains the "
        "weights themselves, in bfloat16 or float32. Name the model that it was made from."
    )


def resolve_dtype(wanted: str | None, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU and the checkpoint's own dtype on a CPU, unless the user says; never float16."""
    import torch

    remedy = "fp16 has too little range to train without loss scaling. Use --dtype bfloat16 (or float32)."
    names = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float32": torch.float32, "fp32": torch.float32}
    if wanted in ("float16", "fp16", "half"):
        raise UserError(f"--dtype {wanted}: {remedy}")
    if wanted in names:
        return names[wanted]
    if wanted not in (None, "auto"):
        raise UserError(f"--dtype must be bfloat16, float32 or auto; got {wanted!r}")
    if wanted is None and device.type == "cuda":
        return torch.bfloat16
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    own = getattr(torch, own) if isinstance(own, str) else own
    if own == torch.float16:
        raise UserError(f"the checkpoint {config._name_or_path} is stored in float16. {remedy}")
    if own not in (torch.bfloat16, torch.float32):
        raise UserError(f"the checkpoint {config._name_or_path} is stored in {own}: use --dtype bfloat16 or float32.")
    return own


def load_model(
    arguments: ModelArguments, device: torch.device, *, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load (or, with --from_scratch, initialise) a causal language model on its device in its final dtype.

    Args:
        arguments: which model, and how.
        device: where every weight is placed as it is read; nothing is converted or moved afterwards.
        trust_remote_code: run code that ships with the model.
        **kwargs: more for ``from_pretrained`` (``--model_init_kwargs``).

    Raises:
        UserError: the model is missing, unreadable, incomplete, or in a dtype that cannot be trained.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(arguments, trust_remote_code)
    dtype = resolve_dtype(arguments.dtype, config, device)
    name = str(arguments.model_name_or_path)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    try:
        if arguments.from_scratch:
            with torch.device(device):
                return AutoModelForCausalLM.from_config(config, **options, **kwargs)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            _place(name), config=config, device_map={"": device}, output_loading_info=True, **options, **kwargs
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{_named(name)} cannot be loaded: {reason}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model {name} cannot be loaded: a pytorch_model*.bin file is damaged, or holds something else than "
            "tensors. Use a copy in safetensors."
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"model {name} cannot be loaded: a safetensors file is damaged ({error}).") from error
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if missing:
        raise UserError(
            f"{name} lacks {len(missing)} of the tensors of {type(model).__name__}, which would start at random: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. Is it a causal language model?"
        )
    check_finite(model, name)
    return model


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse weights that hold NaN or infinity: every loss would be NaN. One pass over the weights, one host read.

    Raises:
        UserError: naming the first such tensor.
    """
    import torch

    named = list(model.named_parameters())
    # a tensor's least and largest number are NaN or infinite if any is, and finding them needs no copy of it
    ends = torch.stack([torch.stack(torch.aminmax(parameter.detach())).float() for _, parameter in named])
    for (tensor, _), fine in zip(named, ends.isfinite().all(dim=1).tolist(), strict=True):
        if not fine:
            raise UserError(
                f"model {name} cannot be trained: {tensor} holds NaN or infinite numbers. Restore the file, or start "
                "from an earlier checkpoint."
            )


def load_tokenizer(arguments: ModelArguments, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, or the one named by --tokenizer_name_or_path."""
    from transformers import AutoTokenizer

    name = str(arguments.tokenizer_name_or_path or arguments.model_name_or_path)
    if arguments.tokenizer_name_or_path:
        check_reachable(name, "tokenizer_config.json", "--tokenizer_name_or_path")
    try:
        return AutoTokenizer.from_pretrained(_place(name), trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers and protobuf raise types of their own; all mean that it cannot be read
        raise UserError(
            f"no tokenizer can be loaded from {name}: {error}. Name one with --tokenizer_name_or_path."
        ) from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, eos_token: str | None) -> None:
    """Refuse a tokenizer that would index past the embedding or cannot end a text."""
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's embedding {rows} rows: they do not belong "
            "together. Name the model's own with --tokenizer_name_or_path, or give the new tokens rows with "
            "--resize_embeddings."
        )
    if eos_token is None and tokenizer.eos_token is None:
        raise UserError("the tokenizer has no end-of-text token, which training appends: name one with --eos_token.")


def fitting_length(wanted: int | None, given: bool, config: PretrainedConfig) -> int | None:
    """max_length within the model's positions: an explicit one beyond them is an error, the default is lowered."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0 or (wanted is not None and wanted <= positions):
        return wanted
    if given and wanted is not None:
        raise UserError(f"--max_length {wanted} is more than the model's {positions} positions.")
    return wanted if given else positions


def _named(name: str) -> str:
    if Path(name).expanduser().exists():
        return f"model {name}"
    return f"model {name} (no such directory in {Path.cwd()}, hence an id on the Hub)"


def _place(name: str) -> str:
    path = Path(name).expanduser()
    return str(path) if path.exists() else name
