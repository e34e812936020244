"""How a dense model becomes a mixture of experts (``method: tomoe``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from slimtune.section import Section
from slimtune.sections.bounds import Count, Positive


class MoeConfig(Section):
    """Experts of ``method: tomoe``. ``budget.keep`` is then the part of the parameters that a token uses."""

    earlier: ClassVar[Mapping[str, str]] = {"tokens": "prior_tokens"}

    experts: Literal["partition", "overlap"] = "partition"
    """``partition``: each MLP channel is in one expert, in the shared one or in none, so nothing is stored twice; ``overlap``:
    as published, experts are subsets of all channels, and a file holds a channel once for each expert that has it."""
    number: Positive | Literal["auto"] = "auto"
    """Routed experts of a layer. ``auto``: 8 for ``overlap``, for ``partition`` about four times ``top_k``: as many as leave
    few channels out."""
    top_k: Positive | Literal["auto"] = "auto"
    """Routed experts that a token uses. ``auto``: 1 for ``overlap`` (published so), 4 for ``partition``."""
    shared: bool = True
    """``partition``: a shared expert that every token uses, as wide as several routed ones. Without one the model is a Mixtral,
    Qwen2-MoE or Qwen3-MoE, with one a GLM4-MoE or Dots1."""
    groups: Positive | Literal["auto", "all"] = "auto"
    """KV groups (with their query heads) that stay in every layer, those of the largest squared gradients. ``auto``: attention
    loses about half of 1 - ``budget.keep`` (a quarter at 0.5), a group more or fewer where widths by
    ``budget.ffn_multiple`` meet the budget so; ``all``: attention stays as it is."""
    attention: Literal["groups", "pairs", "tokens"] = "groups"
    """What a token does without of attention. ``groups``: whole KV groups, for good; ``pairs``: rotary pairs of q and k, the
    same for all tokens, as zeros; ``tokens``: those, and for every token its own dimensions of v and of what o_proj reads
    (published; in a class that the folder carries). With the latter two all groups stay."""
    refit: bool = True
    """o_proj and down_proj are fitted by least squares to what they would add with all channels: while experts are found, and
    once they are decided."""
    refit_every: Count = 20
    """Steps of the search from one fit to the next; 0: none before the experts are decided."""
    refit_rounds: Positive = 2
    """Fits once they are decided: each reads what comes through the one before."""
    damping: Annotated[float, Field(gt=0.0)] = 0.01
    """What ``refit`` adds to the diagonal of its normal equations, in units of their mean square."""
    tune: bool = True
    """LoRA learns while experts are found (one stage). Off: the base is frozen until ``recover``, as published."""
    generator: Literal["gru", "direct"] = "gru"
    """What makes the logits: a bidirectional GRU over the layers with a decoder for each (published), or free ones."""
    prior: Literal["energy", "cmoe", "none"] = "energy"
    """Where the search starts. ``energy``: from a split of the channels by what they add for which tokens of decision data, and
    routers fitted to that by least squares; ``cmoe``: from that of CMoE (with ``search.steps=0`` and ``refit=false`` the
    rival); ``none``: from experts that are all alike (published)."""
    prior_steps: Positive = 16
    """Decision batches read for the prior, and once more for each fit of ``refit``."""
    prior_tokens: Count = 4096
    """Tokens a layer that the prior keeps of what it reads."""
    prior_scale: Annotated[float, Field(ge=0.0)] = 4.0
    """Standard deviation of the prior's logits over the channels."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """Peak learning rate (AdamW) of the generator."""
    router_lr: Annotated[float, Field(gt=0.0)] = 1e-4
    """Peak learning rate (AdamW) of the routers."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    """Weight decay (AdamW) of the generator's decoders."""
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradient-norm clip, of the generator and of routers and masks of tokens, each by itself."""
    temperature: Annotated[float, Field(gt=0.0)] = 0.4
    """Temperature of the relaxed masks as the search begins; with ``prior: none`` of relaxed routing, too, throughout."""
    final_temperature: Annotated[float, Field(gt=0.0)] = 0.2
    """Temperature of the relaxed masks as the search ends; it falls geometrically (published: 0.4, it stays)."""
    explore: Annotated[float, Field(ge=0.0)] = 0.0
    """Factor of the noise on masks and routing while experts are found; 1 as published."""
    kd: Annotated[float, Field(ge=0.0)] | None = None
    """Factor of the divergence from the base while experts are found. Default: 0 with ``tune``, 2 without (published)."""
    ce: Annotated[float, Field(ge=0.0)] | None = None
    """Factor of the cross-entropy while experts are found. Default: 1 with ``tune``, 0 without (published)."""
    balance: Annotated[float, Field(ge=0.0)] = 0.1
    """Factor of the load balance, in each layer: the number of experts times the sum over them of share of tokens times mean
    score (published: 1 without the number, in the mean of the layers, here 1 / (layers x experts))."""
    union: Annotated[float, Field(ge=0.0)] = 3.0
    """``overlap`` with ``prior: none``: factor of the penalty on channels that are in no expert, in the mean of the layers
    (published: 3 in the mean of layers and attentions, here 1.5)."""
    budget: Annotated[float, Field(ge=0.0)] = 16.0
    """``overlap`` with ``prior: none``: factor of the penalty |log(active / target)|, while widths are free."""

    def fits(self, steps: int) -> int:
        """Fits of ``refit`` in a run of so many search steps."""
        searched = -(-steps // self.refit_every) if self.refit_every else 0
        return (searched + self.refit_rounds) if self.refit else 0

    def passes(self, steps: int) -> int:
        """Passes over decision batches: for KV groups where some may go, for the prior and for each fit."""
        return (self.attention == "groups" and self.groups != "all") + (self.prior != "none") + self.fits(steps)

    @property
    def chosen(self) -> int:
        """Routed experts that a token uses."""
        return (1 if self.experts == "overlap" else 4) if self.top_k == "auto" else self.top_k

    @property
    def factors(self) -> tuple[float, float]:
        """Of divergence and cross-entropy while experts are found."""
        kd = (0.0 if self.tune else 2.0) if self.kd is None else self.kd
        ce = (1.0 if self.tune else 0.0) if self.ce is None else self.ce
        return kd, ce


def unsearched(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe as it is given, with ``search.steps`` at 0 where it makes experts of a split and does not name that key.

    A search finds nothing that the split has not, unless the base stays frozen (docs/decisions, 0036 and 0038).
    """
    moe, search = raw.get("moe") or {}, raw.get("search") or {}
    prior = moe.get("prior") if isinstance(moe, Mapping) else getattr(moe, "prior", None)
    if raw.get("method") != "tomoe" or prior == "none" or not isinstance(search, Mapping) or "steps" in search:
        return raw
    return {**raw, "search": {**search, "steps": 0}}
