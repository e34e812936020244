"""Hold our pruning criteria against other people's implementations, unit by unit.

    python benchmarks/crosscheck.py [--model FOLDER --text FILE.jsonl.xz] [--rows FILE.json]

Without ``--model``: a tiny Llama of random weights (grouped-query attention) on the embedded text. A unit is an MLP channel
(rows of gate and up, a column of down) or a KV group (a key/value head, its query heads, their columns of o). What is held
against what:

* **torch-pruning**, magnitude: its dependency graph says which weights go with the columns of the consumer (o, down) that a
  unit owns; its ``GroupMagnitudeImportance`` (p=2, reduction "sum", no normaliser) adds their squares. The same definition.
  Two helps in tracing: eager attention, and RoPE left out, for with it version 1.6.1 searches an attention group for ever (it
  mixes entries of a head alone, so no unit changes). With grouped queries that importance passes over k and v, whose rows
  the graph finds but gives no root; here every weight of a group has the group as its root.
* torch-pruning, Taylor: ours is the squared gradient of a gate before the consumer, by sample. That gradient is
  sum_ij W_ij dL/dW_ij over the unit's columns j: ``GroupTaylorImportance`` with ``multivariable=True`` on the consumer alone,
  one backward pass a sample. Its absolute value is taken by channel, so a KV group, of many columns, is shown to it as one
  channel of a stand-in layer. Again the same definition. Its default, sum |W dL/dW| over all of the group's weights with
  the mean gradient, is another one: rank correlation and overlap only.
* **llmcompressor**, Wanda: its running ||x_j||^2 (``accumulate_row_scalars``), then sum_ij |W_ij| * ||x_j|| over the unit's
  columns. The same definition. Its own use is of single weights: ``sparsify_weight`` drops the lower half of each row, and the
  share of a unit's weights that survives is held against our score by rank. (It asks for an older transformers than ours;
  ``pip install --no-deps llmcompressor compressed-tensors loguru`` suffices here.)
* **torch** itself: ``ln_structured`` (n=2) on a matrix whose rows are the units of a layer, cut from the weights by the head
  counts of the config and not by our table. It must keep the half that ranks first by our magnitude.

FLAP has no counterpart that was found on PyPI. Libraries that are absent are told and passed over; a disagreement exits 1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from agreement import GRADIENT, HALF, KEPT, RANK, Case, Check, overlap, owned, prepare, same, spearman
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils import prune

from slimtune.methods.scores import Scores
from slimtune.models.surgery import blocks_of
from slimtune.prune.gates import Site
from slimtune.runtime import quiet_libraries
from slimtune.structure.axes import AXES, FFN, KV_GROUP
from slimtune.train.objective import IGNORE

Groups = dict[Site, list[Any]]
"""torch-pruning's groups by (layer, axis)."""


def with_torch(case: Case) -> list[Check]:
    """The half that ``ln_structured`` keeps in each layer, against ours: the mean share of it over layers."""
    structured: Any = prune.ln_structured
    found = []
    for axis in AXES:
        shares = []
        for (layer, _), ours in case.of("magnitude", axis).items():
            rows = owned(case, layer, axis)
            stand_in = nn.Linear(rows.shape[1], len(rows), bias=False)
            stand_in.weight.data = rows
            structured(stand_in, "weight", amount=len(rows) - round(len(rows) * HALF), n=2, dim=0)
            shares.append(overlap(ours, stand_in.get_buffer("weight_mask").amax(1)))
        found.append(Check("torch", "magnitude", axis, "overlap of the kept half", sum(shares) / len(shares), 1.0, least=True))
    return found


