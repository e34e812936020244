from __future__ import annotations

import torch

from slimtune.prune.cmoe import cmoe_split
from slimtune.prune.split import logits_of, split

NUMBER, WIDTH, SHARED, LEFT = 4, 10, 12, 6
SIZES = torch.tensor([SHARED, *[WIDTH] * NUMBER, LEFT])


def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of four kinds, told by their inputs: energies [T, F], inputs [T, D], and the slot each channel was made for."""
    rng = torch.Generator().manual_seed(0)
    kinds = torch.randint(NUMBER, (600,), generator=rng)
    x = torch.randn(NUMBER, 16, generator=rng)[kinds] + 0.2 * torch.randn(600, 16, generator=rng)
    slots = torch.repeat_interleave(torch.arange(NUMBER + 2), SIZES)[torch.randperm(int(SIZES.sum()), generator=rng)]
    level = torch.zeros(600, len(slots))
    level[:, slots == 0] = 2.0
    for kind in range(NUMBER):
        level[:, slots == kind + 1] = (kinds == kind).float()[:, None]
    noise = torch.rand(600, len(slots), generator=rng)
    return (level + 0.05) * noise, x, slots


def agreement(found: torch.Tensor, slots: torch.Tensor) -> None:
    """The same parts, whatever the experts are called."""
    assert torch.equal(found == 0, slots == 0)
    assert torch.equal(found == NUMBER + 1, slots == NUMBER + 1)
    for slot in range(1, NUMBER + 1):
        assert len(set(found[slots == slot].tolist())) == 1


def test_channels_that_work_for_the_same_tokens_come_together() -> None:
    from slimtune.prune.assign import assign

    energy, x, slots = planted()
    made = split(energy, x, SIZES, 1, seed=0)
    found = assign(made.scores[None], SIZES)[0]
    agreement(found, slots)
    chosen = (x @ made.weight.T).argmax(1)
    caught = torch.stack([energy[token, found == chosen[token] + 1].sum() for token in range(len(x))]).sum()
    routed = energy[:, (slots > 0) & (slots <= NUMBER)].sum()
    assert caught > 0.75 * routed  # the rest is noise in the other experts: a fifth of it
    assert torch.bincount(chosen, minlength=NUMBER).min() > 100


def test_the_rival_shares_what_is_active_most_often() -> None:
    energy, x, slots = planted()
    energy[:, slots == 0] += 3.0
    made = cmoe_split(energy, x, SIZES)
    found = made.scores.argmax(1)
    assert torch.bincount(found, minlength=NUMBER + 2).tolist() == SIZES.tolist()
    assert (found[slots == 0] == 0).float().mean() > 0.8
    assert torch.isfinite(made.weight).all()


def test_overlapping_experts_may_share_channels() -> None:
    energy, x, slots = planted()
    sizes = torch.tensor([0, *[WIDTH + SHARED] * NUMBER, 0])
    made = split(energy, x, sizes, 1, seed=0, overlap=True)
    best = made.scores[:, 1:-1].topk(WIDTH + SHARED, 0).indices
    for expert in range(NUMBER):
        assert set((slots == 0).nonzero().flatten().tolist()) <= set(best[:, expert].tolist())


def test_logits_keep_the_order_of_scores_and_have_the_scale_asked_for() -> None:
    scores = torch.rand(2, 50, 6, generator=torch.Generator().manual_seed(4)) ** 3
    logits = logits_of(scores, 4.0)
    torch.testing.assert_close(logits.flatten(1).std(1), torch.tensor([4.0, 4.0]))
    assert torch.equal(logits[0, :, 2].argsort(), scores[0, :, 2].argsort())
