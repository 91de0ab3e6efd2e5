"""The weight gradient of an active linear layer, written by the GEMM that computes it straight into its arena slot.

Left to itself, autograd computes dW = dYᵀ·X into a new tensor (112 MiB for an MLP matrix of Llama-3-8B) and then copies
or adds it to where it belongs: with accumulation about 8 bytes of traffic per parameter and micro-batch more than

    first micro-batch    slot  = dYᵀ·X
    every later use      slot += dYᵀ·X        one rounding, inside the GEMM

For that an active layer's ``forward`` is replaced, on the instance, by one whose backward does this and reports no
weight gradient to autograd. A slot is written only when autograd would have accumulated into that parameter's ``.grad``
at that moment. Everywhere else this steps aside, and autograd and the parameter's hook do their work as in plain torch:

    in the forward pass    with another dtype or kind of input, or an autocast to another dtype than the weights', with
                           other weights than the optimizer's (functional_call, parametrizations), inside torch.func,
                           torch.jit.trace and forward-mode AD; modules that changed ``forward`` themselves, and
                           compiled ones, where a new ``forward`` at each switch would be a new graph, are left alone
    in the backward pass   for torch.autograd.grad, for backward(inputs=...) without the weight, with create_graph,
                           under vmap, with hooks of others on the weight, with a ``.grad`` that is not the slot, and
                           in graphs from before a switch

Weights used elsewhere too (tied, reused) add up in the slot whichever way they come. Only a hook on the AccumulateGrad
node itself cannot be seen from here: it gets None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from misa_engine.engine.marks import phase

#: name -> (slot in the parameter's shape, whether the gradient is added to its content); None: left to autograd
FindSlot = Callable[[str], tuple[Tensor, bool] | None]


class GemmGradients:
    """Replaces and restores ``forward`` of the linear layers whose weights are active.

    Args:
        model: the model.
        find_slot: where the gradient of a parameter goes, and whether to add it to what is there; None when it must
            come from autograd.
        written: called with the parameter's name when its slot was written.
    """

    def __init__(self, model: nn.Module, find_slot: FindSlot, written: Callable[[str], None]):
        self._model, self._find_slot, self._written = model, find_slot, written
        self._parameters = dict(model.named_parameters())  # tied ones once
        shared = {id(parameter): name for name, parameter in self._parameters.items()}
        self._modules: dict[str, list[nn.Module]] = {}
        for module in model.modules():
            name = shared.get(id(getattr(module, "weight", None)))
            if name is not None and stores_transposed(module) is not None:
                self._modules.setdefault(name, []).append(module)
        self._replaced: list[nn.Module] = []

    def bind(self, names: Iterable[str]) -> None:
        """Let exactly the layers with these weights write into the arena."""
        for module in self._replaced:
            if isinstance(module.__dict__.get("forward"), _ForwardIntoSlot):
                del module.forward
        self._replaced = []
        compiled = compiled_modules(self._model)
        for name in names:
            for module in self._modules.get(name, ()):
                # someone else's forward (accelerate's offloading) stays
                if module not in compiled and "forward" not in module.__dict__:
                    transposed = stores_transposed(module)
                    assert transposed is not None
                    module.forward = _ForwardIntoSlot(module, self._parameters[name], name, transposed, self)
                    self._replaced.append(module)

    def write(self, name: str, left: Tensor, right: Tensor) -> bool:
        """Compute slot (+)= leftᵀ·right, if the slot is where it belongs.

        Args:
            name: the parameter.
            left: (tokens, rows of the weight).
            right: (tokens, columns of the weight).

        Returns:
            False when nothing was written and autograd must be given the gradient.
        """
        with phase("backward dW"):
            found = self._find_slot(name)
            if found is None:
                return False
            slot, add = found
            if slot.dtype == left.dtype:
                torch.addmm(slot, left.t(), right, out=slot) if add else torch.mm(left.t(), right, out=slot)
            elif slot.is_cuda:  # float32 slots of a bfloat16 model: the GEMM's own accumulator, not rounded in between
                if add:
                    torch.addmm(slot, left.t(), right, out_dtype=slot.dtype, out=slot)
                else:
                    torch.mm(left.t(), right, out_dtype=slot.dtype, out=slot)
            else:  # no such GEMM on a CPU
                product = torch.mm(left.t().to(slot.dtype), right.to(slot.dtype))
                slot.add_(product) if add else slot.copy_(product)
            with phase("hooks"):
                self._written(name)
        return True


def compiled_modules(model: nn.Module) -> set[nn.Module]:
    """Modules that ``compile()`` was called on, with all that lies inside them."""
    return {
        inner
        for module in model.modules()
        if getattr(module, "_compiled_call_impl", None) is not None
        for inner in module.modules()
    }


def plain_autograd(x: object) -> bool:
    """Whether ``x`` is an ordinary tensor and no transform (torch.func, jit.trace, forward-mode AD) is at work."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def dtype_of_product(x: Tensor) -> torch.dtype:
    """In what dtype a linear layer multiplies ``x``: autocast's where it is on and casts ``x``, else that of ``x``."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype


def _accumulates(node: Any) -> bool:
    """Whether the running backward pass adds to ``.grad`` of the leaf behind ``node``, and makes no graph itself.

    Args:
        node: where the gradient of the weight goes next.
    """
    if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad with respect to this very leaf, which the query does not support
        return False


def stores_transposed(module: nn.Module) -> bool | None:
    """Whether the weight is stored (in, out), as Conv1D does; None for any other than these two kinds of module."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return False
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return True
    return None


