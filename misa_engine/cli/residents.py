"""``--residents``: what goes with it, and a model loaded so that it never lies anywhere twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from misa_engine.errors import UserError, bad_input

if TYPE_CHECKING:
    import torch

    from misa_engine.cli.arguments import ModelArguments, TrainArguments


def for_residents(arguments: TrainArguments) -> TrainArguments:
    """The arguments of a run with residents: the preset's rest rule is off, and that is said.

    Raises:
        UserError: a rest rule from elsewhere (a resumed run's).
    """
    from misa_engine.planner.residents import without_rest

    model = arguments.model
    if model.residents in (None, "none"):
        return replace(arguments, model=replace(model, residents=None))
    misa = without_rest(arguments.misa)
    if misa != arguments.misa:
        print(
            f"note: with --residents the preset's rest rule {arguments.misa.rest} is off: what is not drawn stands "
            "still",
            flush=True,
        )
    return replace(arguments, misa=misa)


def load_resting(
    options: ModelArguments, config: Any, dtype: torch.dtype, device: torch.device, trust: bool, more: Mapping[str, Any]
) -> Any:
    """The model with residents, read tensor by tensor; with --from_scratch drawn on the host first.

    Raises:
        UserError: see ``load_model``; or options of ``from_pretrained``, which does not read the files here.
    """
    from misa_engine.trainer.loading import host_bytes, load_model

    if more:
        raise UserError(f"--residents with --model_init_kwargs {', '.join(more)}: leave one of them out.")
    name = str(options.model_name_or_path)
    attention: dict[str, Any] = (
        {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    )
    with bad_input(name):
        if options.from_scratch:
            import torch
            from transformers import AutoModelForCausalLM

            from misa_engine.engine.residents import rest
            from misa_engine.planner.host_memory import check_host_memory, memory_of_all

            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
            check_host_memory(name, host_bytes(empty, str(options.residents), device, whole=True), *memory_of_all())
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust, **attention)
            rest(model, str(options.residents), device)
            return model
        how: dict[str, Any] = {"residents": options.residents, "device": device, "dtype": dtype, "config": config}
        return load_model(name, trust_remote_code=trust, **attention, **how)
