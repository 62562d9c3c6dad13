"""What of a problem decides how kernels over its rows are launched, and what they are handed of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_la._call.problem import Problem
from fused_la._triton.launch_config import VECTOR_BYTES, Layout, layout_of
from fused_la._triton.tiles import Vectors, triton_dtype

PLANS = 1024  # that are kept of each pass


class Signature(NamedTuple):
    """All that plans of a problem's launches follow from. What its kernels are compiled for is a part of it."""

    device: int
    dtype: torch.dtype
    shape: tuple[int, ...]  # (N, C) or (N, P, C)
    strides: tuple[int, ...]
    shift: int | None  # as in `Layout`
    types: tuple[torch.dtype | None, ...]  # of the `Vectors`
    n_labels: int  # 0: class probabilities
    target_strides: tuple[int, ...]  # of class probabilities
    target_is_aligned: bool  # class probabilities begin on a 16-byte boundary
    has_smoothing: bool

    @property
    def rows(self) -> tuple[int, int, int]:
        """(N, P, C)."""
        return self.shape if len(self.shape) == 3 else (self.shape[0], 1, self.shape[1])

    @property
    def n_inner(self) -> int | None:
        """P as kernels take it."""
        return None if self.rows[1] == 1 else self.rows[1]

    @property
    def class_cost(self) -> int:
        """How many times as much of a resident row's registers a class takes as with labels and an offset alone."""
        if self.n_labels == 0 or self.has_smoothing:  # a target mass
            return 4
        return 1 if self.types[-1] is None else 2  # a scale

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def lies_as(self, problem: Problem) -> bool:
        """Whether a problem of this shape and these dtypes lies in memory as the signature says."""
        logits, target = problem.logits, problem.target
        if logits.stride() != self.strides or shift_of(logits) != self.shift:
            return False
        if self.n_labels > 0:
            return True
        is_aligned = target.data_ptr() % VECTOR_BYTES == 0
        return target.stride() == self.target_strides and is_aligned == self.target_is_aligned

    def layout(self) -> Layout:
        return layout_of(self.rows, steps(self.strides), self.shift)

    def row_constants(self) -> tuple:
        """N_LABELS, HAS_SMOOTHING, TARGET_ALIKE, ADJACENT, TARGET_ADJACENT and COMPUTE."""
        alike = self.shift == 0 and self.target_is_aligned and self.target_strides == self.strides
        adjacent = self.strides[-1] == 1 or self.shape[-1] == 1
        target_adjacent = self.n_labels == 0 and (self.target_strides[-1] == 1 or self.shape[-1] == 1)
        compute = triton_dtype(self.compute_dtype)
        return self.n_labels, self.has_smoothing, self.n_labels == 0 and alike, adjacent, target_adjacent, compute

    def compiled_for(self, vec: int) -> tuple:
        """What Triton makes of the types of logits, vectors and sizes, and where the pointers stand."""
        aligned = vec > 1 or self.shift == 0  # where vectors are read, the pointer counts from a boundary
        return self.dtype, self.types, aligned, self.target_is_aligned, self.n_inner is None


def signature_of(problem: Problem) -> Signature:
    logits, target = problem.logits, problem.target
    types = tuple([None if vector is None else vector.dtype for vector in problem[1:9]])
    n_labels, target_strides, target_is_aligned = problem.n_labels, (), True
    if types[1] is not torch.int64:
        n_labels, target_strides = 0, target.stride()
        target_is_aligned = target.data_ptr() % VECTOR_BYTES == 0
    return Signature(
        logits.get_device(), logits.dtype, logits.shape, logits.stride(), shift_of(logits), types,
        n_labels, target_strides, target_is_aligned, problem.label_smoothing > 0.0,
    )  # fmt: skip


def shift_of(tensor: Tensor) -> int | None:
    """Elements from a 16-byte boundary to the first one; None if the storage does not reach back to the boundary."""
    past = tensor.data_ptr() % VECTOR_BYTES
    if past == 0:
        return 0
    size = tensor.element_size()
    return past // size if past % size == 0 and past // size <= tensor.storage_offset() else None


def steps(strides: tuple[int, ...]) -> tuple[int, int, int]:
    """Strides of (N, C) or (N, P, C) as those of (N, P, C); that of P = 1 is 0."""
    return strides if len(strides) == 3 else (strides[0], 0, strides[1])


def vectors_of(problem: Problem) -> Vectors:
    """The tensors beside the logits, each on a 16-byte boundary: kernels are compiled for that. Others are copied, but
    for class probabilities, whose place is known to the signature."""
    vectors, addresses = Vectors._make(problem[1:9]), 0
    for vector in vectors:
        if vector is not None:
            addresses |= vector.data_ptr()
    if addresses % VECTOR_BYTES == 0:
        return vectors
    keep = problem.target if problem.has_probabilities else None
    return Vectors._make(
        v.clone() if v is not None and v is not keep and v.data_ptr() % VECTOR_BYTES else v for v in vectors
    )


def begin_earlier(tensor: Tensor, shift: int) -> Tensor:
    """A view whose first element lies `shift` elements earlier in the storage: a place to count from, not to read."""
    if shift == 0:
        return tensor
    return tensor.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - shift)


class Buffer(NamedTuple):
    """How a gradient lies in memory: its rows towards 16-byte boundaries as those of the logits do."""

    n_elements: int
    strides: tuple[int, ...]
    shift: int
    is_plain: bool  # as `torch.empty_like` makes it of contiguous logits

    def make(self, logits: Tensor) -> Tensor:
        """An empty one. That is dense for dense logits; otherwise rows may be a few elements apart."""
        if self.is_plain:
            return torch.empty_like(logits, memory_format=torch.contiguous_format)
        return logits.new_empty(self.n_elements).as_strided(logits.shape, self.strides, self.shift)


def gradient_buffer(signature: Signature) -> Buffer:
    shape, strides, layout = signature.shape, signature.strides, signature.layout()
    n_outer, n_inner, n_classes = signature.rows
    vec = VECTOR_BYTES // signature.dtype.itemsize
    if not layout.adjacent or layout.shift is None or layout.row_step is None:
        strides = _dense_strides(shape, strides, layout.adjacent)
        return Buffer(max(1, n_outer * n_inner * n_classes), strides, 0, False)
    step = n_classes + (layout.row_step - n_classes) % vec
    strides = (step, 1) if len(shape) == 2 else (n_inner * step, step, 1)
    n_elements = layout.shift + n_outer * n_inner * step
    return Buffer(n_elements, strides, layout.shift, layout.shift == 0 and step == n_classes)


def _dense_strides(shape: tuple[int, ...], like: tuple[int, ...], adjacent: bool) -> tuple[int, ...]:
    """Strides without gaps, in the order in which the dimensions of a tensor of this shape and strides lie; those of
    `adjacent` classes stay neighbours, whatever else has a stride of 1 or 0."""
    strides, n_elements, of_class = [0] * len(shape), 1, len(shape) - 1
    for dim in sorted(range(len(shape)), key=lambda dim: (not (adjacent and dim == of_class), like[dim], shape[dim])):
        strides[dim] = n_elements
        n_elements *= max(1, shape[dim])
    return tuple(strides)
