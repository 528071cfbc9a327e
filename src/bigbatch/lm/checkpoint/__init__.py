"""Checkpoints of a run: folders of safetensors and JSON files that are whole or are not there.

    write: parts → step-N.partial/ (hashed, synced) → manifest.json → step-N/ → parent synced
    read:  manifest.json → names, sizes and SHA-256 of the very bytes that are loaded → Contents

``folder`` is everywhere the ``checkpoints`` of a run directory. No file is a pickle, and nothing that is read can run.
Verifying and listing load no torch. One process at a time may write to a run: `bigbatch.lm.runs.lock.RunLock` sees to
that. Several ranks write one checkpoint together with `bigbatch.lm.checkpoint.sharded_writer`, and any number of them
loads it with `bigbatch.lm.checkpoint.sharded_reader`; what is here takes such checkpoints like any other.
"""

from bigbatch.lm.checkpoint.catalog import CheckpointInfo, list_all, newest, prune
from bigbatch.lm.checkpoint.integrity import verify
from bigbatch.lm.checkpoint.reader import Contents, read
from bigbatch.lm.checkpoint.writer import write

__all__ = ["CheckpointInfo", "Contents", "list_all", "newest", "prune", "read", "verify", "write"]
