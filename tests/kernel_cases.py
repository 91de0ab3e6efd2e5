"""The comparisons of the kernels with their references that have to run in Triton's interpreter.

The interpreter is chosen by an environment variable before the kernels are imported, so these comparisons run in a
process of their own: ``TRITON_INTERPRET=1 python tests/kernel_cases.py`` prints {case: complaint or ""} as JSON.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

from kernel_arena import (
    BF16,
    EVEN_SIZES,
    F32,
    NAN,
    ODD_SIZES,
    Arena,
    complain,
    make_arena,
    moments_to_store,
    own_gradient,
    random_gradients,
    random_weights,
    same_bits,
)
from kernel_resident8 import resident_formats
from kernel_rest import rest_moves_nothing, rest_rules
from misa_engine.kernels import tiles
from misa_engine.kernels.adamw import adamw
from misa_engine.kernels.blockwise8 import GROUP, compress, expand
from misa_engine.kernels.finalise import finalise
from misa_engine.kernels.norm import global_norm, reduce_slots, sum_of_squares
from misa_engine.kernels.split_float import round_stochastic_
from misa_engine.kernels.split_float import split as split_halves
from misa_engine.kernels.tiles import BLOCK, PART

# Zeros, subnormals, the smallest and largest normal numbers, ties and neighbours of ties between two bfloat16 values.
BOUNDARY_BITS = [0x0, 0x1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001]
BOUNDARY_BITS += [0x3F817FFF, 0x3F818001, 0x33800000, 0x7F000000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x00808000]


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
    sizes: Sequence[int],
    *dtypes: torch.dtype,
    split: bool,
    grad_dtype: torch.dtype,
    bias_correction: bool = True,
    int8: bool = False,
) -> Callable[..., str]:
    def case(device: str = "cpu") -> str:
        weights = random_weights(sizes, *dtypes)
        options = dict(split=split, grad_dtype=grad_dtype, bias_correction=bias_correction, int8=int8)
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
    variants = ((torch.float32, False, False), (torch.bfloat16, True, False), (torch.bfloat16, False, False))
    for dtype, split, int8 in (*variants, (torch.float32, False, True)):
        options = dict(split=split, grad_dtype=torch.float32, int8=int8)
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
                return f"{dtype}, split={split}, int8={int8}, step {step}: {complaint}"
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


def norm_in_parts(device: str = "cpu") -> str:
    """Slots across the borders of parts, absent ones and gaps of NaN; all slots, and one slot alone."""
    sizes = (PART * BLOCK + 5, 700, (PART + 3) * BLOCK, 2 * PART * BLOCK - 1)
    weights = [torch.zeros(numel, dtype=BF16) for numel in sizes]
    reference = make_arena(weights, int8=True)
    kernel = make_arena(weights, int8=True, backend="triton", device=device)
    assert kernel.table.n_tiles > 4 * PART
    partial = torch.rand(reference.partial.shape, generator=torch.Generator().manual_seed(0))
    partial[reference.table.length == 0] = NAN
    for absent in (None, 0, 2):
        for span in (None, *(slot.tiles for slot in reference.slots)):
            results = []
            for arena in (reference, kernel):
                arena.table.slot_present[: len(sizes)] = 1
                if absent is not None:
                    arena.table.slot_present[absent] = 0
                arena.table.slot_coef.fill_(77)
                arena.control.max_norm.fill_(3.0)
                sums = torch.full((len(sizes) + 1,), 0.5, device=device if arena is kernel else "cpu")
                values = partial.to(sums.device)
                tables = arena.hyper, arena.bias, arena.table, arena.control
                finalise(values, *tables, skip_nonfinite=True, backend=arena.backend, tiles=span)
                only = None if span is None else [slot.tiles for slot in arena.slots].index(span)
                place = dict(root=True, backend=arena.backend, only=only)
                reduce_slots(values, sums, arena.table, arena.control, **place)
                table = arena.table
                floats = {"norm": arena.control.grad_norm, "clip": arena.control.clip_coef, "sums": sums}
                counts = torch.cat([table.slot_step, table.slot_measured])
                results.append((torch.cat([x.cpu() for x in floats.values()]), counts.cpu(), table.slot_coef.cpu()))
            (a, counts_a, coef_a), (b, counts_b, coef_b) = results
            torch.testing.assert_close(b, a, rtol=1e-6, atol=0.0)
            torch.testing.assert_close(coef_b, coef_a, rtol=1e-6, atol=0.0)
            assert torch.equal(counts_a, counts_b)
            if span is not None:
                expected = math.sqrt(partial[span.start : span.stop].double().sum())
                assert abs(a[0].item() / expected - 1) < 1e-6
                assert ((a[2:] != 0.5).nonzero().flatten().tolist(), (coef_a != 77).any(1).sum().item()) == ([only], 1)
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


def own_gradients(device: str = "cpu") -> str:
    """Each slot from a gradient of its own, as long as the slot, against all of them from the arena."""
    for sizes, int8, grad_dtype in ((EVEN_SIZES, True, BF16), (ODD_SIZES, False, F32)):
        arenas = [
            make_arena(random_weights(sizes, BF16), backend=backend, int8=int8, grad_dtype=grad_dtype, device=place)
            for backend, place in (("reference", "cpu"), ("triton", device))
        ]
        whole, apart = arenas
        for step in range(2):
            gradients = random_gradients(sizes, step)
            whole.set_gradients(gradients)
            whole.measure()
            whole.update()
            for gradient, slot in zip(gradients, apart.slots, strict=True):
                place = dict(backend="triton", tiles=slot.tiles, grad_start=slot.start)
                held = own_gradient(gradient, grad_dtype, device)
                sum_of_squares(held, apart.partial, apart.table, **place)
            used = whole.table.length > 0
            torch.testing.assert_close(apart.partial.cpu()[used], whole.partial[used], rtol=1e-6, atol=0.0)
            tables = apart.hyper, apart.bias, apart.table, apart.control
            finalise(None, *tables, skip_nonfinite=True, backend="triton")
            for gradient, slot in zip(gradients, apart.slots, strict=True):
                place = dict(backend="triton", tiles=slot.tiles, grad_start=slot.start)
                held = own_gradient(gradient, grad_dtype, device)
                adamw(held, apart.m, apart.v, apart.lo, apart.tile_sumsq, apart.table, **place, **apart.scales)
        if complaint := complain(apart.state(), whole.state()):
            return f"int8={int8}: {complaint}"
        torch.testing.assert_close(apart.tile_sumsq.cpu(), whole.tile_sumsq, rtol=1e-6, atol=0.0)
    return ""


def compress_and_expand(device: str = "cpu") -> str:
    for numel in (4 * BLOCK, 2 * BLOCK + 7 * GROUP + 13):
        stored = []
        for backend, place in (("reference", "cpu"), ("triton", device)):
            m, v = (moment.to(place) for moment in moments_to_store(numel))
            groups = -(-numel // GROUP)
            # One group too many, to see that nothing is written behind the last one.
            codes = [torch.full((numel + GROUP,), 99, dtype=dtype, device=place) for dtype in (torch.int8, torch.uint8)]
            scales = [torch.full((groups + 1,), NAN, device=place) for _ in range(2)]
            parts = [code[:numel] for code in codes] + [scale[:groups] for scale in scales]
            compress(m, v, *parts, backend=backend)
            decoded = [torch.full((numel + GROUP,), NAN, device=place) for _ in range(2)]
            expand(*parts, *(moment[:numel] for moment in decoded), backend=backend)
            assert all(moment[:numel].isfinite().all() and moment[numel:].isnan().all() for moment in decoded)
            names = ("m8", "v8", "m_scale", "v_scale", "m", "v")
            stored.append({name: x.cpu() for name, x in zip(names, [*codes, *scales, *decoded], strict=True)})
        if complaint := complain(stored[1], stored[0]):
            return f"numel {numel}: {complaint}"
    return ""


def padding_in_8_bits_becomes_zero(device: str = "cpu") -> str:
    """Whatever the padding held, and gradients of NaN there: no scale sees it, and it is zero after a step."""
    arena, clean = (
        make_arena(random_weights(ODD_SIZES, BF16), backend="triton", int8=True, device=device) for _ in "ab"
    )
    padding = [slice(slot.start + slot.numel, slot.tiles.stop * BLOCK) for slot in arena.slots]
    empty = [slice(-(-part.start // GROUP), part.stop // GROUP) for part in padding]
    for step in range(3):
        for part, groups in zip(padding, empty, strict=True):
            arena.m[part], arena.v[part] = 77, 200
            arena.m_scale[groups], arena.v_scale[groups] = 1.0, 2.0
        for other in (arena, clean):
            other.set_gradients(random_gradients(ODD_SIZES, step))
            other.update(normed=False)
    for part, groups in zip(padding, empty, strict=True):
        assert not any(x.any() for x in (arena.m[part], arena.v[part], arena.m_scale[groups], arena.v_scale[groups]))
    return complain(arena.state(), clean.state())


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


#: Comparisons of the kernel, on any device, with the reference on the CPU.
DEVICE_CASES: dict[str, Callable[..., str]] = {
    "float32": scenario(EVEN_SIZES, F32, split=False, grad_dtype=F32),
    "float32_odd_sizes": scenario(ODD_SIZES, F32, split=False, grad_dtype=F32),
    "bfloat16_split": scenario(EVEN_SIZES, BF16, split=True, grad_dtype=BF16),
    "bfloat16_split_odd_sizes": scenario(ODD_SIZES, BF16, split=True, grad_dtype=BF16),
    "bfloat16_split_float32_gradients": scenario(EVEN_SIZES, BF16, split=True, grad_dtype=F32, bias_correction=False),
    "bfloat16_without_master": scenario(ODD_SIZES, BF16, split=False, grad_dtype=BF16),
    "both_weight_dtypes": scenario(ODD_SIZES, BF16, F32, split=True, grad_dtype=F32),
    "int8_float32": scenario(ODD_SIZES, F32, split=False, grad_dtype=F32, int8=True),
    "int8_bfloat16_split": scenario(EVEN_SIZES, BF16, split=True, grad_dtype=BF16, int8=True),
    "int8_bfloat16_split_odd_sizes": scenario(ODD_SIZES, BF16, split=True, grad_dtype=F32, int8=True),
    "int8_bfloat16_without_master": scenario(EVEN_SIZES, BF16, split=False, grad_dtype=BF16, int8=True),
    "boundary_values": boundary_values,
    "ties_round_to_even": ties_round_to_even,
    "own_gradients": own_gradients,
    "compress_and_expand": compress_and_expand,
    "padding_in_8_bits_becomes_zero": padding_in_8_bits_becomes_zero,
    "rest_rules": rest_rules,
    "rest_moves_nothing": rest_moves_nothing,
    "resident_formats": resident_formats,
    "norm_in_parts": norm_in_parts,
}

INTERPRETER_CASES: dict[str, Callable[..., str]] = DEVICE_CASES | {
    "sums_and_norms": sums_and_norms,
    "one_slot_and_given_norms": one_slot_and_given_norms,
    "two_runs_agree": two_runs_agree,
    "stochastic_rounding": stochastic_rounding,
}


def main() -> None:
    torch.set_num_threads(1)
    tiles.CHUNK = 2 * BLOCK  # so that the reference crosses chunks in slots of three tiles
    report = {}
    for name, case in INTERPRETER_CASES.items():
        try:
            report[name] = case()
        except Exception:
            report[name] = traceback.format_exc()
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
