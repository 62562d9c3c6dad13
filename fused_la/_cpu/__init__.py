"""The CPU implementation, `impl="blocked"`: the loss and its gradient a cache-sized block of rows at a time."""

from fused_la._cpu.head import Epilogue
from fused_la._cpu.loss import backward, forward

CLASS_MAJOR = True  # how a head's tiles of logits are stored: CPU matrix products are faster so

__all__ = ["CLASS_MAJOR", "Epilogue", "backward", "forward"]
