"""What the planner says of the rest rule: matrices, bytes, peaks and arithmetic, against the engine and real passes."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from command import make_workplace, words
from misa_engine import MISA, MisaConfig, plan
from misa_engine.cli.main import main
from misa_engine.cli.preview import preview
from misa_engine.engine.rest import can_rest, resting_while
from misa_engine.method.partition import partition_for
from misa_engine.planner.activations import DecoderShape, MicroBatch, peak
from misa_engine.planner.probe import measure
from misa_engine.planner.resting import rest_bytes, step_cost
from misa_engine.planner.worst_case import MetaModel, WorstCase
from misa_engine.report.log import RunLog
from models import TINY
from test_probe import SMALL, names_of, profiled_peak

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning"),
]


def order_of(model):
    return {name: place for place, (name, _) in enumerate(model.named_parameters())}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("scope", ["all", "above"])
@pytest.mark.parametrize("outside", [False, True])
def test_matrices_and_bytes_are_the_engines(family, scope, outside):
    config = MisaConfig(delta=0.3, rest="sinkhorn", rest_scope=scope, rest_outside=outside, seed=2)
    model = TINY[family]()
    parts = partition_for(model, config)
    can = can_rest(model, parts, config)
    planned = rest_bytes(model, can)
    optimizer = MISA(model, config)
    names = [name for index in optimizer.tracker.active for name in optimizer.units[index].params]
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - set(names)
    assert set(resting_while([*parts.always, *names], can, order_of(model), config)) == expected
    assert planned == optimizer.memory()["rest"] > 0


def test_without_a_rule_nothing_rests_and_nothing_is_counted():
    model = TINY["llama"]()
    parts, config = partition_for(model, MisaConfig()), MisaConfig(rest="none")
    can = can_rest(model, parts, config)
    assert rest_bytes(model, can) == 0
    assert step_cost(model, parts, can, config, 100, checkpointing=True) == 1.0
    found = plan(LlamaConfig(**SMALL), delta=0.3, rest="none")
    assert found.resting == () and "rest" not in found.bytes and found.to_dict()["step_cost"] == 1.0


# ---- peaks ----


@pytest.mark.parametrize(
    ("scope", "outside", "checkpointing", "loss", "length", "tied"),
    [
        ("all", False, True, "chunked", 64, False),
        ("all", True, True, "chunked", 64, True),
        ("all", True, False, "plain", 64, True),
        ("all", True, True, "plain", 512, False),
        ("above", False, True, "plain", 64, True),
        ("above", True, False, "chunked", 512, False),
    ],
)
def test_the_predicted_peak_is_that_of_a_pass_on_fake_tensors(scope, outside, checkpointing, loss, length, tied):
    meta = MetaModel(LlamaConfig(**{**SMALL, "vocab_size": 2000}, tie_word_embeddings=tied))
    misa = MisaConfig(delta=0.1, rest="sign", rest_scope=scope, rest_outside=outside)
    micro_batch = MicroBatch(1, length, checkpointing, loss)
    worst = WorstCase(meta, misa, micro_batch)
    predicted, names = worst.peak(micro_batch)
    options = {"length": length, "checkpointing": checkpointing, "loss": loss}
    found = measure(meta.config, names, resting=worst.resting(names), **options)
    assert predicted.total == pytest.approx(found.peak, rel=0.03)  # what the product promises


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("outside", [False, True])
def test_fake_tensors_need_what_a_real_step_with_the_rule_does(checkpointing, outside):
    config = LlamaConfig(**SMALL)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
    misa = MisaConfig(delta=0.1, rest="sgd", rest_outside=outside, inner_steps=100, cold_start="none")
    optimizer = MISA(model, misa)
    ids = torch.zeros(1, 512, dtype=torch.long)
    names = [name for index in optimizer.tracker.active for name in optimizer.units[index].params]
    can = can_rest(model, optimizer.partition, misa)

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    step()
    optimizer.step()
    optimizer.zero_grad()
    rests = resting_while(names, can, order_of(model), misa)
    fake = measure(
        config, names, resting=rests, length=512, checkpointing=checkpointing, loss="plain", dtype=torch.float32
    )
    assert profiled_peak(step) == pytest.approx(fake.peak, rel=0.02)


def test_resting_inputs_are_kept_and_one_gradient_passes():
    shape = DecoderShape.of(LlamaConfig(**SMALL))
    micro_batch = MicroBatch(1, 512, False, "plain")
    kinds = {layer: set("qkvo") | {"gate", "up", "down"} for layer in range(3)}
    drawn = peak(shape, micro_batch, {0: {"k"}})
    all_slots, all_rest = peak(shape, micro_batch, kinds), peak(shape, micro_batch, kinds, rest=True)
    assert drawn.total < all_slots.total <= all_rest.total
    assert all_rest.total - all_slots.total <= 2 * SMALL["hidden_size"] * SMALL["intermediate_size"]
    assert names_of({0: ["k"]}) == ["model.layers.0.self_attn.k_proj.weight"]


def test_a_family_without_formulas_is_measured_with_what_rests():
    model = TINY["gpt2"]()
    none, all_, above = (
        plan(model.config, delta=0.3, micro_batch=MicroBatch(1, 16, False, "plain"), **options)
        for options in ({"rest": "none"}, {"rest": "sign"}, {"rest": "sign", "rest_scope": "above"})
    )
    assert none.method == all_.method == "fake tensors"
    assert none.total_bytes < above.total_bytes <= all_.total_bytes and len(all_.resting) >= len(above.resting) > 0


# ---- arithmetic ----


def test_the_cost_of_a_step_is_two_operations_a_resting_weight():
    model = TINY["llama"]()
    misa = MisaConfig(delta=0.3, rest="sign")
    parts = partition_for(model, misa)
    drawable = sum(unit.numel for unit in parts.units)
    head = model.lm_head.weight.numel()
    budget = drawable // 4

    def cost(checkpointing=False, accumulation=1, **options):
        config = replace(misa, **options)
        can = can_rest(model, parts, config)
        return step_cost(model, parts, can, config, budget, checkpointing=checkpointing, accumulation=accumulation)

    for checkpointing, operations in ((False, 4), (True, 6)):
        without = operations * (drawable + head) + 2 * budget
        assert cost(checkpointing) == pytest.approx(1 + 2 * (drawable - budget) / without)
    assert cost(accumulation=4) - 1 == pytest.approx((cost() - 1) / 4) == pytest.approx(cost(rest_every=4) - 1)
    # the head's gradient is a product, the embedding's is not
    without = 4 * (drawable + head) + 2 * budget
    assert cost(rest_outside=True) - cost() == pytest.approx(2 * head / without)


# ---- the commands ----


def test_plan_takes_the_options_and_hands_them_on(capsys):
    words = ["plan", "--model", "tinyllama", "--rest", "sinkhorn", "--rest_lr", "0.2", "--rest_every", "2"]
    words += ["--rest_outside", "--accumulation", "4", "--length", "256"]
    assert main([*words, "--gpu", "rtx4090"]) == 0
    shown = capsys.readouterr().out
    assert "rest sinkhorn: up to " in shown and "move by 0.2 x lr at every 2 steps" in shown
    assert "\n  rest  " in shown  # a category of bytes
    assert main([*words, "--max_vram_gb", "24"]) == 0
    command = capsys.readouterr().out.strip().splitlines()[-1]
    for option in ("--rest sinkhorn", "--rest_lr 0.2", "--rest_every 2", "--rest_outside true"):
        assert option in command
    assert main(["plan", "--model", "tinyllama", "--rest", "sign", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rest"] == "sign" and found["resting"] > 100 and 1.2 < found["step_cost"] < 1.34


def test_the_solver_counts_what_rests():
    from misa_engine.planner.cards import Card
    from misa_engine.planner.solve import Wishes, solve

    meta = MetaModel(LlamaConfig(**SMALL))
    misa = MisaConfig(delta=0.1, rest="none")
    wishes = Wishes(delta=0.1, state_dtype="float32", checkpointing=False, length=256, most_sequences=1 << 12)
    limit = Card.of("2GiB")
    plain, rests = (
        solve(meta, limit, config, MicroBatch(1, 256, False, "plain"), wishes)
        for config in (misa, replace(misa, rest="sign"))
    )
    assert rests.fits and rests.micro_batch.batch < plain.micro_batch.batch


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rest", "none", "--rest_lr", "0.2"], "rest is 'none'"),
        (["--rest", "sing"], "sign"),
        (["--rest", "sign", "--rest_lr", "-1"], "rest_lr is a multiple of lr"),
    ],
)
def test_bad_input_is_one_line(words, said, capsys):
    assert main(["plan", "--model", "tinyllama", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_preview_shows_the_rule_and_its_bytes():
    config = MisaConfig(delta=0.2, rest="sign", rest_every=2)
    shown = preview(TINY["llama"](), config, accumulation=2)
    assert "rest sign: " in shown and "at every 2 steps" in shown and "\n  rest  " in shown
    assert "rest" not in preview(TINY["llama"](), MisaConfig(delta=0.2, rest="none"))


# ---- a run ----


def test_a_run_with_the_rule_says_so_before_and_after(tmp_path, tmp_path_factory, capsys):
    place, out = make_workplace(tmp_path, tmp_path_factory.mktemp("cache")), tmp_path / "out"
    options = {"rest": "sign", "rest_outside": "true", "rest_every": 2, "gradient_accumulation_steps": 2}
    assert main(words(place, out, "--dry_run", **options)) == 0
    shown = capsys.readouterr().out
    assert "rest sign: up to " in shown and "at every 2 steps" in shown and "every matrix that can rest moves" in shown
    assert "warning: fewer than" not in shown
    assert main(words(place, out, **options)) == 0
    shown = capsys.readouterr().out
    assert "of what can be drawn; the others moved by sign" in shown and "CHANGED" not in shown
    end = RunLog.read(out)[-1]
    assert end["type"] == "end" and 0 < end["frozen"] == end["unchanged_frozen"]  # norms; no matrix
    matrices = [change for name, change in end["relative_change"].items() if "norm" not in name]
    assert min(matrices) > 0
    memory = next(entry["bytes"] for entry in RunLog.read(out) if entry["type"] == "memory")
    assert memory["rest"] > 0


def test_a_rate_without_a_rule_is_refused_before_anything_is_written(tmp_path, tmp_path_factory, capsys):
    place = make_workplace(tmp_path, tmp_path_factory.mktemp("cache"))
    assert main(words(place, tmp_path / "out", rest="none", rest_lr=0.2)) == 2
    error = capsys.readouterr().err
    assert "rest is 'none'" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
