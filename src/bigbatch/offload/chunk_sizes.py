"""Sizes of the parts in which training state passes through the device. No torch: predictions read them, too."""

CHUNK_BYTES = 64 * 2**20
"""State of several parameters that passes through together; a parameter with more is a chunk of its own."""

NUM_SLOTS = 3  # chunks on the device at a time: one arrives, one is computed on, one leaves

SLOT_FACTOR = 2
"""Largest slot / nominal size of a chunk, which master weights can make larger; a chunk above it has no slot."""

STAGING_BYTES = NUM_SLOTS * CHUNK_BYTES
"""Host memory that gradients pass through on their way to sums there; as many of them are on the device meanwhile."""
