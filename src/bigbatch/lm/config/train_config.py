"""What a training run is asked to do: one frozen, validated value that flags, TOML and ``config.json`` share.

    flags and TOML → TrainConfig → resolved() → the trainer, and config.json in the run directory

No torch here: the command line builds its help and its errors from these fields. It is long because every setting
stands here once, with the sentence that --help has for it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bigbatch.lm.config.batch_schedule import read
from bigbatch.lm.config.field_types import (
    LARGEST_COUNT,
    BatchScheduleText,
    Checkpointing,
    Count,
    Device,
    Folder,
    Gpu,
    LrRule,
    MemoryText,
    Microbatch,
    NormLimit,
    Number,
    Seed,
    Text,
    Whole,
)
from bigbatch.lm.config.scale_from import BatchScaling

DEFAULT_MAX_LENGTH_TINY = 128
DEFAULT_MAX_LENGTH = 1024
DEFAULT_GLOBAL_BATCH = 32
DEFAULT_EPOCHS = 1
DEFAULT_STEPS = 300  # of the tiny model on python-stdlib: the job that runs when nothing is asked
DEFAULT_LR_TINY = 5e-3
DEFAULT_LR = 2e-5
DEFAULT_LR_LORA = 2e-4
WARMUP_PERCENT = 10
VALIDATIONS_A_RUN = 10

EXCLUSIVE = (
    ("global_batch", "global_batch_tokens"),
    ("global_batch_schedule", "global_batch_tokens"),
    ("microbatch", "token_budget"),
    ("steps", "epochs"),
    ("memory", "gpu"),
)
"""Fields of which at most one is given: two names for one quantity."""


NEEDS_PERMISSION = {
    "global_batch": "batch",
    "global_batch_tokens": "batch",
    "global_batch_schedule": "batch",
    "seed": "seed",
    "data": "data",
    "skip_broken": "data",
}
"""Settings that change what a run learns, by what ``bigbatch resume`` must be allowed to change them."""

CHANGEABLE = (
    "microbatch",
    "token_budget",
    "device",
    "precision",
    "memory",
    "gpu",
    "gradient_checkpointing",
    "layout",
    "compile",
    "sample_prompt",
    "log",
    "checkpoint_every",
    "keep",
    "async_checkpoint",
    "max_skipped",
    "grace_s",
    "deterministic",
    "parallel",
    "timeout_s",
)
"""Settings that a run may go on with whatever they were: how it is computed and shown, not what is learned."""


class FieldGroup(NamedTuple):
    """Fields that ``--help`` shows together, under a title and a sentence about what they decide."""

    title: str
    about: str
    fields: tuple[str, ...]


class TrainConfig(BaseModel):
    """Describe one training run; the defaults are the small model on Python's own standard library.

    ``None`` in a field that says so stands for a default that depends on other fields. :meth:`resolved` fills in
    those that the fields alone decide; the trainer decides the rest (the folder, the device, the precision).
    Unknown names are refused. ``model_dump(mode="json")`` validates back to an equal config.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) a value out of range, of the wrong type, or an unknown name.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Text = Field(
        default="python-stdlib",
        min_length=1,
        description="what to learn from: python-stdlib (this machine's own Python files), "
        "python-stdlib-functions (docstring as prompt, body as completion), a .txt, .jsonl or .parquet file, "
        "a folder of text, or a datasets folder or hub name",
    )
    validation_fraction: Number = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share of the documents, picked by their hash, that is never trained on; 0 = no validation",
    )
    max_length: Count | None = Field(
        default=None,
        description="tokens of the longest sequence; longer documents are cut into pieces, not dropped "
        f"(default: {DEFAULT_MAX_LENGTH_TINY} for tiny, else {DEFAULT_MAX_LENGTH} or what the model can take)",
    )
    skip_broken: bool = Field(
        default=False,
        strict=True,
        description="leave out and count records that cannot be learned, instead of refusing",
    )
    model: Text = Field(
        default="tiny",
        min_length=1,
        description="tiny (a Llama of a few million parameters, from scratch, with its own tokenizer), "
        "or a folder or name that AutoModelForCausalLM loads",
    )
    lora_rank: Whole = Field(
        default=0, ge=0, le=LARGEST_COUNT, description="rank of the LoRA adapters; 0 = train all weights"
    )
    lora_alpha: Number | None = Field(
        default=None, gt=0, description="scale of the LoRA adapters (default: twice --lora-rank)"
    )
    global_batch: Count | None = Field(
        default=None,
        description="sequences behind one update, the number that decides what is learned "
        f"(default: {DEFAULT_GLOBAL_BATCH}, unless --global-batch-tokens is given)",
    )
    global_batch_tokens: Count | None = Field(
        default=None,
        description="the same in tokens: every update takes the whole sequences that come closest "
        "(default: none, the batch is counted in sequences)",
    )
    global_batch_schedule: BatchScheduleText | None = Field(
        default=None,
        description='a batch that changes at updates: "0:64 2e6:128" = from so many tokens on, so many sequences; '
        '"ramp 64 256 8e6" = in a straight line over so many tokens; "seesaw 0.5" = where the learning rate would fall '
        "to half, it falls to its root and the batch doubles (default: none, one batch)",
    )
    rebase_second_moment: bool = Field(
        default=False,
        strict=True,
        description="when the batch changes, multiply AdamW's second moment by old batch / new batch",
    )
    microbatch: Microbatch | None = Field(
        default=None,
        description="auto = the fastest that fits the memory: predicted, then tried; or sequences in one forward and "
        "backward, a matter of memory alone: the update is the same for every value, and larger than the batch means "
        "one micro-batch (default: auto, unless --token-budget is given)",
    )
    token_budget: Count | None = Field(
        default=None,
        description="tokens, padding included, in one forward and backward; sequences of like length come together "
        "(default: none, --microbatch decides)",
    )
    steps: Count | None = Field(
        default=None,
        description=f"optimizer updates to make (default: {DEFAULT_STEPS} for tiny on python-stdlib, "
        "else as many as --epochs needs)",
    )
    epochs: Count | None = Field(
        default=None,
        description=f"passes over the training documents, instead of --steps (default: {DEFAULT_EPOCHS} where "
        "--steps has no default)",
    )
    lr: Number | None = Field(
        default=None,
        gt=0,
        description=f"peak learning rate (default: {DEFAULT_LR_TINY:g} for tiny, {DEFAULT_LR:g} for other models, "
        f"{DEFAULT_LR_LORA:g} with LoRA)",
    )
    scale_from: Count | None = Field(
        default=None,
        description="global batch, in the unit of this run's, that --lr and AdamW's betas were tuned at: prints what "
        "each rule would change, and changes nothing without --lr-rule (default: none)",
    )
    lr_rule: LrRule = Field(
        default="none",
        description="change them, for k times the batch of --scale-from: sqrt = lr by √k; sde = that, 1 − k·(1 − β) "
        "for both betas and epsilon by 1/√k; half-life = β2 to the power of k; sqrt+half-life = both; linear = lr by "
        "k, the rule of SGD",
    )
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="learning rate after the warm-up, by step"
    )
    warmup_steps: Whole | None = Field(
        default=None,
        ge=0,
        le=LARGEST_COUNT,
        description=f"updates over which the learning rate rises from zero (default: {WARMUP_PERCENT} % of the steps)",
    )
    weight_decay: Number = Field(default=0.1, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: NormLimit = Field(
        default=1.0, description="largest norm of the whole batch's gradient; 0 or none = no clipping"
    )
    seed: Seed = Field(default=0, description="decides the initial weights and the order of the documents")
    device: Device = Field(default="auto", description="auto, cpu, cuda, cuda:N or mps; auto = the best there is")
    precision: Literal["auto", "float32", "float64", "bf16", "bf16-weights", "fp16"] = Field(
        default="auto",
        description="bf16 and fp16 = autocast over float32 weights; bf16-weights = weights in bf16, gradient sums "
        "in float32; auto = bf16 on CUDA, float32 elsewhere",
    )
    memory: MemoryText | None = Field(
        default=None,
        description="memory that the run may use, such as 24GiB or 80% (default: what is free when it begins, less a "
        "margin)",
    )
    gpu: Gpu | None = Field(
        default=None, description="the same by the name of a card, such as a100-40gb (default: none)"
    )
    gradient_checkpointing: Checkpointing = Field(
        default="auto",
        json_schema_extra={"alone": "full"},
        description="layers whose activations are computed once more in backward instead of kept, in less memory and "
        "about a third more time: none, selective (every second layer) or full; auto = what is fastest in the memory "
        "where --microbatch is auto, else none; without a value: full",
    )
    layout: Literal["auto", "padded", "packed"] = Field(
        default="auto",
        description="padded = a row for each sequence; packed = one row without padding, whose sequences do not see "
        "one another; auto = packed on CUDA, where the model itself shows that it makes no difference",
    )
    compile: Literal["auto", "none", "layers", "graphs"] = Field(
        default="auto",
        description="layers = compile the layers of the model, in some seconds; graphs = and launch each micro-batch "
        "as one CUDA graph; auto = graphs on CUDA, none elsewhere",
    )
    parallel: Literal["ddp", "fsdp", "hsdp"] = Field(
        default="ddp",
        description="ddp = the whole model on every rank; fsdp = each rank holds a shard of weights, gradients and "
        "optimizer state; hsdp = shards within a machine, and each machine a replica",
    )
    timeout_s: Number = Field(
        default=600.0,
        gt=0,
        description="seconds without an update after which a rank takes the others for lost, writes where it stands, "
        "and ends",
    )
    out: Folder | None = Field(
        default=None, description="the run directory (default: runs/MODEL-DATA, numbered when that exists)"
    )
    validation_every: Count | None = Field(
        default=None,
        description=f"updates between two validations (default: about {VALIDATIONS_A_RUN} validations a run)",
    )
    sample_prompt: Text = Field(default="def ", description="start of the text that a validation lets the model write")
    log: Literal["none", "tensorboard", "trackio"] = Field(
        default="none",
        description="a dashboard that hears every update beside metrics.jsonl, where it is installed: tensorboard "
        "writes to tensorboard/ in the run directory, trackio to a folder of its own",
    )
    checkpoint_every: Count = Field(
        default=50, description="updates between two checkpoints, from which bigbatch resume goes on"
    )
    keep: Count = Field(default=2, description="checkpoints to keep; older ones go when a new one verifies")
    async_checkpoint: bool = Field(
        default=False,
        strict=True,
        description="write checkpoints beside the training, from a copy in the memory of the host",
    )
    max_skipped: Count = Field(
        default=50, description="updates in a row that may be skipped, for want of finite numbers, before the run fails"
    )
    grace_s: Number = Field(
        default=30.0,
        ge=0,
        description="seconds after a signal in which the update is finished; then it is given up, and the run saved as "
        "it was before",
    )
    deterministic: bool = Field(
        default=False,
        strict=True,
        description="the same bytes from every run on the same machine: kernels that add in one order, no clock in "
        "metrics.jsonl, and no auto, which depends on the clock",
    )

    @model_validator(mode="after")
    def _name_each_quantity_once(self) -> Self:
        for first, second in EXCLUSIVE:
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise PydanticCustomError(
                    "exclusive",
                    "{first} and {second} exclude each other: give one of them",
                    {"first": first, "second": second},
                )
        return self

    @model_validator(mode="after")
    def _refuse_what_would_do_nothing(self) -> Self:
        if self.lora_alpha is not None and not self.lora_rank:
            names = {"first": "lora_alpha", "second": "lora_rank"}
            raise PydanticCustomError("idle", "{first} does nothing without {second}: give both", names)
        if self.warmup_steps is not None and self.steps is not None and self.warmup_steps > self.steps:
            names = {"first": "warmup_steps", "second": "steps"}
            raise PydanticCustomError(
                "idle", "{first} is more than {second}: the learning rate would never reach its peak", names
            )
        return self

    @model_validator(mode="after")
    def _begin_with_one_batch(self) -> Self:
        if self.global_batch_schedule is None:
            if self.rebase_second_moment:
                names = {"first": "rebase_second_moment", "second": "global_batch_schedule"}
                raise PydanticCustomError("idle", "{first} does nothing without {second}: give both", names)
            return self
        first = read(self.global_batch_schedule).first
        if first is not None and self.global_batch not in (None, first):
            raise PydanticCustomError(
                "exclusive",
                "{first} and {second} exclude each other: give one of them",
                {"first": "global_batch", "second": "global_batch_schedule"},
            )
        return self

    @model_validator(mode="after")
    def _refuse_a_rule_that_cannot_be_applied(self) -> Self:
        names = {"first": "lr_rule", "second": "scale_from"}
        if self.lr_rule != "none" and self.scale_from is None:
            raise PydanticCustomError("idle", "{first} does nothing without {second}: give both", names)
        if (why := self.batch_scaling().problem()) is not None:
            raise PydanticCustomError("out_of_range", "{why}", names | {"why": why})
        return self

    def batch_scaling(self) -> BatchScaling:
        """Return how ``scale_from`` and ``lr_rule`` change the hyperparameters."""
        config = self.resolved()
        batch = config.global_batch or config.global_batch_tokens
        assert batch is not None, "resolved() sets one of the two"
        assert config.lr is not None, "resolved() sets it"
        unit = "tokens" if config.global_batch is None else "sequences"
        return BatchScaling(config.lr, batch, unit, config.scale_from, config.lr_rule)

    def resolved(self) -> TrainConfig:
        """Return the same run with every default written out that the fields alone decide.

        After it ``lr``, ``max_length`` of the tiny model, exactly one of ``global_batch`` and ``global_batch_tokens``,
        exactly one of ``steps`` and ``epochs``, and ``lora_alpha`` (when ``lora_rank`` is not 0) are numbers, and
        ``microbatch`` is ``"auto"`` or a number unless ``token_budget`` is one. Resolving twice changes nothing.
        """
        decided: dict[str, int | float | str] = {}
        if self.max_length is None and self.model == "tiny":
            decided["max_length"] = DEFAULT_MAX_LENGTH_TINY
        if self.global_batch is None and self.global_batch_tokens is None:
            schedule = None if self.global_batch_schedule is None else read(self.global_batch_schedule)
            decided["global_batch"] = (
                DEFAULT_GLOBAL_BATCH if schedule is None else schedule.first or DEFAULT_GLOBAL_BATCH
            )
        if self.microbatch is None and self.token_budget is None:
            decided["microbatch"] = "auto"
        if self.steps is None and self.epochs is None:
            if self.data == "python-stdlib" and self.model == "tiny":
                decided["steps"] = DEFAULT_STEPS
            else:
                decided["epochs"] = DEFAULT_EPOCHS
        if self.lr is None:
            plain = DEFAULT_LR_TINY if self.model == "tiny" else DEFAULT_LR
            decided["lr"] = DEFAULT_LR_LORA if self.lora_rank else plain
        if self.lora_alpha is None and self.lora_rank:
            decided["lora_alpha"] = 2.0 * self.lora_rank
        return self.model_copy(update=decided)

    def warmup_steps_of(self, total_steps: int) -> int:
        """Return the warm-up of a run of ``total_steps`` updates: as asked, else 10 % of them, rounded down."""
        return total_steps * WARMUP_PERCENT // 100 if self.warmup_steps is None else self.warmup_steps

    def validation_every_of(self, total_steps: int) -> int:
        """Return the updates between two validations of a run of ``total_steps`` updates: at least 1."""
        return max(1, total_steps // VALIDATIONS_A_RUN) if self.validation_every is None else self.validation_every


GROUPS = (
    FieldGroup("data", "What is learned from.", ("data", "validation_fraction", "max_length", "skip_broken")),
    FieldGroup("model", "What learns it.", ("model", "lora_rank", "lora_alpha")),
    FieldGroup(
        "batch",
        "How much is behind one update, and how much of it is in memory at once. Only the global batch changes the "
        "result.",
        (
            "global_batch",
            "global_batch_tokens",
            "global_batch_schedule",
            "rebase_second_moment",
            "microbatch",
            "token_budget",
        ),
    ),
    FieldGroup("length", "How long: updates or passes, one of the two.", ("steps", "epochs")),
    FieldGroup(
        "optimization",
        "AdamW. Everything here counts in updates, never in micro-batches.",
        ("lr", "scale_from", "lr_rule", "schedule", "warmup_steps", "weight_decay", "max_grad_norm", "seed"),
    ),
    FieldGroup(
        "machine",
        "Where it runs, and in how much memory.",
        ("device", "precision", "memory", "gpu", "gradient_checkpointing", "layout", "compile"),
    ),
    FieldGroup(
        "ranks",
        "How the processes that torchrun starts share the work; without torchrun there is one. The update is the same "
        "for every number of them.",
        ("parallel", "timeout_s"),
    ),
    FieldGroup("output", "What it leaves behind and shows.", ("out", "validation_every", "sample_prompt", "log")),
    FieldGroup(
        "safety",
        "What holds when something happens.",
        ("checkpoint_every", "keep", "async_checkpoint", "max_skipped", "grace_s", "deterministic"),
    ),
)
"""Every field of :class:`TrainConfig` in the order of ``--help``."""
