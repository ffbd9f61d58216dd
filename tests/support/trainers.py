"""For the tests of trainers: what stands in the tables of docs/trainers.md, and small models and data.

A table has a line for each setting that a test runs: "equal" (to torch's SGD, at most 1e-6 away after 8 steps in
float32) or the words with which it is refused. ``python tests/support/trainers.py`` writes the tables.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
EQUAL = "equal"
STEPS = 8
TOLERANCE = 1e-6

#: For each trainer: each setting, and "equal" or how its refusal begins.
TABLES: dict[str, dict[str, str]] = {
    "accelerate": {
        "no clipping": EQUAL,
        "`clip_grad_norm_`": EQUAL,
        "`clip_grad_norm_` with an infinite bound, for the norm": EQUAL,
        "`clip_grad_value_`": EQUAL,
        "`gradient_accumulation_steps=3`, a loader of 23 batches": EQUAL,
        "`gradient_accumulation_steps=3`, clipping": EQUAL,
        "`gradient_accumulation_steps=3`, clipping at each batch": EQUAL,
        "`gradient_accumulation_steps=3`, `clip_grad_value_` at each batch": EQUAL,
        '`mixed_precision="bf16"`': EQUAL,
        "a scheduler that is prepared": EQUAL,
        "`weight_decay`": EQUAL,
        "`fused_layers=True`, clipping": EQUAL,
        "`backward(loss, learning_rate=…)`, `lomo_backward(loss, learning_rate)`": EQUAL,
        "`free_memory()`, then prepared again": EQUAL,
        "`no_sync` around each backward before the last": EQUAL,
        "`zero_grad()` before or after each backward, no `step()`": EQUAL,
        "`save_state`, `load_state`": EQUAL,
        "`GradScalerKwargs(enabled=False)`": EQUAL,
        "FSDP2, two processes": EQUAL,
        "FSDP2, two processes, `gradient_accumulation_steps=2`, clipping": EQUAL,
        "two processes, `Lomo(process_group=…)`, a model that is not wrapped": EQUAL,
        'a GradScaler (`mixed_precision="fp16"`)': "mixed_precision='fp16' makes accelerate scale the loss",
        "several optimizers": "the accelerator has 2 optimizers",
        "another optimizer": "the accelerator's optimizer is AdamW, expected Lomo",
        "`clip_grad_norm_` with another bound than `Lomo`'s": "accelerator.clip_grad_norm_ got max_norm=2.0",
        "`clip_grad_norm_` with another norm": "accelerator.clip_grad_norm_ got norm_type=1",
        "`clip_grad_norm_` of some parameters": "accelerator.clip_grad_norm_ got 2 trained parameters, and not 2.",
        "`clip_grad_value_` with another bound than `Lomo`'s": "accelerator.clip_grad_value_ got clip_value=2.0",
        "`backward(loss, retain_graph=True)`": "accelerator.backward got retain_graph",
        "two backwards before one `optimizer.step()`": "accelerator.backward came twice without optimizer.step()",
        "DeepSpeed, Megatron-LM": "accelerate runs with distributed_type DEEPSPEED, expected one process or FSDP2",
        "FSDP1": "accelerate runs with distributed_type FSDP, expected one process or FSDP2. Use fsdp_version=2",
        "DistributedDataParallel": "accelerate runs 2 processes with DistributedDataParallel",
        "`optimizer.backward` without `attach`, while gradients accumulate": "accelerate accumulates gradients",
    },
    "transformers": {
        "`max_grad_norm`": EQUAL,
        "`max_grad_norm=0`": EQUAL,
        "`use_liger_kernel=True`, `gradient_accumulation_steps`": EQUAL,
        "`use_liger_kernel=True`, `attach(trainer, clip_memory=0)`": EQUAL,
        "`use_liger_kernel=True`, `attach(trainer, fused_layers=True)`": EQUAL,
        "`gradient_accumulation_steps` (and `num_items_in_batch`), an epoch that it does not divide": EQUAL,
        "`compute_loss_func`": EQUAL,
        "`compute_loss` with `linear_cross_entropy`": EQUAL,
        "`lr_scheduler_type`, `warmup_steps`": EQUAL,
        '`lr_scheduler_type="reduce_lr_on_plateau"`': EQUAL,
        "`weight_decay`, not for norms and biases": EQUAL,
        "`bf16=True`": EQUAL,
        "`activation_checkpointing`": EQUAL,
        "`activation_checkpointing`, `use_reentrant=True`": EQUAL,
        "`gradient_checkpointing`": EQUAL,
        "evaluation in between": EQUAL,
        "several `eval_dataset`s at each step, `prediction_loss_only`": EQUAL,
        "an `IterableDataset`, a last batch that is shorter": EQUAL,
        '`train_sampling_strategy="group_by_length"`, rows of different lengths': EQUAL,
        "a callback that ends training between the parts of a step": EQUAL,
        "an interrupt in forward or backward, then `train()` again": EQUAL,
        "`torch_compile`": EQUAL,
        "`label_smoothing_factor`": EQUAL,
        "`neftune_noise_alpha`": EQUAL,
        '`optim="lomo"` (which then does not need lomo_optim)': EQUAL,
        "`attach(trainer, fused_layers=True)`, `clip_memory=…`": EQUAL,
        "`save_steps`, `resume_from_checkpoint`": EQUAL,
        "`auto_find_batch_size` (a warning says what an attempt did)": EQUAL,
        "`train()` twice": EQUAL,
        "`model_init`, a hyperparameter search": EQUAL,
        "`LomoTrainer`; `optimizer_cls_and_kwargs=lomo(args)`": EQUAL,
        "FSDP2, two processes, `gradient_accumulation_steps`, `weight_decay`": EQUAL,
        "`peft_config` and `modules_to_save`": EQUAL,
        "TRL's `SFTTrainer`, `gradient_accumulation_steps`": EQUAL,
        "TRL's `DPOTrainer`, `gradient_accumulation_steps`": EQUAL,
        "TRL's `GRPOTrainer`, `gradient_accumulation_steps`": EQUAL,
        "`fp16=True`": "fp16=True makes accelerate scale the loss; Lomo scales it itself",
        "DataParallel (several GPUs in one process)": "Trainer would wrap the model in DataParallel for 2 GPUs",
        '`optim="adafactor"`': "TrainingArguments have optim='adafactor', optim_args=None",
        "`attach(trainer, lr=…)`": "lr is given twice; set learning_rate in TrainingArguments only",
        "`Trainer(optimizers=…)`": "the trainer was made with an optimizer",
        "a subclass with a `create_optimizer` of its own": "this Own has a create_optimizer of its own",
        "attached twice": "this Trainer has a create_optimizer of its own, or attach() was called before",
    },
    "lightning": {
        "no clipping": EQUAL,
        "`gradient_clip_val`": EQUAL,
        '`gradient_clip_val`, `gradient_clip_algorithm="value"`': EQUAL,
        "`gradient_clip_val`, and the same in `Lomo(clip_grad_norm=…)`": EQUAL,
        "`accumulate_grad_batches=3`, an epoch that it does not divide": EQUAL,
        "`accumulate_grad_batches=3`, `gradient_clip_val`": EQUAL,
        '`accumulate_grad_batches=3`, `gradient_clip_algorithm="value"`': EQUAL,
        "`GradientAccumulationScheduler`": EQUAL,
        "`weight_decay`": EQUAL,
        "a scheduler of each step": EQUAL,
        "a scheduler of each epoch": EQUAL,
        '`precision="bf16-mixed"`': EQUAL,
        '`precision="bf16-true"`': EQUAL,
        '`precision="16-true"` (as in a loop without Lightning)': EQUAL,
        "`fused_layers=True`": EQUAL,
        "validation in between": EQUAL,
        "`training_step` returns None": EQUAL,
        "`optimizer_step` that calls the closure by itself": EQUAL,
        "`optimizer_step` that calls the closure first": EQUAL,
        "`max_steps` in the middle of an epoch": EQUAL,
        "`barebones`": EQUAL,
        "`StochasticWeightAveraging`": EQUAL,
        "`fit(torch.compile(module))`": EQUAL,
        "`pytorch_lightning` in place of `lightning`": EQUAL,
        "`fit` twice, and with another Trainer": EQUAL,
        "`ModelCheckpoint`, `fit(ckpt_path=…)`": EQUAL,
        "`Tuner.lr_find`": EQUAL,
        "FSDP2 (`ModelParallelStrategy`), two processes, `accumulate_grad_batches=2`": EQUAL,
        "manual: `self.optimizers().backward(loss)`": EQUAL,
        "manual: the same with `fused_layers=True`, `clip_memory=0`": EQUAL,
        'manual: the same with `precision="bf16-mixed"`': EQUAL,
        "manual: `with self.optimizers().accumulate():`": EQUAL,
        "manual: `manual_backward`, `clip_gradients`, `step(closure)`, as with SGD": EQUAL,
        "manual: several optimizers, toggled": EQUAL,
        'a GradScaler (`precision="16-mixed"`)': "precision='16-mixed' makes Lightning scale the loss",
        '`precision="64-true"`, and other precisions': "Lightning's precision is DoublePrecision, expected '32-true'",
        '`strategy="ddp"`': "Lightning's strategy is DDPStrategy, expected one device or ModelParallelStrategy",
        "another optimizer": "the LightningModule's optimizers are ['AdamW'], expected Lomo",
        "`gradient_clip_val` with another bound than `Lomo`'s": "Trainer has gradient_clip_val=2.0, and Lomo was made",
        "a `backward` of the module's own": "OwnBackward replaces backward",
        "a `configure_gradient_clipping` of the module's own": "OwnClipping replaces configure_gradient_clipping",
        "an `optimizer_zero_grad` of the module's own": "OwnZeroGrad replaces optimizer_zero_grad",
        "`optimizer_step` that calls the closure twice": "optimizer_step ran its closure twice",
        "`self.optimizers().backward(loss)` in automatic optimization": "Lightning runs backward itself",
        "manual: two `Lomo`s of the same weights": "this optimizer was replaced by a newer Lomo",
        "manual: `clip_gradients` after `backward`": "clip_gradients got 0.3, and Lomo was made with",
        "manual: `backward` without the callback": "this is a LightningLomo around the optimizer",
    },
    "peft": {
        "LoRA": EQUAL,
        "DoRA": EQUAL,
        "`modules_to_save`": EQUAL,
        "a base in int8 (bitsandbytes, LoRA)": EQUAL,
        "a base in 4 bits (bitsandbytes, QLoRA)": EQUAL,
        "an adapter that is there from the beginning is activated later": EQUAL,
        "`add_param_group` for an adapter that was added later": EQUAL,
        "`get_peft_model` after the optimizer was made": "model.layers.0.self_attn.q_proj.lora_A.default.weight was",
        "`add_adapter` after the optimizer was made": (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.second.weight was added after the optimizer"
        ),
    },
}


def needs(*packages: str) -> None:
    """Skips the module if a package is missing. In continuous integration it is an error."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing and not os.environ.get("CI"):
        pytest.skip(f'needs {", ".join(missing)}: pip install ".[trainers]"', allow_module_level=True)
    assert not missing, f"{missing} are not installed"


