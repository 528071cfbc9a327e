"""The contestants of `sharded_rivals.py`: bigbatch and torchtitan, with a Llama that FSDP2 shards."""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from bigbatch import TokenBudget
from bigbatch.distributed.gradient_sync import SyncPolicy
from bigbatch.distributed.sharded import ShardedSync
from bigbatch.lm.bench.workload import Sample, shift
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.dataset import IGNORED
from bigbatch.lm.device import resolve_device
from bigbatch.lm.distributed.ranks import RankContext, _shard
from bigbatch.lm.model.causal_attention import kernel_of
from bigbatch.lm.model.meta_model import meta_model_from_config, replace_parameters
from bigbatch.lm.model.meta_setup import set_up_meta_model
from bigbatch.lm.model.weights import Weights, empty_shard
from bigbatch.lm.training.engine_factory import make_engine

LR, MAX_NORM, STD = 1e-5, 1.0, 0.02
UNUSED = {
    "torch.utils.tensorboard": ("SummaryWriter",),
    "datasets": ("Dataset", "load_dataset"),
    "datasets.distributed": ("split_dataset_by_node",),
}
"""Modules that torchtitan imports for metrics and data, and what it imports from them."""


@dataclass(frozen=True)
class Shape:
    """A Llama; torchtitan computes the width of its feed-forward layers from the last two numbers."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    multiple_of: int
    ffn_dim_multiplier: float | None


LLAMA_8B = Shape(4_096, 14_336, 32, 32, 8, 128_256, 1_024, 1.3)
TINY = Shape(64, 192, 2, 4, 2, 512, 64, None)


@dataclass(frozen=True)
class Job:
    """What all contestants share."""

    ranks: RankContext
    device: torch.device
    shape: Shape
    row_tokens: int
    rows: int
    microbatches: int
    checkpointing: Literal["none", "full"]

    @property
    def on_cuda(self) -> bool:
        """Whether this is not a dry run."""
        return self.device.type == "cuda"

    @property
    def tokens(self) -> int:
        """Tokens of an update, over all ranks."""
        return self.ranks.size * self.microbatches * self.rows * self.row_tokens

    def window(self, number: int) -> list[Sample]:
        """Create this rank's rows of an update."""
        generator = torch.Generator().manual_seed(number * self.ranks.size + self.ranks.rank)
        ids = torch.randint(
            self.shape.vocabulary, (self.microbatches * self.rows, self.row_tokens), generator=generator
        )
        return shift([{"input_ids": row, "labels": row} for row in ids])

    def llama_config(self) -> Any:
        """Return the shape as transformers describes it."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.shape.hidden,
            intermediate_size=self.shape.intermediate,
            num_hidden_layers=self.shape.layers,
            num_attention_heads=self.shape.heads,
            num_key_value_heads=self.shape.kv_heads,
            vocab_size=self.shape.vocabulary,
            max_position_embeddings=self.row_tokens,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            tie_word_embeddings=False,
            use_cache=False,
        )


class Bigbatch:
    """`bigbatch train --parallel fsdp` with random weights.

    Over one rank, which bigbatch does not shard, it is sharded here: for the kernels without exchanges.

    Args:
        job: Shared settings.
        policy: When gradients are reduced; None for what bigbatch chooses.
    """

    def __init__(self, job: Job, *, policy: SyncPolicy | None = None) -> None:
        precision = "bf16" if job.on_cuda else "float32"
        spec = resolve_device(job.device.type, precision, is_sharded=True)
        config = TrainConfig(
            model="llama-8b", max_length=job.row_tokens, parallel="fsdp", gradient_checkpointing=job.checkpointing
        ).resolved()
        model = meta_model_from_config(job.llama_config(), dtype=torch.float32)
        model_setup = set_up_meta_model(model, Weights({}), config, spec, pad_id=0, longest=job.row_tokens)
        model_setup = replace(model_setup, uses_cuda_graphs=False)
        if job.ranks.size == 1:
            _shard(model, job.ranks, job.device.type, spec.gathered_dtype)
            sync: Any = ShardedSync(model, policy=policy, keeps_weights=job.on_cuda)
        else:
            sync = job.ranks.parallelize(model, job.device, layers_dtype=spec.gathered_dtype)
        if job.ranks.size > 1 and policy is not None:
            sync = ShardedSync(model, policy=policy, keeps_weights=job.on_cuda)
        load_random_shards(model, job.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=job.on_cuda)
        budget = TokenBudget(job.rows * job.row_tokens)
        self.engine = make_engine(model_setup, optimizer, microbatch=budget, max_grad_norm=MAX_NORM, sync=sync)
        first = model_setup.collate(job.window(0)[:1])
        sync.set_padding_microbatch({name: tensor.to(job.device) for name, tensor in first.items()})
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        keeps = "once an update" if sync._keeps_weights else "for every forward and backward"
        reduces = "once an update" if sync.policy is SyncPolicy.LAST else "with every micro-batch"
        compiled = model_setup.layers is not None and model_setup.layers.is_compiled
        self.notes = [
            f"weights gathered {keeps}, gradients reduced {reduces}; {model_setup.layout} rows, "
            f"attention {kernel_of(model)}, layers {'' if compiled else 'not '}compiled, "
            f"checkpointing {model_setup.checkpointing_mode}",
            *model_setup.notes,
        ]
        self._report: Any = None

    def update(self, window: list[Sample]) -> None:
        """Run one update."""
        self._report = report = self.engine.step(window)
        if report.retries or report.skipped:
            raise RuntimeError(f"{report.retries} retries; update skipped: {report.skipped}")

    def last_update(self) -> str:
        """Describe the last update. Collective."""
        return f"{self._report.num_microbatches} micro-batches a rank, mean loss {self._report.loss:.3f}"


def load_random_shards(model: Any, device: torch.device) -> None:
    """Put this rank's shards into a model that was sharded on the meta device, as `load_shards` does from files."""
    loaded = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            loaded[parameter], local, _ = empty_shard(parameter, device)
            fill(name, local)
    replace_parameters(model, loaded)


