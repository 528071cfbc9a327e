"""Options of the commands other than the training configuration: one small frozen model per command.

Long because the options of every command are here.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from bigbatch.lm.bench.entries import SAMPLES, read_entry
from bigbatch.lm.config.field_types import LARGEST_COUNT, Count, Device, Folder, MemoryText, Number, Seed, Text, Whole

LARGEST_PARTS = 99_999  # of bigbatch tokenize: numbers of five digits


def _split_commas(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


def _read_part(value: object) -> object:
    """Read ``I/N`` as (I, N)."""
    if not isinstance(value, str):
        return value
    number, _, of = value.partition("/")
    if not (number.isascii() and number.isdigit() and of.isascii() and of.isdigit()):
        raise PydanticCustomError("part", "it must be I/N, such as 0/8 for the first of eight parts")
    if not 0 <= int(number) < int(of) <= LARGEST_PARTS:
        raise PydanticCustomError(
            "part", "parts count from 0, so I must be less than N, and N at most {most}", {"most": LARGEST_PARTS}
        )
    return int(number), int(of)


def _check_entry(value: str) -> str:
    try:
        read_entry(value)
    except ValueError as error:
        raise PydanticCustomError("contestant", "{demand}", {"demand": str(error)}) from None
    return value.strip()


class VerifyOptions(BaseModel):
    """Options of ``bigbatch verify``.

    ``cuts`` are micro-batch sizes in sequences; ``None`` selects the default sizes. ``as_json`` is ``--json``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cuts: Annotated[tuple[Count, ...], BeforeValidator(_split_commas)] | None = Field(
        default=None,
        description="micro-batch sizes to compare, in sequences, such as 1,2,4 (default: powers of two "
        "below the batch, and 3)",
    )
    samples: Count = Field(default=16, description="sequences in the batch that is split")
    order: bool = Field(
        default=False,
        description="also compare 8 random orders and cuts of the micro-batches, and the full batch in these orders",
    )
    as_json: bool = Field(default=False, alias="json", description="print one JSON object instead of a table")


class PlanOptions(BaseModel):
    """Options of ``bigbatch plan``. ``as_json`` is ``--json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cards: Count = Field(
        default=1,
        description="GPUs of one machine that share the global batch and, with --parallel fsdp or hsdp, the model; "
        "more than 1 prints the table of --offload",
    )
    host_memory: MemoryText | None = Field(
        default=None,
        description="host memory for --offload on all GPUs of a machine, such as 128GiB (default: what is available "
        "on this machine if it has the GPU, else unlimited)",
    )
    as_json: bool = Field(default=False, alias="json", description="print one JSON object instead of text")


class InspectOptions(BaseModel):
    """Options of ``bigbatch inspect``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: Whole = Field(default=3, ge=0, le=LARGEST_COUNT, description="documents to print, chosen with --seed")


class TokenizeOptions(BaseModel):
    """Options of ``bigbatch tokenize``: where the tokens go, and which part of them this process makes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Folder = Field(description="folder of the tokens, for --data of bigbatch train; it must not exist or be empty")
    shard: Annotated[tuple[int, int], BeforeValidator(_read_part)] = Field(
        default=(0, 1),
        json_schema_extra={"placeholder": "I/N"},
        description="make part I of N, from 0, so that N processes or machines make all of them: 0/8 to 7/8, with the "
        "same flags (default: 0/1, everything in this process)",
    )


class CacheOptions(BaseModel):
    """Options of ``bigbatch cache``: which cache, and what to remove."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache: Folder | None = Field(
        default=None,
        description="folder of the token cache (default: $XDG_CACHE_HOME/bigbatch, else ~/.cache/bigbatch)",
    )
    remove: bool = Field(default=False, description="remove the entries that are listed, instead of keeping them")
    unused_for: Number = Field(
        default=0.0, ge=0, description="list only entries that no run has used for so many days; 0 = all"
    )


class ResumeOptions(BaseModel):
    """Options of ``bigbatch resume``: the run, and the kinds of settings that may change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Folder = Field(description="directory of the run")
    allow_batch_change: bool = Field(
        default=False, description="accept another global batch; schedule and order of the data change"
    )
    allow_data_change: bool = Field(default=False, description="accept other data")
    allow_seed_change: bool = Field(default=False, description="accept another order of the data")

    @property
    def allowed(self) -> tuple[str, ...]:
        """Kinds of settings that may change: any of ``"batch"``, ``"data"`` and ``"seed"``."""
        kinds = {"batch": self.allow_batch_change, "data": self.allow_data_change, "seed": self.allow_seed_change}
        return tuple(kind for kind, allowed in kinds.items() if allowed)


class SourceOptions(BaseModel):
    """Sources of a configuration other than its own flags; a file of settings may contain neither of these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: Folder | None = Field(
        default=None,
        description="a file with any of the settings above: TOML, written as global_batch = 64, or YAML (.yaml or "
        ".yml), as global_batch: 64; flags override it (default: none)",
    )
    gradient_accumulation_steps: Count | None = Field(
        default=None,
        description="sets --microbatch to the global batch divided by N, rounded up; for commands written for other "
        "tools (default: none)",
    )


