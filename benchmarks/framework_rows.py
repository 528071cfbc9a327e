"""The rows of `frameworks.py`: small models, ragged data, and the frameworks' loops that record their gradients."""

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from bigbatch import Engine, TokenBudget

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

MICROBATCH, STEPS, VOCABULARY, IGNORED = 4, 4, 64, -100
FLOAT64, FLOAT32 = 1e-12, 1e-6
Gradient = list[Tensor]
Samples = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: Framework and loss.
        stock: Returns the gradients of its windows, of the framework as it is.
        ours: The same with the integration, and the unit of the loss.
        whole: The same with the whole batch in one piece; ranks is the number of ranks.
        bound: Largest error of ours that is rounding.
        ranks: Numbers of ranks it runs on.
        needs: Packages.
    """

    name: str
    stock: Callable[[], list[Gradient]]
    ours: Callable[[], tuple[list[Gradient], str]]
    whole: Callable[[int], list[Gradient]]
    bound: float = FLOAT64
    ranks: tuple[int, ...] = (1,)
    needs: tuple[str, ...] = ()


def num_samples() -> int:
    """Return the samples of an epoch: two full windows and a shorter one."""
    full = MICROBATCH * STEPS * world()
    return 2 * full + (6 if world() == 1 else 2 * MICROBATCH * world())


def world() -> int:
    """Return the number of ranks, or what `as_if` says."""
    return _ASSUMED[-1] if _ASSUMED else dist.get_world_size() if dist.is_initialized() else 1


_ASSUMED: list[int] = []


@contextmanager
def as_if(ranks: int) -> Iterator[None]:
    """Make the samples those of several ranks, in one process."""
    _ASSUMED.append(ranks)
    try:
        yield
    finally:
        _ASSUMED.pop()


def token_samples(*, prompt: int = 0) -> Samples:
    """Make samples of 3 to 24 tokens; the labels of a prompt are ignored."""
    numbers = random.Random(0)
    found = []
    for _ in range(num_samples()):
        ids = [numbers.randrange(4, VOCABULARY) for _ in range(numbers.randint(3, 24) + prompt)]
        found.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return found


def class_samples(*, without: bool = False) -> Samples:
    """Make samples of 3 to 24 tokens with a class; with ``without``, every fifth has none."""
    found = token_samples()
    for index, sample in enumerate(found):
        sample["labels"] = IGNORED if without and index % 5 == 3 else index % 3
    return found


def pair_samples() -> Samples:
    """Make texts for translation: other lengths for input and labels."""
    numbers = random.Random(1)
    for sample in (found := token_samples()):
        sample["labels"] = [numbers.randrange(4, VOCABULARY) for _ in range(numbers.randint(2, 24))]
    return found


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad to the longest sample."""

    def pad(key: str, value: int) -> Tensor:
        rows = [torch.tensor(sample[key]) for sample in samples]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    batch = {"input_ids": pad("input_ids", 0)}
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    if isinstance(samples[0]["labels"], int):
        batch["labels"] = torch.tensor([sample["labels"] for sample in samples])
    else:
        batch["labels"] = pad("labels", IGNORED)
    return batch


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1}
SMALL |= {"eos_token_id": 2}


def llama(**settings: Any) -> nn.Module:
    """Make a Llama of two layers in float64."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **settings)).double()


def gpt2() -> nn.Module:
    """Make a GPT-2 of two layers in float64."""
    torch.manual_seed(0)
    settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, **settings)
    return transformers.GPT2LMHeadModel(config).double()


def bert() -> nn.Module:
    """Make a BERT classifier of two layers in float64."""
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **off, num_labels=3)).double()


def t5() -> nn.Module:
    """Make a T5 of two layers in float64."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).double()


def qwen2_moe() -> nn.Module:
    """Make a mixture of experts with its auxiliary loss."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        **SMALL, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


class Regression(nn.Module):
    """A plain module whose loss is the mean squared error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.head = nn.Linear(16, 1)
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss of predicting the class as a number."""
        mask = attention_mask[..., None].double()
        features = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        prediction = self.head(features.tanh()).squeeze(-1)
        return {"loss": F.mse_loss(prediction, labels.double()), "logits": prediction}


class OwnModel(nn.Module):
    """A language model in pure float64, with nothing of transformers in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.rnn = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the logits."""
        return {"logits": self.head(self.rnn(self.embedding(input_ids))[0])}


def token_losses(model: nn.Module, batch: dict[str, Tensor], reduction: str = "mean") -> Tensor:
    """Return the next-token losses of a language model."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])["logits"]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction=reduction)


