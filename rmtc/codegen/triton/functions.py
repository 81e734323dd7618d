"""The functions that kernels compute element by element, in Triton's spelling."""

from __future__ import annotations

FUNCTIONS: dict[str, str] = {
    "abs": "tl.abs({0})",
    "add": "{0} + {1}",
    "add_scaled": "{0} + {2} * {1}",
    "addcdiv": "{0} + {3} * {1} / {2}",
    "addcmul": "{0} + {3} * {1} * {2}",
    "and": "{0} & {1}",
    "cast": "{0}",
    "ceil": "tl.ceil({0})",
    "cos": "tl.cos({0})",
    "div": "{0} / {1}",
    "elu": "tl.where({0} > 0, {0}, {1} * (tl.exp({0}) - 1))",
    "eq": "{0} == {1}",
    "erf": "tl.erf({0})",
    "exp": "tl.exp({0})",
    "floor": "tl.floor({0})",
    "ge": "{0} >= {1}",
    "gelu": "0.5 * {0} * (1 + tl.erf({0} * 0.7071067811865476))",
    "gelu_tanh": "{0} * tl.sigmoid(1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))",
    "gt": "{0} > {1}",
    "le": "{0} <= {1}",
    "leaky_relu": "tl.where({0} > 0, {0}, {1} * {0})",
    "log": "tl.log({0})",
    "lt": "{0} < {1}",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "mul": "{0} * {1}",
    "ne": "{0} != {1}",
    "neg": "-{0}",
    "not": "{0} == 0",
    "or": "{0} | {1}",
    "reciprocal": "1 / {0}",
    "relu": "tl.where({0} < 0, 0, {0})",
    "rotated": "{0} * {2} + {1} * {3}",
    "rsqrt": "tl.rsqrt({0})",
    "sigmoid": "tl.sigmoid({0})",
    "silu": "{0} * tl.sigmoid({0})",
    "sin": "tl.sin({0})",
    "softplus": "tl.where({0} * {1} > {2}, {0}, tl.log(1 + tl.exp({0} * {1})) / {1})",
    "sqrt": "tl.sqrt({0})",
    "sub": "{0} - {1}",
    "sub_scaled": "{0} - {2} * {1}",
    "tanh": "2 * tl.sigmoid(2 * {0}) - 1",
    "where": "tl.where({0}, {1}, {2})",
    "xor": "{0} ^ {1}",
}
"""Expressions of arguments by their number; each is a name, or a number.

``tanh`` is written with the logistic function, which all targets have: beside 0 its error is that of values around 1.
"""
