"""The decision: which units of every layer stay.

JSON, hashable, replayable on the base checkpoint without training code.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slimtune.errors import UserError
from slimtune.structure.axes import AXES, FFN, KV_GROUP, Structure
from slimtune.structure.experts import Division, host_of
from slimtune.structure.heads import attention_params, module_params

Keep = Mapping[str, tuple[int, ...]]
_LISTED = 512
"""Units of an axis up to which plan.json lists those that stay: half of 14,336 as a list take 15 times as many bytes."""


@dataclass(frozen=True)
class Plan:
    """Kept unit indices (sorted) by layer and axis, with the widths they were chosen from.

    Attributes:
        model_type: family of the base.
        group: query heads of a KV group (to write head counts).
        full: units of every layer and axis before the cut.
        kept: kept indices of every layer and axis.
        notes: free facts (base, seed, ratios); not part of the digest.
        experts: how the kept channels of every layer are divided, where they are; none: every token uses all that is kept.
        top_k: routed experts that a token uses.
        pairs: rotary pairs of q and k that stay in every layer, equally many, the rest being zero; none: all do.
        values: value dimensions that a token has of every head; 0: all, without a mask.
    """

    model_type: str
    group: int
    full: tuple[Mapping[str, int], ...]
    kept: tuple[Keep, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)
    experts: tuple[Division, ...] = ()
    top_k: int = 0
    pairs: tuple[tuple[int, ...], ...] = ()
    values: int = 0

    @classmethod
    def of(cls, structure: Structure, kept: Sequence[Mapping[str, Sequence[int]]], **notes: Any) -> Plan:
        """A checked Plan over ``structure``."""
        plan = cls(
            structure.family.model_type,
            structure.group,
            tuple(dict(layer.units) for layer in structure.layers),
            tuple({axis: tuple(sorted(map(int, layer[axis]))) for axis in AXES} for layer in kept),
            notes,
        )
        plan.check(structure)
        return plan

    @classmethod
    def uncut(cls, structure: Structure) -> Plan:
        """Everything stays."""
        return cls.of(structure, [{axis: range(layer.units[axis]) for axis in AXES} for layer in structure.layers])

    @classmethod
    def divided(
        cls,
        structure: Structure,
        groups: Sequence[Sequence[int]],
        experts: Sequence[Division],
        top_k: int,
        pairs: Sequence[Sequence[int]] = (),
        values: int = 0,
    ) -> Plan:
        """A checked Plan that keeps ``groups`` of each layer's KV groups and divides channels among experts."""
        kept = [{KV_GROUP: own, FFN: each.union} for own, each in zip(groups, experts, strict=True)]
        turned = tuple(tuple(sorted(map(int, each))) for each in pairs)
        plan = replace(cls.of(structure, kept), experts=tuple(experts), top_k=top_k, pairs=turned, values=values)
        plan.check(structure)
        return plan

    @property
    def for_good(self) -> Plan:
        """What is cut while the model trains: all of a Plan without experts; of one with experts the KV groups."""
        if not self.experts:
            return self
        kept = [{**layer, FFN: tuple(range(full[FFN]))} for layer, full in zip(self.kept, self.full, strict=True)]
        return replace(self, kept=tuple(kept), experts=(), top_k=0, pairs=(), values=0)

    def check(self, structure: Structure) -> None:
        """Raise UserError unless this Plan fits ``structure``, and every layer keeps both axes or neither, one layer both."""
        widths = tuple(dict(layer.units) for layer in structure.layers)
        if self.model_type != structure.family.model_type or self.full != widths or len(self.kept) != len(widths):
            raise UserError(
                f"the plan was made for a {self.model_type!r} model with widths {_brief(self.full)}, "
                f"this one is {structure.family.model_type!r} with {_brief(widths)}"
            )
        if not self.layers:
            raise UserError("the plan leaves no layer")
        for index, (layer, full) in enumerate(zip(self.kept, self.full, strict=True)):
            for axis in AXES if index in self.layers else ():
                units = layer[axis]
                if not units or list(units) != sorted(set(units)) or units[0] < 0 or units[-1] >= full[axis]:
                    raise UserError(f"the plan's layer {index} axis {axis!r} is empty, repeats or leaves 0..{full[axis] - 1}")
        if self.experts:
            self._check_experts()
        if self.pairs or self.values:
            self._check_heads(structure)

    def _check_heads(self, structure: Structure) -> None:
        """Masks inside heads go with experts and with all KV groups: what a token uses of attention is counted so."""
        layers, half = len(self.kept), structure.head_dim // 2
        if not self.experts or any(
            len(kept[KV_GROUP]) < full[KV_GROUP] for kept, full in zip(self.kept, self.full, strict=True)
        ):
            raise UserError("the plan has masks inside heads, but no experts, or fewer KV groups than the base")
        if not 0 <= self.values <= structure.head_dim:
            raise UserError(f"the plan's {self.values} value dimensions are not of a head's {structure.head_dim}")
        if self.pairs and (len(self.pairs) != layers or len(set(map(len, self.pairs))) != 1):
            raise UserError(f"the plan's rotary pairs are not equally many in each of {layers} layers")
        for index, own in enumerate(self.pairs):
            if not own or list(own) != sorted(set(own)) or own[0] < 0 or own[-1] >= half:
                raise UserError(f"the plan's layer {index} has no rotary pair, repeats one or leaves 0..{half - 1}")

    def _check_experts(self) -> None:
        for index, (layer, division) in enumerate(zip(self.kept, self.experts, strict=True)):
            if not 1 <= self.top_k <= len(division.routed) or len(division.routed) != len(self.experts[0].routed):
                raise UserError(
                    f"the plan's layer {index} has {len(division.routed)} experts, of which {self.top_k} are to be chosen"
                )
            if any(len(set(each)) != len(each) for each in (division.shared, *division.routed)) or not division.width:
                raise UserError(f"the plan's layer {index} has an expert that repeats channels, or none with any")
            if layer[FFN] != division.union:
                raise UserError(f"the plan's layer {index} keeps other channels than its experts have")

    @property
    def coverage(self) -> list[float]:
        """The part of each layer's channels that stays; with experts: that is in any (arXiv 2501.15316: their union)."""
        return [len(kept[FFN]) / full[FFN] for kept, full in zip(self.kept, self.full, strict=True)]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that stay: a layer without a unit on either axis adds nothing and goes as a whole."""
        return tuple(layer for layer, kept in enumerate(self.kept) if any(kept[axis] for axis in AXES))

    def widths(self, layer: int) -> dict[str, int]:
        """The keys of ``layer`` in a Hugging Face config."""
        groups = len(self.kept[layer][KV_GROUP])
        return {
            "num_attention_heads": groups * self.group,
            "num_key_value_heads": groups,
            "intermediate_size": len(self.kept[layer][FFN]),
        }

    @property
    def is_uniform(self) -> bool:
        """All layers that stay have the same widths: a stock class can hold the model."""
        return all(self.widths(layer) == self.widths(self.layers[0]) for layer in self.layers)

    @property
    def digest(self) -> str:
        """SHA-256 of the decision (notes left out)."""
        return hashlib.sha256(self._body().encode()).hexdigest()

    def _body(self) -> str:
        body: dict[str, Any] = {
            "model_type": self.model_type,
            "group": self.group,
            "full": [dict(layer) for layer in self.full],
            "kept": [{axis: list(layer[axis]) for axis in AXES} for layer in self.kept],
        }
        if self.experts:
            body["top_k"] = self.top_k
            body["experts"] = [{"shared": list(each.shared), "routed": list(map(list, each.routed))} for each in self.experts]
        if self.pairs:
            body["pairs"] = list(map(list, self.pairs))
        if self.values:
            body["values"] = self.values
        return json.dumps(body, sort_keys=True, separators=(",", ":"))

    def to_json(self) -> str:
        """The file plan.json: version, digest, notes, plan.

        Kept indices are lists, of an axis with many units bits in base64: the first unit is the first byte's highest bit.
        """
        body = json.loads(self._body())
        for layer, full in zip(body["kept"], self.full, strict=True):
            layer.update({axis: _bits(layer[axis], full[axis]) for axis in AXES if full[axis] > _LISTED})
        for division, full in zip(body.get("experts", ()), self.full, strict=bool(self.experts)):
            if full[FFN] > _LISTED:
                division["shared"] = _bits(division["shared"], full[FFN])
                division["routed"] = [_bits(each, full[FFN]) for each in division["routed"]]
        version = 3 if self.experts else 2
        return json.dumps({"version": version, "digest": self.digest, "notes": dict(self.notes), "plan": body})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises UserError when the text is not a plan or its digest does not match."""
        try:
            raw = json.loads(text)
            body = raw["plan"]
            kept = tuple({axis: _indices(layer[axis]) for axis in AXES} for layer in body["kept"])
            full = tuple(dict(layer) for layer in body["full"])
            experts = tuple(
                Division(_indices(each["shared"]), tuple(map(_indices, each["routed"]))) for each in body.get("experts", ())
            )
            known = (body["model_type"], body["group"], full, kept, raw.get("notes", {}))
            pairs = tuple(map(_indices, body.get("pairs", ())))
            plan = cls(*known, experts=experts, top_k=body.get("top_k", 0), pairs=pairs, values=body.get("values", 0))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"this is not a plan.json of slimtune ({type(error).__name__}: {error})") from error
        if raw.get("digest") != plan.digest:
            raise UserError("plan.json was changed by hand: its digest does not match; write it anew with Plan.to_json()")
        return plan


