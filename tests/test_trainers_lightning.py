"""`lomo_kernels.integrations.lightning`: Trainer's settings give SGD's weights and log, or an error."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Processes
from support.trainers import (
    EQUAL,
    STEPS,
    TABLES,
    TOLERANCE,
    assert_equal,
    classifier,
    examples,
    furthest,
    loss_of,
    needs,
    refusal,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lomo_kernels import Lomo

needs("lightning")
from lightning import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import (  # noqa: E402
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402
from lightning.pytorch.tuner import Tuner  # noqa: E402

from lomo_kernels.integrations.lightning import LomoCallback  # noqa: E402

LR = 0.25  # exact in bfloat16, in which torch multiplies by it
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Skipping val loop"),
    pytest.mark.filterwarnings("ignore:.*dirpath has changed"),
]


class Automatic(LightningModule):
    """A module as Lightning's documentation has it. Trained by `Lomo`, or by torch's SGD if `options` are None."""

    def __init__(
        self, options: dict[str, Any] | None, sgd: dict[str, Any] | None = None, scheduler: Any = None
    ) -> None:
        super().__init__()
        self.network = classifier()
        self.options, self.sgd, self.scheduler = options, sgd or {}, scheduler

    def training_step(self, batch: Any, index: int) -> Any:
        return loss_of(self.network, batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("validated", loss_of(self.network, batch))

    def configure_optimizers(self) -> Any:
        optimizer = (
            torch.optim.SGD(self.parameters(), lr=LR, **self.sgd)
            if self.options is None
            else Lomo(self, lr=LR, **self.options)
        )
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])


def trainer_of(module: Any, **settings: Any) -> Trainer:
    """A silent trainer on the CPU, with the callback if the module's optimizer is a `Lomo`."""
    defaults = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    callbacks = [*settings.pop("callbacks", []), *([] if module.options is None else [LomoCallback()])]
    return Trainer(callbacks=callbacks, **defaults | silent | settings)


def loader(batches: int = STEPS, of: int = 4) -> DataLoader:
    return DataLoader(examples(of * batches), batch_size=of)


def fit(module: Any, batches: int = STEPS, validate: bool = False, **settings: Any) -> Trainer:
    trainer = trainer_of(module, **settings)
    trainer.fit(module, loader(batches), loader(2) if validate else None)
    return trainer


