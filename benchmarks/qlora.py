"""Memory of LoRA on weights in 4 bits: measured, predicted by `bigbatch plan`, and the adapters' gradient.

    python benchmarks/qlora.py --out FILE     # one CUDA GPU with 80 GB, some minutes
    python benchmarks/qlora.py --dry          # a tiny model on the CPU, half a minute

A Llama of 6.7 billion parameters with random weights, which are made on the device one at a time, as weights of a
folder are loaded. Each line trains rank-16 adapters on all linear layers: four sequences in micro-batches of
``--tokens`` tokens. *Measured* is the highest memory of torch's allocator in the second update, *loading* that while
the weights are quantized, and *predicted* the peak of `RunEstimator`, which is that of `bigbatch plan`. *Gradient* is
the relative difference of the gradient of all adapters to that of the same adapters on `torch.nn.Linear` layers with
the dequantized weights, in the same precision.

On the CPU, memory is counted by `AllocationTracker`, and what one kernel allocates and frees is not seen.
"""

import argparse
import gc
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.autotune.peak_prediction import state_of
from bigbatch.gradients.loss_totals import as_terms
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import resolve_device
from bigbatch.lm.model.meta_model import meta_model_from_config
from bigbatch.lm.model.nf4 import Nf4Linear, check_kernels
from bigbatch.lm.model.pretrained import model_from_config
from bigbatch.lm.model.quantization import quantization_note, quantize_weights, weights_dtype_of
from bigbatch.lm.model.setup import ModelSetup, set_up_model
from bigbatch.lm.model.weights import Weights
from bigbatch.lm.planning.data_statistics import DataStatistics
from bigbatch.lm.planning.device_target import resolve_target
from bigbatch.lm.planning.estimator import RunEstimator
from bigbatch.lm.training.engine_factory import make_engine
from bigbatch.lm.training.microbatch_limits import microbatch_of
from bigbatch.lm.training.optimizer import make_optimizer
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory

LARGE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
WINDOW = 4  # sequences
STD = 0.008  # of the weights: larger ones amplify rounding over 32 layers until no layout agrees with another

ROWS: tuple[dict[str, Any], ...] = (
    {"quantize": None, "precision": "bf16-weights", "gradient_checkpointing": "full", "compile": "none"},
    {"quantize": "nf4", "precision": "bf16-weights", "gradient_checkpointing": "full", "compile": "none"},
    {"quantize": "nf4", "precision": "bf16", "gradient_checkpointing": "full", "compile": "none"},
    {"quantize": "nf4-double", "precision": "bf16", "gradient_checkpointing": "full", "compile": "none"},
    {"quantize": "nf4", "precision": "bf16", "gradient_checkpointing": "none", "compile": "none"},
    {"quantize": "nf4", "precision": "bf16", "gradient_checkpointing": "full", "compile": "layers"},
    {"quantize": "nf4", "precision": "bf16", "gradient_checkpointing": "full", "compile": "auto"},
)


class RandomWeight:
    """A weight of a file that does not exist: its values are made when it is read."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._shape, self._dtype, self._device, self._seed = shape, dtype, device, seed

    def get_shape(self) -> list[int]:
        """Return the shape, as a slice of a safetensors file does."""
        return list(self._shape)

    def __getitem__(self, region: Any) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(self._seed)
        if len(self._shape) == 1:  # of a norm
            return torch.ones(self._shape, dtype=self._dtype, device=self._device)[region]
        values = torch.randn(self._shape, dtype=self._dtype, device=self._device, generator=generator)
        return values.mul_(STD)[region]


@dataclass(frozen=True)
class Line:
    """A line of the table, in bytes and seconds."""

    settings: dict[str, Any]
    weights: int
    loading: int
    measured: int
    predicted: int
    seconds: float
    gradient: float | None
    notes: tuple[str, ...]


def model_config(*, small: bool, longest: int) -> Any:
    """Return the configuration of a Llama."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **(SMALL if small else LARGE),
        vocab_size=4096 if small else 32000,
        max_position_embeddings=longest,
        tie_word_embeddings=False,
        initializer_range=STD,
    )


def build(of: Any, config: TrainConfig, spec: Any) -> Any:
    """Make the base model with random weights on the device."""
    dtype = weights_dtype_of(config, spec)
    if config.quantize is None:
        return model_from_config(of, dtype=dtype, device=spec.device)
    check_kernels(spec.device, dtype)
    model = meta_model_from_config(of, dtype=dtype)
    tensors = {
        name: RandomWeight(p.shape, dtype, spec.device, seed) for seed, (name, p) in enumerate(model.named_parameters())
    }
    return quantize_weights(model, Weights(tensors), config, dtype=dtype, device=spec.device).model


