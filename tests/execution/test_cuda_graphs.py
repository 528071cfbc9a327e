"""Micro-batches that are launched as one: the gradients of those that are not, and the host out of the way.

Needs a CUDA device, whose graphs they are; what is refused without one is in tests/test_engine.py.
"""

import copy
import gc
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.execution import cuda_graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream"),  # of torch, once for each process
]
DEVICE = torch.device("cuda")
WIDTH = 16
WITHIN = {torch.float64: 1e-12, torch.float32: 1e-6}


class RecordingSGD(torch.optim.SGD):
    """Plain SGD that keeps the gradients it was given, by parameter; None where there was none."""

    def step(self, closure: None = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.seen = [None if p.grad is None else p.grad.clone() for p in parameters]
        super().step(closure)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 8)).to(DEVICE, dtype)


Batch = tuple[Tensor, Tensor, Tensor]


def masked_loss(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
    inputs, targets, mask = microbatch
    return (F.mse_loss(model(inputs), targets, reduction="none") * mask).sum(), mask.sum()


def masked_batch(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    targets = torch.randn(rows, 8, generator=generator).to(dtype)
    mask = torch.rand(rows, 8, generator=generator) < torch.rand(rows, 1, generator=generator)
    mask[rows // 2] &= rows < 2  # a sample without items
    return inputs, targets, mask


def difference(found: list[Any], expected: list[Any]) -> float:
    """Relative, over all parameters; no gradient is one of zeros."""

    def square(tensor: Any) -> float:
        return 0.0 if tensor is None else float(tensor.detach().double().square().sum())

    total = 0.0
    for a, b in zip(found, expected, strict=True):
        total += square(b if a is None else a if b is None else a - b)
    return (total / sum(map(square, expected))) ** 0.5


class Pair:
    """Two engines over equal models, of which one records."""

    def __init__(self, model: nn.Module, loss_fn: Any = masked_loss, **settings: Any) -> None:
        self.models = [model, copy.deepcopy(model)]
        self.optimizers = [RecordingSGD(each.parameters(), lr=0.05) for each in self.models]
        self.recording, self.plain = (
            bigbatch.Engine(each, optimizer, loss_fn, cuda_graphs=records, **{"microbatch": 4, **settings})
            for each, optimizer, records in zip(self.models, self.optimizers, (True, False), strict=True)
        )
        assert self.recording.runner is not None
        self.recorder = self.recording.runner

    def step(self, batch: Any) -> float:
        """Take an update with both; give how far their gradients are apart, and hold their reports to each other."""
        found, expected = self.recording.step(batch), self.plain.step(batch)
        assert (found.items, found.num_microbatches, found.tokens, found.retries) == (
            expected.items, expected.num_microbatches, expected.tokens, expected.retries
        )  # fmt: skip
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert found.skipped == expected.skipped
        return difference(*(optimizer.seen for optimizer in self.optimizers))


# the same gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [12, 10, 3], ids=["whole", "a partial one", "one partial one"])
def test_captured_windows_have_eager_gradients(dtype: torch.dtype, rows: int) -> None:
    pair = Pair(mlp(dtype), max_grad_norm=0.5)
    for window in range(5):
        assert pair.step(masked_batch(rows, window, dtype)) <= WITHIN[dtype]
        shapes = len({min(4, rows - start) for start in range(0, rows, 4)})
        assert pair.recorder.num_graphs == (0 if window == 0 else shapes)
        assert pair.recorder.disabled_reason is None
    assert difference(*([*model.parameters()] for model in pair.models)) <= 10 * WITHIN[dtype]


def test_captured_gradient_equals_full_batch() -> None:
    pair = Pair(mlp(torch.float64))
    pair.step(masked_batch(11, 0, torch.float64))
    for window in (1, 2):
        batch = masked_batch(11, window, torch.float64)
        model = copy.deepcopy(pair.models[0])
        parameters = list(model.parameters())
        parts = [tuple(tensor[start : start + 4].to(DEVICE) for tensor in batch) for start in (0, 4, 8)]
        loss_sum, items = masked_loss(model, tuple(tensor.to(DEVICE) for tensor in batch))  # type: ignore[arg-type]
        full = torch.autograd.grad(loss_sum / items, parameters)
        means = [loss_sum / items for loss_sum, items in (masked_loss(model, part) for part in parts)]  # type: ignore[arg-type]
        naive = torch.autograd.grad(torch.stack(means).mean(), parameters)
        pair.step(batch)
        assert difference(pair.optimizers[0].seen, list(full)) <= 1e-12
        assert difference(list(naive), list(full)) > 1e-2
    assert pair.recorder.num_graphs == 2


def test_graph_of_one_loss_is_not_replayed_for_another() -> None:
    def squared(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets, mask = microbatch
        return ((model(inputs) - 2 * targets).square() * mask).sum(), mask.sum()

    pair = Pair(mlp(torch.float64))
    for window in range(3):
        pair.step(masked_batch(8, window, torch.float64))
    assert pair.recorder.num_graphs == 1
    for engine in (pair.recording, pair.plain):
        engine.loss_fn = squared
    for window in range(3, 6):
        assert pair.step(masked_batch(8, window, torch.float64)) <= 1e-12
    assert pair.recorder.num_graphs == 2


@pytest.mark.parametrize("fused", [False, True])
def test_captured_autocast_and_adamw_match_eager(fused: bool) -> None:
    def loss_fn(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            outputs = model(microbatch[0])
        errors = F.mse_loss(outputs.float(), microbatch[1], reduction="none") * microbatch[2]
        return errors.sum(), microbatch[2].sum()

    pair = Pair(mlp(), loss_fn)
    for window in range(4):
        assert pair.step(masked_batch(10, window)) <= 1e-4
    assert pair.recorder.num_graphs == 2
    adamw = []
    for records in (True, False):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        adamw.append(bigbatch.Engine(model, optimizer, loss_fn, microbatch=4, cuda_graphs=records))
    for window in range(4):
        found, expected = (engine.step(masked_batch(10, window)) for engine in adamw)
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert difference(*([*engine.model.parameters()] for engine in adamw)) <= 1e-4


def test_shapes_are_captured_separately_and_oldest_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 3)
    pair = Pair(mlp(torch.float64))
    for rows, recordings in ((4, 0), (4, 1), (3, 2), (2, 3), (1, 3), (4, 3), (10, 3), (7, 3)):
        assert pair.step(masked_batch(rows, rows, torch.float64)) <= 1e-12
        assert pair.recorder.num_graphs == recordings
    assert pair.recorder.disabled_reason is None


def test_graph_not_used_for_longest_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    captured = []
    capture = cuda_graphs.capture

    def count(*arguments: Any, **options: Any) -> Any:
        captured.append(True)
        return capture(*arguments, **options)

    monkeypatch.setattr(cuda_graphs, "capture", count)
    pair = Pair(mlp(torch.float64))
    for rows, captures in ((4, 0), (4, 1), (3, 2), (4, 2), (2, 3), (4, 3), (3, 4)):
        assert pair.step(masked_batch(rows, rows, torch.float64)) <= 1e-12
        assert len(captured) == captures


def test_later_graphs_are_captured_while_device_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(mlp(torch.float64))
    for _ in range(2):
        assert pair.step(masked_batch(4, 0, torch.float64)) <= 1e-12
    busy = []
    capture = cuda_graphs.capture

    def note(*arguments: Any, **options: Any) -> Any:
        torch.cuda._sleep(2_000_000_000)  # a second
        graph = capture(*arguments, **options)
        busy.append(not torch.cuda.current_stream().query())
        return graph

    monkeypatch.setattr(cuda_graphs, "capture", note)
    assert pair.step(masked_batch(3, 1, torch.float64)) <= 1e-12
    assert busy == [True]


def test_capture_that_finds_no_memory_is_repeated_without_cached_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(mlp(torch.float64))
    for _ in range(2):
        assert pair.step(masked_batch(4, 0, torch.float64)) <= 1e-12
    tries = []
    capture = cuda_graphs.capture

    def fail_first(run: Any, *arguments: Any, frees_cache: bool, **options: Any) -> Any:
        tries.append(frees_cache)
        if not frees_cache:
            capture(run, *arguments, frees_cache=frees_cache, **options)  # which has added to the sums, but for running
            raise torch.OutOfMemoryError("injected")
        return capture(run, *arguments, frees_cache=frees_cache, **options)

    monkeypatch.setattr(cuda_graphs, "capture", fail_first)
    for seed in range(3):
        assert pair.step(masked_batch(3, seed, torch.float64)) <= 1e-12
    assert tries == [False, True]
    assert pair.recorder.disabled_reason is None


def test_sample_lists_are_captured_by_shape() -> None:
    """Padded to the longest of the micro-batch, under a limit of tokens."""

    class Embedder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.head = nn.Linear(8, 11)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(tokens)))

    def loss_fn(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        labels = tokens.masked_fill(tokens == 0, -100)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return loss, (labels != -100).sum()

    def samples(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 20, (12,), generator=generator).tolist()
        return [torch.randint(1, 11, (length,), generator=generator) for length in lengths]

    torch.manual_seed(0)
    pair = Pair(
        Embedder().to(DEVICE, torch.float64),
        loss_fn,
        microbatch=bigbatch.TokenBudget(40),
        collate=lambda rows: nn.utils.rnn.pad_sequence(rows, batch_first=True),
        lengths=lambda rows: [len(row) for row in rows],
    )
    for window in range(5):
        assert pair.step(samples(window)) <= 1e-12
    assert pair.recorder.disabled_reason is None
    assert pair.recorder.num_graphs > 3


def test_dropout_differs_in_every_microbatch_and_window() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4096))
            self.drop = nn.Dropout(0.5)

        def forward(self, inputs: Tensor) -> Tensor:
            return (self.drop(inputs) * self.weight).sum()

    def loss_fn(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return model(inputs), torch.ones((), device=inputs.device)

    torch.manual_seed(0)
    model = Dropped().to(DEVICE)
    optimizer = RecordingSGD(model.parameters(), lr=0.0)
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=1, cuda_graphs=True, check=False)
    seen = []
    for _ in range(4):
        engine.step(torch.ones(8, 4096))
        (gradient,) = optimizer.seen
        kept = (gradient * 8 / 2).round().long()  # of a weight, in how many of 8 micro-batches
        assert kept.unique().numel() == 9, "the same ones are dropped in all"
        assert abs(float(kept.double().mean()) - 4) < 0.1
        seen.append(kept)
    assert engine.runner is not None
    assert (engine.runner.num_graphs, engine.runner.disabled_reason) == (1, None)
    assert len({tuple(kept.tolist()) for kept in seen}) == 4


def test_evaluation_and_training_are_captured_separately() -> None:
    model = nn.Sequential(mlp(torch.float64), nn.Dropout(0.5))
    pair = Pair(model.eval())
    for window in range(3):
        assert pair.step(masked_batch(8, window, torch.float64)) <= 1e-12
    assert pair.recorder.num_graphs == 1
    for each in pair.models:
        each.train()
    pair.recording.step(masked_batch(8, 3, torch.float64))
    assert pair.recorder.num_graphs == 2
    for each in pair.models:
        each.eval()
    pair.plain.step(masked_batch(8, 3, torch.float64))
    pair.models[1].load_state_dict(pair.models[0].state_dict())
    assert pair.step(masked_batch(8, 4, torch.float64)) <= 1e-12
    assert pair.recorder.num_graphs == 2


def test_unused_parameter_gets_no_gradient() -> None:
    model = mlp(torch.float64)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE)))
    pair = Pair(model)
    for window in range(4):
        assert pair.step(masked_batch(8, window, torch.float64)) <= 1e-12
        assert sum(gradient is None for gradient in pair.optimizers[0].seen) == 1
    assert (pair.recorder.num_graphs, pair.recorder.disabled_reason) == (1, None)


