"""Pinned host memory: what torch's rounding to powers of two would cost, and what the pool does about it."""

import io
import random

import pytest
import torch

from misa_engine import MISA
from misa_engine.engine import host_pool
from misa_engine.engine.host_pool import HostPool, own_storage, rounded
from training import batches, tiny, train, weights

CPU = torch.device("cpu")
#: Hidden, key and value, intermediate width and layers.
MODELS = {
    "Qwen2.5-7B": (3584, 512, 18944, 28),
    "Llama-3-8B": (4096, 1024, 14336, 32),
    "Llama-2-7B": (4096, 4096, 11008, 32),
    "Qwen2.5-0.5B": (896, 128, 4864, 24),
}
#: Bytes an element of the buffers of a parameter.
KEPT = {"residual bits": (2,), "moments": (4, 4), "moments and bits": (4, 4, 2), "packed": (1, 1, 1 / 16, 1 / 16)}


def sizes_of(model):
    h, kv, i, layers = MODELS[model]
    return [h * h, h * kv, h * kv, h * h, h * i, h * i, h * i] * layers


def power_of_two(size):
    return 1 << (size - 1).bit_length()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("model", MODELS)
def test_pieces_are_powers_of_two_and_little_of_them_stays_empty(model, kept, monkeypatch):
    monkeypatch.setattr(host_pool, "host_buffer", lambda numel, dtype, device: torch.empty(numel, device="meta").byte())
    for seed in range(5):  # in whatever order they leave
        order = sizes_of(model)
        random.Random(seed).shuffle(order)
        buffers = [int(numel * share) for numel in order for share in KEPT[kept]]
        needed = sum(map(rounded, buffers))
        pool = HostPool(CPU, needed, pieces=True)
        for size in buffers:
            assert pool.take(size, torch.int8).nbytes == size
        assert all(piece.nbytes == power_of_two(piece.nbytes) for piece in pool._pieces)
        assert pool.nbytes <= 1.05 * needed
    alone = sum(map(power_of_two, buffers)) / needed
    assert alone > (1.8 if model.startswith("Qwen") else 1.1)  # what it is for


def test_buffers_do_not_overlap_and_hold_what_is_written():
    pool = HostPool(CPU, 0, pieces=True)
    generator = random.Random(0)
    taken = [
        pool.take(generator.randrange(1, 5000), generator.choice([torch.int8, torch.int16, torch.float32]))
        for _ in range(200)
    ]
    for value, buffer in enumerate(taken):
        buffer.fill_(value % 100)
    for value, buffer in enumerate(taken):
        assert bool((buffer == value % 100).all()) and buffer.data_ptr() % host_pool.ALIGNMENT == 0
    assert pool.nbytes < 2 * sum(buffer.nbytes for buffer in taken)


def test_unpinned_memory_is_taken_as_it_is_needed():
    pool = HostPool(CPU, 1 << 40)
    assert pool.take(1000, torch.int16).nbytes == pool.nbytes == 2000


def test_a_saved_buffer_is_written_without_the_rest_of_its_piece():
    pool = HostPool(CPU, 1 << 20, pieces=True)
    pool.take(100_000, torch.int8)
    buffer = pool.take(1000, torch.float32).fill_(3)
    saved = own_storage(buffer)
    file = io.BytesIO()
    torch.save(saved, file)
    assert saved.data_ptr() == buffer.data_ptr() and file.tell() < 10_000
    del pool, buffer
    assert bool((saved == 3).all())


@pytest.mark.parametrize("options", [{"revisit": "keep", "leave_rounding": "keep"}, {"revisit": "offload"}], ids=str)
def test_training_and_resuming_through_a_pool_change_nothing(options, monkeypatch):
    """The pool as it is on a GPU, on a CPU."""
    results = []
    for pieces in (False, True):
        with monkeypatch.context() as patch:
            own = HostPool.__init__
            patch.setattr(HostPool, "__init__", lambda *args, own=own, pieces=pieces: own(*args, pieces=pieces))
            model = tiny("llama", torch.bfloat16)
            optimizer = MISA(model, lr=1e-2, delta=0.3, inner_steps=2, **options)
            data = batches()
            train(model, optimizer, data, 13)
            state = optimizer.state_dict()
            optimizer.remove()
            optimizer = MISA(model, lr=1e-2, delta=0.3, inner_steps=2, **options)
            optimizer.load_state_dict(state)
            train(model, optimizer, data, 12)
            results.append(weights(model))
            memory = optimizer.memory()
            kept = memory["host_moments"] + memory["host_residual_bits"]
            assert kept > 0 and memory.get("host_spare", 0) == optimizer.host._pool.nbytes - kept
            assert ("host_spare" in memory) == pieces and memory.get("host_spare", 0) < kept
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name]), name
