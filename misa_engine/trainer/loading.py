"""load_model(): a causal language model whose undrawn matrices rest in 8 bits, read file by file, tensor by tensor.

    names and shapes     from config.json, on the meta device
    what rests           mapped from its file -> master on the host (mapped or copied) -> 8 bits on the card
    the rest             mapped from its file -> card

At no time does card or host hold a second copy of the model: beside the masters, one tensor is in passing. Files in
another order or with other names than the model's (mixtures of experts that transformers fuses, pytorch_model*.bin) are
loaded to the host by transformers, which takes one file more, and then put to rest one matrix after the other.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from misa_engine.engine.residents import Residents, linear_modules, open_mapped, rest
from misa_engine.engine.residents.lookup import host_embedding
from misa_engine.engine.residents.store import owners_of
from misa_engine.errors import UserError, bad_input
from misa_engine.kernels.resident8 import FORMATS, Packed, dequantise
from misa_engine.method.config import check_choice
from misa_engine.planner.host_memory import check_host_memory, memory_of_all
from misa_engine.trainer.completeness import weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

#: transformers' layout of 8-bit checkpoints: blocks of this shape share a step.
FP8_BLOCK = [128, 128]
#: Name of the steps of a matrix in such a checkpoint, after that of its module.
FP8_STEPS = "weight_scale_inv"
MASTERS = ("auto", "pinned", "mapped")
#: Share of the available memory that page-locked masters may take before they are mapped instead.
PINNED_SHARE = 0.8


def load_model(
    path: str | Path,
    *,
    residents: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    masters: str = "auto",
    config: PretrainedConfig | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a causal language model for ``MISA(model, ...)``, with or without residents in 8 bits.

    Args:
        path: directory or Hub id. An official FP8 checkpoint (fine-grained, blocks of 128 x 128) needs ``"fp8"``, and
            rests with the codes of its files.
        residents: "int8", "fp8" or "int8_row" (``misa_engine.engine.residents``); None or "none" loads all weights to
            the device as they are.
        device: the card; None is the GPU, or the CPU where there is none.
        dtype: of the masters and of everything that does not rest: bfloat16 or float32.
        masters: where the exact weights lie: "pinned" in page-locked memory, "mapped" as pages of the model's own files
            until they change, "auto" pinned where 80% of the available memory suffice. Each process has its own: where
            torch's process group is up, all processes call this together, and those of a host count together.
        config: instead of that in ``path``.
        **options: more for ``AutoModelForCausalLM``: attn_implementation, trust_remote_code.

    Returns:
        The model, in training mode.

    Raises:
        UserError: unknown format, host memory too small, no matrix that can rest, or files that are missing, damaged or
            not finite. Nothing has been loaded where that was known.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model: Any
    if residents is None or residents == "none":
        options |= {"config": config, "dtype": dtype, "device_map": {"": device}}
        model = AutoModelForCausalLM.from_pretrained(str(path), **options)
        return model.train()
    check_format(residents)
    check_choice("masters", masters, MASTERS)
    config = config or AutoConfig.from_pretrained(path, trust_remote_code=options.get("trust_remote_code", False))
    stored_in_8_bits = take_fp8(config, str(path), residents)
    # what is only read stays pages of its file, unless it comes in another dtype
    as_stored = getattr(config, "dtype", None) in (dtype, str(dtype).removeprefix("torch."))
    empty = _empty_model(config, dtype, options)
    available, processes = memory_of_all()
    place = _place_of(masters, device, processes * sum(host_bytes(empty, residents, device).values()), available)
    pages = place == "mapped" and as_stored
    check_host_memory(str(path), host_bytes(empty, residents, device, mapped=pages), available, processes)
    folder = _folder_of(str(path))
    files = weight_files(folder)
    by_name = bool(files) and _has_all_names(empty, files, stored_in_8_bits)
    if not by_name and stored_in_8_bits:
        raise UserError(f"{path}: the tensors of this FP8 checkpoint are not those of {type(empty).__name__}.")
    if by_name:
        model = empty
        _stream(model, files, Residents(model, residents, device, masters=place), copied=place == "pinned")
    else:
        logger.info("%s: names or files are not the model's own; loaded to the host first", path)
        check_host_memory(str(path), host_bytes(empty, residents, device, whole=True), available, processes)
        model = AutoModelForCausalLM.from_pretrained(str(path), config=config, dtype=dtype, **options)
        rest(model, residents, device, masters=place)
    _take_generation_config(model, folder)
    return model.train()


def random_model(
    config: PretrainedConfig,
    residents: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> PreTrainedModel:
    """A model with residents and random weights of torch's generator of the device, made matrix by matrix.

    Matrices are normal with the configuration's ``initializer_range``, vectors 1 in norms and 0 in biases, as
    transformers draws them for most decoders. Neither device nor host ever holds a second copy.

    Args:
        config: of the model.
        residents: the format.
        device: the card.
        dtype: of the masters and of what does not rest.
        **options: more for ``AutoModelForCausalLM.from_config``.
    """
    check_format(residents)
    model = _empty_model(config, dtype, options)
    check_host_memory(config.model_type, host_bytes(model, residents, device))
    held = Residents(model, residents, device, masters="pinned")
    width = getattr(config, "initializer_range", None) or 0.02
    owners = owners_of(model)
    for name, parameter in list(model.named_parameters()):
        if parameter.ndim > 1:
            value = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(std=width)
        else:
            value = torch.full(parameter.shape, float(not name.endswith("bias")), dtype=dtype, device=device)
        if name in held:
            held.hold(name, value)
        else:
            _place(owners[id(parameter)], name, value, held, copied=False)
    model.to(device)  # buffers
    return model.train()


# ---- checks ----


def check_format(residents: str) -> None:
    """Refuse an unknown format. No card lacks what one needs: the kernels read and write e4m3 as integers.

    Raises:
        UserError: naming the formats.
    """
    with bad_input():
        check_choice("residents", residents, FORMATS)


def take_fp8(config: Any, name: str, residents: str) -> bool:
    """Whether the files hold 8-bit matrices with their steps; the configuration then forgets that they do.

    Raises:
        UserError: another quantisation, or another format of residents.
    """
    found = getattr(config, "quantization_config", None)
    if not found:
        return False
    fields = found if isinstance(found, dict) else found.to_dict()
    block = fields.get("weight_block_size")
    if fields.get("quant_method") != "fp8" or (list(block) if block else None) != FP8_BLOCK:
        raise UserError(
            f"{name} is quantized ({fields.get('quant_method')}, blocks {block}): residents load bfloat16, float32 and "
            "fine-grained FP8 with blocks of 128 x 128. Name the model that it was made from."
        )
    if residents != "fp8":
        raise UserError(f"{name} is an FP8 checkpoint: its matrices rest as they are stored. Use residents fp8.")
    del config.quantization_config
    return True


def host_bytes(
    model: nn.Module,
    residents: str,
    device: torch.device,
    *,
    mapped: bool = False,
    whole: bool = False,
) -> dict[str, int]:
    """Host memory that a model takes while it is loaded, by category; it may be on the meta device.

    Args:
        model: the model.
        residents: the format.
        device: the card; where it is the CPU, what lies on it lies on the host, too.
        mapped: what is never written stays pages of its file, which the kernel drops when memory is short. Masters
            count all the same: those of matrices that were drawn become memory of the process.
        whole: all weights come to the host first, instead of tensor by tensor.
    """
    can, _ = linear_modules(model)
    shapes = [model.get_parameter(name).shape for name in can]
    masters = sum(model.get_parameter(name).nbytes for name in can)
    looked_up = host_embedding(model)
    embedding = 0 if looked_up is None else looked_up[1].weight.nbytes
    others = sum(parameter.nbytes for parameter in model.parameters()) - masters - embedding
    sizes = {"masters": masters, "embedding": 0 if mapped else embedding}
    if whole or device.type == "cpu":
        sizes["other_weights"] = others
    if device.type == "cpu":
        sizes["8_bits"] = sum(sum(FORMATS[residents].bytes(tuple(shape))) for shape in shapes)
        sizes["workspace"] = max(model.get_parameter(name).nbytes for name in can)
    return {name: size for name, size in sizes.items() if size}


def _place_of(wanted: str, device: torch.device, needed: int, available: int) -> str:
    """Where the masters of all processes of this host, ``needed`` bytes, lie."""
    if wanted != "auto":
        return wanted
    return "pinned" if device.type == "cuda" and needed <= PINNED_SHARE * available else "mapped"


# ---- the model without memory ----


def _empty_model(config: Any, dtype: torch.dtype, options: Mapping[str, Any]) -> Any:
    """The model with parameters on the meta device and buffers, which no file holds, in memory.

    Raises:
        UserError: no matrix of it can rest; the message says why each kind stays.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    model.tie_weights()
    with bad_input(f"{type(model).__name__} cannot have residents"):
        can, stays = linear_modules(model)
    if not can:
        reasons = "; ".join(f"{name} is {reason}" for name, reason in list(stays.items())[:3])
        raise UserError(f"no matrix of {type(model).__name__} can rest in 8 bits ({reasons}): leave out residents.")
    return model


