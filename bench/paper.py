"""Table 1 of the paper (arXiv 2306.09782v2): LLaMA-7B, sequence 512, batch 8, GiB by category."""

from lomo_kernels.plan.paper import ACTIVATIONS, BATCH, MODEL, SEQUENCE, TABLE_1, TOTALS

__all__ = ["ACTIVATIONS", "BATCH", "MODEL", "SEQUENCE", "TABLE_1", "TOTALS", "rows"]


def rows(checkpointing: bool) -> dict[str, dict[str, float]]:
    """GiB by category, of each method; what the totals have beyond the categories is "not named"."""
    found = {method: {**row, "activations": ACTIVATIONS[checkpointing]} for method, row in TABLE_1.items()}
    return {
        method: {**row, "not named": round(TOTALS[checkpointing][method] - sum(row.values()), 2)}
        for method, row in found.items()
    }
