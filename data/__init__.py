"""Router traces: Switch Transformers, text, the tap that records routing, and traces on disk.

| module | content |
|---|---|
| `models/` | identity and geometry of a model's MoE layers, loading models and weights |
| `text/` | the offline corpus and other text, cut into batches |
| `traces/` | recording, storing, reading and summarising router traces and recorded loads |
| `collect`, `convert`, `show`, `pretrain` | commands: `python -m data.collect` and so on |
| `datamodule` | a trace as a Lightning data module |
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.models.layout import MoELayout as MoELayout
    from data.traces.router_tap import RouterTap as RouterTap
    from data.traces.store import open_trace as open_trace
    from data.traces.trace import TokenBatch as TokenBatch

_HOME = {
    "MoELayout": ".models.layout",
    "RouterTap": ".traces.router_tap",
    "TokenBatch": ".traces.trace",
    "open_trace": ".traces.store",
}
__all__ = ["MoELayout", "RouterTap", "TokenBatch", "open_trace"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __package__), name)
