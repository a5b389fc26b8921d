"""Balances a Switch Transformer over 8 (emulated) devices; its outputs stay what they were.

    python examples/balance_a_model.py [PREDICTOR]

Without a predictor folder, replicas follow a moving average of past loads. These batches are tiny, so balance stays
low: it takes some thousand tokens to fill 8 devices.
"""

import sys

from switchcast import Ema, Engine

texts = [["How are you today?", "The committee met on Tuesday."], ["def main():", "import numpy as np"]] * 3
predictor = sys.argv[1] if len(sys.argv) > 1 else Ema()

with Engine("switch-mini-64", predictor, num_devices=8, num_redundant_experts=16) as engine:
    tokenizer = engine.loaded.tokenizer
    batches = (tokenizer(batch, padding=True, return_tensors="pt") for batch in texts)  # read one batch ahead
    for output in engine.run(batches):
        print(f"logits {tuple(output.logits.shape)}, balancedness {output.stats.balancedness:.3f}")
    ids = engine.generate(**tokenizer("The committee <extra_id_0> on Tuesday.", return_tensors="pt"), max_new_tokens=8)
    print(tokenizer.batch_decode(ids))
