"""Which elements of a whole parameter a rank has: what engines tell the rules with row and column factors."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lomo_kernels.optim.engines.dtensor import cut_block, shard_of
from lomo_kernels.optim.placement import Block, blocks_of_range

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A tensor whose elements are their own positions."""
    return torch.arange(math.prod(shape)).view(shape)


def elements_of(block: Block, shape: tuple[int, ...]) -> Tensor:
    within = tuple(slice(first, first + length) for first, length in zip(block.start, block.shape, strict=True))
    elements = numbered(shape)[within]
    assert elements.shape == block.shape, "the block ends within the tensor"
    return elements


@given(shapes, st.data())
def test_a_range_is_few_blocks_in_its_order(shape: tuple[int, ...], data: Any) -> None:
    begin = data.draw(st.integers(0, math.prod(shape)))
    end = data.draw(st.integers(0, math.prod(shape)))
    blocks = blocks_of_range(shape, begin, end)
    elements = [elements_of(block, shape).flatten() for block in blocks]
    assert torch.cat([torch.arange(0), *elements]).tolist() == list(range(begin, end))
    assert len(blocks) <= max(2 * len(shape) - 1, 1)
    assert all(block.numel() for block in elements)


def test_a_row_that_is_cut() -> None:
    """The rest of a row, whole rows, the beginning of a row."""
    assert blocks_of_range((5, 4), 3, 13) == (((0, 3), (1, 1)), ((1, 0), (2, 4)), ((3, 0), (1, 1)))
    assert blocks_of_range((5, 4), 5, 7) == (((1, 1), (1, 2)),)
    assert blocks_of_range((5, 4), 4, 12) == (((1, 0), (2, 4)),)


def part_of(tensor: Tensor, dim: int, parts: int, index: int) -> Tensor:
    """As `fully_shard` and `distribute_tensor` cut. Ranks behind the last chunk have nothing."""
    chunks = tensor.chunk(parts, dim) if tensor.shape[dim] else ()
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)


PLACEMENTS = st.one_of(st.just(Replicate()), st.integers(0, 2).map(Shard))


@given(st.tuples(*[st.integers(1, 9)] * 3), st.lists(st.tuples(st.integers(1, 4), PLACEMENTS), max_size=3))
def test_cuts_in_the_order_of_the_mesh(shape: tuple[int, ...], cuts: list[tuple[int, Any]]) -> None:
    mesh, placements = tuple(parts for parts, _ in cuts), [placement for _, placement in cuts]
    for coordinate in itertools.product(*map(range, mesh)):
        expected = numbered(shape)
        for parts, index, placement in zip(mesh, coordinate, placements, strict=True):
            if not placement.is_replicate():
                expected = part_of(expected, placement.dim, parts, index)
        check(cut_block(shape, mesh, coordinate, placements), shape, expected)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4))
def test_what_fully_shard_makes_of_tensor_parallel(rows: int, outer: int, tensor: int) -> None:
    """Tensor parallel's ranks lie inside of FSDP2's, and cut first. Neither has to divide evenly."""
    shape, placements = (rows, 3), [_StridedShard(0, split_factor=tensor), Shard(0)]
    for coordinate in itertools.product(range(outer), range(tensor)):
        expected = part_of(part_of(numbered(shape), 0, tensor, coordinate[1]), 0, outer, coordinate[0])
        check(cut_block(shape, (outer, tensor), coordinate, placements), shape, expected)


def check(block: Block | None, shape: tuple[int, ...], expected: Tensor) -> None:
    assert block is not None
    assert block.shape == expected.shape
    assert torch.equal(elements_of(block, shape), expected)
    shard = shard_of(block, shape)
    if shard is not None and expected.numel():
        offset, length, stride = shard
        index = torch.arange(expected.numel())
        assert torch.equal(offset + index // length * stride + index % length, expected.flatten())


def test_rows_that_do_not_follow_each_other() -> None:
    assert cut_block((8, 2), (2,), (0,), [_StridedShard(0, split_factor=2)]) is None


@pytest.mark.parametrize(("shape", "dim"), [((4, 3), -1), ((4, 3), 1)])
def test_a_dimension_counted_from_the_end(shape: tuple[int, ...], dim: int) -> None:
    placement: Any = SimpleNamespace(dim=dim, is_replicate=lambda: False)
    assert cut_block(shape, (2,), (1,), [placement]) == ((0, 2), (4, 1))
