"""Real text that every machine with Python already has, as bytes; batches and held-out windows of it."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

# Tests are repetitive, `pydoc_data` holds the text used for fine-tuning, the rest is not the standard library's.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}


def stdlib_sources() -> bytes:
    """The standard library's Python sources (some 12 MB), one after another in the order of their paths.

    Raises:
        ValueError: this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = sorted(path.as_posix() for path in files if _SKIPPED_FOLDERS.isdisjoint(path.parts))
    if not kept:
        raise ValueError("this Python comes without the sources of its standard library, the text to pre-train on")
    return b"\n".join((root / path).read_bytes() for path in kept)


def documentation_topics() -> bytes:
    """The language reference behind Python's `help()` (some 0.5 MB), its topics in alphabetical order.

    Raises:
        ValueError: this Python comes without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python comes without pydoc_data, the text to fine-tune on: name one by --text") from None
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def file_text(path: str) -> bytes:
    """The bytes of a file of the user's.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"--text {path}: {error.strerror}") from None


def to_tensor(text: bytes) -> torch.Tensor:
    """uint8 [len(text)], a copy."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(text: torch.Tensor, *, count: int, batch: int, seq: int, seed: int) -> Iterator[torch.Tensor]:
    """Random windows of a text.

    Args:
        text: uint8 [n], n > seq.
        count: number of batches.
        seed: the same seed gives the same batches.

    Yields:
        int64 [batch, seq + 1]: inputs are `[:, :-1]`, targets `[:, 1:]`.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(text) - seq, (batch, 1), generator=generator, dtype=torch.int64, device="cpu")
        yield text[starts + torch.arange(seq + 1, dtype=torch.int64, device="cpu")].long()


def windows(text: torch.Tensor, *, limit: int, seq: int) -> torch.Tensor:
    """At most `limit` windows that do not overlap, spread evenly over a text (uint8 [n], n > seq).

    Returns:
        int64 [windows, seq + 1], at least one window.
    """
    whole = len(text) // (seq + 1)
    chosen = torch.linspace(0, whole - 1, min(limit, whole), dtype=torch.float32, device="cpu").long()
    return text[chosen[:, None] * (seq + 1) + torch.arange(seq + 1, dtype=torch.int64, device="cpu")].long()
