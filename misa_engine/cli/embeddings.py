"""``--resize_embeddings``: rows for tokens that the model does not know, trained in every step because they are new."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from misa_engine.cli.arguments import TrainArguments


def resize(arguments: TrainArguments, model: Any, tokenizer: Any) -> TrainArguments:
    """Give the embedding and the head a row for each token of the tokenizer, if the user asked for that.

    Args:
        arguments: of the run.
        model: changed in place; new rows start at the mean of the old ones, as transformers draws them.
        tokenizer: of the run.

    Returns:
        The arguments, with embedding and head always trained where rows were added.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if not arguments.run.resize_embeddings or len(tokenizer) <= rows:
        return arguments
    model.resize_token_embeddings(len(tokenizer))
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in ends]
    for name in names:  # the whole tensor is trained by name; the engine need not find out again
        model.get_parameter(name)._is_hf_initialized = True
    print(
        f"embeddings resized from {rows:,} to {len(tokenizer):,} rows; always trained, because the new ones are "
        f"untrained: {', '.join(names)}",
        flush=True,
    )
    always = tuple(dict.fromkeys((*arguments.misa.always_train, *names)))
    return replace(arguments, misa=arguments.misa.altered(always_train=always))
