"""Gradient accumulation that gives exactly the full-batch update.

    global batch → split → window (forward, backward, accumulate) → update → report

With ``s_i`` the *sum* of the item losses of micro-batch i and ``n_i`` its number of items, every update uses

    gradient = Σ_i ∇ s_i  /  Σ_i n_i          one sum, one count, one division

so that the way in which the batch was cut does not change the result. `Accumulator` brings this to an existing
loop, `Engine` takes the whole batch, and `verify` proves it on a model, a loss and a batch of yours.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigbatch.accumulator import Accumulator as Accumulator
    from bigbatch.engine import Engine as Engine
    from bigbatch.errors import BigbatchError as BigbatchError
    from bigbatch.errors import CheckpointError as CheckpointError
    from bigbatch.errors import InputError as InputError
    from bigbatch.errors import MemoryLimitError as MemoryLimitError
    from bigbatch.errors import NonFiniteError as NonFiniteError
    from bigbatch.errors import RankFailedError as RankFailedError
    from bigbatch.errors import WindowAbandonedError as WindowAbandonedError
    from bigbatch.errors import WindowStateError as WindowStateError
    from bigbatch.noise import NoiseScale as NoiseScale
    from bigbatch.plan import Plan as Plan
    from bigbatch.plan import TokenBudget as TokenBudget
    from bigbatch.plan import plan as plan
    from bigbatch.report import RanksReport as RanksReport
    from bigbatch.report import TermReport as TermReport
    from bigbatch.report import WindowReport as WindowReport
    from bigbatch.scaling import rescale as rescale
    from bigbatch.sync import Replicated as Replicated
    from bigbatch.sync import SyncPolicy as SyncPolicy
    from bigbatch.verify import Verification as Verification
    from bigbatch.verify import verify as verify
    from bigbatch.window import Window as Window
    from bigbatch.window import WindowState as WindowState

__version__ = "0.1.0"

# Public name → module. Loaded at first use: `bigbatch --help` must not pay for torch.
_PUBLIC = {
    "Accumulator": "bigbatch.accumulator",
    "BigbatchError": "bigbatch.errors",
    "CheckpointError": "bigbatch.errors",
    "Engine": "bigbatch.engine",
    "InputError": "bigbatch.errors",
    "MemoryLimitError": "bigbatch.errors",
    "NoiseScale": "bigbatch.noise",
    "Plan": "bigbatch.plan",
    "RankFailedError": "bigbatch.errors",
    "RanksReport": "bigbatch.report",
    "Replicated": "bigbatch.sync",
    "SyncPolicy": "bigbatch.sync",
    "TermReport": "bigbatch.report",
    "TokenBudget": "bigbatch.plan",
    "Verification": "bigbatch.verify",
    "Window": "bigbatch.window",
    "WindowReport": "bigbatch.report",
    "WindowState": "bigbatch.window",
    "NonFiniteError": "bigbatch.errors",
    "WindowAbandonedError": "bigbatch.errors",
    "WindowStateError": "bigbatch.errors",
    "plan": "bigbatch.plan",
    "rescale": "bigbatch.scaling",
    "verify": "bigbatch.verify",
}

__all__ = ["__version__", *_PUBLIC]


class _Package(ModuleType):
    """Keeps ``bigbatch.verify`` the function: importing the submodule of that name must not rebind it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bigbatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