def _folder_of(path: str) -> Path:
    """The local directory, or that of the Hub's cache, downloaded if need be."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))


def _has_all_names(model: nn.Module, files: list[Path], in_8_bits: bool) -> bool:
    """Whether the files name every parameter of the model, a tied one once, with its shape."""
    from misa_engine.trainer.completeness import read_header

    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            shapes.update(read_header(file))
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{file} cannot be loaded: {error}") from error
    here = dict(model.named_parameters(remove_duplicate=False))
    found = {id(here[name]) for name, shape in shapes.items() if name in here and tuple(here[name].shape) == shape}
    missing = {id(parameter) for parameter in here.values()} - found
    unknown = [name for name in shapes if name not in here and not (in_8_bits and name.endswith(FP8_STEPS))]
    buffers = {name for name, _ in model.named_buffers()}
    # a missing tensor of files whose other names are the model's is missing: transformers would draw it at random
    if missing and not [name for name in unknown if name not in buffers]:
        names = [name for name, parameter in here.items() if id(parameter) in missing]
        raise UserError(
            f"{files[0].parent} lacks {len(names)} of the tensors of {type(model).__name__}, which would start at "
            f"random: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}. Is it a causal language model?"
        )
    return not missing


# ---- streaming ----


def _stream(model: Any, files: list[Path], residents: Residents, *, copied: bool) -> None:
    """Give every parameter its memory, one tensor after the other.

    Raises:
        UserError: a tensor is not finite.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    owners = owners_of(model)
    for stored, tensor, steps in _tensors(files):
        parameter = parameters.get(stored)
        name = canonical.pop(id(parameter), None)
        if parameter is None or name is None:  # not the model's, or tied to one that is there already
            continue
        if name in residents:
            _hold(residents, name, tensor, steps, copied=copied)
        else:
            _place(owners[id(parameter)], name, tensor, residents, copied=copied)
    model.to(residents.device)  # buffers


