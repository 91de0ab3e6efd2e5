"""The model card that training leaves, and the layout of the directory that it leaves it in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from cli_place import weights
from misa_engine.cli.main import main
from misa_engine.cli.model_card import MARK, add_results, is_ours, licence_of, write_card
from misa_engine.cli.output_directory import run_files
from misa_engine.report.log import RunLog

pytest_plugins = ["cli_place"]


def front(card: Path) -> dict[str, Any]:
    return yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])


@pytest.fixture
def run(tmp_path: Path) -> tuple[Any, Path]:
    """Arguments and directory of a run of ten steps, as if it had just ended."""
    out = tmp_path / "my-model"
    log = RunLog(out)
    config = {"delta": 0.03, "inner_steps": 50, "preset": "engine", "eta": 1.0, "rest": "row_norm"}
    common = {"total_parameters": 40096, "budget_parameters": 1202, "device": "cpu", "versions": {"torch": "2.13.0"}}
    log.append("run", 0, optimizer="misa", config=config, **common)
    log.append("metrics", 0, eval_loss=3.0)
    log.append("metrics", 10, loss=2.1, eval_loss=2.0)
    log.append("end", 10, visits={"a": 3, "b": 0}, peak_memory_bytes=2**30, step_time_s={"median": 0.25})
    (tmp_path / "data.jsonl").write_text("{}\n")
    arguments = SimpleNamespace(
        model=SimpleNamespace(model_name_or_path="org/base", from_scratch=False),
        data=SimpleNamespace(dataset=[str(tmp_path / "data.jsonl"), "org/data"], eval_dataset=[], eval_fraction=0.1),
        run=SimpleNamespace(optimizer="misa", objective="sft"),
        misa=SimpleNamespace(delta=0.03),
        sft=SimpleNamespace(learning_rate=1e-5),
        given=frozenset(("dataset", "delta", "learning_rate")),
    )
    return arguments, out


def test_the_card_says_data_method_options_and_results(run: tuple[Any, Path]) -> None:
    arguments, out = run
    card = write_card(arguments, out, records=90)
    assert card == out / "README.md"
    text = card.read_text(encoding="utf-8")
    assert "at most 1,202 of its 40,096 parameters (δ = 0.03) train with Adam at a time" in text
    assert re.search(r"data.jsonl` \| training \| not stated \| `[0-9a-f]{16}` \|", text)
    assert "90 records to train on, 0.1 of each data set held out." in text
    assert (
        "3.0000 at step 0" in text
        and "2.0000 (perplexity 7.39)" in text
        and "0 to 3 rounds each, 1 of them none" in text
    )
    options = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert options == {"dataset": arguments.data.dataset, "delta": 0.03, "learning_rate": 1e-5}
    metadata = front(card)
    assert metadata["base_model"] == "org/base" and metadata["datasets"] == ["org/data"]
    assert metadata["library_name"] == "transformers" and "license" not in metadata
    (index,) = metadata["model-index"]
    assert index["name"] == "my-model"
    assert index["results"][0]["metrics"] == [{"type": "loss", "value": 2.0}]

    from huggingface_hub import ModelCard

    assert ModelCard.load(card).data.eval_results[0].metric_value == 2.0, "the Hub's own reader takes it"


def test_results_of_an_evaluation_are_added_and_replaced(run: tuple[Any, Path]) -> None:
    arguments, out = run
    card = write_card(arguments, out, records=None)
    assert card is not None
    assert add_results(out, [{"task": "gsm8k", "metric": "exact_match", "value": 0.25, "stderr": 0.01}])
    assert add_results(
        out, [{"task": "gsm8k", "metric": "exact_match", "value": 0.5}, {"task": "x", "metric": "a", "value": 1}]
    )
    assert add_results(out, [{"task": "forgetting", "metric": "loss", "value": 3}])
    text = card.read_text(encoding="utf-8")
    assert "| gsm8k | exact_match | 0.5000 |" in text and "0.2500" not in text and "| x | a | 1.0000 |" in text
    assert "| forgetting | loss | 3.0000 |" in text and "| held-out" not in text
    assert "read as a stream" in text and text.count("<!-- results: begin -->") == 1
    found = {
        (result["dataset"]["name"], metric["type"]): metric["value"]
        for result in front(card)["model-index"][0]["results"]
        for metric in result["metrics"]
    }
    assert found == {
        ("held-out records of data.jsonl", "loss"): 2.0, ("gsm8k", "exact_match"): 0.5, ("x", "a"): 1.0,
        ("forgetting", "loss"): 3.0,
    }  # fmt: skip


def test_a_card_of_the_users_is_never_touched(run: tuple[Any, Path]) -> None:
    arguments, out = run
    (out / "README.md").write_text("mine")
    assert write_card(arguments, out) is None
    assert not add_results(out, [{"task": "a", "metric": "b", "value": 1.0}])
    assert (out / "README.md").read_text() == "mine"
    (out / "README.md").unlink()
    assert write_card(arguments, out) is not None and is_ours(out / "README.md")
    kept = (out / "README.md").read_text().replace(MARK, "")
    (out / "README.md").write_text(kept)
    assert write_card(arguments, out) is None and (out / "README.md").read_text() == kept


def test_licences_are_read_where_they_are_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("card", "info", "file", "none", "odd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_text("{}\n")
    (tmp_path / "card" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Data\n")
    (tmp_path / "info" / "dataset_info.json").write_text(json.dumps({"license": "mit"}))
    (tmp_path / "file" / "LICENSE.txt").write_text("...")
    (tmp_path / "odd" / "README.md").write_text("---\n[: broken\n---\n")
    found = {name: licence_of(str(tmp_path / name / "data.jsonl")) for name in ("card", "info", "file", "none", "odd")}
    assert found == {"card": "cc-by-4.0", "info": "mit", "file": "see LICENSE.txt beside it", "none": None, "odd": None}
    assert licence_of(str(tmp_path / "card")) == "cc-by-4.0" and licence_of("nobody/nothing") is None
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: str(tmp_path / "card" / "README.md"))
    assert licence_of("org/data") == "cc-by-4.0"


def test_a_run_leaves_a_directory_that_transformers_loads_and_that_has_vllms_layout(
    flags: Callable[..., list[str]], workplace: Path, tmp_path: Path
) -> None:
    """vLLM itself cannot run here. It reads config.json with architectures, safetensors under the names of the
    published checkpoint, tokenizer files, the chat template and generation_config.json, which are all held to be there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    base = tmp_path / "base"
    base.mkdir()
    for file in (workplace / "model").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    GenerationConfig(max_new_tokens=5, do_sample=False).save_pretrained(base)
    template = workplace / "template.jinja"
    options = {"model_name_or_path": base, "dataset": workplace / "chat.jsonl", "max_steps": 1, "save_strategy": "no"}
    assert main(flags(chat_template_path=template, dtype="bfloat16", **options)) == 0
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16" and config["use_cache"] is True
    assert set(weights(out)) == set(weights(base)) and all(name.count("_orig_mod") == 0 for name in weights(out))
    assert not [path.name for path in out.glob("*.bin") if path.name != "training_args.bin"]
    assert (out / "tokenizer_config.json").is_file() and (
        out / "chat_template.jinja"
    ).read_text() == template.read_text()
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 5

    metadata = front(out / "README.md")
    assert metadata["license"] == "apache-2.0" and "base_model" not in metadata, "a directory is no model of the Hub"
    assert "Trained from `base` with [MISA]" in (out / "README.md").read_text(encoding="utf-8")
    AutoConfig.from_pretrained(out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "user: hello\n"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert model.generate(ids).shape[1] == ids.shape[1] + 5
    assert out / "README.md" in run_files(out), "it goes with the run that it describes"
