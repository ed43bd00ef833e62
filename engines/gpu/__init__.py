"""What every back end on an NVIDIA GPU stands on: the driver, memory, kernels, the KV cache; and a stand-in."""
