"""`lomo_kernels.integrations.transformers`: Trainer's settings give SGD's weights and log, or an error."""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Processes
from support.trainers import EQUAL, TABLES, TOLERANCE, assert_equal, furthest, needs, refusal
from torch import Tensor, nn

from lomo_kernels import Lomo, linear_cross_entropy

needs("transformers", "accelerate")
from accelerate import FullyShardedDataParallelPlugin  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from lomo_kernels.integrations.transformers import LomoTrainer, attach, lomo  # noqa: E402

LR = 0.3


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def llama(seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


def rows(count: int) -> list[dict[str, Tensor]]:
    """Rows of different lengths count differently: the labels of some tokens are left out."""
    made = torch.Generator().manual_seed(1)
    data = [torch.randint(32, (12,), generator=made) for _ in range(count)]
    return [
        {"input_ids": row, "labels": row.where(torch.arange(12) < 4 + index % 8, torch.tensor(-100))}
        for index, row in enumerate(data)
    ]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": LR,
        "max_grad_norm": 0.2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**defaults | settings)


class WithSGD(Trainer):
    """Trainer's own groups, with torch's SGD."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer_cls_and_kwargs = torch.optim.SGD, {"lr": self.args.learning_rate}
        return Trainer.create_optimizer(self, model)


def train(
    folder: Path, attached: bool, settings: dict[str, Any], model: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, list[dict[str, float]]]:
    """The trained model, and what was logged."""
    kind = Trainer if attached else WithSGD
    given = ("compute_loss_func", "eval_dataset", "callbacks", "train_dataset", "data_collator")
    extra = {"train_dataset": rows(64)} | {name: settings[name] for name in given if name in settings}
    plain = {name: value for name, value in settings.items() if name not in extra}
    trainer = kind(model or llama(), arguments(folder, **plain), **extra)
    if attached:
        attach(trainer, **options)
    trainer.train()
    if attached:
        optimizer = trainer.optimizer.optimizer
        assert isinstance(optimizer, Lomo) and optimizer.step_count.item() == trainer.state.global_step
    return trainer.model, trainer.state.log_history


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A user's own: a sum over the batch's items."""
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    loss = nn.functional.cross_entropy(
        outputs["logits"].flatten(0, 1), shifted.flatten(), ignore_index=-100, reduction="sum"
    )
    return loss / num_items_in_batch


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(rows(19))


