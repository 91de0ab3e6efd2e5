"""Damaged inputs: every file of the model directory and the data. Exit 2 with the file's name, or nothing wrong."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from soak.damage import KINDS, OPTIONS, Outcome
from soak.kill import last_line
from soak.oracle import Finding
from soak.runs import Server


def deep(file: Path, other: Path, dice: random.Random) -> None:
    file.write_text("[" * 100_000 + "]" * 100_000)


def another_shape(file: Path, other: Path, dice: random.Random) -> None:
    file.write_text(
        dice.choice(('["a list"]', '"a text"', "17", "null", "{}", '{"model_type": 5}', '{"text": 7}')) + "\n"
    )


def long_line(file: Path, other: Path, dice: random.Random) -> None:
    file.write_text(json.dumps({"text": "ab " * 10_000_000}) + "\n")


def not_text(file: Path, other: Path, dice: random.Random) -> None:
    file.write_bytes(bytes(dice.randrange(256) for _ in range(400)))


ALL = {**KINDS, **{function.__name__: function for function in (deep, another_shape, long_line, not_text)}}
del ALL["exchange"]
#: Bound on a run that has nothing to do but refuse; the runs themselves take some seconds.
PATIENCE_S = 90.0


class InputDamager:
    """Damages copies of the material.

    Args:
        server: forks the runs.
    """

    def __init__(self, server: Server):
        self.server = server
        material = server.place / "material"
        self.files = sorted(str(path.relative_to(material)) for path in material.rglob("*") if path.is_file())
        self._number = 0

    def order(self, seed: int) -> list[tuple[int, str, str]]:
        dice = random.Random(f"misa inputs {seed}")
        order = [
            (seed, name, kind) for name in self.files for kind in ALL if kind != "long_line" or name == "data.jsonl"
        ]
        dice.shuffle(order)
        return order

    def trial(self, name: str, kind: str, seed: int) -> str:
        """One run. Returns "refused" or "harmless".

        Raises:
            Finding: another exit code, a message without the file, a wait without end.
        """
        self._number += 1
        place = self.server.place / f"inputs-{self._number}"
        shutil.copytree(self.server.place / "material", place)
        ALL[kind](place / name, place / name, random.Random(f"misa inputs {seed} {name} {kind}"))
        started = time.monotonic()
        out = place / "out"
        code, text = self.server.run(
            out, model_name_or_path=place / "model", dataset=place / "data.jsonl", limit_s=PATIENCE_S, **OPTIONS
        )
        what = f"input {name}, {kind}"
        if time.monotonic() - started > PATIENCE_S:
            raise Finding(f"{what}: no end after {PATIENCE_S:.0f} s")
        if code not in (0, 2):
            raise Finding(f"{what}: exit {code}: {last_line(text.replace('(--debug shows where)', ''))}")
        if code == 2 and out.exists() and any(out.iterdir()):
            raise Finding(f"{what}: refused, but {out.name} was written to")
        known = (Path(name).name, str(place / "model"), "tokenizer", "data")
        if code == 2 and not any(word in last_line(text) for word in known):
            raise Finding(f"{what}: refused without the file's name: {last_line(text)}")
        shutil.rmtree(place)
        return "refused" if code else "harmless"


def damage_inputs(server: Server, seed: int, keep_going: Callable[[], bool], report: Callable[[str], None]) -> Outcome:
    """Damage inputs, in an order drawn from the seed. Returns counts and findings."""
    counts, findings = Counter[str](), []
    damager = InputDamager(server)
    for number, name, kind in damager.order(seed):
        if not keep_going():
            break
        try:
            counts[f"input {damager.trial(name, kind, number)}"] += 1
        except Finding as finding:
            again = f"python tests/soak inputs --file {name} --kind {kind} --seed {number}"
            findings.append({"finding": str(finding), "reproduction": again})
            report(f"FINDING {finding}\n   {again}")
        counts["damaged inputs"] += 1
    return counts, findings
