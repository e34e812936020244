"""The trainable generator: logits of keeping every unit of every layer (ATP specification 5.2; 1.2a is the paper's form)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimtune.prune.gates import Masks, Site
from slimtune.sections import GeneratorConfig
from slimtune.structure.axes import Structure


class Generator(nn.Module):
    """``forward() -> {site: logits [units]}``, fp32, offset and prior included."""

    def __init__(self, structure: Structure, config: GeneratorConfig, uniform: bool = False):
        """Draw the starting weights (seed torch before).

        Args:
            structure: what can be cut.
            config: the recipe's section.
            uniform: equal expected widths in all layers: logits of a site are centred on one shared level per axis.
        """
        super().__init__()
        self.sites: list[Site] = list(structure.sites())
        self.units = {site: structure.layers[site[0]].units[site[1]] for site in self.sites}
        self.offset = config.offset
        self.uniform = uniform
        n_layers = len(structure.layers)
        self.trunk: nn.Module | None = None
        if config.kind == "transformer":
            embedding = torch.empty(n_layers, config.width)
            nn.init.orthogonal_(embedding)
            self.embedding = nn.Parameter(embedding, requires_grad=config.train_embedding)
            layer = nn.TransformerEncoderLayer(
                config.width, config.heads, 4 * config.width, dropout=0.0, batch_first=True, norm_first=True
            )
            self.trunk = nn.TransformerEncoder(layer, config.depth, norm=nn.LayerNorm(config.width), enable_nested_tensor=False)
            self.heads = nn.ParameterList(
                torch.randn(self.units[site], config.width) * (0.1 / config.width) for site in self.sites
            )
        else:
            # times width, so that one learning rate moves the logits of both kinds about equally fast
            self.scale = float(config.width)
            self.free = nn.ParameterList(torch.zeros(self.units[site]) for site in self.sites)
        self.level = nn.ParameterDict({axis: torch.zeros(()) for axis in sorted({axis for _, axis in self.sites})})
        for index, site in enumerate(self.sites):
            self.register_buffer(f"prior_{index}", torch.zeros(self.units[site]))

    def set_prior(self, prior: Masks) -> None:
        """Start from these logits (zero mean over the model) instead of from equal ones."""
        for index, site in enumerate(self.sites):
            getattr(self, f"prior_{index}").copy_(prior[site])

    def forward(self) -> dict[Site, Tensor]:
        state = self.trunk(self.embedding[None])[0] if self.trunk is not None else None
        logits = {}
        for index, site in enumerate(self.sites):
            raw = self.heads[index] @ state[site[0]] if state is not None else self.free[index] * self.scale
            raw = raw + getattr(self, f"prior_{index}")
            if self.uniform:
                raw = raw - raw.mean() + self.level[site[1]]
            logits[site] = raw + self.offset
        return logits
