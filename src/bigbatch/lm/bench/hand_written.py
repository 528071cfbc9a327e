"""A training loop as one writes it by hand for one model: the ceiling that `bigbatch bench` compares with.

float32 weights → bf16 copies, once an update → one compiled function per micro-batch → bf16 gradients, added to
float32 sums → fused AdamW

The model is Qwen2 in plain PyTorch, on the parameters of the shared model; nothing in it is from bigbatch.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from bigbatch.lm.bench.packed_loop import LossSum, PackedLoop, compiled
from bigbatch.lm.bench.rows import Rows, fill_rows, pack_documents
from bigbatch.lm.bench.shared_model import SharedModel
from bigbatch.lm.data.dataset import IGNORED

Attention = Literal["varlen", "sdpa"]
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# torch 2.11 shares key and value heads by default; later versions need the argument
SHARED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class HandWrittenRunner(PackedLoop):
    """The loop as a contestant.

    Args:
        samples: As for `PackedLoop`.
        attention: ``varlen`` for packed rows of whole documents, ``sdpa`` for full rows without document boundaries.
    """

    def __init__(self, samples: int, *, attention: Attention = "varlen") -> None:
        super().__init__(samples)
        self._attention: Attention = attention
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._dtype = torch.bfloat16

    def cut(self, stage: SharedModel) -> list[Rows]:
        """Pack whole documents, or fill rows."""
        cut = pack_documents if self._attention == "varlen" else fill_rows
        return cut(stage.samples, rows=self.samples, longest=stage.workload.longest)

    def build(self, stage: SharedModel) -> LossSum:
        """Build the model on narrow copies of the trained parameters, and on the frozen ones themselves."""
        if stage.device_spec.precision != "bf16":
            self._dtype = torch.float32
        copies: dict[int, nn.Parameter] = {}

        def narrow(parameter: nn.Parameter) -> nn.Parameter:
            if not parameter.requires_grad:
                return parameter
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().to(self._dtype))
                self._copies.append((parameter, copies[id(parameter)]))
            return copies[id(parameter)]

        model = Qwen2(stage.model, narrow, longest=stage.workload.longest, attention=self._attention)
        function = compiled(model, stage.device)

        def loss_sum(rows: Rows) -> Tensor:
            with sdpa_kernel(BACKENDS, set_priority=True):
                return function(rows.ids, rows.labels, rows.positions, rows.offsets)

        return loss_sum

    @torch.no_grad()
    def begin_window(self) -> None:
        """Round the weights, and start the sums."""
        for parameter, copy in self._copies:
            if copy.shape != parameter.shape:  # released
                copy.data = torch.empty_like(parameter, dtype=self._dtype)
            parameter.grad = torch.zeros_like(parameter)
        torch._foreach_copy_([copy for _, copy in self._copies], [parameter for parameter, _ in self._copies])

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add the gradients of a micro-batch to the sums."""
        found = [(p.grad, copy.grad) for p, copy in self._copies if p.grad is not None and copy.grad is not None]
        torch._foreach_add_([total for total, _ in found], [gradient for _, gradient in found])
        for _, copy in self._copies:
            copy.grad = None

    def release(self) -> None:
        """Free the copies."""
        for _, copy in self._copies:
            copy.grad = None
            copy.data = copy.data.new_empty(0)


