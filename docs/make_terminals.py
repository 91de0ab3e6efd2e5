"""Record the terminal pictures of docs/terminals: ``python docs/make_terminals.py [NAME ...]``, about two minutes.

Each command runs for real, as a process of its own, in a new folder with a small model and data, so that only relative
paths show. What it prints is drawn by rich; nothing is typed or edited, only warnings of libraries are left out. A test
says when a picture is missing, unused, too large or tells of the machine it was made on (tests/test_terminals.py).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs/terminals"
#: Columns of the recorded terminal.
WIDTH = 110
TRAIN = "misa train --model model --dataset data.jsonl --output_dir out --delta 0.2 --inner_steps 5 --max_length 64"
#: Name of the picture -> command. The report is of a run that is made first, and not drawn.
COMMANDS = {
    "train": f"{TRAIN} --max_steps 60 --dry_run",
    "plan": "misa plan --model llama-3-8b --gpu 4090 --steps 2000",
    "report": "misa report out",
    "bench": "misa bench learning --list --preset quick --output results",
}
BEFORE = {"report": f"{TRAIN} --max_steps 60 --learning_rate 1e-3 --logging_steps 5 --report_to none"}
#: Fonts that rich's pictures would load from elsewhere: an image does not load them anyway.
FOREIGN_FONTS = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)


def make_example(folder: Path) -> None:
    """A Llama of 0.2 million parameters, a tokenizer of bytes and 200 sums."""
    import torch
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=384, max_position_embeddings=128)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    ByT5Tokenizer().save_pretrained(folder / "model")
    sums = [(number % 23, number * 7 % 31) for number in range(200)]
    records = [{"text": f"What is {a} + {b}? {a} + {b} = {a + b}."} for a, b in sums]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def run(command: str, folder: Path) -> str:
    """What a command prints on both streams, without lines of libraries.

    Raises:
        RuntimeError: the command failed.
    """
    words = [sys.executable, "-m", "misa_engine", *shlex.split(command)[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(WIDTH), "HF_HUB_OFFLINE": "1"}
    environment |= {"TORCH_LOGS": "-all", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}")
    return "\n".join(line for line in done.stdout.splitlines() if not of_a_library(line)).strip("\n")


def of_a_library(line: str) -> bool:
    """Whether a line is a warning of what is installed here (torchao's missing binaries and the like)."""
    return (
        line.startswith(("Failed to load ", "W1", "  warnings.warn("))
        or re.search(r"Warning: |\.py:\d+", line) is not None
    )


def draw(name: str, command: str, printed: str) -> str:
    """The picture of a command and what it printed."""
    from rich.console import Console
    from rich.text import Text

    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Text(f"$ {command}", style="bold green"))
        console.print(Text.from_ansi(printed))
        svg = console.export_svg(title=f"MISA · {name}", unique_id=f"misa-{name}")
    return FOREIGN_FONTS.sub("", svg)


def main(names: list[str]) -> None:
    """Record the pictures named, or all."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_example(folder)
        for name in names or COMMANDS:
            if name in BEFORE:
                run(BEFORE[name], folder)
            picture = draw(name, COMMANDS[name], run(COMMANDS[name], folder).replace(place, "."))
            (PICTURES / f"{name}.svg").write_text(picture, encoding="utf-8")
            print(f"docs/terminals/{name}.svg: {len(picture) / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
