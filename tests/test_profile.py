"""``misa profile``: phases that add up, a trace that opens, and a floor that trains nothing."""

import gzip
import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from misa_engine.bench import ledger, profiling, runner, workload
from misa_engine.bench.baselines import BASELINES, build
from misa_engine.bench.cases import run_case
from misa_engine.bench.ledger import OWN, Floor
from misa_engine.bench.method import Settings
from misa_engine.bench.profiling import PHASES, WINDOW, account
from misa_engine.cli.main import main
from misa_engine.engine.marks import PREFIX

CPU = torch.device("cpu")
BATCH, LENGTH, STEPS = 2, 48, 3  # 96 tokens: no width of the tiny model
LINEARS = 4 * 7 + 1  # seven matrices a layer, and the head


def tiny_method(name="misa", **misa):
    model = workload.build_model("tiny", CPU, checkpointing=False)
    _, loss = workload.make_loss(model, CPU)
    settings = Settings(
        lr=1e-3, delta=0.1, inner_steps=STEPS, max_grad_norm=None if "update_in" in misa else 1.0, misa=misa
    )
    floor = Floor(model, lambda twin: workload.make_loss(twin, CPU)[1])
    method = build(name, model, loss, settings)
    method.floor = floor
    return method


def batches_for(method):
    return workload.token_batches(method.model, BATCH, LENGTH, CPU)


def profiled(name, folder):
    method = tiny_method(name)
    for _ in range(2):
        method.step([next(batches_for(method))])
    found = profiling.profile_method(method, batches_for(method), 1, folder / "trace.json.gz")
    return found["profile"], found["profile_summary"]


class Here:
    """Runs cases in this process."""

    def __init__(self, device):
        pass

    def run(self, case, timeout_s):
        rows = []
        run_case(case, rows.append)
        return rows[-1]


@pytest.fixture(scope="module")
def command_output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    words = ["profile", "--method", "misa", "--model", "tiny", "--length", str(LENGTH), "--batch", str(BATCH)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "CaseProcesses", Here)
        assert (
            main(
                [
                    *words,
                    "--delta",
                    "0.1",
                    "--preset",
                    "cpu",
                    "--checkpointing",
                    "--steps",
                    "2",
                    "--output",
                    str(folder),
                ]
            )
            == 0
        )
    document = json.loads((folder / "results.json").read_text())
    return folder, document["results"][0], document


# ---- the command ----


def test_phases_add_up_to_the_step(command_output):
    _, result, _ = command_output
    rows, summary = result["profile"], result["profile_summary"]
    assert [row["phase"] for row in rows] == list(PHASES)
    assert sum(row["time_s"] for row in rows) == pytest.approx(summary["step_s"], rel=0.01)
    assert sum(row["share"] for row in rows) == pytest.approx(1, rel=0.01)
    assert all(row["time_s"] >= 0 for row in rows)


def test_every_phase_of_misa_is_seen_and_one_switch(command_output):
    _, result, _ = command_output
    time = {row["phase"]: row["time_s"] for row in result["profile"]}
    assert all(time[phase] > 0 for phase in PHASES if phase != "resting")  # that needs a rest rule
    launches = {row["phase"]: row["launches"] for row in result["profile"]}
    assert all(launches[phase] > 0 for phase in ("forward", "recompute", "backward dX", "backward dW", "update"))
    summary = result["profile_summary"]
    assert (summary["steps"], summary["switches"]) == (2, 1) and 0 < summary["overhead"] < 1
    assert summary["peak_bytes"] > 0
    assert summary["host_reads_a_switch"] >= 1


