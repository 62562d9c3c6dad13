"""Timings: `python -m benchmarks`, or `pytest benchmarks/bench_loss.py`. `pytest` alone runs none of it."""
