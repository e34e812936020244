"""The generator: shapes, determinism, prior, uniform centring, frozen embeddings, free logits; and the prior's ranks."""

from __future__ import annotations

import math

import pytest
import torch

from shapes import sizes, small_structure, tiny_structure
from slimtune.prune.budget import kept_ratio
from slimtune.prune.generator import Generator
from slimtune.prune.prior import Ranking, prior_logits
from slimtune.sections import GeneratorConfig

TINY = tiny_structure()
KINDS = ("transformer", "direct")


def made(kind: str = "transformer", uniform: bool = False, seed: int = 0, **keys: object) -> Generator:
    torch.manual_seed(seed)
    return Generator(TINY, GeneratorConfig(kind=kind, width=16, **keys), uniform)


def step(generator: Generator, lr: float = 0.1) -> None:
    """One SGD step on a sum that treats every unit differently."""
    loss = sum((logits * torch.linspace(-1, 2, len(logits))).sum() for logits in generator().values())
    loss.backward()
    with torch.no_grad():
        for parameter in generator.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_logit_for_every_unit_in_fp32(kind: str, uniform: bool) -> None:
    logits = made(kind, uniform)()
    assert {site: tuple(value.shape) for site, value in logits.items()} == {s: (n,) for s, n in sizes(TINY).items()}
    assert {value.dtype for value in logits.values()} == {torch.float32}
    assert list(logits) == list(TINY.sites())


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_near_its_offset(kind: str) -> None:
    logits = torch.cat(list(made(kind, offset=2.0)().values()))
    assert float((logits - 2.0).abs().max().detach()) < 0.5
    assert (float(logits.std().detach()) == 0) == (kind == "direct")


@pytest.mark.parametrize("kind", KINDS)
def test_it_depends_on_its_seed_alone_and_keeps_its_state(kind: str) -> None:
    first, again, other = made(kind), made(kind), made(kind, seed=1)
    first.train(), again.eval()
    step(first), step(again)
    assert all(torch.equal(value, again()[site]) for site, value in first().items())
    assert all(torch.equal(value, first()[site]) for site, value in first().items()), "no dropout, no moving average"
    other.load_state_dict(first.state_dict())
    assert all(torch.equal(value, other()[site]) for site, value in first().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_prior_is_added_and_saved(kind: str) -> None:
    generator = made(kind, offset=1.0)
    before = generator()
    prior = {site: torch.randn(n) for site, n in sizes(TINY).items()}
    generator.set_prior(prior)
    for site, logits in generator().items():
        assert torch.allclose(logits, before[site] + prior[site], atol=1e-6)
    again = made(kind)
    again.load_state_dict(generator.state_dict())
    step(generator)
    for index, site in enumerate(generator.sites):
        assert torch.equal(getattr(again, f"prior_{index}"), prior[site])
        assert torch.equal(getattr(generator, f"prior_{index}"), prior[site]), "the prior is no parameter"


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_centres_every_site_on_one_level_for_each_axis(kind: str) -> None:
    generator = made(kind, uniform=True, offset=1.5)
    generator.set_prior({site: torch.randn(n) + 5 * site[0] for site, n in sizes(TINY).items()})
    step(generator)
    with torch.no_grad():
        generator.level["ffn"] += 0.25
    means = {site: float(value.mean().detach()) for site, value in generator().items()}
    for axis in ("kv_group", "ffn"):
        expected = 1.5 + float(generator.level[axis].detach())
        assert [means[layer, axis] for layer in range(3)] == pytest.approx([expected] * 3, abs=1e-4)
    assert means[0, "ffn"] != pytest.approx(means[0, "kv_group"], abs=0.05)
    assert all(float(value.std().detach()) > 0.1 for value in generator().values())


@pytest.mark.parametrize("trained", [True, False])
def test_the_embedding_is_orthogonal_and_may_be_frozen(trained: bool) -> None:
    generator = made(train_embedding=trained)
    before = generator.embedding.detach().clone()
    assert torch.allclose(before @ before.T, torch.eye(3), atol=1e-5)
    step(generator), step(generator)
    assert generator.embedding.requires_grad == trained
    assert torch.equal(generator.embedding, before) != trained


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind: str) -> None:
    generator = made(kind)
    step(generator)
    generator.zero_grad()
    step(generator)
    silent = {name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == {"level.ffn", "level.kv_group"}, "levels belong to the uniform layout alone"


def test_direct_logits_move_by_the_learning_rate_times_width() -> None:
    generator = made("direct")
    before = generator()[1, "ffn"].detach()
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
    generator()[1, "ffn"].sum().backward()
    optimizer.step()
    assert torch.allclose(generator()[1, "ffn"], before - 16 * 1e-3, atol=1e-5)


# --- prior -----------------------------------------------------------------------------------------------------------


def test_prior_logits_by_hand() -> None:
    structure = tiny_structure(layers=1, groups=1, ffn=2)
    # one KV group of 1536 and two channels of 48: scores per parameter 1, 4 and 2, so ranks group, channel 1, channel 0
    scores = {(0, "kv_group"): torch.tensor([1536.0]), (0, "ffn"): torch.tensor([192.0, 96.0])}
    whole = 1536 + 2 * 48
    middles = torch.tensor([768, 1536 + 24, 1536 + 72], dtype=torch.float64) / whole
    expected = 2.0 * torch.distributions.Normal(0.0, 1.0).icdf(middles)
    prior = prior_logits(scores, structure, 2.0)
    assert float(prior[0, "kv_group"]) == pytest.approx(float(expected[0]), rel=1e-5)
    assert prior[0, "ffn"].tolist() == pytest.approx([float(expected[2]), float(expected[1])], rel=1e-5)


def test_prior_logits_depend_on_ranks_of_score_per_parameter_alone() -> None:
    scores = {site: torch.rand(n) for site, n in sizes(TINY).items()}
    prior = prior_logits(scores, TINY, 1.0)
    again = prior_logits({site: 1e-12 * value for site, value in scores.items()}, TINY, 1.0)
    assert all(torch.allclose(prior[site], again[site]) for site in prior)
    density = torch.cat([scores[layer, axis] / TINY.layers[layer].unit_params[axis] for layer, axis in TINY.sites()])
    flat = torch.cat([prior[site] for site in TINY.sites()])
    assert torch.equal(torch.argsort(density), torch.argsort(flat))
    assert flat.isfinite().all()


def test_the_level_of_a_share_is_the_normal_quantile_of_that_share() -> None:
    structure = small_structure()
    torch.manual_seed(0)
    prior = prior_logits({site: torch.rand(n).square() for site, n in sizes(structure).items()}, structure, 3.0)
    for keep in (0.3, 0.5, 0.8):
        level = -3.0 * math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * keep - 1)))
        masks = {site: (value >= level).float() for site, value in prior.items()}
        assert float(kept_ratio(masks, structure, "block")) == pytest.approx(keep, abs=0.006)


