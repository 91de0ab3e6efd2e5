"""Training and evaluation data of a run, from its options, and the options that follow from their format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.cli.data import LoadedData, Reading, load_data
from misa_engine.cli.data_mix import check_same_shape, mix, together
from misa_engine.errors import UserError

if TYPE_CHECKING:
    from misa_engine.cli.arguments import TrainArguments


def load_training_data(arguments: TrainArguments, tokenizer: Any) -> tuple[Any, Any]:
    """Load, check and put together what the options name; says what was taken of several data sets.

    Args:
        arguments: of the run; packing is switched on in them for plain text.
        tokenizer: asked for its chat template; None leaves that check out.

    Returns:
        Training and evaluation data; None for evaluation data that nobody asked for.

    Raises:
        UserError: data is missing, broken, or does not go with the options.
    """
    options, sft, given = arguments.data, arguments.sft, arguments.given
    reading = Reading.of(sft.dataset_text_field, arguments.run.objective, options.columns)
    shared: dict[str, Any] = {"streaming": options.dataset_streaming, "reading": reading}
    train_parts = [
        load_data(source, split=options.dataset_split, config=options.dataset_config, **shared)
        for source in options.dataset
    ]
    eval_parts: list[LoadedData] = []
    if options.eval_dataset or options.eval_split:
        for source in options.eval_dataset or options.dataset:
            config = options.dataset_config if source in options.dataset else None
            eval_parts.append(load_data(source, split=options.eval_split or "train", config=config, **shared))
    for loaded in (*train_parts, *eval_parts):
        check_template(loaded, sft.chat_template_path, tokenizer)
    mixture = mix(train_parts, options.dataset, options.dataset_weights, fraction=options.eval_fraction, seed=sft.seed)
    if mixture.lines:
        print("\n".join(mixture.lines), flush=True)
    check_loss_options(mixture.format, sft)
    if mixture.text_only and "packing" not in given and sft.max_length is not None:
        sft.packing = True  # full sequences, and no text lost; see misa_engine.cli.data
        if "packing_strategy" not in given:
            sft.packing_strategy = "wrapped"
    eval_set = mixture.held_out
    if eval_parts:
        if len(eval_parts) > 1:
            check_same_shape(eval_parts, options.eval_dataset or options.dataset)
        eval_set = together([part.dataset for part in eval_parts])
    if eval_set is not None and options.max_eval_samples is not None:
        eval_set = eval_set.take(options.max_eval_samples)
    return mixture.train, eval_set


def check_template(loaded: LoadedData, template: str | None, tokenizer: Any) -> None:
    """Raise UserError where messages have no chat template to be written with."""
    if loaded.format.conversational and tokenizer is not None and tokenizer.chat_template is None and not template:
        raise UserError(
            f"the data holds {loaded.format.name}, but the tokenizer has no chat template to write them with: name "
            "one with --chat_template_path (a .jinja file, or the directory or Hub id of another tokenizer)."
        )
    looks_local = template and (template.endswith((".jinja", ".j2")) or template.startswith((".", "/", "~")))
    if template and looks_local and not Path(template).exists():
        raise UserError(f"--chat_template_path {template} does not exist.")


def check_loss_options(format: Any, sft: Any) -> None:
    """Raise UserError where the options want the loss on a part that the records do not have."""
    if sft.completion_only_loss and "completion" not in (*format.needed, *format.optional):
        if format.convert is None and format.kinds != ("tokens",):
            raise UserError(
                f"--completion_only_loss needs prompts and completions; the data holds {format.name}. For "
                "messages use --assistant_only_loss."
            )
