"""What the whole optimizer must do on a device, told once for a GPU, a CPU and Triton's interpreter.

``python tests/optimizer_cases.py triton`` runs every case on the CPU with that backend and prints {case: complaint} as
JSON; with TRITON_INTERPRET=1 in the environment the kernels run there.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from misa_engine import MISA
from misa_engine.engine.residents import residents_of, rest
from misa_engine.kernels.backend import interpreting
from training import batches, loss_of, tiny, train, weights

OPTIONS = {"lr": 1e-2, "delta": 0.3, "inner_steps": 2, "cold_start": "none", "weight_decay": 0.1, "rest": "none"}


def model_on(device: str, dtype: torch.dtype = torch.bfloat16, **options) -> nn.Module:
    # flash attention adds up in a changing order, and two runs would differ
    return tiny("llama", dtype, attn_implementation="eager", **options).to(device)


def data_on(device: str, seed: int = 0) -> Iterator[Tensor]:
    return (ids.to(device) for ids in batches(seed))


@contextlib.contextmanager
def nothing_waits(device: str) -> Iterator[None]:
    """Whatever waits for a GPU is an error in here."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.detach().cpu(), q.detach().cpu()), f"{name} differs"


def trained(device: str, backend: str, steps: int = 7, **options) -> tuple[nn.Module, MISA]:
    model = model_on(device)
    optimizer = MISA(model, **{**OPTIONS, "backend": backend, **options})
    assert optimizer.backend == backend
    losses = train(model, optimizer, data_on(device), steps)
    assert all(loss == loss for loss in losses) and optimizer.skipped_steps == 0
    return model, optimizer


def equals_reference(**options) -> Callable[[str, str], None]:
    """Weights, draws and step counts of a run are those of the reference, bit for bit, on the same device."""

    def case(device: str, backend: str) -> None:
        (a, first), (b, second) = trained(device, backend, **options), trained(device, "reference", **options)
        assert first.active == second.active and first.round == second.round > 2
        same_weights(a, b)
        for name, (steps, buffers) in first.host.state_dict().items():
            assert steps == second.host.state_dict()[name][0]
            for category, buffer in buffers.items():
                assert torch.equal(buffer, second.host.state_dict()[name][1][category]), (name, category)

    return case


def both_schedules(device: str, backend: str) -> None:
    """``update_in="backward"`` makes the bits of ``update_in="step"``, and holds no gradient."""
    (a, _), (b, late) = (trained(device, backend, update_in=when) for when in ("step", "backward"))
    same_weights(a, b)
    assert late.arena.grad is None and all(p.grad is None for p in b.parameters())


def float32_slots(device: str, backend: str) -> None:
    """A float32 slot holds the sum over micro-batches to float32, where bfloat16 slots round it at each."""
    errors = {}
    for grad_dtype in ("float32", "weight"):
        exact: dict[str, Tensor] = {}
        model = model_on(device)
        optimizer = MISA(model, **{**OPTIONS, "delta": 1.0, "backend": backend, "grad_dtype": grad_dtype})
        written = []
        gemm = optimizer._intake._gemm
        assert gemm is not None
        write = gemm.write

        def watched(name, left, right, write=write, exact=exact, written=written):
            product = left.double().t() @ right.double()
            exact[name] = exact[name] + product if name in exact else product
            written.append(name)
            return write(name, left, right)

        gemm.write = watched
        for ids, _ in zip(data_on(device), range(4), strict=False):
            loss_of(model, ids).backward()
        assert len(written) == 4 * len(optimizer.units)
        worst = 0.0
        for name, total in exact.items():
            gradient = model.get_parameter(name).grad
            assert gradient.dtype == (torch.float32 if grad_dtype == "float32" else torch.bfloat16)
            worst = max(worst, float((gradient.double() - total).norm() / total.norm()))
        errors[grad_dtype] = worst
    assert errors["float32"] < 1e-5 < 1e-3 < errors["weight"] < 2e-2, errors


def checkpointing(device: str, backend: str) -> None:
    """Recomputed activations give the same gradients into the same slots, and the same training."""
    models = []
    for recompute in (False, True):
        model = model_on(device)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        train(model, MISA(model, **{**OPTIONS, "backend": backend}), data_on(device), 7)
        models.append(model)
    same_weights(*models)