def test_the_trace_opens_and_names_the_phases(command_output):
    folder, *_ = command_output
    with gzip.open(folder / "trace_misa.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {f"{PREFIX}{phase}" for phase in ("data", "forward", "backward dW", "hooks", "switch")} <= names


def test_the_command_writes_environment_timeline_and_page(command_output):
    folder, result, document = command_output
    assert document["environment"]["versions"]["torch"] and result["settings"]["method"] == "misa"
    assert result["timeline"]["points"] and result["settings"]["folder"] == folder.name
    page = (folder / "results.md").read_text()
    assert all(f"| {phase} |" in page for phase in PHASES) and "host reads a switch" in page


@pytest.mark.parametrize(
    "words, said",
    [
        (["--method", "mis", "--model", "tiny"], ("unknown method 'mis'", *BASELINES)),
        (["--model", "llama-9"], ("unknown model 'llama-9'", "tiny", "llama-3-8b")),
        (["--model", "tiny", "--steps", "-1"], ("at least 1",)),
        (["--model", "tiny", "--length", "1"], ("at least 2",)),
        (["--model", "tiny", "--delta", "2"], ("--delta 2:",)),
        (["--model", "tiny", "--device", "tpu9"], ("--device tpu9",)),
        (["--model", "tiny", "--checkpointing", "perhaps"], ("true or false",)),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(words, said, tmp_path, capsys):
    assert main(["profile", *words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert all(word in error for word in said)


def test_a_gpu_that_is_not_there(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["profile", "--model", "tiny", "--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err


# ---- which GEMM makes a weight gradient ----


def test_adamw_makes_a_weight_gradient_for_every_matrix(tmp_path):
    rows, summary = profiled("adamw", tmp_path)
    launches = {row["phase"]: row["launches"] for row in rows}
    assert launches["backward dW"] == LINEARS + 1  # one GEMM each, and the embedding
    assert launches["hooks"] > 0  # autograd's own accumulation
    assert summary["switches"] == 0 and launches["switch"] == 0


def test_lora_makes_two_weight_gradients_for_every_matrix(tmp_path):
    if BASELINES["lora"].missing():
        pytest.skip(BASELINES["lora"].missing())
    rows, _ = profiled("lora", tmp_path)
    launches = {row["phase"]: row["launches"] for row in rows}
    assert launches["backward dW"] == 2 * (LINEARS - 1)  # the head has no adapter


def weight_gemms(model, x):
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as profiler:
        model(x).sum().backward()
        with record_function(WINDOW):
            with record_function(f"{PREFIX}forward"):
                loss = model(x).sum()
            with record_function(f"{PREFIX}backward dX"):
                loss.backward()
    return profiler


@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_layer_and_square_shapes_are_told_apart(bias, tmp_path):
    # 8 tokens of width 8: shapes say nothing, the order inside a node does
    model = nn.Sequential(*(nn.Linear(8, 8, bias=bias) for _ in range(3)))
    model[1].weight.requires_grad_(False)
    profiler = weight_gemms(model, torch.randn(8, 8, requires_grad=True))
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    seconds, costs = account(trace, cuda=False)
    assert costs["backward dW"].launches == 2
    assert sum(cost.time_s for cost in costs.values()) == pytest.approx(seconds, rel=0.01)


@pytest.mark.parametrize("shape", [(5, 8), (8, 8), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_lowest_layer_makes_no_gradient_of_its_input(shape, bias, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8, bias=bias), nn.Linear(8, 8, bias=bias), nn.Linear(8, 8, bias=bias))
    model[2].weight.requires_grad_(False)
    profiler = weight_gemms(model, torch.randn(*shape))
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    _, costs = account(trace, cuda=False)
    assert costs["backward dW"].launches == 2


# ---- a trace of a GPU, written by hand ----


def test_device_time_goes_to_the_phase_that_launched_it():
    def span(name, category, ts, dur, tid=1, **args):
        return {"ph": "X", "name": name, "cat": category, "ts": ts, "dur": dur, "tid": tid, "args": args}

    def memory(ts, size, tid=1):
        args = {"Bytes": size, "Device Type": 1}
        return {"ph": "i", "name": "[memory]", "cat": "cpu_instant_event", "ts": ts, "tid": tid, "args": args}

    events = [
        span(WINDOW, "user_annotation", 0, 1000),
        span(PREFIX + "forward", "user_annotation", 10, 100),
        span("cudaLaunchKernel", "cuda_runtime", 20, 5, correlation=1),
        memory(21, 400),
        # the backward pass has a thread of its own
        span("autograd::engine::evaluate_function: MulBackward0", "cpu_op", 200, 50, tid=2),
        span("cuLaunchKernel", "cuda_driver", 210, 5, tid=2, correlation=2),
        span(PREFIX + "backward dW", "user_annotation", 300, 50, tid=2),
        span("cudaLaunchKernelExC", "cuda_runtime", 310, 5, tid=2, correlation=3),
        memory(311, 100, tid=2),
        memory(320, -400, tid=2),
        span(PREFIX + "update", "user_annotation", 400, 100),
        span("cudaStreamSynchronize", "cuda_runtime", 410, 50, correlation=4),
        span(PREFIX + "rest (wait)", "user_annotation", 600, 300),
        span("cudaDeviceSynchronize", "cuda_runtime", 610, 200, correlation=5),
        *(span("k", "kernel", 500, 10 * n, tid=7, correlation=n) for n in (1, 2, 3)),
        span("cudaLaunchKernel", "cuda_runtime", 2000, 5, correlation=6),  # after the window
        span("k", "kernel", 2100, 5000, tid=7, correlation=6),
    ]
    seconds, costs = account({"traceEvents": events}, cuda=True)
    assert seconds == pytest.approx(1e-3)
    times = {phase: cost.time_s for phase, cost in costs.items() if cost.time_s}
    assert times == pytest.approx({"forward": 10e-6, "backward dX": 20e-6, "backward dW": 30e-6, "rest": 940e-6})
    assert [costs[p].launches for p in ("forward", "backward dX", "backward dW", "update")] == [1, 1, 1, 0]
    assert costs["update"].host_reads == 1 and sum(cost.host_reads for cost in costs.values()) == 1
    assert costs["forward"].peak_bytes == 400 and costs["backward dW"].peak_bytes == 500
    assert costs["backward dW"].allocated_bytes == 100


# ---- the ledger ----


def contents(method):
    optimizer = method.optimizer
    state = {name: value.clone() for name, value in method.model.state_dict().items()}
    arena = optimizer.arena
    state |= {name: getattr(arena, name).clone() for name in ("exp_avg", "exp_avg_sq", "step_sumsq", "tile_sumsq")}
    state["steps"] = arena.table.slot_step.clone()
    return state, (optimizer.total_steps, optimizer.inner_step, optimizer.active)


@pytest.mark.parametrize("misa", [{}, {"update_in": "backward"}, {"gemm_gradients": False}], ids=str)
def test_a_floor_step_changes_no_weight_and_no_state(misa):
    method = tiny_method(**misa)
    batches = batches_for(method)
    method.step([next(batches)])
    state, clocks = contents(method)
    for _ in range(2):
        method.floor(set(method.optimizer.arena.names), next(batches))
    after, clocks_after = contents(method)
    assert clocks_after == clocks
    assert [name for name in state if not torch.equal(state[name], after[name])] == []
    assert all(p.grad is None for p in method.model.parameters())


def test_the_floor_computes_the_same_gradients_with_the_same_weights():
    method = tiny_method()
    (ids,) = (next(batches_for(method)),)
    active = set(method.optimizer.arena.names)
    twin, seen = method.floor.model, {}
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(method.model.parameters(), twin.parameters(), strict=True))

    def see(name):
        def hook(parameter):
            seen[name] = parameter.grad.clone()

        return hook

    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(True)  # hooks go on what requires gradients; the floor sets it anew
        parameter.register_post_accumulate_grad_hook(see(name))
    method.floor(active, ids)
    method.loss(ids).backward()
    grads = {name: p.grad for name, p in method.model.named_parameters() if p.grad is not None}
    assert set(seen) == active == set(grads)
    for name, gradient in grads.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-5, atol=1e-8)  # a GEMM with another layout


@pytest.mark.parametrize("misa", [{}, {"update_in": "backward"}], ids=str)
def test_floor_steps_in_between_do_not_change_training(misa):
    plain, mixed = tiny_method(**misa), tiny_method(**misa)
    batches = batches_for(plain)
    for _ in range(2 * STEPS):
        ids = next(batches)
        mixed.floor(set(mixed.optimizer.arena.names), ids)
        for method in (plain, mixed):
            method.step([ids])
    assert plain.optimizer.active == mixed.optimizer.active
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), mixed.model.parameters(), strict=True))


@pytest.mark.parametrize("inner_steps", [3, 50], ids=["switches", "no switch in the compared steps"])
def test_the_ledger_has_floor_misa_overhead_and_parts(inner_steps):
    method = tiny_method(inner_steps=inner_steps)
    found = ledger.overhead(method, batches_for(method), 3, inner_steps)
    assert {"floor_s", "misa_s", "overhead", "parts"} <= set(found)
    assert found["floor_s"] > 0 and found["switch_s"] > 0
    assert found["overhead"] == pytest.approx(found["misa_s"] / found["floor_s"] - 1)
    assert set(found["parts"]) == set(OWN) and all(seconds > 0 for seconds in found["parts"].values())
    assert found["parts"]["switch"] == pytest.approx(found["switch_s"] / inner_steps)
    assert method.optimizer.total_steps == 1 + 3 + ledger.PARTS_STEPS
    assert json.loads(json.dumps(found)) == found
