"""Weight gradients that linear layers add to the sums of windows within their products."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bigbatch
from bigbatch.errors import InputError
from bigbatch.gradients import direct_sums, weight_products
from bigbatch.gradients.fused_embedding import FusedEmbedding, weights_for_loss
from bigbatch.gradients.fused_gradients import FusedGradients
from bigbatch.gradients.fused_linear import FusedLinear
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.lm.model.linear_cross_entropy import linear_cross_entropy
from support.tiers import slow, slow_except

pytestmark = [  # of torch's compiler, which hides both unless warnings are errors
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

EXACT = 1e-12
SEVERAL = "a micro-batch uses its weight several times"
BACKENDS = ["aot_eager", "inductor"]


class Block(nn.Module):
    """A residual block whose layers are compiled or checkpointed together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Net(nn.Module):
    """Embedding, blocks, a layer that is used ``uses`` times, and a head that may be tied to the embedding."""

    def __init__(self, *, tied: bool = False, uses: int = 1, checkpointed: bool = False, num_blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(num_blocks))
        self.shared = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.uses, self.checkpointed = uses, checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if self.checkpointed else block(hidden)
        for _ in range(self.uses):
            hidden = torch.tanh(self.shared(hidden))
        return hidden


def make(dtype: torch.dtype = torch.float64, **kind: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kind).to(dtype)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    tokens, labels = batch
    logits = model(tokens).flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels.flatten(), reduction="sum"), (labels != -100).sum()


def chunked_loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same loss, which uses the weight of the head, and not its forward."""
    tokens, labels = batch
    hidden, (weight, narrow) = model.hidden(tokens).flatten(0, 1), weights_for_loss(model.head)
    loss_sum = linear_cross_entropy(hidden, weight, None, labels.flatten(), narrow_weight=narrow, chunk_tokens=4)
    return loss_sum, (labels != -100).sum()


def autocast_loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return loss_fn(model, batch)


def make_batch(rows: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (rows, 5), generator=generator)
    return tokens, torch.where(torch.rand(rows, 5, generator=generator) < 0.4, -100, tokens.flip(1))


class RecordingSGD(torch.optim.SGD):
    """Plain SGD that keeps the gradients it was given."""

    seen: list[dict[int, Tensor]]

    def step(self, closure: None = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.seen = [
            *getattr(self, "seen", []),
            {i: p.grad.clone() for i, p in enumerate(parameters) if p.grad is not None},
        ]
        super().step(closure)


def run(
    model: nn.Module,
    loss: Callable[..., Any] = loss_fn,
    *,
    microbatch: int = 2,
    fuse: Any = True,
    num_steps: int = 2,
    **settings: Any,
) -> tuple[RecordingSGD, bigbatch.Engine]:
    """Run updates and return the optimizer with the gradients of each."""
    optimizer = RecordingSGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    settings = {"noise": False, "check": False, **settings}
    engine = bigbatch.Engine(model, optimizer, loss, microbatch=microbatch, fuse_gradients=fuse, **settings)
    for _ in range(num_steps):
        engine.step(make_batch())
    return optimizer, engine


def difference(found: RecordingSGD, expected: RecordingSGD) -> float:
    worst = 0.0
    for one, other in zip(found.seen, expected.seen, strict=True):
        assert one.keys() == other.keys()
        error = sum((one[i].double() - other[i].double()).square().sum() for i in one)
        worst = max(worst, (error / sum(other[i].double().square().sum() for i in other)).sqrt().item())
    return worst


def whole(model: nn.Module, loss: Callable[..., Any] = loss_fn, **settings: Any) -> RecordingSGD:
    """Updates of the whole batch, without fused layers."""
    return run(model, loss, microbatch=100, fuse=False, **settings)[0]


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the sums that products were added to, in order."""
    shapes: list[tuple[int, ...]] = []
    original = weight_products.add_weight_gradient_

    def record(total: Tensor, output_gradient: Tensor, inputs: Tensor) -> None:
        shapes.append(tuple(total.shape))
        original(total, output_gradient, inputs)

    monkeypatch.setattr(direct_sums, "add_weight_gradient_", record)
    return shapes


