"""Parameters that a trainer updates and that are not the model's, such as those of a loss module.

A window sums the gradients of the parameters of its model only, so a model that has both stands in for it.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bigbatch.distributed.replicated import Replicated, ddp_wrapper
from bigbatch.errors import InputError
from bigbatch.integrations.transformers.unit_refusals import class_name


class ModelWithParameters(nn.Module):
    """A model together with other parameters that are trained.

    Args:
        model: The model.
        parameters: The others; not copied.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.model = model
        self.others = nn.ParameterList(parameters)


def other_parameters(trainer: Any, model: nn.Module) -> list[Tensor]:
    """Return the parameters in the optimizer of a trainer that require a gradient and are not the model's."""
    groups = () if trainer.optimizer is None else trainer.optimizer.param_groups
    known = set(model.parameters())
    return [p for group in groups for p in group["params"] if p.requires_grad and p not in known]


def clear_gradients(parameters: Sequence[Tensor]) -> None:
    """Clear the gradients of other parameters before a window: the Trainer clears those of its model only."""
    for parameter in parameters:
        parameter.grad = None


def model_for_engine(trainer: Any, model: nn.Module, others: Sequence[Tensor]) -> tuple[nn.Module, Replicated | None]:
    """Return the model for an engine, with all parameters that the trainer updates, and its synchronization if needed.

    With DDP the other parameters are not in the wrapper: its module is used, and the ranks then start from those of the
    first rank. Collective in that case.

    Args:
        trainer: Whose model it is.
        model: As the trainer passes it to its loss, in its wrapper.
        others: As returned by `other_parameters`.

    Raises:
        InputError: There are others, and the model is sharded.
    """
    if not others:
        return model, None
    if trainer.is_fsdp_enabled:
        raise InputError(
            f"the optimizer of {class_name(trainer)} has {sum(p.numel() for p in others):,} parameters outside of the "
            "model, such as those of a loss, and FSDP shards and reduces only those of the model: train with DDP, or "
            "make them a part of the model."
        )
    wrapper = ddp_wrapper(model)
    together = ModelWithParameters(model if wrapper is None else wrapper.module, others)
    return together, None if wrapper is None else Replicated(together)


def model_of_engine(model: nn.Module) -> nn.Module:
    """Return the model that an engine passes to its loss, without the other parameters."""
    return model.model if isinstance(model, ModelWithParameters) else model
