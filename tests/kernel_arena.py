"""Small arenas for the kernel tests, with every unused place poisoned, and the comparison of two of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from misa_engine.kernels.adamw import adamw, closing_step
from misa_engine.kernels.blockwise8 import GROUP, expand
from misa_engine.kernels.finalise import finalise
from misa_engine.kernels.norm import sum_of_squares
from misa_engine.kernels.tiles import BLOCK, Control, Slot, TileTable, bias_table, hyper_row

F32, BF16 = torch.float32, torch.bfloat16
NAN = float("nan")
BETAS = [(0.9, 0.999), (0.8, 0.99)]
EVEN_SIZES = (2 * BLOCK + 48, 512, BLOCK, 16)
ODD_SIZES = (1, 33, 2 * BLOCK + 7, BLOCK)


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
    m_scale: Tensor | None = None
    v_scale: Tensor | None = None
    memory: list[Tensor] = field(default_factory=list)  # holds the weights and a guard element on either side

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.table.slots

    @property
    def weights(self) -> list[Tensor]:
        return [slot.weight for slot in self.slots]

    def of(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[slot.start : slot.start + slot.numel] for slot in self.slots]

    @property
    def scales(self) -> dict[str, Tensor | None]:
        return {"m_scale": self.m_scale, "v_scale": self.v_scale}

    def groups_of(self, scale: Tensor) -> list[Tensor]:
        return [scale[slot.start // GROUP : -(-(slot.start + slot.numel) // GROUP)] for slot in self.slots]

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """First and second moment of each slot in float32."""
        if self.m_scale is None or self.v_scale is None:
            return self.of(self.m), self.of(self.v)
        m, v = self.m.float(), self.v.float()
        for index, (m_, v_) in enumerate(zip(self.of(m), self.of(v), strict=True)):
            buffers = self.of(self.m), self.of(self.v), self.groups_of(self.m_scale), self.groups_of(self.v_scale)
            expand(*(parts[index] for parts in buffers), m_, v_, backend=self.backend)
        return self.of(m), self.of(v)

    def state(self) -> dict[str, Tensor]:
        """Everything that a step may change, without the padding of the slots, on the CPU."""
        buffers = {"m": self.m, "v": self.v, "lo": self.lo}
        named = {f"weight {index}": weight.clone() for index, weight in enumerate(self.weights)}
        for name, buffer in buffers.items():
            if buffer is not None:
                named |= {f"{name} {index}": part.clone() for index, part in enumerate(self.of(buffer))}
        for name, scale in self.scales.items():
            if scale is not None:
                named |= {f"{name} {index}": part.clone() for index, part in enumerate(self.groups_of(scale))}
        named |= {name: getattr(self.table, name).clone() for name in ("slot_step", "slot_measured")}
        return {name: tensor.cpu() for name, tensor in named.items()}

    def everything(self) -> list[Tensor]:
        """Clones of all memory, padding and guards included."""
        parts = [self.m, self.v, self.tile_sumsq, *self.memory]
        parts += [self.table.slot_step, self.table.slot_measured]
        parts += [part for part in (self.lo, self.m_scale, self.v_scale) if part is not None]
        return [part.clone() for part in parts]

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
        adamw(*buffers, self.table, backend=self.backend, measured=measured, **self.scales)

    def close(self) -> None:
        closing_step(self.m, self.v, self.lo, self.hyper, self.bias, self.table, backend=self.backend, **self.scales)


def make_arena(
    weights: Sequence[Tensor],
    *,
    backend: str = "reference",
    grad_dtype: torch.dtype | None = None,
    split: bool = True,
    int8: bool = False,
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
        m=torch.full((capacity,), 77 if int8 else NAN, dtype=torch.int8 if int8 else None, device=device),
        v=torch.full((capacity,), 200 if int8 else NAN, dtype=torch.uint8 if int8 else None, device=device),
        m_scale=torch.full((capacity // GROUP,), NAN, device=device) if int8 else None,
        v_scale=torch.full((capacity // GROUP,), NAN, device=device) if int8 else None,
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
    for scale in arena.scales.values():
        for part in arena.groups_of(scale) if scale is not None else ():
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


def own_gradient(gradient: Tensor, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A copy that ends where its slot ends, before memory full of NaN."""
    held = torch.full((gradient.numel() + BLOCK,), NAN, dtype=dtype, device=device)
    held[: gradient.numel()] = gradient
    return held[: gradient.numel()]


def moments_to_store(numel: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Moments from 1e-42 to 1e30 by group, with zeros of both signs, silent groups, outliers and non-finite values."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-42, 18, numel // GROUP + 1, dtype=torch.float64).repeat_interleave(GROUP)[:numel]
    g = torch.randn(numel, generator=generator, dtype=torch.float64) * sizes
    m, v = (0.1 * g).float(), (0.001 * g * g).float()
    m[5::97], v[7::89], m[11::83], v[11::83] = -0.0, 0.0, 0.0, 0.0
    m[13::301] *= 1000
    v[17::311] *= 1e6
    m[2 * GROUP : 3 * GROUP] = v[2 * GROUP : 3 * GROUP] = 0.0
    for at, (m_, v_) in enumerate([(NAN, 1.0), (1.0, NAN), (math.inf, 1.0), (-1.0, math.inf), (1e37, 1.0)]):
        m[(7 * at + 5) * GROUP + at], v[(7 * at + 5) * GROUP + at] = m_, v_
    return m, v
