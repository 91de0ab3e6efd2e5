"""Types reach from the engine into the kernels: mypy refuses a wrong call."""

from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api", reason="mypy checks the types")

ROOT = Path(__file__).parent.parent
CALLS = """
import torch
from torch import Tensor

from misa_engine.kernels.adamw import adamw
from misa_engine.kernels.tiles import TileTable


def update(grad: Tensor, m: Tensor, v: Tensor, lo: Tensor | None, table: TileTable) -> None:
    adamw(grad, m, v, lo, None, table, backend="reference", tiles=range(3))
    adamw(grad, m, v, lo, None, table.slots, backend="reference")
    adamw(grad, m, v, lo, None, table)
    adamw(grad, m, v, lo, None, table, backend="reference", tiles=3)
    adamw(grad, m, v, lo, None, table, backend="reference", measure=None)
"""
#: Line of CALLS (the correct call is line 10) and what mypy says there.
COMPLAINTS = {
    11: 'Argument 6 to "adamw" has incompatible type "tuple[Slot, ...]"; expected "TileTable"',
    12: 'Missing named argument "backend" for "adamw"',
    13: 'Argument "tiles" to "adamw" has incompatible type "int"; expected "range | None"',
    14: 'Unexpected keyword argument "measure" for "adamw"',
}


#: As much of torch as the kernels' signatures name: following torch itself takes mypy 100 s from an empty cache.
TORCH = """
from typing import Any, Callable, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

class no_grad:
    def __call__(self, function: _F) -> _F: ...

class Tensor:
    def __getattr__(self, name: str) -> Any: ...

def __getattr__(name: str) -> Any: ...
"""


def test_wrong_kernel_calls_are_type_errors_and_a_correct_one_is_not(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.pyi").write_text(TORCH)
    (tmp_path / "misa_engine").mkdir()
    (tmp_path / "misa_engine" / "__init__.py").touch()  # without the imports of the real one
    (tmp_path / "misa_engine" / "kernels").symlink_to(ROOT / "kernels")
    (tmp_path / "calls.py").write_text(CALLS)
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-numpy.*,triton.*]\nfollow_imports = skip\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MYPYPATH", str(tmp_path))
    options = ["--config-file=mypy.ini", "--cache-dir=cache", "--no-error-summary", "--follow-imports=silent"]
    output, problems, _ = api.run([*options, "calls.py"])
    assert not problems, problems
    errors = [line for line in output.splitlines() if line.startswith("calls.py:") and ": error: " in line]
    found = {int(line.split(":")[1]): line.split(": error: ")[1] for line in errors}
    assert len(errors) == len(COMPLAINTS) == len(found), output
    for line, complaint in COMPLAINTS.items():
        assert found[line].startswith(complaint), output
