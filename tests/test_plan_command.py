"""The plan command: what it prints, the largest batch and sequence, and what it says to options that cannot be."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lomo_kernels.demo.model import Config
from lomo_kernels.plan import METHODS, command, llama, loss_of, options, rows, simulate
from lomo_kernels.plan.budgets import simulate_budget
from lomo_kernels.plan.extrapolate import Parts, largest
from lomo_kernels.plan.models import of_shape
from lomo_kernels.plan.options import GIB
from lomo_kernels.plan.rows import STEP, Setting

CONFIG = Config(layers=3, d_model=256, heads=4, kv_heads=4, ffn=512, vocab=1000)
SIZES = ["--layers", "3", "--d-model", "256", "--heads", "4", "--ffn", "512", "--vocab", "1000"]

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    """Runs the command: its status, and what it printed on stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        parser = argparse.ArgumentParser()
        options.add_arguments(parser)
        status = command.main(parser.parse_args(arguments))
        return status, *capsys.readouterr()

    return run


def cells_of(printed: str) -> dict[str, list[str]]:
    """The table's cells, by method."""
    lines = (line.split("  ") for line in printed.splitlines())
    return {line[0]: [cell.strip() for cell in line[1:] if cell] for line in lines if line[0] in METHODS}


# ---- the largest that fits -------------------------------------------------------------------------------------------

MOST = 7


@pytest.mark.parametrize(
    ("name", "chunk", "along", "most"),
    [
        # Four simulations where all grows along straight lines: the start, the answer, and a neighbour of each.
        ("Lomo, fused", None, "batch", 4),
        pytest.param("AdamW", None, "sequence", 4, marks=pytest.mark.slow),
        # Chunks of the loss make jumps, and factors that outgrow their gradient a bend.
        pytest.param("SGD", 100, "batch", 6, marks=pytest.mark.slow),
        ("Lomo, fused", 100, "sequence", 6),
        ("Lomo, clipping, one pass, fused", None, "batch", 6),
    ],
)
def test_the_largest_that_fits_is_that_of_trying_all(name: str, chunk: int | None, along: str, most: int) -> None:
    """With limits that some n takes to the byte, and with a byte less."""
    config = dataclasses.replace(CONFIG, layers=1)
    setting, build = Setting(of_shape(config), 1, True, chunk, "linear"), llama(config, checkpointing=True)

    def shape(n: int) -> tuple[int, int]:
        return (n, STEP) if along == "batch" else (1, n * STEP)

    peaks = [simulate(build, loss_of(*shape(n), chunk), METHODS[name]).peak for n in range(1, MOST + 2)]
    assert peaks == sorted(peaks)
    known = functools.cache(lambda n: setting.step(name, *shape(n)))
    for limit in (peaks[0] - 1, peaks[0], peaks[MOST - 1] - 1, peaks[MOST - 1]):
        for start in (1, 3):
            asked = []
            found = largest(lambda n, asked=asked: asked.append(n) or known(n), start, limit)
            assert found == sum(peak <= limit for peak in peaks)
            assert len(set(asked)) <= most


