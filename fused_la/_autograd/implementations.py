"""Finds an implementation by its name, and states what it has to offer.

An implementation is a package, `_cpu` or `_triton`, with two functions:

    forward(problem, reduction, wants_gradient) -> loss, state, gradient, memo
    backward(problem, reduction, state, upstream, needs_logits, needs_log_prior, gradient, memo)
        -> grad_logits, grad_log_prior

The state begins with m, rest and A of every row and the mean's denominator, (3 * N * P + 1,) or more. The gradient is
for an upstream gradient of 1, and None if the forward pass does not make it. The memo is whatever forward wants back,
but no tensor: the `Signature` of `_triton`, None of `_cpu`. Backward can do without the memo and without the gradient.

For heads it has an `Epilogue` and `CLASS_MAJOR` (`_tiled/head.py`).
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch import Tensor

from fused_la._call.problem import Problem

_PACKAGES = {"blocked": "fused_la._cpu", "triton": "fused_la._triton"}


@functools.cache
def implementation(impl: str) -> ModuleType:
    """The package of an implementation, imported when first used: Triton may not be installed."""
    return importlib.import_module(_PACKAGES[impl])


def in_memory(problem: Problem) -> Problem:
    """The problem with every lazy negation (as of `x.conj().imag`) carried out in memory."""
    return Problem._make(field.resolve_neg() if isinstance(field, Tensor) else field for field in problem)
