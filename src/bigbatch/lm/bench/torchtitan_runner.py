"""torchtitan: its Qwen3 model without the norms of queries and keys, which is Qwen2, and its pieces of a training step.

compiled blocks, compiled loss, autocast, the loss divided by the labels of all micro-batches, fused AdamW

For the layout of torchtitan 0.2; its later versions build models in another way.
"""

from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bigbatch.lm.bench.entries import TORCHTITAN
from bigbatch.lm.bench.packed_loop import LossSum, PackedLoop, UnsupportedWorkloadError
from bigbatch.lm.bench.rows import Rows, fill_rows
from bigbatch.lm.bench.shared_model import SharedModel

VERSIONS = "0.2."

LAYER_PARTS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Modules of a block of torchtitan, and of a layer of transformers."""


class TorchtitanRunner(PackedLoop):
    """torchtitan as a contestant, on one device, without activation checkpointing.

    Args:
        samples: Rows per micro-batch.
        attention: ``sdpa`` attends to the whole row before a token, ``varlen`` to its document.
    """

    def __init__(self, samples: int, *, attention: Literal["sdpa", "varlen"] = "sdpa") -> None:
        super().__init__(samples)
        self._attention = attention

    def cut(self, stage: SharedModel) -> list[Rows]:
        """Fill rows with the stream of documents."""
        if stage.workload.lora_rank:
            raise UnsupportedWorkloadError("it has no adapters for this model")
        if self._attention == "varlen" and stage.device.type != "cuda":
            raise UnsupportedWorkloadError("its attention within documents needs CUDA")
        if not (found := version("torchtitan")).startswith(VERSIONS):
            raise UnsupportedWorkloadError(f"torchtitan {found} is not supported: pip install {TORCHTITAN}")
        return fill_rows(stage.samples, rows=self.samples, longest=stage.workload.longest)

    def build(self, stage: SharedModel) -> LossSum:
        """Build and compile its model on the shared parameters."""
        from torchtitan.components.loss import build_cross_entropy_loss
        from torchtitan.config import JobConfig
        from torchtitan.models.attention import VarlenMetadata
        from torchtitan.models.llama3.infra.parallelize import apply_compile  # of blocks without experts

        model = make_model(stage, self._attention)
        job_config = JobConfig()
        job_config.compile.enable = stage.device.type == "cuda"
        if job_config.compile.enable:
            apply_compile(model, job_config.compile)
        loss_fn = build_cross_entropy_loss(job_config)

        def loss_sum(rows: Rows) -> Tensor:
            masks: Any = None
            if self._attention == "varlen":
                longest = int(rows.offsets.diff().max())  # as torchtitan does, which waits for the device
                masks = VarlenMetadata(rows.offsets, rows.offsets, longest, longest)
            with stage.device_spec.autocast():
                result: Tensor = loss_fn(model(rows.ids, attention_masks=masks), rows.labels)
            return result

        return loss_sum


def make_model(stage: SharedModel, attention: str) -> Any:
    """Create its model with the parameters of the shared one, in training mode."""
    from torchtitan.models.qwen3.model.args import Qwen3ModelArgs
    from torchtitan.models.qwen3.model.model import Qwen3Model

    shared, config = stage.model, stage.model.config
    arguments = Qwen3ModelArgs(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        head_dim=shared.model.layers[0].self_attn.head_dim,
        hidden_dim=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
        qk_norm=False,
        max_seq_len=stage.workload.longest,
        attn_type=attention,
        attn_mask_type="block_causal" if attention == "varlen" else "causal",
        enable_weight_tying=config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = Qwen3Model(arguments)
    with torch.device(stage.device):
        model.rope_cache = model._precompute_rope_cache()
    model.tok_embeddings.weight = shared.model.embed_tokens.weight
    model.output.weight = shared.lm_head.weight
    model.norm.weight = shared.model.norm.weight
    for block, layer in zip(model.layers.values(), shared.model.layers, strict=True):
        for name, of_shared in LAYER_PARTS.items():
            _share(block.get_submodule(name), layer.get_submodule(of_shared))
    return model.train()


def _share(module: nn.Module, other: nn.Module) -> None:
    """Use the parameters of another module, its bias included."""
    for name, parameter in other.named_parameters(recurse=False):
        setattr(module, name, parameter)