@torch.no_grad()
def fill(name: str, local: Tensor) -> None:
    """Fill a shard: ones for norms, else random numbers."""
    if "norm" in name:
        local.fill_(1)
    else:
        local.normal_(std=STD)


class Torchtitan:
    """The Llama 3 of torchtitan 0.2.2, set up and trained as its trainer does with FSDP alone.

    Args:
        job: Shared settings.
        reshard: ``fsdp_reshard_after_forward`` of its configuration.
    """

    def __init__(self, job: Job, *, reshard: str = "default") -> None:
        replace_missing_modules()
        from torchtitan.components.loss import build_cross_entropy_loss
        from torchtitan.config import JobConfig
        from torchtitan.distributed.utils import clip_grad_norm_, dist_sum
        from torchtitan.models.llama3 import Transformer, TransformerModelArgs
        from torchtitan.models.llama3.infra.parallelize import apply_ac, apply_compile, apply_fsdp

        shape = job.shape
        arguments = TransformerModelArgs(
            dim=shape.hidden,
            n_layers=shape.layers,
            n_heads=shape.heads,
            n_kv_heads=shape.kv_heads,
            vocab_size=shape.vocabulary,
            multiple_of=shape.multiple_of,
            ffn_dim_multiplier=shape.ffn_dim_multiplier,
            rope_theta=500_000,
            max_seq_len=job.row_tokens,
        )
        config = JobConfig()
        config.activation_checkpoint.mode = job.checkpointing
        config.compile.enable = job.on_cuda
        with torch.device("meta"):
            model = Transformer(arguments)
        self._mesh = init_device_mesh(job.device.type, (job.ranks.size,), mesh_dim_names=("fsdp",))
        # the order of `parallelize_llama`
        if job.checkpointing != "none":
            apply_ac(model, config.activation_checkpoint, model_compile_enabled=config.compile.enable)
        if config.compile.enable:
            apply_compile(model, config.compile)
        apply_fsdp(
            model,
            self._mesh,
            param_dtype=torch.bfloat16 if job.on_cuda else torch.float32,
            reduce_dtype=torch.float32,
            pp_enabled=False,
            reshard_after_forward_policy=reshard,
        )
        if not job.on_cuda:  # gloo cannot scale what it sums
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
        model.to_empty(device=job.device)
        with torch.device(job.device):
            model.freqs_cis = model._precompute_freqs_cis()
        for name, parameter in model.named_parameters():
            fill(name, parameter.detach().to_local())
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=job.on_cuda)
        self._loss_fn = build_cross_entropy_loss(config)
        self._clip, self._sum = clip_grad_norm_, dist_sum
        self._job = job
        self._losses: list[Tensor] = []
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.notes = [
            f"torchtitan {version('torchtitan')}: weights gathered "
            f"{'once' if reshard == 'never' else 'twice'} a micro-batch, gradients reduced with every micro-batch; "
            f"scaled_dot_product_attention, layers and loss {'' if job.on_cuda else 'not '}compiled, "
            f"checkpointing {job.checkpointing}"
        ]

    def update(self, window: list[Sample]) -> None:
        """Run one update: `Trainer.train_step`, without garbage collection, as there."""
        gc.disable()
        try:
            self._train_step(window)
        finally:
            gc.enable()

    def _train_step(self, window: list[Sample]) -> None:
        job = self._job
        self.optimizer.zero_grad()
        ids, labels = (
            torch.stack([sample[name] for sample in window]).view(job.microbatches, job.rows, -1)
            for name in ("input_ids", "labels")
        )
        global_tokens = self._sum((labels != IGNORED).sum().to(job.device), self._mesh)
        self._losses = []
        for own_ids, own_labels in zip(ids, labels, strict=True):
            targets = own_labels.to(job.device)
            logits = self.model(own_ids.to(job.device))
            loss = self._loss_fn(logits, targets) / global_tokens
            del logits
            loss.backward()
            self._losses.append(loss.detach())
        self._clip(list(self.model.parameters()), MAX_NORM, foreach=True)
        self.optimizer.step()

    def last_update(self) -> str:
        """Describe the last update. Collective."""
        loss = self._sum(torch.stack(self._losses).sum(), self._mesh)
        return f"{len(self._losses)} micro-batches a rank, mean loss {loss:.3f}"


def replace_missing_modules() -> None:
    """Install empty modules for packages of `UNUSED` that are missing: importing the model of torchtitan needs them."""
    for name, attributes in UNUSED.items():
        try:
            import_module(name)
        except ImportError:
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)  # for libraries that look for the package later
            module.__dict__.update(dict.fromkeys(attributes, object))
            sys.modules[name] = module


CONTESTANTS: dict[str, Callable[[Job], Any]] = {
    "bigbatch": Bigbatch,
    "bigbatch-last": lambda job: Bigbatch(job, policy=SyncPolicy.LAST),
    "torchtitan": Torchtitan,
    "torchtitan-never": lambda job: Torchtitan(job, reshard="never"),
}