def linear(optimizer: Any) -> Any:
    return {"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS), "interval": "step"}


class Skips(Automatic):
    def training_step(self, batch: Any, index: int) -> Any:
        return None if index % 3 == 1 else super().training_step(batch, index)


class EverySecond(Automatic):
    """Lightning's example of an `optimizer_step` that calls the closure by itself."""

    def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
        if index % 2 == 0:
            optimizer.step(closure=closure)
        else:
            closure()


class ClosureFirst(Automatic):
    def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
        closure()
        if index % 2 == 0:
            optimizer.step()


#: For each setting: the trainer's arguments, and what the module is made with.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no clipping": ({}, {}),
    "`gradient_clip_val`": ({"gradient_clip_val": 0.2}, {}),
    '`gradient_clip_val`, `gradient_clip_algorithm="value"`': (
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        {},
    ),
    "`gradient_clip_val`, and the same in `Lomo(clip_grad_norm=…)`": (
        {"gradient_clip_val": 0.2},
        {"options": {"clip_grad_norm": 0.2, "clip_memory": 0}},
    ),
    "`accumulate_grad_batches=3`, an epoch that it does not divide": ({"accumulate_grad_batches": 3}, {}),
    "`accumulate_grad_batches=3`, `gradient_clip_val`": ({"accumulate_grad_batches": 3, "gradient_clip_val": 0.2}, {}),
    '`accumulate_grad_batches=3`, `gradient_clip_algorithm="value"`': (
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        {},
    ),
    "`GradientAccumulationScheduler`": ({"max_epochs": 2, "callbacks": [GradientAccumulationScheduler({1: 2})]}, {}),
    "`weight_decay`": ({}, {"options": {"weight_decay": 0.1}, "sgd": {"weight_decay": 0.1}}),
    "a scheduler of each step": ({}, {"scheduler": linear}),
    "a scheduler of each epoch": (
        {"max_epochs": 3},
        {"scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)},
    ),
    '`precision="bf16-mixed"`': ({"precision": "bf16-mixed", "gradient_clip_val": 0.2}, {}),
    '`precision="bf16-true"`': ({"precision": "bf16-true"}, {}),
    "`fused_layers=True`": ({"gradient_clip_val": 0.2}, {"options": {"fused_layers": True}}),
    "validation in between": ({"val_check_interval": 2, "validate": True, "gradient_clip_val": 0.2}, {}),
    "`training_step` returns None": ({"accumulate_grad_batches": 2}, {"kind": Skips}),
    "`optimizer_step` that calls the closure by itself": ({"gradient_clip_val": 0.2}, {"kind": EverySecond}),
    "`optimizer_step` that calls the closure first": ({"gradient_clip_val": 0.2}, {"kind": ClosureFirst}),
    "`max_steps` in the middle of an epoch": ({"max_steps": 5, "accumulate_grad_batches": 2}, {}),
    "`barebones`": ({"barebones": True}, {}),
    "`StochasticWeightAveraging`": (
        {"max_epochs": 4, "callbacks": [StochasticWeightAveraging(0.05, swa_epoch_start=2, device="cpu")]},
        {},
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore:Lomo.step", "ignore:.*training_step.*returned.*None", "ignore:Detected call of")
def test_weights_and_log_are_those_of_sgd(setting: str) -> None:
    settings, made = SETTINGS[setting]
    kind = made.get("kind", Automatic)
    ours = kind(made.get("options", {}), scheduler=made.get("scheduler"))
    theirs = kind(None, made.get("sgd"), made.get("scheduler"))
    if "barebones" in settings:  # leaves its own options out
        settings = {"barebones": True, "enable_checkpointing": None, "logger": None, "num_sanity_val_steps": None}
        settings |= {"enable_progress_bar": None, "enable_model_summary": None}
    trainer = fit(ours, batches=23, **copy.deepcopy(settings))
    expected = fit(theirs, batches=23, **copy.deepcopy(settings))
    assert_equal("lightning", setting, ours.float(), theirs.float())
    assert furthest(ours.network, classifier()) > 0.01, "nothing was trained"
    assert trainer.global_step == expected.global_step > 1
    assert ours.trainer.optimizers[0].step_count.item() == trainer.global_step or kind is not Automatic
    assert trainer.optimizers[0].param_groups[0]["lr"] == expected.optimizers[0].param_groups[0]["lr"]
    if "barebones" not in settings:
        assert trainer.logged_metrics["grad_norm"] == trainer.optimizers[0].last_grad_norm
        assert trainer.logged_metrics["skipped_steps"] == 0


def test_gradients_are_freed_inside_backward() -> None:
    alive: list[int] = []

    class Watched(Automatic):
        def on_train_start(self) -> None:
            for param in self.parameters():
                param.register_post_accumulate_grad_hook(
                    lambda _: alive.append(sum(other.grad is not None for other in self.parameters()))
                )

    fit(Watched({}), batches=2)
    assert len(alive) == 8 and max(alive) <= 1


def test_float16_scales_the_loss_itself() -> None:
    """As the same steps in a loop of one's own."""
    module = Automatic({})
    trainer = fit(module, precision="16-true", gradient_clip_val=0.2)
    reference = classifier().half()
    optimizer = Lomo(reference, lr=LR, clip_grad_norm=0.2)
    for inputs, labels in loader():
        optimizer.backward(loss_of(reference, (inputs.half(), labels)))
    assert furthest(module, reference) == 0 and float(trainer.optimizers[0].loss_scale) == 2.0**16
    assert TABLES["lightning"]['`precision="16-true"` (as in a loop without Lightning)'] == EQUAL


def test_a_compiled_module() -> None:
    ours, theirs = Automatic({}), Automatic(None)
    trainer_of(ours, gradient_clip_val=0.2).fit(torch.compile(ours, backend="aot_eager"), loader())
    fit(theirs, gradient_clip_val=0.2)
    assert_equal("lightning", "`fit(torch.compile(module))`", ours, theirs)


def test_the_package_of_the_older_name() -> None:
    """Its classes are others, of the same code."""
    needs("pytorch_lightning")
    import pytorch_lightning

    def trained(options: dict[str, Any] | None) -> Any:
        methods = {name: vars(Automatic)[name] for name in ("training_step", "configure_optimizers")}
        module = type("Older", (pytorch_lightning.LightningModule,), methods)()
        module.network, module.options, module.sgd, module.scheduler = classifier(), options, {}, None
        silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        settings = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.2, "max_epochs": 1, "logger": False}
        callbacks = [] if options is None else [LomoCallback()]
        pytorch_lightning.Trainer(accelerator="cpu", callbacks=callbacks, **silent | settings).fit(module, loader(23))
        return module

    ours = trained({})
    assert_equal("lightning", "`pytorch_lightning` in place of `lightning`", ours, trained(None))
    assert ours.trainer.optimizers[0].step_count.item() == 8


def test_fit_twice_and_with_another_trainer() -> None:
    ours, theirs = Automatic({}), Automatic(None)
    for module in (ours, theirs):
        trainer = fit(module, gradient_clip_val=0.2)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader())
        fit(module, accumulate_grad_batches=2)
    assert_equal("lightning", "`fit` twice, and with another Trainer", ours, theirs)


def test_nothing_stays_behind_after_a_fit_or_an_error() -> None:
    """The bounds of an optimizer that outlives the trainer, and a plugin that two trainers have."""
    plugin = MixedPrecision("bf16-mixed", "cpu")

    class Kept(Automatic):
        def configure_optimizers(self) -> Any:
            if not hasattr(self, "kept"):
                self.kept = super().configure_optimizers()
            return self.kept

        def training_step(self, batch: Any, index: int) -> Any:
            if index == self.fails_at:
                raise ArithmeticError
            return super().training_step(batch, index)

    module = Kept({})
    module.fails_at = -1
    fit(module, gradient_clip_val=0.2, plugins=[plugin], callbacks=[LomoCallback()])  # two of them
    assert "backward" not in vars(plugin) and module.kept._training.settings.clip_grad_norm is None
    module.fails_at = 2
    with pytest.raises(ArithmeticError):
        fit(module, gradient_clip_val=0.1, gradient_clip_algorithm="value", plugins=[plugin])
    assert "backward" not in vars(plugin) and module.kept.param_groups[0]["clip_grad_value"] is None


def test_a_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    """Twice, with stochastic rounding, a schedule, accumulation and clipping."""

    def run(folder: str, batches: int, before: str | None = None) -> nn.Module:
        module = Automatic({"rounding": "stochastic", "clip_memory": 0}, scheduler=linear)
        saved = ModelCheckpoint(tmp_path / folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        settings = {"accumulate_grad_batches": 2, "precision": "bf16-true", "gradient_clip_val": 0.2}
        trainer = trainer_of(
            module, max_epochs=-1, max_steps=9, callbacks=[saved], enable_checkpointing=True, **settings
        )
        trainer.fit(module, loader(batches), ckpt_path=before)
        assert trainer.global_step == trainer.optimizers[0].step_count.item() == 9
        return module.network

    whole = run("whole", 6)  # three steps are an epoch
    once = run("once", 6, str(tmp_path / "whole" / "step=3.ckpt"))
    twice = run("twice", 6, str(tmp_path / "once" / "step=6.ckpt"))
    assert furthest(once, whole) == furthest(twice, whole) == 0.0
    assert TABLES["lightning"]["`ModelCheckpoint`, `fit(ckpt_path=…)`"] == EQUAL


@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_a_search_for_a_learning_rate_leaves_the_weights(tmp_path: Path) -> None:
    module = Automatic({})
    trainer = trainer_of(module, enable_checkpointing=True, default_root_dir=tmp_path)
    module.lr = LR
    found = Tuner(trainer).lr_find(module, loader(40), num_training=20)
    assert len(found.results["lr"]) == 20 and furthest(module.network, classifier()) == 0
    reference = Automatic(None)
    fit(reference)
    trainer.fit(module, loader())
    assert_equal("lightning", "`Tuner.lr_find`", module, reference)


def test_a_step_that_is_not_finite_is_counted() -> None:
    class Poisoned(Automatic):
        def training_step(self, batch: Any, index: int) -> Any:
            return super().training_step(batch, index) * (float("nan") if index == 2 else 1.0)

    trainer = fit(Poisoned({}), gradient_clip_val=0.2)
    assert trainer.logged_metrics["skipped_steps"] == 1 and trainer.global_step == STEPS


# ---- Manual optimization --------------------------------------------------------------------------------------------


class Manual(Automatic):
    """Each step as a user writes it with `Lomo`, and as with SGD."""

    def __init__(self, options: dict[str, Any] | None, **more: Any) -> None:
        super().__init__(options, **more)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer, loss = self.optimizers(), loss_of(self.network, batch)
        if self.options is not None:
            optimizer.backward(loss)
        else:
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.2, gradient_clip_algorithm="norm")
            optimizer.step()


class ManualAccumulating(Manual):
    def training_step(self, batch: Any, index: int) -> None:
        optimizer, loss = self.optimizers(), loss_of(self.network, batch) / 2
        if self.options is not None and index % 2 == 0:
            with optimizer.accumulate():
                optimizer.backward(loss)
        elif self.options is not None:
            optimizer.backward(loss)
        else:
            self.manual_backward(loss)
            if index % 2 == 1:
                self.clip_gradients(optimizer, gradient_clip_val=0.2, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()


class ManualPlain(Manual):
    """The code of SGD for both: it clips, accumulates, and its closure runs backward twice."""

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()

        def closure() -> None:
            loss = loss_of(self.network, batch)
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(loss)

        if index % 3 == 0:
            optimizer.step(closure=closure)
            optimizer.zero_grad()
        else:
            self.manual_backward(loss_of(self.network, batch))
            if index % 3 == 2:
                self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()


CLIPPED = {"clip_grad_norm": 0.2}
MANUAL: dict[str, tuple[type[Manual], dict[str, Any], dict[str, Any]]] = {
    "manual: `self.optimizers().backward(loss)`": (Manual, CLIPPED, {}),
    "manual: the same with `fused_layers=True`, `clip_memory=0`": (
        Manual,
        CLIPPED | {"fused_layers": True, "clip_memory": 0},
        {},
    ),
    'manual: the same with `precision="bf16-mixed"`': (Manual, CLIPPED, {"precision": "bf16-mixed"}),
    "manual: `with self.optimizers().accumulate():`": (ManualAccumulating, CLIPPED, {}),
    "manual: `manual_backward`, `clip_gradients`, `step(closure)`, as with SGD": (ManualPlain, {}, {}),
}


@pytest.mark.parametrize("setting", MANUAL)
@pytest.mark.filterwarnings("ignore:Lomo.step")
def test_manual_steps_are_those_of_sgd(setting: str) -> None:
    kind, options, settings = MANUAL[setting]
    ours, theirs = kind(options), kind(None)
    trainer, expected = fit(ours, 8, **settings), fit(theirs, 8, **settings)
    assert_equal("lightning", setting, ours, theirs)
    assert furthest(ours.network, classifier()) > 0.01
    assert trainer.global_step == expected.global_step == trainer.optimizers[0].step_count.item() > 0


def test_manual_hooks_and_closures_are_called_as_lightning_does() -> None:
    called: list[str] = []

    class Hooked(Manual):
        def on_before_backward(self, loss: Tensor) -> None:
            called.append("before backward")

        def on_after_backward(self) -> None:
            called.append("after backward")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            called.append("before step")

    module = Hooked({})
    fit(module, 1)
    assert called == ["before backward", "after backward", "before step"]


def test_the_wrapper_takes_attributes_and_gives_those_of_the_optimizer() -> None:
    class Reads(Manual):
        def training_step(self, batch: Any, index: int) -> None:
            wrapper = self.optimizers()
            assert isinstance(wrapper, Lomo) and wrapper is not wrapper.optimizer
            wrapper.param_groups, wrapper.state = wrapper.param_groups, wrapper.state
            wrapper.param_groups[0]["lr"] = 0.125
            wrapper.load_state_dict(wrapper.state_dict())
            wrapper.note = index
            wrapper.grad_norm(loss_of(self.network, batch))
            wrapper.fused_backward(loss_of(self.network, batch), lr=0.125)
            assert wrapper.last_grad_norm is wrapper.optimizer.last_grad_norm and wrapper.last_grad_norm > 0
            assert wrapper.step_count.item() == index + 1 == self.trainer.global_step
            assert wrapper.grad_norms().keys() == dict(self.named_parameters()).keys()

    class Reference(Manual):
        def training_step(self, batch: Any, index: int) -> None:
            self.optimizers().param_groups[0]["lr"] = 0.125
            super().training_step(batch, index)

    ours, theirs = Reads({"clip_grad_norm": 0.2}), Reference(None)
    fit(ours)
    fit(theirs)
    assert furthest(ours, theirs) <= TOLERANCE


class Adversaries(Automatic):
    """Two optimizers, as for a GAN, in Lightning's own way of writing it."""

    def __init__(self, options: dict[str, Any] | None, others: Any = Lomo) -> None:
        super().__init__(options)
        self.automatic_optimization, self.others = False, others
        torch.manual_seed(3)
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))

    def configure_optimizers(self) -> Any:
        if self.options is None:
            return [torch.optim.SGD(part.parameters(), lr=LR) for part in (self.network, self.critic)]
        return [Lomo(self.network, lr=LR), self.others(self.critic.parameters(), lr=LR)]

    def training_step(self, batch: Any, index: int) -> None:
        made, judged = self.optimizers()
        for optimizer, sign in ((made, 1), (judged, -1)):
            if index % 2 and optimizer is made:
                continue
            with optimizer.toggle_model():
                loss = sign * self.critic(self.network(batch[0])).mean()
                if isinstance(optimizer, Lomo):
                    optimizer.backward(loss)
                else:
                    optimizer.zero_grad()
                    self.manual_backward(loss)
                    optimizer.step()


