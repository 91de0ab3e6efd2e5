"""Weight gradients written by their GEMM into the arena, against autograd and the hook path."""

import copy
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from misa_engine import MISA
from training import batches, loss_of, tiny, train, weights

EVERYTHING = {"delta": 1.0, "inner_steps": 100, "cold_start": "none"}


def gradients_of(model, ids, micro_batches=1):
    for _ in range(micro_batches):
        loss_of(model, ids).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def twins(family, dtype=torch.float32, checkpointing=False, options=EVERYTHING, **model_options):
    """The same model twice: gradients by GEMM, and by autograd and hook."""
    pair = []
    for gemm in (True, False):
        model = tiny(family, dtype, **model_options)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        pair.append((model, MISA(model, lr=1e-3, gemm_gradients=gemm, **options)))
    return pair


def written_by_gemm(model):
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt", "mixtral", "bert"])
def test_one_micro_batch_gives_the_bits_of_autograd(family, dtype, checkpointing):
    (a, _), (b, _) = twins(family, dtype, checkpointing)
    assert written_by_gemm(a) and not written_by_gemm(b)
    ids = next(batches())
    by_gemm, by_hook = gradients_of(a, ids), gradients_of(b, ids)
    assert by_gemm.keys() == by_hook.keys()
    for name, gradient in by_hook.items():
        assert torch.equal(by_gemm[name], gradient), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_differs_from_autograd_by_one_rounding_per_micro_batch(dtype, checkpointing):
    (a, _), (b, _) = twins("llama", dtype, checkpointing)
    ids = next(batches())
    by_gemm, by_hook = gradients_of(a, ids, 4), gradients_of(b, ids, 4)
    # Autograd rounds each product and each of the 3 sums, the GEMM only the sums: 7 roundings of at most half an ulp
    # of the largest partial sum, which with four equal micro-batches is the result itself.
    bound = 7 * 0.5 * torch.finfo(dtype).eps
    for name, gradient in by_hook.items():
        difference = (by_gemm[name].double() - gradient.double()).abs()
        assert bool((difference <= bound * gradient.double().abs() + 1e-30).all()), name


def test_the_hook_path_and_the_gemm_path_train_alike():
    (a, first), (b, second) = twins("llama", options={"delta": 0.3, "inner_steps": 3})
    losses = [train(model, optimizer, batches(), 40) for model, optimizer in ((a, first), (b, second))]
    assert first.active == second.active
    assert losses[0] == losses[1]


def test_only_layers_with_active_weights_are_touched_and_they_follow_the_draw():
    model = tiny()
    optimizer = MISA(model, lr=1e-3, delta=0.3, inner_steps=1)
    for _ in range(10):
        assert {f"{name}.weight" for name in written_by_gemm(model)} == set(optimizer.active)
        train(model, optimizer, batches(), 1)
    optimizer.remove()
    assert not written_by_gemm(model)


class Allocations(TorchDispatchMode):
    """Sizes of all new storages."""

    def __init__(self):
        super().__init__()
        self.sizes, self._seen = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in known:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return out


