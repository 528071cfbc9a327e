"""Weight gradients added within their products, and weights cast once a window, by the size of the micro-batch.

    python benchmarks/fused_gradients.py [--sizes 1024,2048,4096,12288] [--rounds 5]        on one CUDA device
    python benchmarks/fused_gradients.py --dry                                              tiny, to try it on a CPU

W is the workload of `bigbatch bench`, without a memory limit; for 1,024 tokens its sequences are cut to them. The first
table has each saving alone, over all linear layers of W, in milliseconds for one micro-batch. The second has whole
updates: for each size, engines without savings, with each and with both share one model and optimizer (lr 0), and run
in turns after three updates that compile and capture; medians of tokens/s, and milliseconds of a micro-batch. ``peak``
is that of the first three updates of an engine, in GiB, less the memory of the other engines. ``cosine`` is that of the
gradient of 40 sequences of at most 1,024 tokens with that in float32, one sequence at a time. The noise scale is
measured in the last row of each size only: by default the first nine windows and then one in eight are not fused.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bigbatch
from bigbatch.gradients.fusable_layers import find_fusable_layers
from bigbatch.gradients.weight_products import add_weight_gradient_
from bigbatch.lm.bench.meter import similarity
from bigbatch.lm.bench.workload import W_SMALL, Sample, W
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.setup import ModelSetup, set_up_model
from bigbatch.memory.usage import free_cached_memory

MODES: dict[str, Any] = {"off": False, "sums": "sums", "copies": "copies", "both": True}
WARM_UPDATES = 3
COMPARED, COMPARED_LONGEST = 40, 1_024


def lengths(samples: list[Sample]) -> list[int]:
    """Return the number of tokens of each sample."""
    return [len(sample["input_ids"]) for sample in samples]


def cut(samples: list[Sample], longest: int) -> list[Sample]:
    """Cut the sequences to a length."""
    return [{name: tensor[:longest] for name, tensor in sample.items()} for sample in samples]


class Benchmark:
    """One model, its batch, and engines over them."""

    def __init__(self, *, dry: bool) -> None:
        workload = W_SMALL if dry else W
        self.device = torch.device("cpu") if dry else torch.device("cuda", 0)
        self.model = workload.make_model(self.device)
        self.batch = [{"input_ids": ids, "labels": ids} for ids in workload.make_sequences()]
        self.compared = cut(self.batch[: 4 if dry else COMPARED], COMPARED_LONGEST)
        self.exact = self.exact_gradient()
        config = TrainConfig(model=workload.name, max_length=workload.longest, compile="none" if dry else "auto")
        spec = DeviceSpec(self.device, "bf16")
        self.run: ModelSetup = set_up_model(self.model, config.resolved(), spec, pad_id=0, longest=workload.longest)
        self.optimizer = torch.optim.AdamW(self.run.model.parameters(), lr=0.0, fused=not dry)
        for note in self.run.notes:
            print(f"note: {note}")

    def engine(self, fuse_gradients: Any, size: int, *, noise: bool) -> bigbatch.Engine:
        """Create an engine with micro-batches of at most ``size`` tokens."""
        return bigbatch.Engine(
            self.run.model,
            self.optimizer,
            self.run.loss_fn,
            microbatch=bigbatch.TokenBudget(size),
            collate=self.run.collate,
            lengths=lengths,
            layout=self.run.layout,
            cuda_graphs=self.run.uses_cuda_graphs,
            fuse_gradients=fuse_gradients,
            noise=noise,
            check=False,
        )

    def exact_gradient(self) -> list[Tensor]:
        """Return the gradient of the compared sequences in float32, one sequence at a time."""
        items = sum(lengths(self.compared))
        for sample in self.compared:
            ids = sample["input_ids"].to(self.device)
            logits = self.model(input_ids=ids[None], use_cache=False).logits[0]
            (F.cross_entropy(logits.float(), ids, reduction="sum") / items).backward()
        return self.take_gradients()

    def take_gradients(self) -> list[Tensor]:
        """Return all gradients on the CPU, and clear them."""
        gradients = [parameter.grad.cpu() for parameter in self.model.parameters()]
        for parameter in self.model.parameters():
            parameter.grad = None
        return gradients

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, engine: bigbatch.Engine, batch: list[Sample]) -> float:
        """Return the time of one update."""
        self.synchronize()
        started_s = time.perf_counter()
        report = engine.step(batch)
        self.synchronize()
        assert not report.retries, "the micro-batch does not fit"
        return time.perf_counter() - started_s

    def compare(self, size: int, rounds: int) -> None:
        """Print the rows of one size."""
        batch = cut(self.batch, size)
        tokens = sum(lengths(batch))
        rows = {name: self.engine(fuse, size, noise=False) for name, fuse in MODES.items()}
        rows["both, noise"] = self.engine(True, size, noise=True)
        peaks, cosines, times = {}, {}, {name: [] for name in rows}
        for name, engine in rows.items():
            peaks[name] = self.warm_up(engine, batch, WARM_UPDATES if "noise" not in name else 10)
            if "noise" in name:
                cosines[name] = cosines["both"]
                continue
            engine.backward(cut(self.compared, size))
            found = self.take_gradients()
            cosines[name] = similarity((tensor.to(self.device) for tensor in found), self.exact)[0]
        for _ in range(rounds):
            for name, engine in rows.items():
                times[name].append(self.seconds(engine, batch))
        off_s = statistics.median(times["off"])
        count = len(rows["off"].groups(lengths(batch)))
        for name, engine in rows.items():
            found_s = statistics.median(times[name])
            reason = getattr(engine.runner, "disabled_reason", None)
            print(
                f"{size:>7,}{count:>7}  {name:<13}{tokens / found_s:>10,.0f}{off_s / found_s:>8.3f}"
                f"{1000 * found_s / count:>10.2f}{1000 * (off_s - found_s) / count:>9.2f}{peaks[name]:>8.2f}"
                f"{engine.fused.copies.num_bytes / 2**30:>8.2f}{cosines[name]:>10.6f}"
                + ("" if reason is None else f"  no graphs: {reason}"),
                flush=True,
            )
            engine.release_cuda_graphs()
        rows.clear()
        free_cached_memory()

    def warm_up(self, engine: bigbatch.Engine, batch: list[Sample], updates: int) -> float:
        """Run the first updates; return the peak in GiB, without what other engines hold."""
        if self.device.type != "cuda":
            for _ in range(updates):
                engine.step(batch)
            return float("nan")
        free_cached_memory()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(updates):
            engine.step(batch)
        torch.cuda.synchronize()
        own = [*self.model.parameters(), *(t for s in self.optimizer.state.values() for t in s.values())]
        static = sum(tensor.numel() * tensor.element_size() for tensor in own if tensor.is_cuda)
        return (torch.cuda.max_memory_allocated() - max(before, static) + static) / 2**30


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a function on the device, of five runs after one to warm up."""
    times = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started_s))
    return statistics.median(times[1:])


