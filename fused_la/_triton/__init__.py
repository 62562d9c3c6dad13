"""The loss and its gradient as Triton kernels; imported only when they are used."""

from fused_la._triton.passes import backward, forward

__all__ = ["backward", "forward"]
