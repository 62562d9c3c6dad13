"""Arguments of a classifier head, features, weight and bias: check them and flatten features and target to rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_la._call import checks


def placeholder_logits(
    features: Any, weight: Any, bias: Any, target: Any, target_weight: Any
) -> tuple[Tensor, Any, Any]:
    """Placeholder logits of the head with its target and target_weight, all with the rows as one dimension.

    The placeholder has the shape, dtype and device of the head's logits and one element in memory. Leading dimensions
    (...) of features (..., D) and of a matching target are flattened to rows.
    """
    check_head(features, weight, bias)
    shape, n_classes = features.shape[:-1], len(weight)
    if len(shape) > 1:
        target = _flatten_rows(target, "target", shape, target_weight is not None, n_classes)
        if target_weight is not None:
            target_weight = _flatten_rows(target_weight, "target_weight", shape, True, 0)
        shape = (shape.numel(),)
    return features.new_empty(1).expand(*shape, n_classes), target, target_weight


def feature_rows(features: Tensor) -> Tensor:
    """(D,) or (..., D) as (N, D); D may be 0."""
    return features.flatten(0, -2) if features.dim() > 1 else features.unsqueeze(0)


def unit_vectors(vectors: Tensor, scale: float = 1.0) -> Tensor:
    """Vectors of the last dimension, normalised to length `scale`, in their dtype.

    Norms are float32 or wider, because the 1e-12 of `F.normalize` is 0 in float16. Below that norm neither a vector nor
    its gradient is divided.
    """
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * (scale / norm.masked_fill(norm < 1e-12, 1.0))).to(vectors.dtype)


def _flatten_rows(labels: Any, name: str, shape: torch.Size, several_labels: bool, n_classes: int) -> Tensor:
    """Labels, class probabilities or label weights with their leading dimensions, `shape`, flattened to rows."""
    checks.check_tensor(name, labels)
    has_last_dim = several_labels or labels.is_floating_point()
    if labels.shape[: len(shape)] != shape or labels.dim() != len(shape) + has_last_dim:
        expected = (*shape, "K" if several_labels else n_classes) if has_last_dim else tuple(shape)
        raise ValueError(f"{name} must have shape ({', '.join(map(str, expected))}), got {tuple(labels.shape)}")
    return labels.flatten(0, len(shape) - 1)


def check_head(features: Any, weight: Any, bias: Any) -> None:
    checks.check_tensor("features", features)
    if features.dtype not in checks.FLOATING:
        raise TypeError(f"features must be {checks.FLOATING_NAMES}, got {features.dtype}")
    if features.dim() == 0:
        raise ValueError("features must have shape (D,) or (..., D), got ()")
    checks.check_classifier(weight)
    if weight.shape[1] != features.shape[-1]:
        raise ValueError(f"weight must have shape (C, {features.shape[-1]}), got {tuple(weight.shape)}")
    _check_device("weight", weight, features)
    if weight.dtype != features.dtype and not torch.is_autocast_enabled(features.device.type):
        raise TypeError(
            f"weight must have the dtype of features, {features.dtype}, outside autocast, got {weight.dtype}"
        )
    if bias is not None:
        checks.check_class_vector("bias", bias, len(weight))
        _check_device("bias", bias, features)


def check_dtensor_features(features: Tensor, weight: Tensor) -> None:
    """Raw logits of a sharded weight need DTensor features: only these guarantee that all ranks have the same ones."""
    if checks.is_dtensor(weight) and not checks.is_dtensor(features):
        raise TypeError(
            "features must be a DTensor with Replicate(), the same on all ranks, for a weight that is a DTensor, got a "
            "torch.Tensor; under FSDP2 give the head a fully_shard(head) of its own and call it, or for predict call "
            'torch.distributed.fsdp.register_fsdp_forward_method(head, "predict") first'
        )


def _check_device(name: str, value: Tensor, features: Tensor) -> None:
    if value.device != features.device:
        raise ValueError(f"{name} must be on the device of features, {features.device}, got {value.device}")


def product_dtype(features: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of the operands of matrix products: as in `F.linear`; on a CPU that of the sums, which costs no time."""
    device_type = features.device.type
    if device_type == "cpu" or features.dtype == torch.float64:
        return torch.promote_types(features.dtype, torch.float32)
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return weight.dtype
