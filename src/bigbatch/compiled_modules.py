"""Which modules torch.compile runs."""

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Return whether calls of this module run compiled code: by ``module.compile()``, or wrapped by torch.compile."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def has_compiled(model: nn.Module) -> bool:
    """Return whether calls of the model or of a module in it run compiled code."""
    return any(map(is_compiled, model.modules()))
