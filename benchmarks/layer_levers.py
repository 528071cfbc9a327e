"""What two savings in a decoder layer would win: products with one input in one product, and shorter bounds of a row.

    python benchmarks/layer_levers.py [--rounds 5]     # one CUDA device, under a minute
    python benchmarks/layer_levers.py --dry            # tiny, without CUDA graphs, to try it on a CPU

The first table has the matrix products of query, key and value, and of gate and up, forward and backward: one for each
weight, and one for their weights and biases in one tensor. The gradient of the input is added within the products, and
those of the weights within products to float32 sums, as in the fused layers of an engine; what lies between the
products is compiled. The second table has attention over a row whose sequences are short, with the longest sequence of
the run as the bound, as in captured micro-batches, and with that of the row. All calls are replayed as CUDA graphs, in
alternation. Times are medians, in milliseconds of one layer; a window of W has 24 layers and 92,493 tokens.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.gradients.weight_products import add_weight_gradient_
from bigbatch.lm.bench.workload import WORKLOADS, W
from bigbatch.lm.model.attention_choice import median_time
from bigbatch.lm.model.causal_attention import NAMES, Kernel, attend_packed
from bigbatch.lm.model.flash_attention_4 import kernel_obstacle

TOKENS = (2_048, 12_288, 24_576)
Call = Callable[[], object]


class Products:
    """The products of several weights with one input, by one product for each weight or by one for all.

    Args:
        widths: Outputs of each weight.
        width: Inputs.
        tokens: Rows of the input.
        device: Where.
        has_bias: Whether there are biases.
    """

    def __init__(
        self, widths: tuple[int, ...], width: int, tokens: int, device: torch.device, *, has_bias: bool
    ) -> None:
        dtype = torch.bfloat16
        total = sum(widths)
        torch.manual_seed(0)
        self.inputs = torch.randn(tokens, width, device=device, dtype=dtype)
        self.weight = torch.randn(total, width, device=device, dtype=dtype) / width**0.5
        self.weights = [part.clone() for part in self.weight.split(widths)]
        self.bias = torch.randn(total, device=device, dtype=dtype) if has_bias else None
        self.biases = [None] * len(widths) if self.bias is None else [part.clone() for part in self.bias.split(widths)]
        self.sum = torch.zeros(total, width, device=device)
        self.sums = [torch.zeros(part, width, device=device) for part in widths]
        self.gradients = [torch.randn(tokens, part, device=device, dtype=dtype) for part in widths]
        self.widths = widths

    def forward_apart(self) -> list[Tensor]:
        """Return the output of each weight."""
        return [F.linear(self.inputs, w, b) for w, b in zip(self.weights, self.biases, strict=True)]

    def forward_together(self) -> list[Tensor]:
        """Return the same by one product."""
        return list(F.linear(self.inputs, self.weight, self.bias).split(self.widths, 1))

    def backward_apart(self, gradients: list[Tensor]) -> Tensor:
        """Add the gradients of the weights, and return that of the input."""
        found = gradients[0] @ self.weights[0]
        for gradient, weight in zip(gradients[1:], self.weights[1:], strict=True):
            found.addmm_(gradient, weight)
        for total, gradient in zip(self.sums, gradients, strict=True):
            add_weight_gradient_(total, gradient, self.inputs)
        return found

    def backward_together(self, gradient: Tensor) -> Tensor:
        """The same by one product each."""
        add_weight_gradient_(self.sum, gradient, self.inputs)
        return gradient @ self.weight


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return the activations of a gated layer."""
    return F.silu(gate) * up


