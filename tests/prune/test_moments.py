"""A symmetric matrix kept as its half."""

from __future__ import annotations

import pytest
import torch

from slimtune.prune.moments import BLOCKS, Moments


@pytest.mark.parametrize("size", [1, 5, BLOCKS, 3 * BLOCKS + 5, 64])
def test_the_half_says_all(size: int) -> None:
    x = torch.randn(10, size, generator=torch.Generator().manual_seed(size))
    matrix = x.T @ x
    found = Moments.of(matrix)
    torch.testing.assert_close(found.whole(), matrix)
    assert torch.equal(found.whole(), found.whole().T)
    assert torch.equal(found.diagonal(), matrix.diagonal())
    assert torch.equal(found.whole(2 * found.half), 2 * found.whole())
    if size == 64:
        assert found.half.numel() == 9 * size**2 // 16
