"""vLLM's initial map (pull request 49572, in no release yet): JSON `[[expert in each slot], ...]`, MoE layers only.

Released versions read no map; they take a policy in process instead ([vllm_policy.py](vllm_policy.py)).
"""

from pathlib import Path
from typing import Any, ClassVar

from runtime.balancing.plan_file import SavedPlan, rows_text, slot_row, slot_rows
from runtime.export.engine_plan import Consequences, EnginePlan

UNRELEASED = (
    "no release of vLLM reads a map (pull request 49572 does); with vLLM 0.32 register the policy instead: "
    "docs/export.md"
)


class VllmFormat:
    """One row for each MoE layer, or one row for all of them."""

    name, suffix, counts_dense = "vllm", ".json", False
    consequences: ClassVar[Consequences] = {
        "range": "vLLM refuses it",
        "empty": "vLLM takes -1 for an unused slot",
        "missing": "vLLM refuses it",
        "twice": "vLLM accepts it; the second copy takes memory and balances nothing",
        "length": "vLLM refuses it",
        "division": "vLLM refuses it",
        "layers": "vLLM refuses it: it wants a row for each MoE layer, none for dense ones",
    }

    def text(self, saved: SavedPlan) -> str:
        """A row for each MoE layer."""
        return rows_text(saved.plan.phy2log.tolist()) + "\n"

    def flags(self, saved: SavedPlan, path: Path) -> list[str]:
        """Expert parallelism with redundant experts, and the map."""
        config = f'{{"num_redundant_experts": {saved.plan.num_redundant_experts}, "initial_expert_map_path": "{path}"}}'
        return [f"--enable-expert-parallel --enable-eplb --eplb-config '{config}'", UNRELEASED]

    def read(self, document: Any) -> EnginePlan | None:
        """The rows; a flat list is the row of every MoE layer."""
        if not isinstance(document, list):
            return None
        if document and not isinstance(document[0], list):
            notes = ["one row, which vLLM uses for every MoE layer", UNRELEASED]
            return EnginePlan(self.name, {0: slot_row(document, "the map")}, notes=notes, shared=True)
        return EnginePlan(self.name, dict(enumerate(slot_rows(document, "the map"))), notes=[UNRELEASED])
