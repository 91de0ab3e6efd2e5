"""``misa_engine.load_model(path, residents=...)``: what it reads, what it refuses, and how much memory that takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import host_growth
import misa_engine
from misa_engine import MISA, plan
from misa_engine.engine.residents import residents_of
from misa_engine.errors import UserError
from misa_engine.kernels.resident8 import FORMATS
from misa_engine.planner import host_memory
from misa_engine.planner.cards import published_config
from misa_engine.planner.worst_case import MetaModel
from misa_engine.trainer import loading
from misa_engine.trainer.loading import host_bytes
from models import TINY
from training import batches, loss_of, train

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny Llama in bfloat16, in one file."""
    place = tmp_path_factory.mktemp("saved")
    TINY["llama"]().bfloat16().save_pretrained(place)
    return place


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- what is loaded ----


@pytest.mark.parametrize("kind", [*FORMATS])
@pytest.mark.parametrize("masters", ["pinned", "mapped"])
def test_the_weights_are_those_of_the_files_and_the_matrices_rest(saved, kind, masters):
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    model = misa_engine.load_model(saved, residents=kind, masters=masters)
    assert same(state(model), state(plain)) and model.training
    residents = residents_of(model)
    assert residents.format.name == kind and residents.resting == residents.names and len(residents.names) == 7 * 2
    assert all(tensor.device.type != "meta" for tensor in (*model.parameters(), *model.buffers()))
    for name, buffer in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
    assert model.config._name_or_path == str(saved) and model.generation_config is not None


def test_none_loads_as_transformers_does(saved):
    model = misa_engine.load_model(saved, residents=None)
    assert residents_of(model) is None and model.dtype == torch.bfloat16


def test_files_in_shards_and_in_float32_and_tied_embeddings(tmp_path):
    model = TINY["llama"](tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and len(list(tmp_path.glob("*.safetensors"))) > 2
    found = misa_engine.load_model(tmp_path, residents="int8")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    wanted = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert same(state(found), wanted)


def test_pytorch_files_are_loaded_to_the_host_first(tmp_path, saved):
    shutil.copy(saved / "config.json", tmp_path)
    torch.save(load_file(saved / "model.safetensors"), tmp_path / "pytorch_model.bin")
    model = misa_engine.load_model(tmp_path, residents="int8")
    assert residents_of(model) is not None
    assert same(state(model), state(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)))


def test_it_trains_and_the_files_stay_as_they_are(tmp_path, saved):
    """Mapped masters are written to privately."""
    shutil.copytree(saved, tmp_path / "model")
    before = (tmp_path / "model/model.safetensors").read_bytes()
    model = misa_engine.load_model(tmp_path / "model", residents="int8", masters="mapped").train()
    start = state(model)
    optimizer = MISA(model, lr=1e-2, delta=0.3, inner_steps=2, cold_start="none")
    losses = train(model, optimizer, batches(), 8)
    assert losses[-1] < losses[0] and (tmp_path / "model/model.safetensors").read_bytes() == before
    drawn = {
        name
        for unit in optimizer.units
        for name in unit.params
        if optimizer.tracker.visits[optimizer.units.index(unit)]
    }
    end = state(model)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed and changed <= drawn
    model.save_pretrained(tmp_path / "out")
    assert same(load_file(tmp_path / "out/model.safetensors"), end)


# ---- official FP8 checkpoints ----


