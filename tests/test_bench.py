import json
import math
import os
import pickle
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from misa_engine.bench import baselines, cases, checks, measure, memory_round, processes, render, timeline, workload
from misa_engine.bench.cases import Case, empty_row, largest, run_case

CPU = torch.device("cpu")
GIB = 1 << 30
TINY = Case("tiny", "train", shape="tiny", device="cpu", length=16, delta=0.1, steps=3, warm_up=1, inner_steps=2)
METHODS = (
    "misa", "misa-int8", "misa-backward", "uniform", "lisa", "adamw", "adamw8bit", "lora", "badam",
)  # fmt: skip


def tiny_model(dtype=torch.float32):
    return workload.build_model("tiny", CPU, checkpointing=True, dtype=dtype)


def last_row(case):
    rows = []
    run_case(case, lambda row: rows.append(json.loads(json.dumps(row))))
    return rows[-1]


# ---- methods ----


def test_the_registry_has_every_method_with_a_summary():
    assert set(METHODS) < set(baselines.BASELINES)
    assert all(baseline.summary for baseline in baselines.BASELINES.values())
    assert set(memory_round.PEERS) == set(METHODS) - {"misa", "misa-int8"}


def expected_trainable(name, model):
    """Parameters that train at a time, counted from the shape alone; None where it is a range."""
    layer = sum(p.numel() for n, p in model.named_parameters() if ".layers.0." in n)
    outer = model.get_input_embeddings().weight.numel() + model.get_output_embeddings().weight.numel()
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    return {
        "adamw": sum(p.numel() for p in model.parameters()),
        "adamw8bit": sum(p.numel() for p in model.parameters()),
        "lora": sum(16 * (m.in_features + m.out_features) for m in linears),
        "badam": layer,
        "lisa": 2 * layer + outer,
    }.get(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_and_states_its_parameters_and_bytes(name, dtype):
    status = baselines.BASELINES[name].missing()
    if status is not None:
        pytest.skip(status)
    model = tiny_model(dtype)
    total, wanted = sum(p.numel() for p in model.parameters()), expected_trainable(name, model)
    settings = baselines.Settings(lr=1e-3, delta=0.1, inner_steps=2, accumulation=2)
    if name == "misa-backward":
        settings = replace(settings, max_grad_norm=None, accumulation=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = baselines.build(name, model, lambda ids: workload.chunked_loss(model, ids), settings)
    batches = workload.token_batches(model, 2, 16, CPU)
    losses = [float(method.step([next(batches) for _ in range(settings.accumulation)])) for _ in range(4)]
    assert all(math.isfinite(loss) for loss in losses)
    if wanted is not None:
        assert method.trainable_parameters == wanted
    else:
        assert 0 < method.trainable_parameters <= 0.1 * total
    changed = [n for n, p in method.model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert changed or name == "lora"  # LoRA changes none of the model's own
    assert sum(method.optimizer_bytes().values()) >= method.trainable_parameters  # at least one byte each
    if name not in ("adamw", "adamw8bit", "lora"):
        assert method.switches() == 2  # 4 steps, a switch after each 2


def test_adamw_bytes_by_category_are_those_of_its_tensors():
    model = tiny_model()
    method = baselines.build("adamw", model, lambda ids: workload.chunked_loss(model, ids), baselines.Settings())
    method.step([next(workload.token_batches(model, 1, 8, CPU))])
    sizes = method.optimizer_bytes()
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert sizes["gradients"] == sizes["first_moment"] == sizes["second_moment"] == weights
    assert sizes["scales_and_tables"] == 4 * len(list(model.parameters()))  # one float32 step each


def test_clipping_bounds_the_update_of_every_gradient():
    model = tiny_model()
    model.requires_grad_(True)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    settings = baselines.Settings(max_grad_norm=1e-3, accumulation=2)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    method = baselines.Method("sgd", model, lambda ids: workload.chunked_loss(model, ids), sgd, settings, dict)
    batches = workload.token_batches(model, 1, 8, CPU)
    phases = []
    method.step([next(batches), next(batches)], phases.append)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    # the step is the clipped gradient itself; 1e-3: fp32 weights near 1 (norms) round the tiny steps
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert phases == ["forward", "backward", "forward", "backward", "clip", "step"]


def test_unsupported_combinations_say_what_to_do():
    model = tiny_model()
    with pytest.raises(baselines.Unavailable, match="unsupported: .*accumulation 1"):
        settings = baselines.Settings(max_grad_norm=None, accumulation=2)
        baselines.build("misa-backward", model, lambda ids: ids, settings)
    with pytest.raises(baselines.Unavailable, match="unsupported: .*max_grad_norm"):
        baselines.build("misa-backward", model, lambda ids: ids, baselines.Settings())
    with pytest.raises(ValueError, match="unknown method 'sgd': choose among misa"):
        baselines.build("sgd", model, lambda ids: ids, baselines.Settings())


# ---- workload ----


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
    assert set(empty_row(TINY, "x")) <= set(row)
    phases = [one["phase"] for one in row["timeline"]["phases"]]
    assert phases == [*["forward", "backward"] * 2, "step", "switch", *["forward", "backward"] * 2, "step"]
    assert row["timeline"]["base_bytes"]["weights"] == row["weights_bytes"]


def test_a_missing_package_is_a_row(monkeypatch):
    needs = (("no_such_module", "no-such-package"),)
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

    monkeypatch.setattr(baselines.Method, "step", raises)
    row = last_row(TINY)
    assert row["status"] == "out of memory"
    assert row["peak_bytes"] > 0 and row["step_time_s"] is None


def test_any_other_error_is_a_row_with_its_message(monkeypatch):
    def raises(*args, **kwargs):
        raise RuntimeError("shapes do\nnot match")

    monkeypatch.setattr(baselines.Method, "step", raises)
    assert last_row(TINY)["status"] == "failed: RuntimeError: shapes do not match"


def test_what_counts_as_out_of_memory():
    assert measure.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert measure.is_out_of_memory(RuntimeError("CUDA driver error: out of memory"))
    assert not measure.is_out_of_memory(RuntimeError("expected scalar type Float"))
    assert not measure.is_out_of_memory(ValueError("out of memory"))


def test_switches_are_counted_and_their_memory_recorded():
    case = replace(TINY, kind="switches", inner_steps=1, accumulation=1, batch=1, steps=5)
    row = last_row(case)
    assert row["status"] == "ok" and row["switches"] == len(row["held_bytes"]) == 5


def test_growth_is_measured_from_the_second_switch(monkeypatch):
    held = iter([(9, 90), (10, 100), (10, 100), (13, 100), (11, 104)])
    monkeypatch.setattr(cases, "held_bytes", lambda device: next(held))
    row = last_row(replace(TINY, kind="switches", inner_steps=1, accumulation=1, batch=1, steps=5))
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
    case = replace(TINY, kind="longest", batch=1, accumulation=1, length_step=16, longest=256, length=64)
    row = last_row(replace(case, inner_steps=10**6, misa=memory_round.WORST_SET, checkpointing=checkpointing))
    assert row["status"] == "ok"
    assert row["longest"] == 96  # the largest multiple of 16 in 100
    assert {a["length"]: a["runs"] for a in row["attempts"]}[112] is False


@pytest.mark.parametrize("planned", [True, False])
def test_the_search_trains_the_worst_draw_of_the_plan(planned):
    case = replace(TINY, kind="longest", delta=0.3, misa=memory_round.WORST_SET)
    plan = checks.ask_plan(case) if planned else {"status": "no plan"}
    case = memory_round.searched_case(case, plan)
    optimizer = baselines.build("misa", tiny_model(), lambda ids: ids, case.settings).optimizer
    first_layer = {unit.name for unit in optimizer.units if ".layers.0." in unit.name}
    assert set(plan["worst_draw"] if planned else first_layer) <= set(optimizer.active)


def test_a_search_begins_where_the_plan_ends_and_keeps_its_reserve():
    case = replace(TINY, kind="longest", batch=1, limit_bytes=24 * GIB)
    searched = memory_round.searched_case(case, {**PLAN, "worst_draw": ["a"]})
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


def test_a_switch_is_cut_out_of_its_step():
    marks = [("forward", 10.0), ("backward", 11.0), ("step", 12.0), ("between", 13.0), ("end", 13.5)]
    cut = timeline.phases(marks, [(12.7, 12.9)], begin=10.0)
    assert [(p["phase"], round(p["begin_s"], 3), round(p["end_s"], 3)) for p in cut] == [
        ("forward", 0, 1),
        ("backward", 1, 2),
        ("step", 2, 2.7),
        ("switch", 2.7, 3),
    ]


def test_the_allocators_history_becomes_the_timeline_on_cuda(monkeypatch, tmp_path):
    model = tiny_model()
    settings = baselines.Settings(inner_steps=2, delta=0.1)
    method = baselines.build("misa", model, lambda ids: workload.chunked_loss(model, ids), settings)
    calls = []
    history = {"device_traces": [[{"action": "alloc", "size": 1000, "time_us": 1e15}]], "segments": []}
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options["enabled"]))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: history)
    monkeypatch.setattr(timeline, "held_bytes", lambda device: (500, 600))
    monkeypatch.setattr(timeline, "synchronize", lambda device: None)
    batches, snapshot = workload.token_batches(model, 1, 8, CPU), tmp_path / "snapshots" / "a.pickle"
    record = timeline.record_timeline(method, batches, 1, torch.device("cuda:0"), 7, snapshot)
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
    for limit in (int(memory_round.CARD_GIB * GIB), 0, 200 * GIB):
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


