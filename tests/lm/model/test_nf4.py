"""Linear layers in 4 bits: values of bitsandbytes, exact products with them, and nothing kept but the 4 bits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.errors import InputError
from bigbatch.lm.model.nf4 import Nf4Linear, check_kernels, input_gradient, load_kernels
from support.tiers import slow

CPU = torch.device("cpu")
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def kernels() -> None:
    load_kernels()


def layer(*, double: bool = False, bias: bool = True, dtype: torch.dtype = torch.float32) -> Nf4Linear:
    torch.manual_seed(0)
    weight = torch.randn(96, 72, dtype=dtype) / 8
    return Nf4Linear(
        weight, nn.Parameter(torch.randn(96, dtype=dtype), requires_grad=False) if bias else None, double=double
    )


def distance(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.parametrize("double", [False, True])
def test_weight_equals_that_of_bitsandbytes(double: bool) -> None:
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    weight = torch.randn(96, 72)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    ours = Nf4Linear(weight, double=double)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.weight, bnb.dequantize_4bit(codes, state))
    assert 0.05 < distance(ours.weight, weight) < 0.12


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_output_and_gradient_are_those_of_the_dequantized_weight(double: bool, dtype: torch.dtype) -> None:
    quantized = layer(double=double, dtype=dtype)
    inputs = torch.randn(2, 5, 72, dtype=dtype, requires_grad=True)
    direction = torch.randn(2, 5, 96, dtype=dtype)
    output = quantized(inputs)
    (gradient,) = torch.autograd.grad(output, inputs, direction)
    expected = F.linear(inputs, quantized.weight, quantized.bias)
    (expected_gradient,) = torch.autograd.grad(expected, inputs, direction)
    assert output.dtype == gradient.dtype == dtype
    assert distance(output, expected) <= ROUNDING[dtype]
    assert distance(gradient, expected_gradient) <= ROUNDING[dtype]


def test_autocast_computes_in_its_dtype() -> None:
    quantized, inputs = layer(), torch.randn(5, 72, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantized(inputs)
        expected = F.linear(inputs, quantized.weight, quantized.bias)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert distance(output, expected) <= ROUNDING[torch.bfloat16]
    (gradient,) = torch.autograd.grad(output.float().sum(), inputs)
    assert gradient.dtype == torch.float32


def test_bytes_are_those_of_four_bits_and_scales() -> None:
    weight = torch.randn(256, 512)
    for double, bits in ((False, 4.5), (True, 4.127)):
        quantized = Nf4Linear(weight, double=double)
        levels = 1024 + 4 if double else 0  # one table and one mean for each layer
        stored = sum(p.nbytes for p in quantized.parameters())
        assert stored - levels == pytest.approx(bits / 8 * weight.numel(), rel=1e-3)
        assert not any(p.requires_grad for p in quantized.parameters())


class Block(nn.Module):
    """Two layers in 4 bits around one that is trained."""

    def __init__(self, double: bool) -> None:
        super().__init__()
        self.first, self.second = layer(double=double, bias=False), layer(double=double)
        self.trained = nn.Linear(96, 72)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.trained(torch.relu(self.first(inputs))))
        return self.second(hidden)


def run(block: Block, call: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients, and what is saved for backward."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    torch.manual_seed(1)
    inputs = torch.randn(4, 72, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = call(inputs)
    return [output, *torch.autograd.grad(output.square().sum(), [inputs, *block.trained.parameters()])], saved


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("compiled", [False, slow(True)])
def test_no_weight_is_kept_for_backward(double: bool, compiled: bool) -> None:
    block = Block(double)
    expected, _ = run(block, block)
    found, saved = run(block, torch.compile(block, dynamic=True) if compiled else block)
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) <= ROUNDING[torch.float32]
    stored = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = [t.shape for t in saved if t.untyped_storage().data_ptr() not in stored and t.numel() > 4 * 96]
    assert kept == []


def test_meta_layer_has_the_shapes_of_a_real_one() -> None:
    weight = torch.randn(33, 65)
    for double in (False, True):
        real, meta = Nf4Linear(weight, double=double), Nf4Linear(weight.to("meta"), double=double)
        assert meta.weight.is_meta
        for one, other in zip(real.parameters(), meta.parameters(), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_kernels_work_on_cpu_and_not_on_meta() -> None:
    check_kernels(CPU, torch.bfloat16)
    with pytest.raises(
        InputError, match=r"^--quantize is not supported on meta by bitsandbytes: .*another --device\.$"
    ):
        check_kernels(torch.device("meta"), torch.float32)


def test_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *more: Any) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("bigbatch.lm.model.nf4.import_module", refuse)
    message = '{} needs the package bitsandbytes: install it with pip install "bigbatch[quantize]".'
    with pytest.raises(InputError) as raised:
        load_kernels()
    assert str(raised.value) == message.format("--quantize")
    with pytest.raises(InputError) as raised:
        load_kernels("--optimizer adamw-8bit")
    assert str(raised.value) == message.format("--optimizer adamw-8bit")


@pytest.mark.gpu
@pytest.mark.parametrize("double", [False, True])
def test_cuda_computes_what_the_cpu_does(double: bool) -> None:
    check_kernels(torch.device("cuda"), torch.bfloat16)
    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    here, there = Nf4Linear(weight, double=double), Nf4Linear(weight.cuda(), double=double)
    assert distance(there.weight.cpu(), here.weight) < (1e-2 if double else 1e-3)  # a scale may round to its neighbour
    inputs = torch.randn(16, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    output = there(inputs)
    expected = F.linear(inputs, there.dequantized(torch.bfloat16))
    assert distance(output, expected) <= ROUNDING[torch.bfloat16]


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("double", [False, True])
def test_compiled_gradient_operation_is_well_defined(double: bool) -> None:
    quantized = layer(double=double)
    torch.library.opcheck(input_gradient, (torch.randn(2, 5, 96), quantized.stored(), 96, 72))
