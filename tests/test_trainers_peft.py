"""PEFT: adapters train as with SGD, also over a frozen base of integers; late ones are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.trainers import EQUAL, STEPS, TABLES, TOLERANCE, furthest, needs, refusal
from torch import Tensor, nn

from lomo_kernels import Lomo

needs("transformers", "peft")
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

LR, CLIP = 0.3, 0.2
OPTIONS = [{}, {"clip_grad_norm": CLIP}, {"clip_grad_norm": CLIP, "fused_layers": True, "clip_memory": 0}]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def config(**options: Any) -> LoraConfig:
    return LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **options
    )


def tokens(step: int) -> Tensor:
    return torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: Any, clip: float | None, steps: range = range(STEPS)) -> None:
    for step in steps:
        loss = model(tokens(step), labels=tokens(step)).loss
        if isinstance(optimizer, Lomo):
            optimizer.backward(loss)
            continue
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def trained(model: nn.Module) -> nn.ParameterList:
    return nn.ParameterList(param for param in model.parameters() if param.requires_grad)


def compare(make: Any, options: dict[str, Any], setting: str) -> None:
    """Trains two models that `make` makes, and compares their adapters."""
    model, reference, before = make(), make(), make()
    train(model, Lomo(model, lr=LR, **options), None)
    train(reference, torch.optim.SGD(trained(reference), lr=LR), options.get("clip_grad_norm"))
    assert TABLES["peft"][setting] == EQUAL
    assert furthest(trained(model), trained(reference)) <= TOLERANCE
    assert furthest(trained(model), trained(before)) > 0.01, "nothing was trained"


ADAPTERS = {"LoRA": {}, "DoRA": {"use_dora": True}, "`modules_to_save`": {"modules_to_save": ["lm_head"]}}


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "clipped", "fused, two passes"])
@pytest.mark.parametrize("setting", ADAPTERS)
def test_adapters(setting: str, options: dict[str, Any]) -> None:
    compare(lambda: get_peft_model(llama(), config(**ADAPTERS[setting])), options, setting)


def quantized(bits: int) -> nn.Module:
    """As Transformers' quantizers exchange a model's linear layers."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes (125 MB) is not installed")
    model = llama()
    for block in model.model.layers:
        for name in ("q_proj", "v_proj"):
            plain = getattr(block.self_attn, name)
            sizes = plain.in_features, plain.out_features
            if bits == 4:
                layer: Any = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                layer.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
            else:
                layer = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
            setattr(block.self_attn, name, layer.to("cpu"))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    peft_model = get_peft_model(model, config())
    kinds = {param.dtype for param in peft_model.parameters() if not param.requires_grad}
    assert (torch.uint8 if bits == 4 else torch.int8) in kinds
    return peft_model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "clipped", "fused, two passes"])
@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_over_integers(bits: int, options: dict[str, Any]) -> None:
    kind = "a base in int8 (bitsandbytes, LoRA)" if bits == 8 else "a base in 4 bits (bitsandbytes, QLoRA)"
    compare(lambda: quantized(bits), options, kind)


class Int8Linear(nn.Module):
    """A frozen layer of integers, as quantizers keep them, without their packages."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.scale = float(plain.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((plain.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float() * self.scale)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "clipped", "fused, two passes"])
def test_adapters_over_frozen_int8_parameters(options: dict[str, Any]) -> None:
    def make() -> nn.Module:
        model = get_peft_model(llama(), config())
        for block in model.base_model.model.model.layers:
            block.mlp.up_proj = Int8Linear(block.mlp.up_proj)
        return model

    compare(make, options, "LoRA")


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "clipped", "fused, two passes"])
@pytest.mark.parametrize("later", [False, True], ids=["from the beginning", "added later"])
def test_a_second_adapter(later: bool, options: dict[str, Any]) -> None:
    def make() -> Any:
        return get_peft_model(llama(), config())

    model, reference = make(), make()
    torch.manual_seed(1)
    if not later:
        model.add_adapter("second", config())
    optimizer = Lomo(model, lr=LR, **options)
    train(model, optimizer, None, range(2))
    if later:
        model.add_adapter("second", config())
    model.set_adapter("second")
    if later:
        optimizer.add_param_group({"params": [named for named in model.named_parameters() if ".second." in named[0]]})
    train(model, optimizer, None, range(2, STEPS))
    torch.manual_seed(1)
    reference.add_adapter("second", config())
    clip = options.get("clip_grad_norm")
    train(reference, torch.optim.SGD(trained(reference), lr=LR), clip, range(2))
    reference.set_adapter("second")
    train(reference, torch.optim.SGD(trained(reference), lr=LR), clip, range(2, STEPS))
    assert furthest(trained(model), trained(reference)) <= TOLERANCE
    setting = (
        "`add_param_group` for an adapter that was added later"
        if later
        else ("an adapter that is there from the beginning is activated later")
    )
    assert TABLES["peft"][setting] == EQUAL


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "clipped", "fused, two passes"])
@pytest.mark.parametrize("both", [False, True], ids=["alone", "beside the first"])
def test_an_adapter_that_comes_too_late(both: bool, options: dict[str, Any]) -> None:
    model = get_peft_model(llama(), config())
    optimizer = Lomo(model, lr=LR, **options)
    train(model, optimizer, None, range(1))
    model.add_adapter("second", config())
    model.base_model.set_adapter(["default", "second"] if both else ["second"])
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match=refusal("peft", "`add_adapter` after the optimizer was made")):
        train(model, optimizer, None, range(1))
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_adapters_of_a_model_whose_optimizer_was_made_before() -> None:
    model = llama()
    optimizer = Lomo(model, lr=LR)
    adapted = get_peft_model(model, config())
    with pytest.raises(RuntimeError, match=refusal("peft", "`get_peft_model` after the optimizer was made")):
        train(adapted, optimizer, None, range(1))


def test_adapters_that_an_optimizer_of_groups_does_not_know() -> None:
    """It has no model to look at."""
    model = llama()
    optimizer = Lomo(list(model.parameters()), lr=LR)
    adapted = get_peft_model(model, config())
    with pytest.raises(RuntimeError, match=r"no gradient came.*PEFT's adapters"):
        train(adapted, optimizer, None, range(1))
