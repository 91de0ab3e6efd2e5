"""MisaTrainer with weights divided over two processes: the training, files and logs of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from cli_place import weights
from misa_engine.trainer.sft import MisaTrainer
from misa_engine.trainer.sharding import Sharding
from ranks import run_ranks
from test_replica_trainer import like_torchrun
from trainer_cases import MISA_OPTIONS, sft_arguments, texts, tiny, tokenizer  # noqa: F401

#: Two micro-batches a step in each process, clipping at work, and a checkpoint within a round.
OPTIONS: dict[str, Any] = {
    "max_steps": 6,
    "learning_rate": 1e-3,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.2,
    "save_strategy": "steps",
    "save_steps": 3,
    "gradient_checkpointing": True,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
}


def trainer_of(
    out: Path, data: Any, words: Any, size: int, dtype: torch.dtype = torch.float32, by_hand: bool = False
) -> MisaTrainer:
    model = tiny().to(dtype)
    if by_hand:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    fsdp = {"fsdp": True} if size > 1 and not by_hand else {}
    return MisaTrainer(
        model,
        args=sft_arguments(out, **{**OPTIONS, "per_device_train_batch_size": 4 // size, **fsdp}),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=words,
        misa={**MISA_OPTIONS, "inner_steps": 2},
    )


def facts_of(trainer: MisaTrainer) -> dict[str, Any]:
    assert trainer.misa is not None
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    norms = [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "active": trainer.misa.active,
        "losses": losses,
        "norms": norms,
        "dtypes": {str(parameter.dtype) for parameter in trainer.model.parameters()},
        "said": trainer.args.fsdp,
        "memory": trainer.misa.memory(),
    }


def run(rank: int, place: Path, data: Any, words: Any) -> dict[str, Any]:
    like_torchrun(rank)
    found = {}
    ways: dict[str, dict[str, Any]] = {"two": {}, "hand": {"by_hand": True}, "bfloat16": {"dtype": torch.bfloat16}}
    for name, how in ways.items():
        trainer = trainer_of(place / name, data, words, 2, **how)
        trainer.train()
        trainer.save_model()
        found[name] = facts_of(trainer)
    if rank == 0:
        shutil.copytree(place / "two" / "checkpoint-3", place / "again" / "checkpoint-3")
    torch.distributed.barrier()
    trainer = trainer_of(place / "again", data, words, 2)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    return found


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def test_trainer_with_fsdp_equals_one_process_and_resumes_on_both(tmp_path, texts, tokenizer):  # noqa: F811
    found = run_ranks(run, tmp_path / "ranks", tmp_path, texts, tokenizer)
    assert not isinstance(found[0], str), found[0]
    alone = trainer_of(tmp_path / "one", texts, tokenizer, 1)
    alone.misa_config = alone.misa_config.altered(rest="none")  # as with rows
    alone.train()
    alone.save_model()
    wanted = facts_of(alone)
    for rank in found:
        assert rank["two"]["active"] == rank["hand"]["active"] == wanted["active"]
        assert rank["two"]["said"] is True and rank["bfloat16"]["dtypes"] == {"torch.bfloat16"}
        for key in ("losses", "norms"):
            assert rank["two"][key] == pytest.approx(wanted[key], abs=1e-5)
        for category in ("weights", "first_moment"):  # half of it, but for the padding of small matrices
            assert rank["two"]["memory"][category] < 0.7 * wanted["memory"][category]
    end = weights(tmp_path / "one")
    for way in ("two", "hand"):
        assert furthest(weights(tmp_path / way), end) < 1e-6
        assert {path.name for path in (tmp_path / way / "checkpoint-6").iterdir()} == {
            *{path.name for path in (tmp_path / "one" / "checkpoint-6").iterdir()} - {"rng_state.pth"},
            *("rng_state_0.pth", "rng_state_1.pth"),
        }
    assert furthest(weights(tmp_path / "again"), weights(tmp_path / "two")) == 0
    # a checkpoint of rows in one process, which holds the whole model
    shutil.copytree(tmp_path / "two" / "checkpoint-3", tmp_path / "alone again" / "checkpoint-3")
    trainer = trainer_of(tmp_path / "alone again", texts, tokenizer, 1)
    trainer.misa_config = trainer.misa_config.altered(rest="none")
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    assert furthest(weights(tmp_path / "alone again"), end) < 1e-6


# ---- refusals ----


def arguments(**values: Any) -> Any:
    return SimpleNamespace(**{"fsdp": True, "world_size": 2, "n_gpu": 1, "torch_compile": False, **values})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"world_size": 1, "n_gpu": 4}, "torchrun --nproc_per_node 4"),
        ({"fsdp_plugin_args": {"fsdp_version": 1}}, "FSDP1.*fsdp_version: 2"),
        ({"fsdp_plugin_args": {"fsdp_version": 2, "cpu_offload": True}}, "cpu_offload with fsdp"),
        ({"fsdp_plugin_args": {"fsdp_version": 2, "activation_checkpointing": True}}, "gradient_checkpointing=True"),
        ({"fsdp_plugin_args": {"fsdp_version": 2, "ignored_modules": "x"}}, "ignored_modules"),
        ({"fsdp_config": {"xla": True}}, "xla"),
        ({"torch_compile": True, "fsdp_plugin_args": {"fsdp_version": 2}}, "torch_compile with fsdp"),
    ],
)
def test_what_fsdp_cannot_be_with_misa_is_refused_with_what_to_do(values, words):
    with pytest.raises(ValueError, match=words):
        Sharding.asked_for(arguments(**values))


def test_a_model_that_transformers_sharded_is_refused_with_what_to_do(tmp_path):
    model: Any = SimpleNamespace(is_distributed_loading_by_transformers=True)
    with pytest.raises(ValueError, match="distributed_config.*fsdp=True"):
        MisaTrainer(model, args=sft_arguments(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_fsdp_is_read_from_arguments_and_from_the_launchers_environment(monkeypatch):
    assert Sharding.asked_for(arguments(fsdp=None)) is None
    plain = Sharding.asked_for(arguments(fsdp_plugin_args={"fsdp_version": 2}))
    assert plain == Sharding((), True)
    for name, value in {"USE_FSDP": "true"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ValueError, match="FSDP1"):  # its default
        Sharding.asked_for(arguments(fsdp=None))
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    assert Sharding.asked_for(arguments(fsdp=None)) == Sharding(("LlamaDecoderLayer",), False)


def other_models(rank: int) -> list[str]:
    from misa_engine.trainer.sharding import shard_model

    found = []
    for model in (
        tiny(hidden_size=32 + 16 * rank),
        tiny().to(torch.bfloat16 if rank else torch.float32),
        nn.Sequential(nn.Linear(4, 4)),
    ):
        with pytest.raises(ValueError) as error:
            shard_model(model, Sharding(), torch.device("cpu"))
        found.append(str(error.value))
    with pytest.raises(ValueError) as error:
        shard_model(tiny(), Sharding(("NoSuchLayer",)), torch.device("cpu"))
    return [*found, str(error.value)]


def test_models_that_differ_or_have_no_layers_are_refused_before_they_are_sharded(tmp_path):
    for found in run_ranks(other_models, tmp_path):
        assert not isinstance(found, str), found
        size, dtype, layers, name = found
        assert "[384, 48]" in size and "rank 1" in size and "Load the same model" in size
        assert "torch.bfloat16" in dtype and "same dtype" in dtype
        assert "found no repeated layers" in layers
        assert "NoSuchLayer" in name


def rows_of_rank_0(rank: int) -> dict[str, Any]:
    """Rank 0 has the weights; the other a model without memory. Both then train, and read another model's files."""
    from accelerate import init_empty_weights

    from misa_engine import MISA
    from misa_engine.trainer.sharding import has_rows, load_rows, shard_model, whole_weights
    from training import loss_of

    found = {}
    for name, options in {"tied": {"tie_word_embeddings": True}, "apart": {}}.items():
        torch.manual_seed(rank)
        if rank == 0:
            model = tiny(**options)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        else:
            with init_empty_weights(include_buffers=False):
                model = tiny(**options)
            model.tie_weights()
        shard_model(model, Sharding(), torch.device("cpu"))
        assert has_rows(model)
        found[f"{name} begun"] = whole_weights(model, keep=True)
        optimizer = MISA(model, delta=0.3, lr=1e-2, inner_steps=1, rest="none")
        loss_of(model, torch.arange(8).view(1, 8) + rank).backward()
        optimizer.step()
        with torch.no_grad():
            loss_of(model, torch.arange(8).view(1, 8))  # which leaves outer weights gathered
        found[f"{name} trained"] = whole_weights(model, keep=rank == 0)
        optimizer.remove()
        with pytest.raises(ValueError, match="from before sharding"):
            MisaTrainer(model, optimizer="adamw")
        load_rows(model, found[f"{name} begun"].items())
        found[f"{name} loaded"] = whole_weights(model, keep=True)
    return found


def test_weights_of_rank_0_reach_everybody_and_come_back_whole_also_tied(tmp_path):
    first, second = run_ranks(rows_of_rank_0, tmp_path)
    assert not isinstance(first, str), first
    for name, options in {"tied": {"tie_word_embeddings": True}, "apart": {}}.items():
        torch.manual_seed(0)
        wanted = {key: tensor.to(torch.bfloat16) for key, tensor in tiny(**options).state_dict().items()}
        for found in (first[f"{name} begun"], second[f"{name} begun"], first[f"{name} loaded"]):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
        trained = first[f"{name} trained"]
        assert not second[f"{name} trained"]
        assert any(not torch.equal(trained[key], tensor) for key, tensor in wanted.items())
        assert torch.equal(trained["lm_head.weight"], trained["model.embed_tokens.weight"]) == (name == "tied")
