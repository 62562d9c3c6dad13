"""The loss and its gradient as Triton kernels; imported only when they are used."""

from fused_la._triton.backward import launch_backward as backward
from fused_la._triton.forward import launch_forward as forward

__all__ = ["backward", "forward"]
