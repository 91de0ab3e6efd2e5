"""Small arenas for the kernel tests, and the comparisons that have to run in Triton's interpreter.

The interpreter is chosen by an environment variable before the kernels are imported, so these comparisons run in a
process of their own: ``TRITON_INTERPRET=1 python tests/kernel_cases.py`` prints {case: complaint or ""} as JSON.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from misa_engine.kernels import norm
from misa_engine.kernels.adamw import adamw, closing_step
from misa_engine.kernels.norm import finalise, global_norm, reduce_slots, sum_of_squares
from misa_engine.kernels.split_float import round_stochastic_
from misa_engine.kernels.split_float import split as split_halves
from misa_engine.kernels.tiles import BLOCK, Control, Slot, TileTable, bias_table, hyper_row
from torch import Tensor

NAN = float("nan")
BETAS = [(0.9, 0.999), (0.8, 0.99)]
EVEN_SIZES = (2 * BLOCK + 48, 512, BLOCK, 16)
ODD_SIZES = (1, 33, 2 * BLOCK + 7, BLOCK)

# Zeros, subnormals, the smallest and largest normal numbers, ties and neighbours of ties between two bfloat16 values.
BOUNDARY_BITS = [0x0, 0x1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001]
BOUNDARY_BITS += [0x3F817FFF, 0x3F818001, 0x33800000, 0x7F000000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x00808000]


@dataclass
class Arena:
    """Buffers, tables and slots as arena.py lays them out; unused capacity and padding are poisoned with NaN."""

    table: TileTable
    control: Control
    grad: Tensor
    m: Tensor
    v: Tensor
    lo: Tensor | None
    tile_sumsq: Tensor
    partial: Tensor
    hyper: Tensor
    bias: Tensor
    backend: str
    memory: list[Tensor] = field(default_factory=list)  # holds the weights and a guard element on either side

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.table.slots

    @property
    def weights(self) -> list[Tensor]:
        return [slot.weight for slot in self.slots]

    def of(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[slot.start : slot.start + slot.numel] for slot in self.slots]

    def state(self) -> dict[str, Tensor]:
        """Everything that a step may change, without the padding of the slots, on the CPU."""
        buffers = {"m": self.m, "v": self.v, "lo": self.lo}
        named = {f"weight {index}": weight.clone() for index, weight in enumerate(self.weights)}
        for name, buffer in buffers.items():
            if buffer is not None:
                named |= {f"{name} {index}": part.clone() for index, part in enumerate(self.of(buffer))}
        named |= {name: getattr(self.table, name).clone() for name in ("slot_step", "slot_measured")}
        return {name: tensor.cpu() for name, tensor in named.items()}

    def everything(self) -> list[Tensor]:
        """Clones of all memory, padding and guards included."""
        parts = [self.m, self.v, self.tile_sumsq, *self.memory]
        parts += [self.table.slot_step, self.table.slot_measured]
        return [part.clone() for part in parts + ([] if self.lo is None else [self.lo])]

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        for part, gradient in zip(self.of(self.grad), gradients, strict=True):
            part.copy_(gradient)

    def measure(self) -> None:
        sum_of_squares(self.grad, self.partial, self.table, backend=self.backend)

    def update(self, *, skip_nonfinite: bool = True, normed: bool = True, measured: Tensor | None = None) -> None:
        partial = self.partial if normed else None
        finalise(
            partial,
            self.hyper,
            self.bias,
            self.table,
            self.control,
            skip_nonfinite=skip_nonfinite,
            backend=self.backend,
        )
        buffers = self.grad, self.m, self.v, self.lo, self.tile_sumsq
        adamw(*buffers, self.table, backend=self.backend, measured=measured)

    def close(self) -> None:
        closing_step(self.m, self.v, self.lo, self.hyper, self.bias, self.table, backend=self.backend)


def make_arena(
    weights: Sequence[Tensor],
    *,
    backend: str = "reference",
    grad_dtype: torch.dtype | None = None,
    split: bool = True,
    lr: float = 1e-3,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    bias_correction: bool = True,
    gap: int = 1,
    device: str = "cpu",
    first_tile: int = 0,
) -> Arena:
    """Lay copies of ``weights`` out with ``gap`` unused tiles between them; the slots alternate between two groups."""
    start, slots, memory = first_tile * BLOCK, [], []
    for index, weight in enumerate(weights):
        guard = 16 if weight.numel() % 16 == 0 else 1  # keeps the address of even sizes aligned
        held = torch.full((weight.numel() + 2 * guard,), NAN, dtype=weight.dtype, device=device)
        held[guard:-guard] = weight.to(device)
        memory.append(held)
        slots.append(Slot(held[guard:-guard], start, weight.numel(), index % 2))
        start += (slots[-1].n_tiles + gap) * BLOCK
    table = TileTable.allocate(start // BLOCK + 1, len(slots) + 1, device)
    table.bind(slots)
    table.slot_present[: len(slots)] = 1
    capacity = start + BLOCK
    arena = Arena(
        table=table,
        control=Control.allocate(device),
        grad=torch.full((capacity,), NAN, dtype=grad_dtype or weights[0].dtype, device=device),
        m=torch.full((capacity,), NAN, device=device),
        v=torch.full((capacity,), NAN, device=device),
        lo=torch.full((capacity,), 12345, dtype=torch.int16, device=device) if split else None,
        tile_sumsq=torch.zeros(capacity // BLOCK, device=device),
        partial=torch.full((capacity // BLOCK,), NAN, device=device),
        hyper=torch.tensor(
            [hyper_row(lr, BETAS[0], eps, weight_decay), hyper_row(3 * lr, BETAS[1], 100 * eps, 0.0)], device=device
        ),
        bias=bias_table(BETAS, enabled=bias_correction, device=device),
        backend=backend,
        memory=memory,
    )
    for buffer in (arena.m, arena.v, arena.lo):
        for part in arena.of(buffer) if buffer is not None else ():
            part.zero_()
    return arena


def random_weights(sizes: Sequence[int], *dtypes: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(numel, generator=generator) * 0.1).to(dtypes[index % len(dtypes)])
        for index, numel in enumerate(sizes)
    ]


def random_gradients(sizes: Sequence[int], step: int, scale: float = 1e-2) -> list[Tensor]:
    """Exactly representable in bfloat16, so that both gradient dtypes hold the same numbers."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [(torch.randn(numel, generator=generator) * scale).bfloat16().float() for numel in sizes]


