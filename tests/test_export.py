"""``misa export`` and ``misa apply``: what travels, what is refused, and that the bits are the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from misa_engine.cli.main import main
from misa_engine.errors import UserError
from misa_engine.export import apply_delta, codec, export_delta
from misa_engine.export.stored import StoredModel
from models import TINY


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(model: torch.nn.Module, share: float = 0.3, seed: int = 1) -> torch.nn.Module:
    """A trained model: some of the numbers of some matrices moved a little."""
    generator = torch.Generator().manual_seed(seed)
    for number, parameter in enumerate(model.parameters()):
        if number % 2 and parameter.dim() > 1:
            step = torch.randn(parameter.shape, generator=generator) * 1e-3
            mask = torch.rand(parameter.shape, generator=generator) < share
            parameter.data += (step * mask).to(parameter.dtype)
    return model


def tiny(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    return TINY["llama"](vocab_size=384, max_position_embeddings=128, **options).to(dtype)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and trained from it, with tokenizer, chat template and generation config."""
    from transformers import ByT5Tokenizer

    place = tmp_path_factory.mktemp("export")
    tiny().save_pretrained(place / "base")
    model = changed(tiny())
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(place / "trained")
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(place / "trained")
    (place / "trained" / "misa_log.jsonl").write_text("{}\n")
    (place / "trained" / "checkpoint-2").mkdir()
    return place


def test_the_exact_form_restores_every_file_byte_for_byte(place: Path, tmp_path: Path, capsys) -> None:
    """Weights, tokenizer, generation config and chat template; run log and checkpoints stay behind."""
    assert (
        main(["export", str(place / "trained"), "--delta", str(place / "base"), "--output", str(tmp_path / "d")]) == 0
    )
    shown = capsys.readouterr().out
    assert "tensors differ from base" in shown and "byte for byte" in shown
    assert main(["apply", str(tmp_path / "d"), "--base", str(place / "base"), "--output", str(tmp_path / "r")]) == 0
    assert "bit for bit" in capsys.readouterr().out
    wanted = {name: data for name, data in contents(place / "trained").items() if name != "misa_log.jsonl"}
    assert contents(tmp_path / "r") == wanted
    assert {"tokenizer_config.json", "generation_config.json", "chat_template.jinja", "config.json"} <= set(wanted)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r")
    assert model.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "r").chat_template.startswith("{% for m")


def test_only_what_differs_is_stored_and_a_delta_is_no_model(place: Path, tmp_path: Path) -> None:
    document = export_delta(place / "trained", place / "base", tmp_path / "d")
    base, trained = (load_file(place / name / "model.safetensors") for name in ("base", "trained"))
    differ = {name for name in trained if not torch.equal(base[name], trained[name])}
    assert {name for name, entry in document.tensors.items() if entry.form != "same"} == differ
    assert 0 < len(differ) < len(trained) and document.total["changed"] == len(differ)
    stored = set().union(*(load_file(file) for file in (tmp_path / "d").glob("*.safetensors")))
    assert stored == differ
    assert document.total["stored_bytes"] < 0.7 * sum(trained[name].nbytes for name in differ)
    assert not (tmp_path / "d" / "config.json").exists() and not (tmp_path / "d" / "model.safetensors").exists()
    content = json.loads((tmp_path / "d" / "misa_delta.json").read_text())
    assert set(content["base"]["tensors"]) == set(base)
    assert all(len(entry["sha256"]) == 64 for entry in content["tensors"].values())


