"""Costs of training state in host memory: bytes on the card and on the host, bytes over the link, seconds of an update.

    ModelState, level        → placement, transfers     bytes
    … and WindowWork, Card   → update_time              seconds

Everything is for one card. Integers are bytes, floats seconds. No torch, and no device is queried.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bigbatch.offload.cards import Card
from bigbatch.offload.chunk_sizes import CHUNK_BYTES, NUM_SLOTS, NUM_SUM_SLOTS, SLOT_FACTOR, SUM_SLOT_BYTES
from bigbatch.offload.levels import Offload, reaches

FLOAT32 = 4
PAGE_BYTES = 4096

WEIGHT_MOVES = 26
"""Bytes that one micro-batch moves for each trained float32 weight: its cast 6, the product in 16 bits 2, the cast of
that 6, the addition to the sum 12. An H200 took 7.6 ms for 1.2 billion weights, 26 bytes each at 4.0 TB/s."""
CAST_MOVES = 6

BACKWARD_SHARE = 2 / 3
"""Share of backward in the time of a micro-batch whose activations are all stored; larger if layers are recomputed."""


@dataclass(frozen=True)
class ModelState:
    """Training state of one card.

    Attributes:
        weight_bytes: Trained weights, as the optimizer updates them.
        frozen_bytes: Other weights, and buffers.
        sum_bytes: Gradient sums of a window.
        state_bytes: Optimizer state.
        narrowed: Trained float32 weights that micro-batches use in 16 bits; the others, such as those of norms, stay as
            they are at every level.
        num_trained: Trained weights.
        largest: Trained weights of the largest parameter.
        largest_state_bytes: Optimizer state of the parameter with most of it.
        step_bytes: Temporary tensors of the optimizer's step if all parameters are stepped together.
        starts_wide: Those of `narrowed` that reach the card in float32, and are narrowed there before the first window.
    """

    weight_bytes: int
    frozen_bytes: int
    sum_bytes: int
    state_bytes: int
    narrowed: int
    num_trained: int
    largest: int
    largest_state_bytes: int
    step_bytes: int = 0
    starts_wide: int = 0

    def sharded(self, num_cards: int) -> ModelState:
        """Return the share of one of several cards, each parameter cut into equal parts."""
        fields = {name: -(-value // num_cards) for name, value in vars(self).items()}
        return replace(self, **fields)


@dataclass(frozen=True)
class Placement:
    """Bytes that a level needs.

    Attributes:
        card_bytes: On the card between updates, without activations.
        host_bytes: In host memory, pinned.
        step_bytes: On the card in addition while the update runs.
        window_bytes: On the card in addition while micro-batches run, without activations.
        start_bytes: On the card before the first window: weights, those that micro-batches use in 16 bits in these,
            and while their state is created, the state and the float32 weights of the largest part.
    """

    card_bytes: int
    host_bytes: int
    step_bytes: int
    window_bytes: int
    start_bytes: int


@dataclass(frozen=True)
class LinkBytes:
    """Bytes between card and host in one window.

    Attributes:
        to_card, to_host: In the update, with the gradient sums that arrive for their norm before it.
        for_norm: These alone.
        per_microbatch: Gradient sums: to the host in each micro-batch, and to the card in each but the first.
    """

    to_card: int
    to_host: int
    for_norm: int = 0
    per_microbatch: int = 0


def placement(state: ModelState, level: Offload) -> Placement:
    """Return the bytes that a level needs.

    level      on the card                                 on the host
    none       weights, sums, optimizer state              –
    optimizer  weights, sums                               optimizer state
    master     weights in 16 bits, sums                    the above, weights in float32
    gradients  weights in 16 bits                          the above, sums

    Weights that micro-batches use in float32, such as those of norms, stay on the card in float32 alone.
    """
    if level == "none":
        held = state.weight_bytes + state.frozen_bytes + state.sum_bytes + state.state_bytes
        return Placement(held, 0, state.step_bytes, 0, held)
    start_bytes = state.weight_bytes + state.frozen_bytes
    host_bytes, window_bytes, wide_bytes = state.state_bytes, 0, 0
    if reaches(level, "master"):
        start_bytes -= (FLOAT32 - 2) * state.narrowed
        host_bytes += FLOAT32 * state.narrowed
        wide_bytes = (FLOAT32 - 2) * state.starts_wide
    card_bytes = start_bytes + state.sum_bytes
    start_bytes += wide_bytes + _largest_chunk_bytes(state, level if level == "optimizer" else "master", host_bytes)
    if reaches(level, "gradients"):
        card_bytes -= state.sum_bytes
        host_bytes += state.sum_bytes
        is_narrow = state.largest <= state.narrowed
        slots_bytes = NUM_SUM_SLOTS * SUM_SLOT_BYTES  # parts of sums; and gradients that are not added yet
        window_bytes = slots_bytes + max(slots_bytes, (2 if is_narrow else FLOAT32) * state.largest)
    largest = _largest_chunk_bytes(state, level, host_bytes)
    arena = max(NUM_SLOTS * min(largest, SLOT_FACTOR * CHUNK_BYTES), largest)
    return Placement(card_bytes, pinned_bytes(host_bytes), arena + largest, window_bytes, start_bytes)


def _largest_chunk_bytes(state: ModelState, level: Offload, host_bytes: int) -> int:
    """Return the bytes of the largest chunk: several parameters with `CHUNK_BYTES` of state, or one with more."""
    largest = state.largest_state_bytes
    if reaches(level, "master"):
        largest += FLOAT32 * min(state.largest, state.narrowed)
    if reaches(level, "gradients"):
        largest += FLOAT32 * state.largest
    several = CHUNK_BYTES * host_bytes // max(state.state_bytes, 1)
    return max(largest, min(several, host_bytes))


def pinned_bytes(num_bytes: int) -> int:
    """Return the pinned host memory for a number of bytes: whole pages, of 4,096 bytes."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def transfers(state: ModelState, level: Offload) -> LinkBytes:
    """Return the bytes between card and host in one window.

    An update reads optimizer state, master weights and sums from the host, the sums twice, for their norm first, and
    writes the others back.
    """
    if level == "none":
        return LinkBytes(0, 0)
    masters_bytes = FLOAT32 * state.narrowed if reaches(level, "master") else 0
    return link_bytes(state.state_bytes + masters_bytes, state.sum_bytes if reaches(level, "gradients") else 0)


