"""Sizes of the parts in which training state passes through the device. No torch: predictions read them, too."""

CHUNK_BYTES = 64 * 2**20
"""State of several parameters that passes through together; a parameter with more is a chunk of its own."""

NUM_SLOTS = 3  # chunks on the device at a time: one arrives, one is computed on, one leaves

SLOT_FACTOR = 2
"""Largest slot / nominal size of a chunk, which master weights can make larger; a chunk above it has no slot."""

SUM_SLOT_BYTES = 32 * 2**20
"""Part of a gradient sum in host memory that passes through the device together, where a gradient is added to it."""

NUM_SUM_SLOTS = 4
"""Such parts on the device at a time: one arrives, one is added to, one leaves, and one more for copies of other sizes.
Gradients that wait for their parts have as many bytes at most, unless a single one has more."""
