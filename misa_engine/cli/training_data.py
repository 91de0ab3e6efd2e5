"""Training and evaluation data of a run, from its options, and the options that follow from their format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.cli.data import LoadedData, Reading, load_data
from misa_engine.cli.data_mix import check_same_shape, mix, together
from misa_engine.errors import UserError

if TYPE_CHECKING:
    from misa_engine.cli.arguments import TrainArguments


#: Chat templates that come with the package, to be named without a path.
TEMPLATES = Path(__file__).parents[1] / "templates"


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
    sft.chat_template_path = packaged_template(sft.chat_template_path)
    for loaded in (*train_parts, *eval_parts):
        check_template(loaded, sft.chat_template_path, tokenizer)
    mixture = mix(train_parts, options.dataset, options.dataset_weights, fraction=options.eval_fraction, seed=sft.seed)
    if mixture.lines:
        print("\n".join(mixture.lines), flush=True)
    check_loss_options(mixture.format, sft)
    if mixture.format.conversational and sft.assistant_only_loss and tokenizer is not None:
        check_generation_marks(sft.chat_template_path, tokenizer)
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


def packaged_template(name: str | None) -> str | None:
    """The path of a template that comes with the package where ``name`` is one's; else ``name`` as it is."""
    if name is None or Path(name).exists() or "/" in name:
        return name
    file = TEMPLATES / f"{name}.jinja"
    return str(file) if file.is_file() else name


def check_generation_marks(template: str | None, tokenizer: Any) -> None:
    """Raise UserError where nothing says which part of a text the assistant wrote, as ``--assistant_only_loss`` needs.

    TRL knows marked forms of many published templates and takes those by itself.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not tokenizer.is_fast:
        raise UserError(
            f"--assistant_only_loss finds the assistant's tokens with a fast tokenizer, and {type(tokenizer).__name__} "
            "is a Python one: name another with --tokenizer_name_or_path, or give prompts and completions."
        )
    if template is not None:
        if template.endswith((".jinja", ".j2")) and not has_generation_markers(Path(template).read_text("utf-8")):
            raise UserError(f"--assistant_only_loss: {template} {WITHOUT_MARKS}")
        return
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        raise UserError(f"--assistant_only_loss: the tokenizer's chat template {WITHOUT_MARKS}") from None


WITHOUT_MARKS = (
    "has no {% generation %} marks around what the assistant says. Add them, or use a template that comes with "
    f"misa: --chat_template_path {' or '.join(sorted(path.stem for path in TEMPLATES.glob('*.jinja')))}."
)


def check_loss_options(format: Any, sft: Any) -> None:
    """Raise UserError where the options want the loss on a part that the records do not have."""
    if sft.completion_only_loss and "completion" not in (*format.needed, *format.optional):
        if format.convert is None and format.kinds != ("tokens",):
            raise UserError(
                f"--completion_only_loss needs prompts and completions; the data holds {format.name}. For "
                "messages use --assistant_only_loss."
            )
