"""Kernel operands: the signature of a problem, its tensors as kernels take them, and the layout of the gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_la._call.problem import Problem
from fused_la._triton.launch_config import VECTOR_BYTES, Layout, layout_of
from fused_la._triton.tiles import Vectors, triton_dtype

MAX_PLANS = 1024  # launch plans that are kept
# The fields of a problem that are `Vectors`.
_VECTORS = slice(Problem._fields.index("log_prior"), Problem._fields.index("tau"))
assert Problem._fields[_VECTORS] == Vectors._fields


class Signature(NamedTuple):
    """The key of a launch plan; it contains the key of the compiled kernels."""

    device: int
    dtype: torch.dtype
    shape: tuple[int, ...]  # (N, C) or (N, P, C)
    strides: tuple[int, ...]
    misalignment: int | None  # as in `Layout`
    types: Vectors  # their dtypes
    n_labels: int  # 0 for class probabilities
    target_strides: tuple[int, ...]  # of class probabilities
    target_is_aligned: bool  # class probabilities start on a 16-byte boundary
    has_smoothing: bool
    n_priors: int  # G with a prior_index, else 0

    @property
    def shape_3d(self) -> tuple[int, int, int]:
        """(N, P, C)."""
        return self.shape if len(self.shape) == 3 else (self.shape[0], 1, self.shape[1])

    @property
    def n_inner(self) -> int | None:
        """P as kernels take it: None if it is 1."""
        return None if self.shape_3d[1] == 1 else self.shape_3d[1]

    @property
    def class_cost(self) -> int:
        """Registers of a class in a resident row, relative to those with labels and an offset alone."""
        if self.n_labels == 0 or self.has_smoothing:  # a target mass
            return 4 if self.n_priors == 0 else 5
        return 1 if self.types.scale is None else 2

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def matches(self, problem: Problem) -> bool:
        """Whether a problem of this shape and these dtypes has the memory layout of the signature."""
        logits, target = problem.logits, problem.target
        if logits.stride() != self.strides or misalignment_of(logits) != self.misalignment:
            return False
        if self.n_labels > 0:
            return True
        is_aligned = target.data_ptr() % VECTOR_BYTES == 0
        return target.stride() == self.target_strides and is_aligned == self.target_is_aligned

    def layout(self) -> Layout:
        return layout_of(self.shape_3d, strides_3d(self.strides), self.misalignment)

    def row_constants(self) -> tuple:
        """N_LABELS, HAS_SMOOTHING, SAME_ALIGNMENT, ADJACENT, TARGET_ADJACENT and COMPUTE."""
        same_alignment = self.misalignment == 0 and self.target_is_aligned and self.target_strides == self.strides
        same_alignment = self.n_labels == 0 and same_alignment
        adjacent = self.strides[-1] == 1 or self.shape[-1] == 1
        target_adjacent = self.n_labels == 0 and (self.target_strides[-1] == 1 or self.shape[-1] == 1)
        compute = triton_dtype(self.compute_dtype)
        return self.n_labels, self.has_smoothing, same_alignment, adjacent, target_adjacent, compute

    def compile_key(self, vec: int) -> tuple:
        """All that Triton specialises for: the types of logits, vectors and sizes, and the alignment of pointers."""
        aligned = vec > 1 or self.misalignment == 0  # with 16-byte loads the pointer is on a boundary
        return self.dtype, self.types, aligned, self.target_is_aligned, self.n_inner is None


def signature_of(problem: Problem) -> Signature:
    logits, target = problem.logits, problem.target
    types = Vectors._make([None if vector is None else vector.dtype for vector in problem[_VECTORS]])
    n_labels, target_strides, target_is_aligned = problem.n_labels, (), True
    if types.target is not torch.int64:
        n_labels, target_strides = 0, target.stride()
        target_is_aligned = target.data_ptr() % VECTOR_BYTES == 0
    return Signature(
        logits.get_device(), logits.dtype, logits.shape, logits.stride(), misalignment_of(logits), types,
        n_labels, target_strides, target_is_aligned, problem.label_smoothing > 0.0, problem.n_groups,
    )  # fmt: skip


def misalignment_of(tensor: Tensor) -> int | None:
    """Elements from a 16-byte boundary to the first one; None if the storage does not reach back to the boundary."""
    n_bytes = tensor.data_ptr() % VECTOR_BYTES
    if n_bytes == 0:
        return 0
    size = tensor.element_size()
    return n_bytes // size if n_bytes % size == 0 and n_bytes // size <= tensor.storage_offset() else None


def strides_3d(strides: tuple[int, ...]) -> tuple[int, int, int]:
    """The strides of (N, C) or (N, P, C) as those of (N, P, C), with 0 for the stride of P = 1."""
    return strides if len(strides) == 3 else (strides[0], 0, strides[1])


def aligned_vectors(problem: Problem) -> Vectors:
    """The `Vectors` of a problem, each on a 16-byte boundary, as compiled kernels expect. Misaligned ones are copied,
    except for class probabilities, whose alignment is part of the signature."""
    vectors, addresses = Vectors._make(problem[_VECTORS]), 0
    for vector in vectors:
        if vector is not None:
            addresses |= vector.data_ptr()
    if addresses % VECTOR_BYTES == 0:
        return vectors
    keep = problem.target if problem.has_probabilities else None
    return Vectors._make(
        v.clone() if v is not None and v is not keep and v.data_ptr() % VECTOR_BYTES else v for v in vectors
    )


def view_from_boundary(tensor: Tensor, misalignment: int) -> Tensor:
    """A view that starts `misalignment` elements earlier in the storage. Offsets count from there; it is not read."""
    if misalignment == 0:
        return tensor
    return tensor.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - misalignment)


class GradientLayout(NamedTuple):
    """The memory layout of a gradient, whose rows have the misalignments of the rows of the logits."""

    n_elements: int
    strides: tuple[int, ...]
    misalignment: int
    is_plain: bool  # contiguous, with misalignment 0

    def allocate(self, logits: Tensor) -> Tensor:
        """An uninitialised gradient, dense for dense logits; otherwise with a few elements between rows."""
        if self.is_plain:
            return torch.empty_like(logits, memory_format=torch.contiguous_format)
        return logits.new_empty(self.n_elements).as_strided(logits.shape, self.strides, self.misalignment)


def gradient_layout(signature: Signature) -> GradientLayout:
    shape, strides, layout = signature.shape, signature.strides, signature.layout()
    n_outer, n_inner, n_classes = signature.shape_3d
    vec = VECTOR_BYTES // signature.dtype.itemsize
    if not layout.adjacent or layout.misalignment is None or layout.row_stride is None:
        strides = _dense_strides(shape, strides, layout.adjacent)
        return GradientLayout(max(1, n_outer * n_inner * n_classes), strides, 0, False)
    row_stride = n_classes + (layout.row_stride - n_classes) % vec
    strides = (row_stride, 1) if len(shape) == 2 else (n_inner * row_stride, row_stride, 1)
    n_elements = layout.misalignment + n_outer * n_inner * row_stride
    is_plain = layout.misalignment == 0 and row_stride == n_classes
    return GradientLayout(n_elements, strides, layout.misalignment, is_plain)


def _dense_strides(shape: tuple[int, ...], like: tuple[int, ...], adjacent: bool) -> tuple[int, ...]:
    """Strides without gaps, in the order of the dimensions of a tensor of this shape with strides `like`. `adjacent`
    classes stay adjacent, even if another dimension has a stride of 1 or 0."""
    strides, n_elements, of_class = [0] * len(shape), 1, len(shape) - 1
    for dim in sorted(range(len(shape)), key=lambda dim: (not (adjacent and dim == of_class), like[dim], shape[dim])):
        strides[dim] = n_elements
        n_elements *= max(1, shape[dim])
    return tuple(strides)
