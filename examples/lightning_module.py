"""A byte-level Llama in a LightningModule: one callback lets Lightning's Trainer free each gradient inside backward.

python examples/lightning_module.py [steps]
"""

import os
import pathlib
import sys
from typing import Any

import torch
from lightning import LightningModule, Trainer
from transformers import LlamaConfig, LlamaForCausalLM

from lomo_kernels import Lomo
from lomo_kernels.integrations.lightning import LomoCallback

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
CONTEXT, BATCH = 128, 4


class Llama(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
        self.llama = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.llama(input_ids=batch.long(), labels=batch.long()).loss
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = Lomo(self, lr=0.3, fused_layers=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step % 10 == 0 and len(self.losses) == 20:
            norm = self.trainer.callback_metrics["grad_norm"]
            print(f"step {self.global_step}: loss {torch.stack(self.losses).mean():.3f}, norm {norm:.3f}")
            self.losses.clear()


files = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
pieces = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)
torch.manual_seed(0)
loader = torch.utils.data.DataLoader(pieces, batch_size=BATCH, shuffle=True)
settings = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = Trainer(max_steps=STEPS, devices=1, callbacks=[LomoCallback()], **settings, **silent)  # the callback
trainer.fit(Llama(), loader)
