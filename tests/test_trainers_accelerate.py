"""`lomo_kernels.integrations.accelerate`: a loop that accelerate documents gives SGD's weights, or an error."""

from __future__ import annotations

import ast
import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults.lines import Tracer
from support.processes import Processes
from support.trainers import (
    PAGE,
    STEPS,
    TABLES,
    assert_equal,
    classifier,
    examples,
    furthest,
    loss_of,
    needs,
    refusal,
    with_tables,
)
from torch import Tensor, nn

from lomo_kernels import Lomo

needs("accelerate")
from accelerate import Accelerator, FullyShardedDataParallelPlugin  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

from lomo_kernels.integrations import accelerate  # noqa: E402

LR = 0.3


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate's singletons, which every Accelerator of a process shares."""
    yield
    forget_state()


@pytest.fixture(scope="module")
def ranks(ranks_with_deepspeed: Callable[[int], Processes]) -> Callable[[int], Processes]:
    """Processes of their own: accelerate reads the environment."""
    return ranks_with_deepspeed


def forget_state() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


@dataclasses.dataclass
class Loop:
    """A training loop as accelerate's documentation has it."""

    accelerator: dict[str, Any] = dataclasses.field(default_factory=dict)
    lomo: dict[str, Any] = dataclasses.field(default_factory=dict)
    sgd: dict[str, Any] = dataclasses.field(default_factory=dict)
    clip: Callable[[Accelerator, nn.Module], Any] | None = None
    clips_always: bool = False
    batches: int = STEPS
    scheduler: bool = False
    again: bool = False
    prepared: Callable[[Accelerator], Any] = lambda accelerator: None

    def run(self, attached: bool) -> tuple[nn.Module, list[float]]:
        """Weights, and what clipping returned."""
        forget_state()
        accelerator = Accelerator(cpu=True, **self.accelerator)
        self.prepared(accelerator)
        model = classifier()
        optimizer = (
            Lomo(model, lr=LR, **self.lomo) if attached else torch.optim.SGD(model.parameters(), lr=LR, **self.sgd)
        )
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS) if self.scheduler else None
        loader = torch.utils.data.DataLoader(examples(4 * self.batches), batch_size=4)
        prepared = model, optimizer, loader
        norms: list[float] = []
        for _ in range(2 if self.again else 1):
            if attached:
                accelerate.attach(accelerator)
            wrapped, stepping, batches = accelerator.prepare(*prepared)
            stepped = None if scheduler is None else accelerator.prepare(scheduler)
            for batch in batches:
                with accelerator.accumulate(wrapped):
                    accelerator.backward(loss_of(wrapped, batch))
                    if self.clip is not None and (accelerator.sync_gradients or self.clips_always):
                        norms.append(float(self.clip(accelerator, wrapped) or 0.0))
                    stepping.step()
                    if stepped is not None:
                        stepped.step()
                    stepping.zero_grad()
            if self.again:
                accelerator.free_memory()
        if attached:
            assert optimizer.step_count.item() == (2 if self.again else 1) * -(
                -self.batches // self.accelerator.get("gradient_accumulation_steps", 1)
            )
        return model, norms


def clip_norm(bound: float) -> Callable[[Accelerator, nn.Module], Any]:
    return lambda accelerator, model: accelerator.clip_grad_norm_(model.parameters(), bound)


def clip_value(accelerator: Accelerator, model: nn.Module) -> None:
    accelerator.clip_grad_value_(model.parameters(), 0.02)


NORM, VALUE = {"clip_grad_norm": 0.2}, {"clip_grad_value": 0.02}
THREE = {"gradient_accumulation_steps": 3}
LOOPS = {
    "no clipping": Loop(),
    "`clip_grad_norm_`": Loop(lomo=NORM, clip=clip_norm(0.2)),
    "`clip_grad_norm_` with an infinite bound, for the norm": Loop(clip=clip_norm(float("inf"))),
    "`clip_grad_value_`": Loop(lomo=VALUE, clip=clip_value),
    "`gradient_accumulation_steps=3`, a loader of 23 batches": Loop(THREE, batches=23),
    "`gradient_accumulation_steps=3`, clipping": Loop(THREE, lomo=NORM, clip=clip_norm(0.2), batches=23),
    "`gradient_accumulation_steps=3`, clipping at each batch": Loop(
        THREE, lomo=NORM, clip=clip_norm(0.2), clips_always=True, batches=23
    ),
    "`gradient_accumulation_steps=3`, `clip_grad_value_` at each batch": Loop(
        THREE, lomo=VALUE, clip=clip_value, clips_always=True, batches=23
    ),
    '`mixed_precision="bf16"`': Loop({"mixed_precision": "bf16"}, lomo=NORM, clip=clip_norm(0.2)),
    "a scheduler that is prepared": Loop(scheduler=True),
    "`weight_decay`": Loop(lomo=NORM | {"weight_decay": 0.1}, sgd={"weight_decay": 0.1}, clip=clip_norm(0.2)),
    "`fused_layers=True`, clipping": Loop(lomo=NORM | {"fused_layers": True}, clip=clip_norm(0.2)),
    "`free_memory()`, then prepared again": Loop(lomo=NORM, clip=clip_norm(0.2), batches=4, again=True),
    "`GradScalerKwargs(enabled=False)`": Loop(
        prepared=lambda accelerator: setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", enabled=False))
    ),
}


