"""Benchmarks: every block against what people would use instead of it, measured side by side in one run."""
