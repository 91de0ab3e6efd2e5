"""The product with a matrix that rests in 8 bits: expanded into the shared workspace, multiplied, forgotten.

    forward pass    workspace = W;  y  = x·Wᵀ + b
    backward pass   workspace = W;  dx = dy·W          no gradient of W, which does not train

Autograd keeps no weight, in full or in 8 bits: it keeps the matrix's record, which expands it again, and refuses a
graph from before the matrix changed, as autograd itself refuses weights that were modified in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from misa_engine.engine.gemm_gradients import dtype_of_product, plain_autograd


class Matrix(Protocol):
    """What the product needs of a matrix that rests (``matrix.py``)."""

    name: str
    parameter: nn.Parameter
    dtype: torch.dtype
    edition: int

    def expand(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), valid until the next matrix is expanded."""

    def check_owner(self, module: nn.Module) -> None:
        """Refuse to multiply with a weight that is not the module's any more."""

    def check_edition(self, seen: int) -> None:
        """Refuse a graph from before the matrix changed."""


class RestingForward:
    """Stands in for ``module.forward`` while the module's weight rests."""

    def __init__(self, module: nn.Module, matrix: Matrix):
        self.module, self.matrix = module, matrix
        self._call = _uncompiled()

    def __call__(self, x: Tensor) -> Tensor:
        """x·Wᵀ + b for ``x`` (..., in)."""
        return self._call(self, x)

    def __reduce__(self) -> Any:
        raise TypeError(COPY)


COPY = (
    "a model with residents cannot be copied or pickled as a whole: its weights lie on the host, and in 8 bits on the "
    "card. Save model.state_dict() or model.save_pretrained(...), which hold the exact weights, and load them into "
    "another model (misa_engine.load_model)."
)


@functools.cache
def _uncompiled() -> Callable[[RestingForward, Tensor], Tensor]:
    """``_run`` with a break in graphs of torch.compile, which cannot hold the expansion into a shared workspace.

    Made when the first model is put to rest and not at import: it imports torch._dynamo.
    """
    return torch.compiler.disable(_run)


def _run(forward: RestingForward, x: Tensor) -> Tensor:
    module, matrix = forward.module, forward.matrix
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    matrix.check_owner(module)
    dtype = dtype_of_product(x)
    autocast = dtype != x.dtype
    if autocast:
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    # without autocast a wrong dtype must fail as it fails in nn.Linear
    wanted = dtype if autocast or torch.is_autocast_enabled(x.device.type) else matrix.dtype
    if not plain_autograd(x):  # torch.func, jit.trace, forward-mode AD: plain torch with a copy of its own
        return F.linear(x, matrix.expand(wanted).clone(), bias)
    if not torch.is_grad_enabled():
        return F.linear(x, matrix.expand(wanted), bias)
    product: Tensor = _Product.apply(x, matrix.parameter, bias, matrix, wanted, False)
    return product


class _Product(torch.autograd.Function):
    """y = x·Wᵀ + b, or x·W when ``transposed``; each is the other's backward pass, to any order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in), or (..., out) when transposed
        weight: Tensor | None,  # only so that a gradient that is asked for can be refused
        bias: Tensor | None,  # (out,)
        matrix: Matrix,
        dtype: torch.dtype,
        transposed: bool,
    ) -> Tensor:
        ctx.matrix, ctx.dtype, ctx.transposed = matrix, dtype, transposed
        w = matrix.expand(dtype)
        ctx.edition = matrix.edition  # after ``expand``, which may have taken in a new master
        return torch.matmul(x, w) if transposed else F.linear(x, w, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        matrix = ctx.matrix
        if needs_weight:
            raise RuntimeError(
                f"{matrix.name} rests in 8 bits, so it has no gradient, and something asks for one. Build "
                "MISA(model, ...) before the first backward pass: it decides which matrices train, and puts those back "
                "into full precision. Leave requires_grad alone afterwards."
            )
        matrix.check_edition(ctx.edition)
        dx = _Product.apply(dy, None, None, matrix, ctx.dtype, not ctx.transposed) if needs_x else None
        db = dy.reshape(-1, dy.shape[-1]).sum(0) if needs_bias else None
        return dx, None, db, None, None, None
