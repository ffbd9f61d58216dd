"""Cases of upstream's own suites, in our words. What another file has already is named there, and not repeated.

| upstream case | our test |
|---|---|
| Transformers `test_lomo`, `test_adalomo` | test_trainers_transformers `test_optim_lomo_changes_every_parameter` |
| `test_no_wd_param_group`; factory pattern in training | the same file: groups, factory |
| `test_get_optimizer_group`, `test_get_learning_rates`, learning rates shown without a scheduler | groups and rates |
| `test_lr_scheduler_kwargs`, `test_cosine_with_min_lr…`; `num_steps` of `accelerator_config` | schedules |
| `test_custom_optimizer`, `test_reduce_lr_on_plateau_args`, `test_greedy_lr_args` | an optimizer that is given |
| GaLore, Apollo, StableAdamW, bitsandbytes | none: other optimizers, refused |
| optimizer steps that AMP skips | none: a GradScaler is refused; `skipped_steps` is logged |
| accelerate `test_noop_sync` (it has no tests of LOMO; its calls for it are in test_trainers_accelerate) | `no_sync` |
| `test_gradient_accumulation` and its plugin, `test_dataloader_break`, `test_mutable_states` | accumulation |
| `test_accumulation` of schedulers | schedules that end |
| pickling, preparing twice, None, `free_memory(objects)`, `step_was_skipped` | prepared objects, skipped steps |
| `test_distributed_sync…` | none: DistributedDataParallel is refused |
| `trigger_sync_in_backward` | two losses of a step |
| Lightning: clipping by norm and by value | what was applied |
| `configure_gradient_clipping` overridden, GradScaler, DDP, LBFGS | test_trainers_lightning, refused |
| invalid `gradient_clip_val`, Fabric | none: Lightning's constructor refuses it; no integration |
| `test_backward_count…` | backwards counted |
| manual: call counts, logging, an optimizer that does not step, dicts returned | two optimizers |
| manual: accumulated gradients, a tensor returned | accumulated by hand |
| manual: closures, hooks, `toggle_model`, GANs | test_trainers_lightning |
| `step(closure, optim="sgd")` | none: upstream mocks `step`; no optimizer of torch takes it |
| manual: schedulers and their objects; `gradient_clip_val`, `accumulate_grad_batches` refused | Lightning's own |
| `LightningOptimizer`: state, mutation, `step` returns the loss | the wrapper |
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.trainers import TOLERANCE, assert_equal, classifier, examples, furthest, loss_of, needs, refusal
from torch import Tensor, nn

from lomo_kernels import Lomo

needs("accelerate", "transformers", "lightning")
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin  # noqa: E402
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # noqa: E402
from test_trainers_accelerate import forget_state, ready  # noqa: E402
from test_trainers_lightning import Automatic, Manual, fit, loader  # noqa: E402
from test_trainers_transformers import Trainer, arguments, llama, rows, train  # noqa: E402
from transformers.optimization import GreedyLR  # noqa: E402

from lomo_kernels.integrations import accelerate  # noqa: E402
from lomo_kernels.integrations.transformers import attach  # noqa: E402

LR = 0.25
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Lomo.step"),
]


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate's singletons."""
    forget_state()
    yield
    forget_state()


# ---- Transformers ---------------------------------------------------------------------------------------------------


