"""GPU kernels in Triton. They are compiled when a plan is; whoever runs them needs no Triton."""