def dependency_groups(tp: Any, case: Case) -> Groups:
    """torch-pruning's groups of each site: one of all MLP channels, or one for each KV group with itself as the only root."""
    module = sys.modules[type(blocks_of(case.model, case.structure)[0].self_attn).__module__]
    with mock.patch.object(module, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names the norms' weights, which lie on the residual stream
        graph = tp.DependencyGraph().build_dependency(
            case.model,
            example_inputs={"input_ids": torch.zeros(1, 4, dtype=torch.long)},
            forward_fn=lambda model, inputs: model(**inputs, use_cache=False).logits,
        )
    groups: Groups = {}
    for layer, axis in case.structure.sites():
        consumer, units = case.consumer(layer, axis), case.units(axis)
        columns = torch.arange(consumer.in_features).view(1 if axis == FFN else units, -1).tolist()
        groups[layer, axis] = [graph.get_pruning_group(consumer, tp.prune_linear_in_channels, mine) for mine in columns]
        for group in groups[layer, axis] if axis == KV_GROUP else ():
            for number, (dep, indices) in enumerate(group):
                group[number] = type(group[number])(dep, sorted(set(indices)))  # k and v: once for each query head
                group[number].root_idxs = [0] * len(group[number].idxs)
    return groups


def _by_group(importance: Any, groups: Groups) -> Scores:
    found: Scores = {}
    for site, members in groups.items():
        scores = [importance(group) for group in members]
        found[site] = scores[0] if site[1] == FFN else torch.stack([score[0] for score in scores])
    return found


def with_torch_pruning(case: Case) -> list[Check]:
    """Magnitude, and Taylor in our definition and in its own."""
    tp, name = importlib.import_module("torch_pruning"), "torch-pruning"
    groups = dependency_groups(tp, case)
    magnitude = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)
    found = same(name, "magnitude", case, _by_group(magnitude, groups))
    found += same(name, "taylor", case, gate_gradients(tp, case, groups), GRADIENT)
    taylor = tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None)
    default = _by_group(taylor, groups)  # of the gradients that the passes left: their mean over the samples
    for axis in AXES:
        ours, theirs = case.of("taylor", axis), {site: value for site, value in default.items() if site[1] == axis}
        flat = [torch.cat([scores[site] for site in theirs]) for scores in (ours, theirs)]
        found.append(Check(name, "taylor", axis, "rank correlation with sum |w g|", spearman(ours, theirs), RANK, least=True))
        found.append(Check(name, "taylor", axis, "overlap of the kept half with sum |w g|", overlap(*flat), KEPT, least=True))
    return found


