"""FlashAttention-4 for packed rows: where it is refused, and, on CUDA, the same results as attention in float64."""

import importlib.util
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from bigbatch import Engine
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model import attention_choice
from bigbatch.lm.model.attention_choice import choose_kernel, time_kernel
from bigbatch.lm.model.causal_attention import attend_packed, kernel_of, use_causal_attention
from bigbatch.lm.model.flash_attention_4 import flash_attention_4, kernel_obstacle
from bigbatch.lm.model.setup import set_up_model

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
VOCABULARY = 300
LONGEST = 96
SIZE = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 128, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
}  # fmt: skip
LENGTHS = (300, 1, 517, 64, 1021, 130)


def build(device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen2Config(**SIZE), dtype=dtype).to(device)


def samples(*lengths: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row} for row in rows]


def test_cpu_has_no_kernel() -> None:
    assert kernel_obstacle(CPU) == "it has no kernel for cpu"
    model = build(CPU, torch.float64)
    use_causal_attention(model)
    assert choose_kernel(model, TrainConfig(), DeviceSpec(CPU, "float64"), longest=LONGEST) == ()
    assert kernel_of(model) == "torch"


def test_trial_computes_few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a large vocabulary would take more memory than the run has; every sequence's last one is among them."""
    rows = samples(1, 32, 48, LONGEST)
    model, float64 = build(CPU, torch.float64), DeviceSpec(CPU, "float64")
    use_causal_attention(model)
    monkeypatch.setattr(attention_choice, "TRIED_LOGITS", 10**6)
    (whole, _), shape = attention_choice._run(model, "torch", float64, rows, LONGEST)
    assert whole.shape == (177, VOCABULARY)
    monkeypatch.setattr(attention_choice, "TRIED_LOGITS", 5)
    (few, gradient), same_shape = attention_choice._run(model, "torch", float64, rows, LONGEST)
    places = sorted({0, 44, 88, 132, 176} | {0, 32, 80, 176})
    assert torch.allclose(few, whole[places], rtol=0, atol=1e-12)
    assert gradient.shape == (177, SIZE["hidden_size"])
    assert (gradient.norm(dim=-1) > 0).all()
    assert same_shape == shape
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("mode", ["deterministic", "reproducible"])
def test_kernel_is_not_chosen_by_timing_where_bits_are_promised(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "kernel_obstacle", lambda device: None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())  # of torch without CUDA
    real = attention_choice._run
    monkeypatch.setattr(attention_choice, "_run", lambda model, kernel, *rest: real(model, "torch", *rest))
    timed: list[str] = []

    def time_kernel(kernel: str, *rest: object, **settings: object) -> float:
        timed.append(kernel)
        return 1.0 if kernel == "torch" else 0.5

    monkeypatch.setattr(attention_choice, "time_kernel", time_kernel)
    model, float64 = build(CPU, torch.float64), DeviceSpec(CPU, "float64")
    use_causal_attention(model)
    assert choose_kernel(model, TrainConfig().resolved(), float64, longest=LONGEST) == ()
    assert (timed, kernel_of(model)) == (["torch", "fa4"], "fa4")
    notes = choose_kernel(model, TrainConfig(**{mode: True}).resolved(), float64, longest=LONGEST)
    assert notes == (
        "attention uses the kernel of torch, not FlashAttention-4: its time decides, which may differ between runs; "
        "--attention fa4 selects it",
    )
    assert (timed, kernel_of(model)) == (["torch", "fa4"], "torch")


@pytest.mark.parametrize("layout", ["packed", "padded", "auto"])
def test_fa4_is_refused_where_it_cannot_be_used(layout: str) -> None:
    config = TrainConfig(attention="fa4", layout=layout, max_length=LONGEST).resolved()
    sentence = (
        "--attention fa4 is not supported for tiny: it has no kernel for cpu. Use --attention auto or torch."
        if layout == "packed"
        else "--attention fa4 is for packed rows, and rows are padded. Use --attention auto."
    )
    with pytest.raises(InputError) as caught:
        set_up_model(build(CPU), config, DeviceSpec(CPU, "float32"), pad_id=0, longest=LONGEST)
    assert str(caught.value) == sentence


def test_shapes_of_the_operator() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key = (torch.empty(20, heads, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2))
        offsets = torch.zeros(3, dtype=torch.int32)
        attended = flash_attention_4(query, key, key, offsets, 10, scale=0.1, window=None)
        of_query, of_key = torch.autograd.grad(attended.sum(), (query, key))
    assert (attended.shape, of_query.shape, of_key.shape) == (query.shape, query.shape, key.shape)
    assert {attended.dtype, of_query.dtype, of_key.dtype} == {torch.bfloat16}


pytestmark = pytest.mark.filterwarnings("ignore")  # of compilers
gpu = pytest.mark.gpu
installed = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn-4 is not installed")


