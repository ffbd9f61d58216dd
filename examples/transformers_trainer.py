"""A byte-level Llama learns the standard library's sources with Transformers' Trainer: one line makes it use Lomo.

python examples/transformers_trainer.py [steps]
"""

import os
import pathlib
import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lomo_kernels.integrations.transformers import attach

CONTEXT = 128


class Sources(torch.utils.data.Dataset):
    """Python's own files, cut into pieces of CONTEXT bytes."""

    def __init__(self) -> None:
        files = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)
        self.pieces = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: len(text) // CONTEXT * CONTEXT]
        self.pieces = self.pieces.view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece = self.pieces[index].long()
        return {"input_ids": piece, "labels": piece}


torch.manual_seed(0)
sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=int(sys.argv[1]) if len(sys.argv) > 1 else 200,
    per_device_train_batch_size=2,
    learning_rate=2e-2,  # for AdamW a tenth of it
    lr_scheduler_type="cosine",
    warmup_steps=10,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=Sources())
attach(trainer, rule="adalomo", fused_layers=True, clip_memory=0)  # this line
trainer.train()
