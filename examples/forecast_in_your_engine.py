"""Forecasts the next batch's expert load inside an engine of your own.

    python examples/forecast_in_your_engine.py [PREDICTOR]

Needs torch, numpy, numba and safetensors, and the tokenizer of the model that the predictor was trained for.
"""

import sys

from transformers import AutoTokenizer

from data.models.weights import locate
from switchcast import load_predictor

folder = sys.argv[1] if len(sys.argv) > 1 else "outputs/predictor"
predictor = load_predictor(folder)  # a folder that train.py wrote, or "owner/name" on the hub
tokenizer = AutoTokenizer.from_pretrained(locate(predictor.layout.model_id))

batch = tokenizer(["The committee met on Tuesday.", "How are you?"], padding=True, return_tensors="pt")
forecast = predictor.forecast(batch)  # history=loads of the batches before, [batches, layers, experts], if known

print(f"expected tokens of each expert: {forecast.load.shape} [layers, experts]; spread: {forecast.spread.shape}")
for layer, expert, tokens in forecast.hottest(k=5):
    print(f"{predictor.layout.layer_names[layer]}: expert {expert} gets about {tokens:.1f} tokens")
