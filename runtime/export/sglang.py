"""SGLang's `--init-expert-location`: JSON or .pt with the key `physical_to_logical_map`, a row for each layer.

Read from sglang 0.5.23, `srt/eplb/expert_location.py`. Row i is layer i; dense layers have a row too, which SGLang does
not use.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

from runtime.balancing.plan_file import SavedPlan, rows_text, slot_rows
from runtime.export.engine_plan import Consequences, EnginePlan, numbers_needed
from runtime.export.filling import own_order

KEY = "physical_to_logical_map"


class SGLangFormat:
    """Rows of all layers in one map."""

    name, suffix, counts_dense = "sglang", ".json", True
    consequences: ClassVar[Consequences] = {
        "range": "SGLang stops with an IndexError",
        "empty": "SGLang takes -1 for the last expert in one map and for nothing in the other",
        "missing": "SGLang starts with 0 copies of it, unless --ep-dispatch-algorithm is static, where it stops",
        "twice": "SGLang accepts it; the second copy takes memory and balances nothing",
        "length": "SGLang stops: the rows make no tensor",
        "division": "SGLang stops with an AssertionError",
        "layers": "SGLang accepts any number of rows, and uses row i for layer i of the model, dense layers counted",
    }

    def text(self, saved: SavedPlan) -> str:
        """Rows of all layers; dense layers get the experts in their own order."""
        numbers, layers = numbers_needed(saved, "SGLang"), saved.layers.hidden_layers
        if layers is None:
            raise ValueError(
                "SGLang wants a row for each layer of the model, dense ones too, and the plan does not say how many "
                "layers there are; give --model FOLDER or --hidden-layers N"
            )
        dense = own_order(saved.plan.num_experts, saved.plan.phy2log.shape[1])
        rows = dict(zip(numbers, saved.plan.phy2log.tolist(), strict=True))
        return f'{{"{KEY}": {rows_text([rows.get(layer, dense) for layer in range(layers)])}}}\n'

    def flags(self, saved: SavedPlan, path: Path) -> list[str]:
        """The map, its redundant experts and its devices."""
        plan = saved.plan
        return [
            f"--init-expert-location {path} --ep-num-redundant-experts {plan.num_redundant_experts} "
            f"--ep-size {plan.num_devices} --ep-dispatch-algorithm dynamic",
            "dynamic spreads tokens over copies; static sends a rank's tokens to the copy on it, or to a fixed one",
        ]

    def read(self, document: Any) -> EnginePlan | None:
        """The map, and keys beside it."""
        if not isinstance(document, dict) or KEY not in document:
            return None
        others = sorted(str(key) for key in document if key != KEY)
        problems = [f"has the key '{others[0]}' beside {KEY}: SGLang stops with a TypeError"] if others else []
        rows = slot_rows(document[KEY], KEY)
        return EnginePlan(
            self.name, dict(enumerate(rows)), problems=problems,
            notes=["SGLang must be started with the --ep-num-redundant-experts and --ep-size that the map is for"],
        )  # fmt: skip


def check_other_keys(document: Any) -> None:
    """Refuses a document of SGLang that holds loads in place of a map.

    Raises:
        ValueError: If so.
    """
    if isinstance(document, dict) and "logical_count" in document:
        raise ValueError(
            f"it holds logical_count, loads from which SGLang plans for itself, and no {KEY}; export from it instead "
            f"(keys: {json.dumps(sorted(map(str, document)))[:200]})"
        )
