"""Exact gradient accumulation in ``transformers.Trainer`` and its subclasses, such as those of TRL.

from bigbatch.integrations.transformers import exact
trainer = exact(SFTTrainer(...))
trainer.train()
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigbatch.integrations.transformers.exact import ExactTrainer as ExactTrainer
    from bigbatch.integrations.transformers.exact import exact as exact

_PUBLIC = {
    "ExactTrainer": "bigbatch.integrations.transformers.exact",
    "exact": "bigbatch.integrations.transformers.exact",
    "verify": "bigbatch.integrations.transformers.verification",
    "weights": "bigbatch.integrations.transformers.weights",
}

__all__ = ["ExactTrainer", "exact", "verify", "weights"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value  # in place of a submodule of the same name, which the import sets
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
