"""The store against the machine it runs on, and against LMCache: `python -m benchmarks.store`."""