@dataclass(frozen=True)
class Counts:
    """Parameters under a Plan. ``total`` counts tied embeddings once; ``block`` counts what units own, and routers."""

    total: int
    block: int
    total_ratio: float
    block_ratio: float


def count(structure: Structure, plan: Plan, active: bool = False) -> Counts:
    """Exact parameter counts of ``plan`` on ``structure``: of what is stored, or with ``active`` of what a token uses of it.

    Both are the same without experts. A channel in several experts is stored as often; of experts of different widths every
    one counts as much as the widest, which is what stock classes store and compute. Of q, k, v and o a token uses what masks
    inside heads leave it, and what makes those masks; all of it is stored.
    """
    block, pairs = 0, len(plan.pairs[0]) if plan.pairs else 0
    for index, (kept, layer) in enumerate(zip(plan.kept, structure.layers, strict=True)):
        units = {axis: len(kept[axis]) for axis in AXES}
        if plan.experts:
            division = plan.experts[index]
            number = len(division.routed)
            units[FFN] = division.used(plan.top_k if active else number)
            block += host_of(structure.family, bool(division.shared)).extra(structure.hidden, number)
        block += units[FFN] * layer.unit_params[FFN]
        if active:
            block += attention_params(structure, layer, units[KV_GROUP], pairs, plan.values)
        else:
            block += units[KV_GROUP] * layer.unit_params[KV_GROUP] + (module_params(structure) if plan.values else 0)
    gone = sum(layer.fixed_params for index, layer in enumerate(structure.layers) if index not in plan.layers)
    total = structure.constant_params + block - gone
    return Counts(total, block, total / structure.total_params, block / structure.prunable_params)


def _bits(indices: Sequence[int], units: int) -> str:
    packed = bytearray(-(-units // 8))
    for index in indices:
        packed[index // 8] |= 0x80 >> index % 8
    return base64.b64encode(packed).decode()


def _indices(given: str | Sequence[int]) -> tuple[int, ...]:
    """Of a list, or of what ``_bits`` gave."""
    if not isinstance(given, str):
        return tuple(given)
    packed = base64.b64decode(given, validate=True)
    return tuple(8 * place + bit for place, byte in enumerate(packed) for bit in range(8) if byte & 0x80 >> bit)


def _brief(widths: Sequence[Mapping[str, int]]) -> str:
    return f"{len(widths)} layers of {dict(widths[0]) if widths else {}}"
