"""Types of the functions and values that users pass in."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor

Items: TypeAlias = int | float | Tensor
"""What a loss sum is divided by: a number, or a 0-d tensor on any device."""

Terms: TypeAlias = Mapping[str, tuple[Tensor, Items]]
"""``(loss_sum, items)`` of each term of a loss, by its name."""

LossResult: TypeAlias = tuple[Tensor, Items] | Terms
"""``(loss_sum, items)``, or terms."""

LossFunction: TypeAlias = Callable[[Any, Any], LossResult]
"""``loss_fn(model, microbatch)`` returns the loss of a micro-batch."""

CountItems: TypeAlias = Callable[[Any], Mapping[str, Items]]
"""``count_items(batch)`` returns the items of each term."""

Collate: TypeAlias = Callable[[Sequence[Any]], Any]
"""Makes a micro-batch from a list of samples."""

Layout: TypeAlias = Literal["padded", "packed"]
"""``padded``: rows as long as the longest sample; ``packed``: one row, sequences separated by offsets."""
