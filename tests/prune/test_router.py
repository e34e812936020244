from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slimtune.prune.router import Router
from slimtune.structure.experts import HOSTS

SCORES = ("mixtral", "glm4_moe")


def router(host: str, top_k: int = 2, number: int = 5, hidden: int = 8) -> Router:
    torch.manual_seed(0)
    made = Router(hidden, 1, number, top_k, HOSTS[host])
    with torch.no_grad():
        made.weights[0].copy_(torch.randn(number, hidden))
    return made


def sample(rows: int = 2, tokens: int = 7, hidden: int = 8) -> Tensor:
    return torch.randn(rows, tokens, hidden, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("host", SCORES)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_weights_of_the_chosen_experts_add_up_to_their_number(host: str, top_k: int) -> None:
    made, x = router(host, top_k).eval(), sample()
    with torch.no_grad():
        weights = made.combined(0, x)
    assert ((weights > 0).sum(-1) == top_k).all()
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 7), float(top_k)))
    best = (x @ made.weights[0].T).topk(top_k, -1).indices
    assert torch.equal((weights > 0).nonzero()[:, 2].view(2, 7, top_k), best.sort(-1).values)
    if top_k == 1:
        assert set(weights.unique().tolist()) == {0.0, 1.0}


def test_weights_are_those_of_the_papers_by_hand() -> None:
    for host, values in (("mixtral", torch.tensor([2.0, 1.0]).exp()), ("glm4_moe", torch.tensor([2.0, 1.0]).sigmoid())):
        made = router(host, 2, number=3, hidden=3).eval()
        with torch.no_grad():
            made.weights[0].copy_(torch.diag(torch.tensor([2.0, 0.5, 1.0])))
            found = made.combined(0, torch.ones(1, 1, 3))[0, 0]
        expected = 2 * values / values.sum()
        torch.testing.assert_close(found, torch.stack([expected[0], torch.tensor(0.0), expected[1]]))


@pytest.mark.parametrize("host", SCORES)
def test_an_expert_that_was_not_chosen_has_a_gradient_too(host: str) -> None:
    made, x = router(host, 1).train(), sample(1, 1)
    weights = made.combined(0, x)
    chosen = int(weights.argmax())
    other = (chosen + 1) % 5
    weights[0, 0, other].backward()  # more of it
    step = made.weights[0].grad @ x[0, 0]
    assert step[other] > 0
    assert step[chosen] < 0


@pytest.mark.parametrize("host", SCORES)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_balance_is_differentiated_along(host: str, recompute: bool) -> None:
    made, x = router(host, 2).train(), sample().requires_grad_()
    made.balance = 0.5
    found = checkpoint(lambda each: made.combined(0, each), x, use_reentrant=False) if recompute else made.combined(0, x)
    (0 * found).sum().backward()
    got, made.weights[0].grad = made.weights[0].grad, None
    logits = made.logits(0, x.detach())
    used = torch.zeros_like(logits).scatter(-1, logits.topk(2, -1).indices, 1.0).mean((0, 1)) / 2
    (0.5 * 5 * (used * made.shares(logits).mean((0, 1))).sum()).backward()
    torch.testing.assert_close(got, made.weights[0].grad)
    assert got.abs().max() > 0


def test_noise_is_for_training_alone() -> None:
    made, x = router("mixtral").train(), sample()
    made.noise = 5.0
    assert not torch.equal(made.combined(0, x), made.combined(0, x))
    made.eval()
    assert torch.equal(made.combined(0, x), made.combined(0, x))


def test_masks_are_those_of_the_experts_of_each_token() -> None:
    made, x = router("mixtral", 2).eval(), sample()
    masks = (torch.rand(6, 11, generator=torch.Generator().manual_seed(2)) < 0.4).float()
    with torch.no_grad():
        made.follow(0, x)
        found, weights = made.mask(0, masks), made.routed[0]
    for row in range(2):
        for token in range(7):
            expected = masks[0] + sum(weights[row, token, expert] * masks[1 + expert] for expert in range(5))
            torch.testing.assert_close(found[row, token], expected)


def test_the_router_computes_in_the_precision_of_its_class() -> None:
    x = (100 * sample()).bfloat16()
    narrow, wide = router("mixtral").eval(), router("glm4_moe").eval()
    for made in (narrow, wide):
        made.rounded(torch.bfloat16)
    torch.testing.assert_close(
        narrow.logits(0, x), torch.nn.functional.linear(x, narrow.weights[0].bfloat16()).float(), rtol=0, atol=0
    )
    torch.testing.assert_close(wide.logits(0, x), x.float() @ wide.weights[0].T, rtol=1e-6, atol=1e-4)
    assert not torch.equal(narrow.logits(0, x), wide.logits(0, x))


def test_choices_are_counted() -> None:
    made, x = router("mixtral", 2).eval(), sample()
    made.counts = torch.zeros(1, 5, dtype=torch.long)
    with torch.no_grad():
        made.follow(0, x)
        made.follow(0, x)
        assert torch.equal(made.counts[0], 2 * (made.routed[0] > 0).flatten(0, 1).sum(0))
    made.forget()
    assert not made.routed
