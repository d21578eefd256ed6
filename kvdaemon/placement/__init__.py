"""Which chunk lies in which tier: pure functions, the same for the live daemon and the simulator."""
