"""Functions that ranks run in test_fused_gradients.py."""

import copy
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import bigbatch
from bigbatch.gradients import direct_sums, weight_products
from support import distributed_windows as cases
from support import full_batch_reference as ref


def update(how: str, fail_at: int, lockstep: bool) -> tuple[float, int, int]:
    """Run an update of unequal shares with fused layers; return its error, the products added, and the retries.

    Args:
        how: As for `support.distributed_windows.parallelize`.
        fail_at: The product of the last rank that runs out of memory; 0 for none.
        lockstep: Whether the ranks run the same number of micro-batches.
    """
    model = ref.make_model()
    reference = copy.deepcopy(model)
    spread_model, sync = cases.parallelize(model, how)
    optimizer = cases.GradientRecorder(spread_model)
    engine = bigbatch.Engine(
        spread_model,
        optimizer,
        ref.loss_and_items,
        microbatch=3,
        sync=sync,
        lockstep=lockstep,
        fuse_gradients=True,
        noise=False,
    )
    batch = ref.ragged_batch(13)
    is_last = dist.get_rank() == dist.get_world_size() - 1
    share = cases.select_rows(batch, range(ref.num_samples(batch))[2:] if is_last else range(2))
    num_products = 0

    def product(*operands: Any, original: Any) -> Any:
        nonlocal num_products
        num_products += 1
        if is_last and num_products == fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return original(*operands)

    names = ("weight_gradient", "add_weight_gradient_")
    counted = {name: partial(product, original=getattr(weight_products, name)) for name in names}
    with mock.patch.multiple(direct_sums, **counted):
        report = engine.step(share)
    return ref.relative_error(optimizer.seen[0], ref.full_gradient(reference, batch)), num_products, report.retries


def refusal(how: str, fuse_gradients: Any) -> str:
    """Return the error of an engine, or why nothing is fused."""
    model, sync = cases.parallelize(ref.make_model(), how)
    optimizer = torch.optim.SGD(model.parameters())
    try:
        engine = bigbatch.Engine(
            model, optimizer, ref.loss_and_items, microbatch=3, sync=sync, fuse_gradients=fuse_gradients
        )
    except ValueError as error:
        return str(error)
    return str(engine.fused.disabled_reason)
