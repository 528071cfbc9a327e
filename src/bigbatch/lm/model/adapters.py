"""LoRA adapters through peft: add them to a model, save them without its weights, load and merge them.

model → `add_lora` → trained → `save_adapters`: adapter_config.json, adapter_model.safetensors, tokenizer
                                         base model → `load_adapted` → `merge_adapters`: a whole model folder
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from bigbatch.errors import BigbatchError, InputError, first_line
from bigbatch.lm.config.field_types import ALL_LINEAR
from bigbatch.lm.data.hub import ADAPTER_CONFIG, close_matches, looks_local
from bigbatch.lm.files import read_json
from bigbatch.lm.model.pretrained import save_folder
from bigbatch.lm.model.task_models import PEFT_TASKS, load_task_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling", "2_Normalize")
"""What makes a folder of transformers one of sentence-transformers."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base_model_name_or_path"  # entry of the configuration


def add_lora(
    model: "PreTrainedModel",
    *,
    rank: int,
    alpha: float,
    seed: int,
    targets: str | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    task: str = "CAUSAL_LM",
) -> Any:
    """Freeze the weights and add trainable low-rank adapters to linear layers.

        y = W·x + s·B·A·dropout(x),   s = alpha / rank,   or alpha / √rank with ``rslora``

    Sources: Hu et al., "LoRA", 2021, section 4; Kalajdzievski, "Rank-stabilized LoRA", 2023; Liu et al., "DoRA", 2024,
    section 4; implemented by peft. Adapters start with B = 0: the model is unchanged.

    Args:
        model: A transformers language model.
        rank: Of the adapters.
        alpha: Numerator of the scaling.
        seed: Of A.
        targets: Comma-separated names of linear layers, each matched with the end of their full names at a dot. None,
            or all-linear: every linear layer but the output layer.
        dropout: Rate for the inputs of the adapters.
        rslora: See above.
        dora: Whether to train the norms of the rows of W + s·B·A too.
        task: peft's name of what the model is for. Of ``SEQ_CLS``, the head is trained whole.

    Raises:
        InputError: A name in ``targets`` matches no linear layer, or one whose weight another layer has too.
        ValueError: peft does not support the model.
    """
    from peft import LoraConfig, get_peft_model

    names = None if targets in (None, ALL_LINEAR) else targets.split(",")
    if names is not None:
        check_targets(model, names)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=ALL_LINEAR if names is None else names,
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        task_type=task,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2's linear layers
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about names shared by peft and transformers
        warnings.filterwarnings("ignore", message=".* keys did not match any targeted module")  # see expert_notes
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft corrects it for each layer
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def check_targets(model: nn.Module, targets: Iterable[str]) -> None:
    """Check that each target is the end of the name of a linear layer; peft ignores those that match nothing.

    Raises:
        InputError: One matches none, or a layer whose weight is that of another module too.
    """
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    owners: dict[Tensor, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(name)
    for target in targets:
        matched = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matched:
            known = dict.fromkeys(name.rpartition(".")[2] for name in linear)
            raise InputError(
                f"--lora-targets {target} is not the name of a linear layer of this {type(model).__name__}. Its linear "
                f"layers are {', '.join(known)}."
            )
        for name in matched:
            own = next(linear[name].parameters(recurse=False))  # the weight, or its codes in 4 bits
            others = sorted(owners[own] - {name})
            if others:
                raise InputError(
                    f"--lora-targets {target}: the weight of {name} is also that of {others[0]}, which has no adapter, "
                    "so the two could not be merged. Leave it out."
                )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def save_adapters(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    *,
    base: str,
    state: Mapping[str, Tensor] | None = None,
    write_more: Callable[[Path], object] | None = None,
) -> None:
    """Save the adapters of a model and its tokenizer as a folder for ``PeftModel.from_pretrained``, atomically.

    Args:
        model: What `add_lora` returned.
        tokenizer: Of the model.
        folder: As for `bigbatch.lm.model.pretrained.save_model`.
        base: Name of the model without adapters; recorded as an absolute path if it is a folder.
        state: The trained parameters by name; None for those of the model.
        write_more: Writes more files into the folder before it gets its name.
    """
    where = Path(base)
    recorded = str(where.absolute()) if where.is_dir() else base
    with save_folder(folder) as partial:
        # Adapters alone: for a decision about embeddings peft would load the configuration of the base, or ask the hub.
        model.save_pretrained(partial, state_dict=state, save_embedding_layers=False)
        path = partial / ADAPTER_CONFIG
        settings = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(settings["target_modules"], list):  # written from a set, whose order varies
            settings["target_modules"].sort()
        path.write_text(json.dumps({**settings, BASE: recorded}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(partial)
        if write_more is not None:
            write_more(partial)


def base_of(folder: Path, given: str | None = None) -> str:
    """Return the name of the model that adapters were trained on.

    Args:
        folder: Of the adapters.
        given: A name to return instead of the recorded one.

    Raises:
        InputError: The configuration of the adapters cannot be read, they are not LoRA adapters, or their model does
            not exist.
    """
    path = folder / ADAPTER_CONFIG
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}.") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise InputError(f"{path} is not the configuration of LoRA adapters: its peft_type is {kind}.")
    base = settings.get(BASE) if given is None else given
    if not isinstance(base, str) or not base:
        raise InputError(f"{path} does not name the model of its adapters: pass it with --model.")
    if not Path(base).is_dir() and looks_local(base):
        if given is None:
            raise InputError(
                f"the model {base}, on which the adapters in {folder} were trained, does not exist: pass its folder "
                "with --model."
            )
        near = close_matches(base)
        raise InputError(f"--model {base} does not exist{f': did you mean {near[0]}?' if near else '.'}")
    return base


def objective_of(folder: Path) -> str:
    """Return the objective that adapters were trained for, by their configuration; sft for dpo, too."""
    task = read_json(folder / ADAPTER_CONFIG).get("task_type")
    return next((name for name, of_peft in PEFT_TASKS.items() if of_peft == task), "sft")


def load_adapted(folder: Path, *, base: str, dtype: torch.dtype | Literal["auto"]) -> Any:
    """Load a model with the adapters of a folder, in evaluation mode; gradients are those of the adapters alone.

    Args:
        folder: Of the adapters.
        base: Name of the model without adapters.
        dtype: Of its weights; auto = as they are stored.

    Raises:
        InputError: One of the two cannot be loaded, or the adapters do not fit the model.
    """
    from peft import PeftModel

    model = load_task_model(base, objective_of(folder), dtype=dtype)
    problem = f"the adapters in {folder} do not fit the model {base}"
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True, local_files_only=True)
    except Exception as error:  # whatever peft and safetensors raise for files that are damaged or of another model
        raise InputError(f"{problem}: {_reason(error)}.") from error
    for message in map(str, (warning.message for warning in found)):
        if "missing adapter keys" in message:
            raise InputError(f"{problem}: {ADAPTER_WEIGHTS} lacks tensors of the adapters.")
    return adapted.eval()


def _reason(error: Exception) -> str:
    """Return the line of an error that says what is wrong: of a load_state_dict, the first problem."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    listed = len(lines) > 1 and lines[0].startswith("Error(s) in loading state_dict")
    return lines[1].rstrip(".") if listed else first_line(error)


def merge_adapters(
    adapted: Any, tokenizer: "PreTrainedTokenizerBase", folder: Path, *, source: Path | None = None
) -> None:
    """Add adapters to the weights of their model, in its dtype, and save it as a transformers folder, atomically.

    Args:
        adapted: From `load_adapted`; it has no adapters afterwards.
        tokenizer: Of the model.
        folder: As for `bigbatch.lm.model.pretrained.save_model`.
        source: Folder of the adapters, whose files for sentence-transformers are copied; None for none.

    Raises:
        BigbatchError: The merged weights are not finite.
    """
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise BigbatchError(f"the adapters cannot be merged: {first_line(error)}.") from error
    with save_folder(folder) as partial:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for path in () if source is None else (source / name for name in SENTENCE_FILES):
            if path.is_dir():
                shutil.copytree(path, partial / path.name)
            elif path.is_file():
                shutil.copy(path, partial / path.name)


@torch.no_grad()
def set_trained_copies(model: nn.Module, read: Mapping[nn.Parameter, Any]) -> None:
    """Set the copies of modules that are trained whole, such as a head, to weights that are not in the model yet.

    Args:
        model: What `add_lora` returned.
        read: As for `set_magnitudes`.
    """
    for module in model.modules():
        copies = getattr(module, "modules_to_save", None)  # of the model itself, a set of names
        for copied in copies.values() if isinstance(copies, nn.ModuleDict) else ():
            original: Any = module.original_module
            for parameter, trained in zip(original.parameters(), copied.parameters(), strict=True):
                trained.copy_(read[parameter]())


@torch.no_grad()
def set_magnitudes(model: nn.Module, read: Mapping[nn.Parameter, Any]) -> None:
    """Set the norms that DoRA trains to those of weights that are not in the model yet.

    Args:
        model: What `add_lora` returned, with ``dora``.
        read: By parameter of the model, a function without arguments that returns its values on the CPU.
    """
    for module in model.modules():
        for adapter, magnitude in (getattr(module, "lora_magnitude_vector", None) or {}).items():
            base: Any = module.get_base_layer()  # type: ignore[operator]
            weight = read[base.weight]().to(base.weight.dtype)
            down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight  # type: ignore[index, union-attr]
            update = (up @ down).to(weight.dtype)
            norm = magnitude.get_weight_norm(weight, update, module.scaling[adapter])  # type: ignore[index]
            magnitude.weight.copy_(norm)
