"""What compiles the kernels and counts without a device: instructions, registers, launches and time on the host."""
