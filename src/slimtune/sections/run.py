"""Model, method, loop and figures of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from slimtune.section import Section
from slimtune.sections.bounds import Count, Fraction, Names, Positive


class ModelConfig(Section):
    """The model to start from."""

    path: str = ""
    """A folder, a hub id ``org/name``, or ``builtin:base-10m``."""
    init: Literal["pretrained", "config"] = "pretrained"
    """``pretrained`` loads weights; ``config`` draws random ones from ``config`` (over ``path``'s config.json)."""
    config: dict[str, Any] = {}
    """Configuration keys for ``init: config``; must hold ``model_type`` when ``path`` is empty."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; default: ``path``."""
    revision: str | None = None
    """Revision of the hub model ``path`` (and of its tokenizer, unless ``tokenizer`` is another one)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base weights while training. ``auto``: bfloat16 on a GPU, float32 on CPU."""
    quantize: Literal["none", "nf4"] = "none"
    """Of the blocks' linears while training. ``nf4``: 4 bits (QLoRA; ``pip install slimtune[qlora]``); the cut and what is
    written are made of the original weights, which wait in host memory."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation. ``auto``: what transformers chooses for the family."""
    checkpointing: Literal["none", "non_reentrant", "reentrant"] = "none"
    """Activation (gradient) checkpointing."""

    def at(self, path: str) -> ModelConfig:
        """Another pretrained model, loaded the same way."""
        return self.model_copy(update={"path": path, "revision": None, "config": {}, "init": "pretrained"})

    @property
    def tokenizer_source(self) -> tuple[str, str | None]:
        """Where the tokenizer is, and the revision that holds there."""
        path = self.tokenizer or self.path
        return path, self.revision if path == self.path else None


class BudgetConfig(Section):
    """How small the model shall become."""

    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
    """Part of the parameters to keep."""
    of: Literal["total", "block"] = "total"
    """Of what: all parameters (embeddings counted, once if tied), or those of the decoder blocks' linears."""
    tolerance: Annotated[float, Field(gt=0.0, lt=0.1)] = 0.002
    """Largest allowed distance of the final ratio from ``keep``: 0.002 is 0.2% of the whole (of ``of``)."""
    layout: Literal["per-layer", "uniform"] = "per-layer"
    """``uniform``: equal widths in all layers, so the export is the stock class (the run says when none takes them);
    ``per-layer``: free widths."""
    ffn_multiple: Positive | Literal["auto"] = "auto"
    """Round MLP widths to this. ``auto``: the largest of 128, 64, 32, 16, 8, 4 that meets ``tolerance``."""


class LoraConfig(Section):
    """LoRA on every linear of the blocks, through PEFT."""

    rank: Positive = 32
    """Rank r."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale is alpha/r; default: alpha = r (scale 1, as in the paper)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """LoRA dropout during ``adapt`` turns; always off in ``decide`` turns."""
    semantics: Literal["hard", "lora_aware"] = "hard"
    """``hard``: gates cover base and LoRA; ``lora_aware``: gates cover the base, the lasso empties the LoRA part."""
    lasso: Literal["proximal", "loss", "none"] = "proximal"
    """For ``lora_aware``: shrink after each optimiser step, a term of the loss, or nothing."""
    lasso_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """``loss``: its factor. ``proximal``: a step shrinks pruned groups by 0.1 x this x the median group norm (ramped)."""
    settle: Fraction = 0.25
    """``lora_aware``: after the decision this part of ``search.steps`` goes on tuning the uncut model, so that the lasso
    can empty the pruned entries before the cut; taken out of ``recover.steps``."""


class GeneratorConfig(Section):
    """The trainable generator of pruning decisions."""

    kind: Literal["transformer", "direct"] = "transformer"
    """``transformer``: layer embeddings, a small transformer over layers, per-layer heads; ``direct``: free logits."""
    width: Positive = 64
    """Embedding width."""
    depth: Positive = 2
    """Transformer layers."""
    heads: Positive = 4
    """Attention heads; divides ``width``."""
    train_embedding: bool = True
    """The paper freezes the (orthogonal) layer embeddings: ``false``."""
    calibrate: bool = True
    """Shift the logits of every ``decide`` turn by one level so that the expected kept ratio is the present target: scores
    and gradients are then taken on models of the size that is asked for. Off: as in the paper, ``offset`` and the
    budget loss (``search.alpha``) alone lead there; on, neither has an effect."""
    offset: float = 3.0
    """Without ``calibrate``: added to every logit, so P(keep) at the start is sigmoid(offset) for logistic noise."""
    temperature: Annotated[float, Field(gt=0.0)] = 0.4
    """Of the relaxed sample of ``ste``; ``reinmax`` has none."""
    noise: Literal["logistic", "gumbel"] = "logistic"
    """``logistic``: P(keep) = sigmoid(logit); ``gumbel``: the paper's single Gumbel draw."""
    estimator: Literal["reinmax", "ste"] = "reinmax"
    """Gradient through the hard sample."""
    prior: Literal["none", "taylor", "running", "wanda", "mixed"] = "mixed"
    """Logits to add to the generator's: none; squared-gradient Taylor scores of the open gates on decision data; the same
    followed through the search (``running``: a moving average over the decide turns, free of extra passes); weight times
    norm of the input, ranked within each layer (``wanda``); or the mean of those of running and wanda (``mixed``)."""
    prior_ranking: Literal["global", "axis", "layer"] = "axis"
    """Who is ranked against whom for a Taylor prior: all units by score per parameter (``global``), those of one axis (KV
    groups, MLP channels) in all layers, or those of one axis in one layer. The prior wants the same share of each kept."""
    prior_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the ``running`` average, a decide turn."""
    prior_scale: Annotated[float, Field(ge=0.0)] = 4.0
    """Standard deviation of the prior's logits (of each part of ``mixed``). The sampling noise has one of 1.8: the larger the
    scale, the nearer to the border are the units that it explores. Without ``calibrate`` use 2."""
    prior_steps: Positive = 16
    """Decision batches read for the prior, and for the moments of ``compensate``; they count as search tokens."""
    lr: Annotated[float, Field(gt=0.0)] = 3e-3
    """AdamW learning rate; times 0.2 in the last fifth of the search."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW weight decay."""
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradient-norm clip."""


class SearchConfig(Section):
    """The phase in which ``decide`` and ``adapt`` turns alternate."""

    steps: Count = 20
    """Steps (one ``adapt`` turn each). They come out of those of ``recover``: best a tenth of all steps or fewer. Default with
    ``method: tomoe``: 0, unless ``moe.prior`` is none; there a step is one turn for all that learns."""
    batch: Positive | None = None
    """Windows of a ``decide`` turn over all processes; default: ``train.batch``."""
    decide_every: Positive = 1
    """A ``decide`` turn on every n-th step; the masks of ``adapt`` turns move with it. A large model's search costs less by
    that, for each move is a solve of least squares for each consumer (``compensate``)."""
    update: Literal["alternating", "joint"] = "alternating"
    """``alternating``: ``decide`` turns for the generator, ``adapt`` turns for LoRA; ``joint``: both learn from one backward
    pass on training data, under the sampled gates (``hard`` semantics, no distillation)."""
    decide_on: Literal["decision", "train"] = "decision"
    """Rows of the ``decide`` turns, the prior and the rivals' scores: the decision rows, which LoRA never sees, or the
    training rows."""
    alpha: Annotated[float, Field(ge=0.0)] = 5.0
    """Weight of the budget loss |log(kept/target)|; see ``generator.calibrate``."""
    ramp: Fraction = 0.7
    """Part of the steps over which the budget's target falls from 1 to its final value."""


class CompensateConfig(Section):
    """While gates close, kept columns of o_proj and down_proj take over what the closed inputs did, by least squares.

    As far as that is linear in the kept inputs; on second moments of the inputs of the untuned base.
    """

    weights: Literal["none", "adapt", "decide"] = "decide"
    """``adapt``: adapt turns and the cut model have the compensating weights; ``decide``: decide turns as well, whose gradients
    then see of a unit what no kept one can take over."""
    damping: Annotated[float, Field(gt=0.0)] = 0.01
    """Added to the diagonal of the kept inputs' second moments, in units of its mean."""
    matrices: Count = 4096
    """``decide``: of consumers of at most as many inputs, what a unit alone can say is told from all inputs, by a matrix of the
    width squared on the GPU; of wider ones it is the same part of each token's input, by one number an input."""
    offload: bool = True
    """Keep what is only needed when masks change in host memory: the second moments (9/4 bytes times input width squared, of
    each o_proj and down_proj; of several processes each those of its own layers) and the base's weights of the two."""


class RecoverConfig(Section):
    """The phase that tunes the physically smaller model."""

    steps: Count = 380
    """Steps."""
    lr: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate of this phase; default: ``train.lr``."""
    quantize: bool | Literal["auto"] = "auto"
    """With ``model.quantize``: quantise the cut model anew. ``false``: it is tuned on whole weights, those that are written,
    which is better. ``auto``: on whole weights where ``slimtune estimate`` expects them to fit in the GPU's memory."""
    checkpointed: Fraction = 1.0
    """Part of the cut model's blocks that ``model.checkpointing`` is for. What the cut made free can hold the activations of
    the others, each of which saves its second forward pass; ``slimtune estimate`` tells the memory of the fullest phase."""


class DistillConfig(Section):
    """The same model with its gates open, or another one, teaches the gated one."""

    weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Factor of the KL term; 0 switches it off."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Softmax temperature of teacher and student."""
    recover: bool = False
    """Keep the uncut model in memory as the teacher of the recovery phase as well."""
    teacher: str | None = None
    """Folder or hub id of another teacher for all phases, with the same tokenizer: best the uncut model tuned on the same
    data (its own training is not among this run's tokens)."""


class TrainConfig(Section):
    """The loop."""

    steps: Count = 400
    """Steps of ``method: finetune`` (``atp`` uses ``search.steps`` + ``recover.steps``)."""
    batch: Positive = 16
    """Windows in one step over all processes."""
    micro_batch: Positive | None = None
    """Windows in one forward pass; default: ``batch`` over the processes."""
    lr: Annotated[float, Field(gt=0.0)] = 2e-4
    """Peak learning rate of the model's trainable weights."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon``: Muon for matrices, AdamW for the rest (torch >= 2.9; meant for ``init: config``)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up, to ``final_lr`` of the peak, over all phases together."""
    warmup: Fraction = 0.03
    """Part of all steps."""
    final_lr: Fraction = 0.1
    """Part of the peak learning rate at the end."""
    decay: Fraction = 1.0
    """Part of all steps over which the decay runs (before it the rate is constant)."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW weight decay."""
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradient-norm clip."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast. ``auto``: bfloat16 on a GPU and on CPUs that multiply it natively, float32 elsewhere."""
    compile: bool | Literal["auto"] = "auto"
    """``torch.compile`` the loss of adapt turns and the decoder layers; where something is cut, those of the cut model: a graph
    for each different pair of widths, or one of symbolic widths where there are more than twelve (a minute or so
    before the first step); kept on disk by torch for later runs. ``auto``: where ``slimtune estimate`` expects the steps to
    save more than that takes, of LoRA on a GPU, nothing in 4 bits, each process with the whole model (``train.shard``), if a
    kernel can be made there."""
    checkpoint_every: Count = 100
    """Steps between checkpoints, which is what an interrupted run can lose; 0: only between phases."""
    threads: Positive | None = None
    """CPU threads; default: torch's choice."""
    shard: Literal["none", "full"] = "none"
    """Of several processes (``torchrun``). ``none``: each has the whole model (DDP); ``full``: each keeps its part of every
    weight (and of its gradient and moments, where all weights are trained), has LoRA whole, and a block or two of the model at
    a time (FSDP2). No effect on one process."""


class EvaluateConfig(Section):
    """Figures of the run."""

    every: Count = 0
    """Steps between validation figures of the current hard masks; 0: none."""
    search_every: Positive | None = None
    """The same while gates close, in few steps: quality against the kept ratio. Default: ``every``; not if that is 0."""
    windows: Positive = 256
    """At most this many windows for each figure."""
    batch: Positive = 16
    """Windows in one evaluation pass."""
    choices: Positive = 200
    """At most this many multiple-choice rows for the accuracy figure."""
    tasks: Names = ()
    """Tasks of ``slimtune evaluate`` (names or files) to follow: on validation rows with every validation figure, on test
    rows in the summary. Needs ``pip install slimtune[eval]``."""
    rows: Positive = 100
    """At most this many validation rows of each of these tasks."""
    base: bool = True
    """Measure the base as well. Off (but for a glance at its loss) where another run tells its figures: a comparison needs
    them once."""
    dense_lora: bool = False
    """Also tune the uncut model with LoRA on the same tokens and report it beside (the ceiling)."""


class ExportConfig(Section):
    """What is written."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the written weights. ``auto``: that of the base checkpoint."""
    verify: bool = True
    """Reload in a fresh process and compare logits before the run says it is done."""
    adapter: bool = True
    """Also write ``adapter/``: LoRA, and what compensation changed, from which ``slimtune apply`` rebuilds the model on the
    base, bit for bit. The base is loaded once more for it, on the CPU."""
