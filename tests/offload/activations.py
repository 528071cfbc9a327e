"""Small language models whose checkpointed layers may have their inputs in host memory, and their engines."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

import bigbatch
from bigbatch.lm.data.dataset import collate
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.adapters import add_lora
from bigbatch.lm.model.causal_attention import use_causal_attention
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.decoder_layers import DecoderLayers
from bigbatch.lm.model.packed_rows import pack_row
from bigbatch.offload.transfers import TransferCounts

DEPTH, WIDTH, LONGEST, VOCABULARY = 5, 16, 16, 100
SIZE = {
    "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": VOCABULARY, "max_position_embeddings": 256,
}  # fmt: skip
GPT2_SIZE = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 2, "n_positions": 256, "vocab_size": VOCABULARY}
KINDS: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: LlamaConfig(**SIZE | more),
    "qwen2": lambda **more: Qwen2Config(**SIZE | {"num_key_value_heads": 1} | more),
    "gpt2": lambda **more: GPT2Config(**GPT2_SIZE | {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} | more),
}
LENGTHS = (16, 3, 9, 12, 5, 7, 14, 2, 11)
"""Ragged: three micro-batches of different sizes with `BUDGET`."""
BUDGET = bigbatch.TokenBudget(32)


def make_decoder(kind: str = "llama", *, lora: bool = False, device: str = "cpu", **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind](**more), dtype=torch.float32).train()
    use_causal_attention(model)
    return (add_lora(model, rank=2, alpha=4.0, seed=0).train() if lora else model).to(device)


def make_samples(number: int = 0, lengths: Sequence[int] = LENGTHS) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(100 + number)
    rows = [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row.roll(-1)} for row in rows]


class Run:
    """A model whose layers are in one checkpointing mode, and its engine."""

    def __init__(
        self, mode: Any, kind: str = "llama", *, precision: str = "float32", layout: str = "packed",
        lora: bool = False, device: str = "cpu", shape: dict[str, Any] | None = None, longest: int = LONGEST,
        needs_mask: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        self.model = make_decoder(kind, lora=lora, device=device, **(shape or {}))
        self.layers = DecoderLayers(self.model)
        self.layers.set_checkpointing(mode)
        spec: Any = DeviceSpec(torch.device(device), precision)  # type: ignore[arg-type]
        self.loss_fn = CausalLMLoss(spec, needs_mask=needs_mask, longest=longest)
        pack = partial(pack_row, pad_id=0, longest=longest) if layout == "packed" else partial(collate, pad_id=0)
        self.collate: Callable[[Any], dict[str, Tensor]] = pack
        trained = [p for p in self.model.parameters() if p.requires_grad]
        given: dict[str, Any] = {"microbatch": BUDGET, "max_grad_norm": 1.0, "check": False} | settings
        self.engine = bigbatch.Engine(
            self.model,
            torch.optim.AdamW(trained, lr=0.01),
            given.pop("loss_fn", self.loss_fn),
            collate=pack,
            lengths=lambda rows: [len(row["input_ids"]) for row in rows],
            layout=layout,
            **given,
        )

    def step(self, number: int) -> bigbatch.WindowReport:
        return self.engine.step(make_samples(number))

    def results(self, first: int, last: int) -> list[Any]:
        """Train, and return losses and norms of the windows and the weights after them."""
        reports = [self.step(number) for number in range(first, last)]
        return [*((float(each.loss), each.grad_norm) for each in reports), self.weights()]

    def weights(self) -> dict[str, Any]:
        return {name: tensor.tolist() for name, tensor in self.engine.state_dict()["model"].items()}

    def gradient(self, microbatch: dict[str, Tensor]) -> list[Tensor]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return list(torch.autograd.grad(self.loss_fn(self.model, microbatch)[0], trained))

    @property
    def counts(self) -> TransferCounts:
        (transfers,) = self.layers.inputs.transfers
        return transfers.counts
