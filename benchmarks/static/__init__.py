"""Kernels compiled without a device: their instructions and registers, their launches, and host time of a step."""
