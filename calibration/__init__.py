"""What the numbers *are*: activation statistics, smoothing factors, quantized weights, and fidelity."""
