"""Find out, in the first window of several ranks, whether a trainer's loss itself calls collectives.

Ranks run different numbers of micro-batches, so each collective of a loss would wait for one that is not called. And
what a loss adds up over ranks, such as a number of tokens, is that of unrelated micro-batches.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from bigbatch.integrations.transformers.traceless import attribute, fresh, traceless
from bigbatch.integrations.transformers.unit_probe import SEED, ComputeLoss
from bigbatch.integrations.transformers.unit_refusals import depends_on_ranks
from bigbatch.integrations.transformers.unit_samples import Collator, size_of
from bigbatch.rng import seed_everything

_NAMESPACES = {"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"}
_SAMPLES = 3  # of each rank
_TOLERANCE = 1e-3  # of the loss of one micro-batch that runs twice, in half precision


class CollectiveWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether a collective of torch.distributed is called, under whatever name."""

    supports_higher_order_operators = True
    was_called = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.was_called |= getattr(func, "namespace", "") in _NAMESPACES
        return func(*args, **(kwargs or {}))


def calls_collectives(
    trainer: Any, collate: Callable[[Any], Any], samples: Sequence[Any], compute_loss: ComputeLoss
) -> bool:
    """Return whether the loss of one sample calls collectives; of a sharded model, whose forward does, False.

    Runs it without gradients on up to three samples of each rank. If it calls collectives, it runs again on those of
    each of two ranks, which all ranks then have; else as if another rank had gathered the same values. Leaves no trace
    on the trainer. Collective.

    Args:
        trainer: On several ranks.
        collate: Makes a micro-batch of a list of samples.
        samples: Of this rank, at least one.
        compute_loss: The trainer's own.

    Raises:
        InputError: The loss depends on the samples of other ranks; on all ranks.
    """
    rank = dist.get_rank()
    collator = Collator(collate, [trainer.data_collator])
    # From the smallest on, or from the largest: a number of items that ranks add up should differ.
    chosen = sorted(samples, key=size_of, reverse=bool(rank % 2))[:_SAMPLES]
    own_inputs: list[Any] = []
    with collator.restored(), suppress(Exception):  # the window raises errors of the collator
        own_inputs = [collator.collate([sample]) for sample in chosen]
    inputs = _gathered(own_inputs)
    with traceless(trainer, compute_loss) as model, CollectiveWatch() as watch:  # type: ignore[no-untyped-call]

        def loss_of(micro_batch: Any) -> float:
            seed_everything(SEED)
            one = torch.ones((), dtype=torch.int64, device=trainer.args.device)
            with torch.no_grad(), suppress(Exception):  # the window raises errors of the loss
                return float(compute_loss(model, trainer._prepare_inputs(fresh(micro_batch)), one))
            return math.nan

        num_rounds = min(map(len, inputs))
        own = [loss_of(inputs[rank][number]) for number in range(num_rounds)]
        if not any(_gathered(watch.was_called)):
            with _second_rank(trainer.accelerator):
                of_two = [loss_of(inputs[rank][number]) for number in range(num_rounds)]
            if not all(_gathered(all(_is_close(a, b) or math.isnan(b) for a, b in zip(own, of_two, strict=True)))):
                raise depends_on_ranks(trainer)
            return False
        same_on_all = [[loss_of(inputs[source][number]) for number in range(num_rounds)] for source in range(2)]
    is_equal = rank > 1 or all(map(_is_close, own, same_on_all[rank]))
    if not all(_gathered(is_equal)):
        raise depends_on_ranks(trainer)
    return not any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


@contextmanager
def _second_rank(accelerator: Any) -> Iterator[None]:
    """Make ``gather`` and ``reduce`` of an accelerator return values as if another rank had equal ones."""

    def gather(values: Any, *_: Any, **__: Any) -> Any:
        return tree_map(lambda value: torch.cat([value[None] if value.ndim == 0 else value] * 2), values)

    def reduce(values: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
        return tree_map(lambda value: value * (2 if reduction == "sum" else scale), values)

    with ExitStack() as stack:
        for name, function in {"gather": gather, "gather_for_metrics": gather, "reduce": reduce}.items():
            stack.enter_context(attribute(accelerator, name, function))
        yield


def _gathered(value: Any) -> list[Any]:
    """Return the value of every rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _is_close(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=_TOLERANCE) or (math.isnan(first) and math.isnan(second))
