"""Replays traces of real conversations through the real queue and the real placement, with a model of service time."""
