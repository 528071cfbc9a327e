"""The loss from hidden states against the loss from all logits: sums and gradients, in every dtype and cut."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bigbatch.lm.data.dataset import IGNORED
from bigbatch.lm.model import linear_cross_entropy as module
from bigbatch.lm.model.linear_cross_entropy import linear_cross_entropy
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory

CPU = torch.device("cpu")
TOKENS, WIDTH, VOCABULARY = 37, 8, 50
WORKSPACE_BYTES = 4096  # sums, counts and masks of a chunk
LOSS_ROUNDINGS = 4  # the logits of a token are of the size of its loss, and rounded in the product, map and softmax
MAPS = [{}, {"scale": 0.3}, {"softcap": 3.0}, {"softcap": 3.0, "scale": 0.3}]
ROOM = 1.5  # by which two ways of rounding may differ, both a few units of the narrowest dtype away


def make(
    tokens: int = TOKENS, width: int = WIDTH, vocabulary: int = VOCABULARY, *, dtype: Any = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias that require gradients, and labels of which every third is ignored."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, width), (vocabulary, width), (vocabulary,))
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[::3] = IGNORED
    return *(tensor.to(dtype).requires_grad_() for tensor in (hidden, weight / width**0.5, bias)), labels  # type: ignore[return-value]


def full(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, scale: float = 1.0, softcap: Any = None
) -> Tensor:
    """The oracle: all logits at once."""
    logits = F.linear(hidden, weight, bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def errors(found: Any, expected: Any) -> list[float]:
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)]


def with_gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("options", MAPS, ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("biased", [False, True])
def test_sum_and_gradients_equal_full_logits(options: dict[str, float], chunk_tokens: int, biased: bool) -> None:
    hidden, weight, bias, labels = make()
    leaves = (hidden, weight, bias) if biased else (hidden, weight)
    arguments = (hidden, weight, bias if biased else None, labels)
    found = with_gradients(linear_cross_entropy(*arguments, chunk_tokens=chunk_tokens, **options), *leaves)
    expected = with_gradients(full(*arguments, **options), *leaves)
    assert found[0].shape == ()
    assert max(errors(found, expected)) <= 1e-12


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", MAPS, ids=str)
def test_weights_multiply_losses_and_gradients(options: dict[str, float], fused: bool) -> None:
    hidden, weight, bias, labels = make()
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(0)).masked_fill(labels == IGNORED, 0)
    weights[1] = 0
    scale, softcap = options.get("scale", 1.0), options.get("softcap")
    each = [
        full(hidden[i : i + 1], weight, bias, labels[i : i + 1], scale=scale, softcap=softcap) for i in range(TOKENS)
    ]
    expected = with_gradients((torch.stack(each) * weights).sum(), hidden, weight, bias)
    loss = linear_cross_entropy(hidden, weight, bias, labels, weights=weights, chunk_tokens=5, fused=fused, **options)
    found = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    again = torch.autograd.grad(-2 * loss, (hidden, weight, bias))  # computed a second time
    assert max(errors((loss.detach(), *found), expected)) <= 1e-12
    assert max(errors(again, [-2 * gradient for gradient in expected[1:]])) <= 1e-12
    ones = linear_cross_entropy(hidden, weight, bias, labels, weights=torch.ones(TOKENS), fused=fused, **options)
    assert torch.equal(ones, linear_cross_entropy(hidden, weight, bias, labels, fused=fused, **options))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-1, 6), min_size=1, max_size=9), st.integers(1, 12))
def test_labels_and_chunks_of_any_kind_are_exact(targets: list[int], chunk_tokens: int) -> None:
    hidden, weight, bias, _ = make(len(targets), 3, 7)
    labels = torch.tensor([IGNORED if target < 0 else target for target in targets])
    found = with_gradients(
        linear_cross_entropy(hidden, weight, bias, labels, chunk_tokens=chunk_tokens), hidden, weight, bias
    )
    expected = with_gradients(full(hidden, weight, bias, labels), hidden, weight, bias)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(found, expected, strict=True))


def test_gradients_equal_finite_differences() -> None:
    hidden, weight, bias, labels = make(5, 3, 7)
    assert torch.autograd.gradcheck(
        lambda *leaves: linear_cross_entropy(*leaves, labels, chunk_tokens=2, softcap=2.0, scale=0.7),
        (hidden, weight, bias),
        nondet_tol=1e-12,  # a second backward computes the gradients anew
    )


def test_scale_and_repeated_use_reach_gradients() -> None:
    hidden, weight, bias, labels = make()
    found, expected = (
        with_gradients(-0.3 * loss + loss.square() / 100, hidden, weight, bias)
        for loss in (
            linear_cross_entropy(hidden, weight, bias, labels, chunk_tokens=5),
            full(hidden, weight, bias, labels),
        )
    )
    assert max(errors(found, expected)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_second_backward_gives_same_gradients(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = make(dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, bias, labels, chunk_tokens=5, scale=0.5)
    first = torch.autograd.grad(3 * loss, (hidden, weight, bias), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (hidden, weight, bias))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (hidden,))


def test_double_backward_is_rejected() -> None:
    hidden, weight, bias, labels = make()
    loss = linear_cross_entropy(hidden, weight, bias, labels)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, (hidden,), create_graph=True)


def test_tied_and_checkpointed_weights_sum_over_microbatches() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (4, 11))
    table = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)
    layer = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def gradients(rows: int, loss_fn: Callable[..., Tensor], *, checkpointed: bool) -> list[Tensor]:
        table.grad = layer.weight.grad = None
        for part in tokens.split(rows):
            hidden = F.embedding(part[:, :-1], table)
            hidden = checkpoint(layer, hidden, use_reentrant=False) if checkpointed else layer(hidden)
            loss_fn(hidden.flatten(0, 1), table, None, part[:, 1:].flatten()).backward()
        assert table.grad is not None
        assert layer.weight.grad is not None
        return [table.grad, layer.weight.grad]

    def chunked(*arguments: Any) -> Tensor:
        return linear_cross_entropy(*arguments, chunk_tokens=7)

    expected = gradients(4, full, checkpointed=False)
    assert max(errors(gradients(1, linear_cross_entropy, checkpointed=True), expected)) <= 1e-12
    assert max(errors(gradients(3, linear_cross_entropy, checkpointed=False), expected)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_labels_give_zero(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = make(dtype=dtype)
    found = with_gradients(
        linear_cross_entropy(hidden, weight, bias, torch.full_like(labels, IGNORED), chunk_tokens=5),
        hidden,
        weight,
        bias,
    )
    assert not any(tensor.any() for tensor in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_ignored_positions_have_no_influence(value: float, dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = make(dtype=dtype)
    ignored = labels == IGNORED
    expected = with_gradients(linear_cross_entropy(hidden, weight, bias, labels, chunk_tokens=5), hidden, weight, bias)
    broken = hidden.detach().masked_fill(ignored[:, None], value).requires_grad_()
    found = with_gradients(linear_cross_entropy(broken, weight, bias, labels, chunk_tokens=5), broken, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not found[1][ignored].any()


def test_nan_at_label_is_not_hidden() -> None:
    hidden, weight, bias, labels = make()
    broken = hidden.detach().index_fill(0, torch.tensor([1]), float("nan")).requires_grad_()
    assert all(
        tensor.isnan().any() for tensor in with_gradients(linear_cross_entropy(broken, weight, bias, labels), weight)
    )


def test_invalid_label_is_an_error() -> None:
    hidden, weight, bias, labels = make()
    for wrong in (VOCABULARY, -5):
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy(hidden, weight, bias, labels.index_fill(0, torch.tensor([1]), wrong))


def test_chunk_without_tokens_is_rejected() -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        linear_cross_entropy(*make(), chunk_tokens=0)


def test_empty_input_gives_empty_sum() -> None:
    hidden, weight, bias, labels = make(0)
    loss, *gradients = with_gradients(linear_cross_entropy(hidden, weight, bias, labels), weight, bias)
    assert not loss
    assert not any(gradient.any() for gradient in gradients)


def test_frozen_head_or_layers_get_no_gradient() -> None:
    hidden, weight, bias, labels = make()
    for leaf in (hidden, weight, bias):
        arguments = [tensor if tensor is leaf else tensor.detach() for tensor in (hidden, weight, bias)]
        found = with_gradients(linear_cross_entropy(*arguments, labels, chunk_tokens=5), leaf)  # type: ignore[misc, call-arg]
        assert max(errors(found, with_gradients(full(*arguments, labels), leaf))) <= 1e-12  # type: ignore[arg-type]
    frozen = [tensor.detach() for tensor in (hidden, weight, bias)]
    assert not linear_cross_entropy(*frozen, labels).requires_grad  # type: ignore[misc, call-arg]
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, bias, labels)
    assert not loss.requires_grad
    assert torch.allclose(loss, full(hidden, weight, bias, labels), rtol=1e-12)


class TestPrecision:
    """Rounding: no further from float64 than the loss from all logits in the same dtype, with some room."""

    @staticmethod
    def both(
        narrow: tuple[Tensor, ...],
        labels: Tensor,
        options: dict[str, Any],
        *,
        autocast: Any = None,
        factor: float = 1.0,
    ) -> tuple[list[float], list[float]]:
        """The errors of ours and of the full loss against float64 from the same rounded inputs."""
        exact = [tensor.detach().double().requires_grad_() for tensor in narrow]
        expected = with_gradients(full(*exact, labels, **options), *exact)  # type: ignore[arg-type]
        found = []
        for loss_fn in (linear_cross_entropy, full):
            extra = {"chunk_tokens": 32} if loss_fn is linear_cross_entropy else {}
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = loss_fn(*narrow, labels, **extra, **options)  # type: ignore[arg-type, operator]
            assert loss.dtype == torch.float32
            gradients = torch.autograd.grad(factor * loss, narrow)
            assert [g.dtype for g in gradients] == [t.dtype for t in narrow]
            found.append(errors((loss.detach(), *(g.double() / factor for g in gradients)), expected))
        return found[0], found[1]

    @pytest.mark.parametrize("options", MAPS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_parameters_are_as_accurate_as_full_logits(self, dtype: torch.dtype, options: dict[str, float]) -> None:
        *narrow, labels = make(300, 32, 400, dtype=dtype)
        ours, theirs = self.both(tuple(narrow), labels, options)
        assert ours[0] <= LOSS_ROUNDINGS * torch.finfo(dtype).eps
        assert all(a <= ROOM * b for a, b in zip(ours[1:], theirs[1:], strict=True))

    @pytest.mark.parametrize("options", MAPS, ids=str)
    @pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
    def test_autocast_is_as_accurate_as_full_logits(self, autocast: torch.dtype, options: dict[str, float]) -> None:
        *narrow, labels = make(300, 32, 400, dtype=torch.float32)
        ours, theirs = self.both(tuple(narrow), labels, options, autocast=autocast)
        assert torch.finfo(autocast).eps / 10 < min(ours[1:3]), "autocast was on"
        assert ours[0] <= LOSS_ROUNDINGS * torch.finfo(autocast).eps
        assert all(a <= ROOM * b for a, b in zip(ours[1:], theirs[1:], strict=True))

    def test_float64_under_autocast_stays_exact(self) -> None:
        hidden, weight, bias, labels = make()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, bias, labels)
        assert loss.dtype == torch.float64
        assert torch.allclose(loss, full(hidden, weight, bias, labels), rtol=1e-12)

    def test_float16_slopes_scale_with_gradient_scaler(self) -> None:
        """Of a token that the model is sure of, all others have slopes that float16 rounds to 0 until they are scaled.

        Their weights have a part in common, whose gradient comes to nothing; without their slopes it does not.
        """
        labels = torch.arange(64) % 16
        weight = F.pad(torch.eye(4096, 16), (0, 1), value=1)
        hidden = F.pad(18 * F.one_hot(labels, 16), (0, 1)).float()  # 4,095 tokens with a probability of 1.5e-8 each
        narrow = tuple(tensor.half().requires_grad_() for tensor in (hidden, weight, torch.zeros(4096)))
        scaled, theirs = self.both(narrow, labels, {}, factor=2.0**12)
        assert all(a <= ROOM * b for a, b in zip(scaled, theirs, strict=True))
        unscaled, _ = self.both(narrow, labels, {})
        assert unscaled[1] > 10 * scaled[1]

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_float16_survives_overflow_at_ignored_labels(self, device: str) -> None:
        labels = torch.tensor([0, IGNORED, 1], device=device)
        hidden = 8 * F.one_hot(torch.tensor([0, 0, 1], device=device), 16).half()
        weight = torch.eye(16, device=device).half()
        leaves = (hidden.requires_grad_(), weight.requires_grad_())
        loss = linear_cross_entropy(*leaves, None, labels)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(2.0**17 * loss, leaves))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_parameters_in_autocast_dtype_are_unaffected_by_it(self, dtype: torch.dtype) -> None:
        *leaves, labels = make(300, 32, 400, dtype=dtype)
        expected = with_gradients(linear_cross_entropy(*leaves, labels, chunk_tokens=32), *leaves)  # type: ignore[misc, arg-type]
        with torch.autocast("cpu", dtype=dtype):
            found = with_gradients(linear_cross_entropy(*leaves, labels, chunk_tokens=32), *leaves)  # type: ignore[misc, arg-type]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_error_does_not_grow_with_chunks(self) -> None:
        """The weight's gradient is summed in float32: a bfloat16 sum of 256 chunks would be off by a per cent."""
        *narrow, labels = make(2048, 16, 40, dtype=torch.bfloat16)
        exact = [tensor.detach().double().requires_grad_() for tensor in narrow]
        expected = with_gradients(full(*exact, labels), *exact)  # type: ignore[arg-type]
        found = with_gradients(linear_cross_entropy(*narrow, labels, chunk_tokens=8), *narrow)  # type: ignore[misc, arg-type]
        assert errors(found, expected)[2] <= torch.finfo(torch.bfloat16).eps


