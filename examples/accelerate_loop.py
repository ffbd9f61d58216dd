"""accelerate's training loop, with gradient accumulation and clipping, in which each gradient is freed inside backward.

python examples/accelerate_loop.py [steps]
"""

import os
import pathlib
import sys

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from lomo_kernels import Lomo
from lomo_kernels.integrations.accelerate import attach

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
CONTEXT, BATCH, CLIP = 128, 4, 1.0

files = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
pieces = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)

torch.manual_seed(0)
sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
optimizer = Lomo(model, lr=0.3, clip_grad_norm=CLIP, fused_layers=True)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
loader = torch.utils.data.DataLoader(pieces, batch_size=BATCH, shuffle=True)

accelerator = Accelerator(gradient_accumulation_steps=2)
attach(accelerator)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

step, losses = 0, []
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=batch.long(), labels=batch.long()).loss
        accelerator.backward(loss)
        losses.append(loss.detach())
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
            schedule.step()
            step += 1
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients and step % 10 == 0:
        accelerator.print(f"step {step}: loss {torch.stack(losses).mean():.3f}, norm {norm:.3f}")
        losses.clear()
    if step == STEPS:
        break
