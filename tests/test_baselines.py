"""Every method that ``misa bench`` compares trains a tiny Llama, or says why it cannot."""

import math
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from misa_engine import MISA
from misa_engine.bench import baselines, workload
from misa_engine.bench.baselines import BASELINES, build
from misa_engine.bench.method import Settings, Unavailable, stored_tensors
from misa_engine.bench.unfused import UnfusedMISA
from misa_engine.engine.marks import observed

CPU = torch.device("cpu")
SETTINGS = Settings(lr=1e-3, delta=0.1, inner_steps=2, galore_rank=16)
IN_BACKWARD = ("misa-backward", "lomo", "adalomo")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def tiny_model(dtype=torch.float32):
    return workload.build_model("tiny", CPU, checkpointing=True, dtype=dtype)


def make(name, model, settings=SETTINGS):
    """The method, or a skip that names the missing package."""
    status = BASELINES[name].missing()
    if status is not None:
        pytest.skip(status)
    if name == "misa-backward":
        settings = replace(settings, max_grad_norm=None)
    return build(name, model, lambda ids: workload.chunked_loss(model, ids), settings)


def batches(model, count):
    stream = workload.token_batches(model, 2, 16, CPU)
    return [next(stream) for _ in range(count)]


def expected_trainable(name, model):
    """Parameters that train at a time, counted from the shape alone."""
    total = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for n, p in model.named_parameters() if ".layers.0." in n)
    outer = model.get_input_embeddings().weight.numel() + model.get_output_embeddings().weight.numel()
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    lora = sum(16 * (m.in_features + m.out_features) for m in linears)
    own = {
        "lora": lora,
        "rslora": lora,
        "dora": lora + sum(m.out_features for m in linears),  # one magnitude an output
        "badam": layer,
        "badam-like": layer,
        "lisa": 2 * layer + outer,
        "lisa-layers": 2 * layer,
    }
    return own.get(name, total)


