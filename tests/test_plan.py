"""``misa plan`` and ``misa_engine.plan()``: what is printed, chosen and refused."""

import json
import os
import re
import subprocess
import sys

import pytest
from transformers import AutoConfig

import misa_engine
from misa_engine.cli.main import main
from misa_engine.errors import UserError
from misa_engine.planner.activations import MicroBatch
from misa_engine.planner.cards import CARDS, HUB_IDS, MODELS, Card, published_config
from misa_engine.planner.plan import plan
from misa_engine.planner.solve import Wishes, solve
from misa_engine.planner.worst_case import MetaModel
from models import TINY

pytestmark = pytest.mark.filterwarnings("ignore")


def planned(capsys, *words):
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("misa: error: ") and error.count("\n") == 1
    return error


# ---- what is printed ----


def test_the_json_holds_what_machines_need(capsys):
    found = planned(capsys, "--model", "llama-3-8b", "--gpu", "rtx4090", "--delta", "0.03")
    assert found["parameters"] == 8_030_261_248 and found["delta_parameters"] == int(0.03 * 8_030_261_248)
    assert sum(found["bytes"].values()) == found["total_bytes"] < CARDS["rtx4090"] << 20
    assert {"weights", "gradients", "first_moment", "second_moment", "residual_bits"} <= set(found["bytes"])
    assert {"activations", "temporaries", "cuda_context", "slack"} <= set(found["bytes"])
    per_parameter = {"gradients": 2, "first_moment": 4, "second_moment": 4, "residual_bits": 2}
    for category, size in per_parameter.items():  # one block of 1,024 elements more at most
        assert 0 <= found["bytes"][category] - size * found["delta_parameters"] <= size * 1024
    assert found["fits"] and 10_000 < found["max_tokens_per_micro_batch"] < 12_000
    assert found["max_length"] == 8192  # the model's own limit


def test_the_table_names_every_category_and_the_card(capsys):
    assert main(["plan", "--model", "tinyllama", "--gpu", "rtx4060ti-16", "--batch", "4", "--length", "512"]) == 0
    printed = capsys.readouterr().out
    for words in ("weights", "residual bits", "activations", "cuda context", "together", "rtx4060ti-16", "4 x 512"):
        assert words in printed


@pytest.mark.parametrize("name", list(MODELS))
def test_every_built_in_model_can_be_planned(capsys, name):
    found = planned(capsys, "--model", name, "--gpu", "b200", "--length", "512")
    assert found["fits"] and found["max_tokens_per_micro_batch"] >= 512
    assert found["max_length"] <= MODELS[name]["max_position_embeddings"] and name in HUB_IDS
    advertised = re.search(r"([\d.]+)([bm])$", name)  # as in qwen2.5-72b
    if advertised:
        size = float(advertised[1]) * {"b": 1e9, "m": 1e6}[advertised[2]]
        assert 0.85 * size < found["parameters"] < 1.35 * size


def test_memory_options_change_their_own_categories(capsys):
    base = planned(capsys, "--model", "tinyllama")["bytes"]
    eight = planned(capsys, "--model", "tinyllama", "--state_dtype", "int8")["bytes"]
    assert eight["first_moment"] * 4 == base["first_moment"] and eight["moment_scales"] * 64 == 2 * base["first_moment"]
    late = planned(capsys, "--model", "tinyllama", "--update_in", "backward")["bytes"]
    assert "gradients" not in late and late["temporaries"] >= base["temporaries"]
    wide = planned(capsys, "--model", "tinyllama", "--grad_dtype", "float32")["bytes"]
    assert wide["gradients"] == 2 * base["gradients"]
    assert "residual_bits" not in planned(capsys, "--model", "tinyllama", "--master", "none")["bytes"]
    kept = planned(capsys, "--model", "tinyllama", "--no_checkpointing")["bytes"]
    assert kept["activations"] > 5 * base["activations"]
    lean = planned(capsys, "--model", "tinyllama", "--no_checkpointing", "--use_liger_kernel")["bytes"]
    assert lean["activations"] < 0.8 * kept["activations"]


