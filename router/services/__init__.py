"""The gRPC services: they translate between the contract and the domain, one file per service."""
