"""`Coupled`: a loss over the features of all samples, for an engine that encodes a few samples at a time."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bigbatch.coupled.features import flatten_features
from bigbatch.errors import InputError, WindowStateError
from bigbatch.gradients.loss_checks import describe
from bigbatch.trials.trial import is_trial


class Coupled:
    """A loss that couples the samples of a batch, accepted wherever a ``loss_fn`` is.

        def encode(model, pairs):                              # a micro-batch → its features
            return model.images(pairs["image"]), model.texts(pairs["text"])

        loss = losses.clip(logit_scale=lambda model: model.log_scale.exp())
        engine = bigbatch.Engine(model, optimizer, bigbatch.Coupled(encode, loss), microbatch=32)
        engine.step(batch)                                     # 4,096 pairs, each with 4,095 negatives

    The gradient is that of ``loss(model, encode(model, batch))`` on the whole batch, whatever the micro-batch:

        1. encode every micro-batch without gradients, and keep its random state
        2. the loss on the features of all samples: its gradient for each feature, and for parameters that it uses
        3. encode every micro-batch again with the same random state, and differentiate Σ features · their gradients

    It costs one more forward, and the memory of the features of all samples, of their gradients, and of the loss.
    Parameters used by ``loss``, such as a temperature or a projection head, also one with batch norm, receive their
    gradient in step 2, and may be used by ``encode`` as well. Buffers learn in steps 1 and 2 only.

    Out-of-memory is handled as for other losses. If it occurs in step 3 and ``encode`` draws random numbers or writes
    buffers, the window starts again from step 1 with smaller micro-batches. A window of one micro-batch runs once.

    In the report, items are samples, and the loss is the value of ``loss``. Several terms, ``cuda_graphs`` and the
    gradient noise scale are not supported. ``microbatch="auto"`` counts the features of the batch, but not the memory
    of ``loss``, which does not depend on the micro-batch.

    Args:
        encode: ``encode(model, microbatch) → features``: a tensor ``[samples, ...]``, or a pytree, mapping or dataclass
            of such tensors. Those of integers, such as labels, are passed on to ``loss``; a feature that does not
            require a gradient is a constant. May draw from the global random generators of torch, Python and NumPy, as
            may ``collate``: their states are restored for the second pass.
        loss: ``loss(model, features) → loss``, 0-d, the loss of the whole batch: a mean, or any other function of the
            features of all samples, in the order of the batch. May change features in place.
        gather: Over several ranks, ``"none"``: each rank computes the loss of its own features, and the loss of the
            global batch is Σ_ranks samples · loss / Σ_ranks samples. ``"all"``: features are all-gathered, in the order
            of ranks and then of the batch, and every rank computes the same loss of the global batch; all ranks need
            features of the same shapes and dtypes, or no samples. Parameters that ``loss`` uses count once.

    Raises:
        InputError: ``gather`` is something else.
        TypeError: ``encode`` or ``loss`` is not callable.
    """

    def __init__(
        self,
        encode: Callable[[Any, Any], Any],
        loss: Callable[[Any, Any], Tensor],
        *,
        gather: Literal["none", "all"] = "none",
    ) -> None:
        for name, function in (("encode", encode), ("loss", loss)):
            if not callable(function):
                raise TypeError(
                    f"{name} is {describe(function)}: pass a function {name}(model, "
                    f"{'microbatch' if name == 'encode' else 'features'})."
                )
        if gather not in ("none", "all"):
            raise InputError(f'gather is {gather!r}: it must be "none" or "all".')
        self.encode = encode
        self.loss = loss
        self.gather = gather

    def __repr__(self) -> str:
        return f"Coupled({self.encode!r}, {self.loss!r}, gather={self.gather!r})"

    def __call__(self, model: nn.Module, microbatch: Any) -> tuple[Tensor, int]:
        """Return the loss of a micro-batch as if it were the whole batch, in trials.

        Raises:
            WindowStateError: This is no trial: the samples of a micro-batch would be compared with each other only.
        """
        if not is_trial():
            raise WindowStateError(
                "a Coupled loss was called on a micro-batch, whose samples would be compared with each other only: "
                "pass it to bigbatch.Engine or bigbatch.verify, which compute it on the whole batch. "
                "The loss itself is coupled.loss(model, coupled.encode(model, batch))."
            )
        return self.of_whole_batch(model, microbatch)

    def of_whole_batch(self, model: nn.Module, microbatch: Any, num_samples: int | None = None) -> tuple[Tensor, int]:
        """Return the loss of a micro-batch that is the whole batch, times its samples, and its samples.

        Args:
            model: As ``encode`` and ``loss`` receive it.
            microbatch: All samples.
            num_samples: Their number, if it is known.
        """
        features = flatten_features(self.encode(model, microbatch), num_samples)
        return self.loss_sum(model, features.copied().value(), features.num_samples), features.num_samples

    def loss_sum(self, model: nn.Module, features: Any, num_samples: float) -> Tensor:
        """Return the loss of features times a number of samples, in float32 or wider.

        Raises:
            TypeError: ``loss`` did not return a tensor.
            ValueError: It is not 0-d.
        """
        value = self.loss(model, features)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the loss of Coupled returned {describe(value)}: it must return a 0-d tensor, the loss of the whole "
                "batch without a number of items."
            )
        if value.ndim:
            raise ValueError(
                f"the loss of Coupled has shape {tuple(value.shape)}: it must be the 0-d loss of the whole batch. Call "
                ".mean() on it."
            )
        return value.to(torch.promote_types(value.dtype, torch.float32)) * num_samples