@pytest.mark.parametrize("setting", LOOPS)
def test_weights_and_norms_are_those_of_sgd(setting: str) -> None:
    loop = LOOPS[setting]
    model, norms = loop.run(attached=True)
    reference, expected = loop.run(attached=False)
    assert_equal("accelerate", setting, model, reference)
    assert furthest(model, classifier()) > 0.01, "nothing was trained"
    assert norms == pytest.approx(expected, rel=1e-5)
    if loop.lomo.get("clip_grad_norm"):
        assert min(norms) > 0 and max(norms) > 0.2, "nothing was clipped"


def ready(accelerator: Any = None, **options: Any) -> tuple[Any, nn.Module, Any, Tensor]:
    """An attached accelerator, its model and optimizer, and a loss."""
    accelerator = accelerator or Accelerator(cpu=True)
    model = classifier()
    accelerate.attach(accelerator)
    wrapped, optimizer = accelerator.prepare(model, Lomo(model, lr=LR, **options))
    return accelerator, wrapped, optimizer, loss_of(wrapped, examples(4)[:])


@pytest.mark.parametrize("call", ["backward", "lomo_backward"])
def test_a_learning_rate_is_that_of_the_step_as_with_lomo_optim(call: str) -> None:
    """accelerate's own calls for LOMO; without `optimizer.step()`."""
    accelerator, model, optimizer, loss = ready()
    reference = classifier()
    getattr(accelerator, call)(loss, learning_rate=0.05)
    sgd = torch.optim.SGD(reference.parameters(), lr=0.05)
    loss_of(reference, examples(4)[:]).backward()
    sgd.step()
    assert_equal(
        "accelerate", "`backward(loss, learning_rate=…)`, `lomo_backward(loss, learning_rate)`", model, reference
    )
    assert optimizer.param_groups[0]["lr"] == LR


def test_a_learning_rate_that_a_group_has_leaves_the_others_their_own() -> None:
    """Transformers passes the first group's with ``optim="lomo"``."""
    accelerator = Accelerator(cpu=True)
    model, reference = classifier(), classifier()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.4}]
    accelerate.attach(accelerator)
    accelerator.prepare(model, Lomo(groups))
    accelerator.backward(loss_of(model, examples(4)[:]), learning_rate=0.1)
    loss_of(reference, examples(4)[:]).backward()
    sgd = [torch.optim.SGD(reference[i].parameters(), lr=lr) for i, lr in ((0, 0.1), (2, 0.4))]
    for each in sgd:
        each.step()
    assert furthest(model, reference) <= 1e-6


def test_scale_wrt_gas_false_does_not_divide() -> None:
    accelerator, model, _, loss = ready(Accelerator(cpu=True, gradient_accumulation_steps=4))
    accelerator.backward(loss, scale_wrt_gas=False)
    reference = classifier()
    loss_of(reference, examples(4)[:]).backward()
    torch.optim.SGD(reference.parameters(), lr=LR).step()
    assert furthest(model, reference) <= 1e-6