KINDS = [
    ({}, loss_fn),
    ({"tied": True}, loss_fn),
    ({"tied": True}, chunked_loss_fn),
    ({"uses": 2}, chunked_loss_fn),
    ({"checkpointed": True}, loss_fn),
]
KIND_NAMES = ["plain", "tied", "tied, chunked loss", "used twice", "checkpointed"]


@pytest.mark.parametrize("microbatch", [1, 2, 4, 5, 8, 9])
@pytest.mark.parametrize(("kind", "loss"), KINDS, ids=KIND_NAMES)
def test_any_microbatch_gives_full_gradient(kind: dict[str, Any], loss: Any, microbatch: int, added: list[Any]) -> None:
    expected = whole(make(**kind))
    optimizer, engine = run(make(**kind), loss, microbatch=microbatch)
    assert difference(optimizer, expected) <= EXACT
    assert len(added) == 0 if microbatch == 9 else len(added) >= 4
    assert not any(isinstance(module, FusedLinear | FusedEmbedding) for module in engine.model.modules())


class OutOfMemory:
    """Raises an out-of-memory error at one of the products and layer boundaries of a backward, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module, at: int) -> None:
        self.at, self.num_seen, self.num_raised = at, 0, 0
        for name in ("weight_gradient", "add_weight_gradient_", "add_rows_"):
            original = getattr(weight_products, name)
            monkeypatch.setattr(direct_sums, name, self.around(original))
        for module in model.modules():
            module.register_forward_hook(self.hook_output)

    def around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def product(*args: Any) -> Any:
            self.fail_in_turn()
            return original(*args)

        return product

    def hook_output(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda _: self.fail_in_turn())

    def fail_in_turn(self) -> None:
        self.num_seen += 1
        if self.num_seen == self.at:
            self.num_raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")


@pytest.mark.parametrize(("kind", "loss"), KINDS, ids=KIND_NAMES)
def test_every_sample_counts_once_after_out_of_memory(
    kind: dict[str, Any], loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(make(**kind), num_steps=1)
    at = 0
    while True:
        at += 1
        model = make(**kind)
        with monkeypatch.context() as patch:
            failure = OutOfMemory(patch, model, at)
            optimizer, engine = run(model, loss, microbatch=5, num_steps=1)
        assert engine.fused.disabled_reason is None
        if not failure.num_raised:
            break
        assert engine.runner.retries == 1
        assert difference(optimizer, expected) <= EXACT, f"failure {at}"
    assert at > 20  # two micro-batches of several layers


def test_weight_that_may_be_partial_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second use that only later micro-batches have is added by itself, and a failure in between is raised."""
    model = make()
    counted = 0

    def loss_of_later(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal counted
        counted += 1
        model.uses = 2 if counted > 1 else 1
        return loss_fn(model, batch)

    optimizer = RecordingSGD(model.parameters(), lr=0.1)
    engine = bigbatch.Engine(
        model, optimizer, loss_of_later, microbatch=5, fuse_gradients=True, noise=False, check=False
    )
    original, num_shared = weight_products.add_weight_gradient_, 0

    def fail_at_second_use(total: Tensor, output_gradient: Tensor, inputs: Tensor) -> None:
        nonlocal num_shared
        num_shared += total is model.shared.weight.grad
        if num_shared == 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        original(total, output_gradient, inputs)

    monkeypatch.setattr(direct_sums, "add_weight_gradient_", fail_at_second_use)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        engine.step(make_batch())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("backend", slow_except(BACKENDS, "aot_eager"))
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_layers_give_full_gradient(backend: str, checkpointed: bool, added: list[Any]) -> None:
    expected = whole(make())
    model = make()
    compile_blocks(model, backend, checkpointed=checkpointed)
    optimizer, engine = run(model, microbatch=4)
    assert difference(optimizer, expected) <= EXACT
    assert len(added) >= 2 * 2 * 4  # windows, further micro-batches, compiled weights
    assert engine.fused.num_layers == 8


def compile_blocks(model: Net, backend: str, *, checkpointed: bool = False) -> None:
    torch._dynamo.reset()
    for block in model.blocks:
        compiled: Any = torch.compile(block._call_impl, dynamic=True, backend=backend)
        run_compiled = lambda *args, run=compiled: checkpoint(run, *args, use_reentrant=False)  # noqa: E731
        block._compiled_call_impl = run_compiled if checkpointed else compiled


@pytest.mark.slow
def test_compiled_layers_count_once_after_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    num_failures = 12
    expected = whole(make(), num_steps=1 + num_failures)
    model = make()
    compile_blocks(model, "aot_eager")
    optimizer = RecordingSGD(model.parameters(), lr=0.05)
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=5, fuse_gradients=True, noise=False, check=False)
    engine.step(make_batch())  # shows that compiled layers use each weight once
    for at in range(1, num_failures + 1):
        with monkeypatch.context() as patch:
            failure = OutOfMemory(patch, nn.Module(), at)
            assert engine.step(make_batch()).retries == failure.num_raised == 1
    assert difference(optimizer, expected) <= EXACT


