"""Benchmarks: each prints a table beside its ideal and writes JSON under benchmarks/results/."""