@DTYPES
@pytest.mark.parametrize("name", BASELINES)
def test_a_method_trains_or_says_why_it_cannot(name, dtype):
    model = tiny_model(dtype)
    total, wanted = sum(p.numel() for p in model.parameters()), expected_trainable(name, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        method = make(name, model)
    except Unavailable as error:
        assert name in ("flashadamw", "adalomo") and re.match(r"needs CUDA: (flashoptim|lomo-optim)", str(error))
        return
    adapters = {n: p.detach().clone() for n, p in method.model.named_parameters() if p.requires_grad}
    # torchao compiles its update for each shape, ten seconds of C++ each; its plain version is the same arithmetic
    with torch.compiler.set_stance("force_eager" if name == "adamw8bit-ao" else "default"):
        losses = [float(method.step([ids])) for ids in batches(model, 3)]
    assert all(math.isfinite(loss) for loss in losses)
    resting = name in ("misa", "misa-int8", "misa-backward")  # every matrix of the layers takes a gradient
    if resting:
        assert 0.1 * total < method.trainable_parameters < total
    elif name in ("misa-none", "unfused-misa", "uniform"):
        assert 0 < method.trainable_parameters <= 0.1 * total
    else:
        assert method.trainable_parameters == wanted
    after = dict(method.model.named_parameters())
    if name in ("lora", "rslora", "dora"):
        moved = [n for n, weight in adapters.items() if not torch.equal(weight, after[n])]
        assert any("lora_B" in n for n in moved)
    else:
        assert any(not torch.equal(weight, after[n]) for n, weight in before.items())
    sizes = method.optimizer_bytes()
    # at least one byte each; LOMO holds no moments
    stateless = name == "lomo" or resting
    assert sum(sizes.values()) >= (0 if stateless else method.trainable_parameters) and min(sizes.values()) >= 0
    if name in ("misa", "misa-none", "unfused-misa", "uniform", "lisa", "lisa-layers", "badam", "badam-like"):
        assert method.switches() == 1  # three steps, a switch after the second
    else:
        assert method.switches() in (0, 1)


def test_the_wanted_methods_are_registered_and_only_apollo_must_be_named():
    wanted = {
        *("misa", "unfused-misa", "uniform", "lisa", "lisa-layers", "badam-like", "adamw", "adamw-fp32", "adamw8bit"),
        *("adamw8bit-ao", "flashadamw", "kahan", "lora", "dora", "galore", "apollo", "badam", "lomo", "adalomo"),
    }
    assert wanted <= set(BASELINES)
    assert [name for name, baseline in BASELINES.items() if baseline.opt_in] == ["apollo"]
    assert "CC-BY-NC" in BASELINES["apollo"].opt_in and "--methods apollo" in BASELINES["apollo"].opt_in


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(baselines, "installed", lambda package: False)
    wanted = {"galore": "galore-torch bitsandbytes", "kahan": "torch-optimi", "lomo": "lomo-optim", "dora": "peft"}
    for name, package in wanted.items():
        with pytest.raises(Unavailable, match=f"missing: pip install {package}$"):
            build(name, tiny_model(), lambda ids: ids, SETTINGS)
    with pytest.raises(Unavailable, match=r"missing: pip install apollo-torch \(opt-in: .*CC-BY-NC"):
        build("apollo", tiny_model(), lambda ids: ids, SETTINGS)
    assert BASELINES["unfused-misa"].missing() is None


def test_a_package_that_cannot_be_imported_is_a_status(monkeypatch):
    def broken(model, loss, settings, **options):
        raise ImportError("libcudart.so.12: no such file")

    monkeypatch.setitem(BASELINES, "kahan", replace(BASELINES["kahan"], build=broken, needs=()))
    with pytest.raises(Unavailable, match="cannot be imported: libcudart.so.12"):
        build("kahan", tiny_model(), lambda ids: ids, SETTINGS)


@pytest.mark.parametrize("name", IN_BACKWARD)
def test_an_update_inside_backward_refuses_accumulation(name):
    with pytest.raises(Unavailable, match="use accumulation 1"):
        make(name, tiny_model(), replace(SETTINGS, accumulation=2))


# ---- unfused MISA ----


def unfused(model, **own):
    return make("unfused-misa", model, replace(SETTINGS, misa=own))


@DTYPES
def test_unfused_misa_is_adamw_on_fp32_copies_of_the_active_matrices(dtype):
    model, twin = tiny_model(dtype), tiny_model(dtype)
    method = unfused(model)
    data = batches(model, 5)
    for start in (0, 2, 4):  # rounds of two steps, the last one begun
        active = list(method.optimizer.active)
        weights = dict(twin.named_parameters())
        masters = [weights[name].detach().float() for name in active]
        adam = torch.optim.AdamW(masters, lr=SETTINGS.lr, weight_decay=0.0)  # torch's default loop: foreach or not
        for ids in data[start : start + 2]:
            method.step([ids])
            twin.zero_grad(set_to_none=True)
            for name, weight in weights.items():
                weight.requires_grad_(name in active)
            workload.chunked_loss(twin, ids).backward()
            torch.nn.utils.clip_grad_norm_([weights[name] for name in active], SETTINGS.max_grad_norm)
            for name, master in zip(active, masters, strict=True):
                master.grad = weights[name].grad.float()
            adam.step()
            with torch.no_grad():
                for name, master in zip(active, masters, strict=True):
                    weights[name].copy_(master)
        for name, weight in model.named_parameters():
            # 0 observed; 1 ulp leaves room for another order of the same operations in another torch
            torch.testing.assert_close(weight, weights[name], rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert method.switches() == 2


def test_unfused_misa_draws_what_misa_draws():
    """Same partition, budget, sampler: equal active sets while the draws do not depend on measured scores."""
    model, twin = tiny_model(), tiny_model()
    method = unfused(model, rule="uniform")
    engine = make("uniform", twin)
    assert isinstance(method.optimizer, UnfusedMISA) and isinstance(engine.optimizer, MISA)
    seen = set()
    for ids in batches(model, 8):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in twin.named_parameters() if p.requires_grad}
        seen.add(frozenset(trained))
        losses = float(method.step([ids])), float(engine.step([ids]))
        # fp32 sums in another order, and a matrix drawn twice in a row keeps its moments only in the engine
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(seen) > 1


@DTYPES
def test_unfused_misa_bytes_are_those_of_its_tensors(dtype):
    model = tiny_model(dtype)
    method = unfused(model, inner_steps=5)
    method.step(batches(model, 1))
    held = method.optimizer.adamw.state.values()
    numel = method.trainable_parameters
    assert method.optimizer_bytes() == {
        "gradients": numel * (dtype.itemsize + 4),
        "master_weights": sum(clone.nbytes for clone in method.optimizer.clones.values()),
        "first_moment": sum(state["exp_avg"].nbytes for state in held),
        "second_moment": sum(state["exp_avg_sq"].nbytes for state in held),
        "scales_and_tables": sum(state["step"].nbytes for state in held),
    }
    assert method.optimizer_bytes()["master_weights"] == 4 * numel


def test_unfused_misa_refuses_what_only_the_engine_has():
    for own in (
        {"state_dtype": "int8"},
        {"preset": "paper"},
        {"update_in": "backward"},
        {"bias_correction": False},
        {"delta": 1e-6},
    ):
        with pytest.raises(Unavailable, match="unsupported: "):
            unfused(tiny_model(), **own)


def test_the_learning_rate_of_the_group_reaches_unfused_misa():
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = unfused(model)
    method.optimizer.param_groups[0]["lr"] = 0.0
    method.step(batches(model, 1))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- the peers' own ----


def test_fp32_master_weights_follow_adamw_on_an_fp32_copy_of_a_bf16_model():
    model, twin = tiny_model(torch.bfloat16), tiny_model(torch.bfloat16)
    method = make("adamw-fp32", model)
    masters = [p.detach().float() for p in twin.parameters()]
    adam = torch.optim.AdamW(masters, lr=SETTINGS.lr, weight_decay=0.0)
    for ids in batches(model, 3):
        method.step([ids])
        workload.chunked_loss(twin, ids).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), SETTINGS.max_grad_norm)
        for weight, master in zip(twin.parameters(), masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        adam.step()
        with torch.no_grad():
            for weight, master in zip(twin.parameters(), masters, strict=True):
                weight.copy_(master)
    for own, other in zip(method.optimizer.masters, masters, strict=True):
        # fused and default AdamW round differently; a bf16 weight on the edge then moves a gradient: 7e-5 seen
        torch.testing.assert_close(own, other, rtol=0, atol=2e-4)
    numel = sum(p.numel() for p in model.parameters())
    sizes = method.optimizer_bytes()
    assert {sizes[key] for key in ("gradients", "master_weights", "first_moment", "second_moment")} == {4 * numel}


def test_an_fp32_model_needs_no_master_weights():
    models = tiny_model(), tiny_model()
    methods = make("adamw-fp32", models[0]), make("adamw", models[1])
    for ids in batches(models[0], 2):
        for method in methods:
            method.step([ids])
    for own, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(own, other)  # the same call
    assert methods[0].optimizer_bytes() == methods[1].optimizer_bytes()


@DTYPES
def test_galore_holds_moments_of_the_rank_and_counts_its_projections(dtype):
    model = tiny_model(dtype)
    method = make("galore", model)
    method.step(batches(model, 1))
    matrices = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    rank, item = SETTINGS.galore_rank, dtype.itemsize
    other = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in matrices)
    sizes = method.optimizer_bytes()
    assert (
        sizes["first_moment"] == sizes["second_moment"] == item * (other + sum(rank * max(p.shape) for p in matrices))
    )
    assert sizes["projections"] == item * sum(rank * min(p.shape) for p in matrices)
    wide = make("galore", tiny_model(dtype), replace(SETTINGS, galore_rank=1000))
    assert {group["rank"] for group in wide.optimizer.param_groups[1:]} == {64, 128}


