"""Measure the memory of one forward and backward pass without a GPU, without weights and at full size.

The real transformers model runs on fake tensors: shapes, dtypes and autograd are real, the numbers do not exist. A
dispatch mode counts the storages that are alive. What differs on a GPU is left out or replaced so that the bytes are
those of a GPU:

* attention is SDPA's flash kernel, which on a CPU saves the same five tensors (q, k, v, output, log-sum-exp);
* Triton kernels (Liger, TRL's loss) write into buffers that their callers allocate, so they become no-ops;
* sizes are rounded to 512 bytes, as torch's CUDA caching allocator does.

Temporaries inside a CUDA kernel are not seen: flash attention's backward takes 4 bytes for each query element and, with
grouped heads, 4 more (dq in float32, dk and dv before they are summed over a group). At that moment the MLP's
activations of the layer are free already, which is more, so the peak does not move.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: torch's CUDA caching allocator rounds every request up to this many bytes (kMinBlockSize).
ALLOCATION = 512


@dataclass(frozen=True)
class Measurement:
    """Bytes of one forward and backward pass, weights and gradient slots excluded."""

    peak: int
    """Most bytes alive at once."""
    saved: int
    """Bytes alive between forward and backward."""
    at: str
    """Operation after which the peak was reached."""
    alive: tuple[tuple[str, tuple[int, ...], torch.dtype, int], ...]
    """(operation, shape, dtype, bytes) of every storage alive at the peak, in order of allocation."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations under it return, from their birth to their death."""

    def __init__(self, ignored: Collection[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self.at = ""
        self.alive: dict[int, tuple[str, tuple[int, ...], torch.dtype, int]] = {}
        self.alive_at_peak: tuple[tuple[str, tuple[int, ...], torch.dtype, int], ...] = ()
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _REPLACED.get(func)
        result = replacement(func, args, kwargs or {}) if replacement else func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._register(leaf, str(func))
        if self.live > self.peak:
            self.peak, self.at, self.alive_at_peak = self.live, str(func), tuple(self.alive.values())
        return result

    def _register(self, tensor: Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
        self.live += size
        self.alive[key] = (operation, tuple(tensor.shape), tensor.dtype, size)

        def freed(_: Any) -> None:
            self.live -= size
            del self._known[key], self.alive[key]

        self._known[key] = weakref.ref(storage, freed)


def _all_rows(func: Any, args: Any, kwargs: Any) -> Any:
    """``hidden[mask]`` with every position chosen: the shape would depend on numbers that do not exist."""
    source, indices = args[0], args[1]
    if len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool:
        return source.flatten(0, indices[0].ndim - 1).clone()
    return func(*args, **kwargs)


def _all_rows_put(func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient of ``_all_rows``: written into a tensor of the source's shape that autograd has allocated."""
    target, indices = args[0], args[1]
    if len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool:
        return target if func is torch.ops.aten._index_put_impl_.default else torch.empty_like(target)
    return func(*args, **kwargs)


_REPLACED: dict[Any, Callable[[Any, Any, Any], Any]] = {
    torch.ops.aten._local_scalar_dense.default: lambda func, args, kwargs: 1,  # .item()
    torch.ops.aten.equal.default: lambda func, args, kwargs: False,  # "is this gradient 1.0?"
    torch.ops.aten.index.Tensor: _all_rows,
    torch.ops.aten._index_put_impl_.default: _all_rows_put,
    torch.ops.aten.index_put.default: _all_rows_put,
}


class _GradientToSlot(torch.autograd.Function):
    """A linear layer whose weight gradient is written by the GEMM into a slot that exists already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.slot = slot
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        dx = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        torch.mm(gradient.flatten(0, -2).t(), x.flatten(0, -2), out=ctx.slot)
        return dx, None, None, None


def fake_model(config: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[FakeTensorMode, Any]:
    """The model of a transformers config with fake weights, all frozen, in training mode."""
    from transformers import AutoModelForCausalLM

    mode = FakeTensorMode()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one
    with mode:
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    if id(p) not in made:
                        made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False)
                    module._parameters[name] = made[id(p)]
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
    return mode, model.train()


def measure(
    config: Any,
    active: Collection[str],
    *,
    resting: Collection[str] = (),
    batch: int = 1,
    length: int = 1024,
    checkpointing: bool = True,
    loss: str = "chunked",
    liger: bool = False,
    gemm_gradients: bool = True,
    padded: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    residents: str | None = None,
) -> Measurement:
    """Run one forward and backward pass on fake tensors.

    Args:
        config: a transformers config; its number of layers is what is run.
        active: names of the parameters that train.
        resting: names of those whose gradients a rest rule uses as they appear, without a slot.
        batch: sequences.
        length: tokens of each.
        checkpointing: recompute each layer in the backward pass (non-reentrant, inputs need no gradient).
        loss: "plain" (the model's own), "chunked" (TRL's fused head) or "liger" (Liger's fused linear cross-entropy).
        liger: Liger's RMSNorm, SwiGLU and RoPE; liger-kernel must be installed.
        gemm_gradients: weight gradients of linear layers go straight into slots that are not counted.
        padded: sequences of unequal length, so that attention gets a mask.
        dtype: of the weights.
        residents: format in which all matrices that do not train rest; their bytes and the workspace are not counted.
    """
    mode, model = fake_model(config, dtype)
    stack = ExitStack()
    if liger or loss == "liger":
        stack.enter_context(_liger(model, layers=liger, head=loss == "liger"))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
    ignored = [*model.parameters(), *model.buffers()]
    if residents is not None:
        ignored += _put_to_rest(model, residents, active, mode, stack)
    with mode:
        ignored += _activate(model, active, gemm_gradients)
        _activate(model, resting, gemm_gradients=False)
        ids = torch.zeros(batch, length, dtype=torch.long)
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        if padded:
            inputs["attention_mask"] = torch.ones_like(ids)
    tracker = LiveBytes([*ignored, ids])
    with stack, _like_a_gpu(loss), mode, tracker:
        if loss == "chunked":
            _add_fused_head(model)
            outputs = model(**inputs, fused_lm_head=True)
            value = -outputs.log_probs.sum() / length  # as SFTTrainer.compute_loss sums it
        else:
            outputs = model(**inputs)
            value = outputs.loss
            del outputs  # as Trainer.compute_loss drops them
        saved = tracker.live
        value.backward()
    return Measurement(tracker.peak, saved, tracker.at, tracker.alive_at_peak)


def _put_to_rest(
    model: nn.Module, kind: str, active: Collection[str], mode: FakeTensorMode, stack: ExitStack
) -> list[Tensor]:
    """Let everything but ``active`` rest; return what that takes.

    The reference would expand by way of float32 copies; a GPU's kernel writes into the workspace, so it is a no-op. On
    fake tensors autograd is not plain, but a run's is.
    """
    from misa_engine.engine.residents import Residents, forward, matrix

    stack.enter_context(mock.patch.object(forward, "plain_autograd", lambda x: True))
    for name in ("quantise", "dequantise"):
        stack.enter_context(mock.patch.object(matrix, name, lambda *args, **kwargs: None))
    with mode:
        held = Residents(model, kind)  # and not rest(), whose model.to() would make new fake parameters
        for name in held.names:
            held.hold(name, held.matrix(name).parameter.detach())
        held.wake(active)
    packed = [each for name in held.names if (each := held.matrix(name).packed) is not None]
    return [held.workspace, *(tensor for each in packed for tensor in (each.codes, each.steps))]


def _activate(model: nn.Module, active: Collection[str], gemm_gradients: bool) -> list[Tensor]:
    """Let ``active`` train; return the gradient slots."""
    slots = []
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if name not in active:
            continue
        parameter.requires_grad_(True)
        owner = modules[name.rpartition(".")[0]]
        if gemm_gradients and type(owner) is nn.Linear and name.endswith(".weight"):
            slots.append(torch.empty_like(parameter, requires_grad=False))
            vars(owner)["forward"] = _slot_forward(owner, slots[-1])
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    return slots


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None  # the optimizer's hook copies it into its slot


def _slot_forward(owner: nn.Linear, slot: Tensor) -> Any:
    return lambda x: _GradientToSlot.apply(x, owner.weight, owner.bias, slot)


class _NoKernel:
    """Stands for a Triton kernel that writes into buffers its caller has allocated."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def _like_a_gpu(loss: str) -> Iterator[None]:
    """Take the paths that torch, transformers and TRL take on a GPU, for full sequences."""
    import transformers.masking_utils

    with ExitStack() as stack:
        if hasattr(transformers.masking_utils, "find_packed_sequence_indices"):
            # it reads position ids, which have no values here; a full sequence is one sequence
            stack.enter_context(
                mock.patch.object(transformers.masking_utils, "find_packed_sequence_indices", lambda ids: None)
            )
        for target in ("trl.kernels.chunked_logprob", "trl.trainer.utils") if loss == "chunked" else ():
            module = _imported(target)
            for name, value in (
                ("_use_triton", lambda device: True),
                ("_forward_kernel", _NoKernel()),
                ("_backward_kernel", _NoKernel()),
                ("_addmm_fp32", lambda acc, a, b: None),  # addmm(out_dtype=float32, out=acc), CUDA only
            ):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        yield


@contextmanager
def _liger(model: nn.Module, layers: bool, head: bool) -> Iterator[None]:
    """Liger's modules in place of the model's, their Triton kernels as no-ops; undone at the end."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    home = import_module(type(model).__module__)
    before = dict(vars(home))
    names = {
        "rms_norm": (
            "_rms_norm_forward_kernel",
            "_block_rms_norm_forward_kernel",
            "_rms_norm_backward_kernel",
            "_block_rms_norm_backward_kernel",
        ),
        "swiglu": ("_swiglu_forward_kernel", "_swiglu_backward_kernel"),
        "rope": ("_triton_rope",),
        "fused_linear_cross_entropy": ("liger_cross_entropy_kernel", "element_mul_kernel"),
    }
    with ExitStack() as stack:
        for module, kernels in names.items():
            target = import_module(f"liger_kernel.ops.{module}")
            for kernel in kernels:
                stack.enter_context(mock.patch.object(target, kernel, _NoKernel()))
            if module == "fused_linear_cross_entropy":
                stack.enter_context(mock.patch.object(target, "_can_use_mm_out", lambda x, weight: True))
        # the first call looks for backends; the errors of those that are missing would hold its tensors for ever
        rope = import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb
        rope(*(torch.zeros(1, 1, 1, 2) for _ in range(2)), *(torch.zeros(1, 1, 2) for _ in range(2)))
        _apply_liger_kernel_to_instance(
            model, rope=layers, rms_norm=layers, swiglu=layers, cross_entropy=False, fused_linear_cross_entropy=head
        )
        try:
            yield
        finally:
            vars(home).clear()
            vars(home).update(before)


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


def _add_fused_head(model: Any) -> None:
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
