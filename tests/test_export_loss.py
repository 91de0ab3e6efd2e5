"""``misa export --check_loss``: what the lossy form changes in held-out loss, said and written into the delta."""

import json
import re

import pytest
import torch

from misa_engine.cli.main import main
from models import TINY

TEXT = "".join(
    f"Row {number}: seven times {number} is {7 * number}, and nobody was surprised. " for number in range(160)
)


@pytest.fixture
def place(tmp_path):
    """base and trained, which differ in every matrix; trained has a tokenizer of bytes."""
    from transformers import ByT5Tokenizer

    model = TINY["llama"](vocab_size=384, max_position_embeddings=64)
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "trained")
    ByT5Tokenizer().save_pretrained(tmp_path / "trained")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def export(place, *words):
    return main(
        ["export", str(place / "trained"), "--delta", str(place / "base"), "--output", str(place / "d"), *words]
    )


def test_the_loss_of_a_lossy_delta_is_measured_and_written_into_it(place, capsys):
    assert export(place, "--form", "sparse", "--density", "0.5", "--check_loss", str(place / "text.txt")) == 0
    shown = capsys.readouterr().out
    said = re.search(
        r"loss +([\d.]+) of the model, ([\d.]+) restored: ([+-][\d.]+) ± [\d.]+ nats a token on text.txt", shown
    )
    assert said, shown
    total = json.loads((place / "d/misa_delta.json").read_text())["total"]
    assert total["loss_text"] == "text.txt" and total["loss_error"] > 0
    assert float(said[1]) == pytest.approx(total["loss"], abs=1e-4) and total["loss"] != total["loss_restored"]
    assert float(said[3]) == pytest.approx(total["loss_restored"] - total["loss"], abs=1e-4)
    # it is the losses of the model and of what misa apply restores, by transformers itself
    assert main(["apply", str(place / "d"), "--base", str(place / "base"), "--output", str(place / "r")]) == 0
    assert own_loss(place / "trained") == pytest.approx(total["loss"], abs=1e-4)
    assert own_loss(place / "r") == pytest.approx(total["loss_restored"], abs=1e-4)
    assert sorted(one.name for one in place.iterdir()) == ["base", "d", "r", "text.txt", "trained"]  # nothing stays


def own_loss(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from misa_engine.evaluation.forgetting import CHARACTERS

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(place_of(folder))
    rows = [TEXT[start : start + CHARACTERS] for start in range(0, len(TEXT), CHARACTERS)]
    total = tokens = 0
    for row in rows:
        ids = torch.tensor([tokenizer(row)["input_ids"][:64]])
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return total / tokens


def place_of(folder):
    return folder.parent / "trained"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--check_loss"], "the exact form changes no loss"),
        (["--form", "low_rank", "--check_loss", "nothing.txt"], "--check_loss nothing.txt: a .txt file"),
        (["--form", "sparse", "--check_loss", "{place}/base/config.json"], "with a column 'text'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(words, said, place, capsys):
    assert export(place, *(word.format(place=place) for word in words)) == 2
    assert said in capsys.readouterr().err and not (place / "d").exists()
