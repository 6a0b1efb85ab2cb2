"""Benchmarks: performance is measured here, as ratios within one run, never in tests."""