def test_a_directory_with_a_config_is_enough(capsys, tmp_path):
    TINY["gpt2"]().config.save_pretrained(tmp_path)
    found = planned(capsys, "--model", str(tmp_path), "--delta", "0.3", "--length", "32", "--loss", "plain")
    assert found["method"] == "fake tensors" and found["fits"]


def test_the_python_function_takes_a_config_and_options():
    config = TINY["llama"]().config
    found = misa_engine.plan(config, card="16GiB", delta=0.3, state_dtype="int8", micro_batch=MicroBatch(2, 32))
    assert found.fits and found.total_bytes == sum(found.bytes.values()) and found.misa.state_dtype == "int8"


def test_names_beside_a_bar_stand_apart_and_near_their_parts():
    from misa_engine.planner.picture import spread

    assert spread([1.0, 5.0, 9.0], 1.0) == [1.0, 5.0, 9.0]
    placed = spread([7.0, 15.0, 15.1, 15.2, 21.0], 1.0)
    assert placed == pytest.approx([7.0, 14.1, 15.1, 16.1, 21.0])
    assert spread([0.1, 0.2, 9.0], 1.0, low=0.5) == pytest.approx([0.5, 1.5, 9.0])
    assert spread([], 1.0) == []


def test_the_picture_says_what_fits_and_names_every_part(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    seen: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: seen.append(self))
    assert main(["plan", "--model", "tinyllama", "--gpu", "8GiB", "--plot", str(tmp_path / "plan.png")]) in (0, 2)
    texts = [text.get_text() for text in seen[0].axes[0].texts]
    assert any(text.endswith("fits") for text in texts) or any("does not fit" in text for text in texts)
    assert {"weights", "activations", "first moment"} <= set(texts) and not seen[0].legends


