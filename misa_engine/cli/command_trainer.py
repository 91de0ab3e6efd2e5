"""The trainer of ``misa train``: its objective's, with data that must not vanish and layers compiled one by one."""

from __future__ import annotations

import logging
import warnings
from copy import copy
from inspect import signature
from typing import TYPE_CHECKING, Any

from misa_engine.cli.model_card import KeepsReadme
from misa_engine.errors import UserError, bad_input

if TYPE_CHECKING:
    from misa_engine.cli.arguments import TrainArguments

logger = logging.getLogger(__name__)


def build_trainer(
    arguments: TrainArguments, model: Any, tokenizer: Any, train_data: Any, eval_data: Any, reference: Any = None
) -> Any:
    """The trainer of the objective, with two additions: data that vanishes is said; a README.md stays.

    Args:
        arguments: of the run.
        model: to be trained.
        tokenizer: of the model.
        train_data: with the columns that TRL knows.
        eval_data: the same, or None.
        reference: model that DPO compares with; None stands for the model as it is now, which is measured at once.

    Raises:
        UserError: the data does not go with the options, or leaves nothing to learn from.
    """
    if arguments.run.objective == "dpo":
        from misa_engine.cli.preferences import dpo_options, dpo_trainer, take_template

        take_template(tokenizer, arguments.sft.chat_template_path)
        cls = dpo_trainer(tokenizer)
        options = {"args": dpo_options(arguments, measured=reference is None), "ref_model": reference}
    else:
        cls, options = _sft_trainer(arguments, tokenizer), {"args": arguments.sft}
    try:
        with bad_input(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`use_liger_kernel=True` is deprecated")  # our choice, not theirs
            trainer = cls(
                model=model,
                misa=arguments.misa,
                optimizer=arguments.run.optimizer,
                train_dataset=train_data,
                eval_dataset=eval_data,
                processing_class=tokenizer,
                **options,
            )
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise UserError(f"the chat template cannot write the data: {error}. See --chat_template_path.") from error
    if arguments.sft.torch_compile and arguments.run.optimizer == "misa":
        _compile_layers(trainer, model, arguments)
    return trainer


def _sft_trainer(arguments: TrainArguments, tokenizer: Any) -> type:
    from datasets import Dataset

    from misa_engine.cli.data import check_prepared
    from misa_engine.cli.data_report import NAMES, inspect
    from misa_engine.trainer.sft import MisaTrainer

    max_length = arguments.sft.max_length

    class CommandTrainer(KeepsReadme, MisaTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            name = kwargs.get("dataset_name", args[-1] if args else "train")
            name = NAMES.get(name, name)
            call = signature(super()._prepare_dataset).bind(dataset, *args, **kwargs).arguments
            if isinstance(dataset, Dataset) and not call["args"].dataset_kwargs:  # a stream cannot be counted
                # tokens and labels of full length first, so that what is then cut and dropped can be said
                whole = copy(call["args"])
                whole.max_length, whole.shuffle_dataset = None, False
                tokenized = super()._prepare_dataset(**{**call, "args": whole, "packing": False})
                if {"input_ids", "labels"} <= set(tokenized.column_names):
                    report, dataset = inspect(
                        tokenized,
                        name,
                        max_length,
                        tokenizer,
                        packing=call["packing"],
                        keep_end=getattr(call["args"], "truncation_mode", "keep_start") == "keep_end",
                    )
                    print(report, flush=True)
            prepared = super()._prepare_dataset(**{**call, "dataset": dataset})
            check_prepared(prepared, name, max_length)
            return prepared

    return CommandTrainer


def _compile_layers(trainer: Any, model: Any, arguments: TrainArguments) -> None:
    """Compile layer by layer: whole-model graphs are rebuilt at every new active set and given up after eight."""
    from misa_engine.method.partition import partition

    misa, sft = arguments.misa, arguments.sft
    container = partition(model, misa.granularity, family=misa.family).container
    if container is None:
        raise UserError("--torch_compile works layer by layer, and this model has no list of layers: leave it out.")
    options = {"backend": sft.torch_compile_backend, "mode": sft.torch_compile_mode}
    import torch._dynamo

    # One graph for each pattern of active matrices in a layer: 8 (the default limit) with at most one of 7 matrices,
    # twice that because the lowest active layer's input needs no gradient, more with pairs.
    limit = torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in model.get_submodule(container).children():
        layer.compile(**{name: value for name, value in options.items() if value})
    trainer.args.torch_compile = False
    logger.warning(
        "--torch_compile: after a draw, layers with a new pattern of active matrices are compiled anew (at most %d "
        "graphs each), and weight gradients are copied into their slots instead of being computed there.",
        limit,
    )
