"""The rivals in two stages (``method: twostage``)."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from slimtune.section import Section
from slimtune.sections.bounds import Positive


class TwoStageConfig(Section):
    """Of ``method: twostage``: decide once on the untuned base, cut, tune; as many windows as ``atp`` reads in all."""

    scores: Literal["random", "magnitude", "taylor", "wanda", "flap", "layer_drop", "generator"] = "taylor"
    """What ranks the units. ``magnitude``: squared weights, summed; ``taylor``: squared gradients of the gates (the loss
    change in Fisher form); ``wanda``: weight times input norm; ``flap``: fluctuation of the input times weight;
    ``layer_drop``: whole layers by how little they change the stream (ShortGPT); ``generator``: the generator of ``atp``
    trained on the frozen base for ``search.steps`` (DISP-LLM)."""
    ranking: Literal["auto", "global", "axis", "layer"] = "auto"
    """``global``: over the whole model, by score per parameter; ``axis``: KV groups and MLP channels keep the same share;
    ``layer``: so does each of them in every layer. ``auto``: layer, as published, for random, magnitude and wanda; axis for
    taylor, where it is the strongest of the three. No effect on flap, layer_drop and generator."""
    batches: Positive = 16
    """Decision batches read for the scores; they count as search tokens."""
    compensate: bool = True
    """``flap``: add what was removed, on average, to the biases of o_proj and down_proj."""
    least_squares: bool = False
    """At the cut the kept columns of o_proj and down_proj take over what the removed inputs did, as with ``compensate`` of atp;
    ``batches`` decision batches are read once more for it, by the model that the Plan leaves."""
    refit_rounds: Positive = 1
    """Fits of ``least_squares``; from the second on each reads what comes through the one before."""
    tune: bool = True
    """Off: what is cut is not tuned, so that decisions can be compared by themselves."""

    @property
    def fits(self) -> int:
        """Passes over decision batches between the decision and the cut."""
        return self.refit_rounds if self.least_squares else 0

    @model_validator(mode="after")
    def _rounds_of_something(self) -> TwoStageConfig:
        if self.refit_rounds > 1 and not self.least_squares:
            raise ValueError(
                f"twostage.refit_rounds={self.refit_rounds} repeats fits of twostage.least_squares, which is off; set it true"
            )
        return self
