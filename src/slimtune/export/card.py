"""The model card (README.md) of an exported folder: what is known, and nothing else."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from slimtune.structure.axes import FFN, KV_GROUP
from slimtune.structure.experts import HOSTS
from slimtune.structure.plan import Plan
from slimtune.text_file import write_atomically
from slimtune.version import __version__

_HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- slimtune
{%- if experts %}
- moe
{%- elif cut %}
- pruned
{%- endif %}
{%- if hub_base %}
base_model: {{ hub_base }}
{%- endif %}
{%- if license %}
license: {{ license }}
{%- endif %}
---
# {{ title }}

A {{ kind }} version of {{ base }}, made with slimtune {{ version }}.

| fact | value |
| --- | --- |
{%- for name, value in rows %}
| {{ name }} | {{ value }} |
{%- endfor %}
{%- if figures %}

## Figures on the test split

| | {{ models | join(" | ") }} |
| --- | {{ (["---"] * (models | length)) | join(" | ") }} |
{%- for name, cells in figures %}
| {{ name }} | {{ cells | join(" | ") }} |
{%- endfor %}
{%- endif %}
{%- if data %}

## Data

{% for source in data -%}
- {{ source }}
{% endfor %}
{%- endif %}
{%- if recipe %}
## Recipe

For `slimtune {{ "convert" if experts else "tune" }}`; paths are shortened to names, and what stands at its default is left out.

```yaml
{{ recipe }}
```
{%- endif %}

"""

_LOADING = """\
## Loading
{% if block_configs %}
The folder is laid out for vLLM's `DeciLMForCausalLM`: every layer has {{ heads }} query heads
{%- if zeros %}, and zeros stand for those
that were removed{% endif %}. For transformers it carries a small class (`modeling_slimtune_deci.py`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
```
{% elif per_layer or masked %}
{% if masked %}Every token has its own {{ masked }} dimensions of values, so the model has its own small class. The folder
carries it (`modeling_slimtune_values.py`):
{% else %}Layers differ in width, so the model has its own small class. The folder carries it (`modeling_slimtune.py`):
{% endif %}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # unchanged; it only reads the config too
```

With slimtune installed nothing in the folder has to be trusted:

```python
import slimtune
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder)
```
{% else %}
A stock transformers class (`{{ architecture }}`) holds this model; no further code is needed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```
{% endif %}
{%- if vllm %}
For vLLM, which this folder was written for and has not been run in:

```sh
vllm serve folder{{ " --trust-remote-code" if per_layer or block_configs }}
```
{% endif %}
{%- if plan and experts %}
`plan.json` lists which channels of the base each expert has, and which heads were kept.
{% elif plan %}
`plan.json` lists which units of the base were kept; replayed on the base it gives the same widths
{%- if zeros %}, without the zeros{% endif %}.
{% endif %}
"""

_REST = """\
## Widths

| layer | query heads | KV heads | {{ mlp | join(" | ") }} |
| --- | --- | --- | {{ (["---"] * (mlp | length)) | join(" | ") }} |
{%- for row in widths %}
| {{ row }} |
{%- endfor %}

## Licence

{% if license -%}
The base is under {{ license }}; its terms apply to this model too.
{%- else -%}
The licence of the base is not known to slimtune; look it up before you use or share this model.
{%- endif %}
"""

RELOADED = "largest logit difference after a reload in a fresh process"
_LABELS = {
    "base": "base model",
    "method": "method",
    "budget": "budget",
    "parameters_before": "parameters before",
    "parameters_after": "parameters after",
    "parameters_used": "parameters that a token uses",
    "size": "weights on disk",
    "reload_difference": RELOADED,
}
_OF_EXPERTS = ("MLP, shared", "in some expert", "used by a token")
_ELSEWHERE = ("title", "license", "figures", "data", "recipe", "kind")