class GenerateOptions(BaseModel):
    """Options of ``bigbatch generate``: the model, the prompt and the sampling settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Folder = Field(description="directory of a trained run")
    prompt: Text = Field(default="def ", description="start of the text, in quotes")
    chat: Text | None = Field(
        default=None,
        json_schema_extra={"alone": "", "placeholder": "MESSAGE"},
        description="answer a message of a user, in quotes, with the chat template of the model, instead of continuing "
        "a text; on a terminal without a value: a conversation, until Ctrl-D (default: none)",
    )
    system: Text | None = Field(
        default=None,
        min_length=1,
        json_schema_extra={"placeholder": "MESSAGE"},
        description="system message of the conversation of --chat, in quotes (default: none)",
    )
    max_new_tokens: Count | None = Field(
        default=None, description="maximum number of new tokens (default: 120, with --chat 512)"
    )
    temperature: Number = Field(
        default=0.8, ge=0, description="0 = always the most likely token; higher values are more random"
    )
    top_k: Whole = Field(
        default=50, ge=0, le=LARGEST_COUNT, description="sample from the K most likely tokens; 0 = from all tokens"
    )
    seed: Seed = Field(default=0, description="random seed; the same seed produces the same text")
    device: Device = Field(
        default="auto", description="auto, cpu, cuda, cuda:N or mps; auto = the best available device"
    )
    model: Text | None = Field(
        default=None,
        min_length=1,
        description="folder or Hub name of the model under the LoRA adapters of the run (default: the one they name)",
    )

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        names = {"first": "prompt", "second": "chat", "third": "system"}
        if self.chat is not None and "prompt" in self.model_fields_set:
            raise PydanticCustomError("exclusive", "{first} and {second} exclude each other: give one of them", names)
        if self.system is not None and self.chat is None:
            raise PydanticCustomError("idle", "{third} does nothing without {second}: give both", names)
        return self


class MergeOptions(BaseModel):
    """Options of ``bigbatch merge``: the adapters, the model that they are merged into, and the folder to write."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Folder = Field(description="directory of a run with --lora-rank, or a folder of LoRA adapters")
    out: Folder = Field(description="new or empty folder for the model and its tokenizer")
    model: Text | None = Field(
        default=None,
        min_length=1,
        description="folder or Hub name of the model that the adapters were trained on (default: the one they name)",
    )


class CheckpointsOptions(BaseModel):
    """Options of ``bigbatch checkpoints``. ``as_json`` is ``--json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Folder = Field(description="directory of a run")
    as_json: bool = Field(default=False, alias="json", description="print one JSON object instead of lines")


class AdviseOptions(BaseModel):
    """Options of ``bigbatch advise``. ``as_json`` is ``--json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Folder = Field(description="directory of a run")
    branch: bool = Field(
        default=False,
        description="train short branches from the last checkpoint at 1, 2, 4 and 8 times the batch, over the same "
        "samples, and report the largest batch without loss penalty; the run is not changed",
    )
    branch_updates: Count = Field(
        default=8, description="updates of the branch with the largest batch; the others use the same samples"
    )
    as_json: bool = Field(default=False, alias="json", description="print one JSON object instead of text")


class DiffOptions(BaseModel):
    """Options of ``bigbatch diff``: two runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runs: Annotated[tuple[Folder, ...], Field(min_length=1)] = Field(
        description="directories of two runs that were started with --reproducible"
    )


class ReportOptions(BaseModel):
    """Options of ``bigbatch report``: the runs, and the output file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runs: Annotated[tuple[Folder, ...], Field(min_length=1)] = Field(
        description="directory of a run; several runs are compared on one page"
    )
    out: Folder | None = Field(
        default=None,
        json_schema_extra={"placeholder": "FILE"},
        description="output file (default: report.html in RUN, or comparison.html in the first of several runs)",
    )
    watch: bool = Field(
        default=False,
        description="rewrite the page after every update until the run ends; the page reloads itself",
    )


class BenchOptions(BaseModel):
    """Options of ``bigbatch bench``. ``as_json`` is ``--json``; ``only`` is None for all tools."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workload: Literal["auto", "w", "w-1.5b", "w-lora", "w-7b-lora", "w-small"] = Field(
        default="auto",
        description="model and batch of the update. w, on CUDA: Qwen2 with 494M parameters, 256 sequences with 92,493 "
        "tokens in total, bf16. w-1.5b, on CUDA: the same with 1.5B parameters. w-lora, on CUDA: LoRA adapters on "
        "Qwen2 with 1.5B parameters, 64 such sequences. w-7b-lora, on CUDA: the same with 7.6B parameters. "
        "w-small, on the CPU: Qwen2 with 4M parameters, 32 sequences with 1,444 tokens, float32, about a minute. "
        "auto = w if CUDA is available, else w-small",
    )
    memory: MemoryText | None = Field(
        default=None,
        description="GPU memory that this process may use, such as 24GiB or 30%; on the CPU only bigbatch respects it "
        "(default: 24GiB for w, 16GiB for w-lora, 40GiB for w-7b-lora, none for the others)",
    )
    rounds: Count = Field(default=2, description="timed updates per tool; the table shows the median")
    only: Annotated[tuple[Annotated[str, AfterValidator(_check_entry)], ...], BeforeValidator(_split_commas)] | None = (
        Field(
            default=None,
            description="tools to run, as NAME, or NAME:SAMPLES to set the samples per micro-batch, such as "
            "bigbatch,trainer:4; for torchtitan and the hand-written loops, rows of as many tokens as the longest "
            f"sequence (default: all, which are {', '.join(SAMPLES)})",
        )
    )
    save: Folder | None = Field(
        default=None, description="file for the table and the command that made it (default: none)"
    )
    as_json: bool = Field(default=False, alias="json", description="print one JSON object instead of a table")


def flag_key(name: str, info: FieldInfo) -> str:
    """Return the name of a field's flag, with underscores instead of dashes."""
    return info.alias or name
