"""mtp-router: the gRPC service that routes each request to the backend that fits its model."""
