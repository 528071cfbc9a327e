"""Choice of the attention kernel of packed rows, by trying the kernels on the model.

model with torch's kernel → the same row with FlashAttention-4: logits and gradient agree? → both are timed → the faster
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from bigbatch.errors import InputError, first_line
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.causal_attention import NAMES, Kernel, attend_packed, use_causal_attention
from bigbatch.lm.model.embedding_hook import embedded_tokens
from bigbatch.lm.model.flash_attention_4 import DTYPES, kernel_obstacle
from bigbatch.lm.model.packed_rows import model_inputs, pack_row
from bigbatch.preserve import preserved
from bigbatch.verification.tolerances import TOLERANCES

TRIED_TOKENS = 8_192  # of the row that is timed: about a micro-batch
TRIED_LOGITS = 256  # places whose logits are compared
TIMINGS = 5


def choose_kernel(model: Any, config: TrainConfig, device_spec: DeviceSpec, *, longest: int) -> tuple[str, ...]:
    """Switch a model with packed rows to the faster kernel; return a note if FlashAttention-4 is there and not used.

    Args:
        model: On its device, with the attention of `use_causal_attention`, without adapters.
        config: ``attention`` is auto, torch or fa4.
        device_spec: Device and precision.
        longest: Tokens of the longest sequence of the run.

    Raises:
        InputError: The configuration asks for a kernel that this model or device cannot use.
    """
    if config.attention == "torch":
        return ()
    why = kernel_obstacle(device_spec.device)
    if why is not None and config.attention == "auto":
        return ()
    if why is None and config.attention == "auto" and (config.deterministic or config.reproducible):
        why = "its time decides, which may differ between runs; --attention fa4 selects it"
    if why is None:
        with torch.random.fork_rng(devices=[device_spec.device]):
            why = _try(model, config, device_spec, longest)
    if why is None:
        use_causal_attention(model, "fa4")
        return ()
    use_causal_attention(model)
    if config.attention == "fa4":
        raise InputError(f"--attention fa4 is not supported for {config.model}: {why}. Use --attention auto or torch.")
    return (f"attention uses the kernel of torch, not FlashAttention-4: {why}",)


def _try(model: Any, config: TrainConfig, device_spec: DeviceSpec, longest: int) -> str | None:
    """Return why the kernel of torch stays; None for FlashAttention-4."""
    samples = _samples(model, longest)
    try:
        with warnings.catch_warnings(), preserved(model, parameters=False):
            warnings.simplefilter("ignore")  # of its compiler
            expected, shape = _run(model, "torch", device_spec, samples, longest)
            found, _ = _run(model, "fa4", device_spec, samples, longest)
    except Exception as error:  # noqa: BLE001 - a kernel that fails to compile, or a shape that it does not have
        return first_line(error)
    tolerance = TOLERANCES[torch.bfloat16]
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    if not worst <= tolerance:
        return f"its results differ by {worst:.0e}"
    if config.attention == "fa4":
        return None
    captured = config.compile in ("auto", "graphs")
    times = {kernel: time_kernel(kernel, shape, longest, device_spec.device, captured=captured) for kernel in NAMES}
    if times["fa4"] >= times["torch"]:
        return f"it takes {times['fa4'] / times['torch']:.2f} of the time of torch's for this model"
    return None


def _run(
    model: Any, kernel: Kernel, device_spec: DeviceSpec, samples: list[dict[str, Tensor]], longest: int
) -> tuple[tuple[Tensor, Tensor], "Shape"]:
    """Return some logits and the gradient by the embedded tokens for one packed row, and the shape of its attention."""
    use_causal_attention(model, kernel)
    model.eval()
    row = {name: tensor.to(device_spec.device) for name, tensor in pack_row(samples, pad_id=0, longest=longest).items()}
    lengths = [len(sample["input_ids"]) for sample in samples]
    tokens = sum(lengths)
    recorded, embeddings = _recorded_shapes(kernel), embedded_tokens(model)
    with recorded as shapes, embeddings as embedded, _few_logits(model, lengths) as is_cut, device_spec.autocast():
        logits = model(**model_inputs(row, longest=longest, needs_mask=False), use_cache=False).logits[0]
        logits = logits if is_cut else logits[:tokens]
        (gradient,) = torch.autograd.grad(logits.float().logsumexp(-1).sum(), embedded[0])
    return (logits.detach().double(), gradient[0, :tokens].double()), shapes[0]


@contextmanager
def _few_logits(model: Any, lengths: list[int]) -> Iterator[bool]:
    """Compute the logits of a few places only: those of a large vocabulary take more memory than the run may have.

    The places are evenly spaced, and the last of each sequence is among them, which attends to all of it. Yields
    whether they are cut; not if the model has no output layer of its own.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield False
        return
    ends = list(accumulate(lengths))
    spaced = torch.linspace(0, ends[-1] - 1, TRIED_LOGITS).long().tolist()
    places = torch.tensor(sorted({*spaced, *(end - 1 for end in ends)}))

    def cut(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = inputs
        return hidden[:, places.to(hidden.device)], *others

    handle = head.register_forward_pre_hook(cut)
    try:
        yield True
    finally:
        handle.remove()


Shape = tuple[int, int, int, torch.dtype]  # heads, key heads, width, dtype


@contextmanager
def _recorded_shapes(kernel: Kernel) -> Iterator[list[Shape]]:
    """Collect the shapes of the tensors that layers pass to attention."""
    from transformers import AttentionInterface

    attend, shapes = AttentionInterface()[NAMES[kernel]], list[Shape]()

    def attend_and_record(module: Any, query: Tensor, key: Tensor, *tensors: Any, **options: Any) -> Any:
        shapes.append((query.shape[1], key.shape[1], query.shape[3], query.dtype))
        return attend(module, query, key, *tensors, **options)

    AttentionInterface.register(NAMES[kernel], attend_and_record)
    try:
        yield shapes
    finally:
        AttentionInterface.register(NAMES[kernel], attend)


def _samples(model: Any, longest: int) -> list[dict[str, Tensor]]:
    """Create samples of several lengths, the longest among them, with tokens of the whole vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in sorted({1, max(1, longest // 3), max(1, longest // 2), longest}):
        tokens = torch.randint(vocabulary, (length,), generator=generator)
        samples.append({"input_ids": tokens, "labels": tokens})
    return samples


def time_kernel(kernel: Kernel, shape: Shape, longest: int, device: torch.device, *, captured: bool) -> float:
    """Return the milliseconds of forward and backward of one layer's attention, the median of a few runs.

    The row has about 8,192 tokens in sequences of a quarter of ``longest``.

    Args:
        kernel: Which one.
        shape: Heads, key heads, width of a head, dtype.
        longest: Tokens of the longest sequence.
        device: A CUDA device.
        captured: Whether to replay a CUDA graph, without the time that the host takes to launch.
    """
    heads, key_heads, width, dtype = shape
    length = max(1, longest // 4)
    sequences = max(1, TRIED_TOKENS // length)
    offsets = torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32, device=device)
    dtype = dtype if dtype in DTYPES else torch.bfloat16

    def random(number: int) -> Tensor:
        return torch.randn(1, number, sequences * length, width, device=device, dtype=dtype, requires_grad=True)

    tensors = random(heads), random(key_heads), random(key_heads)

    def run() -> None:
        attended = attend_packed(*tensors, offsets, longest, kernel=kernel)
        torch.autograd.grad(attended, tensors, attended.detach())

    return median_time(run, device, captured=captured)


def median_time(run: Callable[[], object], device: torch.device, *, captured: bool) -> float:
    """Return the median of the milliseconds that a function takes on a CUDA device, after a first call.

    Args:
        run: Called once, or twice and then replayed.
        device: Where its kernels run.
        captured: Whether to replay a CUDA graph of it.
    """
    cuda = cast("Any", torch.cuda)
    stream, make_event = cuda.Stream(device), cuda.Event
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()  # compiles
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                run()
        times: list[float] = []
        for _ in range(TIMINGS):
            start, end = make_event(enable_timing=True), make_event(enable_timing=True)
            start.record()
            graph.replay() if captured else run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    torch.cuda.current_stream(device).wait_stream(stream)
    return sorted(times)[len(times) // 2]
