"""What does a whole training step cost, in time and memory, next to SGD with `clip_grad_norm_`?

Llama shapes in bfloat16 on synthetic tokens, one sequence, forward to update.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lomo_kernels.composite import tiled
from lomo_kernels.demo.model import ByteLlama, Config
from lomo_kernels.plan import SHAPES

from .buffers import free_memory
from .measure import interleave, memory_of, synchronize
from .methods import ADAM, LLAMA_107M, METHODS, SGD, Step, cannot, fused_is_wrong, wrong
from .results import BASE, FORWARD

pytestmark = pytest.mark.timeout(1800)  # the first contestant's test runs the rounds of all

LR = 1e-6  # weights stay as they are, more or less: one set of them serves every contestant
CONTESTANTS = (*METHODS, FORWARD)  # a forward is what computing every block's inputs once more costs at least
DTYPE = torch.bfloat16

#: By their number of parameters. The last two are TinyLlama and LLaMA-7B.
MODELS = {
    "17M": Config(layers=1, d_model=1024, heads=16, kv_heads=16, ffn=2816, vocab=2048),
    "30M": Config(layers=2, d_model=1024, heads=16, kv_heads=16, ffn=2816, vocab=2048),
    "107M": LLAMA_107M,
    "1.1B": SHAPES["llama-1b"],
    "6.7B": SHAPES["llama-7b"],
}
#: Who runs at 1024 and 4096 tokens on a CPU, and on smaller models: all of them on 107M would take two hours.
FEW = (
    BASE,
    "AdamW, clip_grad_norm_",
    "lomo_optim, clipping",
    "Lomo, fused",
    "Lomo, clipping, two passes, fused",
    "Lomo, clipping, one pass, fused",
)
FEWEST = tuple(name for name in FEW if "clip" in name and "AdamW" not in name)


class Case(NamedTuple):
    model: str
    tokens: int
    checkpointing: bool = False
    contestants: tuple[str, ...] = CONTESTANTS

    def __str__(self) -> str:
        return f"{self.model}, {self.tokens} tokens" + (", checkpointing" if self.checkpointing else "")


CASES = {
    "cpu": {
        "short": [Case("17M", 256)],
        "full": [
            Case("107M", 256),
            Case("107M", 256, True),
            Case("30M", 1024, False, FEW),
            Case("30M", 1024, True, FEW),
            Case("17M", 4096, False, FEWEST),
        ],
    },
    "cuda": {
        "short": [Case("1.1B", 256)],
        "full": [
            Case(model, tokens, checkpointing)
            for model in ("1.1B", "6.7B")
            for tokens in (256, 1024, 4096)
            for checkpointing in (False, True)
        ],
    },
}


class Outcome(NamedTuple):
    seconds: list[float]
    beside_seconds: list[float]  # of BASE, in the same rounds
    memory: dict[str, int]


def built(config: Config, device: str) -> ByteLlama:
    """A model of random weights, made where it is wanted: drawing 6.7B numbers on a CPU takes minutes."""
    with torch.device("meta"):
        model = ByteLlama(config).to(DTYPE)
    model.to_empty(device=device)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.02) if param.ndim == 2 else param.fill_(1.0)
    return model


def sharing(model: ByteLlama) -> ByteLlama:
    """A model with parameters of its own, whose memory is the other's."""
    return copy.deepcopy(model, {id(param): nn.Parameter(param.detach()) for param in model.parameters()})


#: The most methods that run in the same rounds. A run on a GPU may be killed; then it loses its current rounds.
TOGETHER = {"cpu": 100, "cuda": 5}


def heats(names: Iterable[str], weights: int, free: int, most: int = TOGETHER["cpu"]) -> list[list[str]]:
    """Who runs in common rounds, beside BASE: `most`, unless what they keep between steps fills half of the memory."""
    heats: list[list[str]] = []
    room = 0
    for name in names:
        kept = METHODS[name].states * weights if name in METHODS else 0
        if not heats or len(heats[-1]) == most or (kept > room and heats[-1]):
            heats.append([])
            room = free // 2
        heats[-1].append(name)
        room -= kept
    return heats


def needs(name: str) -> int:
    """Multiples of the weights that stand beside them."""
    return METHODS[name].states + METHODS[name].gradients if name in METHODS else 0


