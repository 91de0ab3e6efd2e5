"""Any trainer through the factory, and MisaTrainer: options, training, what is seen."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTTrainer

from misa_engine import MISA, MisaConfig
from misa_engine.trainer import checkpoints, log_writer
from misa_engine.trainer.compat import check_arguments
from misa_engine.trainer.mixin import MisaFactory, MisaMixin, config_from_arguments
from misa_engine.trainer.sft import MisaTrainer
from trainer_cases import COMMON, MISA_OPTIONS, log_of, logged, plain_trainer, sft_arguments, tiny
from training import changed, weights

pytest_plugins = ["trainer_cases"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    for name in ("transformers", "trl", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


# ---- any trainer, through the factory ----


def test_a_plain_trainer_trains_active_units_only(tmp_path, tokens):
    training = plain_trainer(tmp_path, tokens, misa={"cold_start": "none", "rest": "none"}, max_steps=3)
    before = weights(training.model)
    training.train()
    optimizer = training.optimizer.optimizer
    assert isinstance(optimizer, MISA) and optimizer.total_steps == 3
    assert changed(before, training.model) == {name for unit in optimizer.active for name in [unit]}
    assert all(parameter.grad is None for name, parameter in training.model.named_parameters())


def test_an_sft_trainer_takes_the_factory(tmp_path, tokenizer, texts):
    training = SFTTrainer(
        tiny(),
        args=sft_arguments(tmp_path, per_device_train_batch_size=8, num_train_epochs=8, max_steps=-1),
        train_dataset=texts,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(MisaFactory, {**MISA_OPTIONS, "lr": 1e-2}),
    )
    training.train()
    assert isinstance(training.optimizer.optimizer, MISA)
    losses = logged(training, "loss")
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("way", ["factory", "optimizer"])
def test_a_dpo_trainer_trains_the_policy_and_leaves_the_reference_alone(way, tmp_path, tokenizer, preferences):
    """TRL's DPOTrainer has no ``optimizer_cls_and_kwargs`` argument, but the attribute of every Trainer."""
    options = {**MISA_OPTIONS, "lr": 1e-3}
    reference, model = tiny(), tiny()
    training = DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(str(tmp_path), **{**COMMON, "bf16": False, "max_steps": 4}),
        train_dataset=preferences,
        processing_class=tokenizer,
        optimizers=(MISA(model, **options), None) if way == "optimizer" else (None, None),
    )
    if way == "factory":
        training.optimizer_cls_and_kwargs = (MisaFactory, options)
    before = weights(model)
    training.train()
    optimizer = training.optimizer.optimizer
    assert optimizer.total_steps == 4
    moved = changed(before, model)
    assert moved and moved <= {name for unit in optimizer.units for name in unit.params}
    assert changed(before, reference) == set()
    assert all(math.isfinite(loss) for loss in logged(training, "loss"))


class CountLayerForwards(TrainerCallback):
    """Counts the forward passes of each layer and notes the lowest active layer of each step."""

    def __init__(self, model: nn.Module):
        self.layers = model.model.layers
        self.counts: list[list[int]] = []
        self.lowest: list[int] = []
        for index, layer in enumerate(self.layers):
            layer.self_attn.register_forward_pre_hook(lambda *_, index=index: self.count(index))

    def count(self, index: int) -> None:
        if self.counts:  # the check of the loss comes before the first step
            self.counts[-1][index] += 1

    def on_step_begin(self, args, state, control, **kwargs):
        trains = [any(p.requires_grad for p in layer.parameters()) for layer in self.layers]
        self.lowest.append(trains.index(True))
        self.counts.append([0] * len(self.layers))


