"""Backends: one module per engine, all behind the protocol of `base`."""
