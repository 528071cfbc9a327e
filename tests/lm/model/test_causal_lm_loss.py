"""The language-modelling loss: a sum over the labels, equal to what transformers computes as a mean."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bigbatch
from bigbatch.lm.data.dataset import IGNORED, collate
from bigbatch.lm.device import resolve_device
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss
from bigbatch.lm.model.packed_rows import pack_row
from support.language_models import save_model_folder


def sample(length: int, masked: int, seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 200, (length + 1,), generator=torch.Generator().manual_seed(seed))
    labels = tokens[1:].clone()
    labels[:masked] = IGNORED
    return {"input_ids": tokens[:-1], "labels": labels}


def test_sum_equals_transformers_mean_times_count(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model_folder(tmp_path)).double().eval()
    samples = [sample(9, 2, 0), sample(4, 0, 1), sample(12, 11, 2)]
    loss_sum, items = CausalLMLoss(resolve_device("cpu", "float64"))(model, collate(samples, pad_id=0))
    assert items == 7 + 4 + 1
    shifted = torch.full((3, 13), IGNORED)
    padded = torch.zeros(3, 13, dtype=torch.int64)
    for row, part in enumerate(samples):
        shifted[row, 1 : len(part["labels"]) + 1] = part["labels"]
        padded[row, : len(part["input_ids"])] = part["input_ids"]
    theirs = model(input_ids=padded, labels=shifted).loss
    assert torch.allclose(loss_sum.float(), theirs * 12, rtol=1e-5)


def test_padding_and_masked_tokens_add_nothing(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model_folder(tmp_path)).double().eval()
    loss_fn = CausalLMLoss(resolve_device("cpu", "float64"))
    short, long, masked = sample(3, 0, 0), sample(30, 0, 1), sample(5, 5, 2)
    alone = [loss_fn(model, collate([part], pad_id=0)) for part in (short, long)]
    together = loss_fn(model, collate([short, long, masked], pad_id=7))
    assert torch.allclose(together[0], alone[0][0] + alone[1][0], rtol=1e-12)
    assert together[1] == 33


@pytest.mark.parametrize("kind", [CausalLMLoss, ChunkedCausalLMLoss])
def test_weights_multiply_losses_and_count_as_items(kind: type, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model_folder(tmp_path)).double().eval()
    loss_fn = kind(resolve_device("cpu", "float64"))
    parts = [sample(length, length - 1, seed) for seed, length in enumerate((9, 4, 6))]  # one label each
    losses = [loss_fn(model, collate([part], pad_id=0))[0] for part in parts]
    weighted = [
        part | {"weights": (part["labels"] != IGNORED) * torch.tensor(weight)}
        for part, weight in zip(parts[:2], (0.5, 3.0), strict=True)
    ]
    loss_sum, items = loss_fn(model, collate([*weighted, parts[2]], pad_id=0))
    assert torch.allclose(loss_sum, 0.5 * losses[0] + 3 * losses[1] + losses[2], rtol=1e-12)
    assert items == 4.5


def test_padded_and_packed_rows_hold_weights() -> None:
    plain, weighted = sample(2, 0, 0), sample(3, 1, 1) | {"weights": torch.tensor([0.0, 0.5, 0.5])}
    assert collate([plain, weighted], pad_id=0)["weights"].tolist() == [[1, 1, 0], [0, 0.5, 0.5]]
    row = pack_row([plain, weighted], pad_id=0, longest=3)["weights"]
    assert row[0, :5].tolist() == [1, 1, 0, 0.5, 0.5]
    assert not row[0, 5:].any()
    assert row.shape == pack_row([plain, weighted], pad_id=0, longest=3)["labels"].shape
    for pack in (collate([plain], pad_id=0), pack_row([plain], pad_id=0, longest=3)):
        assert "weights" not in pack


@pytest.mark.parametrize("microbatch", [1, 2, 3, 8])
def test_weighted_update_is_that_of_whole_batch(microbatch: int, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model_folder(tmp_path)).double().eval()
    loss_fn = CausalLMLoss(resolve_device("cpu", "float64"))
    parts = [sample(3 + seed, seed, seed) for seed in range(8)]
    parts = [part | {"weights": (part["labels"] != IGNORED) * (0.1 + i)} for i, part in enumerate(parts)]
    loss_sum, items = loss_fn(model, collate(parts, pad_id=0))
    expected = torch.autograd.grad(loss_sum / items, list(model.parameters()))
    engine = bigbatch.Engine(
        model, None, loss_fn, microbatch=microbatch, collate=lambda rows: collate(rows, pad_id=0), noise=False
    )
    report = engine.backward(parts)
    assert report.items == pytest.approx(items.item(), rel=1e-14)  # in float32 the sum of the weights is rounded
    found = torch.nn.utils.get_total_norm([p.grad - g for p, g in zip(model.parameters(), expected, strict=True)])
    assert found <= 1e-6 * torch.nn.utils.get_total_norm(expected)  # norms are computed in float32
