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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "size"), [(4096, 200), (1001, 37), (1, 8), (0, 16)])
def test_moments_of_short_numbers_are_their_exact_products(dtype: torch.dtype, count: int, size: int) -> None:
    x = torch.randn(count, size, device="cuda").to(dtype)
    exact = x.double().T @ x.double()
    found = Moments.of_inputs(x).whole().double()
    assert float((found - exact).norm()) <= 1e-5 * float(exact.norm())
