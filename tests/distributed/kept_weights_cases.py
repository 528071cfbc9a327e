"""What ranks do in the tests of gathered weights that are kept for a window, and of weights gathered in bfloat16."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

import bigbatch
from bigbatch.distributed.sharded import ShardedSync
from bigbatch.errors import WindowAbandonedError
from bigbatch.lm.distributed.ranks import RankContext
from support.distributed_windows import CollectiveCounter

WIDTH, ROWS = 16, 12


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)), nn.Linear(WIDTH, 1))


def loss_fn(model: nn.Module, rows: Tensor) -> tuple[Tensor, int]:
    return model(rows).square().sum(), len(rows)


def sharded() -> nn.Module:
    model = make()
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def whole(tensors: Sequence[Any]) -> list[list[float]]:
    """Return the values of whole tensors, which are plain numbers to leave this process."""
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().flatten().tolist() for t in tensors]


def train(keeps_weights: bool) -> tuple[list[list[float]], list[int], float]:
    """Return the weights after three windows of AdamW, the gathers of each window, and a loss between windows."""
    model = sharded()
    sync = ShardedSync(model, keeps_weights=keeps_weights)
    engine = bigbatch.Engine(model, torch.optim.AdamW(model.parameters(), lr=0.1), loss_fn, microbatch=2, sync=sync)
    batch = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    gathers = []
    for _ in range(3):
        with CollectiveCounter() as counter:
            engine.step(batch)
        gathers.append(counter.large["_allgather_base_"])
    with torch.no_grad():
        between = float(model(batch).sum())
    return whole(list(model.parameters())), gathers, between


def abandon(keeps_weights: bool) -> list[list[float]]:
    """Return the weights after a window, one that is abandoned half way, and another one."""
    model = sharded()
    sync = ShardedSync(model, keeps_weights=keeps_weights)
    engine = bigbatch.Engine(model, torch.optim.AdamW(model.parameters(), lr=0.1), loss_fn, microbatch=2, sync=sync)
    batch = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    engine.step(batch)
    calls = iter(range(100))
    try:
        engine.step(batch, should_abandon=lambda: next(calls) == 2)
    except WindowAbandonedError:
        pass
    else:
        raise AssertionError("the window was not abandoned")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # a gathered copy would not see this
    engine.step(batch)
    return whole(list(model.parameters()))


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=97
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def gradients(how: str) -> list[list[float]]:
    """Return the gradient of a second window over both ranks: replicated, sharded, or gathered in bfloat16."""
    model = llama()
    size = dist.get_world_size()
    ranks = RankContext(size, dist.get_rank(), size, "ddp" if how == "replicated" else "fsdp")
    dtype = torch.bfloat16 if how.startswith("bfloat16") else None
    sync = ranks.parallelize(model, torch.device("cpu"), layers_dtype=dtype)
    if how == "bfloat16 once":  # as on CUDA, where weights and gradients fit
        sync = ShardedSync(model, policy=bigbatch.SyncPolicy.LAST, keeps_weights=True)

    def causal_loss(model: Any, tokens: Tensor) -> tuple[Tensor, int]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"), tokens.numel()

    engine = bigbatch.Engine(
        model, torch.optim.SGD(model.parameters(), lr=0.0), causal_loss, microbatch=2, sync=sync, check=False
    )
    tokens = torch.randint(97, (6, 11), generator=torch.Generator().manual_seed(dist.get_rank()))
    engine.backward(tokens)
    model.zero_grad()
    engine.backward(tokens)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    return whole([parameter.grad for parameter in model.parameters()])


def dtypes_in_forward() -> set[torch.dtype]:
    """Return the dtypes of a layer's weights in forward."""
    model, found = llama(), set()
    size = dist.get_world_size()
    ranks = RankContext(size, dist.get_rank(), size, "fsdp")
    ranks.parallelize(model, torch.device("cpu"), layers_dtype=torch.bfloat16)
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, _: found.update(p.dtype for p in module.parameters())
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(8)[None])
    return found