# ---- processes ----


@pytest.fixture(scope="module")
def server():
    runner = processes.ForkServer()
    yield runner
    runner.close()


def test_a_forked_case_returns_its_row(server):
    assert server.can_use("cpu") and not server.can_use("nonesuch")
    row = server.run(TINY, timeout_s=120)
    assert row["status"] == "ok" and row["settings"]["length"] == 16


def test_a_case_that_takes_too_long_is_ended_and_the_next_one_runs(server):
    endless = replace(TINY, steps=10**9)
    assert server.run(endless, timeout_s=1)["status"] == "timed out after 1 s"
    assert server.run(replace(TINY, method="adamw"), timeout_s=120)["status"] == "ok"


def test_a_case_whose_process_dies_says_how(server):
    row = server.run(replace(TINY, shape="nonesuch", method="nonesuch"), timeout_s=120)
    assert row["status"].startswith("failed: ")
    assert processes.how_it_ended(-9, 5, False, "") == "killed by the system (out of host memory?)"
    assert processes.how_it_ended(139, 5, False, "a\nb\n") == "failed: the process ended with code 139: b"


def test_a_new_interpreter_returns_its_row():
    row = processes.FreshProcesses().run(replace(TINY, method="adamw"), timeout_s=120)
    assert row["status"] == "ok" and row["method"] == "adamw"


