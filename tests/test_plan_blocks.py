"""Few blocks tell what many take, sharded or not; and what the plan command says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lomo_kernels.demo.model import Config
from lomo_kernels.plan import METHODS, llama, loss_of, sharded, simulate, simulate_blocks
from lomo_kernels.plan.command import GROUPS, STEP, largest
from lomo_kernels.plan.methods import LOMO_OPTIM_NEEDS, SHARDED, lacking

BLOCKS = 7
methods = pytest.mark.parametrize(
    "name", [name for name in METHODS if "lomo_optim" not in name or not lacking(LOMO_OPTIM_NEEDS)]
)


def config(blocks: int) -> Config:
    return Config(layers=blocks, d_model=256, heads=4, kv_heads=4, ffn=704, vocab=1000)


@methods
@pytest.mark.parametrize("checkpointing, tokens", [(False, 8), (True, 512)], ids=["kept", "checkpoints"])
def test_few_blocks_tell_the_peak_of_many(name: str, checkpointing: bool, tokens: int) -> None:
    def build(blocks: int) -> Callable[[], torch.nn.Module]:
        return llama(config(blocks), checkpointing=checkpointing)

    loss = loss_of(1, tokens)
    assert simulate_blocks(build, BLOCKS, loss, METHODS[name]) == simulate(build(BLOCKS), loss, METHODS[name])


@pytest.mark.parametrize(
    "name, group", [*((name, "linear") for name in SHARDED), ("Lomo", "block"), ("Lomo", "attention-mlp")]
)
def test_few_sharded_blocks_too(name: str, group: str) -> None:
    loss = loss_of(1, 128)
    with sharded.ranks(4) as mesh:

        def build(blocks: int) -> Callable[[], torch.nn.Module]:
            return sharded.shard(llama(config(blocks), checkpointing=True), mesh, group)

        assert simulate_blocks(build, BLOCKS, loss, METHODS[name]) == simulate(build(BLOCKS), loss, METHODS[name])


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


@pytest.mark.parametrize("limit, expected", [(99, 0), (101, 0), (110, 10), (10_000, 1999), (1_000_000, 199_999)])
def test_the_largest_that_fits(limit: int, expected: int) -> None:
    calls = []

    def peak(n: int) -> float:
        calls.append(n)
        return 100 + max(n, 5 * n - 7950)  # a bend at 1987

    found = largest(peak, 1, limit)
    assert peak(found) <= limit < peak(found + 1) if found else peak(1) > limit
    assert len(calls) < 20


SIZES = ["--layers", "3", "--d-model", "256", "--heads", "4", "--ffn", "512", "--vocab", "1000"]


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lomo_kernels", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_command() -> None:
    methods = ("--method", "sgd", "--method", "lomo, f")
    done = plan(*SIZES, "--memory", "60MB", "--seq", "256", "--checkpointing", *methods)
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines() if line[:3] in ("SGD", "Lom")}
    assert list(lines) == ["SGD, fp32 master", "SGD", "Lomo, fused"]
    sequence = {name: int(cells[-1].replace(",", "")) for name, cells in lines.items()}
    assert sequence["Lomo, fused"] >= sequence["SGD"] > sequence["SGD, fp32 master"] > 0
    build = llama(Config(layers=3, d_model=256, heads=4, kv_heads=4, ffn=512, vocab=1000), checkpointing=True)
    for name, found in sequence.items():
        fits, does_not = (simulate(build, loss_of(1, seq), METHODS[name]).peak for seq in (found, found + STEP))
        assert fits <= 60 * 2**20 < does_not, name


def test_the_command_sharded() -> None:
    done = plan(*SIZES, "--gpus", "4", "--memory", "60MB", "--seq", "128", "--method", "lomo, c", "--checkpointing")
    assert done.returncode == 0, done.stderr
    assert "FSDP2 by linear" in done.stdout and "\nLomo, clipping, two passes" in done.stdout


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_hugging_face_config(tmp_path: Path, checkpointing: bool) -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(sizes | kind))
    flags = ["--checkpointing", "--chunk", "100"] if checkpointing else []
    done = plan("--model", str(tmp_path), "--memory", "200MB", "--method", "lomo, f", *flags)
    assert done.returncode == 0, done.stderr
    assert "Lomo, fused" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --model, or --layers"),
        (["--layers", "3"], "--d-model is missing"),
        (["--model", "llama-7b", "--layers", "3"], "give --model, or"),
        (["--model", "llama-7b", "--memory", "much"], "--memory much is not like 24GB"),
        (["--model", "llama-7b", "--method", "adam2"], "--method adam2 is none of: AdamW"),
        (["--model", "llama-7b", "--gpus", "0"], "--gpus must be at least 1, not 0"),
        (["--model", "/nowhere/at/all"], "--model /nowhere/at/all"),
    ],
)
def test_bad_options_get_one_sentence(arguments: list[str], message: str) -> None:
    done = plan(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