@pytest.mark.parametrize("others", [Lomo, torch.optim.SGD])
def test_several_optimizers(others: Any) -> None:
    ours, theirs = Adversaries({}, others), Adversaries(None)
    trainer, expected = fit(ours), fit(theirs)
    assert_equal("lightning", "manual: several optimizers, toggled", ours, theirs)
    assert trainer.global_step == expected.global_step == 12
    assert min(furthest(ours.network, classifier()), furthest(ours.critic, Adversaries({}).critic)) > 0.001


# ---- What is refused, before a weight has changed -------------------------------------------------------------------


class OwnBackward(Automatic):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class OwnClipping(Automatic):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        pass


class OwnZeroGrad(Automatic):
    """Some gradients would count for two steps."""

    def optimizer_zero_grad(self, epoch: int, index: int, optimizer: Any) -> None:
        if index % 2 == 0:
            optimizer.zero_grad()


class Twice(Automatic):
    def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
        optimizer.step(closure=lambda: (closure(), closure()))


class OwnStep(Automatic):
    def training_step(self, batch: Any, index: int) -> Any:
        self.optimizers().backward(loss_of(self.network, batch))


class Adam(Automatic):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


class SharedWeights(Manual):
    """The second optimizer has some of the first one's, and goes first."""

    def configure_optimizers(self) -> Any:
        return [Lomo(part, lr=LR) for part in (self.network, self.network[2])]

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in reversed(self.optimizers()):
            optimizer.backward(loss_of(self.network, batch))


