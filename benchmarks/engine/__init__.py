"""The engine beside its peers on the same weights and conversations: `python -m benchmarks.engine`."""
