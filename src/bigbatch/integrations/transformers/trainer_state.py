"""Restore what a loss writes to its trainer, after runs whose results are discarded."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bigbatch.trials.object_state import ObjectState

# Large, or restored with the model, or not data.
_LEFT_AS_THEY_ARE = frozenset(
    {"train_dataset", "eval_dataset", "model", "model_wrapped", "ref_model", "optimizer", "lr_scheduler", "args"}
)
_OBJECTS = frozenset({"state", "control"})


@contextmanager
def trainer_preserved(trainer: Any) -> Iterator[None]:
    """Restore the attributes of a trainer on exit, and the content of lists, dicts and sets among them.

    Covers metrics, counters, ``state`` and ``control``. Datasets, models and the optimizer are left as they are.
    """
    attributes = dict(vars(trainer))
    content = ObjectState(parameters=False)
    content.add(
        *(
            value
            for name, value in attributes.items()
            if name in _OBJECTS or (isinstance(value, dict | list | set | deque) and name not in _LEFT_AS_THEY_ARE)
        )
    )
    try:
        yield
    finally:
        content.restore()
        now = vars(trainer)
        for name in now.keys() - attributes.keys():
            del now[name]
        now.update(attributes)
