"""Timings: `python -m benchmarks`, or `pytest benchmarks/bench_loss.py`. A benchmark is never a test, and `pytest` alone runs none."""
