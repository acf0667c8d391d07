"""Int4 kernels in Triton, for NVIDIA and AMD GPUs. Nothing here imports triton before one of its files is imported."""
