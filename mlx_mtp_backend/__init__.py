"""In-process MLX engine that decodes with native Multi-Token-Prediction heads."""
