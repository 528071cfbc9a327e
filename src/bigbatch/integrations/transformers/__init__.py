"""Exact gradient accumulation in ``transformers.Trainer`` and its subclasses, such as those of TRL.

from bigbatch.integrations.transformers import exact
trainer = exact(SFTTrainer(...))
trainer.train()
"""

import importlib
from typing import TYPE_CHECKING, Any

# Not lazily: a submodule of the same name would be found in its place.
from bigbatch.integrations.transformers.exact import ExactTrainer, exact
from bigbatch.integrations.transformers.weights import weights

if TYPE_CHECKING:
    from bigbatch.integrations.transformers.verification import verify as verify

_LAZY = {
    "verify": "bigbatch.integrations.transformers.verification",
}

__all__ = ["ExactTrainer", "exact", "verify", "weights"]


if not TYPE_CHECKING:  # else, type checkers would accept every name

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
