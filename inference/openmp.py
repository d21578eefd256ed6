"""The environment of a process that computes, from before torch is loaded."""

# A thread that has nothing to do spins for a tenth of a millisecond, then it sleeps. Those that go on spinning, as they
# do by default, starve loader and saver. Those that sleep at once wake up late for each of the many short products of a
# decode step, which takes twice as long then.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