def test_kahan_compensates_bf16_weights_only():
    for dtype, compensated in ((torch.bfloat16, True), (torch.float32, False)):
        model = tiny_model(dtype)
        method = make("kahan", model)
        method.step(batches(model, 1))
        numel = sum(p.numel() for p in model.parameters())
        assert (method.optimizer_bytes().get("residual_bits", 0) >= 2 * numel) == compensated


@DTYPES
def test_lomo_is_sgd_with_the_clipped_gradient(dtype):
    model, twin = tiny_model(dtype), tiny_model(dtype)
    settings = replace(SETTINGS, max_grad_norm=0.1)
    method = make("lomo", model, settings)
    (ids,) = batches(model, 1)
    phases = []
    with observed(lambda name: phases.append(name) or nullcontext()):
        method.step([ids])
    assert [name for name in phases if name != "recompute"] == ["forward", "clip", "backward"]
    workload.chunked_loss(twin, ids).backward()
    gradients = [p.grad.float() for p in twin.parameters()]
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    assert norm > 0.1
    for own, weight, gradient in zip(model.parameters(), twin.parameters(), gradients, strict=True):
        expected = (weight.detach().float() - SETTINGS.lr * 0.1 / norm * gradient).to(dtype)
        torch.testing.assert_close(own.detach(), expected, rtol=torch.finfo(dtype).eps, atol=1e-8)
    assert all(p.grad is None for p in model.parameters())


def test_a_quantised_state_counts_its_codes_and_scales_not_what_it_stands_for():
    if (status := BASELINES["adamw8bit-ao"].missing()) is not None:
        pytest.skip(status)
    from torchao.optim.subclass_8bit import OptimState8bit

    state = OptimState8bit.zeros((128, 64), signed=True, block_size=256)
    codes, scales, table = stored_tensors(state)
    assert (codes.nbytes, scales.nbytes, table.nbytes) == (128 * 64, 4 * 128 * 64 // 256, 4 * 256)
