"""What each command takes: the small frozen models beside the training configuration, and the table of commands.

It is long because every flag and every command stands here once, with the sentence that --help has for it.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from bigbatch.lm.bench.entries import SAMPLES, read_entry
from bigbatch.lm.config.field_groups import CHANGEABLE, GROUPS, NEEDS_PERMISSION, FieldGroup
from bigbatch.lm.config.field_types import LARGEST_COUNT, Count, Device, Folder, MemoryText, Number, Seed, Text, Whole
from bigbatch.lm.config.train_config import TrainConfig


def _split_commas(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


def _contestant(value: str) -> str:
    try:
        read_entry(value)
    except ValueError as error:
        raise PydanticCustomError("contestant", "{demand}", {"demand": str(error)}) from None
    return value.strip()


class VerifyOptions(BaseModel):
    """What ``bigbatch verify`` proves, beside the model, data and loss of the run.

    ``cuts`` are micro-batch sizes in sequences; ``None`` leaves them to the command. ``as_json`` is ``--json``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cuts: Annotated[tuple[Count, ...], BeforeValidator(_split_commas)] | None = Field(
        default=None,
        description="micro-batch sizes to compare, in sequences, such as 1,2,4 (default: powers of two "
        "below the batch, and 3)",
    )
    samples: Count = Field(default=16, description="sequences in the batch that is cut")
    as_json: bool = Field(default=False, alias="json", description="print one JSON object instead of a table")


class PlanOptions(BaseModel):
    """How ``bigbatch plan`` answers. ``as_json`` is ``--json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    as_json: bool = Field(default=False, alias="json", description="print one JSON object instead of sentences")


class ResumeOptions(BaseModel):
    """Which run ``bigbatch resume`` goes on with, and what of it may be otherwise than it was."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Folder = Field(description="the folder of the run")
    allow_batch_change: bool = Field(
        default=False, description="go on with another global batch: schedule and order of the data change"
    )
    allow_data_change: bool = Field(default=False, description="go on with other data")
    allow_seed_change: bool = Field(default=False, description="go on in another order of the data")

    @property
    def allowed(self) -> tuple[str, ...]:
        """What may be changed."""
        kinds = {"batch": self.allow_batch_change, "data": self.allow_data_change, "seed": self.allow_seed_change}
        return tuple(kind for kind, allowed in kinds.items() if allowed)


class SourceOptions(BaseModel):
    """Where a configuration comes from beside its own flags; a TOML file may hold neither of these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: Folder | None = Field(
        default=None,
        description="a TOML file with any of the settings above as global_batch = 64; flags win (default: none)",
    )
    gradient_accumulation_steps: Count | None = Field(
        default=None,
        description="sets --microbatch to the global batch over N, rounded up, for commands written for other "
        "tools (default: none)",
    )


class GenerateOptions(BaseModel):
    """What ``bigbatch generate`` writes, from which run and how freely."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Folder = Field(description="the folder of a trained run")
    prompt: Text = Field(default="def ", description="the text to go on from, in quotes")
    max_new_tokens: Count = Field(default=120, description="tokens to write at most")
    temperature: Number = Field(default=0.8, ge=0, description="0 = always the likeliest token; higher is freer")
    top_k: Whole = Field(
        default=50, ge=0, le=LARGEST_COUNT, description="choose among the K likeliest tokens; 0 = among all"
    )
    seed: Seed = Field(default=0, description="the same seed writes the same text")
    device: Device = Field(default="auto", description="auto, cpu, cuda, cuda:N or mps; auto = the best there is")


class CheckpointsOptions(BaseModel):
    """Whose checkpoints ``bigbatch checkpoints`` lists. ``as_json`` is ``--json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Folder = Field(description="the folder of a run")
    as_json: bool = Field(default=False, alias="json", description="print one JSON object instead of lines")


class AdviseOptions(BaseModel):
    """Which run ``bigbatch advise`` looks at, and how closely. ``as_json`` is ``--json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Folder = Field(description="the folder of a run")
    branch: bool = Field(
        default=False,
        description="train short branches from the last checkpoint at 1, 2, 4 and 8 times the batch, over the same "
        "samples, and report the largest without loss penalty; the run stays as it is",
    )
    branch_updates: Count = Field(
        default=8, description="updates of the branch with the largest batch; the others take as many samples"
    )
    as_json: bool = Field(default=False, alias="json", description="print one JSON object instead of sentences")