class Qwen2(nn.Module):
    """The loss of Qwen2, with parameters that are chosen by ``narrow``.

    Args:
        model: Qwen2 of transformers, with or without adapters of peft.
        narrow: Returns the parameter to use for one of the model.
        longest: Tokens of the longest document.
        attention: As for `HandWrittenRunner`.
    """

    def __init__(
        self, model: Any, narrow: Callable[[nn.Parameter], nn.Parameter], *, longest: int, attention: Attention
    ) -> None:
        super().__init__()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.embedding = narrow(base.model.embed_tokens.weight)
        self.head = narrow(base.lm_head.weight)
        self.norm = Norm(base.model.norm, narrow)
        self.frequencies = base.model.rotary_emb.inv_freq
        self.layers = nn.ModuleList(
            Layer(layer, narrow, longest=longest, attention=attention) for layer in base.model.layers
        )

    def forward(self, ids: Tensor, labels: Tensor, positions: Tensor, offsets: Tensor) -> Tensor:
        """Return the sum of the cross entropies of all labels of ``[rows, length]`` tokens."""
        hidden = F.embedding(ids, self.embedding)
        angles = positions[..., None].float() * self.frequencies
        angles = torch.cat([angles, angles], -1)[:, :, None]
        rotation = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rotation, offsets)
        logits = F.linear(self.norm(hidden), self.head)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(
        self, layer: Any, narrow: Callable[[nn.Parameter], nn.Parameter], *, longest: int, attention: Attention
    ) -> None:
        super().__init__()
        attend, mlp = layer.self_attn, layer.mlp
        self.width = attend.head_dim
        self.longest = longest
        self.attention = attention
        self.query, self.key, self.value, self.out = (
            Linear(part, narrow) for part in (attend.q_proj, attend.k_proj, attend.v_proj, attend.o_proj)
        )
        self.gate, self.up, self.down = (Linear(part, narrow) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.before, self.after = (
            Norm(norm, narrow) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], offsets: Tensor) -> Tensor:
        """Return the hidden states after attention and the feed-forward block."""
        rows, length, _ = hidden.shape
        inputs = self.before(hidden)
        query = _rotate(self.query(inputs).view(rows, length, -1, self.width), *rotation)
        key = _rotate(self.key(inputs).view(rows, length, -1, self.width), *rotation)
        value = self.value(inputs).view(rows, length, -1, self.width)
        attended = self.attend(query, key, value, offsets).reshape(rows, length, -1)
        hidden = hidden + self.out(attended)
        inputs = self.after(hidden)
        fed: Tensor = self.down(F.silu(self.gate(inputs)) * self.up(inputs))
        return hidden + fed

    def attend(self, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> Tensor:
        """Attend causally within rows, or within the parts between offsets."""
        if self.attention == "varlen" and query.is_cuda:
            parts = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
            of_torch: Any = varlen_attn
            attended: Tensor = of_torch(
                *parts, offsets, offsets, self.longest, self.longest, window_size=(-1, 0), **SHARED_HEADS
            )
            return attended
        mask = _mask_of_parts(offsets) if self.attention == "varlen" else None
        return F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=query.shape[2] != key.shape[2],
        ).transpose(1, 2)


class Linear(nn.Module):
    """A linear layer, with or without an adapter."""

    def __init__(self, layer: Any, narrow: Callable[[nn.Parameter], nn.Parameter]) -> None:
        super().__init__()
        base = getattr(layer, "base_layer", layer)
        self.weight = narrow(base.weight)
        self.bias = None if base.bias is None else narrow(base.bias)
        self.adapted = base is not layer
        if self.adapted:
            self.first, self.second = (narrow(part["default"].weight) for part in (layer.lora_A, layer.lora_B))
            self.scale = float(layer.scaling["default"])

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the product, plus that of the adapter."""
        product = F.linear(inputs, self.weight, self.bias)
        if self.adapted:
            product = product + F.linear(F.linear(inputs, self.first), self.second) * self.scale
        return product


class Norm(nn.Module):
    """Root mean square norm."""

    def __init__(self, norm: Any, narrow: Callable[[nn.Parameter], nn.Parameter]) -> None:
        super().__init__()
        self.weight = narrow(norm.weight)
        self.epsilon = float(norm.variance_epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalized states, computed in float32."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return wide.to(hidden.dtype) * self.weight


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    return states * cosine + torch.cat([-second, first], -1) * sine


def _mask_of_parts(offsets: Tensor) -> Tensor:
    """Return which tokens attend to which, bool ``[tokens, tokens]``: for a trial without a GPU."""
    token = torch.arange(int(offsets[-1]), device=offsets.device)
    part = torch.searchsorted(offsets[1:].contiguous(), token, right=True)
    return (part[:, None] == part) & (token[:, None] >= token)
