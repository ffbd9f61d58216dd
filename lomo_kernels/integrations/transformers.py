"""Transformers and TRL: `attach` trains any built `Trainer` with `Lomo`, by one line before ``trainer.train()``."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..optim import Lomo
from . import accelerate
from ._versions import require

#: What TrainingArguments say already, by its name in `Lomo`.
_ARGUMENTS = {"lr": "learning_rate", "clip_grad_norm": "max_grad_norm", "weight_decay": "weight_decay"}


def attach(trainer: Any, **options: Any) -> None:
    """Makes a built `transformers.Trainer` (TRL's, or a subclass) train with `Lomo`. Call it before ``train()``.

    Learning rate and schedule, ``max_grad_norm``, ``weight_decay`` (not for norms and biases) and gradient accumulation
    are those of ``trainer.args``. The log has the true ``grad_norm``, and ``skipped_steps``.

    Args:
        trainer: a `transformers.Trainer` that was made without an optimizer; or with `lomo` in
            ``optimizer_cls_and_kwargs``, which then has the options.
        options: of `Lomo`: rule, rounding, fused_layers, clip_memory, …

    Raises:
        ImportError: another version of Transformers or accelerate than those tested.
        TypeError: `trainer` is no Trainer.
        ValueError: an option or the optimizer is given twice.
        RuntimeError: fp16, DataParallel, DeepSpeed, FSDP1.
    """
    require("transformers", "5.24", "6.0")
    if not issubclass(type(trainer), Trainer):
        raise TypeError(
            f"Lomo: attach got {type(trainer).__name__}, expected a transformers.Trainer. For an Accelerator "
            "there is lomo_kernels.integrations.accelerate.attach"
        )
    args = trainer.args
    given = trainer.optimizer_cls_and_kwargs
    if given is not None and given[0] is _Factory and not options:
        options = {name: value for name, value in given[1].items() if name != "args"}
    elif given is not None or trainer.optimizer is not None:
        raise ValueError(
            "Lomo: the trainer was made with an optimizer. Make it without one; or, if this optimizer is a Lomo, call "
            "lomo_kernels.integrations.accelerate.attach(trainer.accelerator) in place of this function"
        )
    _check(trainer, options)
    accelerate.attach(trainer.accelerator)
    log = trainer.log
    batch_size = trainer._train_batch_size

    def create_optimizer(model: Any = None) -> torch.optim.Optimizer:
        nonlocal batch_size
        accelerate.attach(trainer.accelerator)  # a hyperparameter search makes another one
        if trainer.optimizer is None:
            model = trainer.model if model is None else model
            trainer.optimizer = _optimizer(args, model, trainer.get_decay_parameter_names(model), options)
        elif trainer._train_batch_size != batch_size:
            failed = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            warnings.warn(
                f"Lomo: a batch of {batch_size} did not fit (auto_find_batch_size). Its attempt ended after "
                f"{failed.step_count.item()} steps; the last one is {failed.last_step_outcome}. The next attempt goes "
                "on with these weights, and counts its steps from 0",
                stacklevel=2,
            )
        batch_size = trainer._train_batch_size
        return trainer.optimizer

    def log_skipped_steps(logs: dict[str, Any], *arguments: Any, **keywords: Any) -> None:
        if "grad_norm" in logs:
            logs["skipped_steps"] = getattr(trainer.optimizer, "optimizer", trainer.optimizer).skipped_steps.item()
        log(logs, *arguments, **keywords)

    vars(trainer).update(create_optimizer=create_optimizer, log=log_skipped_steps)  # both or, at an interrupt, none


class LomoTrainer(Trainer):
    """`transformers.Trainer`, attached. `lomo_options` are the options of `attach`."""

    def __init__(self, *args: Any, lomo_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        attach(self, **(lomo_options or {}))


def lomo(args: TrainingArguments, **options: Any) -> tuple[type, dict[str, Any]]:
    """For ``Trainer(args=args, optimizer_cls_and_kwargs=lomo(args))``: the optimizer that `attach` makes.

    Without `attach`, gradients stay in ``.grad`` until the step, as with torch's optimizers: the weights are right, and
    no memory is saved.
    """
    return _Factory, {"args": args, **options}


class _Factory:
    """What Trainer makes first, and then calls with the model."""

    def __call__(self, model: torch.nn.Module, *, args: TrainingArguments, **options: Any) -> Lomo:
        decayed: Any = Trainer.get_decay_parameter_names
        return _optimizer(args, model, decayed(None, model), options)  # self is not used


def _check(trainer: Any, options: dict[str, Any]) -> None:
    """Raises ValueError or RuntimeError if the trainer would do what `Lomo` cannot follow."""
    args = trainer.args
    for name in options.keys() & _ARGUMENTS.keys():
        raise ValueError(f"Lomo: {name} is given twice; set {_ARGUMENTS[name]} in TrainingArguments only")
    optim = str(getattr(args.optim, "value", args.optim))
    known = ["adamw_torch", "adamw_torch_fused", "lomo", *(["adalomo"] if options.get("rule") == "adalomo" else [])]
    if optim not in known or args.optim_args:
        raise ValueError(
            f"Lomo: TrainingArguments have optim={optim!r}, optim_args={args.optim_args!r}, so the optimizer "
            "is given twice; leave them out (and set rule='adalomo' with optim='adalomo')"
        )
    own = "create_optimizer" in vars(trainer) or type(trainer).create_optimizer is not Trainer.create_optimizer
    if own:
        raise ValueError(
            f"Lomo: this {type(trainer).__name__} has a create_optimizer of its own, or attach() was called before. "
            "Let that return a Lomo, and call lomo_kernels.integrations.accelerate.attach(trainer.accelerator)"
        )
    if args.fp16:
        raise RuntimeError(
            "Lomo: fp16=True makes accelerate scale the loss; Lomo scales it itself. Set bf16=True; or fp16=False with "
            'a float16 model, for which loss_scale="auto" is dynamic'
        )
    if args.n_gpu > 1:
        raise RuntimeError(
            f"Lomo: Trainer would wrap the model in DataParallel for {args.n_gpu} GPUs, whose copies have gradients "
            "that no hook sees. Set CUDA_VISIBLE_DEVICES to one of them, or start with torchrun and FSDP2"
        )


def _optimizer(
    args: TrainingArguments, model: torch.nn.Module, decayed: Collection[str], options: dict[str, Any]
) -> Lomo:
    """With Transformers' two groups, under the parameters' own names."""
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trained:
        raise ValueError("Lomo: no parameter of the model requires a gradient; unfreeze what is to be trained")
    groups = [
        {"params": [(name, param) for name, param in trained if (name in decayed) is decays], "weight_decay": decay}
        for decays, decay in ((True, args.weight_decay), (False, 0.0))
    ]
    if args.learning_rate == type(args).__dataclass_fields__["learning_rate"].default:
        warnings.warn(
            f"Lomo: learning_rate={args.learning_rate} is the default of {type(args).__name__}, meant for AdamW. "
            "Begin with 0.5 for SGD, 0.0004 for rule='sign', 0.005 for rule='adalomo' (docs/choosing.md)",
            stacklevel=2,
        )
    fused = options.get("fused_layers", False)
    clip_grad_norm = args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None
    optimizer = Lomo(
        [group for group in groups if group["params"]],
        lr=args.learning_rate,
        clip_grad_norm=clip_grad_norm,
        **options | {"fused_layers": model if fused is True else fused},
    )
    optimizer._training.note_embeddings(model)
    return optimizer