def num_tokens(batch: dict[str, Tensor]) -> int:
    """Return the number of labels behind `token_losses`."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


class Recorder(transformers.TrainerCallback):
    """Keeps the gradient of every update."""

    def __init__(self) -> None:
        self.gradients: list[Gradient] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Copy ``.grad``."""
        self.gradients.append(copy_gradient(model))


def copy_gradient(model: nn.Module) -> Gradient:
    """Return copies of ``.grad``, zeros for None."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def settings_of_run(*, batch_size: int, steps: int) -> dict[str, Any]:
    """Return training arguments: weights stay as they are, so that every window has the same ones."""
    return {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": batch_size, "learning_rate": 0.0,
        "gradient_accumulation_steps": steps, "num_train_epochs": 1, "max_grad_norm": 0.0, "optim": "sgd",
        "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "remove_unused_columns": False, "dataloader_pin_memory": False, "bf16": False,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip


MakeTrainer = Callable[..., transformers.Trainer]


def trainer_row(name: str, make: MakeTrainer, **settings: Any) -> Row:
    """Return the row of a Trainer; ``make(batch_size=…, steps=…)`` makes it."""

    def run(trainer: transformers.Trainer) -> list[Gradient]:
        recorder = Recorder()
        trainer.add_callback(recorder)
        trainer.train()
        return recorder.gradients

    def stock() -> list[Gradient]:
        return run(make(batch_size=MICROBATCH, steps=STEPS))

    def ours(**exact_settings: Any) -> tuple[list[Gradient], str]:
        from bigbatch.integrations.transformers import exact

        trainer = exact(make(batch_size=MICROBATCH, steps=STEPS), **exact_settings)
        gradients = run(trainer)
        return gradients, trainer._bigbatch_windows._unit.name

    def whole(ranks: int) -> list[Gradient]:
        trainer = make(batch_size=MICROBATCH * STEPS * ranks, steps=1)
        found = []
        for batch in trainer.get_train_dataloader():
            model = trainer.model.train()
            model.zero_grad()
            trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()
            found.append(copy_gradient(model))
        return found

    how = settings.pop("exact", {})
    return Row(name, stock, lambda: ours(**how), whole, **settings)


def plain_trainer(
    model: Callable[[], nn.Module], samples: Callable[[], Samples], kind: type = transformers.Trainer, **extra: Any
) -> MakeTrainer:
    """Return a function that makes a Trainer."""
    init = {key: extra.pop(key) for key in ("compute_loss_func",) if key in extra}

    def make(**size: Any) -> transformers.Trainer:
        seq2seq = issubclass(kind, transformers.Seq2SeqTrainer)
        arguments = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
        args = arguments(**settings_of_run(**size), **extra)
        return kind(model(), args, data_collator=collate, train_dataset=samples(), **init)

    return make


class TokenMean(transformers.Trainer):
    """Overrides the loss by a mean over tokens, as many scripts do."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Return the mean next-token loss."""
        loss = token_losses(model, inputs)
        return (loss, {}) if return_outputs else loss


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the mean next-token loss of outputs; ignores the count, as many functions do."""
    return F.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def tokenizer() -> Any:
    """Make a tokenizer of the words w0, w1 and so on."""
    import tokenizers

    words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3} | {f"w{i}": i + 4 for i in range(VOCABULARY - 4)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def texts() -> Any:
    """Make a dataset of prompts with a chosen and a rejected completion."""
    import datasets

    numbers = random.Random(2)

    def words(most: int) -> str:
        return "".join(f" w{numbers.randrange(VOCABULARY - 4)}" for _ in range(numbers.randint(1, most)))

    rows = [{"prompt": words(6), "chosen": words(16), "rejected": words(16)} for _ in range(num_samples())]
    return datasets.Dataset.from_list(rows)


def trl_trainer(kind: str, **extra: Any) -> MakeTrainer:
    """Return a function that makes a trainer of TRL: "SFT", "DPO", "Reward" or "KTO"."""

    def make(**size: Any) -> transformers.Trainer:
        import trl

        place = trl if hasattr(trl, f"{kind}Trainer") else __import__(f"trl.experimental.{kind.lower()}", fromlist="x")
        args = getattr(place, f"{kind}Config")(**settings_of_run(**size), **extra)
        data, init, model = texts(), {}, llama()
        if kind == "SFT":
            data = data.rename_column("chosen", "completion").remove_columns("rejected")
        elif kind == "KTO":
            labels = [index % 3 > 0 for index in range(len(data))]
            data = data.rename_column("chosen", "completion").remove_columns("rejected").add_column("label", labels)
        if kind in ("DPO", "KTO"):
            torch.manual_seed(1)
            init["ref_model"] = transformers.LlamaForCausalLM(model.config).double()
        if kind == "Reward":
            torch.manual_seed(0)
            config = transformers.LlamaConfig(**SMALL, num_labels=1)
            model = transformers.LlamaForSequenceClassification(config).double()
        return getattr(place, f"{kind}Trainer")(
            model, args=args, train_dataset=data, processing_class=tokenizer(), **init
        )

    return make


def windows_of(ranks: int) -> list[dict[str, Tensor]]:
    """Return the batches in one piece of a loop over `token_samples`."""
    samples, size = token_samples(), MICROBATCH * STEPS * ranks
    return [collate(samples[start : start + size]) for start in range(0, len(samples), size)]


def whole_loop(ranks: int) -> list[Gradient]:
    """Return the gradients of the mean loss of all tokens of each window."""
    found = []
    for batch in windows_of(ranks):
        model = OwnModel()
        token_losses(model, batch).backward()
        found.append(copy_gradient(model))
    return found


def loader(batch_size: int = MICROBATCH, collate_fn: Any = collate) -> torch.utils.data.DataLoader[Any]:
    """Make a loader of `token_samples`."""
    return torch.utils.data.DataLoader(token_samples(), batch_size=batch_size, collate_fn=collate_fn)


def accelerate_loop(*, exact: bool) -> list[Gradient]:
    """Run the loop of accelerate's guide."""
    from accelerate import Accelerator

    from bigbatch.integrations.accelerate import ExactAccelerator

    accelerator = (ExactAccelerator if exact else Accelerator)(gradient_accumulation_steps=STEPS, cpu=True)
    model = OwnModel()
    model, optimizer, batches = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), loader())
    found = []
    for batch in batches:
        with accelerator.accumulate(model):
            if exact:
                accelerator.backward(token_losses(model, batch, "sum"), items=num_tokens(batch))
            else:
                accelerator.backward(token_losses(model, batch))
            if accelerator.sync_gradients:
                found.append(copy_gradient(model))
            optimizer.step()
            optimizer.zero_grad()
    return found


