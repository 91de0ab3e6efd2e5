"""``misa train --demo``: the whole product on a machine that has nothing but Python and this package.

A small Llama with random weights learns the text of the running Python's standard library, byte by byte, first with
MISA and then with full AdamW. Both go through the same ``misa train`` as a user's run, each in a process of its own so
that their peak memory can be compared; then the saved model is loaded again and the pictures are drawn.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.errors import DONE, UserError
from misa_engine.report.log import RunLog

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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
    with _no_progress_bars():
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


# ---- the demo itself ----


def run_demo(output_dir: str | os.PathLike[str] = "misa_demo") -> int:
    """Build, train with MISA and with AdamW, compare, load the saved model again, draw.

    Args:
        output_dir: gets ``start`` (untrained model, text), ``misa`` (trained model, log, pictures) and ``adamw``. The
            same folders of an earlier demo are replaced; anything else there stays.

    Returns:
        The exit code, 0.

    Raises:
        UserError: ``output_dir`` cannot be used.
        RuntimeError: a run failed, or the saved model does not load to the same loss.
    """
    from rich.console import Console

    from misa_engine.cli.output_directory import delete_run, holds_run
    from misa_engine.report.pictures import make_report
    from misa_engine.report.summary import summary_table

    started = time.monotonic()
    out = Path(output_dir)
    if out.exists() and not out.is_dir():
        raise UserError(f"--output_dir {out} is a file; the demo needs a directory.")
    runs = [folder for folder in (out, out / "misa", out / "adamw") if folder.is_dir() and holds_run(folder)]
    if runs and (out in runs or not (out / "start" / "heldout.jsonl").is_file()):
        raise UserError(f"{runs[0]} holds a run that is not the demo's; choose another --output_dir for the demo.")
    for folder in runs:
        delete_run(folder)
    console = Console()
    paths = build_demo(out / "start")
    console.print(
        f"[bold]MISA demo[/]: a Llama with random weights learns Python's standard library, byte by byte.\n"
        f"{STEPS} steps of {BATCH} × {LENGTH} tokens, first with MISA (at most {OWN_OPTIONS['misa']['delta']:.0%} of "
        "the model trains at a time), then with AdamW on all of it. Nothing is downloaded."
    )
    logs = {}
    for optimizer, name in (("misa", "MISA"), ("adamw", "AdamW")):
        _train(demo_arguments(paths, out / optimizer, optimizer), out / optimizer, name, console)
        logs[name] = RunLog.read(out / optimizer)
    log = RunLog(out / "misa")
    log.append("baseline", logs["AdamW"][-1]["step"], **_baseline("AdamW", logs["AdamW"]))
    pictures = make_report(out / "misa")

    console.print()
    console.print(summary_table(logs["MISA"]))
    console.print()
    console.print(comparison(logs["MISA"], logs["AdamW"]))
    logged = _metric(logs["MISA"], "eval_loss")[-1][1]
    again = heldout_loss(out / "misa", paths.heldout)
    console.print(f"\nsaved model, loaded again: held-out loss {again:.4f} (at the end of training: {logged:.4f})")
    if not abs(again - logged) <= 1e-4 * logged:  # summed in another order: 1e-7
        raise RuntimeError(
            f"the model saved in {out / 'misa'} has held-out loss {again:.6f}, training ended with {logged:.6f}"
        )
    console.print(f"model    {out / 'misa'}   (AutoModelForCausalLM.from_pretrained loads it)")
    for picture in pictures:
        console.print(f"picture  {picture}")
    console.print(f"done in {time.monotonic() - started:.0f} s")
    return DONE


def _train(arguments: list[str], out: Path, name: str, console: Console) -> None:
    """Run ``misa train`` in a fresh process and show its progress from the run log.

    Raises:
        RuntimeError: it failed; the end of what it printed is in the message.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

    out.parent.mkdir(parents=True, exist_ok=True)
    output = out.parent / f"{out.name}.txt"
    columns: list[ProgressColumn] = [TextColumn("{task.description:<6}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("steps"), TimeElapsedColumn(), TextColumn("{task.fields[note]}")]
    with (
        open(output, "wb") as file,
        tempfile.TemporaryDirectory() as cache,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task(name, total=STEPS, note="starting")
        child = subprocess.Popen(
            [sys.executable, "-m", "misa_engine", "train", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # A cache of its own: the second run would otherwise not tokenize, and so start 25 MB smaller.
            env={
                **os.environ,
                "HF_DATASETS_CACHE": cache,
                "PYTHONWARNINGS": "ignore",
            },
        )
        try:
            while child.poll() is None:
                time.sleep(0.25)
                _show(progress, task, out)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
        _show(progress, task, out)
    if child.returncode != 0:
        tail = "\n".join(output.read_text(errors="replace").splitlines()[-5:])
        raise RuntimeError(
            f"the {name} run ended with exit code {child.returncode}; all of its output: {output}\n{tail}"
        )


def _show(progress: Any, task: Any, out: Path) -> None:
    log = RunLog(out)
    entries = RunLog.read(log.path) if log.path.exists() else []
    if not entries:
        return
    heldout = _metric(entries, "eval_loss")
    note = f"held-out loss {heldout[0][1]:.3f} → {heldout[-1][1]:.3f}" if heldout else ""
    progress.update(task, completed=entries[-1]["step"], note=note)


# ---- results ----


def comparison(misa: list[dict[str, Any]], adamw: list[dict[str, Any]]) -> Table:
    """Loss, step time and memory of the two runs side by side.

    Args:
        misa: entries of MISA's run log.
        adamw: entries of AdamW's.
    """
    from rich.table import Table

    table = Table(title="The same model, data order and number of steps", title_justify="left")
    table.add_column("")
    for column in ("MISA", "AdamW", "MISA / AdamW"):
        table.add_column(column, justify="right")
    ends, mib = (_end(misa), _end(adamw)), 2.0**-20
    heldout = [_metric(log, "eval_loss") for log in (misa, adamw)]
    rows: list[tuple[str, str, float, list[float | None]]] = [
        ("held-out loss before (nats a byte)", ".3f", 1, [curve[0][1] for curve in heldout]),
        ("held-out loss after", ".3f", 1, [curve[-1][1] for curve in heldout]),
        ("step time, median (ms)", ".0f", 1e3, [(end.get("step_time_s") or {}).get("median") for end in ends]),
        ("gradients and Adam state (MiB)", ".1f", mib, [_state_bytes(misa), _state_bytes(adamw)]),
        ("process before training (MiB)", ".0f", mib, [end.get("rss_before_training_bytes") for end in ends]),
        ("process at its peak (MiB)", ".0f", mib, [end.get("peak_memory_bytes") for end in ends]),
        ("memory that training added (MiB)", ".0f", mib, [_added_bytes(end) for end in ends]),
    ]
    for name, shape, factor, (mine, other) in rows:
        shown = [format(value * factor, shape) if value else "–" for value in (mine, other)]
        table.add_row(name, *shown, f"{mine / other:.2f}" if mine and other else "–")
    return table


def heldout_loss(model_directory: Path, heldout: Path) -> float:
    """Loss of a saved model on the held-out text, computed without any of the training code."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(model_directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    texts = [json.loads(line)["text"] for line in heldout.read_text(encoding="utf-8").splitlines()]
    tokens = [token for text in texts for token in tokenizer(text)["input_ids"]]
    rows = [tokens[start : start + LENGTH] for start in range(0, len(tokens), LENGTH)]
    total = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            total += model(input_ids=ids, labels=ids).loss.item()
    return total / len(rows)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without transformers' bars for reading and writing 39 tensors."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _baseline(name: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What MISA's run log keeps of the comparison, so that ``misa report`` can draw it again."""
    end = _end(entries)
    return {
        "name": name,
        "loss": _metric(entries, "loss"),
        "eval_loss": _metric(entries, "eval_loss"),
        "step_time_s": end.get("step_time_s"),
        "peak_memory_bytes": end.get("peak_memory_bytes"),
        "rss_before_training_bytes": end.get("rss_before_training_bytes"),
    }


def _metric(entries: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    found = [entry for entry in entries if entry["type"] == "metrics"]
    return [(entry["step"], entry[key]) for entry in found if entry.get(key) is not None]


def _end(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return next((entry for entry in reversed(entries) if entry["type"] == "end"), {})


def _state_bytes(entries: list[dict[str, Any]]) -> float | None:
    """Bytes of gradients and Adam's two moments: MISA's arena, or three float32 numbers a parameter."""
    memory = next((entry["bytes"] for entry in entries if entry["type"] == "memory"), None)
    if memory is not None:
        return sum(size for category, size in memory.items() if category != "weights")
    total = next((entry["total_parameters"] for entry in entries if entry["type"] == "run"), None)
    return None if total is None else 12 * total


def _added_bytes(end: dict[str, Any]) -> float | None:
    """Peak minus what was resident just before training, which is mostly Python, torch and transformers."""
    before, peak = end.get("rss_before_training_bytes"), end.get("peak_memory_bytes")
    return peak - before if before and peak else None
