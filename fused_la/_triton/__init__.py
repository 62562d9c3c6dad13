"""The GPU implementation, `impl="triton"`: the loss and its gradient as Triton kernels; imported only when used."""

from fused_la._triton.head import Epilogue
from fused_la._triton.loss import backward, forward

CLASS_MAJOR = False  # a head's tiles of logits lie row by row

__all__ = ["CLASS_MAJOR", "Epilogue", "backward", "forward"]
