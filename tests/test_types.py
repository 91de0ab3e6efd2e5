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


def test_wrong_kernel_calls_are_type_errors_and_a_correct_one_is_not(tmp_path, monkeypatch):
    calls = tmp_path / "calls.py"
    calls.write_text(CALLS)
    (tmp_path / "mypy.ini").write_text("[mypy]\n")
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    # The bodies of torch are not what is checked: without them mypy takes 3 s instead of 40.
    options = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
    options += ["--no-error-summary", "--hide-error-context", "--follow-imports=silent"]
    output, problems, _ = api.run([*options, str(calls)])
    assert not problems, problems
    errors = [line for line in output.splitlines() if ": error: " in line]
    found = {int(line.split(":")[1]): line.split(": error: ")[1] for line in errors if line.startswith(str(calls))}
    assert len(errors) == len(COMPLAINTS) == len(found), output
    for line, complaint in COMPLAINTS.items():
        assert found[line].startswith(complaint), output
