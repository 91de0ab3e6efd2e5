import json
import os
import pickle
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from misa_engine.bench import baselines, cases, checks, measure, timeline, training, workload
from misa_engine.bench.cases import run_case
from misa_engine.bench.method import Method, Settings, Unavailable
from misa_engine.bench.presets import CARD_GIB
from misa_engine.bench.suites import WORST_SET
from misa_engine.bench.training import LongestCase, StepCase, SwitchCase, largest
from misa_engine.engine.marks import observed

CPU = torch.device("cpu")
GIB = 1 << 30
SMALL = dict(name="tiny", shape="tiny", device="cpu", length=16, delta=0.1, inner_steps=2, accumulation=2)
TINY = StepCase(steps=3, warm_up=1, **SMALL)
SWITCHES = SwitchCase(switches=5, **{**SMALL, "inner_steps": 1, "accumulation": 1, "batch": 1})
LONGEST = LongestCase(**{**SMALL, "batch": 1, "accumulation": 1}, length_step=16, longest=256, misa=WORST_SET)


def tiny_model(dtype=torch.float32):
    return workload.build_model("tiny", CPU, checkpointing=True, dtype=dtype)


def last_row(case):
    rows = []
    run_case(case, lambda row: rows.append(json.loads(json.dumps(row))))
    return rows[-1]


# ---- methods ----


def test_adamw_bytes_by_category_are_those_of_its_tensors():
    model = tiny_model()
    method = baselines.build("adamw", model, lambda ids: workload.chunked_loss(model, ids), Settings())
    method.step([next(workload.token_batches(model, 1, 8, CPU))])
    sizes = method.optimizer_bytes()
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert sizes["gradients"] == sizes["first_moment"] == sizes["second_moment"] == weights
    assert sizes["scales_and_tables"] == 4 * len(list(model.parameters()))  # one float32 step each


def test_clipping_bounds_the_update_of_every_gradient():
    model = tiny_model()
    model.requires_grad_(True)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    settings = Settings(max_grad_norm=1e-3, accumulation=2)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    method = Method(model, lambda ids: workload.chunked_loss(model, ids), sgd, settings, dict)
    batches = workload.token_batches(model, 1, 8, CPU)
    phases = []
    with observed(lambda name: phases.append(name) or nullcontext()):
        method.step([next(batches), next(batches)])
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    # the step is the clipped gradient itself; 1e-3: fp32 weights near 1 (norms) round the tiny steps
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)
    own = [name for name in phases if name != "recompute"]  # of checkpointed layers, inside backward
    assert own == ["forward", "backward", "forward", "backward", "clip", "step"] and len(own) < len(phases)


def test_unsupported_combinations_say_what_to_do():
    model = tiny_model()
    with pytest.raises(Unavailable, match="unsupported: .*accumulation 1"):
        settings = Settings(max_grad_norm=None, accumulation=2)
        baselines.build("misa-backward", model, lambda ids: ids, settings)
    with pytest.raises(Unavailable, match="unsupported: .*max_grad_norm"):
        baselines.build("misa-backward", model, lambda ids: ids, Settings())
    with pytest.raises(ValueError, match="unknown method 'sgd': choose among misa"):
        baselines.build("sgd", model, lambda ids: ids, Settings())


# ---- workload ----


def test_a_round_measures_flash_attention_and_no_other():
    cuda, names = torch.backends.cuda, ("flash", "cudnn", "mem_efficient", "math")
    before = {name: getattr(cuda, f"{name}_sdp_enabled")() for name in names}
    try:
        workload.flash_attention_only()
        assert [getattr(cuda, f"{name}_sdp_enabled")() for name in names] == [True, False, False, False]
    finally:
        for name, enabled in before.items():
            getattr(cuda, f"enable_{name}_sdp")(enabled)


def test_chunked_loss_and_its_gradients_are_the_plain_ones():
    model = tiny_model()
    ids = next(workload.token_batches(model, 2, 50, CPU))
    logits = model(input_ids=ids).logits
    plain = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    plain.backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    loss = workload.chunked_loss(model, ids, chunk=33)
    loss.backward()
    # fp32 sums in another order
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-7)


def test_all_methods_see_the_same_tokens():
    model = tiny_model()
    first, second = (workload.token_batches(model, 2, 8, CPU) for _ in range(2))
    assert all(torch.equal(next(first), next(second)) for _ in range(3))


def test_an_unknown_shape_names_the_known_ones():
    with pytest.raises(ValueError, match="'nonesuch'.*tiny"):
        workload.model_config("nonesuch")


@pytest.mark.parametrize(("shape", "billions"), [("llama-3-8b", 8.03), ("qwen2.5-7b", 7.62)])
def test_the_real_shapes_have_their_published_number_of_parameters(shape, billions):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(workload.model_config(shape))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)


