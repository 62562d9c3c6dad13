"""Evaluation: the tau sweep, counts by class, and the argmax under many taus."""
