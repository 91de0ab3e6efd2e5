"""Runs of ``misa train`` that are killed, again and again, and must end as if nothing had happened."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soak.oracle import Finding
from soak.runs import VARIANTS, Child, Server, alive, check_whole, checkpoints_in, compare_runs, weights_of

SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}


class Killer:
    """Kills runs of one server; keeps the undisturbed run of each variant to compare with.

    Args:
        server: forks the runs.
        counts: added to.
    """

    def __init__(self, server: Server, counts: Counter[str]):
        self.server, self.counts = server, counts
        self._whole: dict[str, tuple[Path, float]] = {}

    def whole(self, variant: str) -> tuple[Path, float]:
        """The undisturbed run, and how long it took in seconds."""
        if variant not in self._whole:
            out = self.server.place / f"whole-{variant}"
            started = time.monotonic()
            code, text = self.server.run(out, **VARIANTS[variant])
            if code:
                raise RuntimeError(f"the undisturbed run of {variant} ended with {code}: {text[-2000:]}")
            self._whole[variant] = out, time.monotonic() - started
        return self._whole[variant]

    def any_trial(self, seed: int) -> str:
        """Trial number ``seed``: of eight, one collision, one that goes back, six that are killed."""
        kinds = {3: self.collision, 6: self.timeline}
        return kinds.get(seed % 8, self.trial)(seed)

    def trial(self, seed: int) -> str:
        """One run, killed up to three times. Returns what was done, for the report.

        Raises:
            Finding: a lost checkpoint, other weights, a log with a gap.
        """
        dice = random.Random(f"misa kill {seed}")
        variant = dice.choice(tuple(VARIANTS))
        whole, seconds = self.whole(variant)
        out = self.server.place / f"killed-{seed}"
        story = [variant]
        try:
            for _ in range(dice.randint(1, 3)):
                child, how, after = self._start(dice, out, variant, seconds)
                story.append(how)
                self._end(child, after, SIGNALS[how.split()[0]])
                self._check_checkpoints(out)
            code, text = self._go_on(out, variant).wait()
            if code:
                raise Finding(f"the run could not go on (exit {code}): {last_line(text)}")
            compare_runs(whole, out)
        except Finding as finding:
            raise Finding(f"{finding} [{'; '.join(story)}]") from finding
        if dice.random() < 0.25:
            self.resume_finished(out, variant)
        shutil.rmtree(out, ignore_errors=True)
        self.counts["killed runs that ended as the undisturbed one"] += 1
        return "; ".join(story)

    def resume_finished(self, out: Path, variant: str) -> None:
        """Resume a run that has ended: it must say so and change nothing.

        Raises:
            Finding: it trained on, or changed a file.
        """
        before = contents(out)
        code, text = self.server.run(out, "--resume_from_checkpoint", "true", **VARIANTS[variant])
        if code:
            raise Finding(f"a finished run, resumed: exit {code}: {last_line(text)}")
        changed = sorted(name for name in before if contents(out).get(name) != before[name])
        if changed:
            raise Finding(f"a finished run, resumed: {', '.join(changed[:4])} changed")
        self.counts["finished runs that stayed as they were"] += 1

    def collision(self, seed: int) -> str:
        """Start a second run in the directory of one under way: exit 2, and the first must not feel it.

        Raises:
            Finding: the second ran, or the first ended differently.
        """
        dice = random.Random(f"misa collision {seed}")
        variant = dice.choice(tuple(VARIANTS))
        whole, _ = self.whole(variant)
        out = self.server.place / f"collision-{seed}"
        slow = {"root": str(out), "slow_s": 0.03}
        first = self.server.start(out, trap=slow, **VARIANTS[variant])
        deadline = time.monotonic() + dice.uniform(0.5, 4.0)
        while time.monotonic() < deadline or not (out / "misa_log.jsonl").exists():
            if not alive(first.pid):
                break
            time.sleep(0.01)
        under_way = alive(first.pid)
        more = dice.choice((("--overwrite_output_dir", "true"), ("--resume_from_checkpoint", "true"), ()))
        code, text = self.server.run(out, *more, **VARIANTS[variant])
        still = alive(first.pid)
        first_code, first_text = first.wait()
        if under_way and still and code != 2:
            raise Finding(f"a second run in one directory ended with {code}: {last_line(text)} [{variant}, {more}]")
        if first_code:
            raise Finding(f"the first of two runs ended with {first_code}: {last_line(first_text)} [{variant}, {more}]")
        if code == 2:
            compare_runs(whole, out)
        shutil.rmtree(out, ignore_errors=True)
        self.counts["runs that found the directory in use"] += under_way and still
        return f"{variant} {more}"

    def timeline(self, seed: int) -> str:
        """Go back to an older checkpoint with another learning rate, be killed, go on with ``true``.

        Raises:
            Finding: it went on from the abandoned branch, or the new learning rate took no effect.
        """
        variant = dict(max_steps=10, save_steps=2, save_total_limit=9, lr_scheduler_type="constant")
        other = {**variant, "learning_rate": 3e-3}
        out, straight = self.server.place / f"branch-{seed}", self.server.place / f"straight-{seed}"
        code, text = self.server.run(out, **variant)
        assert code == 0, text
        (out / "model.safetensors").unlink()
        shutil.copytree(out, straight)
        code, text = self.server.run(straight, "--resume_from_checkpoint", str(straight / "checkpoint-4"), **other)
        if code:
            if code == 2 and "learning_rate" in text:
                return "another learning rate is refused by name"
            raise Finding(f"going back to checkpoint-4 of 10: exit {code}: {last_line(text)}")
        trap = {"root": str(out), "kill_at": random.Random(f"misa timeline {seed}").randint(20, 120)}
        self.server.run(out, "--resume_from_checkpoint", str(out / "checkpoint-4"), trap=trap, **other)
        self.counts["kills"] += 1
        code, text = self.server.run(out, "--resume_from_checkpoint", "true", **other)
        if code:
            raise Finding(f"after going back and a kill: exit {code}: {last_line(text)} [change {trap['kill_at']}]")
        start, end = weights_of(out / "checkpoint-4"), weights_of(out)
        if all(bool((start[name] == end[name]).all()) for name in start):
            raise Finding("nothing was trained after going back")
        try:
            compare_runs(straight, out)
        except Finding as finding:
            raise Finding(
                f"after going back to checkpoint-4: {finding} [kill at change {trap['kill_at']}]"
            ) from finding
        for folder in (out, straight):
            shutil.rmtree(folder)
        self.counts["runs that went back to an older checkpoint"] += 1
        return "went back"

    def _start(self, dice: random.Random, out: Path, variant: str, seconds: float) -> tuple[Child, str, float]:
        how = dice.choice(("change", "moment", "slow", "interrupt", "terminate"))
        trap: dict[str, Any] | None = None
        after = dice.uniform(0.05, 1.0) * seconds
        if how == "change":  # before the n-th change of the disk: an undisturbed run makes some hundred
            trap = {"root": str(out), "kill_at": dice.randint(1, 250)}
            how, after = f"kill at change {trap['kill_at']}", 600.0
        elif how == "slow":
            trap = {"root": str(out), "slow_s": 0.004}
            how = f"kill after {after * 1.5:.2f} s of slow disk"
            after *= 1.5
        elif how == "moment":
            how = f"kill after {after:.2f} s"
        else:
            how = f"{how} after {after:.2f} s"
        return self._go_on(out, variant, trap), how, after

    def _go_on(self, out: Path, variant: str, trap: dict[str, Any] | None = None) -> Child:
        """Resume where there is something to resume from, as a person would; otherwise begin again."""
        more = ["--resume_from_checkpoint", "true"] if self._has_checkpoint(out) else ["--overwrite_output_dir", "true"]
        return self.server.start(out, *more, trap=trap, **VARIANTS[variant])

    @staticmethod
    def _has_checkpoint(out: Path) -> bool:
        return bool(checkpoints_in(out)) or any(out.glob("_unfinished/replaced-checkpoint-*"))

    def _end(self, child: Child, after: float, number: signal.Signals) -> None:
        """Let it run for ``after`` seconds, then end it, unless it ended by itself."""
        deadline = time.monotonic() + after
        while time.monotonic() < deadline and alive(child.pid):
            time.sleep(0.005)
        child.kill(number)  # nobody else gets this number: the server has not waited for it yet
        code, text = child.wait()
        if code == -signal.SIGKILL:
            self.counts["kills"] += 1
        elif code and number != signal.SIGKILL:
            self.counts[f"ended by {number.name}"] += 1
            if "Traceback" in text:
                raise Finding(f"a traceback after {number.name}")
        elif code:
            raise Finding(f"the run ended by itself with {code}: {last_line(text)}")

    def _check_checkpoints(self, out: Path) -> None:
        try:
            check_whole(out)
        except Finding as finding:
            raise Finding(f"after the kill {finding}") from finding


def contents(folder: Path) -> dict[str, str]:
    """Path below ``folder`` -> digest of its content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "lock" not in path.name]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:300] if text.strip() else "(nothing said)"


def kill_runs(
    server: Server, seeds: Any, keep_going: Callable[[], bool], report: Callable[[str], None]
) -> tuple[Counter[str], list[dict[str, str]]]:
    """Kill runs until ``keep_going`` says no. Returns counts and findings."""
    counts, findings = Counter[str](), []
    killer = Killer(server, counts)
    for seed in seeds:
        if not keep_going():
            break
        try:
            killer.any_trial(seed)
        except Finding as finding:
            findings.append({"finding": str(finding), "reproduction": f"python tests/soak kill --case {seed}"})
            report(f"FINDING {finding}\n   {findings[-1]['reproduction']}")
        counts["runs"] += 1
    return counts, findings
