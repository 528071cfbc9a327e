"""Type aliases of the callbacks and values that users pass."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor

Items: TypeAlias = int | float | Tensor
"""Number of items that a loss sum is divided by: a number, or a 0-d tensor on any device."""

Terms: TypeAlias = Mapping[str, tuple[Tensor, Items]]
"""``(loss_sum, items)`` of each term of a loss, by term name."""

LossResult: TypeAlias = tuple[Tensor, Items] | Terms
"""``(loss_sum, items)``, or terms."""

LossFunction: TypeAlias = Callable[[Any, Any], LossResult]
"""``loss_fn(model, microbatch)`` returns the loss of a micro-batch."""

CountItems: TypeAlias = Callable[[Any], Mapping[str, Items]]
"""``count_items(batch)`` returns the items of each term in this rank's whole batch, by term name."""

Collate: TypeAlias = Callable[[Sequence[Any]], Any]
"""Builds a micro-batch, a pytree of tensors, from a list of samples."""

Layout: TypeAlias = Literal["padded", "packed"]
"""``"padded"``: rows × the longest sample; ``"packed"``: one row, sequences separated by offsets."""
