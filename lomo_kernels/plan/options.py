"""The `plan` command's options, and their checks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..demo.model import Config
from ..numbers import bytes_of
from .methods import LOMO_OPTIM_NEEDS, METHODS, SHARDED, lacking
from .models import FUSED, SHAPES, Chunk, Model, of_shape, of_transformers

GIB = 2**30
#: Tensors of more bytes than a 64-bit integer holds cannot be simulated.
MOST_MEMORY, MOST_TOKENS = 2**50, 2**36
MOST_GPUS = 1024  # FSDP2 makes a view of each gathered weight for each of them
_UNITS = {"MB": 2**20, "MIB": 2**20, "GB": GIB, "GIB": GIB, "": GIB}
#: What FSDP2 gathers, and reduces, together: whole blocks; a block's attention and MLP apart; every linear layer apart.
#: Smaller groups take less memory, and more and shorter collectives.
GROUPS = ("block", "attention-mlp", "linear")
_SIZES = ("layers", "d_model", "heads", "kv_heads", "ffn", "vocab")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to the parser that `python -m lomo_kernels` makes for it."""
    shapes = ", ".join(SHAPES)
    parser.add_argument("--model", metavar="MODEL", help=f"{shapes}; or a Hugging Face config: folder, file or name")
    for name, what in zip(
        _SIZES,
        ("blocks", "width", "attention heads", "heads of keys and values", "width of the MLP", "vocabulary"),
        strict=True,
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"in place of --model: {what}")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="FSDP2 over so many (default: 1, no FSDP2)")
    parser.add_argument("--memory", default="24GB", help="of one GPU; GB are 2**30 bytes (default: %(default)s)")
    parser.add_argument("--seq", type=int, default=1024, metavar="N", help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences per GPU (default: %(default)s)")
    again = "compute each block's activations again in backward instead of keeping them"
    parser.add_argument("--checkpointing", action="store_true", help=again)
    chunk = "so many tokens' logits exist at a time, and are computed again in backward (default: all); "
    chunk += f"{FUSED!r}: blocks of them, by lomo_kernels.linear_cross_entropy"
    parser.add_argument("--chunk", type=chunk_of, metavar="TOKENS", help=chunk)
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME",
        help="those whose names begin so: adamw, sgd, lomo, ...; may be repeated (default: all)",
    )
    group = "with several GPUs, what FSDP2 gathers at a time (default: linear, the least memory)"
    parser.add_argument("--group", choices=GROUPS, help=group)
    line = "what Lomo's clip_memory buys instead: bytes kept, peak and modelled time, from two passes to one; one GPU"
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--budgets", action="store_true", help=line)
    instead.add_argument(
        "--paper", action="store_true", help="the memory columns of the paper's Tables 1 and 2 instead"
    )


def chunk_of(text: str) -> Chunk:
    """The option's value: a number of tokens, or `FUSED`."""
    return text if text == FUSED else int(text)


def check(args: argparse.Namespace) -> tuple[Model, int, list[str]]:
    """The model, the memory of one GPU in bytes, and the methods.

    Raises:
        ValueError: in words of the command line.
    """
    for name in ("gpus", "seq", "batch", "chunk", *_SIZES):
        value = getattr(args, name)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.batch * args.seq > MOST_TOKENS:
        raise ValueError(f"--batch {args.batch} of --seq {args.seq} are more than {MOST_TOKENS} tokens")
    if args.gpus > MOST_GPUS:
        raise ValueError(f"--gpus {args.gpus} are more than the {MOST_GPUS} that can be simulated")
    if args.group and args.gpus == 1:
        raise ValueError(f"--group {args.group} is of FSDP2: it needs --gpus of 2 or more")
    if args.budgets and args.gpus > 1:
        raise ValueError("--budgets is of one GPU: over several ranks all gradients are kept or none")
    if args.budgets and args.method:
        raise ValueError("--budgets is of Lomo with clipping, fused layers and plain ones: leave --method out")
    nbytes = bytes_of(args.memory, _UNITS)
    if nbytes is None:
        raise ValueError(f"--memory {args.memory} is not like 24GB, 24GiB or 500MB")
    memory = int(nbytes)
    if not memory:
        raise ValueError(f"--memory {args.memory} is none")
    if memory > MOST_MEMORY:
        raise ValueError(f"--memory {args.memory} is more than {MOST_MEMORY // GIB}GB")
    sizes = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
    if (args.model is None) == (not sizes):
        raise ValueError("give --model, or --layers, --d-model, --heads, --ffn and --vocab")
    if sizes:
        absent = [name for name in _SIZES if name not in sizes and name != "kv_heads"]
        if absent:
            raise ValueError(f"--{absent[0].replace('_', '-')} is missing")
        model = of_shape(Config(**({"kv_heads": sizes["heads"]} | sizes)))
    elif args.model in SHAPES:
        model = of_shape(SHAPES[args.model])
    else:
        try:
            model = of_transformers(args.model)
        except ImportError:
            raise ValueError(
                f"--model {args.model}: none of {', '.join(SHAPES)}; for others: pip install transformers"
            ) from None
        except (OSError, ValueError) as error:
            raise ValueError(f"--model {args.model}: {str(error).splitlines()[0]}") from None
    if args.seq > model.longest:
        raise ValueError(f"--seq {args.seq} is more than the {model.longest} tokens of the model's config")
    return model, memory, chosen(args.method, args.gpus)


def chosen(names: Sequence[str] | None, gpus: int) -> list[str]:
    """The methods whose names begin with one of `names`; those that can be sharded where there are several GPUs.

    Raises:
        ValueError: a name is the beginning of none.
    """
    possible = [name for name in METHODS if gpus == 1 or name in SHARDED]
    possible = [name for name in possible if not (name.startswith("lomo_optim") and lacking(LOMO_OPTIM_NEEDS))]
    if not names:
        return possible
    selected = []
    for begin in names:
        those = [name for name in possible if name.lower().startswith(begin.lower())]
        if not those:
            raise ValueError(f"--method {begin} is none of: {'; '.join(possible)}")
        selected += those
    return list(dict.fromkeys(selected))