def bits(x: Tensor) -> Tensor:
    views = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return x.view(views[x.dtype]) if x.dtype in views else x


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def complain(got: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Name the first tensor that differs, and where; NaN equals NaN whatever its payload."""
    for name, value in got.items():
        wanted = expected[name]
        differs = bits(value) != bits(wanted)
        if value.is_floating_point():
            differs &= ~(value.isnan() & wanted.isnan())
        if differs.any():
            at = int(differs.nonzero()[0])
            return f"{name}[{at}]: {value[at].item()!r} != {wanted[at].item()!r}, {int(differs.sum())} in all"
    return ""


def run_scenario(reference: Arena, other: Arena) -> str:
    """A normal, a clipped, a non-finite, a partly absent and a normal step, then line 16; compare after each."""
    sizes = [slot.numel for slot in reference.slots]
    for step in range(5):
        gradients = random_gradients(sizes, step, scale=10.0 if step == 1 else 1e-2)
        if step == 2:
            gradients[0][-1] = math.inf
        for arena in (reference, other):
            arena.control.max_norm.fill_(1.0 if step == 1 else math.inf)
            arena.table.slot_present[1] = step != 3
            arena.set_gradients(gradients)
            arena.measure()
        if step != 2:
            used = slice(reference.table.n_tiles)
            torch.testing.assert_close(other.partial[used].cpu(), reference.partial[used], rtol=1e-6, atol=0.0)
        other.partial.copy_(reference.partial)  # the order of a sum is the backend's own business
        before = other.everything()
        reference.update()
        other.update()
        if step == 2 and not all(map(same_bits, before, other.everything())):
            return "the skipped step changed something"
        if complaint := complain(other.state(), reference.state()):
            return f"step {step}: {complaint}"
    torch.testing.assert_close(other.tile_sumsq.cpu(), reference.tile_sumsq, rtol=1e-6, atol=0.0)
    assert int(other.control.skipped_steps) == 1 and other.table.slot_step.tolist() == [4, 3, 4, 4, 0]
    reference.close()
    other.close()
    for held in other.memory:
        guard = 16 if held.numel() % 16 == 0 else 1
        assert held[:guard].isnan().all() and held[-guard:].isnan().all(), "wrote outside a weight"
    return complain(other.state(), reference.state())


def scenario(
    sizes: Sequence[int], *dtypes: torch.dtype, split: bool, grad_dtype: torch.dtype, bias_correction: bool = True
) -> Callable[..., str]:
    def case(device: str = "cpu") -> str:
        weights = random_weights(sizes, *dtypes)
        options = dict(split=split, grad_dtype=grad_dtype, bias_correction=bias_correction)
        reference = make_arena(weights, backend="reference", **options)
        kernel = make_arena(weights, backend="triton", device=device, **options)
        assert kernel.table.aligned == (sizes is EVEN_SIZES)
        return run_scenario(reference, kernel)

    return case


def boundary_values(device: str = "cpu") -> str:
    """Each boundary weight meets each boundary gradient, of both signs; overflow and NaN included, nothing skipped."""
    positive = torch.tensor(BOUNDARY_BITS, dtype=torch.int32).view(torch.float32)
    values = torch.cat([positive, -positive, torch.tensor([math.inf, -math.inf, NAN])])
    weights, gradients = (part.reshape(-1).clone() for part in torch.meshgrid(values, values, indexing="ij"))
    for dtype, split in ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)):
        options = dict(split=split, grad_dtype=torch.float32)
        arenas = [make_arena([weights.to(dtype)], backend="reference", **options)]
        arenas.append(make_arena([weights.to(dtype)], backend="triton", device=device, **options))
        for step in range(3):
            for arena in arenas:
                arena.set_gradients([gradients])
                arena.update(skip_nonfinite=False, normed=False)
            states = [arena.state() for arena in arenas]
            if split:  # of a NaN the two halves are not specified, but the upper half has to show it
                for state in states:
                    unspecified = state["weight 0"].isnan()
                    state["lo 0"].masked_fill_(unspecified, 0)
            if complaint := complain(states[1], states[0]):
                return f"{dtype}, split={split}, step {step}: {complaint}"
    return ""


def ties_round_to_even(device: str = "cpu") -> str:
    """Decay by exactly a quarter: half of the products of 8-bit mantissas lie midway between two bfloat16 numbers."""
    weights = torch.arange(171, 256).float() / 128
    assert ((weights * 96 % 1) == 0.5).any()
    for split in (True, False):
        arena = make_arena(
            [weights.bfloat16()], backend="triton", device=device, split=split, lr=1.0, weight_decay=0.25
        )
        arena.set_gradients([torch.zeros_like(weights)])
        arena.update(normed=False)
        expected = split_halves(weights * 0.75)[0] if split else (weights * 0.75).bfloat16()
        if complaint := complain({"weight 0": arena.weights[0].cpu()}, {"weight 0": expected}):
            return f"split={split}: {complaint}"
    return ""


def sums_and_norms() -> str:
    sizes = (3 * BLOCK + 5, 700, BLOCK)
    arena = make_arena(random_weights(sizes, torch.float32), backend="triton")
    gradients = random_gradients(sizes, 0)
    arena.set_gradients(gradients)
    arena.measure()
    arena.table.slot_present[1] = 0
    exact = torch.stack([gradient.double().square().sum() for gradient in gradients])
    global_norm(arena.partial, arena.table, arena.control, backend="triton")
    expected = math.sqrt(exact[0] + exact[2])
    assert abs(arena.control.grad_norm.item() / expected - 1) < 1e-6
    total, roots = torch.zeros(4), torch.ones(4)
    reduce_slots(arena.partial, total, arena.table, arena.control, root=False, backend="triton")
    reduce_slots(arena.partial, roots, arena.table, arena.control, root=True, backend="triton")
    torch.testing.assert_close(total[:3].double(), exact, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(
        roots, torch.tensor([1 + exact[0].sqrt(), 1.0, 1 + exact[2].sqrt(), 1.0]).float(), rtol=1e-6, atol=0.0
    )
    arena.control.skip.fill_(1)
    skipped = roots.clone()
    reduce_slots(arena.partial, skipped, arena.table, arena.control, root=True, backend="triton")
    assert same_bits(skipped, roots), "a skipped step entered the roots"
    arena.partial.fill_(NAN)  # one slot alone, as its gradient arrives
    sum_of_squares(arena.grad, arena.partial, arena.table, backend="triton", tiles=arena.slots[1].tiles)
    assert arena.partial.isfinite().nonzero().tolist() == [[arena.slots[1].first_tile]]
    return ""


def one_slot_and_given_norms() -> str:
    """A range of tiles updates that slot alone; ``measured`` enters the score in place of the stored gradient."""
    weights = random_weights(ODD_SIZES, torch.bfloat16)
    arenas = [make_arena(weights, backend=backend) for backend in ("reference", "triton")]
    before = arenas[1].state()
    for arena in arenas:
        arena.set_gradients(random_gradients(ODD_SIZES, 0))
        arena.partial.copy_(torch.arange(arena.partial.numel()))
        finalise(None, arena.hyper, arena.bias, arena.table, arena.control, skip_nonfinite=True, backend=arena.backend)
        buffers = arena.grad, arena.m, arena.v, arena.lo, arena.tile_sumsq
        for slot in (arena.slots[0], arena.slots[2]):
            adamw(*buffers, arena.table, backend=arena.backend, measured=arena.partial, tiles=slot.tiles)
    after = arenas[1].state()
    for index in (1, 3):
        assert same_bits(before[f"weight {index}"], after[f"weight {index}"]), "a slot outside the range changed"
    assert arenas[1].tile_sumsq.tolist() == [0.0, 0.0, 0.0, 0.0, 4.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0]
    assert same_bits(arenas[0].tile_sumsq, arenas[1].tile_sumsq)
    return complain(after, arenas[0].state())


def two_runs_agree() -> str:
    sizes, states = (2 * BLOCK + 48, 512), []
    for _ in range(2):
        arena = make_arena(random_weights(sizes, torch.bfloat16), backend="triton")
        arena.control.max_norm.fill_(0.1)
        for step in range(2):
            arena.set_gradients(random_gradients(sizes, step))
            arena.measure()
            arena.update()
        states.append(arena.state() | {"tile_sumsq": arena.tile_sumsq, "partial": arena.partial})
    return complain(*states)


def stochastic_rounding() -> str:
    generator = torch.Generator().manual_seed(0)
    edge = torch.tensor([0x7F7F7FFF, 0x7F7FFFFF, 0x0, 0x7FFF, -0x7FFF], dtype=torch.int32)
    for numel, seed, first in ((2 * BLOCK, 1, 0), (BLOCK + 7, (1 << 63) - 1, 0), (300, 0, (1 << 33) + 5)):
        master = torch.randint(-0x40000000, 0x40000000, (numel,), generator=generator, dtype=torch.int32)
        master[: edge.numel()] = edge
        halves = [((master + 0x8000 >> 16).short().view(torch.bfloat16), master.short()) for _ in range(2)]
        for (hi, lo), backend in zip(halves, ("reference", "triton"), strict=True):
            round_stochastic_(hi, lo, seed, backend=backend, first_index=first)
        if not same_bits(halves[0][0], halves[1][0]) or halves[1][1].any():
            return f"numel {numel}, seed {seed}, first_index {first}"
    return ""


F32, BF16 = torch.float32, torch.bfloat16

#: Comparisons of the kernel, on any device, with the reference on the CPU.
DEVICE_CASES: dict[str, Callable[..., str]] = {
    "float32": scenario(EVEN_SIZES, F32, split=False, grad_dtype=F32),
    "float32_odd_sizes": scenario(ODD_SIZES, F32, split=False, grad_dtype=F32),
    "bfloat16_split": scenario(EVEN_SIZES, BF16, split=True, grad_dtype=BF16),
    "bfloat16_split_odd_sizes": scenario(ODD_SIZES, BF16, split=True, grad_dtype=BF16),
    "bfloat16_split_float32_gradients": scenario(EVEN_SIZES, BF16, split=True, grad_dtype=F32, bias_correction=False),
    "bfloat16_without_master": scenario(ODD_SIZES, BF16, split=False, grad_dtype=BF16),
    "both_weight_dtypes": scenario(ODD_SIZES, BF16, F32, split=True, grad_dtype=F32),
    "boundary_values": boundary_values,
    "ties_round_to_even": ties_round_to_even,
}

INTERPRETER_CASES: dict[str, Callable[..., str]] = DEVICE_CASES | {
    "sums_and_norms": sums_and_norms,
    "one_slot_and_given_norms": one_slot_and_given_norms,
    "two_runs_agree": two_runs_agree,
    "stochastic_rounding": stochastic_rounding,
}


def main() -> None:
    torch.set_num_threads(1)
    norm.CHUNK = 2 * BLOCK  # so that the reference crosses chunks in slots of three tiles
    report = {}
    for name, case in INTERPRETER_CASES.items():
        try:
            report[name] = case()
        except Exception:
            report[name] = traceback.format_exc()
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