def test_groups_and_learning_rates_before_and_after_the_optimizer_is_made(tmp_path: Path) -> None:
    trainer = Trainer(llama(), arguments(tmp_path, learning_rate=1e-3), train_dataset=rows(4))
    attach(trainer)
    for ask in (trainer.get_learning_rates, trainer.get_optimizer_group):
        with pytest.raises(ValueError, match="is None"):
            ask()
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    assert trainer.get_learning_rates() == [1e-3, 1e-3] and len(trainer.get_optimizer_group()) == 2
    first = next(trainer.model.parameters())
    assert any(first is other for other in trainer.get_optimizer_group(first)["params"])


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 5.0, "lr_end": 1e-5}},
        {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 3, "sync_each_batch": True}}},
    ],
    ids=["polynomial", "cosine", "num_steps"],
)
def test_schedules_and_configurations(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = settings | {"max_steps": 5, "warmup_steps": 2}
    model, log = train(tmp_path, True, copy.deepcopy(settings))  # Transformers alters it
    reference, expected = train(tmp_path, False, settings)
    assert furthest(model, reference) <= TOLERANCE < furthest(model, llama())
    rates, others = ([entry["learning_rate"] for entry in each if "grad_norm" in entry] for each in (log, expected))
    assert rates == others and len(set(rates)) > 2


@pytest.mark.parametrize("kind", [torch.optim.lr_scheduler.LambdaLR, GreedyLR])
def test_an_optimizer_and_a_schedule_that_are_given(kind: Any, tmp_path: Path) -> None:
    """In the way that the refusal of `attach` names."""

    def trained(make: Any) -> Trainer:
        model = llama()
        optimizer = make(model)
        scheduler = (
            kind(optimizer, factor=0.5, patience=1)
            if kind is GreedyLR
            else kind(optimizer, lambda step: 1.0 / (1 + step))
        )
        evaluated = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss", "max_steps": 5}
        args = arguments(tmp_path, **evaluated)
        given = {"train_dataset": rows(64), "eval_dataset": rows(4), "optimizers": (optimizer, scheduler)}
        trainer = Trainer(model, args, **given)
        if isinstance(optimizer, Lomo):
            accelerate.attach(trainer.accelerator)
        trainer.train()
        assert trainer.lr_scheduler.__class__ is kind or trainer.lr_scheduler.scheduler.__class__ is kind
        return trainer

    ours = trained(lambda model: Lomo(model, lr=LR, clip_grad_norm=0.2))
    theirs = trained(lambda model: torch.optim.SGD(model.parameters(), lr=LR))
    assert furthest(ours.model, theirs.model) <= TOLERANCE < furthest(ours.model, llama())
    assert ours.optimizer.optimizer.step_count.item() == 5
    assert ours.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"] != LR


# ---- accelerate -----------------------------------------------------------------------------------------------------


def test_no_sync() -> None:
    """accelerate's documented loop. On one process its `no_sync` does nothing, and each backward was a step."""

    def trained(attached: bool) -> nn.Module:
        forget_state()
        accelerator, model = Accelerator(cpu=True), classifier()
        made = Lomo(model, lr=LR, clip_grad_norm=0.2) if attached else torch.optim.SGD(model.parameters(), lr=LR)
        if attached:
            accelerate.attach(accelerator)
        wrapped, optimizer = accelerator.prepare(model, made)
        for step in range(4):
            for part in range(2):
                with accelerator.no_sync(wrapped):
                    accelerator.backward(loss_of(wrapped, examples(64)[8 * step + 2 * part : 8 * step + 2 * part + 2]))
                assert wrapped[0].weight.grad is not None
            accelerator.backward(loss_of(wrapped, examples(64)[8 * step + 4 : 8 * step + 8]))
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), 0.2)
            optimizer.step()
            optimizer.zero_grad()
            assert float(norm) > 0.2
        assert not attached or made.step_count.item() == 4
        return model

    ours = trained(True)
    assert furthest(ours, classifier()) > 0.01
    assert_equal("accelerate", "`no_sync` around each backward before the last", ours, trained(False))


def test_two_losses_of_a_step() -> None:
    """accelerate's documented loop for `trigger_sync_in_backward`: the error's words lead to SGD's weights."""

    def trained(how: str) -> nn.Module:
        forget_state()
        accelerator, model = Accelerator(cpu=True), classifier()
        made = torch.optim.SGD(model.parameters(), lr=LR) if how == "sgd" else Lomo(model, lr=LR)
        if how != "sgd":
            accelerate.attach(accelerator)
        wrapped, optimizer = accelerator.prepare(model, made)
        for step in range(4):
            with accelerator.no_sync(wrapped):
                first, second = (loss_of(wrapped, examples(64)[8 * step + i : 8 * step + i + 4]) for i in (0, 4))
            if how == "added":
                accelerator.backward(first + second)
            else:
                with accelerator.no_sync(wrapped) if how == "no_sync" else contextlib.nullcontext():
                    accelerator.backward(first)
                with accelerator.trigger_sync_in_backward(wrapped):
                    accelerator.backward(second)
            optimizer.step()
            optimizer.zero_grad()
        return model

    with pytest.raises(RuntimeError, match=refusal("accelerate", "two backwards before one `optimizer.step()`")):
        trained("as documented")
    reference = trained("sgd")
    for how in ("added", "no_sync"):
        assert furthest(trained(how), reference) <= TOLERANCE < furthest(reference, classifier())