def test_a_base_cut_into_other_files_is_the_same_base(place: Path, tmp_path: Path) -> None:
    changed(tiny()).save_pretrained(tmp_path / "sharded", max_shard_size=20_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    tiny().save_pretrained(tmp_path / "base", max_shard_size=30_000)
    export_delta(tmp_path / "sharded", place / "base", tmp_path / "d")
    apply_delta(tmp_path / "d", tmp_path / "base", tmp_path / "r")
    assert contents(tmp_path / "r") == contents(tmp_path / "sharded")


def resized(place: Path) -> Any:
    model = changed(tiny())
    model.resize_token_embeddings(400)
    return model


VARIANTS: dict[str, tuple[Callable[[], Any], Callable[[Path], Any]]] = {
    "tied embeddings": (
        lambda: tiny(tie_word_embeddings=True),
        lambda place: changed(tiny(tie_word_embeddings=True)),
    ),
    "a head of its own over a tied base": (lambda: tiny(tie_word_embeddings=True), lambda place: changed(tiny())),
    "more rows in the embedding": (tiny, resized),
    "a base in float32": (lambda: tiny(torch.float32), lambda place: changed(tiny())),
    "a result in float32": (tiny, lambda place: changed(tiny(torch.float32))),
    "nothing changed": (tiny, lambda place: tiny()),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("form", ["exact", "sparse", "low_rank"])
def test_models_that_differ_in_more_than_numbers_are_restored(name: str, form: str, tmp_path: Path) -> None:
    base, trained = VARIANTS[name]
    base().save_pretrained(tmp_path / "base")
    trained(tmp_path).save_pretrained(tmp_path / "trained")
    document = export_delta(tmp_path / "trained", tmp_path / "base", tmp_path / "d", form=form)
    apply_delta(tmp_path / "d", tmp_path / "base", tmp_path / "r")
    if form == "exact":
        assert contents(tmp_path / "r") == contents(tmp_path / "trained")
    wanted, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("trained", "r"))
    assert {key: value.dtype for key, value in wanted.items()} == {key: value.dtype for key, value in found.items()}
    for key, entry in document.tensors.items():
        if entry.error is None:
            assert torch.equal(wanted[key], found[key]), key
        else:
            size = float(wanted[key].double().norm())
            off = float((wanted[key].double() - found[key].double()).norm())
            assert off / size == pytest.approx(entry.error_of_weights, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("form", ["sparse", "low_rank"])
def test_a_lossy_form_states_its_error_and_more_of_it_has_less(form: str, tmp_path: Path, capsys) -> None:
    option = {"sparse": "density", "low_rank": "rank"}[form]
    tiny(torch.float32).save_pretrained(tmp_path / "base")  # whose exact differences are large
    changed(tiny(torch.float32), share=1.0).save_pretrained(tmp_path / "trained")
    base, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "trained"))
    moved = sum(float((trained[name].double() - base[name].double()).square().sum()) for name in trained)
    errors = []
    for value in {"sparse": (0.02, 0.1, 1.0), "low_rank": (2, 6, 12)}[form]:
        delta, restored = tmp_path / f"d{value}", tmp_path / f"r{value}"
        words = [str(tmp_path / "trained"), "--delta", str(tmp_path / "base"), "--output", str(delta)]
        assert main(["export", *words, "--form", form, f"--{option}", str(value)]) == 0
        document = json.loads((delta / "misa_delta.json").read_text())
        apply_delta(delta, tmp_path / "base", restored)
        found = load_file(restored / "model.safetensors")
        off = sum(float((trained[name].double() - found[name].double()).square().sum()) for name in trained)
        assert (off / moved) ** 0.5 == pytest.approx(document["total"]["error"], rel=1e-6, abs=1e-12)
        errors.append(document["total"]["error"])
        assert f"{errors[-1]:.1%} of the change is missing" in capsys.readouterr().out
    assert 1 > errors[0] > errors[1] > errors[2]
    if form == "sparse":
        assert errors[2] == 0, "everything kept is exact"


def test_a_lossy_form_is_never_larger_than_the_exact_one_nor_farther_off_than_the_base(tmp_path: Path) -> None:
    """Few changed numbers are smaller as they are; what rounding eats of a product is left out."""
    generator = torch.Generator().manual_seed(0)
    base = (1 + torch.rand(256, 256, generator=generator) / 2).bfloat16()
    few, spread = base.clone(), base.clone()
    few[3, 5] += 1
    spread[torch.rand(256, 256, generator=generator) < 0.05] += 2**-7  # one unit of rounding
    for name, tensors in (
        ("base", {"few": base, "spread": base.clone()}),
        ("trained", {"few": few, "spread": spread}),
    ):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    document = export_delta(tmp_path / "trained", tmp_path / "base", tmp_path / "d", form="low_rank", rank=1)
    apply_delta(tmp_path / "d", tmp_path / "base", tmp_path / "r")
    found = load_file(tmp_path / "r" / "model.safetensors")
    assert document.tensors["few"].error is None and torch.equal(found["few"], few)
    assert document.tensors["spread"].error == 1.0 and torch.equal(found["spread"], base)
    assert document.total["changed"] == 2


def test_a_change_of_low_rank_is_found(tmp_path: Path) -> None:
    """By the full decomposition of small matrices and by the randomised one of large ones."""
    for rows, columns in ((48, 64), (600, 700)):
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(rows, columns, generator=generator)
        change = torch.randn(rows, 5, generator=generator) @ torch.randn(5, columns, generator=generator) * 1e-2
        flat, result = (codec.as_bytes(tensor) for tensor in (base, base + change))
        found = codec.encode_low_rank(flat, result, "F32", (rows, columns), 5)
        assert found is not None
        off = codec.as_tensor(found[1], "F32").view(rows, columns) - (base + change)
        assert float(off.norm() / change.norm()) < 1e-3
        wide = codec.encode_low_rank(flat, result, "F32", (rows, columns), 40)
        assert (wide is None) == (rows == 48), "two matrices as large as the tensor are no saving"


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_difference_of_any_bits_is_undone(width: int) -> None:
    generator = np.random.default_rng(0)
    base = generator.integers(0, 256, 64 * width, dtype=np.uint8)
    result = base.copy()
    result[::7] = generator.integers(0, 256, result[::7].size, dtype=np.uint8)
    result[:width], base[:width] = 255, 0  # the largest step
    packed = codec.encode_difference(np.tile(base, 50), np.tile(result, 50), width)
    assert packed is not None
    assert np.array_equal(codec.decode_difference(np.tile(base, 50), *packed, width), np.tile(result, 50))
    noise = generator.integers(0, 256, 4096, dtype=np.uint8)
    assert codec.encode_difference(np.zeros(4096, np.uint8), noise, width) is None, "noise is stored as it is"