@pytest.mark.parametrize("compiled", ["blocks", slow("model")])
def test_compiled_layer_that_runs_twice_gives_full_gradient(compiled: str) -> None:
    model = make()
    model.blocks[1] = model.blocks[0]  # the same weights in both layers
    expected = whole(copy.deepcopy(model), num_steps=3)
    if compiled == "blocks":
        compile_blocks(model, "aot_eager")
    else:
        torch._dynamo.reset()
        model._compiled_call_impl = torch.compile(model._call_impl, backend="aot_eager", dynamic=True)  # type: ignore
    optimizer, engine = run(model, microbatch=4, num_steps=3)
    assert difference(optimizer, expected) <= EXACT
    assert engine.fused.reasons == dict.fromkeys(["blocks.0.up", "blocks.0.down"], SEVERAL)


@pytest.mark.parametrize("loss", [loss_fn, chunked_loss_fn])
@pytest.mark.parametrize("tied", [False, True])
def test_copies_change_no_bit_under_autocast(loss: Callable[..., Any], tied: bool) -> None:
    def autocast(model: Any, batch: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, batch)

    ordinary, _ = run(make(torch.float32, tied=tied), autocast, fuse=False)
    optimizer, engine = run(make(torch.float32, tied=tied), autocast, fuse="copies")
    assert is_equal(optimizer, ordinary)
    if tied or loss is chunked_loss_fn:
        assert engine.fused.copies.get(engine.model.head.weight) is not None or not tied
        return
    assert engine.fused.copies.num_bytes == 2 * sum(
        p.numel() for n, p in engine.model.named_parameters() if is_fused(n)
    )


def is_equal(optimizer: RecordingSGD, other: RecordingSGD) -> bool:
    pairs = zip(optimizer.seen, other.seen, strict=True)
    return all(
        first.keys() == second.keys() and all(torch.equal(first[i], second[i]) for i in first)
        for first, second in pairs
    )


def is_fused(name: str) -> bool:
    """Whether a parameter is a weight of a linear layer that a micro-batch uses."""
    return name.endswith("weight") and "embedding" not in name and "unused" not in name


def test_sums_save_a_rounding_under_autocast() -> None:
    """The error against the same products in float64 is smaller, weight by weight."""
    exact = gradients_of_rounded_products()
    ordinary, fused = (
        run(make(torch.float32), autocast_loss_fn, fuse=fuse, microbatch=1, num_steps=1)[0].seen[0]
        for fuse in (False, "sums")
    )
    names = [name for name, _ in make().named_parameters()]
    weights = [index for index, name in enumerate(names) if is_fused(name)]
    assert len(weights) == 6
    for index in weights:
        errors = [(found[index].double() - exact[index]).norm() / exact[index].norm() for found in (fused, ordinary)]
        assert errors[0] < 1e-6 < 1e-4 < errors[1], names[index]


