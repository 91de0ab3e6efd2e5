"""``misa train --fsdp``: what goes with it, and a model that one process reads and all hold in rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from misa_engine.errors import UserError, bad_input

if TYPE_CHECKING:
    import torch

    from misa_engine.cli.arguments import TrainArguments
    from misa_engine.trainer.sharding import Sharding


def sharding_of(arguments: TrainArguments) -> Sharding | None:
    """What --fsdp or the launcher ask for; None where the weights stay whole. The baseline's is the Trainer's matter.

    Raises:
        UserError: it cannot be, or not beside another option.
    """
    from misa_engine.trainer.sharding import Sharding

    run = arguments.run
    if run.optimizer != "misa":
        return None
    with bad_input("--fsdp"):
        found = Sharding.asked_for(arguments.sft)
    if found is None:
        return None
    for name, given, remedy in (
        ("residents", arguments.model.residents not in (None, "none"), "weights on the host are not sharded"),
        ("max_vram_gb", run.max_vram_gb is not None, "misa plan --gpus K --sharded says what fits"),
        ("resize_embeddings", run.resize_embeddings, "resize and save the model first, then train the copy"),
        ("objective dpo", run.objective == "dpo", "preferences are trained by whole models, one in each process"),
    ):
        if given:
            raise UserError(f"--fsdp with --{name}: {remedy}. Leave one of them out.")
    return found


def for_rows(arguments: TrainArguments) -> TrainArguments:
    """The arguments of a run with sharded weights: the preset's rest rule is off, and that is said.

    Raises:
        UserError: an option that sharded weights do not have.
    """
    from misa_engine.engine.sharded.mesh import for_shards

    with bad_input("--fsdp"):
        return replace(arguments, misa=for_shards(arguments.misa))


def load_rows(
    arguments: TrainArguments, sharding: Sharding, config: Any, dtype: torch.dtype, more: Mapping[str, Any]
) -> Any:
    """The model, read by rank 0 to its host's memory; every process, rank 0 too, then holds its rows on its device.

    Raises:
        UserError: in all processes, what ``loading.load_model`` refuses in rank 0.
    """
    import torch
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    from misa_engine.cli.loading import load_model
    from misa_engine.engine.replicas import Replicas
    from misa_engine.trainer.sharding import shard_model, unaware

    sft, options = arguments.sft, arguments.model
    replicas = Replicas.join()
    assert replicas is not None  # sharding_of
    model: Any = None
    refused = ""
    with unaware(sft):
        if replicas.rank == 0:
            try:
                model = load_model(options, torch.device("cpu"), trust_remote_code=sft.trust_remote_code, **more)
            except UserError as error:
                refused = str(error)
        else:
            attention = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
            how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": sft.trust_remote_code, **attention, **more}
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, **how)
            model.tie_weights()
    if refused := replicas.tell_json(refused)[0]:
        raise UserError(refused)
    with bad_input("--fsdp"):
        shard_model(model, sharding, sft.device, arguments.misa.family)
    return model