def _tensors(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Wide(nn.Module):
    """Weights of 64 x 96: no other tensor of a pass over 10 tokens is as large."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


@pytest.mark.parametrize("gemm", [True, False])
def test_no_temporary_of_the_size_of_a_weight_is_made(gemm):
    torch.manual_seed(0)
    model = Wide()
    optimizer = MISA(model, lr=1e-3, gemm_gradients=gemm, **EVERYTHING)
    optimizer.measure_on_arrival = False  # the norm's own scratch space would be counted
    size = 64 * 96 * 4
    for _ in range(2):  # the first micro-batch writes, the second adds
        loss = model(torch.randn(10, 64)).square().sum()
        with Allocations() as seen:
            loss.backward()
        assert (size in seen.sizes) == (not gemm)


def test_a_layer_used_twice_and_a_tied_embedding_add_up():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(16, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.head = nn.Linear(8, 16, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            x = self.embedding(ids)
            for layer in self.layers:
                x = layer(layer(x).tanh()).tanh()
            return self.head(x)

    def gradients(build):
        model = Reused()
        if build is not None:
            build(model)
        ids = torch.arange(12).view(2, 6)
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain = gradients(None)
    ours = gradients(lambda model: MISA(model, include_outside=True, always_train=("*.bias",), **EVERYTHING))
    assert plain.keys() == ours.keys() and "embedding.weight" in ours
    for name, gradient in plain.items():  # sums of two or three uses in another order: ~3x the worst difference seen
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_gradient_put_there_by_the_caller_is_added_to():
    model = tiny()
    optimizer = MISA(model, lr=1e-3, **EVERYTHING)
    ids, name = next(batches()), optimizer.active[0]
    expected = gradients_of(model, ids)[name] + 1
    optimizer.zero_grad()
    weight = model.get_parameter(name)
    weight.grad = torch.ones_like(weight)
    loss_of(model, ids).backward()
    torch.testing.assert_close(weight.grad, expected)
    assert weight.grad.untyped_storage().data_ptr() == optimizer.arena.grad.data_ptr()


def test_compiled_layers_get_no_graph_of_their_own_for_each_switch():
    graphs = {}
    for gemm in (False, True):
        torch._dynamo.reset()
        made = []

        def backend(graph, inputs, made=made):
            made.append(graph)
            return graph.forward

        model = tiny(num_hidden_layers=1)
        model.model.layers[0].compile(backend=backend)
        with torch._dynamo.config.patch(recompile_limit=64):
            train(model, MISA(model, lr=1e-3, delta=0.2, inner_steps=1, gemm_gradients=gemm), batches(), 10)
        graphs[gemm] = len(made)
    assert graphs[True] == graphs[False]


def count_writes(optimizer, monkeypatch):
    """Names of the weights whose gradients a GEMM wrote, in the order of the writes."""
    written, gemm = [], optimizer._intake._gemm
    write = gemm._written
    monkeypatch.setattr(gemm, "_written", lambda name: (written.append(name), write(name)))
    return written


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_to_the_dtype_of_the_weights_keeps_the_gemms_and_the_bits(family, checkpointing, monkeypatch):
    (a, first), (b, _) = twins(family, torch.bfloat16, checkpointing)
    written = count_writes(first, monkeypatch)
    ids = next(batches())
    for model in (a, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, ids)
        loss.backward()
    assert set(written) == {f"{name}.weight" for name in written_by_gemm(a)} and len(written) == len(set(written))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name


def test_autocast_casts_what_the_layer_before_it_left_in_float32(monkeypatch):
    layer, twin = (nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16)) for _ in "ab")
    twin.load_state_dict(layer.state_dict())
    optimizer = MISA(layer, lr=1e-3, include_outside=True, always_train=("0.bias",), **EVERYTHING)
    written = count_writes(optimizer, monkeypatch)
    x = torch.randn(3, 8)
    inputs = []
    for model in (layer, twin):
        inputs.append(x.clone().requires_grad_())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(inputs[-1])
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    assert written == ["0.weight"] and torch.equal(layer[0].weight.grad, twin[0].weight.grad)
    assert torch.equal(inputs[0].grad, inputs[1].grad) and inputs[0].grad.dtype == torch.float32


@pytest.mark.parametrize("when", ["autocast", "compile"])
def test_autograd_does_it_where_the_gemm_is_not_the_whole_story(when):
    (a, _), (b, _) = twins("llama")
    ids = next(batches())
    if when == "compile":
        for model in (a, b):
            for layer in model.model.layers:
                layer.compile(backend="eager")
        by_gemm, by_hook = gradients_of(a, ids), gradients_of(b, ids)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            by_gemm, by_hook = gradients_of(a, ids), gradients_of(b, ids)
    for name, gradient in by_hook.items():
        assert torch.equal(by_gemm[name], gradient), name


def test_compiled_layers_follow_the_draw():
    """torch 2.11 gives no gradients where ``requires_grad`` was switched on after the first call."""
    model = tiny()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    optimizer = MISA(model, lr=1e-3, delta=0.2, inner_steps=1, cold_start="none", rule="cyclic")
    seen = set()
    for _ in range(12):
        loss_of(model, next(batches())).backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(optimizer.active)
        seen |= set(optimizer.active)
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) > 8


def test_a_replaced_forward_of_someone_else_stays():
    model = tiny()
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = own = lambda x: F.linear(x, layer.weight) * 2
    optimizer = MISA(model, lr=1e-3, **EVERYTHING)
    loss_of(model, next(batches())).backward()
    assert layer.forward is own and layer.weight.grad.abs().sum() > 0
    optimizer.remove()
    assert layer.forward is own


def test_a_copied_or_pickled_model_is_a_plain_model():
    model = tiny()
    optimizer = MISA(model, lr=1e-3, **EVERYTHING)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    ids = next(batches())
    before = optimizer.arena.grad.clone()
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        loss_of(other.requires_grad_(True), ids).backward()
        assert all(p.grad is not None for p in other.parameters())
    assert torch.equal(optimizer.arena.grad, before)
    assert all(p.grad is None for p in model.parameters())


def test_a_dead_optimizer_does_not_hold_the_model():
    model = tiny()
    optimizer = MISA(model, lr=1e-3, **EVERYTHING)
    optimizer.remove()
    alive = weakref.ref(optimizer.arena)
    del optimizer
    import gc

    gc.collect()
    assert alive() is None


# ---- float32 gradient slots ----


@pytest.mark.parametrize("gemm", [True, False])
def test_float32_slots_do_not_round_between_micro_batches(gemm):
    model = tiny("llama", torch.bfloat16)
    optimizer = MISA(model, lr=1e-3, grad_dtype="float32", gemm_gradients=gemm, **EVERYTHING)
    data = batches()
    micro = [next(data) for _ in range(8)]
    single = []
    for ids in micro:
        loss_of(model, ids).backward()
        single.append({name: model.get_parameter(name).grad.clone() for name in optimizer.active})
        optimizer.zero_grad()
    for ids in micro:
        loss_of(model, ids).backward()
    for name in optimizer.active:
        gradient = model.get_parameter(name).grad
        assert gradient.dtype == torch.float32
        expected = sum(part[name].double() for part in single)
        scale = sum(part[name].double().abs() for part in single)
        # seven float32 sums
        assert bool(((gradient.double() - expected).abs() <= 7 * torch.finfo(torch.float32).eps * scale).all())


def test_float32_slots_train_and_leave_the_parameters_as_they_were():
    model = tiny("llama", torch.bfloat16)
    optimizer = MISA(model, lr=1e-2, delta=0.3, inner_steps=2, grad_dtype="float32")
    start = weights(model)
    train(model, optimizer, batches(), 20)
    assert optimizer.memory()["gradients"] == 4 * optimizer.arena.capacity
    assert any(not torch.equal(start[name], p) for name, p in model.named_parameters())
    inactive = [p for name, p in model.named_parameters() if name not in optimizer.active]
    assert all(p.grad_dtype == torch.bfloat16 for p in inactive)
    optimizer.remove()
    loss_of(model, next(batches())).backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