def lightning_fit(mode: str) -> list[Gradient]:
    """Fit a module with stock accumulation, with the callback, or with the loss of an engine."""
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from bigbatch.integrations.lightning import ExactAccumulation

    found: list[Gradient] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = OwnModel()
            self.engine: Engine | None = None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if mode == "callback":
                return {"loss": token_losses(self.model, batch, "sum"), "items": num_tokens(batch)}
            if mode == "engine":
                if self.engine is None:
                    self.engine = Engine(self.model, None, sum_and_items, microbatch=MICROBATCH, collate=collate)
                return self.engine.loss(batch)
            return token_losses(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Step(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            found.append(copy_gradient(module.model))

    class Ranks(LightningEnvironment):
        creates_processes_externally = True

        def world_size(self) -> int:
            return world()

        def global_rank(self) -> int:
            return dist.get_rank()

        def local_rank(self) -> int:
            return dist.get_rank()

        def set_world_size(self, size: int) -> None: ...

        def set_global_rank(self, rank: int) -> None: ...

    is_engine = mode == "engine"
    distributed = {}
    if world() > 1:
        strategy = DDPStrategy(cluster_environment=Ranks(), process_group_backend="gloo")
        distributed = {"devices": world(), "strategy": strategy, "use_distributed_sampler": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=1 if is_engine else STEPS,
        callbacks=[*([ExactAccumulation()] if mode == "callback" else []), Step()], **distributed,
    )  # fmt: skip
    batches: Any = loader(MICROBATCH * STEPS, list) if is_engine else loader()
    if world() > 1:
        own = list(batches)[dist.get_rank() :: world()]
        batches = torch.utils.data.DataLoader(own, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(Module(), batches)
    return found


def sum_and_items(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Return loss sum and items of a micro-batch."""
    return token_losses(model, batch, "sum"), num_tokens(batch)


def fabric_loop(*, exact: bool) -> list[Gradient]:
    """Run a loop of Fabric with a division by the number of micro-batches, or with the loss of an engine."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model = OwnModel()
    wrapped, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.0))
    found = []
    if exact:
        engine = Engine(wrapped, None, sum_and_items, microbatch=MICROBATCH, collate=collate)
        for batch in loader(MICROBATCH * STEPS, list):
            fabric.backward(engine.loss(batch))
            found.append(copy_gradient(model))
            wrapped.zero_grad()
        return found
    for number, batch in enumerate(batches := loader(), start=1):
        fabric.backward(token_losses(wrapped, batch) / STEPS)
        if number % STEPS == 0 or number == len(batches):
            found.append(copy_gradient(model))
            wrapped.zero_grad()
    return found


def loop_row(
    name: str, stock: Callable[[], list[Gradient]], ours: Callable[[], list[Gradient]], **settings: Any
) -> Row:
    """Return the row of a loop over `OwnModel`."""
    return Row(name, stock, lambda: (ours(), "items that are passed"), whole_loop, **settings)


def make_rows() -> list[Row]:
    """Return all rows."""
    token_mean = plain_trainer(OwnModel, token_samples, TokenMean)
    budget = {"microbatch": TokenBudget(60), "lengths": lambda samples: [len(s["input_ids"]) for s in samples]}
    auto = {"memory": "2GiB", "lengths": budget["lengths"]}
    both: dict[str, Any] = {"ranks": (1, 2)}
    rounding: dict[str, Any] = {"bound": FLOAT32}
    trl: dict[str, Any] = rounding | {"needs": ("trl",)}
    seq2seq = plain_trainer(t5, pair_samples, transformers.Seq2SeqTrainer)
    return [
        trainer_row("Trainer, compute_loss overridden, token mean", token_mean, **both),
        trainer_row("  the same, TokenBudget(60)", token_mean, exact=budget, **both),
        trainer_row('  the same, memory="2GiB"', token_mean, exact=auto),
        trainer_row("Trainer, GPT-2, compute_loss overridden", plain_trainer(gpt2, token_samples, TokenMean), **both),
        trainer_row("Trainer, compute_loss_func, token mean",
                    plain_trainer(OwnModel, token_samples, compute_loss_func=mean_loss)),
        trainer_row("Trainer, plain module, its own mse", plain_trainer(Regression, class_samples), **both),
        trainer_row("Trainer, Llama, its own loss", plain_trainer(llama, token_samples), **rounding, **both),
        trainer_row("Trainer, GPT-2, its own loss", plain_trainer(gpt2, token_samples), **rounding),
        trainer_row("Trainer, Llama, label smoothing",
                    plain_trainer(llama, token_samples, label_smoothing_factor=0.1), **rounding),
        trainer_row("Trainer, BERT classifier, its own loss", plain_trainer(bert, class_samples), **both),
        trainer_row("  the same, some samples without a class",
                    plain_trainer(bert, partial(class_samples, without=True))),
        trainer_row("Seq2SeqTrainer, T5, its own loss", seq2seq, **rounding, **both),
        trainer_row("Trainer, Qwen2-MoE, auxiliary loss", plain_trainer(qwen2_moe, token_samples), **rounding),
        trainer_row("TRL SFT, completion only", trl_trainer("SFT", completion_only_loss=True), **trl, **both),
        trainer_row("TRL DPO, sigmoid", trl_trainer("DPO"), **trl, **both),
        trainer_row("TRL DPO, ipo", trl_trainer("DPO", loss_type=["ipo"]), **trl),
        trainer_row("TRL DPO, sigmoid + sft", trl_trainer("DPO", loss_type=["sigmoid", "sft"]), **trl),
        trainer_row("TRL Reward", trl_trainer("Reward"), **trl, **both),
        trainer_row("TRL KTO, apo_zero_unpaired", trl_trainer("KTO", loss_type="apo_zero_unpaired"), **trl),
        trainer_row("TRL KTO, kto", trl_trainer("KTO"), **trl),
        loop_row("accelerate, accumulate()", lambda: accelerate_loop(exact=False), lambda: accelerate_loop(exact=True),
                 **both, needs=("accelerate",)),
        loop_row("Lightning, ExactAccumulation()", lambda: lightning_fit("stock"), lambda: lightning_fit("callback"),
                 **both, needs=("lightning",)),
        loop_row("Lightning, engine.loss(batch)", lambda: lightning_fit("stock"), lambda: lightning_fit("engine"),
                 needs=("lightning",)),
        loop_row("Fabric, engine.loss(batch)", lambda: fabric_loop(exact=False), lambda: fabric_loop(exact=True),
                 needs=("lightning",)),
    ]  # fmt: skip
