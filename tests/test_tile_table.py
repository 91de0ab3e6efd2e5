"""The tables of the arena: one buffer, written by one copy."""

import torch

from misa_engine.kernels import tiles
from misa_engine.kernels.tiles import BLOCK, Slot, TileTable


def test_tables_in_one_buffer_are_aligned_and_do_not_overlap():
    for max_tiles, max_slots in ((1, 1), (7, 3), (1000, 5)):
        table = TileTable.allocate(max_tiles, max_slots, "cpu")
        parts = {name: value for name, value in vars(table).items() if isinstance(value, torch.Tensor)}
        bound = parts.pop("bound")
        inside = [part for part in parts.values() if part.untyped_storage().data_ptr() == bound.data_ptr()]
        assert len(inside) == 7
        ends = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in inside)
        assert all(start % tiles.ALIGNMENT == 0 for start, _ in ends)
        assert all(end <= following for (_, end), (following, _) in zip(ends, ends[1:], strict=False))
        assert table.nbytes == bound.nbytes + sum(part.nbytes for part in parts.values()) - sum(
            p.nbytes for p in inside
        )


def test_binding_writes_step_counts_only_when_they_are_given():
    table = TileTable.allocate(4, 3, "cpu")
    slots = [Slot(torch.zeros(100), 0, 100, 1), Slot(torch.zeros(BLOCK + 1).bfloat16(), 2 * BLOCK, BLOCK + 1, 0)]
    table.bind(slots, [3, 4])
    assert table.slot_step.tolist() == [3, 4, 0]
    table.bind(slots[:1])
    assert table.slot_step.tolist() == [3, 4, 0]
    assert table.length.tolist() == [100, 0, 0, 0] and table.slot_group.tolist() == [1, 0, 0]
    table.bind(slots)
    assert table.slot.tolist() == [0, 0, 1, 1] and table.length.tolist() == [100, 0, BLOCK, 1]
    assert table.slot_bf16.tolist() == [0, 1, 0] and table.slot_n_tiles.tolist() == [1, 2, 0]
    address = slots[1].weight.data_ptr()
    assert table.wptr.tolist() == [slots[0].weight.data_ptr(), 0, address, address + 2 * BLOCK]
