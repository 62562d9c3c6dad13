"""What every kernel is handed of a problem, in the form that kernels take, and where a gradient is written."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fused_la._problem import Problem
from fused_la._triton.launch import VECTOR_BYTES, Launch, Layout
from fused_la._triton.tiles import Sizes, Vectors, float_bits, triton_dtype


class Operands(NamedTuple):
    logits: Tensor  # that begins on a 16-byte boundary, `shift` elements before the first one
    shift: int
    vectors: Vectors
    sizes: Sizes
    scalars: tuple[int, int, int]  # tau and label_smoothing as bits, ignore_index
    constants: dict[str, Any]


def operands(problem: Problem, launch: Launch, layout: Layout) -> Operands:
    logits, target = problem.logits, problem.target
    shift = layout.shift if launch.vec > 1 and layout.shift is not None else 0
    constants = {
        "N_LABELS": 0 if problem.has_probabilities else target.shape[2],
        "HAS_SMOOTHING": problem.label_smoothing > 0.0,
        "TARGET_ALIKE": shift == 0 and problem.has_probabilities and target.stride() == logits.stride(),
        "COMPUTE": triton_dtype(problem.compute_dtype),
    }
    n_outer, n_inner, n_classes = logits.shape
    return Operands(
        begin_earlier(logits, shift),
        shift,
        Vectors(**{name: getattr(problem, name) for name in Vectors._fields}),
        Sizes(n_outer * n_inner, n_inner, n_classes),
        (float_bits(problem.tau), float_bits(problem.label_smoothing), problem.ignore_index),
        constants | launch.constants(),
    )


def begin_earlier(tensor: Tensor, shift: int) -> Tensor:
    """A view whose first element lies `shift` elements earlier in the storage: a place to count from, not to read."""
    if shift == 0:
        return tensor
    return tensor.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - shift)


def grad_buffer(logits: Tensor, layout: Layout) -> Tensor:
    """An empty gradient of (N, P, C) logits whose rows lie towards 16-byte boundaries as theirs do.

    That is dense for dense logits; otherwise rows may be a few elements apart.
    """
    n_outer, n_inner, n_classes = logits.shape
    vec = VECTOR_BYTES // logits.element_size()
    if not layout.adjacent or layout.shift is None or layout.row_step is None:
        return logits.new_empty_strided(logits.shape, _dense_strides(logits))
    step = n_classes + (layout.row_step - n_classes) % vec
    storage = logits.new_empty(layout.shift + n_outer * n_inner * step)
    return storage.as_strided(logits.shape, (n_inner * step, step, 1), layout.shift)


def _dense_strides(logits: Tensor) -> tuple[int, ...]:
    """Strides without gaps, in the order in which the dimensions of logits lie."""
    strides, n_elements = [0, 0, 0], 1
    for dim in sorted(range(3), key=lambda dim: (logits.stride(dim), logits.shape[dim])):
        strides[dim] = n_elements
        n_elements *= max(1, logits.shape[dim])
    return tuple(strides)
