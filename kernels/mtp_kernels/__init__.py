"""GPU kernels with plain-MLX references. Knows nothing of models."""