def peak_of_update(engine: Any, prepared: ModelSetup, optimizer: Any, batch: Any, device: torch.device) -> int:
    """Return the peak of one update."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        engine.step(batch)
        return torch.cuda.max_memory_allocated()
    with AllocationTracker(device) as tracker:
        tracker.track([*prepared.model.parameters(), *prepared.model.buffers()], MemoryCategory.PARAMETERS)
        tracker.track(state_of(optimizer), MemoryCategory.OPTIMIZER)
        engine.step(batch)
    return tracker.peak_bytes


def gradient(prepared: ModelSetup, batch: list[dict[str, Tensor]], device: torch.device) -> Tensor:
    """Return the gradient of all adapters, for the first sequence, on the CPU."""
    microbatch = {name: tensor.to(device) for name, tensor in prepared.collate(batch[:1]).items()}
    terms = as_terms(prepared.training_loss(prepared.model, microbatch)).values()
    loss = torch.stack([term_sum for term_sum, _ in terms]).sum()
    trained = [p for p in prepared.model.parameters() if p.requires_grad]
    return torch.cat([g.flatten().double().cpu() for g in torch.autograd.grad(loss, trained)])


def difference_to_dequantized(prepared: ModelSetup, batch: list[dict[str, Tensor]], spec: Any, dtype: Any) -> float:
    """Return the relative difference of the adapters' gradient; the layers in 4 bits are replaced."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in prepared.model.parameters():
            if p.requires_grad:  # adapters start with B = 0, which would leave half of the gradient zero
                p.add_(0.01 * torch.randn(p.shape, generator=generator).to(p.device, p.dtype))
    found = gradient(prepared, batch, spec.device)
    for module in list(prepared.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Nf4Linear):
                plain = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                plain.weight = nn.Parameter(child.dequantized(dtype), requires_grad=False)
                setattr(module, name, plain)
    expected = gradient(prepared, batch, spec.device)
    return float((found - expected).norm() / expected.norm())


def compare(row: dict[str, Any], options: argparse.Namespace) -> Line:
    """Predict, load, train two updates, and compare gradients."""
    device = "cpu" if options.dry else "cuda"
    layout = "padded" if options.dry else "packed"
    config = TrainConfig(
        model="llama",
        device=device,
        layout=layout,
        lora_rank=16,
        token_budget=options.tokens,
        global_batch=WINDOW,
        **row,
    ).resolved()
    spec = resolve_device(device, config.precision)
    longest = options.tokens // 2
    of = model_config(small=options.dry, longest=longest)
    data = DataStatistics(of, longest, (longest,), (longest,) * WINDOW, WINDOW, 1, ())
    predicted = RunEstimator(config, resolve_target(config), data).predict(options.tokens).peak_bytes
    on_cuda = spec.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    model = build(of, config, spec)
    weights = sum(p.nbytes for p in model.parameters())
    loading = torch.cuda.max_memory_allocated() if on_cuda else 0
    prepared = set_up_model(model, config, spec, pad_id=0, longest=longest)
    optimizer = make_optimizer(prepared.model, config, spec)
    engine = make_engine(prepared, optimizer, microbatch=microbatch_of(config, longest=longest), max_grad_norm=1.0)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(1, of.vocab_size, (longest,), generator=generator) for _ in range(WINDOW)]
    batch = [{"input_ids": tokens, "labels": tokens.roll(-1)} for tokens in samples]
    engine.step(batch)
    started_s = time.perf_counter()
    measured = peak_of_update(engine, prepared, optimizer, batch, spec.device)
    seconds = time.perf_counter() - started_s
    notes = (*([quantization_note(prepared.model)] if config.quantize else []), *prepared.notes)
    engine.release_cuda_graphs()
    distance = None
    if config.quantize is not None and config.compile == "none":
        distance = difference_to_dequantized(prepared, batch, spec, weights_dtype_of(config, spec))
    return Line(row, weights, loading, measured, predicted, seconds, distance, notes)


def lines(options: argparse.Namespace) -> Iterator[Line]:
    """Yield the lines of the table."""
    for row in ROWS:
        if options.dry and row["compile"] != "none":
            continue
        yield compare(row, options)
        gc.collect()
        torch._dynamo.reset()
        if not options.dry:
            torch.cuda.empty_cache()


def table(options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the output."""
    import bitsandbytes
    import transformers

    name = "CPU" if options.dry else torch.cuda.get_device_name()
    yield (
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, bitsandbytes "
        f"{bitsandbytes.__version__}; MiB; micro-batches of {options.tokens:,} tokens"
    )
    yield (
        f"{'weights':<12}{'precision':<14}{'checkpoints':<13}{'compile':<9}{'weights':>9}{'loading':>9}{'measured':>10}"
        f"{'predicted':>11}{'ratio':>8}{'seconds':>9}{'gradient':>10}"
    )
    notes: dict[str, None] = {}
    for line in lines(options):
        row = line.settings
        notes |= dict.fromkeys(line.notes)
        yield (
            f"{row['quantize'] or 'unquantized':<12}{row['precision']:<14}{row['gradient_checkpointing']:<13}"
            f"{row['compile']:<9}{line.weights / 2**20:>9,.0f}{line.loading / 2**20:>9,.0f}"
            f"{line.measured / 2**20:>10,.1f}{line.predicted / 2**20:>11,.1f}"
            f"{line.predicted / line.measured:>8.4f}{line.seconds:>9.2f}"
            f"{'–' if line.gradient is None else f'{line.gradient:.1e}':>10}"
        )
    yield from notes


def main() -> None:
    """Print the table, and write it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--tokens", type=int, help="tokens of a micro-batch (default: 4096, or 256 with --dry)")
    parser.add_argument("--out", type=Path, help="file that receives the output too")
    options = parser.parse_args()
    options.tokens = options.tokens or (256 if options.dry else 4096)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    written = []
    for text in table(options):
        print(text, flush=True)
        written.append(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(written) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
