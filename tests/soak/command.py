"""The command: what to attack, for how long, and where the counts go."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench/results/reliability.json"
PAGE = ROOT / "docs/reliability.md"
#: harness -> its share of the time
SHARES = {"fuzz": 0.4, "kill": 0.25, "damage": 0.11, "failures": 0.11, "inputs": 0.08, "disk": 0.05}

Outcome = tuple[Counter[str], list[dict[str, str]]]


def until(seconds: float) -> Callable[[], bool]:
    """Whether there is still time."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() < end


def attack(what: str, seconds: float, seed: int, report: Callable[[str], None], server: Any = None) -> Outcome:
    """Run one harness for so long. ``server`` is a ``soak.runs.Server``; all but fuzz need one."""
    keep_going = until(seconds)
    seeds = itertools.count(seed)
    if what == "fuzz":
        from soak.fuzz import fuzz

        return fuzz(seeds, keep_going, report)
    if what == "kill":
        from soak.kill import kill_runs

        return kill_runs(server, seeds, keep_going, report)
    from soak import damage, full_disk, inputs

    if what == "inputs":
        return inputs.damage_inputs(server, seed, keep_going, report)
    damager = server.damager()
    if what == "damage":
        return damage.damage_files(damager, damage.file_order(damager, seed), keep_going, report)
    if what == "failures":
        return damage.fail_saves(damager, damage.failure_order(damager, seed), keep_going, report)
    reason = full_disk.why_not(server.place / "probe")
    if reason is not None:
        report(f"disk: left out, {reason}")
        return Counter(), []
    return full_disk.fill_disks(full_disk.DiskFiller(server, damager.whole), seeds, keep_going, report)


def main() -> int:
    """Parse, attack, write the counts; 1 when there were findings."""
    parser = argparse.ArgumentParser(prog="python tests/soak", description=__doc__)
    parser.add_argument("what", nargs="*", help="harnesses; all when none is named")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all harnesses together")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next have the next numbers")
    parser.add_argument("--case", type=int, help="one fuzz case, killed run or small disk")
    parser.add_argument("--plain", default="", help="with fuzz --case: fields to put back to their default")
    parser.add_argument("--file", help="with damage and inputs: one file")
    parser.add_argument("--kind", help="with damage and inputs: one kind of damage")
    parser.add_argument("--by_name", action="store_true", help="with damage: resume from the checkpoint by its name")
    parser.add_argument("--change", type=int, help="with failures: which change of the disk fails")
    parser.add_argument("--errno", type=int, default=28, help="with failures: how it fails")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} and {PAGE.name}")
    parser.add_argument("--render", action="store_true", help=f"only write {PAGE.name} again, from {RESULTS.name}")
    arguments = parser.parse_args()
    _environment()
    from soak import page

    if arguments.render:
        page.render(RESULTS, PAGE)
        return 0
    wanted = arguments.what or list(SHARES)
    place = Path(tempfile.mkdtemp(prefix="misa-soak-"))
    server = None
    try:
        if wanted != ["fuzz"]:
            from soak.runs import Server

            server = Server(place)
        if arguments.case is not None or arguments.file or arguments.change:
            return _one(wanted[0], arguments, server)
        return _all(wanted, arguments, server)
    finally:
        if server is not None:
            server.close()
        shutil.rmtree(place, ignore_errors=True)


def _environment() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import torch

    torch.set_num_threads(1)  # the same sums everywhere


def _say(text: str) -> None:
    print(text, flush=True)


def _all(wanted: list[str], arguments: argparse.Namespace, server: Any) -> int:
    from soak import page

    total, findings, seconds = Counter[str](), [], {}
    share = sum(SHARES[what] for what in wanted)
    for what in wanted:
        started = time.monotonic()
        counts, found = attack(what, 60 * arguments.minutes * SHARES[what] / share, arguments.seed, _say, server)
        seconds[what] = round(time.monotonic() - started)
        total += counts
        findings += found
        _say(f"{what}: {', '.join(f'{number} {name}' for name, number in sorted(counts.items()))}")
    _say(f"{len(findings)} findings")
    if arguments.write:
        page.write(RESULTS, total, findings, seconds, arguments.seed)
        page.render(RESULTS, PAGE)
    return int(bool(findings))


def _one(what: str, arguments: argparse.Namespace, server: Any) -> int:
    """One case again; a finding is an AssertionError with its traceback."""
    if what == "fuzz":
        from soak import fuzz
        from soak.cases import draw

        case = draw(arguments.case).plain(*[name for name in arguments.plain.split(",") if name])
        _say(str(case))
        fuzz.run_case(case)
    elif what == "kill":
        from soak.kill import Killer

        _say(Killer(server, Counter()).any_trial(arguments.case))
    elif what == "damage":
        _say(server.damager().trial(arguments.file, arguments.kind, arguments.seed, by_name=arguments.by_name))
    elif what == "inputs":
        from soak.inputs import InputDamager

        _say(InputDamager(server).trial(arguments.file, arguments.kind, arguments.seed))
    elif what == "failures":
        _say(server.damager().failing_save(arguments.change, arguments.errno))
    else:
        from soak.full_disk import DiskFiller

        _say(DiskFiller(server, server.damager().whole).trial(arguments.case))
    return 0


if __name__ == "__main__":
    sys.exit(main())