def link_bytes(state_bytes: int, sum_bytes: int) -> LinkBytes:
    """Return the bytes of one window with optimizer state, master weights included, and gradient sums on the host."""
    return LinkBytes(state_bytes + 2 * sum_bytes, state_bytes, sum_bytes, sum_bytes)


def streamed_s(link: LinkBytes, link_rate: float, kernels_s: float = 0.0) -> float:
    """Return the seconds of an update: the longer of its kernels and its copies, both ends of these, and the norm.

    Args:
        link: Its bytes.
        link_rate: Bytes per second in each direction.
        kernels_s: Seconds of its kernels.
    """
    ends = min(CHUNK_BYTES, link.to_card) + min(CHUNK_BYTES, link.to_host)  # the first in and the last out
    copies_s = max(link.to_card - link.for_norm, link.to_host) / link_rate
    return max(kernels_s, copies_s) + (link.for_norm + ends) / link_rate


def sums_wait_s(link: LinkBytes, link_rate: float, backward_s: float) -> float:
    """Return the seconds that a micro-batch waits for gradient sums, which a backward of so many seconds hides."""
    return max(0.0, link.per_microbatch / link_rate - max(0.0, backward_s))


@dataclass(frozen=True)
class WindowWork:
    """Work of one window on one card.

    Attributes:
        tokens: Padding included.
        num_microbatches: Forwards and backwards.
        layer_operations: Floating-point operations of the matrix products of the layers for one token, forward and
            backward, nothing recomputed; that of attention in products of the same rate.
        layer_moves: Bytes that everything else in the layers moves for one token.
        head_operations: As for the layers: of the output layer.
        head_moves: As for the layers: of the output layer and the loss.
        recomputed: Share of the layers whose forward runs again in backward.
        moved_inputs: Layers whose inputs are in host memory between forward and backward: all but the last, or none.
        input_bytes: Of the input of one layer for one token.
    """

    tokens: int
    num_microbatches: int
    layer_operations: float
    layer_moves: float
    head_operations: float
    head_moves: float
    recomputed: float = 0.0
    moved_inputs: int = 0
    input_bytes: int = 0


