"""Measurements against the limit and against peers. Each is a module to run and writes JSON."""