@pytest.mark.parametrize(
    "total",
    [
        lambda n: 100 + max(n, 5 * n - 7950),
        lambda n: 100 + max(n, 5 * n - 7950) - n % 3 // 2,
        lambda n: 100 + min(5 * n, 2000) + n,
        lambda n: 100 + 50 * (n // 7) + n,
    ],
    ids=["bends up", "has dents", "bends down", "has stairs"],
)
@pytest.mark.parametrize("limit", [100, 101, 110, 10_000, 1_000_000])
@pytest.mark.parametrize("start", [1, 5, 5000])
def test_lines_may_bend(total: Callable[[int], int], limit: int, start: int) -> None:
    asked = set()

    def parts_at(n: int) -> Parts:
        asked.add(n)
        return {"forward": [(total(n), 0)]}

    found = largest(parts_at, start, limit)
    assert (not found or total(found) <= limit) and total(found + 1) > limit
    assert len(asked) <= 12


# ---- what is printed -------------------------------------------------------------------------------------------------


def test_the_command(plan: Plan) -> None:
    methods = ("--method", "sgd", "--method", "lomo, f")
    status, printed, said = plan(*SIZES, "--memory", "40MB", "--seq", "256", "--checkpointing", *methods)
    assert status == 0, said
    rows = cells_of(printed)
    assert list(rows) == ["SGD, fp32 master", "SGD", "Lomo, fused"]
    sequence = {name: int(cells[-1].replace(",", "")) for name, cells in rows.items()}
    assert sequence["Lomo, fused"] >= sequence["SGD"] > sequence["SGD, fp32 master"] > 0
    build = llama(CONFIG, checkpointing=True)
    for name, found in sequence.items():
        fits, does_not = (simulate(build, loss_of(1, seq), METHODS[name]).peak for seq in (found, found + STEP))
        assert fits <= 40 * 2**20 < does_not, name


def test_the_command_sharded(plan: Plan) -> None:
    arguments = ["--gpus", "4", "--memory", "20MB", "--seq", "128", "--method", "lomo, c", "--checkpointing"]
    status, printed, said = plan(*SIZES, "--layers", "1", *arguments)
    assert status == 0, said
    assert "FSDP2 by linear" in printed
    assert list(cells_of(printed)) == ["Lomo, clipping, two passes", "Lomo, clipping, one pass"]


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many there are."""

    def there_are(number: int) -> None:
        monkeypatch.setattr(rows.os, "sched_getaffinity", lambda _: set(range(number)), raising=False)

    return there_are


@pytest.mark.slow
def test_several_processes_print_what_one_prints(plan: Plan, cores: Callable[[int], None]) -> None:
    asked = [*SIZES, "--layers", "1", "--memory", "20MB", "--seq", "256"]
    for name in ("sgd", "lomo, f", "adamw"):
        asked += ["--method", name]
    printed = []
    for number in (1, 2):
        cores(number)
        with mock.patch.object(rows, "row", wraps=rows.row) as here:
            printed.append(plan(*asked)[:2])
        assert here.called == (number == 1)
    assert printed[0] == printed[1] and printed[0][0] == 0


def test_several_processes_end_with_the_sentence_of_one(
    plan: Plan, of_transformers: Callable[..., str], cores: Callable[[int], None]
) -> None:
    cores(2)
    config = of_transformers(model_type="mistral", num_key_value_heads=4, sliding_window=128)
    status, printed, said = plan("--model", config)
    assert status == 2 and not printed
    assert re.fullmatch("python -m lomo_kernels plan: .*attn_mask is given.*\n", said)


def test_a_sequence_between_two_steps_that_fits_is_not_more_than_the_largest(plan: Plan) -> None:
    peak = simulate(llama(CONFIG), loss_of(1, 200), METHODS["Lomo, fused"]).peak
    _, printed, _ = plan(*SIZES, "--memory", f"{peak / 2**20 + 0.01:.2f}MB", "--seq", "200", "--method", "lomo, f")
    *_, fits, batch, sequence = cells_of(printed)["Lomo, fused"]
    assert (fits, batch, sequence) == ("yes", "1", "200")


def test_the_budgets(plan: Plan, cores: Callable[[int], None]) -> None:
    """What two processes print, against each line's ends and one budget between them."""
    cores(2)
    config = dataclasses.replace(CONFIG, layers=2, d_model=1024, ffn=4096)
    sizes = [*SIZES, "--layers", "2", "--d-model", "1024", "--ffn", "4096"]
    memory = 130 * 2**20
    status, text, said = plan(*sizes, "--seq", "512", "--checkpointing", "--budgets", "--memory", "130MB")
    assert status == 0, said
    assert "Lomo with clipping at sequence 512, batch 1, checkpoints, on 1 GPU" in text and "modelled" in text
    rows = [line.split() for line in text.splitlines() if " layers " in line]
    assert [row[0] for row in rows] == ["fused"] * 5 + ["plain"] * 5
    build, loss = llama(config, checkpointing=True), loss_of(1, 512)
    for fused, (none, _, half, _, everything) in ((True, rows[:5]), (False, rows[5:])):
        every = simulate_budget(build, loss, None, fused=fused)
        steps = {budget: simulate_budget(build, loss, budget, fused=fused) for budget in (0, every.kept // 2)}
        for budget, row in zip((*steps, None), (none, half, everything), strict=True):
            step = steps.get(budget, every)
            asked = "all" if budget is None else f"{budget / GIB:.2f}"
            figures = [step.kept / GIB, step.peak.peak / GIB, step.flops / every.flops]
            fits = "yes" if step.peak.peak <= memory else "no"
            assert row[2:] == [asked, *(f"{figure:.2f}" for figure in figures), fits]
    assert {row[-1] for row in rows} == {"yes", "no"}


@pytest.fixture
def of_transformers(tmp_path: Path) -> Callable[..., str]:
    """Makes the folder of a Hugging Face config."""
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}

    def make(**config: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps(sizes | {"vocab_size": 1000} | config))
        return str(tmp_path)

    return make


def test_configs_that_cannot_be_simulated_get_one_sentence(plan: Plan, of_transformers: Callable[..., str]) -> None:
    for config, message in (
        ({"model_type": "t5"}, "Unrecognized configuration class"),
        ({"model_type": "gemma2", "head_dim": 64}, "its blocks are not all alike"),
        ({"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 128}, "attn_mask is given"),
        ({"model_type": "llama", "hidden_size": 250}, "hidden size (250) is not a multiple"),
        ({"model_type": "llama", "num_key_value_heads": 3}, "3 heads of keys do not divide 4 of queries"),
        ({"model_type": "llama", "max_position_embeddings": 512}, "--seq 1024 is more than the 512 tokens"),
    ):
        status, printed, said = plan("--model", of_transformers(**config), "--method", "sgd")
        assert status == 2 and not printed
        assert message in said and said.startswith("python -m lomo_kernels plan: ")


def test_a_sequence_is_not_longer_than_positions_are(plan: Plan, of_transformers: Callable[..., str]) -> None:
    config = of_transformers(model_type="gpt2", n_positions=400, n_layer=3, n_embd=256, n_head=4)
    _, printed, said = plan("--model", config, "--memory", "4GB", "--seq", "300", "--method", "lomo, f")
    assert cells_of(printed)["Lomo, fused"][-1] == "384", said


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_hugging_face_config(plan: Plan, of_transformers: Callable[..., str], checkpointing: bool) -> None:
    config = of_transformers(model_type="llama", architectures=["LlamaForCausalLM"])
    flags = ["--checkpointing", "--chunk", "100"] if checkpointing else []
    arguments = ["--memory", "40MB", "--seq", "128", "--method", "lomo, f", *flags]
    status, printed, said = plan("--model", config, *arguments)
    assert status == 0, said
    assert "Lomo, fused" in cells_of(printed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --model, or --layers"),
        (["--layers", "3"], "--d-model is missing"),
        (["--model", "llama-7b", "--layers", "3"], "give --model, or"),
        (["--model", "llama-7b", "--memory", "much"], "--memory much is not like 24GB"),
        (["--model", "llama-7b", "--method", "adam2"], "--method adam2 is none of: AdamW"),
        (["--model", "llama-7b", "--gpus", "0"], "--gpus must be at least 1, not 0"),
        (["--model", "llama-7b", "--gpus", "100000"], "--gpus 100000 are more than the 1024 that can be simulated"),
        (["--model", "/nowhere/at/all"], "--model /nowhere/at/all"),
        ([*SIZES, "--memory", "1.2.3GB"], "--memory 1.2.3GB is not like 24GB"),
        ([*SIZES, "--memory", "0.0GB"], "--memory 0.0GB is none"),
        ([*SIZES, "--memory", "99999999GB"], "--memory 99999999GB is more than 1048576GB"),
        ([*SIZES, "--seq", "10000000000000"], "--batch 1 of --seq 10000000000000 are more than"),
        ([*SIZES, "--group", "block"], "--group block is of FSDP2: it needs --gpus of 2 or more"),
        ([*SIZES, "--budgets", "--gpus", "2"], "--budgets is of one GPU: over several ranks all gradients are kept or"),
        ([*SIZES, "--budgets", "--method", "lomo"], "--budgets is of Lomo with clipping, fused layers and plain ones"),
        ([*SIZES, "--method", "sgd", "--d-model", "24"], "the head is 6 wide, expected"),
    ],
)
def test_bad_options_get_one_sentence(plan: Plan, arguments: list[str], message: str) -> None:
    status, printed, said = plan(*arguments)
    assert status == 2 and not printed
    assert message in said and len(said.strip().splitlines()) == 1


def test_it_is_a_command(run_python: Any) -> None:
    code = "import runpy; runpy.run_module('lomo_kernels', run_name='__main__')"
    done = run_python(code, "plan", "--model", "llama-7b", "--gpus", "0")
    assert done.returncode == 2 and done.stderr == "python -m lomo_kernels plan: --gpus must be at least 1, not 0\n"