@dataclass(frozen=True)
class UpdateTime:
    """Predicted seconds of one window and its update.

    Attributes:
        compute_s: Forward and backward.
        microbatches_s: What micro-batches cost whatever their size: casts of weights, additions of gradients.
        update_s: The update: the longer of its kernels and its transfers, which overlap.
        link_s: Waiting for gradient sums that are still on their way when a backward has ended.
        fabric_s: Waiting for the weights and gradients of other cards.
        inputs_s: Waiting for copies of inputs of layers, to the host in forward and back in backward.
    """

    compute_s: float
    microbatches_s: float
    update_s: float
    link_s: float = 0.0
    fabric_s: float = 0.0
    inputs_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Seconds of the window and its update."""
        waiting_s = self.link_s + self.fabric_s + self.inputs_s
        return self.compute_s + self.microbatches_s + self.update_s + waiting_s


def update_time(
    state: ModelState,
    level: Offload,
    work: WindowWork,
    card: Card,
    *,
    fabric_bytes: int = 0,
) -> UpdateTime:
    """Predict the seconds of one window and its update.

        compute + micro-batches · weight moves + max(kernels, to card, to host) + what computation does not hide

    Args:
        state: Of one card.
        level: Of offload.
        work: Of one card.
        card: Rates.
        fabric_bytes: Sent and received by one card for a micro-batch of a sharded model, while it computes.
    """
    layers_s = work.layer_operations / card.products_per_s + work.layer_moves / card.memory_rate
    head_s = work.head_operations / card.products_per_s + work.head_moves / card.memory_rate
    forward_s = work.tokens * (layers_s + head_s) / 3
    compute_s = 3 * forward_s + work.tokens * layers_s * work.recomputed / 3
    moves = WEIGHT_MOVES * state.num_trained
    if reaches(level, "master"):
        moves -= CAST_MOVES * state.narrowed
    microbatches_s = work.num_microbatches * moves / card.memory_rate

    link = transfers(state, level)
    backward_s = (compute_s - forward_s) / work.num_microbatches
    inputs_s = work.tokens * _unhidden_inputs_s(work, layers_s, card)
    # Inputs of layers come back in one of the directions of the sums.
    moved_s = work.tokens * work.moved_inputs * work.input_bytes / work.num_microbatches / card.link_rate
    link_s = work.num_microbatches * sums_wait_s(link, card.link_rate, backward_s - moved_s)
    fabric_s = work.num_microbatches * max(0.0, fabric_bytes / card.fabric_rate - compute_s / work.num_microbatches)

    # The update reads weights, state and sums, writes the first two, and reads the sums once more for their norm.
    kernels_s = (2 * state.weight_bytes + 2 * state.state_bytes + 2 * state.sum_bytes) / card.memory_rate
    update_s = streamed_s(link, card.link_rate, kernels_s)
    return UpdateTime(compute_s, microbatches_s, update_s, link_s, fabric_s, inputs_s)


def _unhidden_inputs_s(work: WindowWork, layers_s: float, card: Card) -> float:
    """Return the seconds for one token that the layers wait for copies of their inputs.

    A copy runs beside one layer: to the host beside the forward of its own, back beside backward of the one after it.
    """
    copies_s = work.moved_inputs * work.input_bytes / card.link_rate
    forward_s = layers_s / 3 * work.moved_inputs / (work.moved_inputs + 1)
    backward_s = (2 + work.recomputed) * forward_s
    return max(0.0, copies_s - forward_s) + max(0.0, copies_s - backward_s)


def inputs_bytes(work: WindowWork, tokens: int) -> int:
    """Return the pinned host memory for the inputs of the layers of a micro-batch of so many tokens."""
    return work.moved_inputs * pinned_bytes(tokens * work.input_bytes)