def gradients_of_rounded_products() -> dict[int, Tensor]:
    """The gradients whose products have the operands of autocast, and are computed and summed in float64."""
    model, (tokens, labels) = make(torch.float32), make_batch()
    operands: dict[nn.Module, list[Tensor]] = {}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        operands.setdefault(module, []).append(inputs[0].detach().bfloat16())
        output.register_hook(lambda gradient: operands[module].append(gradient))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(hook)
    for row in range(len(tokens)):
        autocast_loss_fn(model, (tokens[row : row + 1], labels[row : row + 1]))[0].backward()
    places = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    divisor = (labels != -100).sum()
    return {
        places[id(module.weight)]: sum(
            gradient.flatten(0, -2).double().t() @ inputs.flatten(0, -2).double()
            for inputs, gradient in zip(found[::2], found[1::2], strict=True)
        )
        / divisor
        for module, found in operands.items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_summed_in_float32(dtype: torch.dtype, added: list[Any]) -> None:
    expected = whole(make(), num_steps=1)
    errors = [difference(run(make(dtype), fuse=fuse, num_steps=1, microbatch=1)[0], expected) for fuse in (True, False)]
    assert errors[0] <= 1.1 * errors[1] < 0.1
    assert len(added) == 6 * 8


def test_update_of_weights_refreshes_copies() -> None:
    model = make(torch.float32)
    _, engine = run(model, autocast_loss_fn, num_steps=1)
    copies = engine.fused.copies
    with torch.no_grad():
        model.shared.weight.add_(1.0)
    seen: list[bool] = []

    def watching_loss_fn(model: Any, batch: Any) -> Any:
        seen.append(torch.equal(copies.get(model.shared.weight), model.shared.weight.bfloat16()))
        if len(seen) == 2:  # within the window, as a model that limits its weights does
            with torch.no_grad():
                model.shared.weight.clamp_(max=0.5)
        return autocast_loss_fn(model, batch)

    engine.loss_fn = watching_loss_fn
    with pytest.warns(UserWarning, match="was written to after the first backward of a window"):
        engine.step(make_batch())
    assert seen == [True] * 5


def test_weight_written_through_data_is_refused() -> None:
    model = make(torch.float32)

    def limiting_loss_fn(model: Any, batch: Any) -> Any:
        model.shared.weight.data.mul_(0.5)
        return autocast_loss_fn(model, batch)

    with pytest.raises(bigbatch.WindowStateError) as caught:
        run(model, limiting_loss_fn, num_steps=1)
    assert str(caught.value) == (
        "a weight of shape (6, 6) was changed within a window through .data, which torch does not record, and "
        "micro-batches used its copy in bfloat16: write to the weight itself under torch.no_grad(), or pass "
        "fuse_gradients=False."
    )


def test_windows_that_measure_noise_run_ordinary_layers(added: list[Any]) -> None:
    scales = []
    for fuse in (False, True):
        added.clear()
        _, engine = run(make(), fuse=fuse, noise=True, num_steps=8)
        assert not added
        for _ in range(9):
            engine.step(make_batch())
        assert engine.accumulator.noise is not None
        scales.append(engine.accumulator.noise.estimator.estimate())
    assert len(added) == 7 * 6 * 4  # windows that are not measured, weights, further micro-batches
    assert scales[0].scale_items == pytest.approx(scales[1].scale_items, rel=1e-9)


@pytest.mark.parametrize("kind", ["tensor", "accumulated"])
def test_hooked_weight_is_not_fused(kind: str, added: list[Any]) -> None:
    expected, model, seen = whole(make()), make(), []
    weight = model.shared.weight
    if kind == "tensor":
        weight.register_hook(lambda gradient: seen.append(gradient.shape))
    else:
        weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.shape))
    optimizer, engine = run(model)
    assert difference(optimizer, expected) <= EXACT
    assert len(seen) == 2 * 5
    assert engine.fused.reasons == {"shared": "a hook waits for the gradient of its weight"}
    assert len(added) == 2 * 5 * 4


def test_reasons_name_layers_that_are_not_fused() -> None:
    class Own(nn.Linear):
        pass

    model = make(tied=True)
    model.shared = Own(6, 6, dtype=torch.float64)
    model.blocks[0].up.forward = model.blocks[0].up.forward  # type: ignore[method-assign]
    model.unused = nn.Linear(6, 12, dtype=torch.float64)
    model.unused.weight = model.blocks[1].up.weight
    engine = run(model, num_steps=1)[1]
    assert engine.fused.reasons == {
        "blocks.0.up": "its forward was replaced",
        "shared": "it is a Own, and not exactly an nn.Linear",
        "unused": "its weight is tied to that of another module",
        "blocks.1.up": "its weight is tied to that of another module",
    }
    assert engine.fused.num_layers == 4