def gate_gradients(tp: Any, case: Case, groups: Groups) -> Scores:
    """Squared gate gradients by sample, summed over a batch's and averaged over batches, in torch-pruning's terms.

    Leaves the mean gradient over all batches in the model.
    """
    first = tp.importance.GroupTaylorImportance(group_reduction="first", normalizer=None, multivariable=True)
    units = case.units(KV_GROUP)
    stand_in = nn.Linear(case.consumer(0, KV_GROUP).weight.numel() // units, units, bias=False)
    graph = tp.DependencyGraph().build_dependency(stand_in, example_inputs=torch.zeros(1, stand_in.in_features))
    whole = graph.get_pruning_group(stand_in, tp.prune_linear_out_channels, list(range(units)))
    found: Scores = {}
    sums = [torch.zeros_like(parameter) for parameter in case.model.parameters()]
    for part in _backward(case):
        for (layer, axis), members in groups.items():
            if axis == KV_GROUP:
                weight = case.consumer(layer, axis).weight
                stand_in.weight.data = weight.detach().T.reshape(units, -1)
                stand_in.weight.grad = weight.grad.T.reshape(units, -1)
            square = first(whole if axis == KV_GROUP else members[0]).square() / len(case.batches)
            found[layer, axis] = found.get((layer, axis), 0) + square
        for total, parameter in zip(sums, part, strict=True):
            total += parameter.grad / len(case.batches)
    for total, parameter in zip(sums, case.model.parameters(), strict=True):
        parameter.grad = total
    return found


def _backward(case: Case) -> Iterator[list[Any]]:
    """The model's parameters after each sample's backward pass, of its share in its batch's mean loss."""
    for batch in case.batches:
        targets = [int((sample["labels"][:, 1:] != IGNORE).sum()) for sample in batch]
        for sample, count in zip(batch, targets, strict=True):
            case.model.zero_grad()
            (case.model(**sample, use_cache=False).loss * count / sum(targets)).backward()
            yield list(case.model.parameters())


@torch.no_grad()
def with_llmcompressor(case: Case) -> list[Check]:
    """Wanda's metric by unit, and the share of a unit's weights that survive its pruning of single weights."""
    theirs, name = importlib.import_module("llmcompressor.modifiers.pruning.wanda.wanda_sparsify"), "llmcompressor"
    consumers = {(layer, axis): case.consumer(layer, axis) for layer, axis in case.structure.sites()}
    state = {module: (theirs.make_empty_row_scalars(module), 0) for module in consumers.values()}

    def see(module: nn.Module, args: Any) -> None:
        state[module] = theirs.accumulate_row_scalars(args[0], module, *state[module])

    handles = [module.register_forward_pre_hook(see) for module in consumers.values()]
    for sample in (sample for batch in case.batches for sample in batch):
        case.model(**sample, use_cache=False)
    for handle in handles:
        handle.remove()
    metric: Scores = {}
    survivors: Scores = {}
    for site, module in consumers.items():
        squares, count = state[module]
        columns = (module.weight.abs() * (squares * count).sqrt()).sum(0)  # it keeps the mean over samples
        metric[site] = columns.view(case.units(site[1]), -1).sum(1)
        left = theirs.sparsify_weight(module, {module: squares}, HALF, prune_n=0, prune_m=0)
        survivors[site] = (left != 0).float().mean(0).view(case.units(site[1]), -1).mean(1)
    found = same(name, "wanda", case, metric)
    for axis in AXES:
        by_layer = [spearman({site: ours}, {site: survivors[site]}) for site, ours in case.of("wanda", axis).items()]
        value = sum(by_layer) / len(by_layer)
        found.append(Check(name, "wanda", axis, "rank correlation with survivors", value, RANK, least=True))
    return found


LIBRARIES: dict[str, tuple[str, Callable[[Case], list[Check]]]] = {
    "torch": ("torch", with_torch),
    "torch-pruning": ("torch_pruning", with_torch_pruning),
    "llmcompressor": ("llmcompressor", with_llmcompressor),
}
"""Name at pip -> module, checks."""


def main() -> None:
    """Check with every library that is here, print a table, write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a Llama; default: a tiny one, drawn at random")
    parser.add_argument("--text", default="builtin:python-docs", help="rows that the scores are read from")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="windows in a batch")
    parser.add_argument("--length", type=int, default=64, help="tokens in a window")
    parser.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--rows", type=Path)
    args = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        case = prepare(args.model, args.text, args.batches, args.batch, args.length, folder)
    size = sum(len(sample["input_ids"][0]) for batch in case.batches for sample in batch)
    title = f"{args.model or 'a tiny Llama of random weights'}, {size:,} tokens of {args.text}"
    table = Table("library", "criterion", "axis", "what is compared", "figure", "must be", "verdict", title=title)
    checks: list[Check] = []
    for name in args.libraries:
        module, check = LIBRARIES[name]
        if importlib.util.find_spec(module) is None:
            table.add_row(name, "", "", f"not installed: pip install {name}", "", "", "skipped")
            continue
        for found in check(case):
            checks.append(found)
            bound = f"{'>=' if found.least else '<='} {found.limit:g}"
            cells = (found.criterion, found.axis, found.measure, f"{found.value:.3g}", bound)
            table.add_row(f"{name} {version(name)}", *cells, "agrees" if found.agrees else "[red]DISAGREES[/red]")
    Console().print(table)
    if args.rows:
        args.rows.write_text("[\n" + ",\n".join(json.dumps(found.row) for found in checks) + "\n]\n")
    if not all(found.agrees for found in checks):
        sys.exit(1)


if __name__ == "__main__":
    main()