def padded(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    fills = {"input_ids": 0, "labels": -100}
    return {
        name: torch.stack([nn.functional.pad(row[name], (0, longest - len(row[name])), value=fill) for row in batch])
        for name, fill in fills.items()
    }


class Stops(TrainerCallback):
    """Between the parts of a step."""

    def __init__(self, what: str, step: int) -> None:
        self.what, self.step = what, step

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            setattr(control, self.what, True)


SETTINGS: dict[str, dict[str, Any]] = {
    "`max_grad_norm`": {},
    "`max_grad_norm=0`": {"max_grad_norm": 0.0},
    "`gradient_accumulation_steps` (and `num_items_in_batch`), an epoch that it does not divide": {
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 1,
        "max_steps": -1,
    },
    "`compute_loss_func`": {"gradient_accumulation_steps": 2, "compute_loss_func": mean_loss},
    "`lr_scheduler_type`, `warmup_steps`": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    '`lr_scheduler_type="reduce_lr_on_plateau"`': {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": rows(4),
        "metric_for_best_model": "eval_loss",
    },
    "`weight_decay`, not for norms and biases": {"weight_decay": 0.1},
    "`bf16=True`": {"bf16": True},
    "`activation_checkpointing`": {"activation_checkpointing": True},
    "`activation_checkpointing`, `use_reentrant=True`": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "`gradient_checkpointing`": {"gradient_checkpointing": True},
    "evaluation in between": {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": rows(6)},
    "several `eval_dataset`s at each step, `prediction_loss_only`": {
        "prediction_loss_only": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_dataset": {"first": rows(4), "second": rows(5)},
    },
    "an `IterableDataset`, a last batch that is shorter": {
        "train_dataset": Stream(),
        "gradient_accumulation_steps": 3,
        "max_steps": 7,
    },
    '`train_sampling_strategy="group_by_length"`, rows of different lengths': {
        "train_sampling_strategy": "group_by_length",
        "train_dataset": [
            {name: row[: 5 + index % 8] for name, row in each.items()} for index, each in enumerate(rows(40))
        ],
        "data_collator": padded,
    },
    "a callback that ends training between the parts of a step": {
        "gradient_accumulation_steps": 3,
        "max_steps": 12,
        "callbacks": [Stops("should_training_stop", 4)],
    },
    "`torch_compile`": {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3},
    "`label_smoothing_factor`": {"label_smoothing_factor": 0.1},
    "`neftune_noise_alpha`": {"neftune_noise_alpha": 5.0},
    '`optim="lomo"` (which then does not need lomo_optim)': {"optim": "lomo"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_weights_and_log_are_those_of_sgd(setting: str, tmp_path: Path) -> None:
    settings = SETTINGS[setting]
    model, log = train(tmp_path, True, settings)
    reference, expected = train(tmp_path, False, {k: v for k, v in settings.items() if k != "optim"})
    assert TABLES["transformers"][setting] == EQUAL
    assert furthest(model, reference) <= TOLERANCE
    assert furthest(model, llama()) > 0.005, "nothing was trained"
    ours, theirs = ([entry for entry in entries if "grad_norm" in entry] for entries in (log, expected))
    assert len(ours) == len(theirs) > 2
    for entry, other in zip(ours, theirs, strict=True):
        assert entry.pop("skipped_steps") == 0
        assert entry == {name: pytest.approx(value, rel=1e-4) for name, value in other.items()}
    assert min(entry["grad_norm"] for entry in ours) > 0.2, "nothing was clipped, or not logged"


@pytest.mark.parametrize("options", [{"fused_layers": True}, {"clip_memory": 0}, {"clip_memory": 20_000}], ids=str)
def test_options_of_lomo_give_the_same_weights(options: dict[str, Any], tmp_path: Path) -> None:
    model, _ = train(tmp_path, True, {"gradient_accumulation_steps": 2}, **options)
    reference, _ = train(tmp_path, False, {"gradient_accumulation_steps": 2})
    assert furthest(model, reference) <= TOLERANCE
    assert TABLES["transformers"]["`attach(trainer, fused_layers=True)`, `clip_memory=…`"] == EQUAL


@pytest.mark.parametrize("rule", ["sign", "rows", "tensor", "adalomo"])
def test_other_rules_are_those_of_the_optimizer_itself(rule: str, tmp_path: Path) -> None:
    """With the model's embedding known, which parameter groups do not name."""
    options = {"max_grad_norm": 0.0, "learning_rate": 0.01, "max_steps": 3, "lr_scheduler_type": "constant"}
    batches: list[Any] = []

    class Recorded(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Recorded(llama(), arguments(tmp_path, **options), train_dataset=rows(64))
    attach(trainer, rule=rule)
    trainer.train()
    reference = llama()
    optimizer = Lomo(reference, lr=0.01, rule=rule)
    for batch in batches:
        optimizer.backward(reference(**batch).loss)
    assert furthest(trainer.model, reference) <= TOLERANCE


def test_a_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    """Twice, with stochastic rounding, a schedule and accumulation."""
    settings = {"gradient_accumulation_steps": 2, "max_steps": 9, "lr_scheduler_type": "cosine"}

    def run(folder: str, **more: Any) -> nn.Module:
        args = arguments(tmp_path / folder, **settings | {"save_strategy": "steps", "save_steps": 3})
        trainer = Trainer(llama().bfloat16(), args, train_dataset=rows(64))
        attach(trainer, rounding="stochastic", fused_layers=True)
        trainer.train(**more)
        return trainer.model

    whole = run("whole")
    once = run("once", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    twice = run("twice", resume_from_checkpoint=str(tmp_path / "once" / "checkpoint-6"))
    assert furthest(once, whole) == furthest(twice, whole) == 0.0
    assert TABLES["transformers"]["`save_steps`, `resume_from_checkpoint`"] == EQUAL


def fails_at(step: int, above: int) -> type[Trainer]:
    """Runs out of memory in forward of a `step` if the batch is larger."""

    class Small(WithSGD):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if len(inputs["input_ids"]) > above and self.state.global_step == step:
                raise RuntimeError("CUDA out of memory. (pretended)")
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Small


def test_a_smaller_batch_goes_on_and_says_from_where(tmp_path: Path) -> None:
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 4}
    reference = fails_at(2, 2)(llama(), arguments(tmp_path, **settings), train_dataset=rows(64))
    reference.train()
    kind = fails_at(2, 2)
    kind.create_optimizer = Trainer.create_optimizer  # type: ignore[method-assign]
    trainer = kind(llama(), arguments(tmp_path, **settings), train_dataset=rows(64))
    attach(trainer)
    with pytest.warns(UserWarning, match=r"a batch of 4 did not fit.*after 2 steps.*last one is complete"):
        trainer.train()
    assert furthest(trainer.model, reference.model) <= TOLERANCE
    assert TABLES["transformers"]["`auto_find_batch_size` (a warning says what an attempt did)"] == EQUAL


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_training_goes_on_after_an_interrupt(where: str, tmp_path: Path) -> None:
    """In the second part of a step. What was accumulated is dropped, as Trainer does when it begins."""

    def interrupted(kind: type[Trainer]) -> tuple[nn.Module, dict[str, Tensor]]:
        left = [1]

        def interrupt(_: Any) -> None:
            if left and trainer.state.global_step == 2 and trainer.model.model.embed_tokens.weight.grad is not None:
                left.clear()
                raise KeyboardInterrupt

        trainer = kind(llama(), arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=rows(64))
        if kind is Trainer:
            attach(trainer)
        embedding = trainer.model.model.embed_tokens
        if where == "backward":
            trainer.model.lm_head.weight.register_post_accumulate_grad_hook(interrupt)
        else:
            embedding.register_forward_pre_hook(lambda *_: interrupt(None))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        between = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        return trainer.model, between

    (model, between), (reference, expected) = interrupted(Trainer), interrupted(WithSGD)
    assert all(float((between[name] - expected[name]).abs().max()) <= TOLERANCE for name in expected)
    assert furthest(model, reference) <= TOLERANCE
    assert TABLES["transformers"]["an interrupt in forward or backward, then `train()` again"] == EQUAL


class HeadTrainer(Trainer):
    """Its loss is made without whole logits."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
        labels = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[..., 1:]
        return linear_cross_entropy(hidden, model.lm_head.weight, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_with_its_loss(tied: bool, tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 3, "max_steps": 5}
    reference = WithSGD(llama(tied=tied), arguments(tmp_path, **settings), train_dataset=rows(64))
    trainer = HeadTrainer(llama(tied=tied), arguments(tmp_path, **settings), train_dataset=rows(64))
    attach(trainer, fused_layers=True, clip_memory=0)
    for each in (reference, trainer):
        each.train()
    assert_equal("transformers", "`compute_loss` with `linear_cross_entropy`", trainer.model, reference.model)


LIGER = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from test_trainers_transformers import Trainer, WithSGD, arguments, attach, furthest, llama, rows

def trained(kind, accumulation, **options):
    liger = {"use_liger_kernel": True, "liger_kernel_config": dict.fromkeys(("rope", "swiglu", "rms_norm"), False)}
    settings = {"max_steps": 2, "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 1}
    trainer = kind(llama(), arguments(pathlib.Path(sys.argv[2]), **settings | liger), train_dataset=rows(64))
    if kind is Trainer:
        attach(trainer, **options)
    trainer.train()
    assert trainer.model.forward.__func__.__module__.startswith("liger_kernel")
    if "fused_layers" in options:
        lines = trainer.optimizer.optimizer.summary().splitlines()
        assert [line for line in lines if line.startswith("lm_head") and line.endswith("weight of Linear")], lines
    return trainer.model

for accumulation, options in (
    (2, dict(fused_layers=True)),
    (1, dict(fused_layers=True, clip_memory=0)),
    (1, dict(clip_memory=0)),
):
    model = trained(Trainer, accumulation, **options)
    assert furthest(model, trained(WithSGD, accumulation)) <= 1e-6 and furthest(model, llama()) > 0.001
print("equal")
"""


@pytest.mark.slow
def test_the_fused_loss_of_liger(run_python: Any, tmp_path: Path) -> None:
    """Its kernels, interpreted: a step's loss is divided by the number of items. With fused layers ours stands in."""
    needs("liger_kernel", "triton")
    path = os.pathsep.join(sys.path)
    done = run_python(LIGER, str(Path(__file__).parent), str(tmp_path), TRITON_INTERPRET="1", PYTHONPATH=path)
    assert done.stdout.strip().endswith("equal"), done.stdout + done.stderr
    assert TABLES["transformers"]["`use_liger_kernel=True`, `gradient_accumulation_steps`"] == EQUAL
    assert TABLES["transformers"]["`use_liger_kernel=True`, `attach(trainer, clip_memory=0)`"] == EQUAL
    assert TABLES["transformers"]["`use_liger_kernel=True`, `attach(trainer, fused_layers=True)`"] == EQUAL


def test_training_twice_warns_of_nothing(tmp_path: Path) -> None:
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=rows(64))
    reference = WithSGD(llama(), arguments(tmp_path), train_dataset=rows(64))
    attach(trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Lomo")
        for each in (trainer, reference):
            each.train()
            each.train()
    assert furthest(trainer.model, reference.model) <= TOLERANCE
    assert TABLES["transformers"]["`train()` twice"] == EQUAL


@pytest.mark.parametrize("given", [True, False])
def test_a_learning_rate_that_nobody_set(given: bool, tmp_path: Path) -> None:
    """Trainer's default hardly changes a weight."""
    args = arguments(tmp_path, max_steps=1)
    if not given:
        args.learning_rate = TrainingArguments(str(tmp_path), use_cpu=True).learning_rate
    trainer = Trainer(llama(), args, train_dataset=rows(4))
    attach(trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(warning.message) for warning in caught if "Lomo: learning_rate=5e-05 is the" in str(warning.message)]
    assert len(said) == (0 if given else 1)


def test_model_init_and_a_new_accelerator(tmp_path: Path) -> None:
    """A hyperparameter search makes both anew."""
    trainer = Trainer(model_init=lambda: llama(), args=arguments(tmp_path), train_dataset=rows(64))
    attach(trainer)
    trainer.create_accelerator_and_postprocess()
    trainer.train()
    reference = WithSGD(model_init=lambda: llama(), args=arguments(tmp_path), train_dataset=rows(64))
    reference.train()
    assert furthest(trainer.model, reference.model) <= TOLERANCE
    assert trainer.accelerator.backward.__self__.__class__.__name__ == "_Attached"
    assert TABLES["transformers"]["`model_init`, a hyperparameter search"] == EQUAL


def test_a_trainer_of_its_own_and_a_factory(tmp_path: Path) -> None:
    reference, _ = train(tmp_path, False, {})
    own = LomoTrainer(llama(), arguments(tmp_path), train_dataset=rows(64), lomo_options={"fused_layers": True})
    own.train()
    assert own.optimizer.optimizer._training.attachment.fuses
    args = arguments(tmp_path)
    built = Trainer(llama(), args, train_dataset=rows(64), optimizer_cls_and_kwargs=lomo(args, clip_memory=0))
    built.train()
    attached = Trainer(llama(), args, train_dataset=rows(64), optimizer_cls_and_kwargs=lomo(args, clip_memory=0))
    attach(attached)
    attached.train()
    for trainer in (own, built, attached):
        assert furthest(trainer.model, reference) <= TOLERANCE
    for trainer in (built, attached):
        assert trainer.optimizer.optimizer._training.settings.clip_memory == 0
    assert TABLES["transformers"]["`LomoTrainer`; `optimizer_cls_and_kwargs=lomo(args)`"] == EQUAL


def test_groups_have_the_names_and_decay_of_transformers(tmp_path: Path) -> None:
    trainer = Trainer(llama(tied=True), arguments(tmp_path, weight_decay=0.1), train_dataset=rows(4))
    attach(trainer)
    decayed, others = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all("norm" in name for name in others["param_names"]) and len(others["param_names"]) == 5
    assert "model.embed_tokens.weight" in decayed["param_names"] and "lm_head.weight" not in decayed["param_names"]


def test_a_step_that_is_not_finite_is_logged(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model.factor = float("nan") if state.global_step == 2 else 1.0

    class Poisoned(Trainer):
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, *args, **kwargs) * model.factor

    trainer = Poisoned(llama(), arguments(tmp_path), train_dataset=rows(64), callbacks=[Poison()])
    attach(trainer)
    trainer.train()
    counts = [entry["skipped_steps"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert counts == [0, 0, 1, 1, 1, 1, 1, 1]
    assert json.dumps(trainer.state.log_history[0])


# ---- What is refused ------------------------------------------------------------------------------------------------


class Own(Trainer):
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        raise AssertionError


def refuse(setting: str, folder: Path) -> Trainer:
    settings: dict[str, Any] = {}
    options: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    kind = Own if setting == "a subclass with a `create_optimizer` of its own" else Trainer
    model = llama()
    if setting == '`optim="adafactor"`':
        settings["optim"] = "adafactor"
    elif setting == "`attach(trainer, lr=…)`":
        options["lr"] = 0.1
    elif setting == "`Trainer(optimizers=…)`":
        extra["optimizers"] = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    trainer = kind(model, arguments(folder, **settings), train_dataset=rows(4), **extra)
    if setting == "`fp16=True`":  # on a CPU the arguments refuse it
        trainer.args.fp16 = True
    elif setting == "DataParallel (several GPUs in one process)":
        trainer.args._n_gpu = 2
    elif setting == "attached twice":
        attach(trainer)
    attach(trainer, **options)
    return trainer


REFUSED = [setting for setting, said in TABLES["transformers"].items() if said != EQUAL]


@pytest.mark.parametrize("setting", REFUSED)
def test_what_is_refused(setting: str, tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, ValueError), match=refusal("transformers", setting)):
        refuse(setting, tmp_path)


def test_what_is_no_trainer_and_what_trains_nothing(tmp_path: Path) -> None:
    trainer = Trainer(llama().requires_grad_(False), arguments(tmp_path), train_dataset=rows(4))
    with pytest.raises(TypeError, match=r"attach got Accelerator, expected a transformers\.Trainer"):
        attach(trainer.accelerator)
    attach(trainer)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        trainer.train()


def test_parameters_that_were_unfrozen_after_the_optimizer_was_made(tmp_path: Path) -> None:
    """Their gradients would count for the norm, and nothing would apply them."""

    class Unfreeze(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 1:
                model.requires_grad_(True)

    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(64), callbacks=[Unfreeze()])
    attach(trainer)
    with pytest.raises(ValueError, match="1 that the optimizer does not train"):
        trainer.train()


# ---- FSDP2, two processes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(ranks_with_deepspeed: Callable[[int], Processes]) -> Callable[[int], Processes]:
    """Processes of their own: accelerate reads the environment."""
    return ranks_with_deepspeed


class Sharded(Trainer):
    """Trainer with FSDP2, which accelerate has on GPUs only, on CPUs. Everything after this is its own."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        self.is_fsdp_enabled = True


class ShardedWithSGD(Sharded):
    create_optimizer = WithSGD.create_optimizer


def train_sharded(rank: int, attached: bool, folder: str) -> tuple[list[Tensor], list[float]]:
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._shared_state.clear()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29572"}
    args = arguments(Path(folder), gradient_accumulation_steps=2, weight_decay=0.1, seed=0)
    trainer = (Sharded if attached else ShardedWithSGD)(llama(), args, train_dataset=rows(64))
    if attached:
        attach(trainer)
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    if attached:
        optimizer = trainer.optimizer.optimizer
        assert optimizer.step_count.item() == 8 and optimizer._training.engine is not None
        assert optimizer._training.managed_params[0].name == "model.embed_tokens.weight"
    return [param.full_tensor().detach() for param in trainer.model.parameters()], norms


def test_fsdp2(ranks: Callable[[int], Processes], tmp_path: Path) -> None:
    ours = ranks(2).call(train_sharded, True, str(tmp_path))
    theirs = ranks(2).call(train_sharded, False, str(tmp_path))
    for (weights, norms), (expected, expected_norms) in zip(ours, theirs, strict=True):
        assert max(float((a - b).abs().max()) for a, b in zip(weights, expected, strict=True)) <= TOLERANCE
        assert norms == pytest.approx(expected_norms, rel=1e-4) and len(norms) == 8
        assert float((weights[0] - llama().model.embed_tokens.weight).abs().max()) > 0.001
    assert TABLES["transformers"]["FSDP2, two processes, `gradient_accumulation_steps`, `weight_decay`"] == EQUAL


# ---- In the shape of Transformers' own tests of LOMO ----------------------------------------------------------------


@pytest.mark.parametrize("optim,options", [("lomo", {}), ("adalomo", {"rule": "adalomo"})])
def test_optim_lomo_changes_every_parameter(optim: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    before = copy.deepcopy(model)
    args = arguments(tmp_path, optim=optim, learning_rate=1e-2, logging_steps=5, gradient_accumulation_steps=2)
    trainer = Trainer(model, args, train_dataset=rows(64))
    attach(trainer, **options)
    trainer.train()
    for (name, param), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(param, old), name


def test_a_training_step_that_calls_the_optimizer_itself_is_refused(tmp_path: Path) -> None:
    """What was the only way before: with accumulation it stepped at every batch."""

    class Before(Trainer):
        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            loss = self.compute_loss(model, inputs)
            self.optimizer.optimizer.backward(loss)
            return loss.detach()

    model = llama()
    before = copy.deepcopy(model)
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = Before(model, args, train_dataset=rows(64), optimizer_cls_and_kwargs=lomo(args))
    with pytest.raises(RuntimeError, match=r"integrations\.accelerate\.attach\(accelerator\) once"):
        trainer.train()
    assert furthest(model, before) == 0
