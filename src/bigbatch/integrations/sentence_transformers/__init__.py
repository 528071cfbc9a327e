"""Losses over the whole batch in ``SentenceTransformerTrainer``, whatever the memory.

from bigbatch.integrations.sentence_transformers import exact
trainer = exact(SentenceTransformerTrainer(...))
trainer.train()
"""

# Not lazily: a submodule of the same name would be found in its place.
from bigbatch.integrations.sentence_transformers.exact import exact

__all__ = ["exact"]
