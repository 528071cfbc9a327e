"""The tensors that belong to a captured state, by name: everything that was trained, and the buffers."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from torch import Tensor, nn

from bigbatch.accumulation.optimizer_update import OptimizerUpdate, optimizer_parameters
from bigbatch.coupled.coupled import Coupled


class StateTensors:
    """Names the tensors of a state, each once.

    - Parameters of the model that require a gradient, or that are or were in an optimizer, and its persistent buffers:
      ``layer.weight``.
    - If ``loss_fn``, or the loss of a `Coupled`, is a module or a method of one: its parameters in an optimizer, and
      its persistent buffers: ``loss_fn.weight``.
    - All other parameters of the optimizer, by position: ``optimizer.group0.param3``, or of several optimizers
      ``optimizer1.group0.param3``.

    Frozen parameters that no optimizer held, such as the base weights under adapters, do not belong to it. The names of
    those that were in an optimizer are noted when this is created and by `note_trained`: a parameter that is frozen and
    removed from its optimizer later still belongs to the state.

    Args:
        module: The model, without its wrapper.
        update: Its optimizers.
        loss_fn: Computes the loss.
    """

    def __init__(self, module: nn.Module, update: OptimizerUpdate, loss_fn: object) -> None:
        self._module = module
        self._update = update
        self._loss_module = _module_of(loss_fn.loss if isinstance(loss_fn, Coupled) else loss_fn)
        self._trained: set[str] = set()
        self.note_trained()

    def named(self) -> dict[str, Tensor]:
        """Return all tensors that a state may hold, frozen ones included, by name."""
        named: dict[str, Tensor] = {}
        known: set[int] = set()
        for name, tensor in self._candidates():
            if id(tensor) not in known:
                named[name] = tensor
                known.add(id(tensor))
        return named

    def required(self, *, of_old_state: bool = False) -> dict[str, Tensor]:
        """Return the tensors that a state must hold: those that a window may change, or that are in an optimizer.

        Args:
            of_old_state: Leave out frozen parameters, and buffers outside of the model, which states of bigbatch 0.1.0
                did not hold.
        """
        held = set() if of_old_state else self._held()
        return {
            name: tensor
            for name, tensor in self.named().items()
            if tensor.requires_grad
            or id(tensor) in held
            or not (isinstance(tensor, nn.Parameter) or (of_old_state and name.startswith("loss_fn.")))
        }

    def belonging(self) -> dict[str, Tensor]:
        """Return the tensors that belong to a state: also those that were in an optimizer before."""
        required = self.required()
        return {name: t for name, t in self.named().items() if name in required or name in self._trained}

    def parameter_names(self) -> list[list[str]]:
        """Return the names of the parameters of each optimizer, in order."""
        names = {id(tensor): name for name, tensor in self.named().items()}
        return [[names[id(p)] for p in optimizer_parameters(optimizer)] for optimizer in self._update.optimizers]

    def note_trained(self, names: Iterable[str] = ()) -> None:
        """Keep the parameters that are in an optimizer now, and others by name, in all later states."""
        held = self._held()
        self._trained.update(names, (name for name, tensor in self.named().items() if id(tensor) in held))

    def _held(self) -> set[int]:
        return {id(p) for optimizer in self._update.optimizers for p in optimizer_parameters(optimizer)}

    def _candidates(self) -> Iterator[tuple[str, Tensor]]:
        yield from _tensors_of(self._module)
        if self._loss_module is not None:
            held = self._held()
            for name, tensor in _tensors_of(self._loss_module):
                if id(tensor) in held or not isinstance(tensor, nn.Parameter):
                    yield f"loss_fn.{name}", tensor
        optimizers = self._update.optimizers
        for number, optimizer in enumerate(optimizers):
            prefix = "optimizer" if len(optimizers) == 1 else f"optimizer{number}"
            for index, group in enumerate(optimizer.param_groups):
                for position, tensor in enumerate(group["params"]):
                    yield f"{prefix}.group{index}.param{position}", tensor


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and the persistent buffers of a module, each once."""
    saved: Mapping[str, Tensor] = module.state_dict(keep_vars=True)
    yield from module.named_parameters()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in saved)


def _module_of(loss_fn: object) -> nn.Module | None:
    """Return the module that a loss function is, or is a method of, also inside ``functools.partial``."""
    while isinstance(loss_fn, partial):
        loss_fn = loss_fn.func
    if isinstance(loss_fn, nn.Module):
        return loss_fn
    owner = getattr(loss_fn, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None
