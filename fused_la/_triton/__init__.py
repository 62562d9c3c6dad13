"""The GPU implementation, `impl="triton"`: loss and gradient as Triton kernels; imported only when it is used."""

from fused_la._triton.head import Epilogue
from fused_la._triton.loss import backward, forward

CLASS_MAJOR = False  # a head's tiles of logits are stored row-major

__all__ = ["CLASS_MAJOR", "Epilogue", "backward", "forward"]