def test_penalty_on_gradients_is_differentiated_twice() -> None:
    def penalized(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden = model.embedding(batch[0])
        output = model.shared(torch.tanh(model.blocks[0](hidden))).square().sum()
        (slope,) = torch.autograd.grad(output, hidden, create_graph=True)
        return output + slope.square().sum(), (batch[1] != -100).sum()

    optimizer, engine = run(make(), penalized)
    assert engine.fused.disabled_reason is None
    assert difference(optimizer, whole(make(), penalized)) <= EXACT


def test_gradient_inside_loss_is_not_added() -> None:
    def probing(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        loss_sum, items = loss_fn(model, batch)
        weights = [model.shared.weight, model.blocks[0].up.weight]
        with torch.enable_grad():
            found = torch.autograd.grad(loss_fn(model, batch)[0], weights)
        expected = torch.autograd.grad(loss_fn(plain, batch)[0], [plain.shared.weight, plain.blocks[0].up.weight])
        assert all(torch.allclose(one, other, rtol=1e-12) for one, other in zip(found, expected, strict=True))
        return loss_sum, items

    plain = make()
    assert difference(run(make(), probing, num_steps=1)[0], whole(make(), num_steps=1)) <= EXACT


def test_compiled_gradient_inside_loss_is_refused() -> None:
    def probing(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        torch.autograd.grad(loss_fn(model, batch)[0], model.embedding.weight)
        return loss_fn(model, batch)

    model = make()
    compile_blocks(model, "aot_eager")
    with pytest.raises(bigbatch.WindowStateError) as caught:
        run(model, probing, num_steps=1)
    assert str(caught.value) == (
        "loss_fn differentiates compiled layers by itself, and the gradients of their weights would be added to those "
        "of the window: pass fuse_gradients=False."
    )


def test_several_terms_and_nan_and_abandoned_windows() -> None:
    def terms(model: Any, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, Any]]:
        loss_sum, items = loss_fn(model, batch)
        return {"tokens": (loss_sum, items), "rows": (model(batch[0]).square().sum(), len(batch[0]))}

    def count(batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        return {"tokens": (batch[1] != -100).sum().item(), "rows": len(batch[0])}

    expected = whole(make(), terms, count_items=count, num_steps=3)
    optimizer, engine = run(make(), terms, count_items=count, num_steps=1)
    with pytest.raises(bigbatch.WindowAbandonedError):
        engine.step(make_batch(), should_abandon=iter([False, False, True]).__next__)
    engine.step(make_batch())
    engine.loss_fn = lambda model, batch: {n: (s * torch.nan, i) for n, (s, i) in terms(model, batch).items()}
    assert engine.step(make_batch()).skipped is not None
    engine.loss_fn = terms
    engine.step(make_batch())
    assert difference(optimizer, expected) <= EXACT


def test_first_window_check_sees_ordinary_layers() -> None:
    model = make()
    model.blocks.append(nn.Sequential(nn.Dropout(0.5)))
    with pytest.warns(UserWarning, match="Dropout"):
        run(model, check=True, num_steps=1)


def test_foreign_write_is_refused() -> None:
    def clearing(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        model.shared.weight.grad = None
        return loss_fn(model, batch)

    with pytest.raises(bigbatch.WindowStateError, match="the gradients of this window were changed"):
        run(make(), clearing)


def test_frozen_layers_and_adapters_of_peft_are_exact(added: list[Any]) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["up", "down", "shared"], init_lora_weights=False)
        return peft.get_peft_model(make(), config).double()

    def loss_of_base(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return loss_fn(model, batch)

    optimizer, engine = run(adapted(), loss_of_base)
    assert engine.fused.num_layers == 2 * 5  # two small layers for each adapted one
    assert len(added) == 2 * 10 * 4
    assert difference(optimizer, whole(adapted(), loss_of_base)) <= EXACT


def test_optimizer_with_closure_computes_window_again() -> None:
    class Twice(RecordingSGD):
        def step(self, closure: Any) -> None:  # type: ignore[override]
            super().step()
            closure()
            super().step()

    def steps_of(fuse: Any, microbatch: int) -> Twice:
        model = make(torch.float32)
        optimizer = Twice(model.parameters(), lr=0.05)
        engine = bigbatch.Engine(
            model, optimizer, autocast_loss_fn, microbatch=microbatch, fuse_gradients=fuse, noise=False, check=False
        )
        engine.step(make_batch())
        return optimizer

    found, expected = steps_of("copies", 2), steps_of(False, 2)
    assert len(found.seen) == 2
    assert all(torch.equal(a[i], b[i]) for a, b in zip(found.seen, expected.seen, strict=True) for i in a)


def test_copied_engine_fuses_its_own_model() -> None:
    _, engine = run(make(), num_steps=1)
    other = copy.deepcopy(engine)
    before = [parameter.clone() for parameter in engine.model.parameters()]
    other.step(make_batch())
    assert other.fused.num_layers == 8
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))
    assert not torch.equal(other.model.shared.weight, engine.model.shared.weight)


REFUSALS = [
    (nn.LSTM(6, 6), "the model has no linear layer and no embedding that is trained"),
    (nn.Embedding(11, 6, sparse=True), "its max_norm, scale_grad_by_freq or sparse is set"),
    (
        nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(6, 6)),
        "it is a NonDynamicallyQuantizableLinear, and not exactly an nn.Linear",
    ),
]


@pytest.mark.parametrize(("model", "reason"), REFUSALS, ids=["recurrent", "sparse", "subclass"])
def test_nothing_to_fuse_is_refused(model: nn.Module, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        bigbatch.Engine(model, torch.optim.SGD(model.parameters()), loss_fn, fuse_gradients=True)
    assert str(caught.value) == f"fuse_gradients=True can fuse nothing: {reason}; leave it out."


def test_other_value_is_refused() -> None:
    model = make()
    with pytest.raises(InputError) as caught:
        bigbatch.Engine(model, torch.optim.SGD(model.parameters()), loss_fn, fuse_gradients="on")  # type: ignore
    assert str(caught.value) == 'fuse_gradients is \'on\': it must be True, False, "auto", "sums" or "copies".'


def test_auto_fuses_nothing_on_a_cpu() -> None:
    assert (
        run(make(), fuse="auto", num_steps=1)[1].fused.disabled_reason
        == "the model is on cpu, and it pays on CUDA only"
    )


def test_coupled_loss_is_not_fused() -> None:
    model = nn.Linear(4, 2)
    coupled = bigbatch.Coupled(lambda model, batch: model(batch), lambda model, features: features.square().sum())
    with pytest.raises(
        ValueError, match="of a Coupled loss, or with exact batch norms, are not differentiated one by one"
    ):
        bigbatch.Engine(model, torch.optim.SGD(model.parameters()), coupled, microbatch=2, fuse_gradients=True)


def test_resumed_engine_continues_bit_for_bit() -> None:
    def engine_of(model: nn.Module) -> tuple[RecordingSGD, bigbatch.Engine]:
        optimizer = RecordingSGD(model.parameters(), lr=0.05)
        return optimizer, bigbatch.Engine(
            model, optimizer, autocast_loss_fn, microbatch=2, fuse_gradients=True, check=False
        )

    optimizer, engine = engine_of(make(torch.float32))
    for _ in range(11):  # the noise scale is measured in the first nine
        engine.step(make_batch())
    state = copy.deepcopy(engine.state_dict())
    for _ in range(8):
        engine.step(make_batch())
    resumed, other = engine_of(make(torch.float32, num_blocks=2))
    other.load_state_dict(state)
    for _ in range(8):
        other.step(make_batch())
    pairs = zip(optimizer.seen[11:], resumed.seen, strict=True)
    assert all(torch.equal(one[i], found[i]) for one, found in pairs for i in one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_embedding_adds_its_rows(dtype: torch.dtype, padding_idx: int | None) -> None:
    def made() -> Net:
        model = make(dtype)
        model.embedding = nn.Embedding(11, 6, padding_idx=padding_idx, dtype=dtype)
        return model

    expected = whole(made().double(), num_steps=1)
    error = difference(run(made(), num_steps=1)[0], expected)
    assert error <= {torch.float64: EXACT, torch.float32: 1e-6}.get(dtype, 0.05)


def test_embedding_that_is_used_twice_is_exact() -> None:
    def doubled(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        loss_sum, items = loss_fn(model, batch)
        return loss_sum + model.embedding(batch[0][:, :2]).square().sum(), items

    optimizer, engine = run(make(), doubled)
    assert difference(optimizer, whole(make(), doubled)) <= EXACT
    assert engine.fused.reasons == {"embedding": SEVERAL}


def test_tied_weight_that_misses_a_use_is_exact() -> None:
    """The gradient of a head without its embedding is added when the backward has ended."""

    def of_head(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden = torch.ones(len(batch[0]), 6, dtype=torch.float64)
        return model.head(model.shared(hidden)).square().sum(), torch.tensor(len(batch[0]))

    assert difference(run(make(tied=True), of_head)[0], whole(make(tied=True), of_head)) <= EXACT


@pytest.mark.parametrize("tied", [False, True])
def test_functional_call_with_other_weights_is_exact(tied: bool) -> None:
    def scaled_loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        weights = {name: 1.5 * parameter for name, parameter in model.named_parameters()}
        return loss_fn(lambda tokens: torch.func.functional_call(model, weights, (tokens,)), batch)  # type: ignore

    gradients = []
    for fuse in (False, True):
        model = make(tied=tied)
        optimizer = torch.optim.SGD(model.parameters())
        engine = bigbatch.Engine(
            model, optimizer, scaled_loss_fn, microbatch=2, fuse_gradients=fuse, noise=False, check=False
        )
        engine.backward(make_batch())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_model_that_is_copied_within_a_window_has_ordinary_layers() -> None:
    copies: list[nn.Module] = []

    def copying_loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        copies.append(copy.deepcopy(model))
        return loss_fn(model, batch)

    model = make(tied=True)
    optimizer = torch.optim.SGD(model.parameters())
    engine = bigbatch.Engine(
        model, optimizer, copying_loss_fn, microbatch=2, fuse_gradients=True, noise=False, check=False
    )
    engine.step(make_batch())
    for copied in copies:
        assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
        assert not any(name.startswith("_bigbatch") for module in copied.modules() for name in vars(module))


@pytest.mark.parametrize("tied", [False, True])
def test_layer_without_autocast_in_window_with_autocast(tied: bool) -> None:
    def wide_loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            return loss_fn(model, batch)

    gradients = []
    for fuse in (False, True):
        model = make(torch.float32, tied=tied)
        optimizer = torch.optim.SGD(model.parameters())
        engine = bigbatch.Engine(
            model, optimizer, wide_loss_fn, microbatch=2, fuse_gradients=fuse, noise=False, check=False
        )
        with torch.autocast("cpu", torch.bfloat16):
            engine.backward(make_batch())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for expected, found in zip(*gradients, strict=True):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=1e-2)


def test_gradient_inside_backward_is_not_added() -> None:
    gradients = []
    for fuse in (False, True):
        model = make()

        def hooked_loss_fn(net: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            hidden = net.embedding(batch[0])

            def differentiate(gradient: Tensor) -> None:
                with torch.enable_grad():
                    inputs = gradient.detach().requires_grad_()
                    output = net.shared(inputs).square().sum()
                torch.autograd.grad(output, inputs)

            mixed = net.shared(hidden)
            mixed.register_hook(differentiate)  # type: ignore[no-untyped-call]
            return loss_fn(lambda _: net.head(mixed), batch)  # type: ignore[arg-type]

        optimizer = torch.optim.SGD(model.parameters())
        engine = bigbatch.Engine(
            model, optimizer, hooked_loss_fn, microbatch=2, fuse_gradients=fuse, noise=False, check=False
        )
        engine.backward(make_batch())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_cleared_sums_may_be_repeated_after_partial_gradient():
    model = nn.Linear(3, 2)
    with GradientSums(model.parameters()) as sums:
        fused = FusedGradients(model, sums.parameters)
        with fused.window(sums, lambda rows: rows):
            fused.sums.is_partial = True  # as after a failed backward
            assert not sums.can_name_leaves
            sums.clear()
            assert sums.can_name_leaves
