"""``--objective dpo``: TRL's DPOTrainer with MISA, its options, and a report of the preference data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.cli.data_report import NAMES, SHOWN, heading, histogram, length_bins
from misa_engine.errors import UserError, bad_input, did_you_mean

if TYPE_CHECKING:
    from misa_engine.cli.arguments import TrainArguments


def dpo_options(arguments: TrainArguments, measured: bool = True) -> Any:
    """DPOConfig with what SFTConfig holds of it, ``--beta`` and ``--dpo_options``.

    Args:
        arguments: of the run.
        measured: the reference is the model as it was loaded: its log-probabilities are computed once before training,
            so that no second model is held.

    Raises:
        UserError: options that DPO does not have or that this command decides.
    """
    from trl import DPOConfig

    sft, run = arguments.sft, arguments.run
    more = run.dpo_options or {}
    if not isinstance(more, dict):
        raise UserError(f"--dpo_options needs a JSON object of DPOConfig's fields; got {more!r}")
    known = {entry.name for entry in fields(DPOConfig) if entry.init}
    theirs = known - {entry.name for entry in fields(sft)} | {"loss_type"}
    for name in more:
        if name not in theirs:
            hint = " Give it as an option of its own." if name in known else did_you_mean(name, theirs)
            raise UserError(f"--dpo_options: {name!r} is no option of DPO alone.{hint}")
    shared = {entry.name: getattr(sft, entry.name) for entry in fields(sft) if entry.name in known and entry.init}
    del shared["loss_type"]
    own = {"precompute_ref_log_probs": measured and not more.get("sync_ref_model"), **more}
    if run.beta is not None:
        own["beta"] = run.beta
    with bad_input("--objective dpo"):
        return DPOConfig(**{**shared, **own})


def take_template(tokenizer: Any, source: str | None) -> None:
    """Give the tokenizer the chat template of ``--chat_template_path``, which DPOTrainer does not know.

    Args:
        tokenizer: changed in place, and saved so.
        source: a .jinja file, or the directory or Hub id of another tokenizer; None changes nothing.
    """
    if source is None:
        return
    if Path(source).is_file():
        tokenizer.chat_template = Path(source).read_text(encoding="utf-8")
        return
    from transformers import AutoTokenizer

    with bad_input("--chat_template_path"):
        tokenizer.chat_template = AutoTokenizer.from_pretrained(source).chat_template


def dpo_trainer(tokenizer: Any) -> type:
    """The trainer class: TRL's DPOTrainer with MISA, which counts and shows what becomes of the records."""
    from trl import DPOTrainer

    from misa_engine.cli.model_card import KeepsReadme
    from misa_engine.trainer.mixin import MisaMixin

    class PreferenceTrainer(KeepsReadme, MisaMixin, DPOTrainer):
        _tag_names = [*DPOTrainer._tag_names, "misa"]

        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
            whole, args.max_length = args.max_length, None  # TRL drops what is too long without a word
            try:
                tokenized = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            finally:
                args.max_length = whole
            report, kept = inspect_preferences(
                tokenized, NAMES.get(dataset_name, dataset_name), whole, tokenizer,
                keep_end=args.truncation_mode == "keep_end",
            )  # fmt: skip
            print(report, flush=True)
            return kept

    return PreferenceTrainer


@dataclass(frozen=True)
class PreferenceReport:
    """Counts over preference data, before and after it is cut to ``max_length``."""

    name: str
    records: int
    same: int
    """Records whose two answers are the same: nothing to prefer."""
    prompt_too_long: int
    """Records whose prompt alone fills ``max_length``."""
    truncated: int
    """Kept records of which an answer is cut."""
    lengths: tuple[int, ...]
    """Records by bin of BINS: the prompt and the longer answer."""
    answers: tuple[float, float]
    """Mean tokens of the chosen and of the rejected answers."""
    sample: str
    max_length: int | None

    def __str__(self) -> str:
        """Some lines of text."""
        kept = self.records - self.same - self.prompt_too_long
        lines = [heading(self.name, f"{self.records:,} preferences", kept)]
        if self.same:
            lines.append(f"  dropped: {self.same:,} whose chosen and rejected answers are the same")
        if self.prompt_too_long:
            lines.append(
                f"  dropped: {self.prompt_too_long:,} whose prompt alone fills max_length={self.max_length}: raise "
                "--max_length, or shorten the prompts"
            )
        if self.truncated:
            lines.append(
                f"  answers cut at max_length={self.max_length}: {self.truncated:,} ({self.truncated / kept:.0%})"
            )
        lines.append(f"  tokens of a prompt and its longer answer: {length_bins(self.lengths)}")
        lines.append(f"  tokens of an answer: {self.answers[0]:.1f} chosen, {self.answers[1]:.1f} rejected (mean)")
        return "\n".join([*lines, f"  a record: {self.sample}"])


def inspect_preferences(
    dataset: Any, name: str, max_length: int | None, tokenizer: Any, *, keep_end: bool
) -> tuple[PreferenceReport, Any]:
    """Count, and drop what has nothing to prefer.

    Args:
        dataset: with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` of full length.
        name: training or evaluation.
        max_length: tokens at which prompt and answer together are cut.
        tokenizer: to decode one record.
        keep_end: whether the beginning is cut instead of the end, so that no answer is lost to its prompt.

    Raises:
        UserError: nothing is left.
    """
    kept: list[int] = []
    lengths, chosen_sizes, rejected_sizes = [], [], []
    same = beyond = truncated = 0
    for place, row in enumerate(dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])):
        prompt, chosen, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        longest = len(prompt) + max(len(chosen), len(rejected))
        lengths.append(longest)
        if chosen == rejected:
            same += 1
        elif max_length is not None and not keep_end and len(prompt) >= max_length:
            beyond += 1
        else:
            kept.append(place)
            truncated += max_length is not None and longest > max_length
            chosen_sizes.append(len(chosen))
            rejected_sizes.append(len(rejected))
    if not kept:
        raise UserError(
            f"no sample of the {name} data is left: of {len(lengths):,} preferences {same:,} have the same two answers "
            f"and {beyond:,} a prompt that alone fills max_length={max_length}. Raise --max_length, shorten the "
            "prompts, or name other columns with --columns."
        )
    first = dataset[kept[0]]
    texts = [repr(tokenizer.decode(first[part][:SHOWN]))[1:-1] for part in ("prompt_ids", "chosen_ids", "rejected_ids")]
    report = PreferenceReport(
        name,
        len(lengths),
        same,
        beyond,
        truncated,
        histogram(lengths),
        (sum(chosen_sizes) / len(kept), sum(rejected_sizes) / len(kept)),
        f"{texts[0]} chosen [{texts[1]}] rejected [{texts[2]}]",
        max_length,
    )
    return report, dataset if len(kept) == len(lengths) else dataset.select(kept)
