"""What the paper says of memory (arXiv 2306.09782v2), GiB."""

from __future__ import annotations

# ---- Table 1: LLaMA-7B by category -----------------------------------------------------------------------------------

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

# ---- Table 2: sequence 1024, batch 1, ZeRO-3, RTX 3090 ---------------------------------------------------------------

#: (model, method): GPUs, and the peak of each.
TABLE_2 = {
    ("llama-7b", "AdamW"): (8, 15.76),
    ("llama-7b", "SGD"): (8, 9.49),
    ("llama-7b", "LOMO"): (1, 13.61),
    ("llama-13b", "SGD"): (8, 15.74),
    ("llama-13b", "LOMO"): (2, 15.92),
    ("llama-30b", "LOMO"): (4, 19.78),
    ("llama-65b", "LOMO"): (8, 19.18),
}

#: Our names. The paper's AdamW and SGD keep float32 master weights.
OURS = {"AdamW": "AdamW, fp32 master", "SGD": "SGD, fp32 master", "LOMO": "Lomo"}
