"""Table 1 of the paper (arXiv 2306.09782v2): LLaMA-7B, sequence 512, batch 8, by category."""

from lomo_kernels.plan.paper import ACTIVATIONS, BATCH, MODEL, SEQUENCE, TABLE_1, TOTALS

from .results import Measurement

__all__ = ["ACTIVATIONS", "BATCH", "CATEGORIES", "MODEL", "SEQUENCE", "TABLE_1", "TOTALS", "measurements"]

#: In the order of tables and bars. "not named" is what the paper's totals have beyond its categories.
CATEGORIES = (
    *("parameters", "gradients", "optimizer states", "activations", "kept factors", "temporaries", "workspace"),
    "not named",
)


def measurements() -> list[Measurement]:
    """What the paper measured, as if it were ours."""
    found = []
    for checkpointing, totals in TOTALS.items():
        for method, total in totals.items():
            row = {**TABLE_1[method], "activations": ACTIVATIONS[checkpointing]}
            row["not named"] = round(total - sum(row.values()), 2)
            case = {"model": MODEL, "sequence": SEQUENCE, "batch": BATCH, "how": "the paper"}
            memory = {name: round(size * 2**30) for name, size in row.items()}
            found.append(Measurement("memory", method, {**case, "checkpointing": checkpointing}, memory=memory))
    return found