@pytest.mark.parametrize(
    "case", ["sync_with_dataloader", "sync_each_batch", "split_batches", "nested loader", "changed", "by hand"]
)
def test_accumulation_follows_accelerate(case: str) -> None:
    def trained(attached: bool) -> tuple[nn.Module, int]:
        forget_state()
        plugin = GradientAccumulationPlugin(
            num_steps=3,
            sync_with_dataloader=case != "sync_with_dataloader",
            sync_each_batch=case == "sync_each_batch",
        )
        data = DataLoaderConfiguration(split_batches=case == "split_batches")
        accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin, dataloader_config=data)
        model = classifier()
        made = Lomo(model, lr=LR) if attached else torch.optim.SGD(model.parameters(), lr=LR)
        if attached:
            accelerate.attach(accelerator)
        batches = torch.utils.data.DataLoader(examples(20), batch_size=4)
        others = torch.utils.data.DataLoader(examples(8), batch_size=4)
        wrapped, optimizer, batches, others = accelerator.prepare(model, made, batches, others)
        steps = 0
        for epoch in range(2):
            if case == "changed" and epoch:
                accelerator.gradient_accumulation_steps = 2
            for index, batch in enumerate(batches):
                with accelerator.accumulate(wrapped):
                    if case == "by hand":
                        accelerator.sync_gradients = index % 2 == 1
                    accelerator.backward(loss_of(wrapped, batch))
                    steps += accelerator.sync_gradients
                    optimizer.step()
                    optimizer.zero_grad()
                if case == "nested loader" and index == 1:
                    for other in others:  # an evaluation amid a step
                        with torch.no_grad():
                            loss_of(wrapped, other)
        assert not attached or made.step_count.item() == steps
        return model, steps

    (ours, steps), (theirs, expected) = trained(True), trained(False)
    assert furthest(ours, theirs) <= TOLERANCE < furthest(ours, classifier())
    assert 2 < steps == expected < 10


def test_a_schedule_ends_with_the_last_step() -> None:
    for parts in (1, 2, 4):
        forget_state()
        accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=parts), classifier()
        made = Lomo(model, lr=LR)
        accelerate.attach(accelerator)
        ends = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 - step / 5)
        wrapped, optimizer, scheduler = accelerator.prepare(model, made, ends)
        rates = []
        for _ in range(5 * parts):
            with accelerator.accumulate(wrapped):
                accelerator.backward(loss_of(wrapped, examples(4)[:]))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            rates.append(scheduler.get_last_lr()[0])
        assert rates[-1] == 0 != rates[-2] and len(set(rates)) == (5 if parts == 1 else 6)


def test_prepared_objects() -> None:
    """Pickled, prepared twice and with None, freed."""
    accelerator, model, optimizer, loss = ready()
    accelerator.backward(loss)
    model_again, optimizer_again, nothing = accelerator.prepare(model, optimizer, None)
    assert nothing is None and optimizer_again is optimizer and len(accelerator._optimizers) == 1
    accelerator.backward(loss_of(model_again, examples(4)[:]))
    assert optimizer.optimizer.step_count.item() == 2
    copied = pickle.loads(pickle.dumps(optimizer))
    assert isinstance(copied.optimizer, Lomo) and copied.optimizer.step_count.item() == 2
    before, loss = [param.clone() for param in model.parameters()], loss_of(model, examples(4)[:])
    accelerator.free_memory(model, optimizer)
    for call in (accelerator.backward, lambda loss: accelerator.lomo_backward(loss, 0.1)):
        with pytest.raises(RuntimeError, match="the accelerator has 0 optimizers"):
            call(loss)
    assert all(map(torch.equal, before, model.parameters()))


def test_steps_that_are_skipped() -> None:
    """`step_was_skipped` speaks of accelerate's own scaler, which there is none of; Lomo counts."""
    accelerator, model, optimizer, _ = ready(clip_grad_norm=1.0)
    counts = []
    for factor in (1.0, float("inf"), float("nan"), 1.0):
        before = [param.detach().clone() for param in model.parameters()]
        accelerator.backward(loss_of(model, examples(4)[:]) * factor)
        optimizer.step()
        assert all(map(torch.equal, before, model.parameters())) is (factor != 1.0)
        assert optimizer.step_was_skipped is False
        counts.append(optimizer.optimizer.skipped_steps.item())
    assert counts == [0, 1, 2, 2]


# ---- Lightning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm,bound", [("norm", 0.05), ("value", 1e-10)])
def test_what_was_applied_is_clipped(algorithm: str, bound: float) -> None:
    """Read from the update: gradients are gone. Biases begin at 0, so that 1e-10 is not rounded away."""
    module = Automatic({})
    for part in (module.network[0], module.network[2]):
        nn.init.zeros_(part.bias)
    before = [param.detach().clone() for param in module.network.parameters()]
    trainer = fit(module, 1, gradient_clip_val=bound, gradient_clip_algorithm=algorithm)
    applied = [(old - new.detach()) / LR for old, new in zip(before, module.network.parameters(), strict=True)]
    if algorithm == "norm":
        assert float(torch.stack([each.norm() for each in applied]).norm()) == pytest.approx(bound, rel=1e-4)
        assert float(trainer.logged_metrics["grad_norm"]) > 2 * bound
    else:
        assert float(applied[3].abs().max()) == pytest.approx(bound, rel=1e-6)


