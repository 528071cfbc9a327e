"""The log-probabilities of all answers under the reference model of dpo: the model that the run starts with.

starting weights → one forward for each pair → RUN/reference.safetensors → ``reference`` of the data sets

They are computed once, before the first update. A resumed run reads them from the run directory, and all ranks use the
same ones. A second model would need its memory throughout the run, or with LoRA, whose adapters could be disabled, one
forward more for each pair in every epoch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigbatch.distributed.gradient_sync import MultiRankSync
from bigbatch.engine.engine import Engine
from bigbatch.errors import BigbatchError, InputError, os_reason
from bigbatch.lm.data.pair_dataset import PairDataset
from bigbatch.lm.distributed.ranks import RankContext
from bigbatch.lm.files import write_atomically
from bigbatch.lm.objectives.dpo import answer_log_probs
from bigbatch.lm.runs.file_names import IDENTITY, REFERENCE
from bigbatch.lm.runs.identity import read_identity
from bigbatch.lm.training.resume import weights_fingerprint
from bigbatch.lm.training.setup import TrainingSetup

MESSAGES = 100  # of the progress through a data set


def prepare_reference(
    setup: TrainingSetup, engine: Engine, ranks: RankContext, folder: Path | None, progress: Callable[..., object]
) -> None:
    """Set the reference of the data sets of a dpo run; no-op for other objectives, and the second time. Collective.

    That of the run directory is used if it is of the same data.

    Args:
        setup: With the weights that the run starts with.
        engine: Of the model; limits the micro-batches.
        ranks: The processes of the run; each computes a share.
        folder: The run directory, which need not exist; None to compute the reference.
        progress: Receives an activity, the pairs done and all pairs.

    Raises:
        InputError: The file of the run directory is lost or damaged, and the model is another one now.
    """
    parts = _datasets(setup)
    if all(part.reference is not None for part in parts.values()):
        return
    path = None if folder is None else folder / REFERENCE
    stored = None if path is None else _load(path, _key(setup))
    if all(ranks.all_gather(stored is not None)):
        assert stored is not None, "of every rank"
        for name, part in parts.items():
            part.reference = stored[name].to(setup.device_spec.weights_dtype)
        return
    if folder is not None:
        with ranks.raise_together(), engine.whole_weights():
            _check_start(setup, folder)
    for name, part in parts.items():
        part.reference = _log_probs(setup, engine, part, f"computing the reference of the {name} data", progress)


def save_reference(setup: TrainingSetup, folder: Path) -> None:
    """Write the reference into a run directory, unless it is there; no-op for other objectives.

    Raises:
        BigbatchError: The file cannot be written.
    """
    from safetensors.torch import save

    path = folder / REFERENCE
    found = {name: part.reference for name, part in _datasets(setup).items() if part.reference is not None}
    if not found or _load(path, _key(setup)) is not None:
        return
    try:
        write_atomically(path, save(found, metadata={"key": _key(setup)}))
    except OSError as error:
        raise BigbatchError(f"{path} cannot be written: {os_reason(error)}.") from error


def add_reference(setup: TrainingSetup, samples: list[dict[str, Any]]) -> None:
    """Compute the reference of single samples, with the model as it is; no-op for other objectives than dpo."""
    if setup.config.objective != "dpo":
        return
    with _evaluating(setup):
        for sample in samples:
            sample["reference"] = _of_microbatch(setup, [sample])[0].to(setup.device_spec.weights_dtype).cpu()


def _datasets(setup: TrainingSetup) -> dict[str, PairDataset]:
    """Return the data sets that need a reference."""
    if setup.config.objective != "dpo":
        return {}
    parts = {"training": setup.training, "validation": setup.validation}
    return {name: part for name, part in parts.items() if isinstance(part, PairDataset)}


def _key(setup: TrainingSetup) -> str:
    """Return a SHA-256, in hex, of the sequences that the reference belongs to."""
    data = f"{setup.data_fingerprint} {setup.validation_fingerprint} {setup.config.max_length}"
    digest = sha256(data.encode())
    for part in _datasets(setup).values():
        digest.update(part.lengths.tobytes())
    return digest.hexdigest()


def _load(path: Path, key: str) -> dict[str, Tensor] | None:
    """Return the reference in a file; None if it does not exist, is damaged, or belongs to other sequences."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() is None or file.metadata().get("key") != key:
                return None
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, no mapping
    except (OSError, SafetensorError):
        return None


def _check_start(setup: TrainingSetup, folder: Path) -> None:
    """Raise if a run that has begun has another model now, whose log-probabilities would be others."""
    if not (folder / IDENTITY).is_file():
        return
    before = (read_identity(folder).facts or {}).get("weights_sha256")
    if before is not None and before != weights_fingerprint(setup):
        raise InputError(
            f"{folder / REFERENCE} is lost or damaged, and the weights of {setup.config.model} are not those that "
            f"{folder} was started with, so the reference cannot be computed again. Restore one of the two."
        )


def _log_probs(
    setup: TrainingSetup, engine: Engine, part: PairDataset, activity: str, progress: Callable[..., object]
) -> Tensor:
    """Return the log-probabilities of all answers of a data set, ``[samples, parts]``. Collective."""
    sync = engine.sync
    found = torch.zeros(len(part), part.num_parts, dtype=torch.float64)
    order = sorted(range(len(part)), key=lambda i: -int(part.lengths[i]))[sync.rank :: sync.size]
    rows_at_once = max(1, len(order) // MESSAGES)
    chunks = [order[start : start + rows_at_once] for start in range(0, len(order), rows_at_once)]
    groups = [
        [chunk[row] for row in rows]
        for chunk in chunks
        for rows in _groups(engine, [int(part.lengths[i]) for i in chunk])
    ]
    most = len(groups)
    if sync.runs_in_lockstep:
        most = int(max(number for (number,) in sync.all_gather([float(most)])))
    done = 0
    with _evaluating(setup):
        for place in range(most):
            progress(activity, done * sync.size, len(part))
            rows = groups[place] if place < len(groups) else [0]
            values = _of_microbatch(setup, [part[i] for i in rows])
            if place < len(groups):
                found[rows] = values.double().cpu()
                done += len(rows)
    if isinstance(sync, MultiRankSync):
        found = found.to(setup.device_spec.device)
        dist.all_reduce(found, group=sync.group)  # of each sample, one rank has the value and the others 0
    return found.cpu().to(setup.device_spec.weights_dtype)


def _groups(engine: Engine, lengths: list[int]) -> Sequence[Sequence[int]]:
    """Group samples as micro-batches; one by one where the size is in a checkpoint that is not loaded yet."""
    return engine.groups(lengths) if engine.microbatch_size.is_chosen else [[place] for place in range(len(lengths))]


def _of_microbatch(setup: TrainingSetup, samples: list[dict[str, Any]]) -> Tensor:
    """Return the log-probabilities of the answers of some samples, ``[samples, parts]``."""
    device = setup.device_spec.device
    microbatch = {name: tensor.to(device) for name, tensor in setup.collate(samples).items()}
    return answer_log_probs(setup.model, microbatch, setup.device_spec).view(-1, len(samples)).T


@contextmanager
def _evaluating(setup: TrainingSetup) -> Iterator[None]:
    training = setup.model.training
    try:
        with torch.no_grad():
            setup.model.eval()
            yield
    finally:
        setup.model.train(training)