@pytest.mark.parametrize("which", ["Trainer", "SFTTrainer", "MisaTrainer"])
def test_checkpointing_recomputes_nothing_below_the_lowest_active_unit(which, tmp_path, tokenizer, texts, tokens):
    model = tiny(num_hidden_layers=4)
    counter = CountLayerForwards(model)
    misa = {"delta": 0.04, "inner_steps": 1, "cold_start": "none", "rest": "none"}
    options = {"gradient_checkpointing": True, "max_steps": 12}
    if which == "Trainer":
        training = plain_trainer(tmp_path, tokens, model, misa=misa, **options)
    else:
        own = {"misa": misa} if which == "MisaTrainer" else {"optimizer_cls_and_kwargs": (MisaFactory, misa)}
        training = {"SFTTrainer": SFTTrainer, "MisaTrainer": MisaTrainer}[which](
            model,
            args=sft_arguments(tmp_path, **options),
            train_dataset=texts,
            processing_class=tokenizer,
            **own,
        )
    training.add_callback(counter)
    training.train()
    assert len(set(counter.lowest)) > 1  # the truncation point did move
    for lowest, counts in zip(counter.lowest, counter.counts, strict=True):
        assert counts == [1 if index < lowest else 2 for index in range(4)], (lowest, counts)


# ---- MisaTrainer: options ----


def test_options_come_from_the_training_arguments_unless_given(tmp_path):
    args = sft_arguments(tmp_path, learning_rate=3e-4, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1, seed=7)
    config = config_from_arguments(args, {"delta": 0.1})
    assert (config.lr, config.betas, config.eps) == (3e-4, (0.9, 0.95), 1e-6)
    assert (config.weight_decay, config.seed, config.delta) == (0.1, 7, 0.1)
    config = config_from_arguments(args, MisaConfig(preset="paper", lr=1e-6, eta=2.0))
    assert (config.lr, config.eta, config.preset, config.closing_momentum) == (1e-6, 2.0, "paper", True)
    assert (config.betas, config.seed) == ((0.9, 0.95), 7)
    with pytest.raises(ValueError, match="unknown option 'dleta'.*delta"):
        config_from_arguments(args, {"dleta": 0.1})


