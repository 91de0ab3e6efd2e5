"""Cheap checks come before slow ones: trackers, files, an unreachable Hub, marks in templates, larger tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from command import make_workplace, words
from misa_engine.cli import hub
from misa_engine.cli.early_checks import check_trackers
from misa_engine.cli.main import main
from misa_engine.cli.training_data import TEMPLATES
from misa_engine.errors import UserError
from misa_engine.report.log import RunLog

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_workplace(tmp_path_factory.mktemp("early"), tmp_path_factory.mktemp("cache"))
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]
    (place / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    (place / "unmarked.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    return place


@pytest.fixture(scope="module")
def fast(place: Path) -> Path:
    """The model with a tokenizer of bytes that maps characters to tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
    shutil.copytree(place / "model", place / "fast")
    tokenizer.save_pretrained(place / "fast")
    return place / "fast"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "why_unreachable", lambda: "no route")


def test_a_missing_tracker_is_named_with_its_pip_line(monkeypatch):
    from misa_engine.cli import early_checks

    monkeypatch.setattr(early_checks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report_to comet_ml: comet_ml is not installed: pip install comet-ml"):
        check_trackers(["none", "comet_ml"])
    with pytest.raises(UserError, match="Did you mean wandb"):
        check_trackers("wandbb")
    check_trackers(["none"])
    check_trackers(None)


def test_trackers_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from misa_engine.cli.early_checks import TRACKERS

    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model_name_or_path": "some/model"}, "--model some/model: there is no such directory"),
        ({"tokenizer_name_or_path": "some/model"}, "--tokenizer_name_or_path some/model: there is no such"),
        ({"dataset": "nope.jsonl", "model_name_or_path": "some/model"}, "data file nope.jsonl does not exist"),
        ({"report_to": "wandbb", "model_name_or_path": "some/model"}, "Did you mean wandb?"),
    ],
)
def test_what_is_missing_is_said_before_anything_slow(place, tmp_path, capsys, no_hub, options, text):
    assert main(words(place, tmp_path / "out", **options)) == 2
    shown = capsys.readouterr().err
    assert text in shown and len(shown.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_cached_model_is_used_offline_and_a_local_one_needs_no_hub(monkeypatch, no_hub, tmp_path):
    import huggingface_hub

    hub.check_reachable(str(tmp_path), "config.json", "--model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: "/cache/config.json")
    hub.check_reachable("some/model", "config.json", "--model")
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_packaged_templates_mark_what_the_assistant_says(place, fast, tmp_path, capsys, template):
    given: dict[str, object] = {
        "model_name_or_path": fast,
        "dataset": place / "chat.jsonl",
        "chat_template_path": template,
        "assistant_only_loss": "true",
    }
    assert main(words(place, tmp_path / "out", "--dry_run", **given)) == 0
    shown = capsys.readouterr().out
    assert "[hi there<|im_end|>]" in shown and "hello[" not in shown
    assert "4 records in, 4 trained on" in shown


@pytest.mark.parametrize("template", ["{place}/unmarked.jinja", None])
def test_templates_without_marks_are_refused_with_one_that_has_them(place, fast, tmp_path, capsys, template):
    model = tmp_path / "model"
    shutil.copytree(fast, model)
    shutil.copy(place / "unmarked.jinja", model / "chat_template.jinja")
    given = {"dataset": place / "chat.jsonl", "assistant_only_loss": "true", "model_name_or_path": model}
    given["chat_template_path"] = template and template.replace("{place}", str(place))
    assert main(words(place, tmp_path / "out", **given)) == 2
    shown = capsys.readouterr().err
    assert "has no {% generation %} marks" in shown and "--chat_template_path chatml or plain" in shown


def test_a_tokenizer_that_cannot_find_the_assistant_is_named(place, tmp_path, capsys):
    given = {"dataset": place / "chat.jsonl", "chat_template_path": "plain", "assistant_only_loss": "true"}
    assert main(words(place, tmp_path / "out", **given)) == 2
    assert "ByT5Tokenizer is a Python one" in capsys.readouterr().err


def test_templates_are_packaged():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == {"chatml", "plain"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_tokenizer_gets_rows_that_are_always_trained(tmp_path, tmp_path_factory, capsys, tied):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    place = make_workplace(tmp_path, tmp_path_factory.mktemp("cache"), tie_word_embeddings=tied)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.add_tokens(["<mine>"])
    tokenizer.save_pretrained(place / "model")
    assert main(words(place, tmp_path / "out")) == 2
    assert "give the new tokens rows with --resize_embeddings" in capsys.readouterr().err
    assert main(words(place, tmp_path / "out", "--resize_embeddings", max_steps=2)) == 0
    shown = capsys.readouterr().out
    assert "embeddings resized from 384 to 385 rows; always trained" in shown
    before, after = load_file(place / "model/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    names = [name for name in after if "embed" in name or "lm_head" in name]
    assert len(names) == (1 if tied else 2)
    for name in names:
        assert after[name].shape[0] == 385 and not after[name][:384].equal(before[name])
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 385
    changes = next(entry for entry in RunLog.read(tmp_path / "out") if entry["type"] == "end")["relative_change"]
    assert all(changes[name] > 0 for name in names)