def test_saved_state_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    """Twice: the state that a resumed run has saved continues, too."""
    options = {"clip_grad_norm": 0.2, "rounding": "stochastic"}

    def run(steps: range, load: Path | None, save: Path | None) -> nn.Module:
        forget_state()
        accelerator = Accelerator(cpu=True)
        model = classifier().bfloat16()
        accelerate.attach(accelerator)
        wrapped, optimizer = accelerator.prepare(model, Lomo(model, lr=LR, **options))
        if load is not None:
            accelerator.load_state(str(load))
        for step in steps:
            inputs, labels = examples(64)[4 * step : 4 * step + 4]
            accelerator.backward(loss_of(wrapped, (inputs.bfloat16(), labels)))
            optimizer.step()
        if save is not None:
            accelerator.save_state(str(save))
        return model

    whole = run(range(9), None, None)
    run(range(3), None, tmp_path / "a")
    run(range(3, 6), tmp_path / "a", tmp_path / "b")
    resumed = run(range(6, 9), tmp_path / "b", None)
    assert furthest(resumed, whole) == 0.0
    assert TABLES["accelerate"]["`save_state`, `load_state`"] == "equal"


def test_gradients_are_freed_inside_backward() -> None:
    accelerator, model, _, loss = ready()
    alive = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.grad is not None for other in model.parameters()))
        )
    accelerator.backward(loss)
    assert alive and max(alive) <= 1


def test_attaching_something_else_names_what_was_expected() -> None:
    for other in (None, SimpleNamespace(accelerator=Accelerator(cpu=True)), Lomo(classifier())):
        with pytest.raises(TypeError, match=rf"attach got {type(other).__name__}, expected an accelerate\.Accelerator"):
            accelerate.attach(other)


def test_attaching_twice_and_late_is_the_same() -> None:
    accelerator = Accelerator(cpu=True)
    model = classifier()
    model, optimizer = accelerator.prepare(model, Lomo(model, lr=LR))
    accelerate.attach(accelerator)
    once = accelerator.backward
    accelerate.attach(accelerator)
    assert accelerator.backward == once
    accelerator.backward(loss_of(model, examples(4)[:]))
    assert optimizer.optimizer.step_count.item() == 1


@pytest.mark.parametrize("first", [True, False])
def test_zero_grad_ends_a_step_too(first: bool) -> None:
    accelerator, model, optimizer, _ = ready()
    reference = classifier()
    sgd = torch.optim.SGD(reference.parameters(), lr=LR)
    for step in range(STEPS):
        batch = examples(64)[4 * step : 4 * step + 4]
        if first:
            optimizer.zero_grad()
        accelerator.backward(loss_of(model, batch))
        if not first:
            optimizer.zero_grad()
        sgd.zero_grad()
        loss_of(reference, batch).backward()
        sgd.step()
    assert_equal("accelerate", "`zero_grad()` before or after each backward, no `step()`", model, reference)


def test_a_loop_that_begins_anew_after_an_error() -> None:
    """Between backward and `optimizer.step()`."""
    accelerator, model, optimizer, loss = ready()
    accelerator.backward(loss)
    with pytest.raises(RuntimeError, match="came twice"):
        accelerator.backward(loss_of(model, examples(4)[:]))
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(loss_of(model, examples(4)[:]))
    assert optimizer.optimizer.step_count.item() == 2


# ---- What is refused, before a weight has changed -------------------------------------------------------------------


def refuse_scaler() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    accelerate.attach(accelerator)


def refuse_several() -> None:
    accelerator, _, _, loss = ready()
    accelerator.prepare(torch.optim.AdamW(classifier().parameters()))
    accelerator.backward(loss)


def refuse_other() -> None:
    accelerator = Accelerator(cpu=True)
    accelerate.attach(accelerator)
    model = classifier()
    accelerator.prepare(torch.optim.AdamW(model.parameters()))
    accelerator.backward(loss_of(model, examples(4)[:]))


def refuse_norm_type() -> None:
    accelerator, model, _, _ = ready(clip_grad_norm=1.0)
    accelerator.clip_grad_norm_(model.parameters(), 1.0, norm_type=1)


def refuse_bound() -> None:
    accelerator, model, _, _ = ready(clip_grad_norm=1.0)
    accelerator.clip_grad_norm_(model.parameters(), 2.0)


def refuse_some() -> None:
    accelerator, model, _, _ = ready(clip_grad_norm=1.0)
    accelerator.clip_grad_norm_(model[0].parameters(), 1.0)


def refuse_value() -> None:
    accelerator, model, _, _ = ready(clip_grad_value=1.0)
    accelerator.clip_grad_value_(model.parameters(), 2.0)


def refuse_retain() -> None:
    accelerator, _, _, loss = ready()
    accelerator.backward(loss, retain_graph=True)


