"""Fused layers in real architectures of `transformers`, tiny and random, against SGD as a textbook has it."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import assert_same_bits, weights_of
from support.textbook import Textbook
from torch import Tensor, nn

from lomo_kernels import Lomo
from lomo_kernels.optim.graph import Graph

STEPS = 5
VOCAB = 150  # so many that a tied weight is larger than what is kept of its uses
WIDTH = 16
BATCH, SEQ = 2, 5

# Norms of these gradients are between 1 and 30: the coefficient of clipping is well below 1 in every step.
CLIP = {"clip_grad_norm": 0.2}
#: A `clip_memory` below 1 is a share of the bytes of all gradients.
MODES: dict[str, dict[str, Any]] = {
    "fused, one pass": {"fused_layers": True, "clip_memory": None} | CLIP,
    "fused, a part twice": {"fused_layers": True, "clip_memory": 0.4} | CLIP,
    "fused, two passes": {"fused_layers": True, "clip_memory": 0} | CLIP,
    "fused, no clipping": {"fused_layers": True},
    "one pass": {"clip_memory": None} | CLIP,
    "a part twice": {"clip_memory": 0.6} | CLIP,
}
LR = {"fused, no clipping": 0.02}  # others: large, so that a clipped step moves the weights by a visible amount

Batch = dict[str, Tensor]


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=4)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    return GPT2LMHeadModel(config)


def bert() -> nn.Module:
    """With a pooler, which takes hidden[:, 0], and a decoder tied to the embedding."""
    from transformers import BertConfig, BertForPreTraining

    return BertForPreTraining(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def t5() -> nn.Module:
    """One embedding for encoder, decoder and head."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            dropout_rate=0.0,
            tie_word_embeddings=True,
        )
    )


def mixtral() -> nn.Module:
    """Experts are three-dimensional parameters; 10 tokens on 8 experts leave some without any."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=1,
            max_position_embeddings=32,
        )
    )


class LinearExperts(nn.Module):
    """A mixture of experts that are `nn.Linear`. One without tokens is called with none of them, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.router = nn.Linear(WIDTH, 8, bias=False)
        self.up = nn.ModuleList(nn.Linear(WIDTH, 24) for _ in range(8))
        self.down = nn.ModuleList(nn.Linear(24, WIDTH, bias=False) for _ in range(8))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.without_tokens: set[int] = set()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids).flatten(0, 1)
        gate, expert = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            mine = (expert == index).nonzero()[:, 0]
            if not len(mine):
                self.without_tokens.add(index)
                if index % 2:
                    continue
            out = out.index_add(0, mine, down(up(x[mine]).relu()) * gate[mine, None])
        return nn.functional.cross_entropy(self.head(x + out), labels.flatten())


def language(seed: int) -> Batch:
    return {"input_ids": tokens(seed, BATCH, SEQ), "labels": tokens(seed + 100, BATCH, SEQ)}


def padded(seed: int) -> Batch:
    batch = language(seed)
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[0, 3:] = 0
    batch["input_ids"] = batch["input_ids"] * mask
    return batch | {"attention_mask": mask, "next_sentence_label": torch.tensor([seed % 2, 1])}


def images(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(BATCH, 3, 8, 8, generator=generator),
        "labels": torch.randint(5, (BATCH,), generator=generator),
    }


#: Each with its batches and the matrices that are no weights of `nn.Linear`, `nn.Embedding` or `Conv1D`.
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch], set[str]]] = {
    "llama": (llama, language, set()),
    "gpt2": (gpt2, language, set()),  # its linear layers are Conv1D
    "bert": (bert, padded, set()),
    "vit": (vit, images, {"cls_token", "position_embeddings", "projection.weight"}),
    "t5": (t5, language, set()),
    "mixtral": (mixtral, language, {"gate_up_proj", "down_proj", "gate.weight"}),
    "linear experts": (LinearExperts, language, set()),
}


def build(name: str) -> tuple[nn.Module, Callable[[int], Batch]]:
    make, batches, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = make().float().train()
    with torch.no_grad():
        for param in model.parameters():  # biases at zero and weights of 0.02 would hide errors
            param.add_(torch.randn_like(param) * 0.1)
    if isinstance(model, LinearExperts):
        with torch.no_grad():
            model.router.weight[5:] -= 0.5 * model.embedding.weight.mean(0)
            model.router.weight[6:].zero_()  # as likely as the average: never the most likely one
    return model, batches


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    out = model(**batch)
    return out if isinstance(out, Tensor) else out.loss


def train(model: nn.Module, batches: Callable[[int], Batch], mode: str) -> None:
    """Some steps of Lomo and of the textbook; compares weights and norms."""
    arguments = {"lr": LR.get(mode, 0.2), "weight_decay": 0.01}
    textbook = Textbook(model, clip_grad_norm=MODES[mode].get("clip_grad_norm"), **arguments)
    options = dict(MODES[mode])
    if share := options.get("clip_memory"):
        options["clip_memory"] = int(share * sum(param.nbytes for param in model.parameters()))
    optimizer = Lomo(model, **arguments, **options)
    for step in range(STEPS):
        loss, expected = loss_of(model, batches(step)), loss_of(textbook.model, batches(step))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        optimizer.backward(loss)
        textbook.step(expected)
        assert optimizer.last_grad_norm.item() == pytest.approx(textbook.norm, rel=2e-6)
        assert textbook.norm > 2 * MODES[mode].get("clip_grad_norm", 0), "the clipping under test must be in force"
        assert [name for name, param in model.named_parameters() if param.grad is not None] == []
    assert_close(model, textbook.model)
    optimizer.remove()