def test_chunks_are_put_together_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "CHUNK", 100)
    base = np.arange(2050, dtype=np.uint16)
    result = base + np.arange(2050, dtype=np.uint16) % 3
    packed = codec.encode_difference(base.view(np.uint8), result.view(np.uint8), 2)
    assert packed is not None and len(packed[1]) == 21
    assert np.array_equal(codec.decode_difference(base.view(np.uint8), *packed, 2).view(np.uint16), result)


# ---- refusals ----


def words(place: Path, out: Path, **options: Any) -> list[str]:
    values = {"delta": place / "base", "output": out, **options}
    pairs = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
    return ["export", str(place / "trained"), *pairs]


BAD = {
    "no base": ("needs --delta BASE", {"delta": None}),
    "no output": ("needs --delta BASE and --output DIR", {"output": None}),
    "base missing": ("model directory ./nothing does not exist", {"delta": "./nothing"}),
    "unknown form": ("Did you mean sparse?", {"form": "spars"}),
    "rank of another form": ("--rank belongs to --form low_rank", {"rank": 4}),
    "density of another form": ("--density belongs to --form sparse", {"form": "low_rank", "density": 0.1}),
    "all and more": ("--density is the share", {"form": "sparse", "density": 2}),
    "itself": ("is named as the model and as its base", {"delta": "{place}/trained"}),
    "output in use": ("is not empty, and nothing is overwritten", {"output": "{place}/base"}),
    "output is a file": ("is a file", {"output": "{place}/trained/config.json"}),
    "output below a link to nothing": ("is a link to /no/such/place, which is gone", {"output": "{place}/gone/d"}),
    "another architecture": ("no tensor in common", {"delta": "{place}/gpt2"}),
    "pickled weights": ("only safetensors can be read tensor by tensor", {"delta": "{place}/bin"}),
}


