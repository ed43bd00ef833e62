"""Our own kernels on NVIDIA GPUs of compute capability 8.0 or above. They need the driver and cuda-python alone."""