def test_forks_are_given_up_where_they_cannot_use_the_device(monkeypatch, capsys):
    closed = []
    broken = type("Server", (), {"can_use": lambda self, device: False, "close": lambda self: closed.append(self)})
    monkeypatch.setattr(processes, "ForkServer", broken)
    assert isinstance(processes.make_processes("auto", "nonesuch"), processes.FreshProcesses)
    assert isinstance(processes.make_processes("fork", "nonesuch"), broken)
    assert len(closed) == 1
    assert "forked processes cannot use nonesuch here" in capsys.readouterr().out


# ---- the round ----


class OneProcess:
    """Runs cases here; what the round does around them is under test."""

    def run(self, case, timeout_s):
        return last_row(case)

    def close(self):
        pass


@pytest.fixture
def small_round(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_round, "make_processes", lambda kind, device: OneProcess())
    monkeypatch.setattr(memory_round, "ask_plan", lambda case: {"status": "no plan: none here"})
    memory_round.run_round(
        [TINY, replace(TINY, name="tiny adamw", method="adamw")], tmp_path, deadline_s=600, limit_bytes=0
    )
    return tmp_path / "memory_round.json"


def test_the_round_writes_environment_results_and_checks(small_round):
    document = json.loads(small_round.read_text())
    for key in ("hardware", "driver", "python", "versions", "commit", "command", "date", "alloc_conf"):
        assert key in document["environment"]
    assert document["environment"]["versions"]["torch"] == torch.__version__
    assert [row["case"] for row in document["results"]] == ["tiny", "tiny adamw"]
    for row in document["results"]:
        for key in ("method", "step_time_s", "tokens_per_s", "peak_bytes", "trainable_parameters", "heldout_loss"):
            assert key in row
        assert row["status"] == "ok"
    assert document["plans"] == {"tiny": {"status": "no plan: none here"}}
    assert {check["verdict"] for check in document["checks"]} == {"cpu: no memory claim"}


