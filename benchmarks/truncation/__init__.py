"""Conversations longer than the window, and other ways of making them fit: `python -m benchmarks.truncation`."""
