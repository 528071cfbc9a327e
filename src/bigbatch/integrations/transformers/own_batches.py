"""A get_batch_samples of the user's: windows do not call it, so one that changes its batches is refused.

first window → micro-batches of the Trainer, collated → the user's get_batch_samples → the same, or InputError
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import Trainer

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.samples import SampleBatch, copy_samples
from bigbatch.integrations.transformers.traceless import class_of, fresh
from bigbatch.integrations.transformers.trainer_state import collator_state, trainer_preserved
from bigbatch.integrations.transformers.unit_refusals import class_name
from bigbatch.integrations.transformers.unit_samples import same_batches


def refuse_changed_batches(trainer: Any, stock: type, batches: Sequence[Any]) -> None:
    """Run a get_batch_samples of the user's once on the collated batches of a window, and discard what it returns.

    One that raises is not judged: windows never call it.

    Args:
        trainer: After `exact`.
        stock: Its class before.
        batches: Of the window, as the loader returned them.

    Raises:
        InputError: It returns other batches, which a window would not have.
    """
    if stock.get_batch_samples is Trainer.get_batch_samples:  # type: ignore[attr-defined]
        return
    collate = trainer.data_collator
    with trainer_preserved(trainer), collator_state(collate):
        collated = [collate(copy_samples(each.samples)) if isinstance(each, SampleBatch) else each for each in batches]
        given = [fresh(batch) for batch in collated]
        with class_of(trainer, stock):
            try:
                found, _ = trainer.get_batch_samples(iter(given), len(given), trainer.args.device)
            except Exception:  # noqa: BLE001 - of the user's code
                return
        same = len(found) == len(collated) and all(
            same_batches(before, tree_map(_on_host, after)) for before, after in zip(collated, found, strict=True)
        )
    if not same:
        raise InputError(
            f"get_batch_samples of {class_name(trainer)} changes the batches of a window, and exact() collates the "
            "samples of a window again, in micro-batches: change them in the data collator, or use weights(trainer, "
            "items=...) instead of exact(trainer)."
        )


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