def test_a_stored_round_renders_to_a_page_and_pictures(small_round, capsys):
    small_round.with_suffix(".md").unlink(missing_ok=True)
    assert memory_round.main(["--render", str(small_round)]) == 0
    page = small_round.with_suffix(".md").read_text()
    assert "| tiny train | misa | 2 x 16 x 2 |" in page and "no plan: none here" in page
    assert "cpu: no memory claim" in capsys.readouterr().out
    assert "(memory_tiny.png)" in page
    assert (small_round.parent / "memory_tiny.png").read_bytes()[:4] == b"\x89PNG"


def test_cases_after_the_deadline_are_rows_too(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_round, "make_processes", lambda kind, device: OneProcess())
    monkeypatch.setattr(memory_round, "ask_plan", lambda case: {"status": "no plan"})
    document = memory_round.run_round([TINY], tmp_path, deadline_s=1, limit_bytes=0)
    assert document["results"][0]["status"] == "not run: the round's 1 s were over"


def test_the_options_are_checked(tmp_path, capsys):
    for words, said in (
        (["--render", str(tmp_path / "none.json")], "no such file"),
        (["--output", str(tmp_path), "--cases", "nonesuch", "--device", "cpu"], "--list names them"),
        (["--device", "cpu"], "--output FOLDER is needed"),
    ):
        with pytest.raises(SystemExit) as stopped:
            memory_round.main(words)
        assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_the_gpu_round_runs_what_is_promised_in_order():
    planned = memory_round.gpu_cases(24 * GIB)
    names = [case.name for case in planned]
    assert len(names) == len(set(names))
    first_five = ("2x2048 misa", "2x2048 misa-int8", "longest", "1x8192 misa", "200 switches")
    assert names[:5] == [f"llama-3-8b {what}" for what in first_five]
    assert all(case.limit_bytes == 24 * GIB and case.delta == 0.03 and case.checkpointing for case in planned)
    first = planned[0]
    assert (first.batch, first.length, first.accumulation, first.max_grad_norm) == (2, 2048, 2, 1.0)
    for kind in ("2x2048 misa", "1x8192 misa", "200 switches"):
        assert f"qwen2.5-7b {kind}" in names
    assert {case.method for case in planned} == set(METHODS)


# ---- the checks ----


def gpu_row(kind, **results):
    case = replace(TINY, name=f"big {kind}", kind=kind, shape="big", device="cuda:0", length=2048, steps=200)
    return {**empty_row(case, "ok"), **results}


def train_row(reserved, allocated=17 * GIB):
    times = {"median": 1.0, "p20": 0.9, "p80": 1.1}
    return gpu_row(
        "train", step_time_s=times, tokens_per_s=8192.0, peak_bytes=reserved, peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved, process_bytes=reserved + GIB // 2, trainable_parameters=240_000_000,
    )  # fmt: skip


