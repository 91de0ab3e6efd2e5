"""Runs on a tmpfs that is too small: they must end with a line, keep what is good, and go on when there is room."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soak.damage import OPTIONS
from soak.oracle import Finding
from soak.runs import Server, check_whole, compare_runs


@contextmanager
def tmpfs(place: Path, kib: int) -> Iterator[Path]:
    """Mount a tmpfs of ``kib`` KiB.

    Raises:
        PermissionError: mounting is not permitted here.
    """
    place.mkdir(parents=True, exist_ok=True)
    if shutil.which("mount") is None or os.name != "posix":
        raise PermissionError("there is no mount command")
    words = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr.strip() or "mount failed")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, capture_output=True)


def why_not(place: Path) -> str | None:
    """Why no tmpfs can be mounted, or None."""
    try:
        with tmpfs(place, 64):
            return None
    except PermissionError as error:
        return str(error)


class DiskFiller:
    """Runs on small disks.

    Args:
        server: forks the runs.
        whole: the undisturbed run of ``damage.OPTIONS``.
    """

    def __init__(self, server: Server, whole: Path):
        self.server, self.whole = server, whole
        files = [path for path in whole.rglob("*") if path.is_file()]
        self.needed_kib = sum(-(-path.stat().st_size // 4096) * 4 for path in files)

    def trial(self, seed: int) -> str:
        """One run. Returns "full" or "fitted".

        Raises:
            Finding: no message, a checkpoint that is not whole, or another end when there is room again.
        """
        kib = random.Random(f"misa disk {seed}").randrange(16, int(1.1 * self.needed_kib), 4)
        place = self.server.place / f"disk-{seed}"
        with tmpfs(place, kib):
            out = place / "run"
            code, text = self.server.run(out, **OPTIONS)
            what, last = f"a disk of {kib} KiB", text.strip()[-400:]
            result = "fitted" if code == 0 else "full"
            if code not in (0, 1, 2) or "Traceback" in text:
                raise Finding(f"{what}: exit {code}: {last}")
            if code and "space" not in text.lower() and "could not write" not in text:
                raise Finding(f"{what}: exit {code} without a word about the disk: {last}")
            try:
                resumable = check_whole(out)
            except Finding as finding:
                raise Finding(f"{what}: {finding}") from finding
            if code:
                subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True, capture_output=True)
                more = ["--resume_from_checkpoint", "true"] if resumable else ["--overwrite_output_dir", "true"]
                code, text = self.server.run(out, *more, **OPTIONS)
                if code:
                    raise Finding(f"{what}: no way on when there was room (exit {code}): {text.strip()[-250:]}")
            try:
                compare_runs(self.whole, out)
            except Finding as finding:
                raise Finding(f"{what}: {result}; {finding}") from finding
        return result


def fill_disks(
    filler: DiskFiller, seeds: Any, keep_going: Callable[[], bool], report: Callable[[str], None]
) -> tuple[Counter[str], list[dict[str, str]]]:
    """Fill disks until ``keep_going`` says no. Returns counts and findings."""
    counts, findings = Counter[str](), []
    for seed in seeds:
        if not keep_going():
            break
        try:
            counts[f"disk {filler.trial(seed)}"] += 1
        except Finding as finding:
            again = f"python tests/soak disk --case {seed}"
            findings.append({"finding": str(finding), "reproduction": again})
            report(f"FINDING {finding}\n   {again}")
        counts["small disks"] += 1
    return counts, findings