def attention_of(shape: tuple[int, int, int], lengths: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    heads, key_heads, width = shape
    tensors = [
        torch.randn(1, number, sum(lengths), width, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for number in (heads, key_heads, key_heads)
    ]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    offsets = [0, *ends, *[ends[-1]] * 3]  # empty sequences at the end
    return tensors, torch.tensor(offsets, dtype=torch.int32, device=CUDA)


def exact(tensors: list[Tensor], offsets: Tensor, window: int | None) -> list[Tensor]:
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    parts = []
    for start, end in pairwise(offsets.tolist()):
        query, key, value = (tensor[:, :, start:end] for tensor in wide)
        seen = torch.ones(end - start, end - start, dtype=torch.bool, device=CUDA).tril()
        if window is not None:
            seen &= ~seen.tril(-window)
        parts.append(F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True))
    attended = torch.cat(parts, 2).transpose(1, 2)
    return [attended.detach(), *torch.autograd.grad(attended, wide, attended.detach())]


def found(kernel: Any, tensors: list[Tensor], offsets: Tensor, window: int | None) -> list[Tensor]:
    attended = attend_packed(*tensors, offsets, max(LENGTHS), kernel=kernel, sliding_window=window)
    return [attended.detach(), *torch.autograd.grad(attended, tensors, attended.detach())]


def error(results: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(results, expected, strict=True))


@gpu
@installed
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("shape", [(14, 2, 64), (4, 4, 128), (28, 4, 128)], ids=str)
def test_results_are_as_close_to_float64_as_torchs(shape: tuple[int, int, int], window: int | None) -> None:
    tensors, offsets = attention_of(shape, LENGTHS)
    expected = exact(tensors, offsets, window)
    ours, torchs = (error(found(kernel, tensors, offsets, window), expected) for kernel in ("fa4", "torch"))
    assert ours <= 1.2 * torchs


@gpu
@installed
def test_operator_is_registered_correctly() -> None:
    tensors, offsets = attention_of((4, 2, 64), (30, 50))
    rows = [tensor[0].transpose(0, 1).contiguous().detach().requires_grad_() for tensor in tensors]
    arguments = (*rows, offsets, 64, 0.125, None, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.bigbatch.flash_attention_4.default, arguments, test_utils=tests)


@gpu
@installed
def test_deterministic_backward_gives_equal_bits() -> None:
    tensors, offsets = attention_of((14, 2, 64), LENGTHS)
    torch.use_deterministic_algorithms(True)
    try:
        first = found("fa4", tensors, offsets, None)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(found("fa4", tensors, offsets, None), first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@gpu
@installed
@pytest.mark.parametrize("compile_mode", ["none", "layers", "graphs"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_windows_equal_those_with_torchs_kernel(compile_mode: str, checkpointing: str) -> None:
    gradients = {}
    for kernel in ("torch", "fa4"):
        torch._dynamo.reset()
        model = build(CUDA)
        config = TrainConfig(
            attention=kernel,
            layout="packed",
            compile=compile_mode,
            gradient_checkpointing=checkpointing,
            max_length=LONGEST,
        ).resolved()
        set_up = set_up_model(model, config, DeviceSpec(CUDA, "bf16"), pad_id=0, longest=LONGEST)
        assert (set_up.layout, set_up.notes, kernel_of(model)) == ("packed", (), kernel)
        engine = Engine(
            model,
            torch.optim.SGD(model.parameters(), lr=0.0),
            set_up.training_loss,
            microbatch=3,
            collate=set_up.collate,
            lengths=lambda rows: [len(row["input_ids"]) for row in rows],
            layout="packed",
            cuda_graphs=set_up.uses_cuda_graphs,
            check=False,
        )
        for _ in range(2):
            engine.step(samples(LONGEST, 40, 7, LONGEST, 1, 63, 30))
        engine.backward(samples(LONGEST, 40, 7, LONGEST, 1, 63, 30))
        if compile_mode == "graphs":
            assert engine.runner.disabled_reason is None
        gradients[kernel] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()
    cosine = F.cosine_similarity(gradients["fa4"], gradients["torch"], dim=0)
    assert cosine > 0.999


@gpu
@installed
def test_faster_kernel_is_chosen() -> None:
    model = build(CUDA)
    use_causal_attention(model)
    config = TrainConfig(max_length=2048).resolved()
    notes = choose_kernel(model, config, DeviceSpec(CUDA, "bf16"), longest=2048)
    shape = (2, 1, 64, torch.bfloat16)
    times = [time_kernel(kernel, shape, 2048, CUDA, captured=True) for kernel in ("fa4", "torch")]
    if abs(times[0] / times[1] - 1) > 0.1:
        assert kernel_of(model) == ("fa4" if times[0] < times[1] else "torch")
    assert len(notes) == (kernel_of(model) == "torch")
