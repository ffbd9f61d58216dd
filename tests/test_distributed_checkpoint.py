"""`torch.distributed.checkpoint` of model and optimizer, resumed on another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.engines import fsdp
from support.factored import rule_state
from support.models import Planted, assert_same_bits, loss_of, transformer_of_vectors, weights_of, whole_weights
from support.textbook import Textbook
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from lomo_kernels import Lomo

BATCHES = 4  # of a step, however many ranks there are
#: How a program may keep its state: by torch's helpers, with their options, or by the objects' own state dicts.
WAYS = {
    "helpers": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "own": None,
}


def save(model: nn.Module, optimizer: Lomo, folder: str, options: StateDictOptions | None) -> None:
    if options is None:
        dcp.save({"model": model.state_dict(), "optimizer": optimizer}, checkpoint_id=folder)
        return
    before = optimizer.step_count.item()
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    assert optimizer.step_count.item() == before and all(param.grad is None for param in model.parameters())
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: Lomo, folder: str, options: StateDictOptions | None) -> None:
    if options is None:
        state = {"model": model.state_dict(), "optimizer": optimizer}
        dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        return
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )


def loss_of_rank(model: nn.Module, step: int) -> Tensor:
    world, rank = dist.get_world_size(), dist.get_rank()
    return sum(loss_of(model, BATCHES * step + n) for n in range(rank, BATCHES, world)) * (world / BATCHES)


def run(rank: int, way: str, folder: str, first: int, last: int) -> None:
    """Steps `first` to `last` of a run with a schedule, from the checkpoint that stands there unless `first` is 0."""
    torch.manual_seed(0)
    model = transformer_of_vectors()
    book = Textbook(model, lr=0.3, clip_grad_norm=0.3)
    fsdp(model)
    groups = [
        {"params": list(model.blocks.named_parameters(prefix="blocks")), "weight_decay": 0.0},
        {"params": [pair for pair in model.named_parameters() if not pair[0].startswith("blocks")]},
    ]
    optimizer = Lomo(groups, lr=0.3, clip_grad_norm=0.3, clip_passes="two")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    if first:
        for param in model.parameters():
            param.detach().zero_()
        load(model, optimizer, folder, WAYS[way])
        scheduler.last_epoch = first
        assert optimizer.step_count.item() == first
    for step in range(last):
        for group in book.groups:
            group["lr"] = 0.3 * 0.5 ** (step // 2)
        book.step(sum(loss_of(book.model, BATCHES * step + n) for n in range(BATCHES)) / BATCHES)
        if step >= first:
            assert optimizer.param_groups[1]["lr"] == pytest.approx(0.3 * 0.5 ** (step // 2))
            optimizer.backward(loss_of_rank(model, step))
            scheduler.step()
            assert optimizer.last_grad_norm.item() == pytest.approx(book.norm, rel=1e-6)
    for name, weight in whole_weights(model).items():
        assert (weight - book.model.get_parameter(name)).abs().max().item() <= 1e-6, name
    save(model, optimizer, folder, WAYS[way])


@pytest.mark.parametrize(
    "way", ["helpers", "own", *(pytest.param(way, marks=pytest.mark.slow) for way in ("flat", "full"))]
)
@pytest.mark.parametrize(("before", "after"), [(2, 4), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_resumed_on_another_number_of_ranks(ranks: Any, tmp_path: Path, before: int, after: int, way: str) -> None:
    ranks(before).call(run, way, str(tmp_path), 0, 3)
    ranks(after).call(run, way, str(tmp_path), 3, 6)


def state_of(optimizer: Lomo) -> list[float]:
    names = ("step_count", "skipped_steps", "loss_scale")
    return [getattr(optimizer, name).item() for name in names]


def stochastic(rank: int, way: str, folder: str, rule: str, resumed: bool, rounding: str = "stochastic") -> list[float]:
    """Random bits go on where they stopped: seed and step come from the checkpoint. So do the loss scale and the state
    of a rule. Low parts are cut anew."""
    options = {"lr": 1e-3, "rounding": rounding, "loss_scale": "dynamic", "clip_passes": "two", "rule": rule}
    model, alone = Planted(torch.bfloat16), Planted(torch.bfloat16)
    if dist.get_world_size() > 1:
        fully_shard(model)
    ours = Lomo(model, seed=1 if resumed else 3, **options)
    theirs = Lomo(alone, seed=3, **options)
    if resumed:
        load(model, ours, folder, WAYS[way])
    for step in range(6 if resumed else 3):
        bad = float("nan") if step == 1 else 1.0
        theirs.backward(alone(step) * bad)
        if not resumed or step >= 3:
            ours.backward(model(step) * bad)
    assert_same_bits(whole_weights(model), weights_of(alone))
    assert state_of(ours) == state_of(theirs) == [6 if resumed else 3, 1, 2.0**15]
    assert_same_bits(rule_state(ours), rule_state(theirs))
    if not resumed:
        save(model, ours, folder, WAYS[way])
    return state_of(ours)


@pytest.mark.parametrize("rule", ["sgd", "adalomo"])
@pytest.mark.parametrize("way", WAYS)
def test_state_goes_on_on_more_ranks_and_on_one(ranks: Any, tmp_path: Path, way: str, rule: str) -> None:
    ranks(2).call(stochastic, way, str(tmp_path), rule, False)
    ranks(4).call(stochastic, way, str(tmp_path), rule, True)
    ranks(1).call(stochastic, way, str(tmp_path), rule, True)


@pytest.mark.parametrize("rule", [pytest.param("sgd", marks=pytest.mark.slow), "adalomo"])
@pytest.mark.parametrize("way", WAYS)
def test_low_parts_go_on_on_more_ranks_and_on_one(ranks: Any, tmp_path: Path, way: str, rule: str) -> None:
    ranks(2).call(stochastic, way, str(tmp_path), rule, False, "split")
    ranks(4).call(stochastic, way, str(tmp_path), rule, True, "split")
    ranks(1).call(stochastic, way, str(tmp_path), rule, True, "split")


def several(rank: int, way: str, folder: str, rule: str) -> None:
    """Three checkpoints of one run, the gradients of whose odd steps are not finite; a run from each of them ends as
    it does, and so does one from a checkpoint of that."""
    options = {
        "lr": 1e-3,
        "rounding": "stochastic",
        "loss_scale": "dynamic",
        "clip_grad_norm": 1.0,
        "clip_passes": "two",
        "rule": rule,
    }

    def start(seed: int) -> tuple[Planted, Lomo]:
        model = Planted(torch.bfloat16)
        fully_shard(model)
        return model, Lomo(model, seed=seed, **options)

    def train(model: nn.Module, optimizer: Lomo, steps: range) -> None:
        for step in steps:
            optimizer.backward(model(step) * (float("nan") if step % 2 else 1.0))

    straight, whole = start(3)
    for step in range(5):
        train(straight, whole, range(step, step + 1))
        if step in (0, 1, 3):
            save(straight, whole, f"{folder}/{step + 1}", WAYS[way])
    assert state_of(whole) == [5, 2, 2.0**14]
    for first in (1, 2, 4):
        model, optimizer = start(9)
        load(model, optimizer, f"{folder}/{first}", WAYS[way])
        assert state_of(optimizer) == [first, first // 2, 2.0 ** (16 - first // 2)]
        save(model, optimizer, f"{folder}/{first} again", WAYS[way])
        model, optimizer = start(10)
        load(model, optimizer, f"{folder}/{first} again", WAYS[way])
        train(model, optimizer, range(first, 5))
        assert_same_bits(whole_weights(model), whole_weights(straight))
        assert state_of(optimizer) == state_of(whole)
        assert_same_bits(rule_state(optimizer), rule_state(whole))


@pytest.mark.parametrize("rule", [pytest.param("sgd", marks=pytest.mark.slow), "adalomo"])
@pytest.mark.parametrize("way", WAYS)
def test_every_checkpoint_of_a_run_holds_its_own_step(ranks: Any, tmp_path: Path, way: str, rule: str) -> None:
    ranks(2).call(several, way, str(tmp_path), rule)


def another_kind_of_scaling(rank: int, folder: str) -> None:
    model = Planted(torch.bfloat16)
    fully_shard(model)
    save(model, Lomo(model, loss_scale=8.0), folder, WAYS["helpers"])
    other = Planted(torch.bfloat16)
    fully_shard(other)
    with pytest.raises(ValueError, match=r"static loss scaling, this optimizer has none"):
        load(other, Lomo(other), folder, WAYS["helpers"])


def test_another_kind_of_scaling(ranks: Any, tmp_path: Path) -> None:
    ranks(2).call(another_kind_of_scaling, str(tmp_path))
