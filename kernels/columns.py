"""Columns of the tables as compile-time constants of the kernels, from the one definition in tiles.py.

A name that tiles.py does not have fails at import, so that host and kernel cannot drift apart.
"""

from __future__ import annotations

import triton.language as tl

from .tiles import Bias, Coefficients, Hyper

COEF_COLUMNS = tl.constexpr(len(Coefficients._fields))
COEF_BETA1 = tl.constexpr(Coefficients._fields.index("beta1"))
COEF_GAIN1 = tl.constexpr(Coefficients._fields.index("gain1"))
COEF_BETA2 = tl.constexpr(Coefficients._fields.index("beta2"))
COEF_GAIN2 = tl.constexpr(Coefficients._fields.index("gain2"))
COEF_EPS = tl.constexpr(Coefficients._fields.index("eps"))
COEF_MINUS_STEP = tl.constexpr(Coefficients._fields.index("minus_step"))
COEF_MINUS_DECAY = tl.constexpr(Coefficients._fields.index("minus_decay"))
COEF_RUNS = tl.constexpr(Coefficients._fields.index("runs"))

HYPER_COLUMNS = tl.constexpr(len(Hyper._fields))
HYPER_LR = tl.constexpr(Hyper._fields.index("lr"))
HYPER_DECAY = tl.constexpr(Hyper._fields.index("decay"))
HYPER_BETA1 = tl.constexpr(Hyper._fields.index("beta1"))
HYPER_GAIN1 = tl.constexpr(Hyper._fields.index("gain1"))
HYPER_BETA2 = tl.constexpr(Hyper._fields.index("beta2"))
HYPER_GAIN2 = tl.constexpr(Hyper._fields.index("gain2"))
HYPER_EPS = tl.constexpr(Hyper._fields.index("eps"))
HYPER_CLOSING = tl.constexpr(Hyper._fields.index("closing"))

BIAS_COLUMNS = tl.constexpr(len(Bias._fields))
BIAS_STEP = tl.constexpr(Bias._fields.index("step"))
BIAS_EPS = tl.constexpr(Bias._fields.index("eps"))
