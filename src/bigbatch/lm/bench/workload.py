"""Workloads: a model with random weights, and one global batch of sequences of very different lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bigbatch.lm.data.dataset import IGNORED
from bigbatch.lm.device import DeviceSpec, resolve_device
from bigbatch.lm.model.adapters import add_lora
from bigbatch.lm.model.meta_model import meta_model_from_config, replace_parameters

Sample: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """One update of a Qwen2 model on sequences with log-normal lengths.

        length = exp(deviation · N(0, 1) + mean), cut to shortest … longest

    Attributes:
        name: Name on the command line.
        device: ``cuda`` or ``cpu``.
        precision: As for `DeviceSpec`.
        model: Settings of ``Qwen2Config``.
        sequences: Sequences of the global batch.
        mean: Mean of the logarithm of the lengths.
        shortest: Minimum tokens of a sequence.
        longest: Maximum tokens of a sequence.
        memory: Default memory limit of the process on the device; None for no limit.
        deviation: Standard deviation of the logarithm of the lengths.
        lr: Learning rate of AdamW.
        lora_rank: Rank of adapters on weights in bfloat16, of which only the adapters are trained; 0 for none.
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

    def device_spec(self) -> DeviceSpec:
        """Resolve device and precision.

        Raises:
            InputError: The device does not exist.
        """
        return resolve_device(self.device, self.precision)

    def make_model(self, device: torch.device | str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        """Create the model in training mode; its random weights are the same for every call on one device type.

        The weights are created where they stay, without a copy on the host: normal with a standard deviation of 0.02,
        ones for norms and zeros for biases, as transformers initializes them.
        """
        import transformers

        config = transformers.Qwen2Config(**{**self.model, "max_position_embeddings": self.longest, **changes})
        model = meta_model_from_config(config, dtype=dtype)
        torch.manual_seed(0)
        allocate(model, torch.device(device), std=config.initializer_range)
        return model.to(device).train()  # its buffers

    def make_trained_model(self, device: torch.device | str) -> Any:
        """Create the model with its adapters, if any."""
        if not self.lora_rank:
            return self.make_model(device)
        model = self.make_model(device, dtype=torch.bfloat16)
        return add_lora(model, rank=self.lora_rank, alpha=2.0 * self.lora_rank, seed=0).to(device)

    def make_sequences(self, *, vocabulary: int | None = None, seed: int = 0) -> list[Tensor]:
        """Create the global batch: random token ids, int64 ``[length]``; the workload uses seed 0."""
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(self.sequences, generator=generator)
        lengths = (normal * self.deviation + self.mean).exp().clamp(self.shortest, self.longest).long()
        most = vocabulary or self.model["vocab_size"]
        return [torch.randint(most, (length,), generator=generator) for length in lengths.tolist()]

    def make_samples(self) -> list[Sample]:
        """Create the global batch for transformers: labels equal the inputs, and the model shifts them."""
        return [{"input_ids": ids, "labels": ids} for ids in self.make_sequences()]


@torch.no_grad()
def allocate(model: nn.Module, device: torch.device, *, std: float) -> None:
    """Replace the parameters of a model on the meta device by random ones on ``device``."""
    new = {}
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if name.endswith("bias"):
            values.zero_()
        elif parameter.ndim == 1:
            values.fill_(1)  # of a norm
        else:
            values.normal_(std=std)
        new[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    replace_parameters(model, new)


def count_tokens(samples: Sequence[Sample]) -> int:
    """Return the number of tokens of some samples."""
    return sum(len(sample["input_ids"]) for sample in samples)


def shift(samples: Sequence[Sample]) -> list[Sample]:
    """Set the label of each position to the next token, as `bigbatch.lm.data.dataset` does; the last has none."""
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

W_1_5B = Workload(
    name="w-1.5b",
    device="cuda",
    precision="bf16",
    model=W_LORA.model,
    sequences=256,
    mean=5.6,
    shortest=32,
    longest=2_048,
)
"""Qwen2 of 1.5 billion parameters with all weights trained, in float32 under bf16 autocast, on the batch of w."""

W_7B_LORA = Workload(
    name="w-7b-lora",
    device="cuda",
    precision="bf16",
    model={
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    sequences=64,
    mean=5.6,
    shortest=32,
    longest=2_048,
    memory="40GiB",
    lr=1e-4,
    lora_rank=16,
)
"""Adapters of rank 16 on a Qwen2 of 7.6 billion parameters in bfloat16, on the batch of w-lora."""

WORKLOADS = {workload.name: workload for workload in (W, W_1_5B, W_LORA, W_7B_LORA, W_SMALL)}