def test_the_picture_is_a_png(capsys, tmp_path):
    assert main(["plan", "--model", "tinyllama", "--plot", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "ends in .png" in refused(capsys, "--model", "tinyllama", "--plot", str(tmp_path / "plan.jpg"))
    assert "cannot be written" in refused(capsys, "--model", "tinyllama", "--plot", "/nowhere/at/all/plan.png")


def test_no_gpu_no_weights_and_no_network_are_touched():
    script = (
        "import sys; from misa_engine.cli.main import main; code = main(sys.argv[1:]); assert 'trl' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", "--model", "llama-3-8b", "--json"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "llama-3-8b"


# ---- --max_vram_gb ----


@pytest.mark.parametrize("limit", [17.8, 19.0, 20, 23, 30, 80])
def test_a_solved_plan_fits_and_says_how_to_run_it(capsys, limit):
    found = planned(capsys, "--model", "llama-3-8b", "--max_vram_gb", str(limit))
    assert found["total_bytes"] <= limit * 2**30
    command = found["command"]
    assert command.startswith("misa train --model_name_or_path meta-llama/Meta-Llama-3-8B")
    for option in ("delta", "state_dtype"):
        assert f"--{option} {found[option]}" in command
    assert f"--per_device_train_batch_size {found['batch']}" in command
    assert f"--gradient_checkpointing {str(found['checkpointing']).lower()}" in command


def test_what_costs_least_is_given_up_first(capsys):
    order = [planned(capsys, "--model", "llama-3-8b", "--max_vram_gb", str(limit)) for limit in (80, 23, 19, 17.8)]
    assert [plan["checkpointing"] for plan in order] == [False, True, True, True]
    assert [plan["state_dtype"] for plan in order] == ["float32", "float32", "int8", "int8"]
    assert [plan["delta"] for plan in order][:3] == [0.03] * 3 and order[3]["delta"] < 0.03
    assert order[0]["batch"] * 2048 >= 2048 and order[1]["batch"] > order[2]["batch"] >= 1


def test_given_options_are_kept(capsys):
    words = (
        "--state_dtype",
        "float32",
        "--checkpointing",
        "true",
        "--batch",
        "2",
        "--delta",
        "0.01",
        "--length",
        "1024",
    )
    found = planned(capsys, "--model", "llama-3-8b", "--max_vram_gb", "60", *words)
    assert (found["state_dtype"], found["checkpointing"], found["batch"]) == ("float32", True, 2)
    assert (found["delta"], found["length"]) == (0.01, 1024)


def test_one_more_sequence_would_not_fit():
    meta, limit = MetaModel(published_config("llama-3-8b")), Card.of("23")
    found = solve(meta, limit, misa_engine.MisaConfig(), MicroBatch(), Wishes(checkpointing=True))
    more = misa_engine.plan(meta, misa=found.misa, micro_batch=MicroBatch(found.micro_batch.batch + 1, 2048))
    assert found.total_bytes <= limit.total_bytes < more.total_bytes


# ---- what is refused ----


def test_an_impossible_plan_says_what_would_work(capsys):
    bf16 = ("--residents", "none")
    error = refused(capsys, "--model", "llama-3-8b", "--max_vram_gb", "12", *bf16)
    assert "does not fit into 12.00 GiB" in error and "smallest card that works is rtxa4500" in error
    error = refused(capsys, "--model", "llama-3-8b", "--max_vram_gb", "18.5", "--delta", "0.06", *bf16)
    delta = float(error.split("largest delta that works is ")[1].split()[0].rstrip("."))
    assert 0.0073 < delta < 0.06
    words = ("--model", "llama-3-8b", "--max_vram_gb", "18.5", *bf16, "--delta")
    assert planned(capsys, *words, str(delta))["fits"]
    refused(capsys, *words, str(delta + 0.001))
    assert "No known card works" in refused(capsys, "--model", "qwen2.5-14b", "--gpu", "8", "--batch", "64",
                                            "--length", "32768", "--no_checkpointing")  # fmt: skip


def test_a_plan_that_does_not_fit_its_card_is_printed_and_refused(capsys):
    assert main(["plan", "--model", "llama-3-8b", "--gpu", "17", "--json"]) == 2
    both = capsys.readouterr()
    assert json.loads(both.out)["fits"] is False and "smallest card" in both.err


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["--model", "lama-3-8b"], ["Did you mean llama-3-8b?", "tinyllama"]),
        (["--model", "llama-3-8b", "--gpu", "rtx409"], ["Did you mean rtx4090?", "h100"]),
        (["--model", "llama-3-8b", "--gpu", "-3"], ["unknown card"]),
        (["--model", "./nowhere"], ["does not exist"]),
        (["--model", "someone/unheard-of"], ["cannot be reached", "name the directory"]),
        (["--model", "llama-3-8b", "--delta", "0.001"], ["smallest that works"]),
        (["--model", "llama-3-8b", "--delta", "3"], ["(0, 1]"]),
        (["--model", "llama-3-8b", "--detla", "0.1"], ["--delta"]),
        (["--model", "llama-3-8b", "--state_dtype", "int4"], ["int4"]),
        (["--model", "llama-3-8b", "--batch", "0"], ["--batch", "at least 1", "not 0"]),
        ([], ["--model"]),
    ],
)
def test_bad_input_gets_one_line(capsys, words, texts):
    error = refused(capsys, *words)
    assert all(text in error for text in texts)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("3090ti", "rtx3090ti"),
        ("RTX_3090 Ti", "rtx3090ti"),
        ("4060 Ti 16GB", "rtx4060ti-16"),
        ("rtx 5090", "rtx5090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("A6000", "rtxa6000"),
        ("t4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("A100 80GB", "a100-80"),
        ("a100", "a100-40"),
        ("H100 80GB HBM3", "h100"),
        ("L40S 48GB", "l40s"),
        ("b200", "b200"),
        ("mi300x", "mi300x"),
        ("Radeon RX 7900 XTX", "rx7900xtx"),
    ],
)
def test_cards_are_known_in_any_spelling(spelling, name):
    assert Card.of(spelling) == Card(name, CARDS[name] << 20)