# where the sums are ----------------------------------------------------------------------------------------------


def test_sums_keep_their_address_and_leave_no_residue() -> None:
    pair = Pair(mlp())
    pair.step(masked_batch(8, 0))
    assert pair.recorder.static_buffers is not None
    addresses = {parameter: total.data_ptr() for parameter, total in pair.recorder.static_buffers.items()}
    assert addresses.keys() == set(pair.models[0].parameters())
    for window in range(1, 4):
        pair.step(masked_batch(8, window))
        assert {parameter: total.data_ptr() for parameter, total in pair.recorder.static_buffers.items()} == addresses
        assert all(parameter.grad is None for parameter in pair.models[0].parameters())


def test_foreign_gradients_between_windows_change_nothing() -> None:
    pair = Pair(mlp())
    for window in range(4):
        assert pair.step(masked_batch(8, window)) <= 1e-6
        for model in pair.models:
            masked_loss(model, tuple(tensor.to(DEVICE) for tensor in masked_batch(8, 9)))[0].backward()  # type: ignore[arg-type]


def reserved_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_released_graphs_are_freed_and_captured_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 8192), nn.Tanh(), nn.Linear(8192, 8)).to(DEVICE)
    optimizer = RecordingSGD(model.parameters(), lr=0.0)
    engine = bigbatch.Engine(model, optimizer, masked_loss, microbatch=4096, cuda_graphs=True)
    batch = masked_batch(4096)
    engine.step(batch)
    first = optimizer.seen
    engine.release_cuda_graphs()
    before = reserved_bytes()
    engine.step(batch)
    assert engine.runner is not None
    assert engine.runner.num_graphs == 1
    recorded = reserved_bytes() - before
    assert recorded >= 4096 * 8192 * 4, "activations stay with the recording"
    engine.release_cuda_graphs()
    assert engine.runner.num_graphs == 0
    assert reserved_bytes() - before <= recorded // 2, "but for workspaces of libraries"
    engine.step(batch)
    assert engine.runner.num_graphs == 1
    assert difference(optimizer.seen, first) <= 1e-6


