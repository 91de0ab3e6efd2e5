"""How often a step reaches for the device: kernel launches, host synchronisations, allocations. No clock involved."""

import importlib
import inspect
import sys
from collections import Counter

import pytest
import torch

from misa_engine import MISA
from training import batches, loss_of, tiny

#: Everything through which Python reads a tensor's value, which on a GPU waits for all queued work.
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


OPERATIONS = ("adamw", "blockwise8", "finalise", "norm", "rest", "split_float")


class Recorder:
    """Counts launches and reads."""

    def __init__(self):
        self.launches, self.reads = Counter(), Counter()


class CountedKernel:
    """Stands in for a Triton kernel: binds the arguments as Triton does, counts the launch and runs nothing."""

    def __init__(self, kernel, recorder):
        self._kernel, self._recorder = kernel, recorder

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *args, num_warps=4, enable_fp_fusion=True, maxnreg=None, **kwargs):
        inspect.signature(self._kernel.fn).bind(*args, **kwargs)
        self._recorder.launches[self._kernel.fn.__name__] += 1


@pytest.fixture
def device(monkeypatch):
    """Triton's side of the optimizer on a CPU: launches are counted, reads of tensors too."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    recorder = Recorder()
    # Imported before TRITON_INTERPRET is set, which would turn them into interpreted functions for the whole process.
    for module in [importlib.import_module(f"misa_engine.kernels.{name}.kernel") for name in OPERATIONS]:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, CountedKernel(kernel, recorder))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets backend="triton" pass without a GPU
    for name in READS:
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            # the sampler's tensors live on the host whatever the device
            if not sys._getframe(1).f_code.co_filename.endswith(("sampling.py", "rules.py")):
                recorder.reads[_name] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return recorder


def one_step(model, optimizer, device, clip=None, micro_batches=1):
    """Launches and reads of a step, without those of the model's own forward and backward."""
    for _ in range(micro_batches):
        loss = loss_of(model, next(batches()))
        before = Counter(device.reads)
        loss.backward()
        assert device.reads == before  # nothing of ours reads a tensor in the backward pass
    device.reads.clear()
    if clip is not None:
        optimizer.clip_grad_norm_(clip)
    optimizer.step()
    optimizer.zero_grad()
    launches, reads = dict(device.launches), dict(device.reads)
    device.launches.clear(), device.reads.clear()
    return launches, reads


def build(**options):
    model = tiny("llama", torch.bfloat16)
    defaults = {"lr": 1e-3, "delta": 0.3, "inner_steps": 3, "cold_start": "none", "backend": "triton"}
    optimizer = MISA(model, **defaults, **options)
    optimizer.measure_on_arrival = "max_grad_norm" not in options  # MISA alone clips here: nothing needs a second norm
    return model, optimizer


CLIPPED = {"sum_of_squares_kernel": 1, "finalise_kernel": 1, "adamw_kernel": 1}


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"grad_dtype": "float32"}], ids=str)
def test_a_clipped_step_is_three_launches_and_reads_nothing_back(device, options):
    model, optimizer = build(max_grad_norm=1.0, **options)
    device.launches.clear()
    for _ in range(2):
        assert one_step(model, optimizer, device, micro_batches=2) == (CLIPPED, {})


def test_clipping_by_the_trainer_costs_a_norm_of_its_own(device):
    model, optimizer = build()
    optimizer.measure_on_arrival = False
    device.launches.clear()
    expected = {**CLIPPED, "sum_of_squares_kernel": 2, "global_norm_kernel": 1}  # the step checks what it uses
    assert one_step(model, optimizer, device, clip=1.0) == (expected, {})


def test_norms_on_arrival_are_one_more_launch_for_each_active_matrix(device):
    model, optimizer = build()
    device.launches.clear()
    launches, reads = one_step(model, optimizer, device)
    assert reads == {}
    arrivals = launches.pop("sum_of_squares_kernel")
    assert arrivals == len(optimizer.active) + 1 and launches == {"finalise_kernel": 1, "adamw_kernel": 1}


def test_updates_in_backward_are_three_launches_for_each_active_matrix(device):
    model, optimizer = build(update_in="backward")
    device.launches.clear()
    n = len(optimizer.active)
    expected = {**dict.fromkeys(CLIPPED, n), "global_norm_kernel": 1}
    assert one_step(model, optimizer, device) == (expected, {})


@pytest.mark.parametrize(("rule", "sums"), [("sign", 1), ("row_norm", 1), ("sinkhorn", 5)])
def test_a_matrix_that_rests_is_three_launches_and_eight_more_by_sinkhorn(device, rule, sums):
    model, optimizer = build(max_grad_norm=1.0, rest=rule)
    device.launches.clear()
    launches, reads = one_step(model, optimizer, device)
    resting = len(optimizer.units) - len(optimizer.active)
    moves = {name: launches.pop(name, 0) for name in ("row_sums_kernel", "col_sums_kernel", "factors_kernel")}
    assert launches == {**CLIPPED, "move_kernel": resting} and reads == {}
    assert moves["row_sums_kernel"] + moves["col_sums_kernel"] == moves["factors_kernel"] == sums * resting


@pytest.mark.parametrize("options", [{}, {"revisit": "offload", "leave_rounding": "keep"}], ids=str)
def test_a_switch_reads_back_once(device, options):
    model, optimizer = build(max_grad_norm=1.0, **options)
    for _ in range(2):
        one_step(model, optimizer, device)
    active = set(optimizer.active)
    launches, reads = one_step(model, optimizer, device)
    left = active - set(optimizer.active)
    assert left and reads == {"tolist": 1}
    assert launches.pop("reduce_slots_kernel") == 1
    extra = {"round_stochastic_kernel": len(left)} if not options else {"compress_kernel": len(left)}
    assert launches == {**CLIPPED, **extra}


def test_a_step_allocates_nothing_that_lasts(device):
    model, optimizer = build(max_grad_norm=1.0)
    for _ in range(2):
        one_step(model, optimizer, device)
    held = [p for p in model.parameters() if p.grad is not None]
    assert held == []
    low, high = optimizer.arena.grad.data_ptr(), optimizer.arena.grad.data_ptr() + optimizer.arena.grad.nbytes
    loss_of(model, next(batches())).backward()
    for p in model.parameters():
        assert p.grad is None or low <= p.grad.data_ptr() < high
