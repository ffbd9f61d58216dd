"""What does training cost: a parameter in a hook, a whole step, exact clipping, a captured step?

Whole steps are of Llama shapes in bfloat16 on synthetic tokens, one sequence, forward to update.
"""

from __future__ import annotations

import copy
import functools
import os
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from lomo_kernels.composite import tiled
from lomo_kernels.demo.model import ByteLlama, Config
from lomo_kernels.plan import SHAPES

from .measure import Baseline, memory_of
from .methods import CLIPPING, LLAMA_107M, METHODS, cannot
from .results import BASE, FORWARD

pytestmark = pytest.mark.timeout(1800)

LR = 1e-6  # weights stay as they are, more or less: one set of them serves every implementation
DTYPE = torch.bfloat16
#: By their number of parameters. The last two are TinyLlama and LLaMA-7B.
MODELS = {
    "17M": Config(layers=1, d_model=1024, heads=16, kv_heads=16, ffn=2816, vocab=2048),
    "30M": Config(layers=2, d_model=1024, heads=16, kv_heads=16, ffn=2816, vocab=2048),
    "107M": LLAMA_107M,
    "1.1B": SHAPES["llama-1b"],
    "6.7B": SHAPES["llama-7b"],
}
CAPTURED = Config(layers=8, d_model=512, heads=8, kv_heads=8, ffn=1408, vocab=256)
BARE = "bare backward"
#: Its hook looks through all parameters: at 723 a backward takes 0.8 s on a CPU, at 2000 it would be 6 s.
LOMO_OPTIM_AT_MOST = 723

HOOKS = ("hook, add_", "Lomo", "Lomo, clipping, two passes", "optimi SGD, release", "lomo_optim")
GRAPHS = ("Lomo", "Lomo, clipping, two passes", "Lomo, fused", "Lomo, clipping, one pass, fused")
# A forward is what computing every block's inputs once more costs at least.
STEPS = (*(name for name in METHODS if name not in CLIPPING), FORWARD)
#: On a CPU with many tokens, and with the tuned malloc: all would take two hours.
FEW = (
    *(BASE, "AdamW, clip_grad_norm_", "lomo_optim, clipping", "Lomo, fused"),
    *("Lomo, clipping, two passes, fused", "Lomo, clipping, one pass, fused"),
)
CLIPPED = ("AdamW, clip_grad_norm_", "lomo_optim, clipping", "Lomo, clipping, two passes", "Lomo, clipping, one pass")


def cases(device, full):
    counts = [10, 30, 100, 291, 723, 2000] if full else [100, 291]  # 291 has LLaMA-7B, 723 LLaMA-65B
    hooks = {"shape": ["256", "64 x 64"], "dtype": ["float32", "bfloat16"], "parameters": counts}
    columns, modes = "model, tokens, checkpointing, implementation", [False, True][: 1 + full]
    model, tokens = ("1.1B", 1024) if device == "cuda" else ("107M" if full else "17M", 256)
    if device == "cuda":
        models, sizes = (["1.1B", "6.7B"], [256, 1024, 4096]) if full else (["1.1B"], [256])
        steps = [*product(models, sizes, [False, True], STEPS)]
    elif os.environ.get("MALLOC_MMAP_MAX_") == "0":
        steps = [*product([model], [256], [False], FEW)]
    else:
        steps = [*product([model], [256], modes, STEPS)]
        steps += [*product(["30M"], [1024], modes, FEW), *product(["17M"], [4096], [False], FEW)] if full else []
    return {
        "hooks": {"implementation": HOOKS, **hooks},
        "step": {columns: steps},
        "clipping": {columns: [*product([model], [tokens], modes, [*CLIPPED, *CLIPPING])]},
        "captured": {"implementation": GRAPHS, "model": ["8 layers, width 512"], "tokens": [512]},
    }


# --- hooks: backward of many small parameters with an optimizer in it, next to bare autograd, which leaves gradients --


def backward_of(shape, dtype, count, name, device):
    """Backward of a sum over `count` parameters, whose graph keeps no tensor and serves every call."""
    params = nn.ParameterList(nn.Parameter(torch.randn(shape, dtype=dtype, device=device)) for _ in range(count))
    backward = Tensor.backward if name == BARE else METHODS[name](params, LR)
    loss = torch.stack([param.sum() for param in params]).sum()

    def call(_):
        backward(loss)
        for param in params:  # 0.1 us each
            param.grad = None

    return call