class TestMemory:
    """What is held at a time, in bytes."""

    TOKENS, WIDTH, VOCABULARY, CHUNK = 512, 16, 1000, 32

    def peak_bytes(self, loss_fn: Callable[..., Tensor], dtype: torch.dtype, *, frozen_head: bool = False) -> int:
        hidden, weight, _, labels = make(self.TOKENS, self.WIDTH, self.VOCABULARY, dtype=dtype)
        weight.requires_grad_(not frozen_head)
        with AllocationTracker(CPU) as tracker:
            tracker.track([hidden, weight, labels], MemoryCategory.PARAMETERS)
            loss_fn(hidden, weight, None, labels).backward()
        return tracker.peak_bytes - tracker.live_bytes[MemoryCategory.PARAMETERS]

    def chunked(self, *arguments: Any) -> Tensor:
        return linear_cross_entropy(*arguments, chunk_tokens=self.CHUNK)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("frozen_head", [False, True])
    def test_peak_is_two_logit_chunks_plus_gradients(self, dtype: torch.dtype, frozen_head: bool) -> None:
        chunk = 2 * 4 * self.CHUNK * self.VOCABULARY + 3 * 4 * self.CHUNK * self.WIDTH
        gradients = self.TOKENS * self.WIDTH * dtype.itemsize
        gradients += 0 if frozen_head else 4 * self.VOCABULARY * self.WIDTH
        peak = self.peak_bytes(self.chunked, dtype, frozen_head=frozen_head)
        assert peak <= chunk + gradients + WORKSPACE_BYTES
        assert peak < self.peak_bytes(full, dtype, frozen_head=frozen_head) / 5

    @pytest.mark.parametrize(("softcap", "times"), [(None, 2), (3.0, 3)])
    def test_peak_without_gradients_is_two_logit_chunks(self, softcap: float | None, times: int) -> None:
        hidden, weight, _, labels = make(self.TOKENS, self.WIDTH, self.VOCABULARY, dtype=torch.float32)
        with AllocationTracker(CPU) as tracker, torch.no_grad():
            tracker.track([hidden, weight, labels], MemoryCategory.PARAMETERS)
            linear_cross_entropy(hidden, weight, None, labels, chunk_tokens=self.CHUNK, softcap=softcap)
        chunk = times * 4 * self.CHUNK * self.VOCABULARY + 4 * self.CHUNK * self.WIDTH
        assert tracker.peak_bytes - tracker.live_bytes[MemoryCategory.PARAMETERS] <= chunk + WORKSPACE_BYTES

    def test_memory_is_freed_with_gradients(self) -> None:
        hidden, weight, _, labels = make(self.TOKENS, self.WIDTH, self.VOCABULARY, dtype=torch.float32)
        with AllocationTracker(CPU) as tracker:
            tracker.track([hidden, weight, labels], MemoryCategory.PARAMETERS)
            loss = self.chunked(hidden, weight, None, labels)
            loss.backward()
            gradients = 4 * (hidden.numel() + weight.numel())
            assert gradients <= tracker.live_bytes[MemoryCategory.ACTIVATIONS] <= gradients + WORKSPACE_BYTES
            hidden.grad = weight.grad = None
            assert tracker.live_bytes[MemoryCategory.ACTIVATIONS] <= WORKSPACE_BYTES
        assert loss


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
class TestTorchs:
    """`torch.nn.functional.linear_cross_entropy` beside ours."""

    @staticmethod
    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, chunk: int) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        loss: Tensor = F.linear_cross_entropy(
            hidden, weight, labels, linear_bias=bias, reduction="sum", ignore_index=IGNORED, options=options
        )
        return loss

    @pytest.mark.parametrize("chunk", [1, 5, 37])
    def test_torch_implementation_agrees_in_float64(self, chunk: int) -> None:
        hidden, weight, bias, labels = make()
        ours = linear_cross_entropy(hidden, weight, bias, labels, chunk_tokens=chunk)
        theirs = self.theirs(hidden, weight, bias, labels, chunk)
        leaves = (hidden, weight, bias)
        assert max(errors(with_gradients(ours, *leaves), with_gradients(theirs, *leaves))) <= 1e-12

    def test_torch_implementation_is_not_more_accurate_in_bfloat16(self) -> None:
        *narrow, labels = make(2048, 16, 400, dtype=torch.bfloat16)
        exact = [tensor.detach().double().requires_grad_() for tensor in narrow]
        expected = with_gradients(full(*exact, labels), *exact)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = errors(with_gradients(self.theirs(*narrow, labels, 32), *narrow), expected)  # type: ignore[call-arg]
        ours = errors(
            with_gradients(linear_cross_entropy(*narrow, labels, chunk_tokens=32), *narrow),  # type: ignore[misc, arg-type]
            expected,
        )
        assert all(a <= ROOM * b for a, b in zip(ours, theirs, strict=True))


