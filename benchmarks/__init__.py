"""Timings: run `pytest benchmarks/bench_loss.py`. A benchmark is never a test, and `pytest` alone does not run one."""
