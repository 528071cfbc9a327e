"""The fields of a training run: type, range, default and the ``--help`` text of each setting, defined once.

Long because every setting has its description here.

No torch here: the command line builds its help and its errors from these fields.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bigbatch.lm.config.evaluation_fields import EvaluationFields
from bigbatch.lm.config.field_types import (
    BatchScheduleText,
    Count,
    Dashboards,
    Folder,
    Microbatch,
    Number,
    Seed,
    Text,
    Texts,
    Weights,
)
from bigbatch.lm.config.lora_fields import LoraFields
from bigbatch.lm.config.machine_fields import MachineFields
from bigbatch.lm.config.objective_fields import ObjectiveFields
from bigbatch.lm.config.optimization_fields import OptimizationFields
from bigbatch.lm.config.pretraining_fields import PretrainingFields
from bigbatch.lm.config.reproducible_fields import ReproducibleFields

DEFAULT_MAX_LENGTH_TINY = 128
DEFAULT_MAX_LENGTH = 1024
DEFAULT_GLOBAL_BATCH = 32
DEFAULT_EPOCHS = 1
DEFAULT_STEPS = 100  # of the tiny model on python-stdlib: the run that starts without any flag


class TrainFields(
    ObjectiveFields,
    PretrainingFields,
    EvaluationFields,
    LoraFields,
    OptimizationFields,
    MachineFields,
    ReproducibleFields,
):
    """The fields of :class:`bigbatch.lm.config.train_config.TrainConfig`, in the order of ``--help``.

    ``None`` in a field that allows it stands for a default that depends on other fields.
    """

    data: Texts = Field(
        default=("python-stdlib",),
        json_schema_extra={"several": True, "placeholder": "DATA"},
        description="training data, one source or several: python-stdlib (Python files of this machine's standard "
        "library), python-stdlib-functions (docstring as prompt, body as completion), a file of text, .jsonl, .json, "
        ".csv, .tsv, .parquet or .arrow, each also with .gz, .bz2, .xz or .zst, a folder or a pattern of files such as "
        "'logs/*.txt', a datasets folder or Hub name, or a folder or URL of shards of tokens",
    )
    data_weights: Weights | None = Field(
        default=None,
        json_schema_extra={"several": True, "placeholder": "X"},
        description="share of each source of --data in the tokens trained on, in the order of --data, such as 0.7 0.3. "
        "A source that runs out begins its next pass; an epoch is one pass over the source that needs the longest "
        "(default: none, every document once in an epoch)",
    )
    split: Text | None = Field(
        default=None,
        min_length=1,
        description="split of a dataset to train on (default: train)",
    )
    subset: Text | None = Field(
        default=None,
        min_length=1,
        description="subset (configuration) of a dataset to train on (default: none, for datasets without subsets)",
    )
    cache: Folder | None = Field(
        default=None,
        description="folder of the token cache (default: $XDG_CACHE_HOME/bigbatch, else ~/.cache/bigbatch)",
    )
    no_cache: bool = Field(
        default=False,
        strict=True,
        description="keep the tokens in a temporary folder for this run only; each process tokenizes the data",
    )
    cache_by_content: bool = Field(
        default=False,
        strict=True,
        description="recognize the files of the data by a hash of their content, which is read at every start, instead "
        "of by path, size and modification time",
    )
    validation_fraction: Number = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share of the documents held out for validation and never trained on, selected by a hash of their "
        "content; 0 = no validation. Not used with --validation-data or the split validation of a dataset",
    )
    max_length: Count | None = Field(
        default=None,
        description="longest sequence in tokens; longer documents are cut into pieces, not dropped. Lower it to save "
        f"memory (default: {DEFAULT_MAX_LENGTH_TINY} for tiny, else {DEFAULT_MAX_LENGTH} or the limit of the model, "
        "whichever is less)",
    )
    skip_broken: bool = Field(
        default=False,
        strict=True,
        description="skip and count records and files that cannot be read or trained on, instead of stopping with an "
        "error at the first",
    )
    text_column: Text | None = Field(
        default=None,
        min_length=1,
        json_schema_extra={"placeholder": "COLUMN"},
        description="column of the records whose text is trained on, if it is not text (default: the shape of a record "
        "is recognized by its columns)",
    )
    messages_column: Text | None = Field(
        default=None,
        min_length=1,
        json_schema_extra={"placeholder": "COLUMN"},
        description="column of the records with the messages of a conversation, if it is not messages or conversations "
        "(default: the shape of a record is recognized by its columns)",
    )
    chat_template: Text | None = Field(
        default=None,
        min_length=1,
        json_schema_extra={"placeholder": "NAME|FILE"},
        description="chat template that renders conversations, saved with the model: chatml, llama-3, qwen3, gemma, "
        "mistral, or a file with a Jinja template (default: that of the model)",
    )
    train_on: Literal["all-assistant", "last-turn"] = Field(
        default="all-assistant",
        description="what is trained on in conversations: all-assistant = every message of the assistant; last-turn = "
        "only its answer to the last message of the user",
    )
    model: Text = Field(
        default="tiny",
        min_length=1,
        description="tiny (a Llama of a few million parameters, trained from scratch with its own tokenizer), "
        "or a folder or Hub name that AutoModelForCausalLM loads; --model-config pretrains another model",
    )
    router_aux_loss_coef: Number | None = Field(
        default=None,
        ge=0,
        description="weight of the load-balancing loss of a mixture of experts, such as Mixtral, Qwen-MoE or gpt-oss; "
        "0 = not trained. Other models have none (default: router_aux_loss_coef of the model)",
    )
    router_aux_loss: Literal["global", "microbatch"] = Field(
        default="global",
        description="tokens over which that loss counts the use of each expert: global = all tokens of the update, on "
        "all ranks, so the result does not depend on the micro-batch; each sequence runs one forward more. microbatch "
        "= those of each micro-batch: no more time, but the micro-batch affects the result, and the gradient noise is "
        "not measured",
    )
    global_batch: Count | None = Field(
        default=None,
        description="sequences in one update, over all ranks. It affects the result: choose it for learning, not for "
        f"memory (default: {DEFAULT_GLOBAL_BATCH}, unless --global-batch-tokens is given)",
    )
    global_batch_tokens: Count | None = Field(
        default=None,
        description="global batch in tokens instead of sequences: each update uses the number of whole sequences whose "
        "total comes closest (default: none, the batch is counted in sequences)",
    )
    global_batch_schedule: BatchScheduleText | None = Field(
        default=None,
        description='global batch that changes during the run: "0:64 2e6:128" = 64 sequences, then 128 from 2,000,000 '
        'tokens on; "ramp 64 256 8e6" = linearly from 64 to 256 over 8,000,000 tokens; "seesaw 0.5" = wherever the '
        "learning rate would halve, it is divided by √2 and the batch doubles (default: none, a constant batch)",
    )
    rebase_second_moment: bool = Field(
        default=False,
        strict=True,
        description="when the scheduled batch changes, multiply the second moment of adamw by old batch / new batch, "
        "so that it follows the smaller gradient noise at once",
    )
    microbatch: Microbatch | None = Field(
        default=None,
        description="sequences in one forward and backward; affects memory and speed, not the result (except through "
        "dropout). auto = the fastest size that fits in memory: predicted, then measured, so it depends on timing; set "
        "a number for bit-identical runs. With --parallel fsdp or hsdp it is predicted alone. More than the batch = "
        "one micro-batch (default: auto, unless --token-budget is given)",
    )
    token_budget: Count | None = Field(
        default=None,
        description="tokens, padding included, in one forward and backward, instead of --microbatch; sequences of "
        "similar length are grouped. Use it when lengths differ widely (default: none, --microbatch decides)",
    )
    steps: Count | None = Field(
        default=None,
        description=f"optimizer updates (default: {DEFAULT_STEPS} for tiny on python-stdlib, "
        "else as many as --epochs needs)",
    )
    epochs: Count | None = Field(
        default=None,
        description=f"passes over the training documents, instead of --steps (default: {DEFAULT_EPOCHS} if "
        "--steps has no default)",
    )
    seed: Seed = Field(default=0, description="seed of the initial weights and of the order of the documents")
    parallel: Literal["ddp", "fsdp", "hsdp"] = Field(
        default="ddp",
        description="ddp = the whole model on every rank; fsdp = weights, gradients and optimizer state sharded over "
        "all ranks, for models too large for one device; hsdp = sharded within a machine, replicated across machines",
    )
    timeout_s: Number = Field(
        default=600.0,
        gt=0,
        description="seconds without an update after which a rank assumes that others have failed, dumps its stacks "
        "and exits; raise it if one update takes longer",
    )
    out: Folder | None = Field(
        default=None, description="run directory (default: runs/MODEL-DATA, numbered if that exists)"
    )
    sample_prompt: Text | None = Field(
        default=None,
        description="start of the text that the model continues in the middle and at the end of the run, or, if it is "
        'trained on chats, the message that it answers (default: "def ", or the message "Hello")',
    )
    log: Dashboards = Field(
        default=("none",),
        json_schema_extra={"several": True, "placeholder": "none|tensorboard|wandb|mlflow|trackio"},
        description="dashboards, one or several, that receive every update in addition to metrics.jsonl: "
        "tensorboard writes to tensorboard/ in the run directory, wandb, mlflow and trackio to where they are set up "
        "to, such as a server, or offline",
    )
    checkpoint_every: Count = Field(
        default=50,
        description="updates between two checkpoints; lower it to repeat fewer updates after a crash",
    )
    async_checkpoint: bool = Field(
        default=False,
        strict=True,
        description="write checkpoints in the background while training continues, from a copy in host memory",
    )
    max_skipped: Count = Field(
        default=50, description="consecutive updates skipped because of NaN/Inf gradients before the run stops"
    )
    grace_s: Number = Field(
        default=30.0,
        ge=0,
        description="seconds that the current update may take to finish after a signal; then it is discarded and the "
        "run saved as it was before it",
    )
    deterministic: bool = Field(
        default=False,
        strict=True,
        description="byte-identical results from every run on the same machine: deterministic kernels, no times in "
        "metrics.jsonl, and a fixed micro-batch instead of auto, which depends on timing",
    )
