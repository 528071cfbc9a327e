"""The table of commands: flags, positional arguments and ``--help`` text of each one."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bigbatch.cli.options import (
    AdviseOptions,
    BenchOptions,
    CacheOptions,
    CheckpointsOptions,
    DiffOptions,
    GenerateOptions,
    InspectOptions,
    MergeOptions,
    PlanOptions,
    ReportOptions,
    ResumeOptions,
    SourceOptions,
    TokenizeOptions,
    VerifyOptions,
    flag_key,
)
from bigbatch.lm.config.field_groups import CHANGEABLE, GROUPS, NEEDS_PERMISSION, FieldGroup
from bigbatch.lm.config.train_config import TrainConfig

Section = tuple[type[BaseModel], FieldGroup]
"""A group of flags in ``--help``, and the model that validates them."""


class CommandSpec(NamedTuple):
    """Arguments and help text of one command.

    Attributes:
        about: Description at the top of ``--help``.
        examples: Command lines at the end of ``--help``.
        sections: Groups of flags.
        positionals: Names of the positional arguments.
        usage_words: Accepted arguments in plain words, for the error about an unexpected one.
        collects_all: Whether the only positional accepts any number of values.
        missing: The error about a missing positional, without its full stop.
    """

    about: str
    examples: tuple[str, ...]
    sections: tuple[Section, ...]
    positionals: tuple[str, ...] = ()
    usage_words: str = "flags only"
    collects_all: bool = False
    missing: str = "RUN is missing: pass the directory of a run, such as runs/tiny-python-stdlib"

    def models(self) -> tuple[type[BaseModel], ...]:
        """Return the models that validate the flags, each once, in order."""
        return tuple(dict.fromkeys(model for model, _ in self.sections))

    def fields(self) -> dict[str, FieldInfo]:
        """Return every field by the name of its flag, with underscores instead of dashes."""
        return {
            flag_key(name, model.model_fields[name]): model.model_fields[name]
            for model, group in self.sections
            for name in group.fields
        }


def _section(model: type[BaseModel], title: str, about: str) -> Section:
    return model, FieldGroup(title, about, tuple(model.model_fields))


_CONFIG: tuple[Section, ...] = (
    *((TrainConfig, group) for group in GROUPS),
    _section(SourceOptions, "file", "Settings from a file or in the terms of other tools."),
)

RESUMABLE_GROUPS = tuple(
    group._replace(fields=fields)
    for group in GROUPS
    if (fields := tuple(name for name in group.fields if name in CHANGEABLE or name in NEEDS_PERMISSION))
)
"""The settings that ``resume`` accepts; those in ``NEEDS_PERMISSION`` only with the matching ``--allow-...`` flag."""

_NOT_TOKENIZED = ("data_weights", "validation_data", "validation_fraction")
_TOKENIZER_OF = FieldGroup("model", "Its tokenizer encodes the data.", ("model", "model_config_path", "tokenizer"))
_TOKENIZED_GROUPS = (
    *(
        group._replace(fields=tuple(name for name in group.fields if name not in _NOT_TOKENIZED))
        for group in GROUPS
        if group.title in ("data", "conversations")
    ),
    _TOKENIZER_OF,
)
"""The settings that ``tokenize`` accepts: those that tokens depend on."""

COMMAND_SPECS = {
    "train": CommandSpec(
        about="Pretrain or fine-tune a causal language model with any global batch size. Only one micro-batch has to "
        "fit in memory; every update is that of the full batch. Without any flag: trains a small model on Python's "
        "standard library, in minutes on a CPU.",
        examples=(
            "bigbatch train",
            "bigbatch train --data texts/ --global-batch 512 --memory 24GiB --epochs 2",
        ),
        sections=_CONFIG,
    ),
    "resume": CommandSpec(
        about="Resume an interrupted run from its last good checkpoint; results are bit-identical on CPU. The run sees "
        "the same samples in the same order. A flag replaces a setting of the run; without it the setting is kept (the "
        "defaults below are those of a new run). Another batch, data or seed needs the matching --allow-... flag.",
        examples=("bigbatch resume runs/tiny-python-stdlib", "bigbatch resume RUN --memory 16GiB"),
        sections=(
            _section(ResumeOptions, "run", "Run to resume."),
            *((TrainConfig, group) for group in RESUMABLE_GROUPS),
        ),
        positionals=("run",),
        usage_words="one RUN",
    ),
    "plan": CommandSpec(
        about="Predict memory, micro-batches and time of a run without training: for this machine, or for another one "
        "with --memory or --gpu. Accepts the flags of train; writes nothing. With --offload or --cards: a table of "
        "what fits in the memory of a GPU, or of GPUs of 12 to 80 GB. The exit code is 1 if nothing fits in memory.",
        examples=(
            "bigbatch plan",
            "bigbatch plan --model meta/llama-folder --gpu a100-40gb --global-batch 512 --json",
            "bigbatch plan --model meta/llama-folder --offload auto",
        ),
        sections=(_section(PlanOptions, "plan", "Machine and output format."), *_CONFIG),
    ),
    "inspect": CommandSpec(
        about="Show what a run would train on: counts, lengths, and samples with what is trained on and masked. "
        "Problems are broken records, conversations that the chat template rejects, special tokens in texts, and empty "
        "answers. Accepts the flags of train about data and conversations; writes nothing. The exit code is 1 if "
        "problems are found, 0 otherwise. With --skip-broken, what a run leaves out is listed and is no problem.",
        examples=(
            "bigbatch inspect chats.jsonl",
            "bigbatch inspect chats.jsonl --model meta/llama-folder --chat-template llama-3 --samples 10",
        ),
        sections=(
            _section(InspectOptions, "inspection", "What to print."),
            *((TrainConfig, group) for group in GROUPS if group.title in ("data", "conversations")),
            (TrainConfig, FieldGroup("objective", "Which records are read.", ("objective",))),
            (TrainConfig, _TOKENIZER_OF._replace(fields=(*_TOKENIZER_OF.fields, "seed"))),
        ),
        positionals=("data",),
        usage_words="DATA",
        collects_all=True,
        missing="DATA is missing: pass the data to inspect, such as chats.jsonl",
    ),
    "tokenize": CommandSpec(
        about="Tokenize data into a folder that bigbatch train --data FOLDER uses without tokenizing it again, on any "
        "machine with the same model. Several processes or machines each make a part. Documents are stored whole: "
        "--max-length of train cuts them, and --max-length here prints into how many sequences.",
        examples=(
            "bigbatch tokenize --data corpus/ --model meta/llama-folder --out tokens/",
            "bigbatch tokenize --data corpus/ --model meta/llama-folder --out tokens/ --shard 3/8",
        ),
        sections=(
            _section(TokenizeOptions, "output", "Where the tokens go."),
            *((TrainConfig, group) for group in _TOKENIZED_GROUPS),
        ),
    ),
    "verify": CommandSpec(
        about="Verify on this model, loss and data that every split of the batch produces the gradient of the full "
        "batch. The table also shows the error of averaging the means of the micro-batches. Accepts the flags of "
        "train; trains nothing. The exit code is 0 only if every split is exact.",
        examples=("bigbatch verify", "bigbatch verify --data chats.jsonl --precision float64 --cuts 1,2,4 --json"),
        sections=(_section(VerifyOptions, "verification", "What to compare."), *_CONFIG),
    ),
    "generate": CommandSpec(
        about="Generate text with a trained model: the continuation of a prompt, or the answer to a message.",
        examples=(
            'bigbatch generate RUN "class Tree" --temperature 0',
            'bigbatch generate RUN --chat "What is a tree?" --system "Answer in one sentence."',
        ),
        sections=(_section(GenerateOptions, "generation", "Sampling settings."),),
        positionals=("run", "prompt"),
        usage_words="RUN and one PROMPT (in quotes if it contains spaces)",
    ),
    "merge": CommandSpec(
        about="Merge the LoRA adapters of a run into the model that they were trained on, in the dtype of its weights, "
        "and write it as a folder that loads without peft. The run is not changed.",
        examples=("bigbatch merge RUN --out merged", "bigbatch merge RUN/adapter --model base-folder --out merged"),
        sections=(_section(MergeOptions, "merge", "What to merge, and where to write it."),),
        positionals=("run",),
        usage_words="one RUN",
    ),
    "checkpoints": CommandSpec(
        about="List the checkpoints of a run with step, size and time, and verify them: a checkpoint is whole if every "
        "byte matches its manifest. Changes nothing. The exit code is 0 if at least one checkpoint is whole.",
        examples=("bigbatch checkpoints runs/tiny-python-stdlib", "bigbatch checkpoints RUN --json"),
        sections=(_section(CheckpointsOptions, "list", "Output format."),),
        positionals=("run",),
        usage_words="one RUN",
    ),
    "advise": CommandSpec(
        about="Compare the batch of a run with its gradient noise scale, and estimate the "
        "cost of accumulation and whether a smaller batch would reach the same loss sooner. This is an estimate; "
        "--branch measures it.",
        examples=("bigbatch advise runs/tiny-python-stdlib", "bigbatch advise RUN --branch"),
        sections=(_section(AdviseOptions, "advice", "What to analyze."),),
        positionals=("run",),
        usage_words="one RUN",
    ),
    "diff": CommandSpec(
        about="Name the first update, and the parameters, at which two runs with --reproducible differ: from the "
        "fingerprints of gradients and parameters that they write. The exit code is 0 if all updates that both runs "
        "have are equal, 1 if one differs, and 2 if they cannot be compared.",
        examples=("bigbatch diff runs/one-rank runs/four-ranks",),
        sections=(_section(DiffOptions, "runs", "What to compare."),),
        positionals=("runs",),
        usage_words="two run directories",
        collects_all=True,
    ),
    "report": CommandSpec(
        about="Write a self-contained HTML page about a run: loss, validation, learning rate, gradient norm, noise "
        "scale, speed, predicted and measured memory, the micro-batches of a window, skipped updates and resumptions, "
        "the result of verify, settings and versions. With several runs, the page compares them. A run that is still "
        "in progress is reported up to its last update.",
        examples=("bigbatch report runs/tiny-python-stdlib --watch", "bigbatch report RUN RUN --out side-by-side.html"),
        sections=(_section(ReportOptions, "page", "Output file."),),
        positionals=("runs",),
        usage_words="run directories",
        collects_all=True,
    ),
    "cache": CommandSpec(
        about="List the entries of the token cache with size and last use: the tokens of data, the samples cut from "
        "them and trained tokenizers. A run that finds no entry makes it again, so each can be removed at any time; "
        "runs in progress keep what they use.",
        examples=("bigbatch cache", "bigbatch cache --unused-for 30 --remove"),
        sections=(_section(CacheOptions, "cache", "Which entries."),),
    ),
    "bench": CommandSpec(
        about="Compare one update of bigbatch with that of transformers' Trainer, accelerate and Lightning, on the "
        "same model, batch, optimizer and memory: tokens per second, peak memory, and how close the gradient is to "
        "that of the full batch (cosine 1 and norm 1: the same update; averaging the means of the micro-batches "
        "produces another one). All tools start from the same weights and run in alternation; a tool that is missing "
        "or runs out of memory is listed as such.\n"
        'Needs pip install "bigbatch[train,bench]"; trainer-expert also uses liger-kernel if it is installed. '
        "Writes only the file named by --save.",
        examples=(
            "bigbatch bench",
            "bigbatch bench --workload w --memory 24GiB --only bigbatch,trainer-expert:8 --json",
        ),
        sections=(_section(BenchOptions, "benchmark", "What to compare."),),
    ),
}
