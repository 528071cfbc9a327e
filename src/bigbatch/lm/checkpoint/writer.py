"""Write a checkpoint under a temporary name, sync it, and rename it when all of it is on disk."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch import __version__
from bigbatch.errors import CheckpointError
from bigbatch.lm.checkpoint import manifest as manifests
from bigbatch.lm.checkpoint.catalog import failure, remove_leftovers, set_aside
from bigbatch.lm.checkpoint.hashed_file import HashedFile, new_file
from bigbatch.lm.checkpoint.integrity import IntegrityError, verified
from bigbatch.lm.checkpoint.json_values import to_json
from bigbatch.lm.checkpoint.manifest import Manifest, Stamp, file_name
from bigbatch.lm.files import PARTIAL, remove, replace_folder, sync_folder

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, Callable[[HashedFile], None]]
"""A function that writes each file of a checkpoint, by file name."""

Values = Mapping[str, Any] | Callable[[Mapping[str, Stamp]], Mapping[str, Any]]
"""Values by part, or a function that returns them from the sizes and SHA-256 of the files of tensors."""


def write(
    folder: Path,
    step: int,
    *,
    run_id: str,
    tensors: "Mapping[str, Mapping[str, Tensor]]",
    values: Values,
) -> Path:
    """Write ``folder/step-N``, which is then complete and durable, or does not exist.

        read(write(folder, step, run_id=run_id, tensors=tensors, values=values)) returns the same contents

    An existing valid checkpoint of this run is left as it is, whatever the arguments; an invalid one is replaced.
    Anything else of that name is renamed to ``step-N.kept``. Leftovers of killed processes are removed first.

    Args:
        folder: The folder of the checkpoints; its parent exists.
        step: Number of updates done.
        run_id: Identifier of the run; a checkpoint of another run is not overwritten.
        tensors: ``tensors["model"]`` becomes model.safetensors: plain tensors of any device, shape and strides, copied
            to the CPU one at a time. Tensors that share a storage are loaded as separate tensors.
        values: ``values["state"]`` becomes state.json, as `to_json` accepts it: floats to the last bit, str keys, no
            tuples. A function receives the sizes and SHA-256 of the files of tensors and returns the values.

    Returns:
        The folder of the checkpoint.

    Raises:
        TypeError, ValueError: A value would not survive a round trip; nothing was written.
        CheckpointError: The system failed to write it, or a checkpoint of another run exists; the message names the
            last valid checkpoint. Partly written files are removed where possible.
    """
    check_names(step, run_id)
    value_parts(values_after({}, values))  # an invalid value is reported before anything is written
    parts = _tensor_parts(tensors)
    target = folder / f"step-{step}"
    try:
        remove_leftovers(folder)
        if is_there(target, run_id):
            sync_folder(folder)
        else:
            folder.mkdir(exist_ok=True)
            _write_aside(target, parts, values, step=step, run_id=run_id)
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(failure(folder, target, "written to", error)) from error
    return target


def check_names(step: int, run_id: str) -> None:
    """Validate the step and the identifier of a run.

    Raises:
        ValueError: One is invalid.
    """
    if step < 0:
        raise ValueError(f"step={step} cannot be the number of updates done: pass 0 or more.")
    if not (run_id and run_id.isprintable()):
        raise ValueError(f"run_id={run_id!r} names no run: pass printable text.")


def values_after(stamps: Mapping[str, Stamp], values: Values) -> Mapping[str, Any]:
    """Return the values of a checkpoint whose files of tensors have these sizes and SHA-256."""
    return values(stamps) if callable(values) else values


def _tensor_parts(tensors: "Mapping[str, Mapping[str, Tensor]]") -> Parts:
    """Check tensors; return the functions that write them."""
    parts: dict[str, Callable[[HashedFile], None]] = {}
    if tensors:
        from bigbatch.lm.checkpoint.safetensors_file import check_tensors, write_tensors  # brings torch

        for name, named in tensors.items():
            check_tensors(name, named)
            parts[file_name(name, "safetensors")] = partial(write_tensors, tensors=named)
    return parts


def value_parts(values: Mapping[str, Any]) -> Parts:
    """Check values; return the functions that write them.

    Raises:
        TypeError, ValueError: JSON would change a value, or its name is not valid as a file name.
    """
    return {
        file_name(name, "json"): partial(HashedFile.write, data=to_json(name, value)) for name, value in values.items()
    }


def is_there(target: Path, run_id: str) -> bool:
    """Return whether a valid checkpoint of this run exists already.

    Raises:
        CheckpointError: A valid checkpoint of another run exists.
    """
    try:
        owner = verified(target).run_id
    except IntegrityError:
        return False
    if owner != run_id:
        raise CheckpointError(
            f"checkpoint {target} already exists and belongs to run {owner}, not to run {run_id}: remove it, or write "
            "to another folder."
        )
    return True


def _write_aside(target: Path, parts: Parts, values: Values, *, step: int, run_id: str) -> None:
    """Write step-N.partial, the values last, and rename it; remove it after any failure."""
    aside = target.with_name(target.name + PARTIAL)
    try:
        aside.mkdir()
        stamps = {name: write_file(aside / name, write_part) for name, write_part in parts.items()}
        later = value_parts(values_after(stamps, values))
        stamps |= {name: write_file(aside / name, write_part) for name, write_part in later.items()}
        complete(aside, target, stamps, step=step, run_id=run_id)
    except BaseException:
        with suppress(OSError):
            remove(aside)
        raise


def complete(aside: Path, target: Path, stamps: Mapping[str, Stamp], *, step: int, run_id: str) -> None:
    """Write the manifest of files that are on disk, rename their folder to ``target`` and sync the folder of both.

    Raises:
        OSError: A write, rename or sync failed; the folder may still have its old name.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    manifest = Manifest(version=__version__, step=step, run_id=run_id, written_at=now, files=stamps)
    write_file(aside / manifests.FILE, partial(HashedFile.write, data=manifest.to_bytes()))
    sync_folder(aside)
    set_aside(target, run_id)
    replace_folder(aside, target, old=target.with_name(f"{target.name}.deleted"))


def write_file(path: Path, write_part: Callable[[HashedFile], None]) -> Stamp:
    """Create a file, sync it to the disk, and return its size and SHA-256.

    Raises:
        OSError: The system failed to write it; a partly written file stays.
    """
    with new_file(path) as file:
        write_part(file)
    return file.stamp
