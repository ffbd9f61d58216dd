"""What SECURITY.md says: checkpoints without code, operators that stay inside their tensors, a package that keeps to
itself."""

import ast
import io
from pathlib import Path

import pytest
import torch
from support import oracle
from test_opcheck import CASES, GRAD, OPS, scalars
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lomo_kernels import AdaLomo, Lomo, backends

PACKAGE = Path(backends.__file__).parent
GUARD = 1 << 14  # bytes before and after a tensor

# ---- Checkpoints ----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "clipped, dynamic scale": (Lomo, {"lr": 0.1, "clip_grad_norm": 1.0, "loss_scale": "dynamic"}, torch.float32),
    "split": (Lomo, {"lr": 0.1, "rounding": "split", "weight_decay": 0.1}, torch.bfloat16),
    "stochastic sign": (Lomo, {"lr": 0.01, "rounding": "stochastic", "rule": "sign"}, torch.bfloat16),
    "clipped by tensor": (Lomo, {"lr": 0.1, "clip_tensor": 1.04}, torch.float32),
    "AdaLomo": (AdaLomo, {"lr": 0.01}, torch.float32),
}


def kinds(value):
    """The types of all objects in a state dict."""
    found = {type(value)}
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        found = found.union(*map(kinds, value))
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_dict_is_loaded_without_running_code(name):
    """As torch does by default: weights_only=True allows no class of ours. The resumed run has the same bits."""
    make, options, dtype = OPTIMIZERS[name]

    def new():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        return model, make(model, **options)

    def step(model, optimizer, number):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number)).to(dtype)
        optimizer.backward(model(x).float().square().sum())

    model, optimizer = new()
    for number in range(2):
        step(model, optimizer, number)
    file = io.BytesIO()
    state = optimizer.state_dict()
    torch.save({"model": model.state_dict(), "optimizer": state}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert kinds(state) <= {dict, list, tuple, str, int, float, bool, type(None), Tensor}
    resumed, other = new()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    step(model, optimizer, 7)
    step(resumed, other, 7)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        oracle.assert_same_bits(a.detach(), b.detach())


# ---- Operators ------------------------------------------------------------------------------------------------------


class Guarded:
    """A copy of a tensor with the same sizes and strides, between bytes that nobody may write."""

    def __init__(self, tensor):
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        self.bytes, size = span * tensor.element_size(), tensor.element_size()
        self.memory = torch.full((2 * GUARD + self.bytes + (-self.bytes) % 8,), 0xA5, dtype=torch.uint8)
        whole = self.memory[: (len(self.memory) // size) * size].view(tensor.dtype)
        self.tensor = whole.as_strided(tensor.shape, tensor.stride(), GUARD // size)
        self.tensor.copy_(tensor.detach())

    def intact(self):
        return bool((self.memory[:GUARD] == 0xA5).all() and (self.memory[GUARD + self.bytes :] == 0xA5).all())


#: What is done to one argument.
CHANGES = {
    "one row less": lambda t: t[:-1] if t.dim() and t.numel() else None,
    "one column less": lambda t: t[..., :-1] if t.dim() > 1 and t.numel() else None,
    "no element": lambda t: t[:0] if t.dim() and t.numel() else None,
    "one more dimension": lambda t: t[None],
    "no dimension": lambda t: t.flatten()[0] if t.dim() and t.numel() else None,
    "another dtype": lambda t: torch.zeros(t.shape, dtype=torch.int16 if t.is_floating_point() else torch.float32),
    "twice as long": lambda t: torch.cat([t, t]) if t.dim() else None,
}

needs_compiled = pytest.mark.skipif(backends.choice("CPU").backend != "cpu", reason="tests the compiled operators")


@needs_compiled
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CASES)
def test_no_operator_writes_outside_its_tensors(name, change):
    """A raw call with one argument changed is an exception, or leaves every byte around the tensors alone."""
    operator, arguments = CASES[name]()
    leaves, structure = tree_flatten(arguments)
    for changed in (i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)):
        new = CHANGES[change](leaves[changed].detach())
        if new is None:
            continue
        guards = {
            i: Guarded(new if i == changed else leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
        }
        values = [guards[i].tensor if i in guards else leaf for i, leaf in enumerate(leaves)]
        try:
            operator.default(*tree_unflatten(values, structure))
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
            assert str(error)
        for i, guard in guards.items():
            assert guard.intact(), f"argument {i} was written outside, after argument {changed} changed"


@needs_compiled
@pytest.mark.parametrize("index", [4, -1, 2**31, 2**62, -(2**63)])
def test_an_index_outside_the_embedding_is_refused(index):
    guard = Guarded(torch.ones(4, 5))
    indices = torch.tensor([[1, 3, 1], [0, index, 2]])
    with pytest.raises((RuntimeError, IndexError), match="embedding"):
        OPS.embedding_update_.default(guard.tensor, [indices], [GRAD], [-1], scalars(), None, 0, False, 0, 0, [])
    assert guard.intact() and bool((guard.tensor == 1).all())


# ---- The package ----------------------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "socket", "urllib", "http", "requests"}
FORBIDDEN_MODULES |= {"subprocess", "runpy", "code"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "Popen", "urlopen"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_loads_no_code_and_opens_no_connection(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        assert not {module.partition(".")[0] for module in modules} & FORBIDDEN_MODULES, ast.unparse(node)
        if isinstance(node, ast.Call):
            called = node.func
            name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
            owner = ast.unparse(called.value) if isinstance(called, ast.Attribute) else ""
            assert name not in FORBIDDEN_CALLS or owner in ("re", "torch"), ast.unparse(node)
            assert (owner, name) != ("torch", "load"), ast.unparse(node)
