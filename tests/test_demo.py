import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from misa_engine.cli import demo, demo_data
from misa_engine.errors import UserError
from misa_engine.report.log import RunLog


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return demo_data.build_demo(tmp_path_factory.mktemp("demo"))


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_build_demo_makes_the_same_bytes_every_time(paths, tmp_path):
    again = demo_data.build_demo(tmp_path)
    for first, second in ((paths.train, again.train), (paths.heldout, again.heldout)):
        assert first.read_bytes() == second.read_bytes()
    weights = "model.safetensors"
    assert (paths.model / weights).read_bytes() == (again.model / weights).read_bytes()


def test_build_demo_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    demo_data.build_demo(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_heldout_text_comes_from_other_files_than_training(paths):
    train, heldout = texts(paths.train), texts(paths.heldout)
    assert len(train) == len(set(train)) and len(heldout) == len(set(heldout))
    assert not {text[:200] for text in train} & {text[:200] for text in heldout}
    assert sum(map(len, train)) >= demo_data.STEPS * demo_data.BATCH * demo_data.LENGTH  # no text is seen twice
    assert not any("unittest.main()" in text and "site-packages" in text for text in train)


@pytest.mark.filterwarnings("ignore:This sequence already has")  # TRL adds the end, ByT5 sees it is there
def test_tokenizer_loads_from_the_directory_and_counts_one_token_a_byte(paths):
    tokenizer = AutoTokenizer.from_pretrained(paths.model)
    model = AutoModelForCausalLM.from_pretrained(paths.model)
    assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id is not None
    assert len(tokenizer) <= model.config.vocab_size == model.get_input_embeddings().num_embeddings
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 6e6
    for text in texts(paths.heldout):
        for ids in (tokenizer(text)["input_ids"], tokenizer(text + tokenizer.eos_token)["input_ids"]):
            assert len(ids) == len(text) + 1 and ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids[:-1]) == text
    held = sum(len(text) + 1 for text in texts(paths.heldout))
    assert held % (demo_data.LENGTH * demo_data.SHARED_OPTIONS["per_device_eval_batch_size"]) == 0


def test_arguments_are_ones_that_misa_train_takes(paths, tmp_path):
    from misa_engine.cli.arguments import parse_train

    misa = parse_train(demo_data.demo_arguments(paths, tmp_path / "misa"))
    adamw = parse_train(demo_data.demo_arguments(paths, tmp_path / "adamw", "adamw"))
    assert misa.misa.delta == 0.25 and misa.misa.always_train == ("embed_tokens", "lm_head")
    assert (misa.run.optimizer, adamw.run.optimizer) == ("misa", "adamw")
    assert misa.sft.max_steps == demo_data.STEPS
    for option in ("seed", "max_steps", "per_device_train_batch_size", "max_length", "packing_strategy"):
        assert getattr(misa.sft, option) == getattr(adamw.sft, option), option


def test_python_without_its_sources_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    with pytest.raises(ValueError, match="this Python came without them"):
        demo_data.build_demo(tmp_path / "out")


def test_output_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        demo.run_demo(tmp_path / "file")
    (tmp_path / "misa").mkdir()
    (tmp_path / "misa" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not the demo's"):
        demo.run_demo(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "misa"]


def test_failing_run_is_reported_with_its_last_words(tmp_path):
    from rich.console import Console

    with pytest.raises(RuntimeError, match=r"(?s)exit code 2.*no_such_flag"):
        demo._train(["--no_such_flag"], tmp_path / "misa", "MISA", Console(quiet=True))


def test_short_demo_trains_compares_reloads_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "STEPS", 6)
    for option, value in {"max_steps": 6, "warmup_steps": 0, "eval_steps": 6, "logging_steps": 2}.items():
        monkeypatch.setitem(demo_data.SHARED_OPTIONS, option, value)
    monkeypatch.setattr(demo_data, "HELDOUT_BYTES", 2 * demo_data.HELDOUT_FILE_BYTES)
    out = tmp_path / "out"
    assert demo.run_demo(out) == 0

    logs = {name: RunLog.read(out / name) for name in ("misa", "adamw")}
    heldout = {name: [loss for _, loss in demo._metric(log, "eval_loss")] for name, log in logs.items()}
    assert heldout["misa"][0] == heldout["adamw"][0]  # same model, same text
    assert all(losses[-1] < losses[0] - 0.2 for losses in heldout.values())
    for log in logs.values():
        end = next(entry for entry in log if entry["type"] == "end")
        assert end["peak_memory_bytes"] > end["rss_before_training_bytes"] > 0 and end["step_time_s"]["median"] > 0
    assert [entry["name"] for entry in logs["misa"] if entry["type"] == "baseline"] == ["AdamW"]
    for picture in ("importance_map.png", "loss.png", "visits.png"):
        assert (out / "misa" / picture).is_file()
    printed = capsys.readouterr().out
    for words in ("held-out loss after", "step time", "MISA / AdamW", "saved model, loaded again", "What trained"):
        assert words in printed

    again = demo.heldout_loss(out / "misa", out / "start" / "heldout.jsonl")
    assert again == pytest.approx(heldout["misa"][-1], rel=1e-5)
