"""Predicted and measured peak memory of a training step.

    python benchmarks/prediction.py                      on CUDA, against torch.cuda.max_memory_allocated
    python benchmarks/prediction.py --device cpu         small models, against the peak in torch's profiler

GPT-2, Llama and Qwen2 from configurations, in float32, bf16 autocast and bf16 weights, with and without activation
checkpointing, each with micro-batches of three sizes: rows of 512 tokens (of 128 on the CPU). A window of two
micro-batches and fused AdamW; the second window is measured. On CUDA there are two predictions: with CUDA kernels,
and with CPU kernels, as on a machine without a GPU.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bigbatch
from bigbatch.autotune.peak_prediction import PeakPredictor
from bigbatch.lm.model.causal_attention import use_causal_attention

PRECISIONS = ("float32", "bf16", "bf16-weights")
LARGE = {"length": 512, "rows": (4, 8, 16), "scale": "large"}
SMALL = {"length": 128, "rows": (2, 4, 8), "scale": "small"}


def make_model(kind: str, precision: str, checkpointing: bool, *, small: bool, device: str) -> Any:
    """Make a model from its configuration; on the device ``meta`` its tensors have no data."""
    import transformers

    width = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4} if small else {}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4} if small else {}
    configs: dict[str, Callable[[], Any]] = {
        "GPT-2": lambda: transformers.GPT2Config(
            **({"n_embd": 256, "n_layer": 4, "n_head": 8, "vocab_size": 8192} if small else {})
        ),
        "Llama": lambda: transformers.LlamaConfig(
            **{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000}
            | {"num_attention_heads": 32, "num_key_value_heads": 4}
            | ({"vocab_size": 8192} if small else {})
            | width
            | heads
        ),
        "Qwen2": lambda: transformers.Qwen2Config(
            **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
            | {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
            | ({"vocab_size": 8192} if small else {})
            | width
            | heads
        ),
    }
    dtype = torch.bfloat16 if precision == "bf16-weights" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(configs[kind](), dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    use_causal_attention(model)
    return model.train()


def make_loss(precision: str, device: str) -> Callable[[Any, Tensor], tuple[Tensor, int]]:
    """Return the loss function: next-token cross entropy, in float32."""

    def loss_fn(model: Any, ids: Tensor) -> tuple[Tensor, int]:
        narrow = torch.autocast(device, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with narrow:
            logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="sum"), ids.numel()

    return loss_fn


def predict(model: Any, optimizer: Any, loss_fn: Any, rows: int, length: int) -> tuple[Any, float]:
    """Return the prediction and the seconds it took."""
    started_s = time.perf_counter()
    prediction = PeakPredictor.from_training(model, optimizer, loss_fn).predict(shape_of(rows, length))
    return prediction, time.perf_counter() - started_s


def predict_without_gpu(kind: str, precision: str, checkpointing: bool, rows: int, length: int) -> int:
    """Predict for CUDA as on a machine without CUDA."""
    model = make_model(kind, precision, checkpointing, small=False, device="meta")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with hidden_cuda():
        rehearsal = PeakPredictor.from_training(
            model, optimizer, make_loss(precision, "cpu"), device=torch.device("cuda")
        )
        return rehearsal.predict(shape_of(rows, length)).peak_bytes


@contextlib.contextmanager
def hidden_cuda() -> Iterator[None]:
    """Make torch report that CUDA is not available."""
    is_available = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = is_available


def shape_of(rows: int, length: int) -> Tensor:
    """Make a micro-batch without data."""
    return torch.empty(rows, length, dtype=torch.int64, device="meta")


def measure_cuda(step: Callable[[], Any]) -> int:
    """Return the measured peak of one step in bytes."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def measure_cpu(step: Callable[[], Any], held_bytes: int) -> int:
    """Return the peak from the allocations in torch's profiler, added to the memory in use at its start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    now = peak = held_bytes
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def held(model: Any, optimizer: Any) -> int:
    """Return the bytes of parameters, buffers and optimizer state."""
    state = [value for values in optimizer.state.values() for value in values.values()]
    tensors = [*model.parameters(), *model.buffers(), *state]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table, in bytes."""

    kind: str
    precision: str
    checkpointing: bool
    tokens: int
    predicted: Any
    without_gpu: int | None
    measured: int
    seconds: float


def lines(device: str) -> Iterator[Line]:
    """Yield the lines of the table."""
    for kind in ("GPT-2", "Llama", "Qwen2"):
        for precision in PRECISIONS:
            for checkpointing in (False, True):
                torch.manual_seed(0)
                model = make_model(kind, precision, checkpointing, small=device == "cpu", device=device)
                for rows in (SMALL if device == "cpu" else LARGE)["rows"]:
                    yield compare(model, kind, precision, checkpointing, rows, device)
                del model
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()


def compare(model: Any, kind: str, precision: str, checkpointing: bool, rows: int, device: str) -> Line:
    """Predict, then measure."""
    length = (SMALL if device == "cpu" else LARGE)["length"]
    loss_fn = make_loss(precision, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    predicted, seconds = predict(model, optimizer, loss_fn, rows, length)
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=rows)
    batch = torch.randint(8000, (2 * rows, length))
    engine.step(batch)
    without_gpu = None
    if device == "cpu":
        measured = measure_cpu(lambda: engine.step(batch), held(model, optimizer))
    else:
        measured = measure_cuda(lambda: engine.step(batch))
        without_gpu = predict_without_gpu(kind, precision, checkpointing, rows, length)
    return Line(kind, precision, checkpointing, rows * length, predicted, without_gpu, measured, seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import transformers

    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}; MiB")
    print(f"{'model':<7}{'precision':<14}{'checkpoints':<13}{'tokens':>6}{'measured':>11}{'predicted':>11}", end="")
    print(f"{'ratio':>8}{'without GPU':>13}{'ratio':>8}{'phase':>10}{'seconds':>9}")
    ratios: dict[str, list[float]] = {"predicted": [], "without a GPU": []}
    for line in lines(options.device):
        ratio = line.predicted.peak_bytes / line.measured
        ratios["predicted"].append(ratio)
        print(
            f"{line.kind:<7}{line.precision:<14}{'yes' if line.checkpointing else 'no':<13}{line.tokens:>6}"
            f"{line.measured / 2**20:>11,.1f}{line.predicted.peak_bytes / 2**20:>11,.1f}{ratio:>8.4f}",
            end="",
        )
        if line.without_gpu is None:
            print(f"{'–':>13}{'–':>8}", end="")
        else:
            ratios["without a GPU"].append(line.without_gpu / line.measured)
            print(f"{line.without_gpu / 2**20:>13,.1f}{line.without_gpu / line.measured:>8.4f}", end="")
        print(f"{line.predicted.phase:>10}{line.seconds:>9.2f}", flush=True)
    for how, found in ratios.items():
        if found:
            print(f"{len(found)} {how}: between {min(found):.4f} and {max(found):.4f} of what was measured")


if __name__ == "__main__":
    main()
