"""The tokens of a chunk of logits follow the memory of the run, and predictions follow the chunk."""

import pytest
import torch
from torch import nn

from bigbatch.autotune.peak_prediction import PeakPredictor
from bigbatch.lm.bench.workload import W_SMALL, W
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model import setup
from bigbatch.lm.model.chunk_size import CHUNK_SHARE, LOGIT_BYTES, chunk_tokens_of, largest_chunk
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss, LmHead
from bigbatch.memory.limit import GIB

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
QWEN = LmHead(nn.Linear(8, 151_936, bias=False, device="meta"))


def config(**settings: object) -> TrainConfig:
    return TrainConfig(model="w", max_length=64, **settings).resolved()


@pytest.mark.parametrize(
    ("limit_gib", "vocabulary", "tokens"),
    [
        (0, 151_936, 1_024),
        (24, 151_936, 1_024),
        (40, 151_936, 2_048),
        (80, 151_936, 4_096),
        (139, 151_936, 4_096),
        (24, 32_000, 4_096),
        (24, 262_144, 1_024),
    ],
)
def test_chunk_takes_sixteenth_of_memory(limit_gib: int, vocabulary: int, tokens: int) -> None:
    assert largest_chunk(limit_gib * GIB, vocabulary=vocabulary) == tokens
    taken = CHUNK_SHARE * LOGIT_BYTES["auto"] * vocabulary * tokens
    assert tokens == 1_024 or taken <= limit_gib * GIB
    assert tokens == 4_096 or 2 * taken > limit_gib * GIB


@pytest.mark.parametrize(("name", "value"), [("memory", "80GiB"), ("gpu", "h200")])
def test_limit_of_run_decides_on_cuda_alone(name: str, value: str) -> None:
    assert chunk_tokens_of(QWEN, config(**{name: value}), CUDA) == 4_096
    assert chunk_tokens_of(QWEN, config(**{name: value}), CPU) == 1_024
    assert chunk_tokens_of(None, config(**{name: value}), CUDA) == 1_024
    assert chunk_tokens_of(QWEN, config(**{name: value}, reproducible=True), CUDA) == 1_024


def test_narrow_logits_have_larger_chunks() -> None:
    assert chunk_tokens_of(QWEN, config(memory="40GiB"), CUDA) == 2_048
    assert chunk_tokens_of(QWEN, config(memory="40GiB", logits="bf16"), CUDA) == 4_096


def test_share_of_unknown_card_keeps_smallest_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chunk_tokens_of(QWEN, config(memory="80%"), CUDA) == 1_024
    assert chunk_tokens_of(QWEN, config(), CUDA) == 1_024


def peak_bytes(settings: dict[str, object]) -> int:
    """Predict a micro-batch of W on a card of its own, as `bigbatch plan` does."""
    model = W.make_model("meta", num_hidden_layers=1)
    spec = DeviceSpec(CPU, "bf16")  # the proxy
    outline = setup.outline_model(model, config(**settings), spec, target=CUDA, longest=2_048, max_length=2_048)
    assert isinstance(outline.loss_fn, ChunkedCausalLMLoss)
    predictor = PeakPredictor.from_training(outline.model, None, outline.loss_fn, device=CUDA)
    row = torch.empty(1, 8_192, dtype=torch.int64, device="meta")
    offsets = torch.empty(65, dtype=torch.int32, device="meta")
    return predictor.predict({"input_ids": row, "labels": row, "position_ids": row, "offsets": offsets}).peak_bytes


def test_prediction_has_chunk_that_memory_allows() -> None:
    small, large = peak_bytes({"memory": "24GiB"}), peak_bytes({"memory": "80GiB"})
    added = LOGIT_BYTES["auto"] * 151_936 * (4_096 - 1_024)
    assert added <= large - small <= 1.5 * added


def test_setup_passes_chunk_to_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "chunk_tokens_of", lambda *_: 16)
    model = W_SMALL.make_model("cpu", vocab_size=16_384, num_hidden_layers=1)
    plain = TrainConfig(model="w", max_length=64, compile="none").resolved()
    run = setup.set_up_model(model, plain, DeviceSpec(CPU, "float32"), pad_id=0, longest=64)
    assert isinstance(run.loss_fn, ChunkedCausalLMLoss)
    assert run.loss_fn._chunk_tokens == 16