def test_copied_engine_captures_its_own_model() -> None:
    pair = Pair(mlp())
    for window in range(2):
        pair.step(masked_batch(8, window))
    other = copy.deepcopy(pair.recording)
    assert other.runner is not None
    assert (other.runner.num_graphs, other.runner.static_buffers) == (0, None)
    before = [parameter.detach().clone() for parameter in pair.models[0].parameters()]
    for window in range(3):
        other.step(masked_batch(8, window))
    assert other.runner.num_graphs == 1
    assert all(torch.equal(a, b) for a, b in zip(before, pair.models[0].parameters(), strict=True))
    assert pair.step(masked_batch(8, 5)) <= 1e-6


# what is trained changes -----------------------------------------------------------------------------------------


def bias_of(model: nn.Module) -> nn.Parameter:
    found = model[2].bias  # type: ignore[index]
    assert isinstance(found, nn.Parameter)
    return found


def test_parameter_frozen_during_run_gets_no_gradient() -> None:
    pair = Pair(mlp(torch.float64))
    for window in range(3):
        pair.step(masked_batch(8, window, torch.float64))
    for model in pair.models:
        bias_of(model).requires_grad_(False)
    for window in range(3, 6):
        assert pair.step(masked_batch(8, window, torch.float64)) <= 1e-12
        assert pair.optimizers[0].seen[-1] is None
    assert (pair.recorder.num_graphs, pair.recorder.disabled_reason) == (1, None)