@torch.no_grad()
def load_weights(model: nn.Module, files: Sequence[Path]) -> None:
    """Give a model with residents the weights of files that name them as it does, such as a checkpoint's.

    Tensor by tensor, and only what differs is written: masters that are mapped from files stay mapped, and what was
    never drawn keeps its codes.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor, _ in _tensors(files):
        present = parameters[name]
        wanted = tensor.to(present.device, present.dtype)
        if not torch.equal(present.contiguous().view(torch.uint8), wanted.view(torch.uint8)):
            present.copy_(wanted)


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, tensor as it is mapped, and the steps of one that is stored in 8 bits; these may be in another file."""
    steps: dict[str, Tensor] = {}
    waiting: dict[str, Tensor] = {}
    for file in files:
        try:
            found = open_mapped(file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} cannot be loaded: {error}") from error
        steps |= {name: found.pop(name) for name in list(found) if name.endswith(f".{FP8_STEPS}")}
        waiting |= found
        for name in list(waiting):
            own = steps.get(f"{name.removesuffix('weight')}{FP8_STEPS}")
            if waiting[name].dtype != torch.float8_e4m3fn or own is not None:
                yield name, waiting.pop(name), own
    if waiting:
        raise UserError(f"{next(iter(waiting))} is stored in 8 bits without {FP8_STEPS}: restore the files.")


@torch.no_grad()
def _hold(residents: Residents, name: str, tensor: Tensor, steps: Tensor | None, *, copied: bool) -> None:
    """Put a matrix to rest; one that is stored in 8 bits with the file's own codes."""
    if steps is not None:
        weight = torch.empty(tensor.shape, dtype=residents.dtype)
        dequantise(Packed(FORMATS["fp8"], tensor, steps.float()), weight, backend="reference")
    else:
        weight = tensor.to(residents.dtype, copy=copied and residents.device.type == "cpu")
    residents.hold(name, weight)
    packed = residents.matrix(name).packed
    assert packed is not None
    if steps is not None:
        packed.codes.copy_(tensor)
        packed.steps.copy_(steps)
    if not bool(packed.steps.isfinite().all()):
        raise UserError(_broken(name))


@torch.no_grad()
def _place(
    owners: list[tuple[nn.Module, str]], name: str, tensor: Tensor, residents: Residents, *, copied: bool
) -> None:
    """Give all modules that share a parameter one with memory on the card, or on the host where rows are looked up."""
    on_host = name in residents.on_host
    value = tensor.to("cpu" if on_host else residents.device, residents.dtype, copy=copied or not on_host)
    if not all(bool(end.isfinite()) for end in torch.aminmax(value)):
        raise UserError(_broken(name))
    parameter = nn.Parameter(value)
    for module, leaf in owners:
        parameter.__dict__.update(module._parameters[leaf].__dict__)
        module._parameters[leaf] = parameter


def _broken(name: str) -> str:
    return f"the model cannot be trained: {name} holds NaN or infinite numbers. Restore the file."


def _take_generation_config(model: Any, folder: Path) -> None:
    if not model.can_generate() or not (folder / "generation_config.json").is_file():
        return
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        logger.warning("%s cannot be read (%s): the defaults stay", folder / "generation_config.json", error)
