"""Sharded weights under a Trainer: ``fully_shard`` first, MISA on the rows, and nothing left for accelerate to wrap.

    what is asked for     Sharding.asked_for: --fsdp, fsdp_config, accelerate launch --use_fsdp; or a refusal
    model                 shard_model: rank 0's weights go, tensor by tensor, to the rows of everybody
    Trainer, accelerate   unaware: built as for replicas, which wrap nothing
    files                 whole_weights, load_rows: a model's ordinary files, whatever the number of processes

The model is sharded before Trainer and optimizer exist. The Trainer's own way with FSDP2 is the other way round:
the optimizer is made over whole parameters, then ``accelerator.prepare`` upcasts the trainable bfloat16 ones, replaces
all of them by DTensors and rewrites ``param_groups``, but not an arena, a table of units or hooks; its checkpoints ask
for the optimizer's state in a way that makes a step. Here names, hooks and the arena meet DTensors from the start, so
that nothing has to be bound again, and bfloat16 stays bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from misa_engine.engine.replicas import Replicas
from misa_engine.engine.residents import open_mapped, residents_of
from misa_engine.engine.sharded.mesh import fsdp_modules
from misa_engine.engine.shards import first_element, is_sharded, local
from misa_engine.method.partition import partition

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: What ``accelerate launch --use_fsdp`` sets; its plugin reads FSDP_VERSION and others beside it.
LAUNCHED = "ACCELERATE_USE_FSDP"
REMEDY = "Leave it out: FSDP2 then shards each layer and the model (docs/guide/several_gpus.md)."


@dataclass(frozen=True)
class Sharding:
    """How the weights are divided over the processes."""

    layers: tuple[str, ...] = ()
    """Names of the classes that are sharded one by one; the model's list of layers where empty."""
    reshard_after_forward: bool = True
    """Whether a layer lets go of what it gathered in the forward pass and gathers it again in the backward pass."""

    @classmethod
    def asked_for(cls, args: TrainingArguments) -> Sharding | None:
        """What training arguments or ``accelerate launch`` ask for; None where the weights stay whole.

        Raises:
            ValueError: one process, FSDP1, or an option that MISA does not train with. Nothing has been changed then.
        """
        if not getattr(args, "fsdp", None) and os.environ.get(LAUNCHED) != "true":
            return None
        if args.world_size == 1:
            raise ValueError(
                "fsdp divides the weights over several processes, and this is the only one. Start one for each GPU: "
                f"torchrun --nproc_per_node {max(2, args.n_gpu)} -m misa_engine train ... (or accelerate launch)."
            )
        if (getattr(args, "fsdp_config", None) or {}).get("xla"):
            raise ValueError(f"fsdp_config: xla shards in another way. {REMEDY}")
        from accelerate import FullyShardedDataParallelPlugin  # type: ignore[import-untyped]
        from torch.distributed.fsdp import CPUOffloadPolicy

        # the one reader of both spellings: fields from the arguments, else from the launcher's environment
        given = getattr(args, "fsdp_plugin_args", None) or {}
        if int(given.get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))) != 2:
            raise ValueError(
                "FSDP1 (FullyShardedDataParallel) flattens matrices, so that MISA cannot tell them apart. Use FSDP2: "
                "--fsdp alone, fsdp_config={'version': 2}, accelerate launch --fsdp_version 2, or fsdp_version: 2 in "
                "the file of accelerate config."
            )
        plugin = FullyShardedDataParallelPlugin(**given)
        for name, found, why in (
            ("cpu_offload", isinstance(plugin.cpu_offload, CPUOffloadPolicy), "MISA updates rows on the card."),
            ("activation_checkpointing", plugin.activation_checkpointing, "Say gradient_checkpointing=True instead."),
            ("ignored_modules", plugin.ignored_modules, "All parameters have to be sharded."),
            ("min_num_params", plugin.min_num_params, "MISA shards layer by layer."),
            ("torch_compile", args.torch_compile, "Compiled layers are not tested with sharded weights."),
            (
                "parallelism_config",
                os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true",
                "For a mesh of two dimensions call fully_shard yourself and give MisaTrainer that model.",
            ),
        ):
            if found:
                raise ValueError(f"{name} with fsdp: {why} {REMEDY}")
        return cls(tuple(plugin.transformer_cls_names_to_wrap or ()), bool(plugin.reshard_after_forward))


def has_rows(model: Any) -> bool:
    """Whether a model's parameters are rows, of ``shard_model`` or of the caller's own ``fully_shard``."""
    return isinstance(model, nn.Module) and any(map(is_sharded, model.parameters()))


def check_rows(model: Any) -> None:
    """Refuse a model that transformers sharded while loading it: its Trainer then holds back gradients.

    Raises:
        ValueError: with what to do instead.
    """
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "the model was loaded with distributed_config, which lets gradients of all micro-batches add up unsharded. "
            "Load it without, and say fsdp=True, or call fully_shard yourself."
        )


@contextmanager
def unaware(args: TrainingArguments) -> Iterator[None]:
    """Inside, the Trainer, accelerate and ``from_pretrained`` do not know that weights are sharded."""
    names = [name for name in ("fsdp", "fsdp_plugin_args") if hasattr(args, name)]
    before = {name: getattr(args, name) for name in names}
    launched = os.environ.pop(LAUNCHED, None)
    for name in names:
        setattr(args, name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)
        if launched is not None:
            os.environ[LAUNCHED] = launched