def steps_never_wait(device: str, backend: str) -> None:
    """Backward, clipping, schedule and step wait for nothing but at the end of a round; nor with 2 micro-batches."""
    variants = (
        {},
        {"state_dtype": "int8"},
        {"grad_dtype": "float32"},
        {"update_in": "backward"},
        {"preset": "official"},
    )
    for options in variants:
        model = model_on(device)
        late = options.get("update_in") == "backward"
        optimizer = MISA(model, **{**OPTIONS, "inner_steps": 6, "backend": backend, **options})
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        data = data_on(device)
        for step in range(12):
            ends_round = optimizer.inner_step + 1 == optimizer.tracker.round_length
            for last in (False, True):
                optimizer.last_micro_batch = last
                loss = loss_of(model, next(data))
                with nothing_waits("cpu" if step < 6 else device):  # kernels are compiled and loaded in the first round
                    loss.backward()
            with nothing_waits("cpu" if step < 6 or ends_round else device):
                if not late:
                    optimizer.clip_grad_norm_(1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        assert optimizer.round == 2 and optimizer.empty_steps == 0


def switches_allocate_nothing(device: str, backend: str) -> None:
    """200 switches on a GPU: the allocator holds what it held once every matrix had left."""
    on_gpu = device != "cpu"
    model = model_on(device)
    options = {"rule": "cyclic", "revisit": "offload", "leave_rounding": "keep"}
    optimizer = MISA(model, **{**OPTIONS, "inner_steps": 1, "backend": backend, **options})
    data = data_on(device)
    warm_up, switches = (40, 200) if on_gpu else (15, 4)
    train(model, optimizer, data, warm_up)
    places = {name: buffer.data_ptr() for name, buffer in optimizer.arena.buffers().items()}
    memory = optimizer.memory()
    held = reserved = 0
    if on_gpu:
        torch.cuda.synchronize()
        held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    before = optimizer.round
    train(model, optimizer, data, switches)
    assert optimizer.round == before + switches
    assert {name: buffer.data_ptr() for name, buffer in optimizer.arena.buffers().items()} == places
    assert optimizer.memory() == memory
    if on_gpu:
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == held, (torch.cuda.memory_allocated(), held)
        assert torch.cuda.memory_reserved() == reserved, (torch.cuda.memory_reserved(), reserved)
        assert torch.cuda.memory_stats()["num_alloc_retries"] == 0


def resting_on(device: str, backend: str, format: str = "int8", **options) -> nn.Module:
    """A bfloat16 model whose exact weights stay on the CPU, and whose 8 bits lie on the device."""
    model = tiny("llama", torch.bfloat16, attn_implementation="eager", **options)
    rest(model, format, device, backend=backend)
    return model


def residents_in(format: str, **options) -> Callable[[str, str], None]:
    """Masters, 8 bits and what is saved are those of the reference, bit for bit, on the same device."""

    def case(device: str, backend: str) -> None:
        found = []
        for which in (backend, "reference"):
            model = resting_on(device, which, format, num_hidden_layers=1)
            optimizer = MISA(model, **{**OPTIONS, "delta": 0.4, "backend": which, **options})
            train(model, optimizer, data_on(device), 3 if interpreting() else 9)
            residents = residents_of(model)
            assert residents is not None and residents.resting
            for name in residents.resting:
                assert model.get_parameter(name).device.type == "cpu"
                assert model.get_parameter(name).is_pinned() == (device == "cuda")
            for name in optimizer.active:
                assert model.get_parameter(name).device == residents.device
            codes = [residents.expanded(name).cpu() for name in residents.names if name in residents.resting]
            found.append((optimizer.active, [tensor.cpu() for tensor in model.state_dict().values()], codes))
        (active, saved, codes), (other_active, other_saved, other_codes) = found
        assert active == other_active
        assert all(map(torch.equal, saved, other_saved)) and all(map(torch.equal, codes, other_codes))

    return case


def residents_allocate_nothing(device: str, backend: str) -> None:
    """With residents, steps and switches leave a GPU's memory as it was, and all of it is accounted for."""
    on_gpu = device != "cpu"
    if on_gpu:  # what the first products and passes of a process take for good (cuBLAS) is not ours
        loss_of(model_on(device), next(data_on(device))).backward()
        gc.collect()
        torch.cuda.synchronize()
    empty = torch.cuda.memory_allocated() if on_gpu else 0
    model = resting_on(device, backend)
    optimizer = MISA(model, **{**OPTIONS, "inner_steps": 1, "rule": "cyclic", "backend": backend})
    data = data_on(device)
    train(model, optimizer, data, 40 if on_gpu else 6)
    memory = optimizer.memory()
    counted = sum(size for name, size in memory.items() if not name.startswith("host_"))
    held = 0
    if on_gpu:
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        # the allocator rounds each of some 200 tensors up to 512 bytes
        assert counted <= held - empty <= counted + 200 * 512 + (1 << 20), (counted, held - empty)
    train(model, optimizer, data, 50 if on_gpu else 4)
    assert optimizer.memory() == memory
    if on_gpu:
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == held


def a_skipped_step(device: str, backend: str) -> None:
    """A gradient that is not finite changes nothing but a counter, which the end of the round brings."""
    model = model_on(device)
    optimizer = MISA(model, **{**OPTIONS, "inner_steps": 4, "backend": backend})
    data = data_on(device)
    train(model, optimizer, data, 2)
    before = weights(model)
    loss_of(model, next(data)).backward()
    model.get_parameter(optimizer.active[0]).grad.view(-1)[0] = float("inf")
    optimizer.step()
    optimizer.zero_grad()
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(name), weight), name
    train(model, optimizer, data, 1)
    assert optimizer.skipped_steps == 1


CASES: dict[str, Callable[[str, str], None]] = {
    "preset_engine": equals_reference(preset="engine"),
    "preset_paper": equals_reference(preset="paper"),
    "preset_official": equals_reference(preset="official"),
    "int8": equals_reference(state_dtype="int8", grad_dtype="float32"),
    "int8_in_backward": equals_reference(state_dtype="int8", update_in="backward"),
    "offload": equals_reference(rule="cyclic", revisit="offload", leave_rounding="keep", inner_steps=1, steps=30),
    "keep": equals_reference(rule="cyclic", revisit="keep", leave_rounding="keep", inner_steps=1, steps=30),
    "rest": equals_reference(rest="sign"),
    "both_schedules": both_schedules,
    "float32_slots": float32_slots,
    "checkpointing": checkpointing,
    "steps_never_wait": steps_never_wait,
    "switches_allocate_nothing": switches_allocate_nothing,
    "a_skipped_step": a_skipped_step,
    "residents_int8": residents_in("int8"),
    "residents_int8_row": residents_in("int8_row", update_in="backward"),
    "residents_fp8": residents_in("fp8", leave_rounding="keep", state_dtype="int8"),
    "residents_allocate_nothing": residents_allocate_nothing,
}


def main() -> None:
    torch.set_num_threads(1)
    report = {}
    for name in sys.argv[2:] or CASES:
        try:
            CASES[name]("cpu", sys.argv[1])
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