# ---- rows ----


def test_a_training_row_has_every_field():
    row = last_row(replace(TINY, timeline=True))
    assert row["status"] == "ok" and row["note"] == "cpu: no memory claim"
    assert set(row["step_time_s"]) == {"median", "p20", "p80"}
    assert row["timed_steps"] == 3 and row["timed_switches"] == 2
    assert row["tokens_per_s"] == pytest.approx(2 * 16 * 2 / row["step_time_s"]["median"])
    assert row["weights_bytes"] == 4 * row["parameters"]
    assert row["peak_bytes"] > row["weights_bytes"]
    assert row["loss_kind"] == "chunked"
    assert set(TINY.row("x")) <= set(row)
    phases = [one["phase"] for one in row["timeline"]["phases"]]
    assert phases == [*["forward", "backward"] * 2, "step", "switch", *["forward", "backward"] * 2, "step"]
    assert row["timeline"]["base_bytes"]["weights"] == row["weights_bytes"]


def test_a_missing_package_is_a_row(monkeypatch):
    needs = ("no-such-package",)
    absent = replace(baselines.BASELINES["adamw"], summary="needs what is not here", needs=needs)
    monkeypatch.setitem(baselines.BASELINES, "absent", absent)
    monkeypatch.setattr(cases, "build_model", lambda *a, **k: pytest.fail("a model was built for nothing"))
    row = last_row(replace(TINY, method="absent"))
    assert row["status"] == "missing: pip install no-such-package"
    assert row["peak_bytes"] is None and row["tokens_per_s"] is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()])
def test_running_out_of_memory_is_a_row(monkeypatch, error):
    def raises(*args, **kwargs):
        raise error

    monkeypatch.setattr(Method, "step", raises)
    row = last_row(TINY)
    assert row["status"] == "out of memory"
    assert row["peak_bytes"] > 0 and row["step_time_s"] is None


def test_any_other_error_is_a_row_with_its_message(monkeypatch):
    def raises(*args, **kwargs):
        raise RuntimeError("shapes do\nnot match")

    monkeypatch.setattr(Method, "step", raises)
    assert last_row(TINY)["status"] == "failed: RuntimeError: shapes do not match"


def test_what_counts_as_out_of_memory():
    assert measure.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert measure.is_out_of_memory(RuntimeError("CUDA driver error: out of memory"))
    assert not measure.is_out_of_memory(RuntimeError("expected scalar type Float"))
    assert not measure.is_out_of_memory(ValueError("out of memory"))


def test_switches_are_counted_and_their_memory_recorded():
    row = last_row(SWITCHES)
    assert row["status"] == "ok" and row["switches"] == len(row["held_bytes"]) == 5


def test_growth_is_measured_from_the_second_switch(monkeypatch):
    held = iter([(9, 90), (10, 100), (10, 100), (13, 100), (11, 104)])
    monkeypatch.setattr(training, "held_bytes", lambda device: next(held))
    row = last_row(SWITCHES)
    assert (row["growth_allocated_bytes"], row["growth_reserved_bytes"]) == (3, 4)


# ---- the longest length ----


def test_the_search_finds_the_border_wherever_it_begins():
    for border in range(0, 21):
        for guess in (0, 1, 7, 20, 99):
            tries = []

            def runs(length, border=border, tries=tries):
                tries.append(length)
                return length <= border * 256

            assert largest(runs, 256, 20 * 256, 256, guess * 256) == border * 256
            assert len(tries) == len(set(tries)) <= 10  # 2·log2(20) + 2, rounded down
            assert all(length % 256 == 0 for length in tries)


def test_a_search_from_a_good_guess_is_short():
    tries = []
    assert largest(lambda n: tries.append(n) or n <= 11520, 256, 32768, 256, 11400) == 11520
    assert len(tries) <= 4


def out_of_memory_beyond(monkeypatch, tokens):
    """Make a backward pass of more than ``tokens`` tokens fail half way, with some gradients made."""
    real = workload.chunked_loss

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def loss(model, ids):
        if ids.numel() <= tokens:
            return real(model, ids)
        handle = model.base_model.layers[2].register_forward_hook(lambda m, args, out: Fails.apply(out))
        try:
            return real(model, ids)
        finally:
            handle.remove()

    monkeypatch.setattr(workload, "chunked_loss", loss)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_longest_length_is_found_through_out_of_memory_errors(monkeypatch, checkpointing):
    out_of_memory_beyond(monkeypatch, 100)
    row = last_row(replace(LONGEST, length=64, inner_steps=10**6, checkpointing=checkpointing))
    assert row["status"] == "ok"
    assert row["longest"] == 96  # the largest multiple of 16 in 100
    assert {a["length"]: a["runs"] for a in row["attempts"]}[112] is False


