"""Error of each accumulation method against the full-batch update, on one task, in one run.

    python benchmarks/peers.py

A GPT-2 of two layers in float64, 32 sequences of 8 to 64 tokens with a masked prompt of random length, micro-batches
of 4. Reference: the gradient of all 32 at once, and AdamW on it. Two figures for each contender: the relative error of
the gradient at the optimizer's first step, and that of the parameters' change after ten. The second table has 24
sequences: the window of 8 micro-batches is then a partial one, of 6.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import accelerate
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import bigbatch

MICROBATCH, STEPS, WINDOW, LR = 4, 10, 8, 1e-3
Sample = dict[str, Tensor]


class FirstGradientAdamW(torch.optim.AdamW):
    """AdamW that keeps the gradient of its first step."""

    first: list[Tensor] | None = None

    def step(self, closure: object = None) -> None:
        """Save the gradient, then step."""
        if self.first is None:
            self.first = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        super().step(closure)


def make_samples(count: int) -> list[Sample]:
    """Make sequences of 8 to 64 random tokens; the labels of a prompt of random length are -100."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(count):
        length = int(torch.randint(8, 65, (), generator=generator))
        tokens = torch.randint(1, 100, (length,), generator=generator)
        labels = tokens.clone()
        labels[: int(torch.randint(1, length - 1, (), generator=generator))] = -100
        samples.append({"input_ids": tokens, "labels": labels})
    return samples


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Pad to the longest sample."""
    pad = partial(pad_sequence, batch_first=True)
    return {
        "input_ids": pad([s["input_ids"] for s in samples]),
        "labels": pad([s["labels"] for s in samples], padding_value=-100),
        "attention_mask": pad([torch.ones_like(s["input_ids"]) for s in samples]),
    }


def make_model() -> nn.Module:
    """Make a model, with the same weights on every call."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config).double()


def token_losses(model: nn.Module, batch: dict[str, Tensor], reduction: str) -> Tensor:
    """Return the next-token losses of a padded batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction=reduction)


def sum_and_items(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return loss sum and items."""
    return token_losses(model, batch, "sum"), (batch["labels"][:, 1:] != -100).sum()


def microbatches(samples: list[Sample]) -> list[dict[str, Tensor]]:
    """Split into micro-batches of 4."""
    return [collate(samples[i : i + MICROBATCH]) for i in range(0, len(samples), MICROBATCH)]


def full_batch(model: nn.Module, optimizer: torch.optim.Optimizer, samples: list[Sample]) -> None:
    """Train on the full batch, without accumulation: the reference."""
    for _ in range(STEPS):
        token_losses(model, collate(samples), "mean").backward()
        optimizer.step()
        optimizer.zero_grad()


def textbook(model: nn.Module, optimizer: torch.optim.Optimizer, samples: list[Sample]) -> None:
    """Divide each mean by the size of a full window, and step after that many micro-batches."""
    done = 0
    for _ in range(STEPS):
        for part in microbatches(samples):
            (token_losses(model, part, "mean") / WINDOW).backward()
            done += 1
            if done % WINDOW == 0:
                optimizer.step()
                optimizer.zero_grad()


def with_accelerate(model: nn.Module, optimizer: torch.optim.Optimizer, samples: list[Sample]) -> None:
    """Use accelerate's ``accumulate`` as in its guide."""
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=WINDOW, cpu=True)
    loader = torch.utils.data.DataLoader(samples, batch_size=MICROBATCH, collate_fn=collate)
    model, wrapped, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(STEPS):
        for part in loader:
            with accelerator.accumulate(model):
                accelerator.backward(token_losses(model, part, "mean"))
                wrapped.step()
                wrapped.zero_grad()


def with_trainer(
    model: nn.Module, optimizer: torch.optim.Optimizer, samples: list[Sample], *, own_mean: bool = False
) -> None:
    """Use transformers' Trainer, with the model's own loss or with a mean that the user computes."""

    class OwnLoss(transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **_: object) -> Tensor:
            return token_losses(model, inputs, "mean")

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=MICROBATCH,
            gradient_accumulation_steps=WINDOW,
            num_train_epochs=STEPS,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = (OwnLoss if own_mean else transformers.Trainer)(
            model, arguments, train_dataset=samples, data_collator=collate, optimizers=(optimizer, None)
        )
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(samples)
        trainer.train()


def with_accumulator(model: nn.Module, optimizer: torch.optim.Optimizer, samples: list[Sample]) -> None:
    """Use `bigbatch.Accumulator` in a loop."""
    accumulator = bigbatch.Accumulator(model, optimizer)
    for _ in range(STEPS):
        for window in accumulator.windows(microbatches(samples), num_microbatches=WINDOW):
            for part in window:
                loss_sum, items = sum_and_items(model, part)
                window.backward(loss_sum, items=items)
            window.step()


def with_engine(model: nn.Module, optimizer: torch.optim.Optimizer, samples: list[Sample]) -> None:
    """Pass the whole batch to `bigbatch.Engine`."""
    engine = bigbatch.Engine(model, optimizer, sum_and_items, microbatch=MICROBATCH, collate=collate)
    for _ in range(STEPS):
        engine.step(samples)


def run(contender: Callable[..., None], samples: list[Sample]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the first gradient and the change of the parameters; zeros if no update was applied."""
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = FirstGradientAdamW(model.parameters(), lr=LR)
    contender(model, optimizer, samples)
    change = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    return optimizer.first or [torch.zeros_like(p) for p in before], change


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return ‖found − expected‖ / ‖expected‖."""
    difference = torch.nn.utils.get_total_norm([a - b for a, b in zip(found, expected, strict=True)])
    return (difference / torch.nn.utils.get_total_norm(expected)).item()


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}, "
        "float64, CPU"
    )
    contenders = {
        "textbook loop": textbook,
        "accelerate.accumulate": with_accelerate,
        "transformers Trainer": with_trainer,
        "transformers Trainer, own mean": partial(with_trainer, own_mean=True),
        "bigbatch.Accumulator": with_accumulator,
        "bigbatch.Engine": with_engine,
    }
    for count in (32, 24):
        samples = make_samples(count)
        gradient, change = run(full_batch, samples)
        print(f"\n{count} sequences, micro-batches of {MICROBATCH}{'':<13}{'gradient':>12}{'10 updates':>12}")
        for name, contender in contenders.items():
            with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints its metrics
                found = run(contender, samples)
            print(f"{name:<44}{relative_error(found[0], gradient):>12.2e}{relative_error(found[1], change):>12.2e}")


if __name__ == "__main__":
    main()