REFUSED: dict[str, tuple[type[Automatic], dict[str, Any], dict[str, Any]]] = {
    'a GradScaler (`precision="16-mixed"`)': (
        Automatic,
        {},
        {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
    ),
    "another optimizer": (Adam, {}, {}),
    "`gradient_clip_val` with another bound than `Lomo`'s": (
        Automatic,
        {"clip_grad_norm": 1.0},
        {"gradient_clip_val": 2.0},
    ),
    "a `backward` of the module's own": (OwnBackward, {}, {}),
    "a `configure_gradient_clipping` of the module's own": (OwnClipping, {}, {}),
    "an `optimizer_zero_grad` of the module's own": (OwnZeroGrad, {}, {}),
    "`self.optimizers().backward(loss)` in automatic optimization": (OwnStep, {}, {}),
    "manual: two `Lomo`s of the same weights": (SharedWeights, {}, {}),
    '`precision="64-true"`, and other precisions': (Automatic, {}, {"precision": "64-true"}),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_is_refused(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options, settings = REFUSED[setting]
    module = kind(options)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=refusal("lightning", setting)):
        fit(module, **settings)
    assert furthest(module.network, classifier()) == 0


def test_ddp() -> None:
    """Without its process group, which other tests of this process would see."""
    module = Automatic({})
    with pytest.raises(RuntimeError, match=refusal("lightning", '`strategy="ddp"`')):
        LomoCallback().setup(trainer_of(module, strategy="ddp", devices=1), module, "fit")


def test_a_closure_that_is_called_twice() -> None:
    with pytest.raises(RuntimeError, match=refusal("lightning", "`optimizer_step` that calls the closure twice")):
        fit(Twice({}))


class ClipsLater(Manual):
    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.backward(loss_of(self.network, batch))
        self.clip_gradients(optimizer, gradient_clip_val=self.bound, gradient_clip_algorithm="norm")


def test_clipping_after_the_step() -> None:
    module = ClipsLater({"clip_grad_norm": 0.2})
    module.bound = 0.2
    fit(module)  # Lomo has clipped so
    module.bound = 0.3
    with pytest.raises(ValueError, match=refusal("lightning", "manual: `clip_gradients` after `backward`")):
        fit(module)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_without_the_callback_the_error_names_it() -> None:
    module = Manual({})
    trainer = trainer_of(module)
    trainer.callbacks.pop()
    with pytest.raises(RuntimeError, match=refusal("lightning", "manual: `backward` without the callback")):
        trainer.fit(module, loader())
    assert furthest(module.network, classifier()) == 0


def test_hooks_that_would_see_gradients_get_a_warning() -> None:
    class Looks(Automatic):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assert self.network[0].weight.grad is None and optimizer.grad_norms()["network.0.weight"] > 0

    with pytest.warns(UserWarning, match=r"in Looks\.on_before_optimizer_step gradients are used and freed already"):
        fit(Looks({}))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Lomo")
        fit(Automatic({}))


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lomo_kernels.integrations import _versions

    for installed in ("2.5.1", "3.0.0"):
        monkeypatch.setattr(_versions, "version", lambda _, installed=installed: installed)
        with pytest.raises(ImportError, match=rf"installed is {installed}\. Run: pip install 'lightning>=2.6,<3.0'"):
            LomoCallback()


# ---- Two processes --------------------------------------------------------------------------------------------------


class Sharded(Automatic):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for part in (self.network[0], self.network[2], self.network):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def train_sharded(rank: int, attached: bool) -> tuple[list[Tensor], int]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29573", "TORCHELASTIC_RUN_ID": "test"}
    module = Sharded({} if attached else None)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = trainer_of(module, strategy=strategy, devices=2, accumulate_grad_batches=2, gradient_clip_val=0.2)
    trainer.fit(module, loader(16))
    return [param.full_tensor().detach().clone() for param in module.parameters()], trainer.global_step


@pytest.fixture(scope="module")
def ranks(ranks_with_deepspeed: Callable[[int], Processes]) -> Callable[[int], Processes]:
    """Processes of their own: Lightning reads the environment."""
    return ranks_with_deepspeed


def test_fsdp2(ranks: Callable[[int], Processes]) -> None:
    ours, theirs = (ranks(2).call(train_sharded, attached) for attached in (True, False))
    for (weights, steps), (expected, expected_steps) in zip(ours, theirs, strict=True):
        assert max(float((a - b).abs().max()) for a, b in zip(weights, expected, strict=True)) <= TOLERANCE
        assert steps == expected_steps == 4
        assert float((weights[0] - classifier()[0].weight.detach()).abs().max()) > 0.01
    assert TABLES["lightning"]["FSDP2 (`ModelParallelStrategy`), two processes, `accumulate_grad_batches=2`"] == EQUAL