def gated_gradients(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by gate and up."""
    wide, share = gate.float(), torch.sigmoid(gate.float())
    of_gate = gradient.float() * up.float() * share * (1 + wide * (1 - share))
    return of_gate.to(gate.dtype), (gradient.float() * wide * share).to(up.dtype)


def gated_gradients_together(gate: Tensor, up: Tensor, gradient: Tensor) -> Tensor:
    """Return both in one tensor."""
    return torch.cat(gated_gradients(gate, up, gradient), 1)


def attention_calls(model: Mapping[str, Any], tokens: int, device: torch.device) -> dict[str, Call]:
    """Return the calls of query, key and value."""
    width = model["hidden_size"]
    head = width // model["num_attention_heads"] * model["num_key_value_heads"]
    products = Products((width, head, head), width, tokens, device, has_bias=True)

    def apart() -> object:
        return products.forward_apart(), products.backward_apart(products.gradients)

    def together() -> object:
        return products.forward_together(), products.backward_together(torch.cat(products.gradients, 1))

    return {"apart": apart, "together": together}


def gate_calls(model: Mapping[str, Any], tokens: int, device: torch.device, *, compiled: bool) -> dict[str, Call]:
    """Return the calls of gate and up, with the activation between forward and backward."""
    width = model["intermediate_size"]
    products = Products((width, width), model["hidden_size"], tokens, device, has_bias=False)
    make = torch.compile if compiled else lambda function: function
    activate, differentiate = make(gated), make(gated_gradients)
    differentiate_together = make(gated_gradients_together)
    gradient = products.gradients[0]

    def apart() -> object:
        gate, up = products.forward_apart()
        return activate(gate, up), products.backward_apart(list(differentiate(gate, up, gradient)))

    def together() -> object:
        gate, up = products.forward_together()
        return activate(gate, up), products.backward_together(differentiate_together(gate, up, gradient))

    return {"apart": apart, "together": together}


def bound_calls(kernel: Kernel, tokens: int, longest: int, device: torch.device) -> dict[str, Call]:
    """Return attention over the shortest sequences of W that fill a row, with two bounds."""
    lengths: list[int] = []
    for length in sorted(len(sequence) for sequence in W.make_sequences()):
        lengths.append(min(length, tokens - sum(lengths)))
        if sum(lengths) == tokens:
            break
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    heads = W.model["num_attention_heads"]
    tensors = [
        torch.randn(1, number, tokens, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        for number in (heads, W.model["num_key_value_heads"], W.model["num_key_value_heads"])
    ]

    def run(bound: int) -> object:
        attended = attend_packed(*tensors, offsets, bound, kernel=kernel)
        return torch.autograd.grad(attended, tensors, attended.detach())

    return {"run": partial(run, longest), f"row ({max(lengths)})": partial(run, max(lengths))}


def times_of(calls: dict[str, Call], device: torch.device, rounds: int) -> dict[str, float]:
    """Return the milliseconds of each call, in alternation."""
    if device.type != "cuda":
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 0.0)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(median_time(call, device, captured=True))
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.dry else "cuda")
    name = "CPU" if arguments.dry else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; milliseconds of one layer")
    print(f"{'model':8} {'tokens':>7} {'products':16} {'apart':>8} {'together':>9} {'saved':>7}  of a window of 92,493")
    for model in ("w-small",) if arguments.dry else ("w", "w-1.5b"):
        sizes = WORKLOADS[model].model
        for tokens in (64,) if arguments.dry else TOKENS:
            kinds = {
                "query, key, value": attention_calls(sizes, tokens, device),
                "gate, up": gate_calls(sizes, tokens, device, compiled=not arguments.dry),
            }
            for kind, calls in kinds.items():
                times = times_of(calls, device, arguments.rounds)
                saved = times["apart"] - times["together"]
                window = saved * sizes["num_hidden_layers"] * 92_493 / tokens
                print(
                    f"{model:8} {tokens:7,} {kind:17} {times['apart']:7.3f} {times['together']:9.3f} {saved:7.3f}  "
                    f"{window:.1f} ms",
                    flush=True,
                )
    if arguments.dry:
        return
    print(f"\n{'kernel':8} {'tokens':>7}  bound")
    for kernel in NAMES:
        if kernel == "fa4" and kernel_obstacle(device) is not None:
            print(f"{kernel:8} {kernel_obstacle(device)}")
            continue
        for tokens in TOKENS[:2]:
            times = times_of(bound_calls(kernel, tokens, W.longest, device), device, arguments.rounds)
            print(f"{kernel:8} {tokens:7,}  " + ", ".join(f"{name} {value:.3f}" for name, value in times.items()))


if __name__ == "__main__":
    main()
