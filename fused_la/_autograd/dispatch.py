"""Chooses the implementation that runs, or says why the named one cannot."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_la._autograd.loss import under_transform
from fused_la._autograd.transforms import transforms_fold
from fused_la._call import checks
from fused_la._call.arguments import LossCall
from fused_la._call.values import is_compiled_or_traced


def choose_implementation(
    impl: str, call: LossCall, differentiable: Sequence[Tensor | None], of_head: bool = False
) -> str:
    """The name of the implementation that runs.

    `differentiable` are the caller's own tensors that every implementation differentiates. A head runs by the reference
    formula under transforms. While torch.compile traces a CPU graph it stays one operator, whose memory is bounded.
    """
    checks.check_choice("impl", impl, checks.IMPLEMENTATIONS)
    logits = call.problem.logits
    on_cpu, on_gpu = logits.is_cpu, logits.is_cuda  # ROCm's too
    transformed = under_transform()
    if transformed:
        needs_formula = is_compiled_or_traced(logits) or of_head or not transforms_fold()
    else:
        tensors = (*differentiable, *call.target_tensors, *call.margin_tensors)
        needs_formula = torch._C._get_tracing_state() is not None or (
            forward_ad._current_level >= 0 and any(t is not None and _has_tangent(t) for t in tensors)
        )
    only_reference = "" if needs_formula else why_only_reference(call, transformed)
    if impl == "auto":
        if needs_formula or only_reference or (on_cpu and torch.compiler.is_compiling() and not of_head):
            return "reference"
        if on_gpu and _HAS_TRITON:
            return "triton"
        return "blocked" if on_cpu else "reference"
    if impl == "reference":
        return impl
    if only_reference:
        raise ValueError(f"impl must be 'reference' or 'auto' for {only_reference}, got {impl!r}")
    of = "features" if of_head else "logits"
    if impl == "blocked" and not on_cpu:
        raise ValueError(f"impl must not be 'blocked' for {of} on {logits.device}: it runs on a CPU")
    if impl == "triton":
        if not _HAS_TRITON:
            raise ModuleNotFoundError("impl='triton' needs the package triton, which is not installed")
        if not on_gpu:
            from fused_la._triton.launch_config import INTERPRETED  # here, for Triton may not be installed

            if not on_cpu or not INTERPRETED:
                raise ValueError(
                    f"impl must not be 'triton' for {of} on {logits.device}: it runs on a GPU, or on a CPU in Triton's "
                    "interpreter if TRITON_INTERPRET=1 is set before the first use"
                )
    return "reference" if needs_formula else impl


def why_only_reference(call: LossCall, transformed: bool) -> str:
    """The part of a call that only the reference computes, in words; empty if there is none."""
    problem = call.problem
    if problem.target_offset is not None and (problem.has_probabilities or problem.label_smoothing > 0.0):
        return "class probabilities or label smoothing under a margin whose two offsets differ"
    if problem.label_scale is not None and (
        problem.has_probabilities or problem.label_smoothing > 0.0 or problem.n_labels > 1
    ):
        return "class probabilities, several labels a row or label smoothing under a margin with a label_scale"
    if transformed or not torch.is_grad_enabled():
        return ""
    if call.margin_tensors and any(t.requires_grad for t in call.margin_tensors):
        return "a gradient of alpha, an offset or a scale of a margin"
    for tensor in call.target_tensors:
        if tensor is not None and tensor.requires_grad:
            return "a gradient of target, target_weight, weight or smoothing_distribution"
    return ""


def _has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation is under way for this tensor."""
    return forward_ad.unpack_dual(tensor).tangent is not None


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # raised by a finder that hides it, or for a module in sys.modules without a spec
        return False


_HAS_TRITON = _has_triton()  # searched once, since torch.compile cannot trace it