def assert_close(model: nn.Module, expected: nn.Module) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        error = (ours - theirs).abs().max().item() / theirs.abs().max().item()
        assert error < 2e-6, f"{name} is {error:.1e} of its largest element off"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_textbook(name: str, mode: str) -> None:
    model, batches = build(name)
    before = weights_of(model)
    train(model, batches, mode)
    after = weights_of(model)
    assert all(not torch.equal(after[key], before[key]) for key in before if "down.7" not in key and "up.7" not in key)
    if isinstance(model, LinearExperts):
        assert {6, 7} <= model.without_tokens < set(range(8))
        # Called with no tokens its gradient is zero and it decays; not called it has no gradient.
        torch.testing.assert_close(
            after["down.6.weight"], before["down.6.weight"] * (1 - 0.01 * LR.get(mode, 0.2)) ** 5
        )
        assert torch.equal(after["down.7.weight"], before["down.7.weight"])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its new name is not in 5.0
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing(mode: str, use_reentrant: bool) -> None:
    model, batches = build("llama")
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert Graph(loss_of(model, batches(0))).has_reentrant_checkpoints == use_reentrant
    train(model, batches, mode)


@pytest.mark.parametrize("rule", ["rows", "adalomo"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rules_with_factors_make_the_same_steps_with_fused_layers(name: str, rule: str) -> None:
    """Vectors are frozen: the gradient of a key's bias is zero but for rounding, of which AdaLomo makes large steps."""
    weights = []
    for fused in (False, True):
        model, batches = build(name)
        for param in model.parameters():
            param.requires_grad_(param.dim() > 1)
        optimizer = Lomo(model, lr=0.003, rule=rule, fused_layers=fused)
        for step in range(STEPS):
            optimizer.backward(loss_of(model, batches(step)))
        assert [key for key, param in model.named_parameters() if param.grad is not None] == []
        weights.append(model)
    assert_close(*weights)
    trained = [key for key, param in weights[0].named_parameters() if param.requires_grad]
    before = dict(build(name)[0].named_parameters())
    assert all(
        not torch.equal(weights[1].get_parameter(key), before[key])
        for key in trained
        if "down.7" not in key and "up.7" not in key and "down.6" not in key and "up.6" not in key
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_summary_says_where_each_weight_goes(name: str) -> None:
    from transformers.pytorch_utils import Conv1D

    model, _ = build(name)
    fusable = {id(m.weight) for m in model.modules() if type(m) in (nn.Linear, nn.Embedding, Conv1D)}
    plain = {key for key, param in model.named_parameters() if param.dim() > 1 and id(param) not in fusable}
    for key in plain:
        assert key.endswith(tuple(ARCHITECTURES[name][2])), f"{key} is expected to be fused"
    assert bool(plain) == bool(ARCHITECTURES[name][2])
    with Lomo(model, fused_layers=True) as optimizer:
        lines = dict(re.findall(r"^(?:\d+ x )?(\S+) .*?(never exists|freed in its hook)", optimizer.summary(), re.M))
        for key, param in model.named_parameters():
            line = re.sub(r"(?<![^.])\d+(?![^.])", "*", key)
            assert (lines.get(line) or lines[key]) == (
                "never exists" if id(param) in fusable else "freed in its hook"
            ), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_of_the_model_shows_it(name: str, tmp_path: Path) -> None:
    """Classes, repr, state dict, copies, pickles and what save_pretrained writes, before, during and after."""
    model, batches = build(name)
    classes = [type(module) for module in model.modules()]
    shown, keys = repr(model), list(model.state_dict())
    loss_of(model, batches(0))  # some write into their config
    saved = pretrained(model, tmp_path / "before")

    optimizer = Lomo(model, lr=0.0, fused_layers=True, clip_memory=0, **CLIP)
    assert [type(module) for module in model.modules()] != classes
    optimizer.backward(loss_of(model, batches(0)))
    assert (repr(model), list(model.state_dict())) == (shown, keys)
    assert pretrained(model, tmp_path / "during") == saved
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert [type(module) for module in twin.modules()] == classes
        assert (repr(twin), list(twin.state_dict())) == (shown, keys)
        assert_same_bits(weights_of(twin), weights_of(model))
        torch.testing.assert_close(loss_of(twin, batches(1)), loss_of(model, batches(1)), rtol=0, atol=0)
        loss_of(twin, batches(1)).backward()  # its gradients are its own, and nobody takes them
        assert all(param.grad is not None for param in twin.parameters() if "experts" not in name)
    assert all(param.grad is None for param in model.parameters())

    optimizer.remove()
    assert [type(module) for module in model.modules()] == classes
    assert (repr(model), list(model.state_dict())) == (shown, keys)
    assert pretrained(model, tmp_path / "after") == saved


def pretrained(model: nn.Module, folder: Path) -> dict[str, bytes]:
    """The files that save_pretrained writes."""
    if not hasattr(model, "save_pretrained"):
        return {}
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}
