"""Trained models on disk for `generate` and `merge`: a whole model, or LoRA adapters with the model they belong to.

run, or a folder in it → `trained_folder` → `load_adapters`: adapters on their model, checked against the run
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bigbatch.cli.run_lookup import check_run
from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.hub import ADAPTER_CONFIG
from bigbatch.lm.files import read_json
from bigbatch.lm.runs.file_names import ADAPTER, IDENTITY, MODEL
from bigbatch.lm.runs.identity import read_identity

if TYPE_CHECKING:
    import torch


def trained_folder(run: Path) -> Path:
    """Return the folder of the adapters or the model of a run; ``run`` may also be such a folder itself.

    Raises:
        InputError: Neither was saved, or opening a file of it would block.
    """
    for folder in (run / ADAPTER, run / MODEL, run):
        if has_adapters(folder) or ((folder / "config.json").is_file() and any(folder.glob("*.safetensors"))):
            _check_files(folder)
            return folder
    check_run(run)
    raise InputError(
        f"{run} contains no trained model: a run saves it in {run / MODEL} when it ends, its LoRA adapters in "
        f"{run / ADAPTER}."
    )


def check_generates(folder: Path) -> None:
    """Raise if a model, or the one of adapters, scores or encodes texts and does not generate any.

    Raises:
        InputError: It does not, or its configuration cannot be read.
    """
    path = folder / (ADAPTER_CONFIG if has_adapters(folder) else "config.json")
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}.") from error
    settings = settings if isinstance(settings, dict) else {}
    kinds = [str(kind) for kind in (*(settings.get("architectures") or ()), settings.get("task_type"))]
    is_score = any(kind.endswith("ForSequenceClassification") or kind == "SEQ_CLS" for kind in kinds)
    if is_score or (folder / "modules.json").is_file():
        what = "scores texts (--objective reward)" if is_score else "encodes texts (--objective embedding)"
        raise InputError(f"the model in {folder} {what} and generates none.")


def has_adapters(folder: Path) -> bool:
    """Return whether a folder is one of adapters."""
    return (folder / ADAPTER_CONFIG).is_file()


def _check_files(folder: Path) -> None:
    """Raise if opening a file of a model would block."""
    for path in folder.iterdir():
        if not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is not a regular file: remove it.")


def load_adapters(folder: Path, *, base: str, dtype: "torch.dtype | Literal['auto']") -> Any:
    """Load the model of adapters with the adapters.

    If they are in a run directory, the weights of the model must be those that the run started with. This is checked
    for ``auto``, and for the dtype of the run; other dtypes round the weights in other ways.

    Args:
        folder: Of the adapters.
        base: Name of the model, from `bigbatch.lm.model.adapters.base_of`.
        dtype: As for `bigbatch.lm.model.adapters.load_adapted`.

    Raises:
        InputError: One of the two cannot be loaded, they do not fit each other, or the weights have changed.
    """
    import torch

    from bigbatch.lm.model.adapters import load_adapted
    from bigbatch.lm.model.pretrained import load_config

    facts = _facts_of(folder)
    if facts is None:
        return load_adapted(folder, base=base, dtype=dtype)
    of_run: torch.dtype = getattr(torch, facts["weights_dtype"].removeprefix("torch."))
    if dtype not in ("auto", of_run):
        return load_adapted(folder, base=base, dtype=dtype)
    adapted = load_adapted(folder, base=base, dtype=of_run)
    _check_weights(adapted, folder, base, facts)
    if dtype == of_run or load_config(base).dtype == of_run:
        return adapted
    del adapted
    return load_adapted(folder, base=base, dtype=dtype)


def _facts_of(folder: Path) -> Mapping[str, Any] | None:
    """Return what run-manifest.json says about the weights under the adapters in RUN/adapter; None if it does not."""
    run = folder.absolute().parent
    facts = read_identity(run).facts if folder.name == ADAPTER and (run / IDENTITY).is_file() else None
    return None if facts is None or facts.get("frozen_sha256") is None else facts


def _check_weights(adapted: Any, folder: Path, base: str, facts: Mapping[str, Any]) -> None:
    from bigbatch.lm.checkpoint.manager import frozen_fingerprint

    if frozen_fingerprint(adapted) != facts["frozen_sha256"]:
        raise InputError(
            f"the weights of {base} are not those that the adapters in {folder} were trained on. Restore them, or pass "
            "the right model with --model."
        )