def refuse_two_backwards() -> None:
    accelerator, model, optimizer, loss = ready()
    with torch.no_grad():
        optimizer.param_groups[0]["lr"] = 0.0  # the first one is a step
    accelerator.backward(loss)
    optimizer.param_groups[0]["lr"] = LR
    accelerator.backward(loss_of(model, examples(4)[:]))


def refuse_deepspeed() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    accelerate.attach(accelerator)


def refuse_fsdp1() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
    accelerate.attach(accelerator)


def refuse_without_attach() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = classifier()
    model, optimizer = accelerator.prepare(model, Lomo(model, lr=LR))
    with accelerator.accumulate(model):
        optimizer.optimizer.backward(loss_of(model, examples(4)[:]))


REFUSED = {
    'a GradScaler (`mixed_precision="fp16"`)': refuse_scaler,
    "several optimizers": refuse_several,
    "another optimizer": refuse_other,
    "`clip_grad_norm_` with another bound than `Lomo`'s": refuse_bound,
    "`clip_grad_norm_` with another norm": refuse_norm_type,
    "`clip_grad_norm_` of some parameters": refuse_some,
    "`clip_grad_value_` with another bound than `Lomo`'s": refuse_value,
    "`backward(loss, retain_graph=True)`": refuse_retain,
    "two backwards before one `optimizer.step()`": refuse_two_backwards,
    "DeepSpeed, Megatron-LM": refuse_deepspeed,
    "FSDP1": refuse_fsdp1,
    "`optimizer.backward` without `attach`, while gradients accumulate": refuse_without_attach,
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_is_refused(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[nn.Module] = []
    monkeypatch.setitem(globals(), "classifier", lambda: models.append(classifier_again()) or models[-1])
    with pytest.raises((RuntimeError, TypeError, ValueError), match=refusal("accelerate", setting)):
        REFUSED[setting]()
    assert all(furthest(model, classifier_again()) == 0 for model in models)


classifier_again = classifier


def test_an_optimizer_that_accelerate_does_not_have_is_not_refused() -> None:
    """Another accelerator's state does not concern it."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(classifier())
    other = classifier()
    optimizer = Lomo(other, lr=LR)
    with accelerator.accumulate(model):
        optimizer.backward(loss_of(other, examples(4)[:]))
    assert optimizer.step_count.item() == 1


def test_scaled_gradients_are_not_clipped_before_the_step() -> None:
    accelerator, model, _, loss = ready(
        Accelerator(cpu=True, gradient_accumulation_steps=2), clip_grad_norm=1.0, loss_scale=64.0
    )
    with accelerator.accumulate(model):
        accelerator.backward(loss)
        with pytest.raises(RuntimeError, match=r"only if accelerator\.sync_gradients"):
            accelerator.clip_grad_norm_(model.parameters(), 1.0)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lomo_kernels.integrations import _versions

    for installed in ("0.34.2", "2.0.0", "1.9"):
        monkeypatch.setattr(_versions, "version", lambda _, installed=installed: installed)
        with pytest.raises(ImportError, match=rf"installed is {installed}\. Run: pip install 'accelerate>=1.15,<2.0'"):
            accelerate.attach(Accelerator(cpu=True))
    monkeypatch.setattr(_versions, "version", lambda _: "1.15.0.dev0")
    accelerate.attach(Accelerator(cpu=True))


# ---- Two processes --------------------------------------------------------------------------------------------------


def shared_accelerator(rank: int, **options: Any) -> Accelerator:
    import os

    forget_state()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    return Accelerator(cpu=True, **options)


def train_ranks(
    rank: int, kind: str, attached: bool, steps: int, accumulation: int, clip: float | None, rule: str
) -> tuple[list[Tensor], list[float]]:
    """One rank's loop. The batches are halves of those of one process."""
    sharded = kind == "fsdp2"
    accelerator = shared_accelerator(rank, gradient_accumulation_steps=accumulation)
    if sharded:  # accelerate itself does so on GPUs only; everything after this is its own
        accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1, cpu_ram_efficient_loading=False
        )
    model: Any = classifier()
    if attached:
        group = {} if sharded else {"process_group": torch.distributed.group.WORLD}
        if rule == "rows":
            model = nn.Sequential(nn.Embedding(5, 8), model)
        optimizer: Any = Lomo(model, lr=LR, clip_grad_norm=clip, rule=rule, **group)
        hooked: list[Any] = []
        optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    if attached:
        accelerate.attach(accelerator)
    if attached and not sharded:
        model = accelerator.prepare_model(model, evaluation_mode=True)
        prepared = accelerator.prepare(optimizer)
    else:
        model, prepared = accelerator.prepare(model, optimizer)
    if rule == "rows":
        return [torch.tensor([managed.is_embedding for managed in optimizer._training.managed_params])], []
    norms = []
    for step in range(steps * accumulation):
        inputs, labels = examples(256)[8 * step + 4 * rank : 8 * step + 4 * rank + 4]
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, (inputs, labels)))
            if accelerator.sync_gradients and clip is not None:
                norm: Any = accelerator.clip_grad_norm_(model.parameters(), clip)
                norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
            prepared.step()
            if accelerator.sync_gradients:
                scheduler.step()
            prepared.zero_grad()
    if attached:
        assert len(hooked) == steps == optimizer.step_count.item()
        assert optimizer._training.managed_params[0].name == "0.weight"
    whole = [param.full_tensor() if hasattr(param, "full_tensor") else param for param in model.parameters()]
    return [param.detach().clone() for param in whole], norms