def test_hooks(paired, shape, dtype, parameters, device, implementation):
    if implementation == "lomo_optim" and parameters > LOMO_OPTIM_AT_MOST:
        pytest.skip(f"lomo_optim, {parameters} parameters: left out, its time grows with the square of their number")
    dtype = getattr(torch, dtype)
    if lacking := cannot(implementation, dtype, device):
        pytest.skip(lacking)
    sizes = tuple(map(int, shape.split(" x ")))
    call, bare = (backward_of(sizes, dtype, parameters, name, device) for name in (implementation, BARE))
    paired(call, Baseline(BARE, bare))


# --- step: time and memory, next to SGD with `clip_grad_norm_` -------------------------------------------------------


class Trained:
    """A method attached to a model of its own with the weights of `whole`; and the memory it needs above them."""

    def __init__(self, name: str, whole: ByteLlama, tokens: int, checkpointing: bool, device: str) -> None:
        model = copy.deepcopy(whole, {id(param): nn.Parameter(param.detach()) for param in whole.parameters()})
        model.checkpoint_blocks = checkpointing
        generator = torch.Generator().manual_seed(0)
        vocab = len(whole.embedding.weight)
        self.windows = torch.randint(vocab, (4, 1, tokens + 1), generator=generator).to(device)
        self.loss = model.loss
        self.after = METHODS[name](model, LR) if name in METHODS else lambda loss: None
        tiled.buffer.memory = torch.empty(0)  # a tile that stayed counts too
        states, _ = memory_of(lambda: self.step(0), device)
        left, peak = memory_of(lambda: self.step(1), device)
        weights = sum(param.nbytes for param in whole.parameters())
        assert abs(left) < max(0.01 * weights, 2**20), f"{name}: each step leaves {left} bytes behind"
        self.memory = {"weights": weights, "states": states, "peak": states + peak}

    def step(self, number: int) -> None:
        self.after(self.loss(self.windows[number % len(self.windows)]))


@functools.lru_cache(maxsize=1)
def llama(model: str, device: str) -> ByteLlama:
    """Of random weights, made on the device: drawing 6.7B numbers on a CPU takes minutes."""
    with torch.device("meta"):
        whole = ByteLlama(MODELS[model]).to(DTYPE)
    whole.to_empty(device=device)
    with torch.no_grad():
        for param in whole.parameters():
            param.normal_(std=0.02) if param.ndim == 2 else param.fill_(1.0)
    return whole


@functools.lru_cache(maxsize=1)
def baseline(model: str, tokens: int, checkpointing: bool, device: str) -> Baseline | None:
    """SGD with `clip_grad_norm_`. On a small GPU it may not fit."""
    try:
        return Baseline(BASE, Trained(BASE, llama(model, device), tokens, checkpointing, device).step)
    except torch.OutOfMemoryError:
        return None


def test_step(paired, model, tokens, checkpointing, implementation, device):
    if implementation in METHODS and (lacking := cannot(implementation, DTYPE, device)):
        pytest.skip(lacking)
    other = baseline(model, tokens, checkpointing, device)
    try:
        trained = Trained(implementation, llama(model, device), tokens, checkpointing, device)
        paired(trained.step, other, memory=trained.memory)
    except torch.OutOfMemoryError as error:
        case = f"{implementation}, {model}, {tokens} tokens" + ", checkpointing" * checkpointing
        pytest.skip(f"{case}: {str(error).splitlines()[0]}")


# --- clipping: the same step with budgets of `clip_memory`, as shares of what all gradients take, and without a norm --


test_clipping = test_step


# --- captured: a whole step as a CUDA graph, next to the same step run eagerly ---------------------------------------


def test_captured(paired, device, implementation, model, tokens):
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    assert not cannot(implementation, torch.bfloat16, device)
    llama = ByteLlama(CAPTURED).to(device, torch.bfloat16)
    update = METHODS[implementation](llama, torch.tensor(1e-6, dtype=torch.float64, device=device))
    windows = torch.randint(CAPTURED.vocab, (1, tokens + 1), device=device)

    def step(_=0):
        update(llama.loss(windows))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    paired(lambda _: graph.replay(), Baseline("the eager step", step))
