"""The `demo` command: what it prints at sizes that run in seconds, and what it says to options that cannot be."""

import argparse
import math
import re
import shlex
import sys

import pytest
import torch

pytest.importorskip("rich")

from lomo_kernels.demo import run, text
from lomo_kernels.demo.model import ByteLlama, Config, rotary_angles, rotate

# Wide enough that a layer's gradient does not wait in Lomo's buffer of small ones: peaks are then in their true order.
SMALL = shlex.split(
    "--layers 2 --d-model 192 --heads 4 --kv-heads 2 --ffn 512 --seq 32 --batch 4 --steps 30 --pretrain-batch 8 "
    "--pretrain-steps 50 --eval-windows 32 --lr-pretrain 2e-3 --lr-adamw 1e-3 --threads 1"
)
METHODS = ("Lomo", "Lomo, clip_memory=0", "AdaLomo", "SGD + clip", "AdamW + clip")


@pytest.fixture
def demo(run_python):
    """Runs the command with these options."""
    command = "import runpy; runpy.run_module('lomo_kernels', run_name='__main__')"
    return lambda *options: run_python(command, "demo", *options, COLUMNS="120")


def rows(output):
    """Method -> peak in MiB, seconds, loss before, loss after, from the printed table."""
    numbers = r"\s*│\s*([\d.]+) MiB\s*│\s*([\d.]+)\s*│\s*([\d.]+)\s*│\s*([\d.]+)\s*│"
    return {name: tuple(map(float, re.search("│ " + re.escape(name) + numbers, output).groups())) for name in METHODS}


@pytest.mark.parametrize(
    "options",
    [(), pytest.param(("--dtype", "bfloat16", "--no-checkpoint", "--batch", "2"), marks=pytest.mark.slow)],
)
def test_the_table_says_what_lomo_is_for(demo, options):
    result = demo(*SMALL, *options)
    assert result.returncode == 0, result.stderr
    table = rows(result.stdout)
    peaks = [table[name][0] for name in METHODS]
    lomo, without_memory, adalomo, sgd, adamw = peaks
    assert without_memory < lomo <= sgd < adamw
    assert adalomo < lomo
    for _, seconds, before, after in table.values():
        assert seconds > 0
        assert after < before < math.log(256)
    for name, peak in (("Lomo", lomo), ("Lomo, clip_memory=0", without_memory), ("AdaLomo", adalomo)):
        stated = re.search(
            rf"{name}: the peak above the weights is ([\d.]+) times that of SGD \+ clip and ([\d.]+) times",
            " ".join(result.stdout.split()),
        )
        # The sentence divides unrounded bytes, the table shows a tenth of a MiB.
        assert [float(ratio) for ratio in stated.groups()] == pytest.approx([peak / sgd, peak / adamw], abs=0.15)