class ReportOptions(BaseModel):
    """Of which runs ``bigbatch report`` makes a page, and where it puts it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runs: Annotated[tuple[Folder, ...], Field(min_length=1)] = Field(
        description="the folder of a run; several are compared on one page"
    )
    out: Folder | None = Field(
        default=None,
        json_schema_extra={"placeholder": "FILE"},
        description="the page (default: report.html in RUN, or comparison.html in the first of several)",
    )
    watch: bool = Field(
        default=False,
        description="write the page again whenever the run makes an update, until it ends; the page reloads itself",
    )


class BenchOptions(BaseModel):
    """What ``bigbatch bench`` compares. ``as_json`` is ``--json``; ``only`` is None for everyone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workload: Literal["auto", "w", "w-lora", "w-small"] = Field(
        default="auto",
        description="the update that everyone takes. w, on CUDA: Qwen2 of 494M parameters, 256 sequences of 92,493 "
        "tokens in all, bf16. w-lora, on CUDA: adapters on a Qwen2 of 1.5B, 64 such sequences. w-small, on the CPU: "
        "one of 4M, 32 sequences of 1,444, float32, about a minute. auto = w where there is CUDA, else w-small",
    )
    memory: MemoryText | None = Field(
        default=None,
        description="what this process may take of the GPU, such as 24GiB or 30%; on the CPU only bigbatch keeps to it "
        "(default: 24GiB for w, 16GiB for w-lora, none for w-small)",
    )
    rounds: Count = Field(default=2, description="timed updates of each; the table has the median")
    only: Annotated[tuple[Annotated[str, AfterValidator(_contestant)], ...], BeforeValidator(_split_commas)] | None = (
        Field(
            default=None,
            description="who takes part, NAME or NAME:SAMPLES for another number of samples at a time, such as "
            f"bigbatch,trainer:4 (default: all, which are {', '.join(SAMPLES)})",
        )
    )
    save: Folder | None = Field(
        default=None, description="a file to write the table to, with the command above it (default: none)"
    )
    as_json: bool = Field(default=False, alias="json", description="print one JSON object instead of a table")


FOREIGN_NAMES = {
    "learning_rate": "lr",
    "batch_size": "global_batch",
    "train_batch_size": "global_batch",
    "total_batch_size": "global_batch",
    "per_device_train_batch_size": "microbatch",
    "micro_batch_size": "microbatch",
    "device_batch_size": "microbatch",
    "auto_find_batch_size": "microbatch",
    "max_tokens": "token_budget",
    "max_tokens_per_batch": "token_budget",
    "batch_tokens": "token_budget",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "grad_accum_steps": "gradient_accumulation_steps",
    "max_steps": "steps",
    "max_iters": "steps",
    "num_iterations": "steps",
    "num_train_epochs": "epochs",
    "max_seq_length": "max_length",
    "block_size": "max_length",
    "warmup": "warmup_steps",
    "gradient_clip_val": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "lr_scheduler_type": "schedule",
    "model_name_or_path": "model",
    "dataset": "data",
    "eval_steps": "validation_every",
    "output_dir": "out",
    "dtype": "precision",
    "gpu_memory": "memory",
    "max_memory": "memory",
    "vram": "memory",
    "activation_checkpointing": "gradient_checkpointing",
}
"""What other tools call our settings, for the suggestion beside an unknown one; never accepted as input."""


def flag_key(name: str, info: FieldInfo) -> str:
    """Return what a field's flag is called, underscores for dashes."""
    return info.alias or name


Section = tuple[type[BaseModel], FieldGroup]
"""Flags that the help shows together, and the model that validates them."""


class Command(NamedTuple):
    """What one command takes, and what its ``--help`` says around the flags.

    ``words`` says to somebody who gave more than the ``positionals`` which words there are beside flags; where the
    command ``gathers``, its only positional takes all of them.
    """

    about: str
    examples: tuple[str, ...]
    sections: tuple[Section, ...]
    positionals: tuple[str, ...] = ()
    usage_words: str = "flags alone"
    collects_all: bool = False

    def models(self) -> tuple[type[BaseModel], ...]:
        """Return the models behind the flags, each once, in order."""
        return tuple(dict.fromkeys(model for model, _ in self.sections))

    def fields(self) -> dict[str, FieldInfo]:
        """Return every field by the name that its flag has, underscores for dashes."""
        return {
            flag_key(name, model.model_fields[name]): model.model_fields[name]
            for model, group in self.sections
            for name in group.fields
        }


_SOURCE: Section = (SourceOptions, FieldGroup("file", "Settings from elsewhere.", tuple(SourceOptions.model_fields)))
_CONFIG: tuple[Section, ...] = (*((TrainConfig, group) for group in GROUPS), _SOURCE)

RESUMED = tuple(
    group._replace(fields=fields)
    for group in GROUPS
    if (fields := tuple(name for name in group.fields if name in CHANGEABLE or name in NEEDS_PERMISSION))
)
"""The settings that ``resume`` takes: those that a run may go on with, some of them only where that is allowed."""

