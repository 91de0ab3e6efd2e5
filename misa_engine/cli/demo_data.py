"""What ``misa train --demo`` trains on: a tiny random Llama, Python's own sources, and the two command lines."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

STEPS, LENGTH, BATCH = 200, 128, 4
#: Bytes of text, a byte being a token: 30% more than the STEPS·LENGTH·BATCH = 102 kB that training sees, once.
TRAIN_BYTES, HELDOUT_BYTES = 134_000, 16 * 1023
#: This much of each file, so that both texts come from many, 34 and 16. With its end-of-text token a held-out piece
#: fills whole sequences; a shorter one at the end would weigh as much as the others in the Trainer's mean loss.
TRAIN_FILE_BYTES, HELDOUT_FILE_BYTES = 4_000, 8 * LENGTH - 1

#: 3.5 million parameters in 4 layers of 7 matrices: 0.1 to 0.2 s a step of 512 tokens.
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,  # 1/√256; transformers' 0.02 is for models ten times as wide, and costs 0.15 nats here
}

#: The same for both optimizers.
SHARED_OPTIONS = {
    "max_steps": STEPS,
    "max_length": LENGTH,
    "packing": "true",
    "packing_strategy": "wrapped",
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "eval_steps": 40,
    "logging_steps": 5,
    "save_strategy": "no",
    "seed": 0,
}

#: Each optimizer with the better of two learning rates in single runs: AdamW ended at 2.63 with 1e-3 and 2.65 with
#: 2e-3, MISA at 2.78 with 2e-3 and 2.74 with 3e-3. MISA trains a quarter of the model at a time, because every matrix
#: starts from noise and has to learn, and embedding and head (4% of this model) in every step, as in the paper's
#: pre-training. η between 0 and 1 ends within the spread of seeds here (bench/LOG.md).
OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "misa": {
        "learning_rate": 3e-3,
        "delta": 0.25,
        "inner_steps": 10,
        "eta": 0.5,
        "always_train": ("embed_tokens", "lm_head"),
    },
    "adamw": {"learning_rate": 1e-3},
}

#: Folders of the standard library that are not its text: tests, toys, bundled packages, generated tables.
_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "encodings",
    "pydoc_data",
    "lib2to3",
}


_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class DemoPaths:
    """What ``build_demo`` wrote."""

    model: Path
    """Directory with the untrained model and its tokenizer."""
    train: Path
    heldout: Path


# ---- model and data ----


def build_demo(directory: Path, seed: int = 0) -> DemoPaths:
    """Write the demo's model directory, training text and held-out text. Downloads nothing.

    The held-out text is from other files than the training text, so that it cannot be learnt by heart.

    Args:
        directory: where to write; created if it does not exist.
        seed: of the random weights and of the choice of files.

    Raises:
        ValueError: this Python came without the sources of its standard library.
    """
    import torch
    from transformers import AddedToken, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    paths = DemoPaths(directory / "tiny-llama", directory / "train.jsonl", directory / "heldout.jsonl")
    documents = list(islice(standard_library(seed), 96))
    heldout, train = documents[::5], [text for place, text in enumerate(documents) if place % 5]
    directory.mkdir(parents=True, exist_ok=True)
    _write_documents(paths.train, train, TRAIN_BYTES, TRAIN_FILE_BYTES)
    _write_documents(paths.heldout, heldout, HELDOUT_BYTES, HELDOUT_FILE_BYTES)

    # 256 bytes and 3 special tokens; needs no files. ByT5's own end-of-text token swallows the white space before it.
    tokenizer = ByT5Tokenizer(eos_token=AddedToken("</s>", lstrip=False, rstrip=False), extra_ids=0)
    config = LlamaConfig(
        **MODEL,  # type: ignore[arg-type]
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with no_progress_bars():
        model.save_pretrained(paths.model)
        tokenizer.save_pretrained(paths.model)
    return paths


def standard_library(seed: int = 0) -> Iterator[str]:
    """The longer source files of the standard library, in a seeded random order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts))
    random.Random(seed).shuffle(files)
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        # One byte a character, one token a byte: the tokenizer would read "</s>" as one token
        if len(text) >= TRAIN_FILE_BYTES and text.isascii() and not any(word in text for word in _SPECIAL_TOKENS):
            yield text


def _write_documents(path: Path, texts: list[str], size: int, piece: int) -> None:
    """Write the first ``piece`` characters of as many texts as make ``size``."""
    needed = size // piece
    if len(texts) < needed:
        raise ValueError(
            f"the demo reads {needed} source files of the standard library for {path.name} and found {len(texts)} in "
            f"{sysconfig.get_paths()['stdlib']}: this Python came without them. Use a Python that has its .py files, "
            "or give misa train a model and data of your own."
        )
    path.write_text("".join(json.dumps({"text": text[:piece]}) + "\n" for text in texts[:needed]), encoding="utf-8")


def demo_arguments(paths: DemoPaths, out: Path, optimizer: str = "misa") -> list[str]:
    """The command line of one of the demo's runs, without ``misa train``.

    Args:
        paths: from ``build_demo``.
        out: the run's output directory.
        optimizer: "misa" or "adamw".
    """
    options: dict[str, Any] = {
        "model_name_or_path": paths.model,
        "dataset": paths.train,
        "eval_dataset": paths.heldout,
        "output_dir": out,
        "optimizer": optimizer,
        **SHARED_OPTIONS,
        **OWN_OPTIONS[optimizer],
    }
    words = []
    for name, value in options.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without transformers' bars for reading and writing 39 tensors."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
