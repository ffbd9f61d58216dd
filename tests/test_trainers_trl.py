"""TRL: its trainers override `training_step`, and train as with SGD all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.trainers import EQUAL, TABLES, TOLERANCE, assert_equal, furthest, needs

from lomo_kernels import Lomo

needs("transformers", "accelerate", "trl", "datasets", "peft")
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer  # noqa: E402
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

from lomo_kernels.integrations.transformers import attach  # noqa: E402

TEXTS = [f"def f(x): return x + {number}" for number in range(40)]
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    special = ["<pad>", "<s>", "</s>"]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    made = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, **SHAPE))


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.3,
        "max_grad_norm": 0.2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **more,
    }


def sft(kind: Any, folder: Path, **more: Any) -> Any:
    data = Dataset.from_dict({"text": TEXTS})
    args = SFTConfig(**settings(folder), max_length=32)
    return kind(model=llama(), args=args, train_dataset=data, processing_class=tokenizer(), **more)


def dpo(kind: Any, folder: Path) -> Any:
    parts = {"prompt": lambda text: text[:8], "chosen": lambda text: text[8:], "rejected": lambda text: text[9:] + "?"}
    data = Dataset.from_dict({name: [part(text) for text in TEXTS] for name, part in parts.items()})
    args = DPOConfig(**settings(folder), max_length=32)
    return kind(model=llama(), ref_model=llama(), args=args, train_dataset=data, processing_class=tokenizer())


def grpo(kind: Any, folder: Path) -> Any:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(completion))) for completion in completions]

    data = Dataset.from_dict({"prompt": [text[:8] for text in TEXTS]})
    args = GRPOConfig(
        **settings(folder, per_device_train_batch_size=4), num_generations=4, max_completion_length=8, beta=0.0
    )
    return kind(model=llama(), args=args, train_dataset=data, processing_class=tokenizer(), reward_funcs=reward)


def with_sgd(base: Any) -> Any:
    class WithSGD(base):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer_cls_and_kwargs = torch.optim.SGD, {"lr": self.args.learning_rate}
            return Trainer.create_optimizer(self, model)

    return WithSGD


@pytest.mark.parametrize(
    "setting,base,build",
    [
        ("TRL's `SFTTrainer`, `gradient_accumulation_steps`", SFTTrainer, sft),
        ("TRL's `DPOTrainer`, `gradient_accumulation_steps`", DPOTrainer, dpo),
        ("TRL's `GRPOTrainer`, `gradient_accumulation_steps`", GRPOTrainer, grpo),
    ],
)
@pytest.mark.parametrize("options", [{}, {"fused_layers": True, "clip_memory": 0}], ids=["plain", "fused, two passes"])
def test_weights_and_log_are_those_of_sgd(
    setting: str, base: Any, build: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    trainer, reference = build(base, tmp_path), build(with_sgd(base), tmp_path)
    attach(trainer, **options)
    for each in (trainer, reference):
        torch.manual_seed(2)  # of what GRPO generates
        each.train()
    assert_equal("transformers", setting, trainer.model, reference.model)
    assert furthest(trainer.model, llama()) > 1e-3, "nothing was trained"
    norms, expected = (
        [entry["grad_norm"] for entry in each.state.log_history if "grad_norm" in entry]
        for each in (trainer, reference)
    )
    assert len(norms) == 8 and norms == pytest.approx(expected, rel=1e-4) and min(norms) > 0.2
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, Lomo) and optimizer.step_count.item() == 8


def test_adapters_that_trl_makes(tmp_path: Path) -> None:
    """`SFTTrainer` calls `get_peft_model` itself, before `attach`."""

    def config() -> LoraConfig:
        return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")

    trainer, reference = (sft(kind, tmp_path, peft_config=config()) for kind in (SFTTrainer, with_sgd(SFTTrainer)))
    attach(trainer)
    trainer.train()
    reference.train()
    assert furthest(trainer.model, reference.model) <= TOLERANCE
    assert "lora_A" in trainer.optimizer.optimizer.summary()
    assert TABLES["transformers"]["`peft_config` and `modules_to_save`"] == EQUAL