@pytest.fixture(scope="module")
def others(place: Path) -> Path:
    TINY["gpt2"]().save_pretrained(place / "gpt2")
    (place / "gone").symlink_to("/no/such/place")
    (place / "bin").mkdir()
    (place / "bin" / "pytorch_model.bin").write_bytes(b"x")
    return place


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_export_is_one_line_and_nothing_is_written(
    name: str, others: Path, tmp_path: Path, capsys
) -> None:
    expected, options = BAD[name]
    filled = {key: value.format(place=others) if isinstance(value, str) else value for key, value in options.items()}
    before = contents(others)
    assert main(words(others, tmp_path / "d", **filled)) == 2
    shown = capsys.readouterr().err
    assert expected in shown and len(shown.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [] and contents(others) == before


def test_another_base_is_refused_by_its_first_differing_tensor(place: Path, tmp_path: Path, capsys) -> None:
    export_delta(place / "trained", place / "base", tmp_path / "d")
    shutil.copytree(place / "base", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    touched = "model.layers.1.mlp.up_proj.weight"
    tensors[touched][0, 0] += 1
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    asked = ["apply", str(tmp_path / "d"), "--output", str(tmp_path / "r"), "--base"]
    assert main([*asked, str(tmp_path / "other")]) == 2
    assert f"is not the model that this delta was made against (base): {touched}" in capsys.readouterr().err

    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    assert main([*asked, str(tmp_path / "other")]) == 2
    assert "it has no model.norm.weight" in capsys.readouterr().err
    tiny(torch.float32).save_pretrained(tmp_path / "wide")
    assert main([*asked, str(tmp_path / "wide")]) == 2
    assert "is F32 [384, 32] there and was BF16 [384, 32]" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "other", "wide"], "nothing of the model is left"


def test_a_damaged_or_unfinished_delta_is_refused(place: Path, tmp_path: Path) -> None:
    export_delta(place / "trained", place / "base", tmp_path / "d")

    def refused(change: Callable[[Path], object]) -> str:
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(tmp_path / "d", tmp_path / "broken")
        change(tmp_path / "broken")
        with pytest.raises(UserError) as caught:
            apply_delta(tmp_path / "broken", place / "base", tmp_path / "r")
        assert not (tmp_path / "r").exists()
        return str(caught.value)

    def flip(folder: Path) -> None:
        file = folder / "delta-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    def outside(folder: Path) -> None:
        text = (folder / "misa_delta.json").read_text()
        (folder / "misa_delta.json").write_text(text.replace('"config.json"', '"../config.json"'))

    assert "delta-00001.safetensors is damaged" in refused(flip)
    assert "misa_manifest.json is missing" in refused(lambda folder: (folder / "misa_manifest.json").unlink())
    assert "is no delta" in refused(lambda folder: (folder / "misa_delta.json").unlink())
    assert "misa_delta.json is damaged" in refused(lambda folder: (folder / "misa_delta.json").write_text("{"))
    assert "leaves the directory" in refused(outside)
    assert "is missing" in refused(lambda folder: (folder / "files" / "config.json").unlink())


def test_nothing_is_overwritten_and_too_little_room_is_said_first(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_delta(place / "trained", place / "base", tmp_path / "d")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine").write_text("mine")
    with pytest.raises(UserError, match="not empty, and nothing is overwritten"):
        apply_delta(tmp_path / "d", place / "base", tmp_path / "r")
    assert contents(tmp_path / "r") == {"mine": b"mine"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="GiB are free there"):
        apply_delta(tmp_path / "d", place / "base", tmp_path / "new")


KILLED = """
import os, signal, sys
from pathlib import Path
from misa_engine.export import {module}
from misa_engine.export.{module} import {function}
whole = {module}.{inner}
def inner(self, tensor):
    if tensor.name == "model.norm.weight":
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, tensor)
{module}.{inner} = inner
{function}(*map(Path, sys.argv[1:]))
"""


def test_a_kill_leaves_nothing_that_looks_complete_and_the_next_call_tidies_up(place: Path, tmp_path: Path) -> None:
    export_delta(place / "trained", place / "base", tmp_path / "d")
    work = tmp_path / "work"
    for module, function, inner, first in (
        ("writing", "export_delta", "_Writer.add", place / "trained"),
        ("applying", "apply_delta", "_Reader.restore", tmp_path / "d"),
    ):
        code = KILLED.format(module=module, function=function, inner=inner)
        arguments = [first, place / "base", work / function]
        done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == -9, done.stderr
        (left,) = work.glob(".*")
        assert not (work / function).exists() and not (left / "config.json").exists()
        (export_delta if function == "export_delta" else apply_delta)(*arguments)
        assert [path.name for path in work.iterdir()] == [function]
        shutil.rmtree(work)


def test_no_more_than_a_tensor_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are read one by one, and what is written is not kept."""
    import tracemalloc

    from misa_engine.export import writing

    monkeypatch.setattr(writing, "SHARD_BYTES", 1 << 20)
    size = 1 << 20
    tensors = {f"layer.{number:02}": torch.full((size // 4,), number + 0.5) for number in range(24)}
    (tmp_path / "base").mkdir()
    (tmp_path / "trained").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    save_file({name: value * 1.01 for name, value in tensors.items()}, tmp_path / "trained" / "model.safetensors")
    tracemalloc.start()
    export_delta(tmp_path / "trained", tmp_path / "base", tmp_path / "d")
    apply_delta(tmp_path / "d", tmp_path / "base", tmp_path / "r")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * size, f"{peak / size:.1f} tensors, of a model of {len(tensors)}"
    assert contents(tmp_path / "r") == contents(tmp_path / "trained")


def test_dtypes_that_torch_cannot_subtract_are_exact(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(64, 64, generator=generator)
    base = {"a": wide.to(torch.float8_e4m3fn), "b": torch.arange(64), "c": wide > 0, "d": torch.tensor(3.0)}
    trained = {
        "a": (wide * 1.1).to(torch.float8_e4m3fn),
        "b": torch.arange(64) + 1,
        "c": wide > 1,
        "d": torch.tensor(4.0),
    }
    for name, tensors in (("base", base), ("trained", trained)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    export_delta(tmp_path / "trained", tmp_path / "base", tmp_path / "d")
    apply_delta(tmp_path / "d", tmp_path / "base", tmp_path / "r")
    assert contents(tmp_path / "r") == contents(tmp_path / "trained")


def test_files_that_are_no_model_are_named(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_file({"a": torch.zeros(4)}, tmp_path / "m" / "one.safetensors")
    save_file({"b": torch.zeros(4)}, tmp_path / "m" / "two.safetensors")
    with pytest.raises(UserError, match=r"one.safetensors, two.safetensors and no model.safetensors.index.json"):
        StoredModel(tmp_path / "m")
    data = (tmp_path / "m" / "one.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(data[:-4])
    with pytest.raises(UserError, match="cut short or damaged"):
        StoredModel(tmp_path / "m")
