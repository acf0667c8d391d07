"""Int4 kernels for CPUs."""