def print_savings(model: Any, device: torch.device, sizes: list[int]) -> None:
    """Print the time of each saving alone, over all linear layers."""
    layers = find_fusable_layers(model, model.parameters()).layers
    weights = [
        layer.weight.detach() for layer in layers if isinstance(layer.module, torch.nn.Linear) and not layer.is_tied
    ]
    copies = [weight.bfloat16() for weight in weights]
    sums = [torch.zeros_like(weight) for weight in weights]
    num_bytes = sum(weight.numel() for weight in weights)
    print(f"\n{len(weights)} linear layers, {num_bytes / 1e6:.0f} million weights; milliseconds")
    print(f"{'tokens':>7}{'product':>10}{'+ cast, add':>13}{'added within':>14}")
    for size in sizes:
        operands = {
            shape: (
                torch.randn(size, shape[0], device=device, dtype=torch.bfloat16),
                torch.randn(size, shape[1], device=device, dtype=torch.bfloat16),
            )
            for shape in {tuple(weight.shape) for weight in weights}
        }

        def each(call: Callable[[Tensor, Tensor, Tensor], object], operands: Any = operands) -> float:
            def run() -> None:
                for total in sums:
                    call(total, *operands[tuple(total.shape)])

            return milliseconds(run, device)

        product = each(lambda _total, left, right: left.t() @ right)
        ordinary = each(lambda total, left, right: total.add_((left.t() @ right).float()))
        print(f"{size:>7,}{product:>10.2f}{ordinary:>13.2f}{each(add_weight_gradient_):>14.2f}", flush=True)
    cast = milliseconds(lambda: [weight.bfloat16() for weight in weights], device)
    written = milliseconds(lambda: torch._foreach_copy_(copies, weights), device)
    print(
        f"casts of all weights: {cast:.2f} for each micro-batch; written to their copies once a window: {written:.2f}"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=None, help="tokens of a micro-batch")
    parser.add_argument("--rounds", type=int, default=5, help="timed updates of each engine")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU, to try the script")
    options = parser.parse_args()
    sizes = [int(size) for size in (options.sizes or ("128,256" if options.dry else "1024,2048,4096,12288")).split(",")]
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    name = "CPU" if options.dry else torch.cuda.get_device_name()
    benchmark = Benchmark(dry=options.dry)
    print(f"{name}, torch {torch.__version__}; {sum(lengths(benchmark.batch)):,} tokens an update", flush=True)
    print_savings(benchmark.model, benchmark.device, sizes)
    free_cached_memory()
    print(
        f"\n{'tokens':>7}{'count':>7}  {'fused':<13}{'tokens/s':>10}{'ratio':>8}{'ms each':>10}{'saved':>9}{'peak':>8}"
        f"{'copies':>8}{'cosine':>10}"
    )
    for size in sizes:
        benchmark.compare(size, options.rounds)


if __name__ == "__main__":
    main()
