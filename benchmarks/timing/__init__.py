"""Timing on a device: cases, providers, the check against float64, clocks, worker processes and reports."""
