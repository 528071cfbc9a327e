"""The fastest loops: rows of equal size, the gradient of the whole batch where documents stay whole, and operations."""

import dataclasses
import importlib.util
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bigbatch.lm.bench import benchmark, torchtitan_runner
from bigbatch.lm.bench.benchmark import run_benchmark
from bigbatch.lm.bench.entries import read_entry
from bigbatch.lm.bench.flops import matrix_rate, update_flops
from bigbatch.lm.bench.hand_written import HandWrittenRunner
from bigbatch.lm.bench.meter import GradientMeter, reference_gradient
from bigbatch.lm.bench.packed_loop import PackedLoop
from bigbatch.lm.bench.rows import Rows, fill_rows, pack_documents
from bigbatch.lm.bench.shared_model import SharedModel
from bigbatch.lm.bench.torchtitan_runner import TorchtitanRunner
from bigbatch.lm.bench.workload import W, Workload, count_tokens, shift
from support.language_models import TINY_WORKLOAD

SAME = 1 - 1e-6
TINY_LORA = dataclasses.replace(TINY_WORKLOAD, lora_rank=2, precision="bf16")


# rows ------------------------------------------------------------------------------------------------------------


def parts(rows: Rows) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of every part that is not empty."""
    ids, labels, ends = rows.ids.flatten().tolist(), rows.labels.flatten().tolist(), rows.offsets.tolist()
    return [(ids[a:b], labels[a:b]) for a, b in pairwise(ends) if a < b]


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_packed_documents_are_whole_and_rows_equal(rows: int) -> None:
    samples = W.make_samples()
    packed = pack_documents(samples, rows=rows, longest=2_048)
    assert len(packed) == -(-92_493 // (rows * 2_048))
    assert {(tuple(each.ids.shape), len(each.offsets)) for each in packed} == {
        (tuple(packed[0].ids.shape), len(packed[0].offsets))
    }
    found = sorted(part for each in packed for part in parts(each) if any(label >= 0 for label in part[1]))
    assert found == sorted((s["input_ids"].tolist(), s["labels"].tolist()) for s in shift(samples))
    assert sum(each.ids.numel() for each in packed) < 1.02 * 92_493
    for each in packed:
        assert each.offsets[-1] == each.ids.numel()
        starts = each.offsets[:-1][each.offsets.diff() > 0]
        assert not each.positions.flatten()[starts.long()].any()


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_full_rows_hold_stream_without_gaps(rows: int) -> None:
    samples = W.make_samples()
    filled = fill_rows(samples, rows=rows, longest=2_048)
    ids, labels = (torch.cat([getattr(each, name).flatten() for each in filled]) for name in ("ids", "labels"))
    shifted = shift(samples)
    assert torch.equal(ids[:92_493], torch.cat([sample["input_ids"] for sample in shifted]))
    assert torch.equal(labels[:92_493], torch.cat([sample["labels"] for sample in shifted]))
    assert (labels[92_493:] == -100).all()
    assert {tuple(each.ids.shape) for each in filled} == {(rows, filled[0].ids.shape[1])}
    assert filled[0].ids.shape[1] <= 2_048
    assert len(ids) - 92_493 < 8 * len(filled) * rows
    starts = {
        offset + index * filled[0].ids.numel() for index, each in enumerate(filled) for offset in each.offsets.tolist()
    }
    ends = torch.tensor([len(sample["input_ids"]) for sample in samples]).cumsum(0).tolist()
    assert starts == {*ends, *range(0, len(ids) + 1, filled[0].ids.shape[1])}


# gradients -------------------------------------------------------------------------------------------------------


def cosine_of(contestant: PackedLoop, workload: Workload) -> float:
    stage = SharedModel(workload, None)
    cosines = []
    for reference in [reference_gradient(stage)] * 2:  # a later turn, after the memory of the first was freed
        meter = GradientMeter(stage, reference)
        with stage.isolated():
            contestant.turn(stage, meter)
            steps = {int(state["step"]) for state in stage.optimizer.state.values()}
        assert steps == {1}
        assert meter.similarity is not None
        cosines.append(meter.similarity.cosine)
        assert meter.similarity.norm_ratio == pytest.approx(1, abs=0.3)
    assert cosines[0] == cosines[1]
    return cosines[0]


@pytest.mark.parametrize("samples", [1, 4])
def test_hand_written_loop_has_gradient_of_whole_batch(samples: int) -> None:
    assert cosine_of(HandWrittenRunner(samples), TINY_WORKLOAD) > SAME


def test_hand_written_loop_trains_adapters_in_bfloat16() -> None:
    assert 0.999 < cosine_of(HandWrittenRunner(1), TINY_LORA) < SAME


def test_full_rows_attend_across_documents() -> None:
    crossed = cosine_of(HandWrittenRunner(1, attention="sdpa"), TINY_WORKLOAD)
    assert 0.5 < crossed < 0.99
    one_document = dataclasses.replace(TINY_WORKLOAD, sequences=1, mean=5.0)
    assert cosine_of(HandWrittenRunner(1, attention="sdpa"), one_document) > SAME


def test_copies_of_weights_are_freed_between_turns() -> None:
    contestant = HandWrittenRunner(1)
    cosine_of(contestant, TINY_WORKLOAD)
    assert contestant._copies
    assert all(copy.numel() == 0 and copy.grad is None for _, copy in contestant._copies)
    assert contestant.notes == ["2 micro-batches of 64 tokens, of which 7 are padding"]


def problem_of(name: str, workload: Workload) -> str | None:
    entry = read_entry(name)
    return run_benchmark(workload, [entry], memory=None, rounds=1, progress=lambda *_, **__: None).rows[0].problem


def test_torchtitan_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "missing", lambda _: None)
    monkeypatch.setattr(torchtitan_runner, "version", lambda _: "0.3.0")
    assert problem_of("torchtitan", TINY_LORA) == "it has no adapters for this model"
    assert problem_of("torchtitan-varlen", TINY_WORKLOAD) == "its attention within documents needs CUDA"
    assert problem_of("torchtitan", TINY_WORKLOAD) == (
        "torchtitan 0.3.0 is not supported: pip install torchtitan==0.2.2"
    )


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed")
def test_torchtitan_computes_what_hand_written_rows_do() -> None:
    theirs, by_hand = TorchtitanRunner(1), HandWrittenRunner(1, attention="sdpa")
    assert cosine_of(theirs, TINY_WORKLOAD) == pytest.approx(cosine_of(by_hand, TINY_WORKLOAD), abs=1e-6)


# operations ------------------------------------------------------------------------------------------------------


def test_operations_equal_those_of_documents_one_by_one() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    stage = SharedModel(TINY_WORKLOAD, None)
    counted = attention = 0.0
    for sample in stage.samples:
        with FlopCounterMode(display=False) as counter:
            ids = sample["input_ids"][None]
            logits: Tensor = stage.model(input_ids=ids, use_cache=False).logits
            logits.sum().backward()  # type: ignore[no-untyped-call]
        counted += counter.get_total_flops()
        attention += 12 * 2 * 32 * ids.numel() ** 2  # not causal: all pairs
    expected = update_flops(stage.model, stage.samples)
    pairs = sum(len(sample["input_ids"]) * (len(sample["input_ids"]) + 1) // 2 for sample in stage.samples)
    by_weights = expected - 12 * 2 * 32 * pairs
    assert by_weights == 6 * count_tokens(stage.samples) * sum(p.numel() for p in stage.parameters if p.ndim == 2)
    assert counted - attention == pytest.approx(by_weights, rel=0.25)


def test_frozen_weights_and_looked_up_embeddings_cost_less() -> None:
    stage = SharedModel(TINY_LORA, None)
    tokens = count_tokens(stage.samples)
    frozen = sum(p.numel() for p in stage.model.parameters() if p.ndim == 2 and not p.requires_grad)
    trained = sum(p.numel() for p in stage.parameters)
    one_token = [{"input_ids": torch.zeros(1, dtype=torch.int64)}]
    attention = 12 * 2 * 32
    assert update_flops(stage.model, one_token) == 4 * frozen + 6 * trained + attention
    untied = dataclasses.replace(TINY_LORA, model={**TINY_LORA.model, "tie_word_embeddings": False})
    assert update_flops(SharedModel(untied, None).model, one_token) == update_flops(stage.model, one_token)
    assert tokens > 1


def test_matrix_rate_is_known_for_measured_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert matrix_rate(torch.device("cuda", 0), "bf16") == 790e12
    assert matrix_rate(torch.device("cuda", 0), "float32") is None
    assert matrix_rate(torch.device("cpu"), "bf16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert matrix_rate(torch.device("cuda", 0), "bf16") is None
