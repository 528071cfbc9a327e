"""The language-modelling loss: a sum over the labels, equal to what transformers computes as a mean."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bigbatch.lm.data.dataset import IGNORED, collate
from bigbatch.lm.device import resolve_device
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
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