def in_fp8(place: Path, out: Path) -> dict[str, torch.Tensor]:
    """The model of ``place`` in transformers' fine-grained FP8 layout; returns its expanded weights."""
    tensors, stored, weights = load_file(place / "model.safetensors"), {}, {}
    for name, tensor in tensors.items():
        if "_proj" not in name:
            stored[name] = weights[name] = tensor
            continue
        rows, cols = (-(-size // 128) for size in tensor.shape)
        steps = torch.full((rows, cols), 0.0123)
        codes = (tensor.float() / 0.0123).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = codes, steps
        weights[name] = (codes.float() * 0.0123).bfloat16()
    out.mkdir()
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (out / "config.json").write_text(json.dumps(config))
    return weights


def test_an_official_fp8_checkpoint_rests_with_its_own_codes(tmp_path, saved):
    weights = in_fp8(saved, tmp_path / "fp8")
    stored = load_file(tmp_path / "fp8/model.safetensors")
    model = misa_engine.load_model(tmp_path / "fp8", residents="fp8")
    assert same(state(model), weights)
    residents = residents_of(model)
    for name in residents.names:
        packed = residents.matrix(name).packed
        assert torch.equal(packed.codes.view(torch.uint8), stored[name].view(torch.uint8))
        assert torch.equal(packed.steps, stored[f"{name}_scale_inv"])
    assert getattr(model.config, "quantization_config", None) is None
    ids = next(batches())
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    plain.load_state_dict(weights)
    torch.testing.assert_close(loss_of(model, ids), loss_of(plain, ids), rtol=1e-2, atol=1e-2)


def test_an_fp8_checkpoint_needs_the_format_fp8(tmp_path, saved):
    in_fp8(saved, tmp_path / "fp8")
    with pytest.raises(UserError, match="Use residents fp8"):
        misa_engine.load_model(tmp_path / "fp8", residents="int8")
    config = json.loads((tmp_path / "fp8/config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (tmp_path / "fp8/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="blocks of 128 x 128"):
        misa_engine.load_model(tmp_path / "fp8", residents="fp8")


# ---- what is refused ----


def test_too_little_host_memory_is_said_before_anything_is_loaded(monkeypatch, saved):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 3 << 29)
    monkeypatch.setattr(host_memory, "MARGIN_BYTES", 3 << 29)
    monkeypatch.setattr(loading, "weight_files", lambda folder: pytest.fail("files were read"))
    with pytest.raises(UserError, match=r"keeps its exact weights in host memory: 0.00 GiB.*1.50 GiB are available"):
        misa_engine.load_model(saved, residents="int8")


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_load_takes_of_the_host_is_counted_to_the_byte(monkeypatch, tmp_path, tied):
    """With everything that lies on the CPU, which is the card here: one byte less than that is refused."""
    TINY["llama"](tie_word_embeddings=tied).bfloat16().save_pretrained(tmp_path)
    model = misa_engine.load_model(tmp_path, residents="int8", masters="pinned")
    residents, sizes = residents_of(model), residents_of(model).bytes()
    others = sum(p.nbytes for name, p in model.named_parameters() if name not in residents.on_host)
    total = sum(sizes.values()) + others
    assert ("host_embedding" in sizes) == (not tied) and others > 0
    monkeypatch.setattr(host_memory, "MARGIN_BYTES", 0)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: total - 1)
    with pytest.raises(UserError, match="masters 0.00 GiB, .*other weights 0.00 GiB, 8 bits 0.00 GiB, workspace"):
        misa_engine.load_model(tmp_path, residents="int8", masters="pinned")
    monkeypatch.setattr(host_memory, "available_bytes", lambda: total)
    assert same(state(misa_engine.load_model(tmp_path, residents="int8", masters="pinned")), state(model))
    # the embedding in pages of its file needs no memory of its own
    monkeypatch.setattr(host_memory, "available_bytes", lambda: total - sizes.get("host_embedding", 0))
    misa_engine.load_model(tmp_path, residents="int8", masters="mapped")
    if not tied:
        with pytest.raises(UserError, match="embedding"):  # not in another dtype than the file's
            misa_engine.load_model(tmp_path, residents="int8", masters="mapped", dtype=torch.float32)


def test_the_embedding_of_8b_counts_beside_its_masters_and_all_of_it_where_it_is_loaded_whole():
    """What the plan says of the host; a gigabyte each for embedding and head."""
    config, card = published_config("llama-3-8b"), torch.device("cuda")
    model = MetaModel(config).model
    planned = plan(config, residents="int8").residents.host_bytes
    assert host_bytes(model, "int8", card) == planned == {"masters": 13_958_643_712, "embedding": 1_050_673_152}
    assert host_bytes(model, "int8", card, mapped=True) == {"masters": planned["masters"]}
    whole = host_bytes(model, "int8", card, whole=True)
    assert sum(whole.values()) == sum(parameter.nbytes for parameter in model.parameters())
    assert whole["other_weights"] == 1_050_673_152 + 65 * 2 * 4096  # head and norms


def test_files_that_transformers_loads_need_room_for_all_of_the_model(monkeypatch, tmp_path, saved):
    shutil.copy(saved / "config.json", tmp_path)
    torch.save(load_file(saved / "model.safetensors"), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(loading, "host_bytes", lambda *args, whole=False, **how: {"masters": 2 if whole else 1})
    monkeypatch.setattr(host_memory, "MARGIN_BYTES", 0)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1)
    with pytest.raises(UserError, match="keeps its exact weights in host memory"):
        misa_engine.load_model(tmp_path, residents="int8")


def test_a_container_s_limit_counts(monkeypatch, tmp_path):
    files = tuple(str(tmp_path / name) for name in ("max", "current", "stat"))
    for file, text in zip(files, ("3000000", "2500000", "inactive_file 400000\nanon 5\n"), strict=True):
        Path(file).write_text(text)
    monkeypatch.setattr(host_memory, "_GROUPS", (files, ("/nowhere", "/nowhere", "/nowhere")))
    assert host_memory.available_bytes() == 900_000


def test_unknown_formats_and_places_are_refused(saved):
    with pytest.raises(UserError, match="unknown residents 'int4'"):
        misa_engine.load_model(saved, residents="int4")
    with pytest.raises(ValueError, match="unknown masters 'disk'"):
        misa_engine.load_model(saved, residents="int8", masters="disk")


def test_a_family_whose_matrices_cannot_rest_is_refused_with_the_reasons(tmp_path):
    TINY["gpt2"]().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is in Conv1D, not nn.Linear"):
        misa_engine.load_model(tmp_path, residents="int8")


@pytest.mark.parametrize("damage", ["cut", "missing", "nan", "nan outside"])
def test_damaged_files_are_refused_by_name(tmp_path, saved, damage):
    shutil.copytree(saved, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        tensors = load_file(file)
        name = "model.norm.weight" if damage == "nan outside" else "model.layers.1.mlp.up_proj.weight"
        tensors[name][..., 3] = torch.nan
        if damage == "missing":
            del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
    said = {"cut": "model.safetensors", "missing": "up_proj", "nan": "up_proj", "nan outside": "model.norm"}[damage]
    with pytest.raises(UserError, match=said):
        misa_engine.load_model(tmp_path / "model", residents="int8")


# ---- memory ----

LOAD = """
import json, sys
from pathlib import Path
import misa_engine
from host_growth import growth_of

place, masters = Path(sys.argv[1]), sys.argv[2]
misa_engine.load_model(place / "small", residents="int8", masters=masters).save_pretrained(place / "first")
model, load = growth_of(lambda: misa_engine.load_model(place / "large", residents="int8", masters=masters), "VmRSS")
_, save = growth_of(lambda: model.save_pretrained(place / "saved", max_shard_size=20_000_000), "VmRSS")
residents = misa_engine.engine.residents.residents_of(model)
sizes = residents.bytes()
found = {"load": load, "save": save, "masters": sizes["host_masters"]}
found["card"] = sum(size for name, size in sizes.items() if name.startswith("resident"))
found["others"] = sum(p.nbytes for name, p in model.named_parameters() if name not in residents)
print(json.dumps(found))
"""
#: Python, threads, the allocator, and the reference's float32 copies of 2^20 elements: 17 MB were seen.
SLACK = 24_000_000


@pytest.mark.parametrize("masters", ["pinned", "mapped"])
def test_loading_takes_the_masters_and_one_file_at_most(tmp_path, masters):
    """In a process of its own: 90 MB of weights in files of 20 MB. The "card" of a CPU run is host memory, too."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    from transformers import LlamaConfig

    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8}
    large = LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=13, vocab_size=1024, **sizes)
    small = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=384, **sizes)
    for name, config in (("large", large), ("small", small)):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
            tmp_path / name, max_shard_size=20_000_000
        )
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), masters],
        capture_output=True,
        text=True,
        # what is freed goes back at once, whatever the heap looks like
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **host_growth.importable(),
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        },
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["masters"] > 80_000_000 and len(list((tmp_path / "large").glob("*.safetensors"))) >= 4
    assert found["load"] <= found["masters"] + found["card"] + found["others"] + 20_000_000 + SLACK
    assert found["save"] <= 20_000_000 + SLACK
