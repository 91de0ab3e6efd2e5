from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from misa_engine.trainer import runstats
from misa_engine.trainer.runstats import StartingWeights, StepClock, compare, peak_memory_bytes, resident_bytes
from models import TINY

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relative_change_agrees_with_float64(dtype, monkeypatch):
    monkeypatch.setattr(runstats, "_CHUNK", 1 << 16)  # several chunks, the last one uneven
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, 517, generator=generator).to(dtype)
    end = (start.float() + 1e-2 * torch.randn(300, 517, generator=generator)).to(dtype)
    expected = ((end.double() - start.double()).norm() / start.double().norm()).item()
    change = compare(start, end)
    assert change.relative == pytest.approx(expected, rel=1e-6)
    assert not change.identical
    assert compare(start, start.clone()).relative == 0.0


def test_identical_means_every_bit():
    zero, one = torch.zeros(3), torch.ones(3)
    assert compare(zero, zero.clone()).identical
    assert not compare(zero, -zero).identical
    assert compare(torch.tensor([float("nan")]), torch.tensor([float("nan")])).identical
    assert compare(zero, one).relative is None  # a share of nothing
    last_bit = one.clone()
    last_bit[1] = torch.nextafter(one[1], torch.tensor(2.0))
    assert not compare(one, last_bit).identical


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_too_large_to_copy_is_compared_with_the_files_it_came_from(tmp_path, dtype, tied):
    made = TINY["llama"](tie_word_embeddings=tied)
    made.save_pretrained(tmp_path)  # in float32
    model = type(made).from_pretrained(tmp_path, dtype=dtype)
    copied, streamed = StartingWeights(model), StartingWeights(model, limit=0)
    assert streamed.held_bytes == 0 and copied.held_bytes == sum(p.nbytes for p in model.parameters())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1
    changes = streamed.compare(model)
    assert changes == copied.compare(model)
    assert [name for name, change in changes.items() if not change.identical] == ["model.layers.1.mlp.up_proj.weight"]
    assert len(changes) == len(list(model.parameters()))


def test_unknown_starts_are_left_out_not_guessed(tmp_path):
    model = TINY["mixtral"]()  # never saved: no file to read
    assert StartingWeights(model, limit=0).compare(model) == {}
    model.save_pretrained(tmp_path)  # experts are stored one by one, under other names
    model.config._name_or_path = str(tmp_path)
    known = StartingWeights(model, limit=0).compare(model)
    assert "model.embed_tokens.weight" in known
    assert not any("experts" in name for name in known)


def test_the_clock_skips_the_warm_up_and_ignores_an_end_without_a_beginning():
    clock = StepClock(CPU, warm_up=2)
    clock.end()
    assert clock.summary() is None
    for _ in range(7):
        clock.begin()
        time.sleep(0.002)
        clock.end()
    summary = clock.summary()
    assert len(clock.seconds) == 5
    assert summary is not None and 0.002 <= summary["p20"] <= summary["median"] <= summary["p80"] < 1


@pytest.mark.gpu
def test_the_clock_measures_device_time_without_waiting_for_it():
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    clock = StepClock(device, warm_up=1)
    torch.cuda.synchronize()
    for _ in range(5):
        clock.begin()
        for _ in range(20):
            matrix @ matrix
        clock.end()
    assert len(clock.seconds) < 4  # the host is ahead: the last steps have not finished yet
    summary = clock.summary()
    assert len(clock.seconds) == 4 and summary is not None and 0 < summary["p20"] <= summary["p80"]
    started = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started[0].record()
    for _ in range(20):
        matrix @ matrix
    started[1].record()
    torch.cuda.synchronize()
    assert summary["median"] == pytest.approx(started[0].elapsed_time(started[1]) / 1e3, rel=0.5)
    assert peak_memory_bytes(device) >= matrix.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_this_process_own_even_under_a_large_parent():
    block = bytearray(400 << 20)  # 400 MiB resident here: ru_maxrss of a child would start from that
    code = "import resource; from pathlib import Path; print(Path('/proc/self/status').read_text())"
    assert peak_memory_bytes(CPU) >= resident_bytes() >= len(block)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    peak = next(int(line.split()[1]) * 1024 for line in child.splitlines() if line.startswith("VmHWM"))
    assert peak < len(block)
