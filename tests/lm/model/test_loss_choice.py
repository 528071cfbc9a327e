"""Which loss a language model gets, and in which precision its logits are."""

from functools import partial

import pytest
import torch
from torch import Tensor

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model import chunked_loss
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss
from bigbatch.lm.model.loss_choice import make_loss_fn
from bigbatch.lm.model.setup import outline_model, set_up_model

CPU = torch.device("cpu")
LONGEST = 16


def large_vocabulary() -> object:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20_000, max_position_embeddings=LONGEST))


@pytest.mark.parametrize(("logits", "is_narrow"), [("auto", False), ("bf16", True)])
def test_precision_of_logits_reaches_the_product(monkeypatch: pytest.MonkeyPatch, logits: str, is_narrow: bool) -> None:
    """Through the whole setup of a model, to `linear_cross_entropy`."""
    found: list[bool] = []
    original = chunked_loss.linear_cross_entropy

    def recording(*arguments: Tensor, narrow_logits: bool, **options: object) -> Tensor:
        found.append(narrow_logits)
        return original(*arguments, narrow_logits=narrow_logits, **options)  # type: ignore[arg-type]

    config = TrainConfig(logits=logits, precision="bf16", max_length=LONGEST).resolved()
    setup = set_up_model(large_vocabulary(), config, DeviceSpec(CPU, "bf16"), pad_id=0, longest=LONGEST)
    assert isinstance(setup.loss_fn, ChunkedCausalLMLoss)
    monkeypatch.setattr(chunked_loss, "linear_cross_entropy", recording)
    tokens = torch.arange(8)
    loss_sum, items = setup.loss_fn(setup.model, setup.collate([{"input_ids": tokens, "labels": tokens}]))
    assert found == [is_narrow]
    assert loss_sum.dtype is torch.float32
    assert int(items) == 8


def test_products_of_a_cpu_have_narrow_logits_anyway() -> None:
    """No product of two bfloat16 matrices has a float32 result there: both settings have the same bits."""
    losses = []
    for logits in ("auto", "bf16"):
        config = TrainConfig(logits=logits, precision="bf16", max_length=LONGEST).resolved()
        setup = set_up_model(large_vocabulary(), config, DeviceSpec(CPU, "bf16"), pad_id=0, longest=LONGEST)
        tokens = torch.arange(8)
        losses.append(setup.loss_fn(setup.model, setup.collate([{"input_ids": tokens, "labels": tokens}]))[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize("precision", ["float32", "float64", "fp16"])
@pytest.mark.parametrize("planned", [False, True])
def test_narrow_logits_need_narrow_products(precision: str, planned: bool) -> None:
    config = TrainConfig(logits="bf16", max_length=LONGEST).resolved()
    spec = DeviceSpec(CPU, precision)
    make = partial(outline_model, target=CPU, max_length=LONGEST) if planned else partial(set_up_model, pad_id=0)
    with pytest.raises(InputError) as caught:
        make(large_vocabulary(), config, spec, longest=LONGEST)
    needs = "--logits bf16 needs --precision bf16, bf16-weights or fp8"
    assert str(caught.value) == f"{needs}, and this run is in {precision}."


def test_small_vocabularies_have_all_logits_at_once() -> None:
    spec = DeviceSpec(CPU, "bf16-weights")
    for logits in ("auto", "bf16"):
        config = TrainConfig(logits=logits).resolved()
        loss_fn = make_loss_fn(config, spec, chunk_tokens=None, needs_mask=True, longest=LONGEST)
        assert isinstance(loss_fn, CausalLMLoss)


@pytest.mark.parametrize("objective", ["dpo", "reward", "embedding"])
def test_other_objectives_have_no_use_for_it(objective: str) -> None:
    with pytest.raises(ValueError, match=f"logits does nothing with objective {objective}: remove it"):
        TrainConfig(objective=objective, logits="bf16", model="folder")
