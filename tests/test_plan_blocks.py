"""Few blocks tell what many take, sharded or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lomo_kernels.demo.model import Config
from lomo_kernels.plan import METHODS, llama, loss_of, sharded, simulate, simulate_blocks
from lomo_kernels.plan.extrapolate import peak_of
from lomo_kernels.plan.methods import LOMO_OPTIM_NEEDS, lacking
from lomo_kernels.plan.models import of_shape
from lomo_kernels.plan.options import GROUPS
from lomo_kernels.plan.rows import Setting

BLOCKS = 4
installed = [name for name in METHODS if "lomo_optim" not in name or not lacking(LOMO_OPTIM_NEEDS)]
#: One of each kind: updates after and inside backward, gradients of weights and of none, two passes, kept factors.
KINDS = ("AdamW, foreach", "Lomo", "Lomo, clipping, two passes, fused", "Lomo, clipping, one pass, fused")


def config(blocks: int) -> Config:
    return Config(layers=blocks, d_model=256, heads=4, kv_heads=4, ffn=704, vocab=1000)


@pytest.mark.parametrize(
    ("name", "checkpointing", "tokens"),
    [
        *(pytest.param(name, False, 8, marks=[pytest.mark.slow] * (name not in KINDS)) for name in installed),
        *((name, True, 512) for name in KINDS),
    ],
)
def test_few_blocks_tell_the_peak_of_many(name: str, checkpointing: bool, tokens: int) -> None:
    def build(blocks: int) -> Callable[[], torch.nn.Module]:
        return llama(config(blocks), checkpointing=checkpointing)

    loss = loss_of(1, tokens)
    assert simulate_blocks(build, BLOCKS, loss, METHODS[name], edge=1) == simulate(build(BLOCKS), loss, METHODS[name])


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("SGD", "linear"),
        pytest.param("Lomo", "linear", marks=pytest.mark.slow),
        ("Lomo, clipping, two passes", "linear"),
        ("AdamW, fp32 master", "attention-mlp"),
    ],
)
def test_few_sharded_blocks_too(name: str, group: str) -> None:
    loss = loss_of(1, 128)
    with sharded.ranks(4) as mesh:

        def build(blocks: int) -> Callable[[], torch.nn.Module]:
            return sharded.shard(llama(config(blocks), checkpointing=True), mesh, group)

        many = simulate(build(BLOCKS), loss, METHODS[name])
        assert simulate_blocks(build, BLOCKS, loss, METHODS[name], edge=1) == many


def test_where_whole_blocks_are_gathered_two_at_either_end_are_unlike_the_others() -> None:
    loss = loss_of(1, 32)
    with sharded.ranks(4) as mesh:

        def build(blocks: int) -> Callable[[], torch.nn.Module]:
            return sharded.shard(llama(config(blocks), checkpointing=True), mesh, "block")

        expected = simulate(build(6), loss, METHODS["Lomo"])
        one = simulate_blocks(build, 6, loss, METHODS["Lomo"], edge=1)
        assert one.most["gathered parameters"] > expected.most["gathered parameters"], "one does, too"
    setting = Setting(of_shape(config(6)), gpus=4, checkpointing=True, chunk=None, group="block")
    assert peak_of(setting.step("Lomo", 1, 32)) == expected


@pytest.mark.parametrize("name", ["Lomo", "SGD"])
def test_shards_are_a_part_of_the_weights(name: str) -> None:
    weights = sum(param.nbytes for param in llama(config(2))().parameters())
    with sharded.ranks(4) as mesh:
        peaks = {
            group: simulate(sharded.shard(llama(config(2)), mesh, group), loss_of(1, 64), METHODS[name])
            for group in GROUPS
        }
    for peak in peaks.values():
        assert peak.most["parameters"] == weights / 4
        assert peak.most["gathered parameters"] > 0
        assert peak.most["temporaries"] < weights / 4, "what DTensor tries out on whole tensors is not there"
    gathered = [peaks[group].most["gathered parameters"] for group in GROUPS]
    assert gathered == sorted(gathered, reverse=True)
    assert gathered[0] > gathered[-1], "smaller groups hold less"


def test_a_process_in_a_group_is_told() -> None:
    with sharded.ranks(2), pytest.raises(RuntimeError, match="in a process group already"), sharded.ranks(2):
        pass
