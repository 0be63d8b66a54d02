"""What the Triton kernels become on a Hopper chip, seen without one."""