def test_backwards_are_counted() -> None:
    """One for each batch, and none in validation."""

    class Counts(Automatic):
        def training_step(self, batch: Any, index: int) -> Any:
            loss = super().training_step(batch, index)
            loss.register_hook(lambda _: ran.append(index))
            return loss

    for settings, expected in (({"max_steps": 3}, 3), ({"accumulate_grad_batches": 2}, 6)):
        ran: list[int] = []
        fit(Counts({}), 6, validate=True, **settings)
        assert len(ran) == expected


class Two(Manual):
    """Two losses of the same weights, and an optimizer for either half. The first steps every other time."""

    def configure_optimizers(self) -> Any:
        make = torch.optim.SGD if self.options is None else Lomo
        made = [make(self.network[part].parameters(), lr=LR) for part in (0, 2)]
        self.made = [torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in made]
        return made, self.made

    def training_step(self, batch: Any, index: int) -> dict[str, Tensor]:
        assert all(ours is theirs for ours, theirs in zip(self.made, self.lr_schedulers(), strict=True))
        losses = {}
        for name, optimizer in zip("ab", self.optimizers(), strict=True):
            loss = losses[name] = loss_of(self.network, batch)
            if name == "a" and index % 2:
                continue
            if self.options is None:
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            else:
                optimizer.backward(loss)
                assert all(param.grad is None for param in self.parameters())
            self.log(name, loss, on_epoch=True)
        return {name: loss.detach() for name, loss in losses.items()}


def test_two_optimizers_of_one_loss() -> None:
    ours, theirs = Two({}), Two(None)
    trainer, expected = fit(ours), fit(theirs)
    assert furthest(ours, theirs) <= TOLERANCE < furthest(ours.network, classifier())
    assert trainer.global_step == expected.global_step == 12
    assert [optimizer.step_count.item() for optimizer in trainer.optimizers] == [4, 8]
    assert set(trainer.logged_metrics) == {"a_step", "a_epoch", "b_step", "b_epoch"}
    assert [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups] == [LR, LR]


def test_gradients_that_are_accumulated_by_hand() -> None:
    """A step at every fourth batch. Its loss is returned, which adds no gradient."""

    class Accumulates(Manual):
        def training_step(self, batch: Any, index: int) -> Any:
            optimizer, loss = self.optimizers(), loss_of(self.network, batch) / 2
            weight = self.network[0].weight
            before = weight.detach().clone()
            if index % 4 == 1:
                with optimizer.accumulate():
                    optimizer.backward(loss)
            elif index % 4 == 3:
                optimizer.backward(loss)
            assert (weight.grad is not None) is (index % 4 in (1, 2))
            assert torch.equal(weight, before) is (index % 4 != 3)
            return loss

    trainer = fit(Accumulates({"clip_grad_norm": 0.2}))
    assert trainer.global_step == 2


def test_lightning_refuses_its_own_settings_in_manual_optimization() -> None:
    for settings in ({"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}):
        module = Manual({})
        with pytest.raises(MisconfigurationException, match=r"Automatic gradient \w+ is not supported"):
            fit(module, **settings)
        assert furthest(module.network, classifier()) == 0


def test_the_wrapper_is_the_optimizer() -> None:
    class Looks(Automatic):
        def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
            own = optimizer.optimizer
            assert isinstance(optimizer, Lomo) and str(optimizer) == "Lightning" + str(own)
            assert optimizer.state is own.state and optimizer.defaults is own.defaults
            optimizer.state, optimizer.param_groups = own.state, own.param_groups
            own.param_groups[0]["lr"] = 0.125
            assert optimizer.param_groups[0]["lr"] == 0.125
            loss = optimizer.step(closure=closure)
            assert torch.equal(loss, self.last)

        def training_step(self, batch: Any, index: int) -> Any:
            self.last = super().training_step(batch, index)
            return self.last

    module = Looks({})
    trainer = fit(module, 2)
    reference = classifier()
    for batch in loader(2):
        loss_of(reference, batch).backward()
        torch.optim.SGD(reference.parameters(), lr=0.125).step()
        reference.zero_grad()
    assert furthest(module.network, reference) <= TOLERANCE and trainer.global_step == 2
