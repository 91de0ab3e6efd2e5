"""Imports within the kernels: no circles, and Triton only where a kernel is."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "kernels"
PACKAGE = "misa_engine.kernels"


def imports() -> dict[str, set[str]]:
    """{module: what it imports}, imports inside functions included; names inside the package start with a dot."""
    files = {path: path.relative_to(KERNELS).with_suffix("").parts for path in KERNELS.rglob("*.py")}
    names = {".".join(("", *parts)).removesuffix(".__init__") for parts in files.values()}
    graph = {}
    for path, parts in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(("", *parts[: len(parts) - node.level], *(node.module or "").split("."))).rstrip(".")
                modules = {f"{base}.{alias.name}" for alias in node.names} & names
                found |= modules or {base}
        graph[".".join(("", *parts)).removesuffix(".__init__")] = found
    return graph


def test_no_import_circle_even_inside_functions():
    graph = imports()
    assert {".finalise", ".adamw.kernel", ".adamw.reference"} <= graph[".adamw"]  # the search sees lazy imports
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index(".tiles") < order.index(".norm") < order.index(".finalise") < order.index(".adamw")


def test_triton_is_named_by_kernels_and_their_columns_alone():
    graph = imports()
    users = {module for module, found in graph.items() if "triton" in found}
    assert users == {".columns"} | {module for module in graph if module.endswith(".kernel")}


def test_the_references_run_where_triton_cannot_be_imported():
    script = f"""
import sys
sys.modules["triton"] = None  # any import of it raises
import torch
from {PACKAGE} import adamw, blockwise8, finalise, norm, split_float
from {PACKAGE}.tiles import BLOCK, Control, Slot, TileTable, bias_table, hyper_row
table, control = TileTable.allocate(1, 1, "cpu"), Control.allocate("cpu")
table.bind([Slot(torch.ones(BLOCK), 0, BLOCK, 0)])
table.slot_present.fill_(1)
grad, m, v, sums = torch.ones(BLOCK), torch.zeros(BLOCK), torch.zeros(BLOCK), torch.zeros(1)
hyper = torch.tensor([hyper_row(0.5, (0.9, 0.99), 0.0, 0.0)])
bias = bias_table([(0.9, 0.99)], enabled=True, device="cpu")
norm.sum_of_squares(grad, sums, table, backend="reference")
finalise.finalise(sums, hyper, bias, table, control, skip_nonfinite=True, backend="reference")
adamw.adamw(grad, m, v, None, None, table, backend="reference")
print(round(table.slots[0].weight.mean().item(), 4), control.grad_norm.item())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0.5", "32.0"]
