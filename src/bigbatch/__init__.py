"""Gradient accumulation that computes exactly the full-batch update.

    global batch → split → window (forward, backward, accumulate) → update → report

With ``s_i`` the *sum* of the item losses of micro-batch i and ``n_i`` its number of items, every update uses

    gradient = Σ_i ∇ s_i  /  Σ_i n_i          one sum, one count, one division

so that the result does not depend on how the batch is split. `Accumulator` adds this to an existing training loop,
`Engine` accepts the whole batch, and `verify` checks it on your model, loss and batch.
"""

from typing import TYPE_CHECKING

from bigbatch.lazy_names import lazy_names

if TYPE_CHECKING:
    from bigbatch import losses as losses
    from bigbatch.accumulation.accumulator import Accumulator as Accumulator
    from bigbatch.accumulation.window import Window as Window
    from bigbatch.accumulation.window_content import WindowState as WindowState
    from bigbatch.batching.plan import Plan as Plan
    from bigbatch.batching.plan import TokenBudget as TokenBudget
    from bigbatch.batching.plan import plan as plan
    from bigbatch.coupled.coupled import Coupled as Coupled
    from bigbatch.distributed.gradient_sync import SyncPolicy as SyncPolicy
    from bigbatch.distributed.replicated import Replicated as Replicated
    from bigbatch.engine.engine import Engine as Engine
    from bigbatch.errors import BigbatchError as BigbatchError
    from bigbatch.errors import CheckpointError as CheckpointError
    from bigbatch.errors import InputError as InputError
    from bigbatch.errors import MemoryLimitError as MemoryLimitError
    from bigbatch.errors import NonFiniteError as NonFiniteError
    from bigbatch.errors import RankFailedError as RankFailedError
    from bigbatch.errors import WindowAbandonedError as WindowAbandonedError
    from bigbatch.errors import WindowStateError as WindowStateError
    from bigbatch.offload.model_move import move_to_device as move_to_device
    from bigbatch.scaling.hyperparameters import rescale as rescale
    from bigbatch.scaling.noise_scale import NoiseScale as NoiseScale
    from bigbatch.trials.trial import is_trial as is_trial
    from bigbatch.verification.verify import Verification as Verification
    from bigbatch.verification.verify import verify as verify
    from bigbatch.window_report import RanksReport as RanksReport
    from bigbatch.window_report import TermReport as TermReport
    from bigbatch.window_report import WindowReport as WindowReport

__version__ = "0.2.0"

# Public name → module. Loaded on first access: `bigbatch --help` must not import torch.
_PUBLIC = {
    "Accumulator": "bigbatch.accumulation.accumulator",
    "BigbatchError": "bigbatch.errors",
    "CheckpointError": "bigbatch.errors",
    "Coupled": "bigbatch.coupled.coupled",
    "Engine": "bigbatch.engine.engine",
    "InputError": "bigbatch.errors",
    "MemoryLimitError": "bigbatch.errors",
    "NoiseScale": "bigbatch.scaling.noise_scale",
    "Plan": "bigbatch.batching.plan",
    "RankFailedError": "bigbatch.errors",
    "RanksReport": "bigbatch.window_report",
    "Replicated": "bigbatch.distributed.replicated",
    "SyncPolicy": "bigbatch.distributed.gradient_sync",
    "TermReport": "bigbatch.window_report",
    "TokenBudget": "bigbatch.batching.plan",
    "Verification": "bigbatch.verification.verify",
    "Window": "bigbatch.accumulation.window",
    "WindowReport": "bigbatch.window_report",
    "WindowState": "bigbatch.accumulation.pending_update",
    "NonFiniteError": "bigbatch.errors",
    "WindowAbandonedError": "bigbatch.errors",
    "WindowStateError": "bigbatch.errors",
    "is_trial": "bigbatch.trials.trial",
    "move_to_device": "bigbatch.offload.model_move",
    "plan": "bigbatch.batching.plan",
    "rescale": "bigbatch.scaling.hyperparameters",
    "verify": "bigbatch.verification.verify",
}

_MODULES = {"losses"}

__all__ = ["__version__", *_PUBLIC]


if not TYPE_CHECKING:  # else, type checkers would accept every name
    __getattr__ = lazy_names(globals(), _PUBLIC, modules=_MODULES)


def __dir__() -> list[str]:
    return sorted(__all__)
