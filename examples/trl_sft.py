"""TRL: supervised fine-tuning of a small Llama on docstrings of the standard library. One line makes it use Lomo.

python examples/trl_sft.py [steps]
"""

import ast
import os
import pathlib
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from lomo_kernels.integrations.transformers import attach

modules = [ast.parse(file.read_text()) for file in sorted(pathlib.Path(os.__file__).parent.glob("*.py"))[:60]]
functions = [node for module in modules for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
texts = [f"{node.name}: {ast.get_docstring(node)}" for node in functions if ast.get_docstring(node)]

special = ["<pad>", "<s>", "</s>"]
words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
bytes_ = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token="<pad>", bos_token="<s>", eos_token="</s>")

torch.manual_seed(0)
sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
arguments = SFTConfig(
    output_dir=tempfile.mkdtemp(),
    max_steps=int(sys.argv[1]) if len(sys.argv) > 1 else 100,
    per_device_train_batch_size=4,
    max_length=128,
    learning_rate=0.3,
    bf16=torch.cuda.is_available(),
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = SFTTrainer(
    model=model, args=arguments, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer
)
attach(trainer, fused_layers=True)  # this line
trainer.train()