def test_fine_tunes_on_a_file(demo, tmp_path):
    file = tmp_path / "own [text].txt"
    file.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 100)
    result = demo(*SMALL, "--text", str(file), "--steps", "4", "--pretrain-steps", "2")
    assert result.returncode == 0, result.stderr
    assert "own [text].txt" in "".join(result.stdout.split("\n"))
    assert set(rows(result.stdout)) == set(METHODS)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--text", "/nowhere"], "--text /nowhere: No such file or directory"),
        (["--heads", "5"], "--heads 5 does not divide --d-model 192"),
        (["--kv-heads", "3"], "--kv-heads 3 does not divide --heads 4"),
        (["--d-model", "36"], "--d-model 36 over --heads 4 is 9 numbers per head, and rotary positions need an even "
         "number"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--pretrain-steps", "-1"], "--pretrain-steps must be at least 1, not -1"),
        (["--lr-lomo", "0"], "--lr-lomo must be a positive number, not 0.0"),
        (["--clip", "nan"], "--clip must be a positive number, not nan"),
        (["--warmup", "2"], "--warmup must be from 0 to 1, not 2.0"),
        (["--device", "abacus"], "--device abacus is not a device: cpu or cuda[:index]"),
        (["--device", "cuda:99"], f"--device cuda:99: torch sees {torch.cuda.device_count()} CUDA devices"),
        (["--device", "meta"], "--device meta: the demo runs on cpu or cuda[:index]"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_gets_one_sentence(options, sentence, capsys):
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    assert run.main(parser.parse_args([*SMALL, *options])) == 2
    captured = capsys.readouterr()
    assert captured.err == f"python -m lomo_kernels demo: {sentence}\n"
    assert captured.out == ""


def test_a_text_too_short_gets_one_sentence(demo, tmp_path):
    file = tmp_path / "short.txt"
    file.write_bytes(b"x" * 329)
    result = demo(*SMALL, "--text", str(file))
    assert (result.returncode, result.stdout) == (2, "")
    assert "is too short: its last tenth, held out, is 32 bytes, and a window of --seq 32 needs 33" in result.stderr


def test_without_rich_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    assert run.main(parser.parse_args(SMALL)) == 2
    assert "pip install 'rich>=13,<16'" in capsys.readouterr().err


def test_importing_the_library_imports_neither_rich_nor_the_demo(run_python):
    code = "import sys, lomo_kernels; sys.exit(any(m.startswith(('rich', 'lomo_kernels.demo')) for m in sys.modules))"
    assert run_python(code).returncode == 0


def result_of(method, **numbers):
    return run.Result(
        **{"method": method, "peak_bytes": 100, "step_seconds": 1.0, "loss_before": 3.0, "loss_after": 2.0, **numbers}
    )


def test_the_sentence_says_so_when_lomo_loses():
    said = run.summary([
        result_of("Lomo", loss_after=2.5, peak_bytes=150, step_seconds=3.0),
        result_of("Lomo, small", loss_after=2.5, peak_bytes=30, step_seconds=4.0),
        result_of("SGD + clip"),
        result_of("AdamW + clip", loss_after=1.0, peak_bytes=300, step_seconds=2.0),
    ])  # fmt: skip
    assert said == (
        "Lomo: the peak above the weights is 1.50 times that of SGD + clip and 0.50 times that of AdamW + clip; the "
        "time of a step is 3.00 times that of SGD + clip and 1.50 times that of AdamW + clip. "
        "Lomo, small: the peak above the weights is 0.30 times that of SGD + clip and 0.10 times that of AdamW + clip; "
        "the time of a step is 4.00 times that of SGD + clip and 2.00 times that of AdamW + clip. "
        "The lowest held-out loss after fine-tuning is that of AdamW + clip, 1.000 nats per byte, with Lomo 1.500 "
        "above it and Lomo, small 1.500 above it and SGD + clip 1.000 above it."
    )


@pytest.mark.parametrize("after", [3.5, math.nan])
def test_the_sentence_says_so_when_the_loss_does_not_fall(after):
    said = run.summary([result_of("Lomo", loss_after=after), result_of("SGD + clip")])
    assert said.endswith("Fine-tuning did not lower the loss with Lomo.")
    assert "is that of SGD + clip, 2.000" in said


def test_texts_are_separate_and_batches_repeat():
    sources, topics = text.stdlib_sources(), text.documentation_topics()
    assert topics[:2000] not in sources  # what is fine-tuned on is no part of what was pre-trained on
    data = text.to_tensor(topics)
    first, again, other = (
        torch.stack(list(text.batches(data, count=3, batch=2, seq=16, seed=seed))) for seed in (1, 1, 2)
    )
    assert first.shape == (3, 2, 17)
    assert first.equal(again)
    assert not first.equal(other)


def test_windows_do_not_overlap_and_reach_the_end():
    chosen = text.windows(torch.arange(100, dtype=torch.uint8), limit=4, seq=9)
    assert chosen[:, 0].tolist() == [0, 30, 60, 90]
    assert chosen[-1].tolist() == list(range(90, 100))
    assert text.windows(torch.zeros(25, dtype=torch.uint8), limit=99, seq=9).shape == (2, 10)


def test_model_is_causal_and_checkpointing_changes_no_gradient():
    model = ByteLlama(Config(layers=2, d_model=32, heads=4, kv_heads=2, ffn=48))
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 8:] = 0
    torch.testing.assert_close(model(tokens)[:, :8], model(changed)[:, :8])
    kept = torch.autograd.grad(model.loss(tokens), list(model.parameters()))
    model.checkpoint_blocks = True
    again = torch.autograd.grad(model.loss(tokens), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_attention_depends_on_distance_only():
    """Rotary positions: the product of one query and one key is the same wherever both stand, at the same distance."""
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 6, 8)
    angles = rotary_angles(6, 8, torch.device("cpu")).repeat(1, 2)
    turned = [rotate(x, angles.cos(), angles.sin())[0, 0] for x in (q, k)]
    products = turned[0] @ turned[1].T
    for distance in range(6):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