def test_an_explicit_option_wins_although_it_is_the_default(tmp_path):
    args = sft_arguments(tmp_path, learning_rate=3e-4, adam_epsilon=1e-6)
    assert config_from_arguments(args, MisaConfig(lr=1e-5)).lr == MisaConfig.lr == 1e-5
    assert config_from_arguments(args, MisaConfig(eps=1e-8)).eps == 1e-8
    assert config_from_arguments(args, MisaConfig()).lr == 3e-4


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"fp16": True}, "bfloat16"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant.*False"),
        ({"misa": {"delta": 2.0}}, "delta"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(options, word, misa_trainer, tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match=word):
        misa_trainer(model=model, **options)
    assert not (tmp_path / "run").exists()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_several_gpus_in_one_process_and_deepspeed_are_refused(misa_trainer, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
        with pytest.raises(ValueError, match=r"4 GPUs.*torchrun --nproc_per_node 4"):
            misa_trainer()
    arguments = sft_arguments(tmp_path / "run")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="MISA averages the gradients.*--fsdp"):
        check_arguments(arguments, MisaConfig())


def test_a_second_optimizer_is_refused(tmp_path, tokenizer, texts):
    with pytest.raises(ValueError, match="makes its own optimizer"):
        MisaTrainer(
            tiny(),
            args=sft_arguments(tmp_path),
            train_dataset=texts,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=(MisaFactory, {}),
        )


# ---- MisaTrainer: training and what is seen ----


class TrueNorms(TrainerCallback):
    """Norm of all gradients as autograd left them, taken just before the update."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        squares = [p.grad.double().square().sum() for p in self.model.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(float(sum(squares))))


@pytest.mark.parametrize("max_grad_norm", [0.1, 0.0])
def test_grad_norm_is_the_true_norm_and_clipping_leaves_gradients_and_scores_raw(misa_trainer, max_grad_norm):
    training = misa_trainer(max_grad_norm=max_grad_norm)
    watcher = TrueNorms(training.model)
    training.add_callback(watcher)
    training.train()
    assert min(watcher.norms) > 0.1  # every step was clipped where clipping is on
    assert logged(training, "grad_norm") == pytest.approx(watcher.norms, rel=1e-5)


def test_fused_clipping_trains_like_the_trainer_clipping_in_place(misa_trainer, tmp_path, tokens):
    fused = misa_trainer(misa={**MISA_OPTIONS, "rest": "none"}, max_grad_norm=0.5)
    fused.train()
    misa = {"rest": "none", "run_steps": COMMON["max_steps"]}  # the latter a plain Trainer does not tell its optimizer
    in_place = plain_trainer(tmp_path / "plain", tokens, max_grad_norm=0.5, misa=misa)
    in_place.train()
    for (name, a), b in zip(fused.model.named_parameters(), in_place.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert logged(fused, "grad_norm") == pytest.approx(logged(in_place, "grad_norm"), rel=1e-4)
    first, second = fused.misa.scores, in_place.optimizer.optimizer.scores
    assert first == pytest.approx(second, rel=1e-3)


def test_a_norm_given_to_misa_wins_over_the_arguments(misa_trainer):
    given = misa_trainer("given", misa={**MISA_OPTIONS, "max_grad_norm": 0.1}, max_grad_norm=0.0)
    given.train()
    from_arguments = misa_trainer("arguments", max_grad_norm=0.1)
    from_arguments.train()
    assert changed(weights(given.model), from_arguments.model) == set()


def test_accumulation_equals_the_big_batch(misa_trainer):
    misa = {**MISA_OPTIONS, "rest": "none"}  # what rests moves by the last micro-batch alone
    big = misa_trainer("big", misa=misa, per_device_train_batch_size=4, max_steps=5)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5}
    small = misa_trainer("small", misa=misa, **options)
    big.train()
    small.train()
    assert big.misa.active == small.misa.active
    for (name, a), b in zip(big.model.named_parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("scheduler", ["cosine", "constant_with_warmup", "linear"])
def test_schedulers_reach_every_group(misa_trainer, scheduler):
    groups = ({"pattern": "*.mlp.*", "lr": 1e-3},)
    training = misa_trainer(
        misa={**MISA_OPTIONS, "parameter_groups": groups}, lr_scheduler_type=scheduler, warmup_steps=2, max_steps=6
    )
    training.train()
    assert logged(training, "learning_rate")[0] == 0.0
    rates = [group["lr"] for group in training.misa.param_groups]
    assert rates == pytest.approx(training.lr_scheduler.get_last_lr())
    shares = {round(group["lr"] / group["initial_lr"], 9) for group in training.misa.param_groups}
    assert len(rates) > 1 and len(shares) == 1


def test_the_run_log_and_the_metrics_tell_what_happened(misa_trainer, texts, caplog):
    with caplog.at_level(logging.INFO, logger=log_writer.__name__):
        misa = {**MISA_OPTIONS, "cold_start": "none", "rest": "none"}
        training = misa_trainer(misa=misa, eval_dataset=texts.select(range(4)))
        before = weights(training.model)
        start = training.evaluate()["eval_loss"]
        training.train()
        end = training.evaluate()["eval_loss"]
    assert end < start
    entries = log_of(training)
    assert [entry["type"] for entry in entries[:4]] == ["run", "switch", "metrics", "memory"]
    run, misa = entries[0], training.misa
    assert run["total_parameters"] == sum(p.numel() for p in training.model.parameters())
    assert run["budget_parameters"] == math.floor(0.2 * run["total_parameters"])
    assert [unit["name"] for unit in run["units"]] == [unit.name for unit in misa.units]
    assert run["config"]["lr"] == 1e-2 and run["versions"]["torch"] and run["optimizer"] == "misa"
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    assert evaluations == [(0, start), (10, end)]

    switches = [entry for entry in entries if entry["type"] == "switch"]
    assert [entry["step"] for entry in switches] == [0, 4, 8]
    assert switches[0]["came"] == switches[0]["active"] and switches[0]["left"] == []
    told = [record.message for record in caplog.records if record.levelno == logging.INFO]
    lines = [message for message in told if message.startswith("round ")]
    assert len(lines) == 3 and lines[1].startswith("round 1 at step 4: left ") and lines[1].endswith(" ms")
    assert all(name in lines[1] for name in (*switches[1]["came"], *switches[1]["left"]))

    metrics = [entry for entry in entries if entry["type"] == "metrics" and "loss" in entry]
    assert [entry["step"] for entry in metrics] == list(range(1, 11))
    history = [entry for entry in training.state.log_history if "loss" in entry]
    for entry, logged_entry in zip(metrics, history, strict=True):
        assert {key: entry[key] for key in logged_entry} == logged_entry
        assert 0 < entry["misa/active_share"] <= 0.2
        assert 0 <= entry["misa/entropy"] <= 1 and 0 < entry["misa/coverage"] <= 1
        assert entry["misa/skipped_steps"] == 0 and entry["misa/stale_rounds_max"] >= 0
    assert metrics[-1]["misa/active_share"] == switches[-1]["active_share"]

    (last,) = [entry for entry in entries if entry["type"] == "end"]
    moved = changed(before, training.model)
    assert {name for name, change in last["relative_change"].items() if change != 0} == moved
    for name, parameter in training.model.named_parameters():
        expected = (parameter - before[name]).norm() / before[name].norm()
        assert last["relative_change"][name] == pytest.approx(expected.item(), rel=1e-5)
    assert {name for name, visits in last["visits"].items() if visits} == moved
    assert last["frozen"] == last["unchanged_frozen"] == len(before) - len(moved)
    assert set(last["scores"]) == set(last["visits"])
    assert last["peak_memory_bytes"] >= last["rss_before_training_bytes"] > 0
    times = last["step_time_s"]
    assert 0 < times["p20"] <= times["median"] <= times["p80"]


def test_the_saved_model_loads_again_with_the_same_weights(misa_trainer, tmp_path):
    training = misa_trainer(max_steps=3)
    training.train()
    training.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert changed(weights(training.model), again) == set()
    assert not (tmp_path / "run" / checkpoints.STAGING).exists()
    assert (tmp_path / "run" / "tokenizer_config.json").is_file()


def test_the_baseline_trains_everything_with_the_same_log(misa_trainer):
    training = misa_trainer(optimizer="adamw", max_steps=4, weight_decay=0.1)
    before = weights(training.model)
    training.train()
    assert training.misa is None
    assert changed(before, training.model) == set(before)
    entries = log_of(training)
    assert entries[0]["optimizer"] == "adamw" and entries[0]["units"] == []
    assert [entry["type"] for entry in entries].count("metrics") == 5
    assert entries[-1]["type"] == "end" and set(entries[-1]["relative_change"]) == set(before)
    decayed, other = training.optimizer.param_groups
    assert decayed["fused"] and decayed["betas"] == (0.9, 0.999) and decayed["initial_lr"] == 1e-2
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in other["params"]} == {1}


def test_the_mixin_works_with_another_trainer(tmp_path, tokenizer, preferences):
    class MisaDPOTrainer(MisaMixin, DPOTrainer):
        pass

    training = MisaDPOTrainer(
        tiny(),
        ref_model=tiny(),
        args=DPOConfig(str(tmp_path), **{**COMMON, "bf16": False, "max_steps": 3}),
        train_dataset=preferences,
        processing_class=tokenizer,
        misa=MISA_OPTIONS,
    )
    training.train()
    assert [entry["type"] for entry in log_of(training)][-1] == "end"
    assert all("misa/coverage" in entry for entry in training.state.log_history if "loss" in entry)
