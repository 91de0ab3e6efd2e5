"""The optimizer's whole way to a launch, through Triton's binding, cache and compiler, on a driver without a GPU."""

import importlib
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton")

from triton.runtime.driver import driver as drivers

from fake_driver import FakeDriver
from misa_engine import MISA
from misa_engine.kernels import backend
from training import batches, loss_of, tiny

OPERATIONS = ("adamw", "blockwise8", "finalise", "norm", "split_float")
KERNELS = {
    value.fn.__name__: value
    for name in OPERATIONS
    for key, value in vars(importlib.import_module(f"misa_engine.kernels.{name}.kernel")).items()
    if key.endswith("_kernel")
}
STEP = Counter(sum_of_squares_kernel=1, norm_parts_kernel=1, finalise_kernel=1, adamw_kernel=1)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Triton without a GPU, and a backend that takes tensors on the CPU for ones on it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    driver = FakeDriver()
    before = drivers._active
    drivers.set_active(driver)
    yield driver
    drivers._active = before
    for kernel in KERNELS.values():
        kernel.device_caches.pop(FakeDriver.DEVICE, None)


def build(**options):
    model = tiny("llama", torch.bfloat16)
    defaults = {"lr": 1e-3, "delta": 0.3, "inner_steps": 3, "cold_start": "none", "backend": "triton"}
    optimizer = MISA(model, **{**defaults, **options})
    optimizer.measure_on_arrival = "max_grad_norm" not in options
    return model, optimizer


def step(model, optimizer, data):
    loss_of(model, next(data)).backward()
    optimizer.step()
    optimizer.zero_grad()


#: Options, and what a step and a switch launch: numbers, or names of what there is one of for each matrix.
VARIANTS = {
    "clipped": ({"max_grad_norm": 1.0}, STEP, {}, ["round_stochastic_kernel"]),
    "eight bits": ({"max_grad_norm": 1.0, "state_dtype": "int8"}, STEP, {}, ["round_stochastic_kernel"]),
    "paper": (
        {"max_grad_norm": 1.0, "preset": "paper"},
        STEP,
        {"closing_coefficients_kernel": 1, "adamw_kernel": 1},
        [],
    ),
    "offload": (
        {"max_grad_norm": 1.0, "revisit": "offload", "leave_rounding": "keep", "rule": "cyclic"},
        STEP,
        {},
        ["compress_kernel"],
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_argument_binds_and_nothing_is_compiled_after_the_second_round(variant, gpu):
    options, per_step, per_switch, per_leaving = VARIANTS[variant]
    model, optimizer = build(**options)
    data = batches()
    while optimizer.round < (len(optimizer.units) if "rule" in options else 2):  # all have left and one has come back
        step(model, optimizer, data)
    warm = list(gpu.compiled)
    assert set(warm) == set(gpu.launches)
    for _ in range(6):
        before = set(optimizer.active)
        for inner in range(3):
            gpu.launches.clear()
            step(model, optimizer, data)
            expected = Counter(per_step)
            if inner == 2:
                left, come = before - set(optimizer.active), set(optimizer.active) - before
                expected += Counter(reduce_slots_kernel=1) if optimizer.config.score == "mean_square" else Counter()
                expected += Counter(per_switch) + Counter(dict.fromkeys(per_leaving, len(left)))
                expected += Counter(expand_kernel=len(come)) if variant == "offload" else Counter()
            assert gpu.launches == +expected
    assert gpu.compiled == warm


@pytest.mark.parametrize("preset", ["engine", "official"])
def test_updates_in_backward_are_launched_for_each_matrix_and_compile_nothing_new(preset, gpu):
    model, optimizer = build(update_in="backward", preset=preset)
    data = batches()
    while optimizer.round < 2:
        step(model, optimizer, data)
    warm = list(gpu.compiled)
    for _ in range(5):
        n = len(optimizer.active)
        gpu.launches.clear()
        step(model, optimizer, data)
        for name in ("sum_of_squares_kernel", "finalise_kernel", "adamw_kernel"):
            assert gpu.launches[name] == n
        assert gpu.launches["norm_parts_kernel"] == n + 1 and gpu.launches["global_norm_kernel"] == 1
        assert gpu.launches["reduce_slots_kernel"] >= (n if preset == "official" else 0)
    assert gpu.compiled == warm


def test_an_arrived_gradient_is_finalised_over_its_own_tiles_alone(gpu):
    model, optimizer = build(update_in="backward")
    spans = {}

    def watch(name):
        tiles = optimizer.arena.slots[optimizer._intake.slot_of[name]].tiles
        _, arguments = gpu.last["norm_parts_kernel"]
        named = dict(zip(KERNELS["norm_parts_kernel"].arg_names, arguments, strict=True))
        spans[name] = (named["first_tile"], named["end_tile"]) == (tiles.start, tiles.stop)

    know = optimizer._intake.places.know
    optimizer._intake.places.know = lambda names: (know(names), [watch(name) for name in names if len(names) == 1])
    loss_of(model, next(batches())).backward()
    assert spans == dict.fromkeys(optimizer.active, True)


def test_launchers_get_tensors_of_the_arena_and_of_the_table(gpu):
    _, optimizer = build(max_grad_norm=1.0)
    step(optimizer._model, optimizer, batches())
    grid, arguments = gpu.last["adamw_kernel"]
    named = dict(zip(KERNELS["adamw_kernel"].arg_names, arguments, strict=True))
    assert grid == (optimizer.arena.table.n_tiles, 1, 1)
    assert named["m"] is optimizer.arena.exp_avg and named["lo"] is optimizer.arena.residual
    assert named["measured"] is optimizer.arena.step_sumsq and named["wptr"] is optimizer.arena.table.wptr
