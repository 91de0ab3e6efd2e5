"""Every file of a checkpoint, every kind of damage; every change of the disk during a run, failing.

A resumed run must refuse with exit 2 and the file's name, or say that it goes on from an earlier checkpoint and end
with the undisturbed run's bits. A failed save must end the run with one line that names what could not be written, and
leave a directory from which the run goes on to the same bits.
"""

from __future__ import annotations

import errno
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soak.oracle import Finding
from soak.runs import Server, check_whole, compare_runs, weights_of

#: Every step's line goes to the log; the checkpoints of 2, 4 and 6 stay. The end is the end of an epoch.
OPTIONS: dict[str, Any] = {"max_steps": 8, "save_steps": 2, "inner_steps": 2, "save_total_limit": 5}


def flip(file: Path, other: Path, dice: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, other: Path, dice: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: dice.randrange(1, max(2, file.stat().st_size))])


def extend(file: Path, other: Path, dice: random.Random) -> None:
    file.write_bytes(file.read_bytes() + b"\0" * dice.randint(1, 600))


def empty(file: Path, other: Path, dice: random.Random) -> None:
    file.write_bytes(b"")


def zeros(file: Path, other: Path, dice: random.Random) -> None:
    """What a power cut leaves of a file whose size had reached the disk and whose content had not."""
    file.write_bytes(bytes(file.stat().st_size))


def delete(file: Path, other: Path, dice: random.Random) -> None:
    file.unlink()


def exchange(file: Path, other: Path, dice: random.Random) -> None:
    """The same file of an earlier checkpoint: perfectly good, and wrong here."""
    shutil.copyfile(other, file)


def directory(file: Path, other: Path, dice: random.Random) -> None:
    file.unlink()
    file.mkdir()


def dangling(file: Path, other: Path, dice: random.Random) -> None:
    file.unlink()
    file.symlink_to("nowhere")


KINDS: dict[str, Callable[[Path, Path, random.Random], None]] = {
    function.__name__: function
    for function in (flip, truncate, extend, empty, zeros, delete, exchange, directory, dangling)
}
#: Where the name of what is wrong may stand for the file: an index and its shards, a checkpoint without its manifest.
SAID = re.compile(
    r"damaged|missing|not whole|incomplete|cut short|differs|checksum|manifest|no weights|is not|cannot", re.I
)


