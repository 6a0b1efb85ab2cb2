"""The MLX engine: native multi-token prediction, exact by construction. Knows nothing of gRPC or of the router."""
