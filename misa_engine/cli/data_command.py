"""``misa data FILE``: the data report of ``misa train`` without its model: records in, dropped and why, lengths, loss.

The records go through the same loading, tokenizing, cutting and counting as in training. Of the model only tokenizer
and configuration are read; a model of one layer with that vocabulary stands in for it, since TRL prepares data in the
constructor of its trainer.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from misa_engine.errors import DONE, UserError

if TYPE_CHECKING:
    from misa_engine.cli.arguments import TrainArguments

USAGE = """\
usage: misa data FILE_OR_HUB_ID [...] --model DIR_OR_HUB_ID [data options of misa train]

Counts what misa train would do with the data: records in, dropped and why, lengths, share cut at --max_length, share of
tokens in the loss, one record with its loss mask. Of the model only tokenizer and configuration are read.

  --model             directory or Hub id of the model, or of a tokenizer alone (--tokenizer_name_or_path)
  --max_length N      tokens at which records are cut (default: 1024, or what the model can take)
  --columns           which columns are which: prompt=q,completion=a
  --objective         sft, or dpo for preferences (chosen, rejected)
  --dataset_weights   how many times each data set is taken

and every other option of misa train about data: misa train --help."""


def command(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    if words in ([], ["-h"], ["--help"]):
        print(USAGE)
        if words:
            return DONE
        raise UserError("misa data needs a file, a directory or a Hub id, and --model.")
    from misa_engine.cli.arguments import parse_train

    files = []
    while words and not words[0].startswith("-"):
        files.append(words[0])
        words = words[1:]
    arguments = parse_train([*(["--dataset", *files] if files else []), *words])
    if not arguments.data.dataset:
        raise UserError("misa data needs a file, a directory or a Hub id before its options.")
    report(arguments)
    return DONE


def report(arguments: TrainArguments) -> None:
    """Load, tokenize and count, and print what came of it.

    Raises:
        UserError: data or tokenizer cannot be read, or nothing is left to learn from.
    """
    from misa_engine.cli import loading
    from misa_engine.cli.command_trainer import build_trainer
    from misa_engine.cli.early_checks import check_early
    from misa_engine.cli.train import quiet
    from misa_engine.cli.training_data import load_training_data

    model, sft = arguments.model, arguments.sft
    if not (model.model_name_or_path or model.tokenizer_name_or_path):
        raise UserError("misa data needs --model (or --tokenizer_name_or_path): lengths are counted in its tokens.")
    quiet(arguments)
    check_early(arguments)
    if model.model_name_or_path:
        model.from_scratch = True  # weights are not asked for
        config = loading.load_config(model, sft.trust_remote_code)
        sft.max_length = loading.fitting_length(sft.max_length, "max_length" in arguments.given, config)
    tokenizer = loading.load_tokenizer(model, trust_remote_code=sft.trust_remote_code)
    train_data, eval_data = load_training_data(arguments, tokenizer)
    if not hasattr(train_data, "__len__"):
        raise UserError("misa data counts whole data sets: leave out --dataset_streaming.")
    sft.use_liger_kernel = sft.torch_compile = False
    with TemporaryDirectory() as nowhere:  # transformers' Trainer makes its output directory at once
        sft.output_dir = nowhere
        arguments.run.dpo_options = None  # they are about the loss
        reference = _stand_in(tokenizer) if arguments.run.objective == "dpo" else None
        build_trainer(arguments, _stand_in(tokenizer), tokenizer, train_data, eval_data, reference)


def _stand_in(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
