"""Router traces, from the hook to the training set.

| module | content |
|---|---|
| `trace` | `TokenBatch`, `RouterTrace`: one batch, the expert of every token, and its loads |
| `router_tap`, `tracer` | recording: hooks on the routers, batches run through the model |
| `store`, `columns` | traces on disk: the format and its Arrow columns |
| `loads` | recorded loads of any format, shares, total variation distance |
| `statistics` | skew and drift of a trace |
| `dataset` | a trace as samples to train on |
"""
