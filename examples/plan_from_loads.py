"""Plans replicas from your own load history: no model, no torch.

    python examples/plan_from_loads.py [LOADS.npy] [PLAN.json]

LOADS.npy holds tokens per expert, `[steps, layers, experts]`; by default a skewed history is drawn at random.
"""

import sys

import numpy as np

from runtime.balancing import split_load  # tokens of each device
from switchcast import Balancer, balancedness, save_plan

rng = np.random.default_rng(0)
drawn = rng.multinomial(4096, rng.dirichlet(np.full(64, 0.2), size=4), size=(20, 4))
loads = np.load(sys.argv[1]) if len(sys.argv) > 1 else drawn

balancer = Balancer(num_devices=8, num_redundant_experts=16)
for step, load in enumerate(loads):  # [layers, experts], as they come
    if step:
        balance = balancedness(split_load(load, balancer.plan)).mean()
        print(f"step {step}: balancedness {balance:.3f}, {len(balancer.moves)} experts copied before it")
    balancer.step(load)  # the plan for the next batch
if len(sys.argv) > 2:
    save_plan(sys.argv[2], balancer.plan)  # `switchcast export` writes it for other engines