@pytest.mark.parametrize("planned", [True, False])
def test_the_search_trains_the_worst_draw_of_the_plan(planned):
    case = replace(LONGEST, delta=0.3)
    plan = checks.ask_plan(case) if planned else {"status": "no plan"}
    optimizer = baselines.build("misa", tiny_model(), lambda ids: ids, case.as_planned(plan)).optimizer
    first_layer = {unit.name for unit in optimizer.units if ".layers.0." in unit.name}
    assert set(plan["worst_draw"] if planned else first_layer) <= set(optimizer.active)


def test_a_search_begins_where_the_plan_ends_and_keeps_its_reserve():
    plan = {"status": "ok", "bytes": {"cuda_context": GIB // 2, "slack": GIB}, "worst_draw": ["a"]}
    searched = replace(LONGEST, limit_bytes=24 * GIB).as_planned({**plan, "max_tokens_per_micro_batch": 11_400})
    assert (searched.guess, searched.reserve_bytes) == (11_400, GIB * 3 // 2)


# ---- the timeline ----


def test_replay_adds_and_frees_what_the_allocator_did():
    trace = [
        {"action": "segment_alloc", "size": 1 << 21, "time_us": 1_000_000},
        {"action": "alloc", "size": 512, "time_us": 1_000_100},
        {"action": "alloc", "size": 1024, "time_us": 1_000_200},
        {"action": "free_requested", "size": 512, "time_us": 1_000_250},
        {"action": "free_completed", "size": 512, "time_us": 1_000_300},
    ]
    points = timeline.replay(trace, before=100)
    assert [held for _, held in points] == [612, 1636, 1124]
    assert [at for at, _ in points] == pytest.approx([1.0001, 1.0002, 1.0003])


def test_thinning_keeps_the_peak():
    points = [(float(i), (i * 7919) % 1009) for i in range(1000)]
    kept = timeline.thin(points, 50)
    assert len(kept) == 50 and max(kept, key=lambda p: p[1]) == max(points, key=lambda p: p[1])
    assert timeline.thin([], 50) == []


def test_the_allocators_history_becomes_the_timeline_on_cuda(monkeypatch, tmp_path):
    model = tiny_model()
    settings = Settings(inner_steps=2, delta=0.1)
    method = baselines.build("misa", model, lambda ids: workload.chunked_loss(model, ids), settings)
    calls = []
    history = {"device_traces": [[{"action": "alloc", "size": 1000, "time_us": 1e15}]], "segments": []}
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options["enabled"]))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: history)
    monkeypatch.setattr(timeline, "held_bytes", lambda device: (500, 600))
    monkeypatch.setattr(timeline, "synchronize", lambda device: None)
    batches, snapshot = workload.token_batches(model, 1, 8, CPU), tmp_path / "a.pickle"
    record = timeline.record_timeline(method, batches, torch.device("cuda:0"), 7, snapshot)
    assert calls == ["all", None]
    assert [held for _, held in record["points"]] == [1500] and record["peak_bytes"] == 1500
    assert [one["phase"] for one in record["phases"]].count("switch") == 1
    assert pickle.loads(snapshot.read_bytes()) == history


# ---- counters ----


def test_a_limit_is_a_share_of_the_card(monkeypatch):
    shares = []
    card = type("Card", (), {"total_memory": 141 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    for limit in (int(CARD_GIB * GIB), 0, 200 * GIB):
        measure.limit_memory(torch.device("cuda:0"), limit)
    assert shares == [pytest.approx(24564 * 2**20 / (141 * GIB)), 1.0, 1.0]
    measure.limit_memory(CPU, GIB)
    assert len(shares) == 3


@pytest.mark.parametrize(
    ("listing", "wanted"),
    [
        (f"1, 300\n{os.getpid()}, 700", 700 << 20),
        ("1, 300", 300 << 20),  # a container's numbers of processes are not the driver's, but there is only one
        ("1, 300\n2, 400", None),
        (f"{os.getpid()}, [N/A]", None),
        (None, None),
    ],
    ids=["own process", "container", "two others", "not told", "no driver"],  # a process number differs by worker
)
def test_process_memory_is_what_the_driver_lists(monkeypatch, listing, wanted):
    monkeypatch.setattr(measure, "_output", lambda *command: listing)
    assert measure._nvml_process_bytes() == wanted


def test_spread_of_one_and_of_many_values():
    assert measure.spread([3.0]) == {"median": 3.0, "p20": 3.0, "p80": 3.0}
    many = measure.spread([float(i) for i in range(101)])
    # each value counts twice, which shifts a percentile by up to half a step
    assert many["median"] == 50 and abs(many["p20"] - 20) <= 0.5 and abs(many["p80"] - 80) <= 0.5