@pytest.mark.parametrize(
    "setting,kind,accumulation,clip",
    [
        ("FSDP2, two processes", "fsdp2", 1, None),
        ("FSDP2, two processes, `gradient_accumulation_steps=2`, clipping", "fsdp2", 2, 0.2),
        ("two processes, `Lomo(process_group=…)`, a model that is not wrapped", "data parallel", 2, 0.2),
    ],
)
def test_two_processes(
    ranks: Callable[[int], Processes], setting: str, kind: str, accumulation: int, clip: float | None
) -> None:
    ours = ranks(2).call(train_ranks, kind, True, STEPS, accumulation, clip, "sgd")
    theirs = ranks(2).call(train_ranks, kind, False, STEPS, accumulation, clip, "sgd")
    assert TABLES["accelerate"][setting] == "equal"
    for rank in range(2):
        for ours_, theirs_ in zip(ours[rank][0], theirs[rank][0], strict=True):
            assert float((ours_ - theirs_).abs().max()) <= 1e-6
        assert ours[rank][1] == pytest.approx(theirs[rank][1], rel=1e-5)
        assert (clip is None) == (ours[rank][1] == [])


def test_embeddings_are_known_after_parameters_were_exchanged(ranks: Callable[[int], Processes]) -> None:
    (flags, _), _ = ranks(2).call(train_ranks, "fsdp2", True, 1, 1, None, "rows")
    assert flags[0].tolist() == [True, False, False, False, False]


def wrapped_in_ddp(rank: int) -> str:
    accelerator = shared_accelerator(rank)
    model = classifier()
    accelerate.attach(accelerator)
    wrapped, _ = accelerator.prepare(model, Lomo(model, lr=LR))
    before = copy.deepcopy(model)
    try:
        accelerator.backward(loss_of(wrapped, examples(4)[:]))
    except RuntimeError as error:
        assert furthest(model, before) == 0
        return str(error)
    return "no error"


def test_data_parallel_of_torch_is_refused(ranks: Callable[[int], Processes]) -> None:
    for said in ranks(2).call(wrapped_in_ddp):
        assert TABLES["accelerate"]["DistributedDataParallel"] in said


# ---- The page -------------------------------------------------------------------------------------------------------


def test_each_setting_is_tried() -> None:
    """A test names it, which compares with what the table says (`assert_equal`, `refusal`, `TABLES`)."""
    named = {
        node.value
        for path in Path(__file__).parent.glob("test_trainers_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
    }
    for trainer, settings in TABLES.items():
        assert settings.keys() <= named, (trainer, settings.keys() - named)


def test_the_tables_of_the_page_are_those_of_the_tests() -> None:
    text = PAGE.read_text()
    assert with_tables(text) == text, "run python tests/support/trainers.py"


def test_an_interrupt_inside_attach_leaves_nothing_half_attached() -> None:
    """A second call found `backward` attached, and left accelerate's own clipping."""
    accelerator = Accelerator(cpu=True)
    names = ("backward", "lomo_backward", "no_sync", "clip_grad_norm_", "clip_grad_value_", "prepare")
    gc.collect()  # finalizers of other tests' optimizers would be counted
    counter = Tracer()
    assert counter.run(lambda: accelerate.attach(accelerator)) is None
    for line in range(counter.lines):
        for name in names:
            vars(accelerator).pop(name, None)
        assert Tracer(line).run(lambda: accelerate.attach(accelerator)) is not None
        assert len(vars(accelerator).keys() & set(names)) in (0, len(names)), line