class Damager:
    """Damages copies of one interrupted run's last checkpoint.

    Args:
        server: forks the runs.
    """

    def __init__(self, server: Server):
        self.server = server
        self.whole = server.place / "whole-damage"
        code, text = server.run(self.whole, **OPTIONS)
        if code:
            raise RuntimeError(f"the undisturbed run ended with {code}: {text[-2000:]}")
        self.template = server.place / "template"
        counter = server.place / "changes"
        trap = {"root": str(self.template), "counter": str(counter)}
        code, text = server.run(self.template, trap=trap, **OPTIONS)
        assert code == 0, text
        self.changes = int(counter.read_text())
        self._interrupt()
        self.files = sorted(path.name for path in (self.template / "checkpoint-6").iterdir() if path.is_file())
        self._number = 0

    def _interrupt(self) -> None:
        """Make the finished run one that was killed after step 6: without its model and its last checkpoint."""
        shutil.rmtree(self.template / "checkpoint-8")
        for path in self.template.iterdir():
            if path.is_file() and path.name != "misa_log.jsonl":
                path.unlink()

    def cases(self) -> list[tuple[str, str]]:
        return [(name, kind) for name in self.files for kind in KINDS]

    def trial(self, name: str, kind: str, seed: int, *, by_name: bool) -> str:
        """Damage one file and resume. Returns "refused", "fell back" or "no damage".

        Raises:
            Finding: it went on in silence, or ended otherwise than with exit 2 and the file's name.
        """
        self._number += 1
        out = self.server.place / f"damaged-{self._number}"
        shutil.copytree(self.template, out)
        target, other = out / "checkpoint-6" / name, out / "checkpoint-4" / name
        if kind == "exchange" and (not other.is_file() or other.read_bytes() == target.read_bytes()):
            shutil.rmtree(out)
            return "no damage"
        if kind in ("flip", "truncate", "zeros", "empty") and not target.stat().st_size:
            shutil.rmtree(out)
            return "no damage"
        KINDS[kind](target, other, random.Random(f"misa damage {seed}"))
        before = {path.name for path in out.iterdir()}
        code, text = self.server.run(
            out, "--resume_from_checkpoint", str(out / "checkpoint-6") if by_name else "true", **OPTIONS
        )
        what = f"{name} of the last checkpoint, {kind}" + (", resumed by name" if by_name else "")
        # a manifest that says something else accuses the file that it says it of
        word = "checkpoint-6" if name == "misa_manifest.json" else name
        named = [line for line in text.splitlines() if word in line and "checkpoint-6" in line and SAID.search(line)]
        last = text.strip().splitlines()[-1][:250] if text.strip() else ""
        if code == 2:
            if not [line for line in text.splitlines() if name in line or "checkpoint-6" in line and SAID.search(line)]:
                raise Finding(f"{what}: refused without the file's name: {last}")
            if {path.name for path in out.iterdir()} < before:
                raise Finding(f"{what}: refused, but something was deleted")
            result = "refused"
        elif code:
            raise Finding(f"{what}: exit {code}: {last}")
        elif by_name:
            raise Finding(
                f"{what}: trained on from the damaged checkpoint" + (", with a line" if named else " in silence")
            )
        elif not named:
            same = weights_of(self.whole)
            bits = all((same[key] == value).all() for key, value in weights_of(out).items())
            raise Finding(f"{what}: trained on in silence, {'the bits are right' if bits else 'to other weights'}")
        else:
            try:
                compare_runs(self.whole, out)
            except Finding as finding:
                raise Finding(f"{what}: fell back, but {finding}") from finding
            result = "fell back"
        shutil.rmtree(out, ignore_errors=True)
        return result

    def failing_save(self, change: int, number: int) -> str:
        """Let the n-th change of the disk fail, then go on. Returns "failed" or "not needed".

        Raises:
            Finding: no message, a checkpoint that is not whole, or another end.
        """
        out = self.server.place / f"failing-{change}-{number}"
        code, text = self.server.run(out, trap={"root": str(out), "fail_at": change, "number": number}, **OPTIONS)
        what = f"change {change} of the disk failed ({errno.errorcode[number]})"
        last = text.strip().splitlines()[-1][:250] if text.strip() else ""
        result = "not needed" if code == 0 else "failed"
        if code and "Traceback" in text:
            raise Finding(f"{what}: a traceback: {last}")
        if code not in (0, 1, 2):
            raise Finding(f"{what}: exit {code}: {last}")
        try:
            resumable = check_whole(out)
        except Finding as finding:
            raise Finding(f"{what}: {finding}") from finding
        if code:
            more = ["--resume_from_checkpoint", "true"] if resumable else ["--overwrite_output_dir", "true"]
            code, text = self.server.run(out, *more, **OPTIONS)
            if code:
                raise Finding(f"{what}: the run could not go on (exit {code}): {text.strip().splitlines()[-1][:250]}")
        try:
            compare_runs(self.whole, out, tidy=False)  # what could not be removed may stay
        except Finding as finding:
            raise Finding(f"{what}: {result}; {finding}") from finding
        shutil.rmtree(out, ignore_errors=True)
        return result


Outcome = tuple[Counter[str], list[dict[str, str]]]


def damage_files(
    damager: Damager, order: Any, keep_going: Callable[[], bool], report: Callable[[str], None]
) -> Outcome:
    """Damage files, in an order drawn from the seed. Returns counts and findings."""
    counts, findings = Counter[str](), []
    for seed, name, kind, by_name in order:
        if not keep_going():
            break
        try:
            counts[damager.trial(name, kind, seed, by_name=by_name)] += 1
        except Finding as finding:
            again = f"python tests/soak damage --file {name} --kind {kind} --seed {seed}" + " --by_name" * by_name
            findings.append({"finding": str(finding), "reproduction": again})
            report(f"FINDING {finding}\n   {again}")
        counts["damaged files"] += 1
    return counts, findings


def fail_saves(damager: Damager, order: Any, keep_going: Callable[[], bool], report: Callable[[str], None]) -> Outcome:
    """Let single changes of the disk fail. Returns counts and findings."""
    counts, findings = Counter[str](), []
    for change, number in order:
        if not keep_going():
            break
        try:
            counts[f"save {damager.failing_save(change, number)}"] += 1
        except Finding as finding:
            again = f"python tests/soak failures --change {change} --errno {number}"
            findings.append({"finding": str(finding), "reproduction": again})
            report(f"FINDING {finding}\n   {again}")
        counts["failure points"] += 1
    return counts, findings


def file_order(damager: Damager, seed: int) -> list[tuple[int, str, str, bool]]:
    """Every file and kind once by ``true`` and once by name, shuffled."""
    dice = random.Random(f"misa order {seed}")
    order = [(seed, name, kind, by_name) for name, kind in damager.cases() for by_name in (False, True)]
    dice.shuffle(order)
    return order


def failure_order(damager: Damager, seed: int) -> list[tuple[int, int]]:
    """Every change of the disk with a full disk and with a broken one, shuffled."""
    dice = random.Random(f"misa order {seed}")
    order = [(change, number) for change in range(1, damager.changes + 1) for number in (errno.ENOSPC, errno.EIO)]
    dice.shuffle(order)
    return order
