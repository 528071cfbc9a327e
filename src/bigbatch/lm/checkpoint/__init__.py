"""Checkpoints of a run: folders of safetensors and JSON files that are complete or do not exist.

    write: parts → step-N.partial/ (hashed, synced) → manifest.json → step-N/ → parent synced
    read:  manifest.json → names, sizes and SHA-256 of the very bytes that are loaded → Contents

``folder`` is always the ``checkpoints`` folder of a run directory. No file is a pickle, and reading executes no code.
Verifying and listing import no torch. One process at a time may write to a run, which
`bigbatch.lm.runs.lock.RunLock` ensures. Several ranks write one checkpoint with
`bigbatch.lm.checkpoint.sharded_writer`, and any number of ranks loads it with
`bigbatch.lm.checkpoint.sharded_reader`; the functions here accept such checkpoints like any other.
"""

from bigbatch.lm.checkpoint.catalog import CheckpointInfo, list_all, newest, prune
from bigbatch.lm.checkpoint.integrity import verify
from bigbatch.lm.checkpoint.reader import Contents, read
from bigbatch.lm.checkpoint.writer import write

__all__ = ["CheckpointInfo", "Contents", "list_all", "newest", "prune", "read", "verify", "write"]