# what is compiled -----------------------------------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what is compiled operation by operation: the same code, in no time."""
    monkeypatch.setattr(module, "_fused", lambda: module._loss_and_logit_grads)


@pytest.mark.parametrize("options", MAPS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("factor", [None, 0.3])
def test_loss_and_gradients_match_all_logits(options: dict[str, float], biased: bool, factor: float | None) -> None:
    hidden, weight, bias, labels = make()
    ignored = labels == IGNORED
    products = (hidden @ weight.T).detach().requires_grad_()
    logits = (products + bias if biased else products) * options.get("scale", 1.0)
    if "softcap" in options:
        logits = torch.tanh(logits / options["softcap"]) * options["softcap"]
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, products)
    loss_sum, logit_grads = module._loss_and_logit_grads(
        products.detach(),
        bias.detach() if biased else None,
        labels.masked_fill(ignored, 0)[:, None],
        ignored,
        None if factor is None else torch.tensor(factor, dtype=torch.float64),
        scale=options.get("scale", 1.0),
        softcap=options.get("softcap"),
        dtype=torch.float64,
    )
    assert torch.allclose(loss_sum, expected, rtol=1e-12)
    logit_grads = logit_grads * options.get("scale", 1.0) / (1 if factor is None else factor)
    assert torch.allclose(logit_grads[~ignored], gradient[~ignored], rtol=1e-12, atol=1e-14)
    assert factor is None or not logit_grads[ignored].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logit_gradients_of_narrow_products_use_float32(dtype: torch.dtype) -> None:
    hidden, weight, _, labels = make()
    products = (hidden @ weight.T).detach().to(dtype)
    arguments: Any = (None, labels.clamp(min=0)[:, None], labels == IGNORED, None)
    exact_sum, exact = module._loss_and_logit_grads(
        products.double(), *arguments, scale=1.0, softcap=3.0, dtype=torch.float64
    )
    loss_sum, logit_grads = module._loss_and_logit_grads(products, *arguments, scale=1.0, softcap=3.0, dtype=dtype)
    assert (loss_sum.dtype, logit_grads.dtype) == (torch.float32, dtype)
    assert torch.allclose(loss_sum.double(), exact_sum, rtol=1e-6)
    assert errors([logit_grads], [exact])[0] <= torch.finfo(dtype).eps


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("options", MAPS, ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_sum_and_gradients_equal_full_logits(options: dict[str, float], chunk_tokens: int, biased: bool) -> None:
    hidden, weight, bias, labels = make()
    leaves = (hidden, weight, bias) if biased else (hidden, weight)
    arguments = (hidden, weight, bias if biased else None, labels)
    loss = linear_cross_entropy(*arguments, chunk_tokens=chunk_tokens, fused=True, **options)
    expected = full(*arguments, **options)
    assert max(errors(with_gradients(-0.3 * loss, *leaves), with_gradients(-0.3 * expected, *leaves))) <= 1e-12
    with torch.no_grad():
        without = linear_cross_entropy(*arguments, chunk_tokens=chunk_tokens, fused=True, **options)
    assert torch.allclose(without, expected, rtol=1e-12)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_ignored_positions_have_no_influence_when_fused(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = make(dtype=dtype)
    ignored = labels == IGNORED
    broken = hidden.detach().masked_fill(ignored[:, None], float("nan")).requires_grad_()
    found, expected = (
        with_gradients(linear_cross_entropy(rows, weight, bias, labels, chunk_tokens=5, fused=True), rows, weight, bias)
        for rows in (broken, hidden)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not found[1][ignored].any()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_narrow_gradients_are_as_accurate(dtype: torch.dtype) -> None:
    *narrow, labels = make(300, 32, 400, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in narrow]
    expected = with_gradients(full(*exact, labels, softcap=3.0), *exact)  # type: ignore[arg-type]
    ours, theirs = (
        errors(with_gradients(loss_fn(*narrow, labels, softcap=3.0, **extra), *narrow), expected)  # type: ignore[operator]
        for loss_fn, extra in ((linear_cross_entropy, {"chunk_tokens": 32, "fused": True}), (full, {}))
    )
    assert ours[0] <= LOSS_ROUNDINGS * torch.finfo(dtype).eps
    assert all(a <= ROOM * b for a, b in zip(ours[1:], theirs[1:], strict=True))


def test_meta_tensors_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_fused", lambda: pytest.fail("was compiled"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        hidden, weight, bias = (mode.from_tensor(tensor.detach()).requires_grad_() for tensor in make()[:3])
        labels = mode.from_tensor(make()[3])
        loss = linear_cross_entropy(hidden, weight, bias, labels, chunk_tokens=5, fused=True)
        assert [g.shape for g in torch.autograd.grad(loss, (hidden, weight, bias))] == [
            hidden.shape, weight.shape, bias.shape
        ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_sum_and_gradients_equal_full_logits() -> None:
    """Once for all lengths: the last chunk is shorter than the others."""
    hidden, weight, bias, labels = make()
    module._fused.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    try:
        loss = linear_cross_entropy(hidden, weight, bias, labels, chunk_tokens=15, fused=True, softcap=3.0, scale=0.3)
        expected = full(hidden, weight, bias, labels, softcap=3.0, scale=0.3)
        assert counters["stats"]["unique_graphs"] == 1
    finally:
        module._fused.cache_clear()
        torch._dynamo.reset()
    leaves = (hidden, weight, bias)
    assert max(errors(with_gradients(3 * loss, *leaves), with_gradients(3 * expected, *leaves))) <= 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_cuda_gradients_are_as_accurate_as_full_logits(
    dtype: torch.dtype, autocast: bool, fused: bool, biased: bool
) -> None:
    *leaves, labels = make(3000, 64, 900, dtype=torch.float32 if autocast else dtype)
    narrow = [leaf.detach().cuda().requires_grad_() for leaf in leaves[: 3 if biased else 2]]
    exact = [tensor.detach().double().requires_grad_() for tensor in narrow]
    nothing = () if biased else (None,)
    expected = with_gradients(full(*exact, *nothing, labels.cuda()), *exact)  # type: ignore[arg-type]
    found = []
    for loss_fn in (linear_cross_entropy, full):
        extra = {"chunk_tokens": 256, "fused": fused} if loss_fn is linear_cross_entropy else {}
        with torch.autocast("cuda", dtype=dtype, enabled=autocast and dtype != torch.float32):
            loss = loss_fn(*narrow, *nothing, labels.cuda(), **extra)  # type: ignore[arg-type, operator]
        found.append(errors(with_gradients(loss, *narrow), expected))
    ours, theirs = found
    assert ours[0] <= LOSS_ROUNDINGS * torch.finfo(dtype).eps
    assert all(a <= ROOM * b + torch.finfo(torch.float32).eps for a, b in zip(ours[1:], theirs[1:], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_cuda_host_never_waits(fused: bool) -> None:
    *leaves, labels = make(300, 32, 400, dtype=torch.bfloat16)
    narrow = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
    labels = labels.cuda()
    with_gradients(linear_cross_entropy(*narrow, labels, chunk_tokens=64, fused=fused), *narrow)  # type: ignore[misc, arg-type]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(linear_cross_entropy(*narrow, labels, chunk_tokens=64, fused=fused), *narrow)  # type: ignore[misc, arg-type]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_cuda_narrow_logits_are_rounded_once(fused: bool) -> None:
    """Against float64 over logits that are rounded to bfloat16; those of the default are not."""
    *leaves, labels = make(3000, 64, 900, dtype=torch.bfloat16)
    hidden, weight = (leaf.detach().cuda() for leaf in leaves[:2])
    hidden = (hidden * (10 / (hidden @ weight.T).std())).requires_grad_()  # logits are rounded by up to 0.06
    labels = labels.cuda()
    logits = (hidden @ weight.T).detach().double().requires_grad_()
    expected_loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    expected = torch.autograd.grad(expected_loss, logits)[0] @ weight.double()
    losses, gradients = [], []
    for narrow in (True, False):
        loss = linear_cross_entropy(hidden, weight, None, labels, chunk_tokens=256, fused=fused, narrow_logits=narrow)
        losses.append(float((loss.double() - expected_loss).abs() / expected_loss))
        (gradient,) = torch.autograd.grad(loss, hidden)
        gradients.append(float((gradient.double() - expected).norm() / expected.norm()))
    assert losses[0] < 0.1 * losses[1]
    assert gradients[0] <= 0.5 * torch.finfo(torch.bfloat16).eps < gradients[1]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_cuda_narrow_logits_take_half_of_the_memory() -> None:
    tokens, vocabulary = 4096, 32_768
    hidden = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, 64, device="cuda", dtype=torch.bfloat16)
    labels = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    peaks = []
    for narrow in (False, True):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(
            hidden.requires_grad_(), weight, None, labels, chunk_tokens=tokens, fused=True, narrow_logits=narrow
        )
        peaks.append(torch.cuda.max_memory_allocated() - before)
    logits = tokens * vocabulary
    assert peaks[0] - peaks[1] == pytest.approx(2 * logits, rel=0.05)
