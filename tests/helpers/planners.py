"""Planners that have nothing to do with any forecast."""

import numpy as np

from runtime.balancing.plan import ReplicationPlan


class RandomPlanner:
    """Replicas at random: nothing to do with any forecast."""

    def __init__(self, home: ReplicationPlan, seed: int = 0) -> None:
        self.home, self.rng = home, np.random.default_rng(seed)

    def plan(self, forecast, current, recent):
        phy2log = self.home.phy2log.copy()
        size = self.home.slots_per_device
        for layer in range(len(phy2log)):
            for device in range(self.home.num_devices):
                block = phy2log[layer, device * size : (device + 1) * size]
                free = np.setdiff1d(np.arange(-1, self.home.num_experts), block[block >= 0])
                block[block < 0] = self.rng.choice(free, (block < 0).sum(), replace=False)
        return self.home.with_slots(phy2log)