def test_ranked_within_an_axis_or_a_layer_each_of_them_keeps_the_same_share() -> None:
    structure = small_structure()
    torch.manual_seed(1)
    # later layers and KV groups have far larger scores, so the global ranking keeps them whole
    scores = {
        (layer, axis): torch.rand(n) * 10.0 ** (layer + 20 * (axis == "kv_group"))
        for (layer, axis), n in sizes(structure).items()
    }

    def kept(ranking: Ranking) -> dict[tuple[int, str], float]:
        return {
            site: float((value > 0).float().mean()) for site, value in prior_logits(scores, structure, 2.0, ranking).items()
        }

    layers = range(len(structure.layers))
    shares = {ranking: kept(ranking) for ranking in ("global", "axis", "layer")}
    half = {site: 0.5 / n for site, n in sizes(structure).items()}  # an odd unit in the middle
    assert all(abs(share - 0.5) <= half[site] for site, share in shares["layer"].items())
    assert min(shares["global"][layer, "kv_group"] for layer in layers) == 1.0
    for axis in ("kv_group", "ffn"):
        of_axis = [shares["axis"][layer, axis] for layer in layers]
        assert sum(of_axis) / len(of_axis) == pytest.approx(0.5, abs=max(half.values()))
        assert of_axis[0] == 0.0
        assert of_axis[-1] == 1.0


def test_equal_scores_give_a_prior_without_nan() -> None:
    prior = prior_logits({site: torch.zeros(n) for site, n in sizes(TINY).items()}, TINY, 2.0)
    assert all(value.isfinite().all() for value in prior.values())
    # a scale of zero is no prior at all
    flat = prior_logits({site: torch.rand(n) for site, n in sizes(TINY).items()}, TINY, 0.0)
    assert all(not value.any() for value in flat.values())
