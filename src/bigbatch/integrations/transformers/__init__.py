"""Exact gradient accumulation in ``transformers.Trainer`` and its subclasses, such as those of TRL.

from bigbatch.integrations.transformers import exact
trainer = exact(SFTTrainer(...))
trainer.train()
"""

from typing import TYPE_CHECKING

# Not lazily: a submodule of the same name would be found in its place.
from bigbatch.integrations.transformers.exact import ExactTrainer, exact
from bigbatch.integrations.transformers.weights import weights
from bigbatch.lazy_names import lazy_names

if TYPE_CHECKING:
    from bigbatch.integrations.transformers.verification import verify as verify

_LAZY = {
    "verify": "bigbatch.integrations.transformers.verification",
}

__all__ = ["ExactTrainer", "exact", "verify", "weights"]


if not TYPE_CHECKING:  # else, type checkers would accept every name
    __getattr__ = lazy_names(globals(), _LAZY)
