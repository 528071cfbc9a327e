"""The weights of a model on the meta device: where their values are, and each rank's shards of them.

files of a model folder, or a model on the CPU → slices → `load_shards`: parameters of a sharded model
"""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.hub import is_local
from bigbatch.lm.model.meta_model import copy_to_meta, meta_model_from_config, replace_parameters
from bigbatch.lm.model.pretrained import load_config, load_model

Region = tuple[slice, ...]
SAMPLED_ELEMENTS = 1024  # of each tensor: enough to distinguish two models of one shape, without reading them


class Weights:
    """The values of a model's parameters, which are read slice by slice.

    Args:
        tensors: By their names in the model: tensors, or what `safetensors.safe_open(...).get_slice` returns.
        files: Open files that these need.
    """

    def __init__(self, tensors: Mapping[str, Any], files: ExitStack | None = None) -> None:
        self._tensors = dict(tensors)
        self._files = files or ExitStack()
        self._fingerprint: str | None = None

    def read(self, name: str, region: Region) -> Tensor:
        """Return a slice of a tensor, on the CPU; only its own bytes are read."""
        found: Tensor = self._tensors[name][region]
        return found

    def read_whole(self, name: str) -> Tensor:
        """Return a tensor, on the CPU."""
        return self.read(name, (slice(None),) * len(_shape_of(self._tensors[name])))

    def rename(self, names: Mapping[str, str]) -> None:
        """Keep the tensors of a model that now has other names for them, ``{new name: old name}``."""
        self._tensors = {new: self._tensors[old] for new, old in names.items()}
        self._fingerprint = None

    def fingerprint(self) -> str:
        """Return a SHA-256, in hex, of the names, shapes and first elements of all tensors.

        It differs for two models of one shape unless they agree in the first elements of every tensor. Computed once.
        """
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            shape = _shape_of(self._tensors[name])
            digest.update(f"{name} {shape}".encode())
            if shape and 0 not in shape:
                width = torch.Size(shape[1:]).numel()
                rows = self.read(name, (slice(0, max(1, SAMPLED_ELEMENTS // width)),))
                first = rows.flatten()[:SAMPLED_ELEMENTS].clone()
                digest.update(first.view(torch.uint8).numpy().tobytes())
        self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def close(self) -> None:
        """Close the files and free the tensors."""
        self._tensors = {}
        self._files.close()


def empty_model(name: str, *, dtype: torch.dtype) -> tuple[Any, Weights]:
    """Build a causal language model without its weights, with what `load_shards` loads them from.

    The weights stay in the safetensors files of the folder where these contain the model's tensors under its own
    names. Otherwise, such as where transformers merges the experts of a mixture into one tensor, the whole model is
    loaded on the host, but not on the device.

    Raises:
        InputError: As `bigbatch.lm.model.pretrained.load_model` raises it.
    """
    config = load_config(name)
    if _has_plain_weights(config):
        model = meta_model_from_config(config, dtype=dtype)
        weights = _open_files(name, model, dtype)
        if weights is not None:
            _load_generation_config(model, name)
            return model, weights
    return empty_copy(load_model(name, dtype=dtype))


def empty_copy(model: Any) -> tuple[Any, Weights]:
    """Copy a model on the CPU without its weights, which stay there."""
    return copy_to_meta(model), Weights({name: p.detach() for name, p in model.named_parameters()})


def _has_plain_weights(config: Any) -> bool:
    """Return whether transformers would build the model from this configuration alone, unquantized."""
    quantized = getattr(config, "quantization_config", None) is not None
    return not quantized and config.get_text_config() is config


def _open_files(name: str, model: Any, dtype: torch.dtype) -> Weights | None:
    """Open the files of a model and fill its buffers; None where they do not contain its tensors as they are."""
    from safetensors import SafetensorError, safe_open

    with ExitStack() as files:
        found: dict[str, Any] = {}
        try:
            for path in _files_of(name):
                file = files.enter_context(safe_open(path, framework="pt"))
                found.update((tensor, file.get_slice(tensor)) for tensor in file.keys())  # noqa: SIM118, no mapping
        except (OSError, SafetensorError):
            return None  # load_model says why
        weights = _matching(model, found)
        if weights is None or _is_converted(model, dtype):
            return None
        for buffer_name, buffer in model.named_buffers():
            if buffer_name in found:
                buffer.copy_(found[buffer_name][:] if buffer.ndim else found[buffer_name][...])
        return Weights(weights, files.pop_all())


def _files_of(name: str) -> list[Path]:
    """Return the safetensors files of a model, after downloading those of one from the hub; none if it has none."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    def find(file: str) -> str | None:
        with suppress(OSError):
            found: str | None = cached_file(name, file, local_files_only=is_local(name))
            return found
        return None

    if Path(name, "adapter_config.json").exists() or find("adapter_config.json") is not None:
        return []  # transformers would load another model and put these adapters on it
    if (single := find(SAFE_WEIGHTS_NAME)) is not None:
        return [Path(single)]
    if (index := find(SAFE_WEIGHTS_INDEX_NAME)) is None:
        return []
    paths, _ = get_checkpoint_shard_files(name, index, local_files_only=is_local(name))
    return [Path(path) for path in paths]


def _matching(model: Any, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Match parameters and saved buffers with tensors of the files by name and shape; None unless all match once."""
    aliases: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        aliases.setdefault(tensor, []).append(name)
    weights = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for tensor, named in aliases.items():
        held = [name for name in named if name in found]
        if len(held) != 1 or _shape_of(found[held[0]]) != tuple(tensor.shape):
            return None
        if isinstance(tensor, nn.Parameter):
            weights[names[tensor]] = found[held[0]]
    return weights


def _is_converted(model: Any, dtype: torch.dtype) -> bool:
    """Return whether transformers computes the tensors of this model from those in its files, or keeps some wider."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    wider = any(getattr(model, f"_keep_in_fp32_modules{kind}", None) for kind in ("", "_strict"))
    converted = any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(model))
    return converted or (wider and dtype in (torch.float16, torch.bfloat16))


def _load_generation_config(model: Any, name: str) -> None:
    """Load the settings of generation that a model folder has besides its weights."""
    from transformers import GenerationConfig

    if model.can_generate():
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(name, local_files_only=is_local(name))


@torch.no_grad()
def load_shards(model: nn.Module, weights: Weights, device: torch.device) -> None:
    """Put this rank's shards into a model that was sharded on the meta device, then close its weights.

    Reads and allocates the shards alone, on the device one tensor at a time. Parameters that have values, such as
    adapters, stay as they are.

    Args:
        model: With `fully_shard` applied to it; its parameters on the meta device are those of ``weights``.
        weights: By the names of the model's parameters.
        device: Where the shards go.

    Raises:
        InputError: A file can no longer be read, or the shards do not fit on the device.
    """
    loaded: dict[nn.Parameter, nn.Parameter] = {}
    try:
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                loaded[parameter] = _load_shard(name, parameter, weights, device)
    except Exception as error:
        raise InputError(f"the weights of the model cannot be loaded onto {device}: {first_line(error)}.") from error
    finally:
        weights.close()
    replace_parameters(model, loaded)


def _load_shard(name: str, parameter: nn.Parameter, weights: Weights, device: torch.device) -> nn.Parameter:
    shard, local, region = empty_shard(parameter, device)
    if local.numel():
        local.copy_(weights.read(name, region))
    return shard


def empty_shard(parameter: Any, device: torch.device) -> tuple[nn.Parameter, Tensor, Region]:
    """Allocate this rank's shard of a parameter; return it, its local values, and their place in the whole tensor."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    local = torch.empty(shape, dtype=parameter.dtype, device=device)
    shard = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    region = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    return nn.Parameter(shard, requires_grad=parameter.requires_grad), local, region


def _shape_of(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a tensor or of an open slice of a file."""
    return tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())
