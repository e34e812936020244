"""What a forward pass must read and compute, counted from the model itself: the measure that times are held to.

B rows, T tokens of a prompt, C tokens of context in the cache. A decode step of B rows reads every weight but an untied
embedding (of which it reads B rows) and keys and values of B C tokens; a token computes 2 operations a weight of the blocks'
linears and of the head, and 4 a query channel and token of context (scores, and their sum of values). A prompt of T tokens
is T times the blocks, the head once, and T (T + 1) / 2 pairs of tokens. Of E experts a token goes through k; B rows, where they
choose evenly, read E (1 - (1 - k / E)^B) of them, and a prompt all.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Work:
    """Counts of one model; ``flops`` are multiplications and additions.

    Attributes:
        parameters: all, tied ones once.
        weight_bytes: of all of them.
        step_bytes: of those that a decode step reads, all experts among them.
        expert_bytes: of all experts.
        chosen: k / E, the part of the experts that a token goes through; 1 without such.
        kv_bytes: keys and values of one token of one row, by layer.
        block_flops: of a token, in the linears, routers and chosen experts of all blocks.
        head_flops: of a token's logits.
        pair_flops: of a token with one token of context, by layer.
        windows: tokens that a layer looks back on, its own included, by layer; 0: all.
    """

    parameters: int
    weight_bytes: int
    step_bytes: int
    expert_bytes: int
    chosen: float
    kv_bytes: tuple[int, ...]
    block_flops: int
    head_flops: int
    pair_flops: tuple[int, ...]
    windows: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any) -> Work:
        """Count ``model``, with one forward pass of one token, whose cache tells the widths of its keys."""
        parameters = list(model.parameters())
        head = model.get_output_embeddings()
        embedding = model.get_input_embeddings().weight
        weight_bytes = sum(each.numel() * each.element_size() for each in parameters)
        unread = 0 if head.weight is embedding else embedding.numel() * embedding.element_size()
        inside = [each for each in parameters if each.ndim > 1 and each is not embedding and each is not head.weight]
        experts = [each for each in inside if each.ndim == 3]
        chosen = getattr(model.config, "num_experts_per_tok", len(experts[0])) / len(experts[0]) if experts else 1.0
        cache = cache_of(model(torch.zeros(1, 1, dtype=torch.long, device=embedding.device), use_cache=True))
        keys = [layer.keys for layer in cache.layers]
        group = model.config.num_attention_heads // (model.config.num_key_value_heads or model.config.num_attention_heads)
        return cls(
            parameters=sum(each.numel() for each in parameters),
            weight_bytes=weight_bytes,
            step_bytes=weight_bytes - unread,
            expert_bytes=sum(each.numel() * each.element_size() for each in experts),
            chosen=chosen,
            kv_bytes=tuple(2 * each.numel() * each.element_size() for each in keys),
            block_flops=2 * sum(round(each.numel() * chosen) if each.ndim == 3 else each.numel() for each in inside),
            head_flops=2 * head.weight.numel(),
            pair_flops=tuple(4 * group * each.numel() for each in keys),
            windows=tuple(int(getattr(layer, "sliding_window", 0) or 0) for layer in cache.layers),
        )

    def decode_bytes(self, batch: int, context: int) -> int:
        """Least that one step reads, where its rows choose experts evenly."""
        kept = sum(each * seen for each, seen in zip(self.kv_bytes, self._seen(context), strict=True))
        return self.step_bytes - round(self.expert_bytes * (1 - self.chosen) ** batch) + batch * kept

    def decode_flops(self, batch: int, context: int) -> int:
        """Of one step."""
        pairs = sum(each * seen for each, seen in zip(self.pair_flops, self._seen(context), strict=True))
        return batch * (self.block_flops + self.head_flops + pairs)

    def prefill_flops(self, batch: int, tokens: int) -> int:
        """Of prompts of ``tokens`` each, up to the logits of their last one."""
        pairs = 0
        for each, window in zip(self.pair_flops, self.windows, strict=True):
            near = min(window or tokens, tokens)  # a word of the beginning sees what there is, a later one the window
            pairs += each * (near * (near + 1) // 2 + (tokens - near) * near)
        return batch * (tokens * self.block_flops + self.head_flops + pairs)

    def _seen(self, context: int) -> list[int]:
        return [min(window or context, context) for window in self.windows]

    def facts(self) -> dict[str, int]:
        """Counts by name, those by layer summed."""
        return {
            key: sum(value) if isinstance(value, tuple) else value for key, value in asdict(self).items() if key != "windows"
        }


def cache_of(outputs: Any) -> Any:
    """Keys and values that a forward pass left; transformers renames them, and warns of the old name."""
    return outputs["cache"] if "cache" in outputs else outputs["past_key_values"]