def test_parameter_unfrozen_during_run_gets_its_gradient() -> None:
    model = mlp(torch.float64)
    bias_of(model).requires_grad_(False)
    pair = Pair(model)
    for window in range(3):
        pair.step(masked_batch(8, window, torch.float64))
        assert pair.optimizers[0].seen[-1] is None
    for each in pair.models:
        bias_of(each).requires_grad_(True)
    for window in range(3, 6):
        assert pair.step(masked_batch(8, window, torch.float64)) <= 1e-12
        assert pair.optimizers[0].seen[-1].any()


class TwoHeads(nn.Module):
    """Which head is used comes with the micro-batch, as a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(WIDTH, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, inputs: Tensor, head: int) -> Tensor:
        return self.heads[head](torch.tanh(self.trunk(inputs)))


def test_microbatch_with_other_parameters_runs_eagerly() -> None:
    def loss_fn(model: nn.Module, microbatch: tuple[Tensor, Tensor, Tensor, int]) -> tuple[Tensor, Tensor]:
        inputs, targets, mask, head = microbatch
        return (F.mse_loss(model(inputs, head), targets, reduction="none") * mask).sum(), mask.sum()

    def samples(head: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor, int]]:
        return [(*sample, head) for sample in zip(*masked_batch(8, seed, torch.float64), strict=True)]

    def collate(rows: Sequence[tuple[Tensor, Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, Tensor, int]:
        inputs, targets, masks, heads = zip(*rows, strict=True)
        return torch.stack(inputs), torch.stack(targets), torch.stack(masks), heads[0]

    junk = [torch.full((2**22,), torch.nan, device=DEVICE) for _ in range(8)]
    del junk  # what is allocated while recording, and never written, need not be zero by chance
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    pair = Pair(TwoHeads().to(DEVICE, torch.float64), loss_fn, collate=collate)
    for window, head in enumerate((0, 0, 0, 1, 0, 1)):
        assert pair.step(samples(head, window)) <= 1e-12
    assert pair.recorder.disabled_reason == "micro-batches reach different parameters"


# what cannot be recorded -----------------------------------------------------------------------------------------


def reads_a_value(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
    loss_sum, items = masked_loss(model, microbatch)
    return (loss_sum * 2 if loss_sum.item() > 1e9 else loss_sum), items


def counts_on_the_host(model: nn.Module, microbatch: Batch) -> tuple[Tensor, int]:
    loss_sum, items = masked_loss(model, microbatch)
    return loss_sum, 3 * len(microbatch[0]) + 0 * int(items.numel())


def fails_after_backward_began(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
    """Reads a value where the first gradient is made, when some sums have had their share already."""
    inputs, targets, mask = microbatch
    hidden = model[0](inputs)  # type: ignore[index]
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient * (2 if gradient.sum().item() > 1e9 else 1))
    outputs = model[2](model[1](hidden))  # type: ignore[index]
    return (F.mse_loss(outputs, targets, reduction="none") * mask).sum(), mask.sum()


REFUSED: dict[str, tuple[Callable[..., Any], str | None]] = {
    "a value that is read": (reads_a_value, None),
    "a value that is read in backward": (fails_after_backward_began, None),
    "a count on the host": (
        counts_on_the_host, "the loss has several terms, or items that are no tensor on the device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_uncapturable_model_runs_eagerly_and_counts_once(why: str) -> None:
    loss_fn, said = REFUSED[why]
    pair = Pair(mlp(torch.float64), loss_fn)
    for window in range(4):
        assert pair.step(masked_batch(10, window, torch.float64)) <= 1e-12
    assert pair.recorder.num_graphs == 0
    assert not pair.recorder.is_ready
    assert pair.recorder.disabled_reason
    assert "\n" not in pair.recorder.disabled_reason
    assert said is None or pair.recorder.disabled_reason == said


def test_random_numbers_are_drawn_after_failed_capture() -> None:
    def loss_fn(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets, mask = microbatch
        noisy = inputs + 1e-3 * torch.randn_like(inputs)
        return reads_a_value(model, (noisy, targets, mask))

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=4, cuda_graphs=True, check=False)
    for window in range(3):
        engine.step(masked_batch(8, window))
    assert engine.runner.disabled_reason
    assert nn.Dropout(0.5)(torch.ones(1000, device=DEVICE)).unique().tolist() == [0.0, 2.0]


@pytest.mark.parametrize("loss_fn", [reads_a_value, fails_after_backward_began])
def test_memory_is_released_after_failed_capture(loss_fn: Callable[..., Any]) -> None:
    pair = Pair(mlp(torch.float64), loss_fn)
    for window in range(3):
        pair.step(masked_batch(10, window, torch.float64))
    assert pair.recorder.disabled_reason
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before


def test_multi_term_losses_run_eagerly() -> None:
    def loss_fn(model: nn.Module, microbatch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        loss_sum, items = masked_loss(model, microbatch)
        return {"one": (loss_sum, items), "other": (0.5 * loss_sum, items)}

    def count_items(batch: Batch) -> dict[str, Tensor]:
        return {"one": batch[2].sum(), "other": batch[2].sum()}

    pair = Pair(mlp(torch.float64), loss_fn, count_items=count_items)
    for window in range(3):
        assert pair.step(masked_batch(10, window, torch.float64)) <= 1e-12
    assert pair.recorder.num_graphs == 0


def test_bfloat16_weights_run_eagerly() -> None:
    pair = Pair(mlp(torch.bfloat16))
    for window in range(3):
        assert pair.step(masked_batch(10, window, torch.bfloat16)) <= 1e-6
    assert pair.recorder.disabled_reason == "gradients are sparse, or of parameters in bfloat16 or float16"
    assert pair.recorder.num_graphs == 0


def test_gradient_scaler_disables_capture() -> None:
    def loss_fn(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            return masked_loss(model, microbatch)

    model = mlp()
    optimizer = RecordingSGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(DEVICE.type)
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=4, scaler=scaler, cuda_graphs=True)
    for window in range(3):
        assert engine.step(masked_batch(10, window)).skipped is None
    assert engine.runner is not None
    assert engine.runner.num_graphs == 0


def test_injected_oom_during_capture_counts_once() -> None:
    times = [0]

    def loss_fn(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
        if torch.cuda.is_current_stream_capturing():
            times[0] += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")
        return masked_loss(model, microbatch)

    pair = Pair(mlp(torch.float64), loss_fn)
    for window in range(4):
        assert pair.step(masked_batch(10, window, torch.float64)) <= 1e-12
    assert times == [1], "not tried again"
    assert pair.recorder.disabled_reason == "memory ran out"
    assert pair.recorder.num_graphs == 0


def test_real_oom_during_capture_falls_back() -> None:
    def loss_fn(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
        return masked_loss(model, microbatch)

    pair = Pair(mlp(torch.float64), loss_fn)
    for window in range(4):
        assert pair.step(masked_batch(10, window, torch.float64)) <= 1e-12
    assert pair.recorder.disabled_reason
    assert pair.recorder.num_graphs == 0
    assert torch.ones(3, device=DEVICE).sum().item() == 3, "the device is well"


def test_oom_in_first_window_delays_capture_by_one() -> None:
    failing = [True]

    def loss_fn(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
        if failing[0]:
            failing[0] = False
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")
        return masked_loss(model, microbatch)

    model = mlp(torch.float64)
    engine = bigbatch.Engine(model, RecordingSGD(model.parameters(), lr=0.0), loss_fn, microbatch=4, cuda_graphs=True)
    recordings = []
    for window in range(3):
        assert engine.step(masked_batch(8, window, torch.float64)).retries == (window == 0)
        recordings.append(engine.runner.num_graphs)  # type: ignore[union-attr]
    assert recordings == [0, 0, 2]  # a size of 3 since the failure: 3, 3 and 2 samples


def test_oom_beside_graphs_frees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []  # graphs in each attempt that is not replayed, and not captured

    def loss_fn(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
        if eager and not torch.cuda.is_current_stream_capturing():
            found.append(pair.recorder.num_graphs)  # type: ignore[attr-defined]
            if len(found) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")
        return masked_loss(model, microbatch)

    eager = False
    model = mlp(torch.float64)
    pair = Pair(model, loss_fn)
    for window in range(2):
        pair.step(masked_batch(8, window, torch.float64))
    expected = copy.deepcopy(pair.models[1])
    optimizer = RecordingSGD(expected.parameters(), lr=0.05)
    bigbatch.Engine(expected, optimizer, masked_loss, microbatch=4).step(masked_batch(8, 2, torch.float64))
    monkeypatch.setattr(pair.recorder, "_replay", lambda *_: False)
    eager = True
    assert pair.recording.step(masked_batch(8, 2, torch.float64)).retries == 1
    assert difference(pair.optimizers[0].seen, optimizer.seen) <= 1e-12
    assert found == [1, 0, 0]


def test_loss_error_in_captured_window_leaves_next_exact() -> None:
    failing = [False]

    def loss_fn(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
        if failing[0]:
            raise KeyError("of the user's own")
        return masked_loss(model, microbatch)

    pair = Pair(mlp(torch.float64), loss_fn)
    for window in range(3):
        pair.step(masked_batch(8, window, torch.float64))
    failing[0] = True
    pair.recording.step(masked_batch(8, 2, torch.float64))  # its shape is recorded: the loss is not called
    failing[0] = False
    pair.plain.step(masked_batch(8, 2, torch.float64))
    failing[0] = True
    with pytest.raises(KeyError):
        pair.recording.step(masked_batch(7, 3, torch.float64))
    failing[0] = False
    assert pair.step(masked_batch(7, 4, torch.float64)) <= 1e-12


# the host --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_replayed_microbatch_waits_for_device() -> None:
    """As many waits for 4 micro-batches as for 32: those of the update."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine = bigbatch.Engine(model, optimizer, masked_loss, microbatch=4, max_grad_norm=1.0, cuda_graphs=True)
    batches = {rows: tuple(tensor.to(DEVICE) for tensor in masked_batch(rows)) for rows in (16, 128)}
    for _ in range(2):
        engine.step(batches[16])
    assert engine.runner is not None
    assert engine.runner.num_graphs == 1
    counts = []
    before = torch.cuda.get_sync_debug_mode()
    for rows in (16, 128):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                report = engine.step(batches[rows])
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert report.num_microbatches == rows // 4
        counts.append(len([wait for wait in waits if "synchroniz" in str(wait.message)]))
    assert counts[0] == counts[1] <= 3
    assert engine.runner.num_graphs == 1


def test_peak_memory_does_not_grow_with_captured_microbatches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 2048), nn.Tanh(), nn.Linear(2048, 256)).to(DEVICE)

    def loss_fn(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return model(inputs).square().sum(), torch.full((), inputs.numel(), device=inputs.device)

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=512, cuda_graphs=True)
    for _ in range(2):
        engine.step(torch.randn(1024, 256))
    assert engine.runner is not None
    assert engine.runner.num_graphs == 1
    peaks = []
    for num_microbatches in (2, 64):
        torch.cuda.reset_peak_memory_stats()
        engine.step(torch.randn(512 * num_microbatches, 256))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] / peaks[0] <= 1.01


def test_auto_microbatch_is_timed_and_run_captured() -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine = bigbatch.Engine(model, optimizer, masked_loss, memory="2GiB", cuda_graphs=True)
    for window in range(3):
        assert engine.step(masked_batch(64, window)).skipped is None
    assert engine.runner is not None
    assert engine.runner.disabled_reason is None
    assert engine.runner.num_graphs >= 1