@pytest.mark.parametrize("name", list(CARDS))
def test_every_card_answers_to_its_own_name(name):
    assert Card.of(name).name == name


@pytest.mark.parametrize("size", ["12", "24", "80GiB", "100", "141", "1000"])
def test_plain_numbers_are_sizes(size):
    assert Card.of(size).total_bytes == int(size.removesuffix("GiB")) << 30


@pytest.mark.parametrize(
    ("card", "text"),
    [("4091", "4,091 GiB, more than any card has"), ("9999999", "more than any card has"), ("2x4090", "for one card"),
     ("A100 60GB", "has 40 or 80 GiB"), ("2000 GiB", "more than any card has")],
)  # fmt: skip
def test_cards_that_do_not_exist_are_refused(capsys, card, text):
    assert text in refused(capsys, "--model", "llama-3-8b", "--gpu", card)


def test_a_card_without_bfloat16_is_noted_and_never_recommended(capsys):
    assert any("no bfloat16" in note for note in planned(capsys, "--model", "tinyllama", "--gpu", "T4")["notes"])
    assert Card.smallest(CARDS["t4"] << 20).name != "t4"


def test_70b_gets_its_bytes_and_a_next_step(capsys):
    assert main(["plan", "--model", "llama-3.3-70b", "--gpu", "h100"]) == 2
    both = capsys.readouterr()
    assert "131.42 GiB" in both.out and "does not fit" in both.out
    assert both.err.count("\n") == 1
    assert "smallest card that works is b200" in both.err and "LoRA on a 4-bit base" in both.err


def test_no_sequence_is_longer_than_the_models_positions(capsys):
    found = planned(capsys, "--model", "tinyllama", "--gpu", "h100", "--length", "64", "--batch", "1")
    assert found["max_length"] == 2048
    assert "more than the model's 2048 positions" in refused(capsys, "--model", "tinyllama", "--length", "4096")


def saved_config(place, model_type, **fields):
    AutoConfig.for_model(model_type, **fields).save_pretrained(place)
    return str(place)


def test_the_default_length_is_lowered_to_the_models_positions(capsys, tmp_path):
    place = saved_config(tmp_path, **{**MODELS["tinyllama"], "max_position_embeddings": 256})
    assert planned(capsys, "--model", place)["length"] == 256


@pytest.mark.parametrize("kind", ["t5", "qwen2_vl", "vit", "whisper"])
def test_a_model_that_is_no_decoder_is_refused_in_one_line(capsys, tmp_path, kind):
    error = refused(capsys, "--model", saved_config(tmp_path, kind))
    assert f"model type {kind!r} is no causal language model" in error and len(error) < 300


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert", "electra", "deberta-v2", "xlm"])
def test_an_encoder_is_refused_in_one_line(capsys, tmp_path, kind):
    error = refused(capsys, "--model", saved_config(tmp_path, kind))
    assert f"model type {kind!r} is an encoder" in error and "MisaTrainer" in error and len(error) < 300


def test_an_encoder_that_was_made_a_decoder_is_planned(capsys, tmp_path):
    fields = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    place = saved_config(tmp_path, "bert", is_decoder=True, vocab_size=200, **fields)
    assert planned(capsys, "--model", place, "--delta", "0.3", "--length", "32", "--loss", "plain")["fits"]


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_recurrent_model_is_refused_before_it_is_measured(capsys, tmp_path, kind):
    assert "is recurrent" in refused(capsys, "--model", saved_config(tmp_path, kind))


@pytest.mark.parametrize(
    ("quantization", "texts"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bitsandbytes", "4 bits"]),
        ({"quant_method": "gptq", "bits": 4}, ["gptq", "4 bits"]),
        ({"quant_method": "fp8"}, ["fp8"]),
    ],
)
def test_quantized_weights_are_refused(capsys, tmp_path, quantization, texts):
    error = refused(capsys, "--model", saved_config(tmp_path, "llama", quantization_config=quantization))
    assert all(text in error for text in (*texts, "is quantized", "made from"))