# ---- the model ----


def shard_model(model: nn.Module, how: Sharding, device: torch.device, family: str | None = None) -> None:
    """Divide a model over all processes in place: rank 0's weights, whatever the others hold.

    Layer by layer, so that a card never holds more than its rows, one layer and one whole tensor. Embeddings are
    gathered with the model's other outer parameters where they are tied, otherwise apart. The head stays with the
    model: losses in chunks read its weight without calling it.

    Args:
        model: whole, on any device; on other ranks than 0 its parameters may be on the meta device.
        how: by which classes, and what is kept gathered.
        device: of this process.
        family: as in ``MisaConfig``.

    Raises:
        ValueError: the processes have different models, or this one cannot be divided by layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    replicas = Replicas.join()
    assert replicas is not None  # Sharding.asked_for
    layers = _layers(model, how, family)
    _materialise(model, replicas)
    whole = {name: parameter.detach() for name, parameter in model.named_parameters()}  # rank 0's stay on the host
    mesh = init_device_mesh(device.type, (replicas.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=how.reshard_after_forward)
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    tied = ends[1] is not None and getattr(ends[0], "weight", None) is getattr(ends[1], "weight", None)
    if ends[0] is not None and not tied and ends[0] not in layers:
        fully_shard(ends[0], mesh=mesh, reshard_after_forward=how.reshard_after_forward)
    fully_shard(model, mesh=mesh)
    with torch.no_grad(), replicas.speaking("rank 0 hands out the weights"):
        for name, parameter in model.named_parameters():
            rows = distribute_tensor(whole.pop(name).to(device), mesh, parameter.placements)  # type: ignore[attr-defined]
            local(parameter).copy_(local(rows))
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def _layers(model: nn.Module, how: Sharding, family: str | None) -> list[nn.Module]:
    """What is sharded one by one.

    Raises:
        ValueError: nothing is found.
    """
    if residents_of(model) is not None:
        raise ValueError("the model has residents: masters on the host are not sharded. Load it without them.")
    if how.layers:
        found = [module for module in model.modules() if type(module).__name__ in how.layers]
        if not found:
            raise ValueError(f"transformer_layer_cls_to_wrap: the model has no {' or '.join(how.layers)}. {REMEDY}")
        return found
    container = partition(model, family=family).container
    if container is None:
        raise ValueError(
            f"{type(model).__name__} has no list of layers to shard one by one. Name their class: fsdp_config="
            "{'transformer_layer_cls_to_wrap': [...]}."
        )
    return list(model.get_submodule(container).children())


def _materialise(model: nn.Module, replicas: Replicas) -> None:
    """Compare the models; give parameters on the meta device memory, of which nothing is touched, in rank 0's dtype.

    Raises:
        ValueError: naming the first parameter that differs.
    """
    parameters = dict(model.named_parameters())
    tensors = {**parameters, **dict(model.named_buffers())}
    mine = {name: [list(t.shape), str(t.dtype), t.is_meta] for name, t in tensors.items()}
    first, *others = replicas.tell_json(mine)
    for rank, there in enumerate(others, start=1):
        for name in {**first, **there}:
            a, b = first.get(name), there.get(name)
            if a is None or b is None or a[0] != b[0] or (a[1] != b[1] and not b[2]):
                raise ValueError(
                    f"{name} is {b and b[:2]} on rank {rank} and {a and a[:2]} on rank 0. Load the same "
                    "model in the same dtype everywhere."
                )
    if hollow := [name for name, facts in first.items() if facts[2]]:
        raise ValueError(f"{hollow[0]} of rank 0 is on the meta device. Load the weights there (from_pretrained).")
    fresh: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            if id(parameter) not in fresh:
                dtype = getattr(torch, first[name][1].removeprefix("torch."))
                fresh[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="cpu"))
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            fresh[id(parameter)].__dict__.update(module._parameters[leaf].__dict__)
            module._parameters[leaf] = fresh[id(parameter)]


# ---- files ----


def let_go(model: nn.Module) -> None:
    """Drop weights that an evaluation left gathered: parameters are rows again."""
    for module in fsdp_modules(model):
        module.reshard()


@torch.no_grad()
def whole_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The model's state in host memory, whole. All processes call it; it comes to those that ``keep`` it.

    Tensor by tensor: a card holds one whole tensor beside its rows, and host memory the model, where it is kept.
    """
    let_go(model)
    tied = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    gathered: dict[int | str, Tensor] = {}
    found = {}
    for name, tensor in model.state_dict().items():
        key = tied.get(name, name)
        if key not in gathered:
            whole = tensor.full_tensor() if is_sharded(tensor) else tensor
            gathered[key] = whole.to("cpu", copy=True) if keep else tensor.new_empty(0)
        found[name] = gathered[key]
    return found if keep else {}


@torch.no_grad()
def load_rows(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Take this process's rows of whole tensors by name; names that the model does not have are passed over."""
    let_go(model)
    here: Mapping[str, Tensor] = model.state_dict()
    for name, whole in tensors:
        if (tensor := here.get(name)) is not None:
            part = local(tensor)
            first = first_element(tensor)
            part.copy_(whole.reshape(-1)[first : first + part.numel()].view(part.shape))


def stored_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of safetensors files, mapped: only what is taken is read."""
    for file in files:
        yield from open_mapped(file).items()
