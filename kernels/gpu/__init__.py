"""The operations as Metal kernels, for Apple and NVIDIA GPUs."""
