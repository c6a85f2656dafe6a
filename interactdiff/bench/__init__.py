"""Benchmarks at true sizes with random weights: ratios within one process, since machines differ."""