def refusal(table: str, setting: str) -> str:
    """A regular expression for the message that `setting` is refused with."""
    words = TABLES[table][setting]
    assert words != EQUAL
    return re.escape(words)


def assert_equal(table: str, setting: str, model: nn.Module, reference: nn.Module) -> None:
    """Compares weights. `setting` has to stand in the table as equal."""
    assert TABLES[table][setting] == EQUAL
    assert furthest(model, reference) <= TOLERANCE


def furthest(model: nn.Module, reference: nn.Module) -> float:
    """The largest difference between weights of equal models."""
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def classifier(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def examples(count: int) -> torch.utils.data.TensorDataset:
    made = torch.Generator().manual_seed(1)
    return torch.utils.data.TensorDataset(
        torch.randn(count, 8, generator=made), torch.randint(4, (count,), generator=made)
    )


def tables() -> Iterator[tuple[str, str]]:
    """Each trainer's lines of the page."""
    for trainer, settings in TABLES.items():
        lines = ["| setting | |", "|---|---|"]
        lines += [
            f"| {name} | {said if said == EQUAL else f'refused: “{said} …”'} |" for name, said in settings.items()
        ]
        yield trainer, "\n".join(lines)


def with_tables(page: str) -> str:
    """The page, with what stands between its marks written anew."""
    for trainer, lines in tables():
        mark = re.compile(rf"(<!-- settings: {trainer} -->\n).*?(<!-- end settings -->)", re.S)
        page, count = mark.subn(lambda match, lines=lines: f"{match[1]}\n{lines}\n\n{match[2]}", page)  # type: ignore[misc]
        assert count == 1, trainer
    return page


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