PLAN = {
    "status": "ok",
    "bytes": {"weights": 15 * GIB, "activations": 2 * GIB, "cuda_context": GIB // 2, "slack": GIB},
    "max_tokens_per_micro_batch": 11_400,
}


def verdicts(row, plan=PLAN):
    return {check["check"]: check["verdict"] for check in checks.judge([row], {row["case"]: plan})}


def test_the_checks_pass_and_fail_at_their_bounds():
    assert verdicts(train_row(int(18.4 * GIB)))["reserved"] == "pass"
    assert verdicts(train_row(int(18.6 * GIB)))["reserved"] == "fail"
    # the plan gives the allocator 17 GiB
    assert verdicts(train_row(18 * GIB, int(17.4 * GIB)))["plan / allocated - 1"] == "pass"
    assert verdicts(train_row(18 * GIB, int(17.6 * GIB)))["plan / allocated - 1"] == "fail"
    assert verdicts(train_row(18 * GIB))["plan / reserved - 1"] == "pass"
    assert verdicts(train_row(19 * GIB))["plan / reserved - 1"] == "fail"
    assert verdicts(gpu_row("longest", longest_with_reserve=11_000))["longest / plan - 1"] == "pass"
    assert verdicts(gpu_row("longest", longest_with_reserve=10_752))["longest / plan - 1"] == "fail"
    growth = gpu_row("switches", growth_allocated_bytes=0, growth_reserved_bytes=1)
    assert verdicts(growth)["growth of allocated over 200 switches"] == "pass"
    assert verdicts(growth)["growth of reserved over 200 switches"] == "fail"


def test_what_was_not_measured_is_no_pass():
    failed = {**gpu_row("train"), "status": "timed out after 9 s"}
    assert verdicts(failed) == {"runs": "not measured (timed out after 9 s)"}
    assert verdicts({**failed, "status": "out of memory"}) == {"runs": "fail"}
    without_plan = verdicts(gpu_row("longest", longest=11_000), {"status": "no plan: x"})
    assert without_plan["longest / plan - 1"] == "not measured (ok)"


def test_the_reserve_is_what_an_allocator_does_not_see():
    assert checks.reserve_bytes(PLAN) == GIB * 3 // 2
    assert checks.allocator_bytes(PLAN) == 17 * GIB


def test_the_plan_of_a_case_is_that_of_its_method_and_limit():
    plain, int8 = (
        checks.ask_plan(next(case for case in memory_round.gpu_cases(24 * GIB) if case.name == name))
        for name in ("llama-3-8b 2x2048 misa", "llama-3-8b 2x2048 misa-int8")
    )
    assert plain["status"] == "ok" and (plain["batch"], plain["length"], plain["delta"]) == (2, 2048, 0.03)
    assert plain["card"]["total_bytes"] == 24 * GIB
    # 8 bytes of moments an element against 2 codes and two float32 scales each 64
    moments = plain["bytes"]["first_moment"] + plain["bytes"]["second_moment"]
    saved = sum(plain["bytes"].values()) - sum(int8["bytes"].values())
    assert saved / moments == pytest.approx(1 - 2.125 / 8, abs=0.001)
    assert int8["max_tokens_per_micro_batch"] > plain["max_tokens_per_micro_batch"] > 8192
    assert checks.reserve_bytes(plain) == plain["bytes"]["cuda_context"] + plain["bytes"]["slack"] > 0


def test_a_plan_that_cannot_be_had_is_said():
    plan = checks.ask_plan(replace(TINY, delta=0.001))
    assert plan["status"].startswith("no plan: ") and "delta" in plan["status"]


# ---- pictures and pages of a GPU's numbers ----


def gpu_document():
    points = [[i / 100, 17 * GIB + (i % 40) * GIB // 40] for i in range(200)]
    phases = [
        {"phase": phase, "begin_s": begin, "end_s": begin + 0.5}
        for begin, phase in ((0, "forward"), (0.5, "backward"), (1, "step"), (1.5, "switch"))
    ]
    base = {"weights": 15 * GIB, "gradients": GIB // 2, "first_moment": GIB, "second_moment": GIB // 2, "tables": 1000}
    row = train_row(18 * GIB) | {"timeline": {"points": points, "phases": phases, "base_bytes": base}}
    peer = {**train_row(18 * GIB), "case": "big peer", "method": "adamw8bit", "status": "out of memory"}
    environment = {
        "hardware": "Some GPU", "driver": "1.2", "date": "2026-01-01 00:00", "commit": "abc", "command": "python x",
        "versions": {"torch": "2.11", "triton": None},
    }  # fmt: skip
    return {
        "environment": environment,
        "limit": {"bytes": 24 * GIB, "what": "imitated"},
        "plans": {"big train": PLAN},
        "results": [row, {**peer, "step_time_s": None, "tokens_per_s": None}],
        "checks": checks.judge([row], {"big train": PLAN}),
    }


def test_a_page_shows_the_numbers_of_the_json():
    page = render.markdown(gpu_document())
    cells = ("2 x 2048 x 2", "240.00M", "1.000 (0.900-1.100)", "8,192", "17.00", "18.00", "18.50", "ok")
    assert f"| big train | misa | {' | '.join(cells)} |" in page
    assert "| big train | reserved | <= 18.5 GiB | 18.00 GiB | pass |" in page
    assert "| big train | plan / reserved - 1 | within 8% | -5.6% | pass |" in page
    assert "out of memory |" in page and "torch 2.11" in page and "triton" not in page


def test_pictures_are_drawn_of_a_gpu_round(tmp_path):
    drawn = render.pictures(gpu_document(), tmp_path)
    assert [path.name for path in drawn] == ["memory_big.png", "timeline_big_misa.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)
