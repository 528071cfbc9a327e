"""Products in float8 on the CPU, emulated: the marks and the fixture of their tests, a tiny model and its samples."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 48

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None,
    reason="torchao is not installed: make test-versions runs this with the newest dependencies",
)
quiet_torchao = pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")


@pytest.fixture
def emulated_fp8(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Allow ``--precision fp8`` on the CPU, where values are rounded to float8 and multiplied in float32."""
    monkeypatch.setattr("bigbatch.lm.device.fp8_obstacle", lambda device: None)
    yield
    torch._dynamo.reset()


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**size, "vocab_size": VOCABULARY, **settings})).train()


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (3, 17, 8, 5, 11):
        tokens = torch.randint(VOCABULARY, (length,), generator=generator)
        made.append({"input_ids": tokens, "labels": tokens.roll(-1)})
    return made