COMMANDS = {
    "train": Command(
        about="Pretrain or fine-tune a causal language model with the batch you name; the micro-batch only has to "
        "fit in memory, the updates are those of the whole batch. Without any flag: a small model on Python's own "
        "standard library, minutes on a CPU.",
        examples=(
            "bigbatch train",
            "bigbatch train --data texts/ --global-batch 512 --memory 24GiB --epochs 2",
        ),
        sections=_CONFIG,
    ),
    "resume": Command(
        about="Go on with a run that was stopped or killed, as if it never had been: from the newest checkpoint that "
        "verifies, with the same samples in the same order. What the run learns from and how cannot change; how it is "
        "computed can: flags given here replace the run's own.",
        examples=("bigbatch resume runs/tiny-python-stdlib", "bigbatch resume RUN --memory 16GiB"),
        sections=(
            (ResumeOptions, FieldGroup("run", "What is gone on with.", tuple(ResumeOptions.model_fields))),
            *((TrainConfig, group) for group in RESUMED),
        ),
        positionals=("run",),
    ),
    "plan": Command(
        about="Say what a run would take in memory, micro-batches and time before anything is spent, for this machine "
        "or, by --memory or --gpu, for another. Takes the flags of train; trains and writes nothing.",
        examples=(
            "bigbatch plan",
            "bigbatch plan --model meta/llama-folder --gpu a100-40gb --global-batch 512 --json",
        ),
        sections=((PlanOptions, FieldGroup("plan", "How it answers.", tuple(PlanOptions.model_fields))), *_CONFIG),
    ),
    "verify": Command(
        about="Prove on this model, loss and data that every way of cutting the batch gives the gradient of the "
        "whole batch, beside what averaging the micro-batches' means would give. Takes the flags of train and "
        "trains nothing; the exit code is 0 only if every cut is exact.",
        examples=("bigbatch verify", "bigbatch verify --data chats.jsonl --precision float64 --cuts 1,2,4 --json"),
        sections=(
            (VerifyOptions, FieldGroup("proof", "What is compared.", tuple(VerifyOptions.model_fields))),
            *_CONFIG,
        ),
    ),
    "generate": Command(
        about="Let a trained run go on with a text.",
        examples=("bigbatch generate runs/tiny-python-stdlib", 'bigbatch generate RUN "class Tree" --temperature 0'),
        sections=((GenerateOptions, FieldGroup("writing", "How it writes.", tuple(GenerateOptions.model_fields))),),
        positionals=("run", "prompt"),
        usage_words="RUN and one PROMPT, in quotes if it holds spaces",
    ),
    "checkpoints": Command(
        about="List the checkpoints of a run with step, size and time, and say which are whole: every byte is read and "
        "held to what was written. Loads and changes nothing; the exit code is 0 if at least one is whole.",
        examples=("bigbatch checkpoints runs/tiny-python-stdlib", "bigbatch checkpoints RUN --json"),
        sections=((CheckpointsOptions, FieldGroup("list", "How it answers.", tuple(CheckpointsOptions.model_fields))),),
        positionals=("run",),
        usage_words="one RUN",
    ),
    "advise": Command(
        about="Say in plain words whether the batch of a run is far below, near or far above its gradient noise scale, "
        "what accumulating costs here, and whether a smaller batch would reach the same loss sooner. A guide and not "
        "an oracle: --branch tries.",
        examples=("bigbatch advise runs/tiny-python-stdlib", "bigbatch advise RUN --branch"),
        sections=(
            (AdviseOptions, FieldGroup("advice", "Of which run, and how closely.", tuple(AdviseOptions.model_fields))),
        ),
        positionals=("run",),
    ),
    "report": Command(
        about="Write one HTML page of a run: loss and validation, learning rate, gradient norm, noise scale, speed, "
        "memory predicted beside measured, the micro-batches of a window, what was skipped and resumed, the proof of "
        "verify, settings and versions. It needs nothing else: no network, no other file. Several runs are compared. A "
        "run that is going on is reported as far as it is.",
        examples=("bigbatch report runs/tiny-python-stdlib --watch", "bigbatch report RUN RUN --out side-by-side.html"),
        sections=(
            (ReportOptions, FieldGroup("page", "What it is of, and where it goes.", tuple(ReportOptions.model_fields))),
        ),
        positionals=("runs",),
        usage_words="the folders of runs",
        collects_all=True,
    ),
    "bench": Command(
        about="Take one update with bigbatch, with transformers' Trainer, accelerate and Lightning, on the same model, "
        "batch, optimizer and memory, and compare: tokens a second, peak memory, and how near the gradient that the "
        "optimizer was given is to that of the whole batch (cosine 1 and norm 1: the same update; a mean of the "
        "micro-batches' means is another one). Everyone begins from the same weights and takes turns; who is not "
        "installed or runs out of memory gets a row that says so.\n"
        'Needs pip install "bigbatch[train,bench]"; with liger-kernel beside it, trainer-expert uses that as well. '
        "Writes nothing but what --save names.",
        examples=(
            "bigbatch bench",
            "bigbatch bench --workload w --memory 24GiB --only bigbatch,trainer-expert:8 --json",
        ),
        sections=((BenchOptions, FieldGroup("race", "What is compared.", tuple(BenchOptions.model_fields))),),
    ),
}
