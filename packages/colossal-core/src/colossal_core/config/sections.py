"""Core's own sections of the config. Frozen, strict, no unknown keys; every field says its unit and what special values mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """The parent of every section, a plugin's too: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    """Which model to build. Exactly one of `architecture`, `pretrained` and `factory`."""

    architecture: str | None = None
    """A transformers architecture by its model type (`llama`, `gpt2`); weights start random. Needs `colossal-launch[hf]`."""
    pretrained: str | None = None
    """A folder that transformers' `save_pretrained` wrote. Needs `colossal-launch[hf]`."""
    factory: str | None = None
    """`package.module:function`, called with the items of `config` as keyword arguments; returns a `torch.nn.Module`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Passed to the architecture's config class or to the factory. `vocab_size` may be left out: it is then the tokenizer's."""
    loss: str | None = None
    """`package.module:function` of (outputs, batch) returning (sum of losses, number of items). null: chosen by the model's kind."""
    example_batch: str | None = None
    """`package.module:function` of (num_sequences) returning a batch, for a factory model: `verify` and the anatomy trace it."""
    verify_config: dict[str, Any] | None = None
    """Overrides of `config` that `verify` uses to shrink the model. null: transformers models are shrunk by rule, factories not at all."""

    @model_validator(mode="after")
    def _exactly_one_source(self) -> ModelConfig:
        given = [name for name in ("architecture", "pretrained", "factory") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            message = f"exactly one of architecture, pretrained and factory names the model, found {found}"
            raise ValueError(message)
        return self


class DataConfig(Section):
    """Which text to train on, and how it is cut into sequences."""

    source: str = "stdlib"
    """`stdlib` (the running interpreter's own library source), a path or glob of .txt, .jsonl or .parquet files, or `datasets:NAME`."""
    sequence_length: Positive = 256
    """Tokens in one sequence."""
    validation: str | None = None
    """Held-out text, named like `source`. null: files (or rows) split off the source, one in twenty."""
    text_field: str = "text"
    """The field or column that holds the text in .jsonl, .parquet and `datasets` sources."""
    packing: bool = True
    """Documents are joined and cut into full sequences. false: one document a sequence, cut or padded (padding is not counted)."""
    tokenizer: str = "bpe"
    """`bpe` (a byte-level BPE trained on the source, kept in the run's folder), `bytes`, or a path to a tokenizer.json or its folder."""
    vocab_size: Annotated[int, Field(ge=257)] = 4096
    """Size of the trained BPE vocabulary."""
    seed: int = 0
    """Seed of the shuffle. The order depends on it alone, not on the number of ranks."""


class BatchConfig(Section):
    """How many sequences make one optimizer step, and one forward pass."""

    global_size: Positive
    """Sequences in one optimizer step, over all ranks."""
    micro_size: Positive | None = None
    """Sequences in one forward pass on one rank. null: the whole share of the rank."""


class OptimizerConfig(Section):
    """The optimizer. Ignored keys do not exist: beside an optimizer handed to `boost`, only `max_grad_norm` may be set."""

    name: str = "adamw"
    """`adamw`, `sgd`, or the name of an optimizer that an installed plugin contributes (colossal-zero: `adafactor`, `lamb`, `lars`, `lion`,
    `muon`)."""
    lr: Annotated[float, Field(gt=0)] = 3.0e-4
    """Peak learning rate."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """Decay rates of the first and second moment (AdamW, LAMB, and Muon's AdamW part). Lion's: of the interpolation and of the momentum,
    where its authors use 0.9 and 0.99."""
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    """Denominator floor (AdamW, LAMB, LARS, and Muon's AdamW part); Adafactor's floor of the root of its second moment."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay rate of the momentum. null: the optimizer's own, 0 for SGD (no momentum), 0.9 for LARS, 0.95 for Muon."""
    trust_coefficient: Annotated[float, Field(gt=0)] = 1.0e-3
    """LARS: the size of an update as a share of its parameter's norm, at a rate of 1."""
    beta2_power: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Adafactor: at step t its second moment decays by 1 - t^-beta2_power."""
    update_clip: Annotated[float, Field(gt=0)] = 1.0
    """Adafactor: the largest root mean square of a parameter's update before it is multiplied by the rate."""
    scale_floor: Annotated[float, Field(gt=0)] = 1.0e-3
    """Adafactor: the least root mean square that a parameter counts with in the rate, which is relative to it."""
    adamw_lr: Annotated[float, Field(gt=0)] | None = None
    """Muon: the peak learning rate of what AdamW updates (embeddings, heads, vectors). null: `lr`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, times the learning rate; an L2 penalty in SGD and LARS."""
    no_decay: Literal["vectors", "none"] = "vectors"
    """`vectors`: parameters with fewer than two dimensions (norms, biases) are not decayed. `none`: every parameter is."""
    states: Literal["fp32", "bf16", "int8"] = "fp32"
    """How moments are kept (AdamW, Lion). `bf16`: rounded stochastically. `int8`: 8 bits with one scale for 256 elements. Under
    `precision: fp64`, which is for comparisons, they are float64 whatever this says."""
    masters: Literal["fp32", "compute"] = "fp32"
    """What the optimizer updates (AdamW, Lion). `compute`: under bf16 the parameters themselves, rounded stochastically, with no float32
    copy; fp16 refuses it, and under fp32 and fp64 there is no other copy anyhow."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global L2 norm. null: no clipping."""
    elementwise: bool = False
    """Declares that an optimizer of your own, handed to `boost`, updates every element by itself, so that it may run on shards."""


class SchedulerConfig(Section):
    """The learning rate over the steps, as a factor of the peak."""

    name: Literal["constant", "cosine", "linear"] = "cosine"
    """Shape after warm-up."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from 0."""
    min_factor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Factor of the peak at the last step (cosine and linear)."""


class RecomputeConfig(Section):
    """What the forward pass throws away and the backward pass computes again, block by block."""

    mode: Literal["none", "full", "selective"] = "none"
    """`full`: only block inputs are kept. `selective`: the operations that cost most to redo for their bytes are kept, in the budget."""
    memory_budget: Annotated[float, Field(ge=0, le=1)] = 0.5
    """For `selective`: the share of a block's activation bytes that may be kept, from 0 (as `full`) to 1 (as `none`)."""


class CompileConfig(Section):
    """torch.compile of every block, and of core's own loss."""

    enabled: bool = False
    """Compile each block's forward pass (the model's layers) and core's own cross-entropy, not the model as a whole."""
    backend: str = "inductor"
    """torch.compile's backend: `inductor`, or `aot_eager` and `eager` to look for faults."""
    dynamic: bool = False
    """Compile for changing sizes. false: every new shape compiles again."""


class OpsConfig(Section):
    """Which implementation of each op is used, by the op's name: `rms_norm: triton`, `swiglu: reference`. Of an op that is not named, the
    fastest that fits the device and the precision. The plan prints what is chosen, and in how many modules of the model.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str] = Field(init=False)

    default: Literal["auto", "reference"] = "auto"
    """For every op that is not named here. `reference`: plain PyTorch, and the model's own code as it is."""

    def asked(self, names: Iterable[str]) -> dict[str, str]:
        """Provider by op: of the ops with these names, and of whatever else the user wrote."""
        return {**({} if self.default == "auto" else dict.fromkeys(names, self.default)), **self.__pydantic_extra__}


class TrainSection(Section):
    """How long to train and what to report. The keys of evaluation, logging, statistics, `non_finite` and `processes` are for `colossal
    train`: a script has its own loop, in which `result.skipped` says that an update was left out.
    """

    num_steps: Positive = 100
    """Optimizer steps."""
    eval_every_steps: Count = 0
    """Steps between evaluations on held-out text; one more is made after the last step. 0: only after the last step."""
    eval_num_batches: Positive = 16
    """Global batches in one evaluation; fewer where the held-out text is shorter."""
    log_every_steps: Positive = 1
    """Steps between lines of metrics. Reading them waits for the device."""
    gradient_statistics_every_steps: Count = 0
    """Steps between statistics of the gradients of each block and of all: norm, largest element, share of zeros, not finite. 0: never."""
    seed: int = 0
    """Seed of initialisation and of every random number in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. `auto`: the accelerator that torch finds, else the CPU."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient norm that is not finite does, beside skipping the update: end the run, or go on. A norm in fp16 goes on."""
    processes: Positive | None = None
    """Local workers that `colossal train` starts. null: one for each accelerator, or one."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 180.0
    """How long a collective may wait for a rank before the run is stopped with a report."""


class CheckpointConfig(Section):
    """Where and how often `colossal train` saves and starts again. A script calls `trained.save` and `trained.load`; `keep` holds there."""

    directory: str = "runs/default"
    """The run's folder: checkpoints, metrics, TensorBoard events and the loss curve."""
    every_steps: Count = 0
    """Steps between checkpoints; one more is saved after the last step. 0: only after the last step."""
    keep: Positive = 2
    """Newest checkpoints to keep; at least two, so that a damaged one has a predecessor, where `every_steps` is not 0."""
    resume: bool = True
    """Start from the newest good checkpoint in the folder. false: refuse a folder that has one."""