def test_sizes_of_cards():
    assert Card.of("24").total_bytes == Card.of("24GiB").total_bytes == Card.of("24 gb").total_bytes == 24 << 30
    assert Card.of("24564MiB").total_bytes == Card.of("RTX4090").total_bytes
    assert Card.smallest(20 << 30).name == "a10" and Card.smallest(1 << 40) is None
    with pytest.raises(UserError):
        Card.of("0")


def test_a_plan_for_several_cards_states_what_they_exchange(capsys):
    words = ["--model", "llama-3-8b", "--gpu", "rtx4090", "--gpus", "4"]

    def told(*more: str) -> dict:
        assert main(["plan", *words, *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    none, every, fourth = told("--rest", "none"), told(), told("--rest_every", "4")
    traffic = none["replicas"]
    assert traffic["step_bytes"] == 2 * none["delta_parameters"]
    assert traffic["round_bytes"] == 50 * traffic["step_bytes"] and traffic["rest_bytes"] == 0
    assert traffic["full_bytes"] == 2 * none["parameters"] and traffic["sent_bytes"] == traffic["step_bytes"] * 3 // 2
    assert traffic["seconds_a_step"]["PCIe 4 x8"] == pytest.approx(traffic["sent_bytes"] / 10e9, rel=0.01)

    rests = every["replicas"]["rest_bytes"]
    assert every["replicas"]["step_bytes"] == fourth["replicas"]["step_bytes"] == traffic["step_bytes"] + rests
    assert every["replicas"]["round_bytes"] == traffic["round_bytes"] + 50 * rests
    assert fourth["replicas"]["round_bytes"] == traffic["round_bytes"] + 50 * rests // 4
    # one gradient more, of an MLP matrix, is averaged while the next is computed
    assert every["bytes"]["rest"] - plan(published_config("llama-3-8b")).bytes["rest"] == 2 * 4096 * 14336

    assert main(["plan", *words, "--rest", "none"]) == 0
    assert "4 cards, a whole model on each: 0.45 GiB" in capsys.readouterr().out
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert "4 cards, a whole model on each: 13.00 GiB" in said and "rest='row_norm'" in said
    assert "(rest='none') 0.45 GiB and 73 ms over PCIe 4 x8" in said and "rest_every=4 instead, on average: " in said


def test_a_plan_for_sharded_weights_divides_them_and_states_what_is_gathered(capsys):
    words = ["--model", "llama-3-70b", "--gpu", "h100", "--gpus", "8", "--sharded"]
    assert main(["plan", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    here, whole = told["sharded"], 2 * told["parameters"]
    assert told["command"].startswith("torchrun --nproc_per_node 8 -m misa_engine train ")
    assert told["command"].endswith(" --fsdp")
    assert not told["fits"] and here["fits"]
    assert here["bytes"]["weights"] == pytest.approx(whole / 8, rel=1e-3)
    assert here["bytes"]["first_moment"] == pytest.approx(told["bytes"]["first_moment"] / 8, rel=1e-2)
    outside = 2 * 2 * 128256 * 8192  # embedding and head are gathered once
    assert here["gathered_bytes"] == pytest.approx(2 * whole - outside, rel=1e-3)
    assert here["reduced_bytes"] == 2 * told["delta_parameters"]
    assert here["sent_bytes"] == pytest.approx((here["gathered_bytes"] + here["reduced_bytes"]) * 7 / 8)
    assert here["seconds_a_micro_batch"]["NVLink"] == pytest.approx(here["sent_bytes"] / 200e9, rel=0.01)
    assert main(["plan", *words]) == 0
    assert "8 cards, rows of the weights on each: fits" in capsys.readouterr().out
    assert main(["plan", *words[:-2], "2", "--sharded"]) != 0
    assert "over 2 of h100 needs" in capsys.readouterr().err
    assert main(["plan", "--model", "llama-3-70b", "--sharded"]) != 0
    assert "--sharded needs --gpus" in capsys.readouterr().err
