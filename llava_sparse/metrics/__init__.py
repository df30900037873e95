"""Metric modules for the `evaluate` library."""