class Contest:
    """The contestants of one case. Each gets an `Outcome`, or a reason why it is `missing`, when it is asked for."""

    def __init__(self, case: Case, config: Config, device: str, rounds: int) -> None:
        self.case, self.device, self.rounds = case, device, rounds
        self.outcomes: dict[str, Outcome] = {}
        self.missing: dict[str, tuple[str, str]] = {}  # what it lacks, and why
        free = free_memory(device)
        with torch.device("meta"):
            self.weights = sum(param.numel() * DTYPE.itemsize for param in ByteLlama(config).parameters())
        for name in case.contestants:
            if name in METHODS and (lacking := cannot(name, DTYPE, device)):
                self.missing[name] = lacking
            elif (needed := self.weights + needs(name) * self.weights) > free:
                self.missing[name] = (
                    f"{name}, {case}",
                    f"weights, gradients and states take {gib(needed)}, {gib(free)} are free",
                )
        able = [name for name in case.contestants if name not in self.missing]
        if not able:
            return
        self.model = built(config, device)
        generator = torch.Generator().manual_seed(0)
        self.windows = [
            torch.randint(config.vocab, (1, case.tokens + 1), generator=generator).to(device) for _ in range(4)
        ]
        self.base = [BASE] * (BASE in able)
        others = [name for name in able if name != BASE]
        self.heats = heats(others, self.weights, free - self.weights, TOGETHER[device]) or [[]]

    def outcome(self, name: str) -> Outcome | None:
        """Runs the rounds that this contestant takes part in, if they were not run yet. None: it is `missing`."""
        if name not in self.outcomes and name not in self.missing:
            self.run(next(heat for heat in self.heats if name in heat or name == BASE))
        return self.outcomes.get(name)

    def run(self, heat: list[str]) -> None:
        steps, memory = {}, {}
        for name in self.base + heat:
            try:
                steps[name], memory[name] = self.entered(name)
            except torch.OutOfMemoryError as error:
                self.missing[name] = f"{name}, {self.case}", str(error).splitlines()[0]
                gc.collect()
        seconds = interleave(steps, self.rounds)
        for name in steps:
            self.outcomes.setdefault(name, Outcome(seconds[name], seconds.get(BASE, []), memory[name]))

    def entered(self, name: str) -> tuple[Step, dict[str, int]]:
        """A contestant's step, forward to update, on a model of its own; and what it needs above the weights."""
        model = sharing(self.model)
        model.checkpoint_blocks = self.case.checkpointing
        after: Step = METHODS[name].make(model, LR) if name in METHODS else lambda loss: None

        def step(number: int) -> float:
            synchronize(self.device)
            start = time.perf_counter()
            after(model.loss(self.windows[number % len(self.windows)]))
            synchronize(self.device)
            return time.perf_counter() - start

        tiled.buffer.memory = torch.empty(0)  # a tile that stays counts too
        states, _ = memory_of(lambda: step(0), self.device)
        left, peak = memory_of(lambda: step(1), self.device)
        assert abs(left) < max(0.01 * self.weights, 2**20), f"{name}: each step leaves {left} bytes behind"
        return step, {"weights": self.weights, "states": states, "peak": states + peak}


def gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"


@pytest.fixture(scope="module")
def contest(case, device, setting, step_rounds, request):
    dtype = str(DTYPE).removeprefix("torch.")
    for kind in (SGD, ADAM):
        if reason := fused_is_wrong(kind, DTYPE, device):
            request.config.missing[f"{kind.__name__} fused, {dtype}, {device}"] = reason
    words = str(case)
    if setting.get("malloc") == "tuned":  # python -m bench asks again with an allocator that keeps memory
        case, words = case._replace(contestants=FEW), f"{case}, tuned malloc"
    if left_out := [name for name in CONTESTANTS if name not in case.contestants]:
        request.config.missing[f"{words}: {'; '.join(left_out)}"] = "left out: with them it would take too long"
    yield Contest(case, MODELS[case.model], device, step_rounds)
    gc.collect()  # hooks and models refer to each other


def test_step(reported, missing, device, case, contest, contestant):
    if contestant not in contest.case.contestants:
        pytest.skip("left out of this case, as the results' list of what is missing says")
    if contestant.startswith("Lomo") and (reason := wrong(METHODS[contestant], DTYPE, device)):
        pytest.fail(reason)
    outcome = contest.outcome(contestant)
    if outcome is None:
        missing(*contest.missing[contestant])
    described = {"model": case.model, "tokens": case.tokens, "checkpointing": case.checkpointing}
    beside = {"beside": BASE, "beside_seconds": outcome.beside_seconds} if outcome.beside_seconds else {}
    reported(contestant, described, outcome.seconds, memory=outcome.memory, **beside)
