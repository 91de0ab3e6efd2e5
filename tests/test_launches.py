"""How often a step reaches for the device: kernel launches, host synchronisations, allocations. No clock involved."""

import importlib
import inspect
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from misa_engine import MISA
from misa_engine.engine import arena as arena_module
from misa_engine.engine import host_pool
from misa_engine.kernels import tiles
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


def tensors_in(*owners) -> list[torch.Tensor]:
    return [value for owner in owners for value in vars(owner).values() if isinstance(value, torch.Tensor)]


class Uploads(TorchDispatchMode):
    """Copies into memory that is the device's on a GPU, from memory that is not.

    Memory is the device's if it belongs to the model, is one of the optimizer's buffers, or was computed from such.
    """

    def __init__(self, model, optimizer, staged):
        super().__init__()
        held = [*model.parameters(), *model.buffers()]
        held += tensors_in(optimizer.arena, optimizer.arena.table, optimizer._kernels, optimizer._kernels.control)
        self._device = {tensor.untyped_storage().data_ptr() for tensor in held}
        self._kept = held  # an address is not given away again
        self._staged = staged
        self.uploads: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        places = [x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func is torch.ops.aten.copy_.default:
            if places[0] in self._device and places[1] not in self._device:
                waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
                self.uploads["pageable" if waits or places[1] not in self._staged else "pinned"] += 1
        elif self._device.intersection(places):
            made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            self._device |= {x.untyped_storage().data_ptr() for x in made}
            self._kept += made
        return result


@pytest.fixture
def staged(monkeypatch):
    """Memory that would be pinned on a GPU."""
    addresses, kept, own = set(), [], tiles.host_buffer

    def recorded(*args):
        buffer = own(*args)
        kept.append(buffer)  # an address is not given away again
        addresses.add(buffer.untyped_storage().data_ptr())
        return buffer

    for module in (tiles, arena_module, host_pool):
        monkeypatch.setattr(module, "host_buffer", recorded)
    return addresses


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
    optimizer = MISA(model, **{**defaults, **options})
    optimizer.measure_on_arrival = "max_grad_norm" not in options  # MISA alone clips here: nothing needs a second norm
    return model, optimizer


CLIPPED = {"sum_of_squares_kernel": 1, "norm_parts_kernel": 1, "finalise_kernel": 1, "adamw_kernel": 1}


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"grad_dtype": "float32"}], ids=str)
def test_a_clipped_step_is_four_launches_and_reads_nothing_back(device, options):
    model, optimizer = build(max_grad_norm=1.0, **options)
    device.launches.clear()
    for _ in range(2):
        assert one_step(model, optimizer, device, micro_batches=2) == (CLIPPED, {})


def test_clipping_by_the_trainer_costs_a_norm_of_its_own(device):
    model, optimizer = build()
    optimizer.measure_on_arrival = False
    device.launches.clear()
    twice = {"sum_of_squares_kernel": 2, "norm_parts_kernel": 2}
    expected = {**CLIPPED, **twice, "global_norm_kernel": 1}  # the step checks what it uses
    assert one_step(model, optimizer, device, clip=1.0) == (expected, {})


def test_norms_on_arrival_are_one_more_launch_for_each_active_matrix(device):
    model, optimizer = build()
    device.launches.clear()
    launches, reads = one_step(model, optimizer, device)
    assert reads == {}
    arrivals = launches.pop("sum_of_squares_kernel")
    assert arrivals == len(optimizer.active) + 1 and launches == {
        "norm_parts_kernel": 1,
        "finalise_kernel": 1,
        "adamw_kernel": 1,
    }


def test_updates_in_backward_are_four_launches_for_each_active_matrix(device):
    model, optimizer = build(update_in="backward")
    device.launches.clear()
    n = len(optimizer.active)
    expected = {**dict.fromkeys(CLIPPED, n), "norm_parts_kernel": n + 1, "global_norm_kernel": 1}
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


# ---- copies from the host ----


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"preset": "paper"}, {"preset": "official"}], ids=str)
def test_a_switch_is_one_pinned_copy_from_the_host(device, staged, options):
    model, optimizer = build(**options)
    one_step(model, optimizer, device)
    before = optimizer.active
    with Uploads(model, optimizer, staged) as counted:
        optimizer.end_round()
    assert set(optimizer.active) != set(before)
    assert counted.uploads == {"pinned": 1}


def test_what_was_kept_of_a_matrix_comes_back_in_one_pinned_copy_a_buffer(device, staged):
    model, optimizer = build(rule="cyclic", revisit="keep", leave_rounding="keep")
    known = set()
    for _ in range(20):
        before = set(optimizer.active)
        known |= before
        with Uploads(model, optimizer, staged) as counted:
            optimizer.end_round()
        back = len((set(optimizer.active) - before) & known)
        assert counted.uploads == {"pinned": 1 + 3 * back}  # the tables; both moments and the residual bits
    assert back


def test_steps_of_a_round_copy_nothing_but_a_changed_learning_rate(device, staged):
    model, optimizer = build(max_grad_norm=1.0, inner_steps=100)
    one_step(model, optimizer, device)
    for lr, expected in ((1e-3, {}), (5e-4, {"pinned": 1})):
        optimizer.param_groups[0]["lr"] = lr
        loss_of(model, next(batches())).backward()
        with Uploads(model, optimizer, staged) as counted:
            optimizer.step()
        optimizer.zero_grad()
        assert counted.uploads == expected