def render(facts: Mapping[str, Any], plan: Plan, config: Mapping[str, Any]) -> str:
    """The text of the card.

    Args:
        facts: all optional: ``title``, ``base``, ``license`` (of the base), ``method``, ``budget``, ``parameters_before``,
            ``parameters_after``, ``figures`` ({model: {metric: value}}), ``data`` (list of sources), ``recipe`` (YAML),
            ``kind`` (of version it is), ``reload_difference``. Other keys become rows of the table under their own name.
            Absent facts (or None) are not mentioned; only an unknown licence is said to be unknown.
        plan: the decision, for the table of widths.
        config: config.json of the folder.
    """
    known = {key: value for key, value in facts.items() if value is not None}
    base = str(known.get("base", "a base model"))
    order = [key for key in _LABELS if key in known] + [key for key in known if key not in (*_LABELS, *_ELSEWHERE)]
    rows = [(_LABELS.get(key, key.replace("_", " ")), _text(known[key])) for key in order]
    rows += _experts(plan)
    rows.append(("weights", str(config.get("dtype"))))
    cut = any(len(kept[axis]) < full[axis] for kept, full in zip(plan.kept, plan.full, strict=True) for axis in kept)
    figures = {name: dict(values) for name, values in dict(known.get("figures", {})).items()}
    metrics = list(dict.fromkeys(metric for values in figures.values() for metric in values))
    return _template(_HEAD + _LOADING + _REST).render(
        title=known.get("title", "Model of experts" if plan.experts else "Pruned model" if cut else "Tuned model"),
        cut=cut,
        kind=known.get("kind", "tuned mixture-of-experts" if plan.experts else "smaller, tuned" if cut else "tuned"),
        base=base,
        # only an id of the hub may stand in the metadata; a folder of the author's machine means nothing elsewhere
        hub_base=base if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base) and not Path(base).exists() else None,
        license=known.get("license"),
        version=__version__,
        rows=rows,
        models=list(figures),
        figures=[(metric, [_text(row.get(metric, "")) for row in figures.values()]) for metric in metrics],
        data=[_text(source) for source in known.get("data", ())],
        recipe=known.get("recipe"),
        mlp=_OF_EXPERTS if plan.experts else ("MLP",),
        widths=_widths(plan),
        **_how(config, True),
    )


def loading(config: Mapping[str, Any], plan: bool, vllm: bool = False, zeros: int = 0) -> str:
    """The card's section about loading a folder.

    Args:
        config: its config.json.
        plan: the folder has a plan.json.
        vllm: it was written for vLLM.
        zeros: parameters that are padding.
    """
    return _template(_LOADING).render({**_how(config, plan), "vllm": vllm, "zeros": zeros})


def _how(config: Mapping[str, Any], plan: bool) -> dict[str, Any]:
    return {
        "per_layer": "per_layer_config" in config,
        "block_configs": "block_configs" in config,
        "masked": config.get("value_dims"),
        "heads": config.get("num_attention_heads"),
        "architecture": (config.get("architectures") or ["?"])[0],
        "plan": plan,
        "experts": str(config.get("model_type")).removeprefix("slimtune_") in HOSTS,
        "vllm": False,
        "zeros": 0,
    }


@functools.cache
def _template(text: str) -> Template:
    return Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False).from_string(text)


def write(folder: Path, facts: Mapping[str, Any], plan: Plan) -> Path:
    """Write README.md into an exported folder (again, when more facts are known)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    file = folder / "README.md"
    write_atomically(file, render(facts, plan, config))
    return file


def _widths(plan: Plan) -> list[str]:
    lines = []
    for layer, full in enumerate(plan.full):
        now = plan.widths(layer)
        pairs = (
            (now["num_attention_heads"], full[KV_GROUP] * plan.group),
            (now["num_key_value_heads"], full[KV_GROUP]),
            *_of_mlp(plan, layer),
        )
        lines.append(" | ".join([str(layer), *(f"{kept} of {whole}" for kept, whole in pairs)]))
    return lines


def _of_mlp(plan: Plan, layer: int) -> list[tuple[int, int]]:
    """Channels that stay; of experts those of the shared one, those that any has, and as many as a token uses."""
    kept, full = len(plan.kept[layer][FFN]), plan.full[layer][FFN]
    if not plan.experts:
        return [(kept, full)]
    division = plan.experts[layer]
    return [(len(division.shared), full), (kept, full), (division.used(plan.top_k), full)]


def _experts(plan: Plan) -> list[tuple[str, str]]:
    """Rows on the experts, which are alike in all layers."""
    if not plan.experts:
        return []
    first, own = plan.experts[0], [len(each.shared) for each in plan.experts]
    rows = [("experts of a layer", len(first.routed)), ("of which a token uses", plan.top_k)]
    rows += [("channels of an expert", max(each.width for each in plan.experts))]
    rows += [("channels of the shared expert, which every token uses", max(own))] if any(own) else []
    rows += [("rotary pairs of q and k that are not zero, in each head", len(plan.pairs[0]))] if plan.pairs else []
    rows += [("value dimensions of a token, in each head", plan.values)] if plan.values else []
    return [(name, _text(value)) for name, value in rows]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
