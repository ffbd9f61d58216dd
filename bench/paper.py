"""Table 1 of the paper (arXiv 2306.09782v2): LLaMA-7B, sequence 512, batch 8, GiB by category."""

MODEL, SEQUENCE, BATCH = "llama-7b", 512, 8
ACTIVATIONS = {False: 45.61, True: 1.79}  # by checkpointing

#: Beside the activations. The optimizers' states are in float32 and contain a copy of the parameters.
TABLE_1 = {
    "AdamW": {"parameters": 12.55, "gradients": 12.55, "optimizer states": 75.31},
    "SGD": {"parameters": 12.55, "gradients": 12.55, "optimizer states": 25.10},
    "LOMO": {"parameters": 12.55, "gradients": 0.24, "optimizer states": 0.0},
}
#: As printed. Without checkpointing they are 1.00 more than the categories together.
TOTALS = {
    False: {"AdamW": 147.02, "SGD": 96.81, "LOMO": 59.40},
    True: {"AdamW": 102.20, "SGD": 51.99, "LOMO": 14.58},
}


def rows(checkpointing: bool) -> dict[str, dict[str, float]]:
    """GiB by category, of each method; what the totals have beyond the categories is "not named"."""
    found = {method: {**row, "activations": ACTIVATIONS[checkpointing]} for method, row in TABLE_1.items()}
    return {
        method: {**row, "not named": round(TOTALS[checkpointing][method] - sum(row.values()), 2)}
        for method, row in found.items()
    }
