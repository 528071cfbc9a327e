"""The workloads: a model with random weights, and one global batch of sequences of very different lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bigbatch.lm.data.dataset import IGNORED
from bigbatch.lm.device import DeviceSpec, resolve_device
from bigbatch.lm.model.pretrained import add_lora

Sample: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """One update to make: of a Qwen2 of some size, on sequences whose lengths are log-normal.

        length = exp(deviation · N(0, 1) + mean), cut to shortest … longest

    Attributes:
        name: On the command line.
        device: Where it is meant to run: ``cuda`` or ``cpu``.
        precision: As for `DeviceSpec`.
        model: Settings of ``Qwen2Config``.
        sequences: Of the global batch.
        mean: Of the logarithm of the lengths.
        shortest: Tokens of a sequence, at least.
        longest: Tokens of a sequence, at most.
        memory: What a process may use of the device where nobody says; None for no limit.
        deviation: Of the logarithm of the lengths.
        lr: Of AdamW.
        lora_rank: Of adapters, which alone are trained then, over weights in bfloat16; 0 for none.
    """

    name: str
    device: str
    precision: str
    model: Mapping[str, Any] = field(repr=False)
    sequences: int
    mean: float
    shortest: int
    longest: int
    memory: str | None = None
    deviation: float = 0.8
    lr: float = 1e-5
    lora_rank: int = 0

    def machine(self) -> DeviceSpec:
        """Find the device.

        Raises:
            InputError: It is not there.
        """
        return resolve_device(self.device, self.precision)

    def make_model(self, device: torch.device | str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        """Make the model in training mode, with the same random weights each time on the same kind of device."""
        import transformers

        config = transformers.Qwen2Config(**{**self.model, "max_position_embeddings": self.longest, **changes})
        torch.manual_seed(0)
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()

    def make_trained_model(self, device: torch.device | str) -> Any:
        """Make the model with what is trained of it."""
        if not self.lora_rank:
            return self.make_model(device)
        model = self.make_model(device, dtype=torch.bfloat16)
        return add_lora(model, rank=self.lora_rank, alpha=2.0 * self.lora_rank, seed=0).to(device)

    def make_sequences(self, *, vocabulary: int | None = None, seed: int = 0) -> list[Tensor]:
        """Make the global batch: random token ids, int64 ``[length]``; seed 0 is the workload's."""
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(self.sequences, generator=generator)
        lengths = (normal * self.deviation + self.mean).exp().clamp(self.shortest, self.longest).long()
        most = vocabulary or self.model["vocab_size"]
        return [torch.randint(most, (length,), generator=generator) for length in lengths.tolist()]

    def make_samples(self) -> list[Sample]:
        """Make the global batch as transformers takes it: every token is a label, and the model shifts them."""
        return [{"input_ids": ids, "labels": ids} for ids in self.make_sequences()]


def count_tokens(samples: Sequence[Sample]) -> int:
    """Count the tokens of some samples."""
    return sum(len(sample["input_ids"]) for sample in samples)


def shift(samples: Sequence[Sample]) -> list[Sample]:
    """Give each position the token after it as its label, as `bigbatch.lm.data.dataset` does; the last one has none."""
    none = torch.tensor([IGNORED])
    return [{**sample, "labels": torch.cat([sample["labels"][1:], none])} for sample in samples]


W = Workload(
    name="w",
    device="cuda",
    precision="bf16",
    model={
        "hidden_size": 896,
        "intermediate_size": 4_864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    sequences=256,
    mean=5.6,
    shortest=32,
    longest=2_048,
    memory="24GiB",
)
"""Qwen2 of 494 million parameters, 256 sequences of 92,493 tokens in all, float32 weights under bf16 autocast."""

W_SMALL = Workload(
    name="w-small",
    device="cpu",
    precision="float32",
    model={
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 8_192,
        "tie_word_embeddings": True,
    },
    sequences=32,
    mean=3.52,
    shortest=8,
    longest=256,
)
"""The same lengths divided by 8, an eighth of the sequences, and a model of 4 million parameters in float32."""

W_LORA = Workload(
    name="w-lora",
    device="cuda",
    precision="bf16",
    model={
        "hidden_size": 1_536,
        "intermediate_size": 8_960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    sequences=64,
    mean=5.6,
    shortest=32,
    longest=2_048,
    memory="16GiB",
    lr=1e-4,
    lora_rank=16,
)
"""Adapters of rank 16 on a Qwen2 of 1.5 billion parameters in bfloat16, 64 sequences of the lengths of w."""

WORKLOADS = {workload.name: workload for workload in (W, W_LORA, W_SMALL)}
