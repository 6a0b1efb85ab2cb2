"""For child processes: a slice of a load that takes a minute outside of Python's reach, as a large model's may."""

SLOW_SLICE = """
import sys, time
import mlx_mtp_backend.load.loading as loading
def slow(*arguments):
    print("in the middle of a slice", flush=True)
    time.sleep(60)
    yield
loading._check_wiring = slow
"""
