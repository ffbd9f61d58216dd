"""LoRA: PEFT's adapters over a frozen base, trained by Lomo. The base gets no hook, and may have any dtype.

python examples/peft_lora.py [steps]
"""

import os
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lomo_kernels import Lomo

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
CONTEXT, BATCH = 128, 8

files = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
pieces = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT).long()

torch.manual_seed(0)
sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
adapters = LoraConfig(
    r=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    modules_to_save=["embed_tokens", "lm_head"],
    task_type="CAUSAL_LM",
)
model = get_peft_model(base, adapters)
optimizer = Lomo(model, lr=0.5, clip_grad_norm=1.0)  # after all adapters were added
model.print_trainable_parameters()

for step in range(1, STEPS + 1):
    batch = pieces[torch.randint(len(pieces), (BATCH,))]
    loss = model(input_ids=batch, labels=batch).loss
    optimizer.backward(loss)
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}, norm {optimizer.last_grad_norm.item():.3f}")
