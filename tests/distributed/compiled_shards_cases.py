"""What ranks do in the tests of compiled layers of a sharded model."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from bigbatch.lm.model.decoder_layers import DecoderLayers

from .kept_weights_cases import llama


def inputs_that_are_no_tensors(lengths: tuple[int, ...]) -> list[set[str]]:
    """Compile the layers of a sharded model and run rows of these lengths.

    Returns:
        For each graph, the sizes that its tensors have, if they are no constants, and all its other numbers.
    """
    model: Any = llama()
    layers, graphs = DecoderLayers(model), []

    def record(graph: Any, example_inputs: list[Any]) -> Any:
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        sizes = {str(size) for value in values if isinstance(value, Tensor) for size in value.shape}
        sizes |= {str(value) for value in values if not isinstance(value, Tensor)}
        graphs.append({size for size in sizes if not size.isdigit()})
        return graph

    layers.compile(backend=record)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    warnings.simplefilter("ignore")  # of the compiler, which reads .grad of any tensor
    for length in lengths:
        model(torch.arange(length)[None] % 16).logits.sum().backward()
    return graphs