class _ForwardIntoSlot:
    """Stands in for ``module.forward`` while the module's weight is active."""

    def __init__(
        self, module: nn.Module, parameter: nn.Parameter, name: str, transposed: bool, gradients: GemmGradients
    ):
        self._module, self._parameter, self._name = module, parameter, name
        self._transposed, self._gradients = transposed, gradients

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self._applies(x):
            return type(self._module).forward(self._module, x)
        x = x.to(self._parameter.dtype)  # what autocast would do, where it is on; elsewhere the dtypes agree
        bias: Tensor | None = self._module.bias  # type: ignore[assignment]
        return _LinearIntoSlot.apply(x, self._parameter, bias, self._transposed, self._name, self._gradients)

    def _applies(self, x: Tensor) -> bool:
        weight = self._parameter
        return (
            self._module.weight is weight
            and weight.requires_grad
            and plain_autograd(x)
            and dtype_of_product(x) == weight.dtype
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or pickled model has the class's own forward: its weights are in nobody's arena.
        return _own_forward, (self._module,)


def _own_forward(module: nn.Module) -> MethodType:
    return MethodType(type(module).forward, module)


class _LinearIntoSlot(torch.autograd.Function):
    """y = x·Wᵀ + b (W stored (out, in), or (in, out) when ``transposed``) with dW written into its slot."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in)
        weight: Tensor,  # (out, in); (in, out) when transposed
        bias: Tensor | None,  # (out,)
        transposed: bool,
        name: str,
        gradients: GemmGradients,
    ) -> Tensor:
        # What nn.Linear would save, so that autograd's check of versions refuses exactly what it would refuse there.
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.transposed, ctx.name, ctx.gradients = transposed, name, gradients
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # differentiable itself, for create_graph
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx = dw = None
        if needs_x:
            dx = torch.matmul(dy, weight.t() if ctx.transposed else weight)
        rows = dy.reshape(-1, dy.shape[-1])
        if needs_weight:
            tokens = x.reshape(-1, x.shape[-1])
            left, right = (tokens, rows) if ctx.transposed else (rows, tokens)
            accumulates = _accumulates(ctx.next_functions[1][0])
            if not (accumulates and ctx.gradients.write(ctx.name, left, right)):
                dw = torch.mm(left.t(), right)
        db = rows.sum(0) if needs_bias else None
        return dx, dw, db, None, None, None
