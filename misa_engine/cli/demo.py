"""``misa train --demo``: the whole product on a machine that has nothing but Python and this package.

A small Llama with random weights learns the text of the running Python's standard library, byte by byte, first with
MISA and then with full AdamW. Both go through the same ``misa train`` as a user's run, each in a process of its own so
that their peak memory can be compared; then the saved model is loaded again and the pictures are drawn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.cli.demo_data import BATCH, LENGTH, OWN_OPTIONS, STEPS, build_demo, demo_arguments, no_progress_bars
from misa_engine.errors import DONE, UserError
from misa_engine.report.log import RunLog

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


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

    with no_progress_bars():
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
