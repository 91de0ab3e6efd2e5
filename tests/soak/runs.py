"""Material for runs of ``misa train``, the client of ``soak.server``, and what two runs must have in common."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from misa_engine.report.log import RunLog
from models import TINY
from soak.oracle import Finding

if TYPE_CHECKING:
    from soak.damage import Damager

TESTS = Path(__file__).resolve().parents[1]

#: Option sets of a run; all end at step 11, inside an epoch.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulating": {"gradient_accumulation_steps": 2, "save_total_limit": 2},
    "int8": {"state_dtype": "int8", "leave_rounding": "keep", "save_total_limit": 1},
    "backward": {"update_in": "backward", "max_grad_norm": 0, "save_steps": 2},
    "offload": {"revisit": "offload", "granularity": "block", "delta": 0.5},
    "official": {"preset": "official", "lr_scheduler_type": "cosine", "save_steps": 2},
    "evaluating": {"eval_fraction": 0.2, "eval_strategy": "steps", "eval_steps": 3},
}


@dataclass
class Child:
    """A run under way."""

    pid: int
    output: Path
    server: Server
    started: float = field(default_factory=time.monotonic)

    def kill(self, number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """Exit code and everything it printed."""
        code = self.server.ask({"wait": self.pid})
        return code, self.output.read_text(encoding="utf-8", errors="replace")


class Server:
    """The forking process, its material, and a directory for runs.

    Args:
        place: an empty directory.
    """

    def __init__(self, place: Path):
        self.place, self._number = place, 0
        self._damager: Damager | None = None
        self._material(place / "material")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", str(TESTS.parent))]),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(place / "cache"),
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "agg",
            "TQDM_DISABLE": "1",
        }
        pipe, log = subprocess.PIPE, open(place / "server.log", "w")  # noqa: SIM115
        arguments = [sys.executable, "-m", "soak.server"]
        self._process = subprocess.Popen(arguments, env=environment, stdin=pipe, stdout=pipe, stderr=log, text=True)

    def _material(self, folder: Path) -> None:
        from transformers import ByT5Tokenizer

        folder.mkdir(parents=True)
        TINY["llama"](vocab_size=384).to(torch.bfloat16).save_pretrained(folder / "model")
        ByT5Tokenizer().save_pretrained(folder / "model")
        source = random.Random(0)
        records = [{"text": "".join(source.choice("abcdefgh ") for _ in range(30))} for _ in range(24)]
        (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the forking server died: {(self.place / 'server.log').read_text()[-2000:]}")
        return int(answer)

    def start(self, out: Path, *more: str, trap: dict[str, Any] | None = None, **options: Any) -> Child:
        """Start ``misa train`` into ``out``."""
        words = {
            "model_name_or_path": self.place / "material/model",
            "dataset": self.place / "material/data.jsonl",
            "output_dir": out,
            "delta": 0.2,
            "inner_steps": 3,
            "learning_rate": 1e-2,
            "max_steps": 11,
            "save_steps": 4,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "max_length": 32,
            **options,
        }
        argv = ["train", *[word for name, value in words.items() for word in (f"--{name}", str(value))], *more]
        self._number += 1
        output = self.place / f"output-{self._number}.txt"
        return Child(self.ask({"argv": argv, "output": str(output), "trap": trap}), output, self)

    def run(self, out: Path, *more: str, limit_s: float = 0.0, **options: Any) -> tuple[int, str]:
        """Run to the end; after ``limit_s`` seconds, if given, SIGKILL."""
        child = self.start(out, *more, **options)
        deadline = time.monotonic() + limit_s
        while limit_s and alive(child.pid):
            if time.monotonic() > deadline:
                child.kill()
                break
            time.sleep(0.01)
        return child.wait()

    def damager(self) -> Damager:
        """What damages checkpoints of this server's runs; made once."""
        if self._damager is None:
            from soak.damage import Damager

            self._damager = Damager(self)
        return self._damager

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def alive(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def checkpoints_in(out: Path) -> list[Path]:
    """Folders that go by the name of a checkpoint, by step."""
    found = [path for path in out.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def check_whole(out: Path) -> bool:
    """Read every checkpoint to its end, without the code that is under attack. Returns whether there is one.

    Raises:
        Finding: one is not whole.
    """
    for checkpoint in checkpoints_in(out):
        try:
            step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
            assert step == int(checkpoint.name.removeprefix("checkpoint-"))
            weights_of(checkpoint)
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.load(checkpoint / name, weights_only=False)  # our own file
            listed = json.loads((checkpoint / "misa_manifest.json").read_text())["files"]
            for name, entry in listed.items():
                assert hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == entry["sha256"], name
        except Exception as error:
            raise Finding(f"{checkpoint.name} is not whole: {type(error).__name__} {error}") from error
    return bool(checkpoints_in(out))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def compare_runs(whole: Path, other: Path, *, tidy: bool = True) -> None:
    """Hold a disturbed run to one left in peace: final weights bit for bit, one continuous log.

    ``tidy`` also asks that nothing unfinished is left.

    Raises:
        Finding: what differs.
    """
    expected, found = weights_of(whole), weights_of(other)
    wrong = [name for name in expected if name not in found or not torch.equal(expected[name], found[name])]
    if wrong:
        raise Finding(f"final weights differ from the undisturbed run's in {len(wrong)} tensors, {wrong[0]} first")
    logs = [RunLog.read(folder) for folder in (whole, other)]
    if [entry["type"] for entry in logs[1]].count("run") != 1:
        raise Finding("the log has not exactly one beginning")
    for kind, keys in (("switch", ("round", "active", "scores", "visits")), ("end", ("visits", "relative_change"))):
        first, second = ([[e["step"], *(e[k] for k in keys)] for e in log if e["type"] == kind] for log in logs)
        if first != second:
            raise Finding(f"the log's {kind} entries differ: {len(first)} and {len(second)}")
    for key in ("loss", "eval_loss"):
        first, second = ([(entry["step"], entry[key]) for entry in log if key in entry] for log in logs)
        if first != second:
            raise Finding(f"the log's {key} differs: steps {[s for s, _ in first]} and {[s for s, _ in second]}")
    if tidy and (other / "_unfinished").exists():
        raise Finding("_unfinished was left behind")
