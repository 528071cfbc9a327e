"""The choice of ``auto`` from a cold start compared with sizes tuned by hand, and with one sequence at a time.

    python benchmarks/hand_tuned.py [--only w,gpt2] [--rounds 3]

On one CUDA device. W is the workload of `bigbatch bench` in 24 GiB; gpt2 is a GPT-2 of 124 million parameters without
dropout and 256 sequences of uniform lengths of 32 to 1,024 tokens, in 12 GiB. Every hand-tuned size, with all layers
checkpointed or none, runs its updates in alternation with ``auto``; the table has medians.

For W, the gradient of its first 40 sequences is also compared with that of the padded loop over single sequences in
the same precision, both with the flash attention kernel, and both with that loop in float32.
"""

import argparse
import logging
import statistics
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import bigbatch
from bigbatch.lm.bench.meter import similarity
from bigbatch.lm.bench.workload import W
from bigbatch.lm.config.field_types import CheckpointingMode
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.setup import ModelSetup, set_up_model
from bigbatch.lm.training.autotune import describe, tune
from bigbatch.memory.usage import free_cached_memory

BY_HAND = {"w": (9_216, 10_240, 11_264, 12_288), "gpt2": (12_288, 16_384, 20_480, 24_576)}
MEMORY_GIB = {"w": 24, "gpt2": 12}
COMPARED = 40

Sample = dict[str, Tensor]


def make(name: str) -> tuple[Any, list[Sample]]:
    """Make the model and the batch of a workload; every token is a label of its own position."""
    if name == "w":
        return W.make_model("cuda"), [{"input_ids": ids, "labels": ids} for ids in W.make_sequences()]
    import transformers

    config = transformers.GPT2Config(n_positions=1_024, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    generator = torch.Generator().manual_seed(0)
    batch = []
    for length in torch.randint(32, 1_025, (256,), generator=generator).tolist():
        ids = torch.randint(config.vocab_size, (length,), generator=generator)
        batch.append({"input_ids": ids, "labels": ids})
    return model, batch


def lengths(samples: list[Sample]) -> list[int]:
    """Return the number of tokens of each sample."""
    return [len(sample["input_ids"]) for sample in samples]


class Contestant:
    """One way of running the batch: a micro-batch size and a checkpointing mode."""

    def __init__(self, name: str, engine: bigbatch.Engine, run: ModelSetup, level: CheckpointingMode) -> None:
        self.name = name
        self.engine = engine
        self.run = run
        self.level = level
        self.speeds: list[float] = []
        self.problem: str | None = None

    def take_turn(self, batch: list[Sample], rounds: int) -> None:
        """Warm up with two updates, capture, time some updates, and free the memory."""
        if self.problem is not None:
            return
        self.run.layers.set_checkpointing(self.level)
        for number in range(2 + rounds):
            torch.cuda.synchronize()
            started_s = time.perf_counter()
            report = self.engine.step(batch)
            torch.cuda.synchronize()
            if number >= 2:
                self.speeds.append(sum(lengths(batch)) / (time.perf_counter() - started_s))
            if report.retries or self.engine.graph_runner.disabled_reason:
                self.problem = "does not fit"
                break
        self.engine.release_cuda_graphs()
        free_cached_memory()

    @property
    def speed(self) -> float:
        """Median tokens per second."""
        return statistics.median(self.speeds) if self.problem is None else 0.0


def race(name: str, rounds: int) -> None:
    """Print the table of one workload."""
    model, batch = make(name)
    memory_gib = MEMORY_GIB[name]
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(memory_gib * 2**30 / total_bytes)
    print(
        f"\n{name}: {sum(lengths(batch)):,} tokens in {len(batch)} sequences, limited to {memory_gib} GiB", flush=True
    )
    if name == "w":
        compare(model, batch[:COMPARED])
    started_s = time.perf_counter()
    longest = max(lengths(batch))
    config = TrainConfig(model=name, max_length=longest).resolved()
    run = set_up_model(model, config, DeviceSpec(torch.device("cuda", 0), "bf16"), pad_id=0, longest=longest)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-5, fused=True)

    def engine(microbatch: Any) -> bigbatch.Engine:
        return bigbatch.Engine(
            run.model,
            optimizer,
            run.loss_fn,
            microbatch=microbatch,
            memory=f"{memory_gib}GiB" if microbatch == "auto" else None,
            collate=run.collate,
            lengths=lengths,
            layout=run.layout,
            cuda_graphs=run.uses_cuda_graphs,
        )

    automatic = engine("auto")
    level, choice = tune(automatic, run.layers, batch, modes=True)
    print(f"auto, from a cold start in {time.perf_counter() - started_s:.1f} s: {choice}{describe(level)}", flush=True)
    contestants = [Contestant("auto", automatic, run, level)]
    for size in BY_HAND[name]:
        contestants.append(Contestant(f"{size:,}", engine(bigbatch.TokenBudget(size)), run, "none"))
    size = 2 * choice.size
    contestants.append(Contestant(f"{size:,}, checkpointed", engine(bigbatch.TokenBudget(size)), run, "full"))
    for contestant in contestants:
        contestant.take_turn(batch, rounds)
    best = max(contestants[1:], key=lambda contestant: contestant.speed)
    print(f"{'tokens a micro-batch':<24}{'tokens/s':>10}{'of the best by hand':>22}")
    for contestant in contestants:
        shown = contestant.problem or f"{contestant.speed:,.0f}"
        print(f"{contestant.name:<24}{shown:>10}{contestant.speed / best.speed:>22.3f}", flush=True)


def compare(model: Any, batch: list[Sample]) -> None:
    """Print the similarity of the update to that of the padded loop over single sequences."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        same = one_by_one(model, batch, narrow=True)
    wide = one_by_one(model, batch, narrow=False)
    longest = W.longest
    config = TrainConfig(model="w", max_length=longest).resolved()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: found.extend(p.grad.cpu() for p in model.parameters()))
    run = set_up_model(model, config, DeviceSpec(torch.device("cuda", 0), "bf16"), pad_id=0, longest=longest)
    engine = bigbatch.Engine(
        run.model,
        optimizer,
        run.loss_fn,
        microbatch=bigbatch.TokenBudget(10_240),
        collate=run.collate,
        lengths=lengths,
        layout=run.layout,
    )
    engine.step(batch)
    pairs = {
        "bigbatch and one by one, both in bf16": (found, same),
        "bigbatch in bf16, one by one in float32": (found, wide),
        "one by one in bf16, one by one in float32": (same, wide),
    }
    for name, (one, other) in pairs.items():
        cosine, norm = similarity((tensor.cuda() for tensor in one), other)
        print(f"{name:<50} cosine {cosine:.6f}, norm {norm:.5f}", flush=True)
    run.layers.decompile()
    model.set_attn_implementation("sdpa")
    free_cached_memory()


def one_by_one(model: Any, batch: list[Sample], *, narrow: bool) -> list[Tensor]:
    """Compute the gradient of the mean loss, one sequence at a time."""
    items = sum(lengths(batch))
    for sample in batch:
        ids = sample["input_ids"].cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=narrow):
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        (F.cross_entropy(logits.float(), ids, reduction="sum") / items).backward()
    gradients = [parameter.grad.cpu() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    free_cached_memory()
    return gradients


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="w,gpt2", help="workloads to run")
    parser.add_argument("--rounds", type=int, default=3, help="timed updates of each contestant")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import transformers

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    for name in options.only.split(","):
        race(name, options.rounds)


if __name__ == "__main__":
    main()
