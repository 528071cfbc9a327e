"""Random weights of a sharded new model: initialized on the host of the first rank, and sent from there.

first rank: whole model on its host → every tensor broadcast, one at a time → each rank keeps its shard

So one host holds the whole model, whatever the number of ranks, and its values are those of one process.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigbatch.distributed.collective import raise_together, rank_group
from bigbatch.errors import InputError, first_line
from bigbatch.lm.model.meta_model import copy_to_meta, meta_model_from_config, replace_parameters
from bigbatch.lm.model.weights import Region, Weights, empty_shard

ALIGNMENT_BYTES = 16


class SentWeights(Weights):
    """The values of a model's parameters, which only the first rank holds.

    Args:
        tensors: By their names in the model; empty on the other ranks.
        identity: Determines the values; it is their fingerprint.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, identity: str) -> None:
        super().__init__(tensors)
        self._fingerprint = identity

    def tensor(self, name: str) -> Tensor:
        """Return a tensor on the first rank."""
        found: Tensor = self._tensors[name]
        return found


def sent_model(
    config: Any, make_model: Callable[[], Any], *, dtype: torch.dtype, identity: str, is_first: bool
) -> tuple[Any, SentWeights]:
    """Build a new model without its weights, and on the first rank its weights.

    Args:
        config: Of the model.
        make_model: Returns the whole model on the CPU; called on the first rank.
        dtype: Of its parameters.
        identity: As for `SentWeights`.
        is_first: Whether this is the first rank.

    Returns:
        The model with parameters on the meta device, and its `SentWeights`.
    """
    if is_first:
        whole = make_model()
        return copy_to_meta(whole), SentWeights(
            {name: p.detach() for name, p in whole.named_parameters()}, identity=identity
        )
    model = meta_model_from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model, SentWeights({}, identity=identity)


@torch.no_grad()
def receive_shards(model: nn.Module, weights: SentWeights, device: torch.device) -> None:
    """Put this rank's shards into a model that was sharded on the meta device. Collective.

    All memory is allocated before the first tensor is sent, so that no rank can fail alone in between: the shards, and
    room for the largest tensor.

    Args:
        model: With `fully_shard` applied to it; its parameters are on the meta device.
        weights: Of the model.
        device: Where the shards go.

    Raises:
        InputError: A rank has too little memory.
    """
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.is_meta]
    loaded: dict[nn.Parameter, nn.Parameter] = {}
    regions: dict[str, tuple[Tensor, Region]] = {}
    with raise_together(rank_group(), InputError):
        try:
            for name, parameter in parameters:
                shard, local, region = empty_shard(parameter, device)
                loaded[parameter], regions[name] = shard, (local, region)
            largest = max((parameter.numel() * parameter.element_size() for _, parameter in parameters), default=0)
            room = torch.empty(largest + ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
        except Exception as error:
            raise InputError(f"the weights of the model do not fit on {device}: {first_line(error)}.") from error
    for name, parameter in parameters:
        raw = room[: parameter.numel() * parameter.element_size()]
        if dist.get_rank() == 0:
            raw.copy_(weights.tensor(name).contiguous().view(-1).view(torch.uint8))
        dist.broadcast(raw, 0)
        local, region = regions[name]
        if local.numel():
            local.copy_(raw.view(parameter.dtype).view(parameter.shape)[region])
    weights.close()
    replace_parameters(model, loaded)
