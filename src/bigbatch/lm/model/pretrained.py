"""Create, load and save models: a tiny Llama, or any causal language model of transformers."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.hub import is_local
from bigbatch.lm.files import PARTIAL, remove, replace_folder, sync_folder
from bigbatch.lm.text import plural

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY = "tiny"
TINY_VOCABULARY = 4096
TINY_SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "initializer_range": 0.05,  # ends 0.4 nats lower than the usual 0.02: docs/explanation/decisions.md
}


def tiny_model(tokenizer: "PreTrainedTokenizerBase", *, max_length: int, seed: int) -> "PreTrainedModel":
    """Create a Llama of about 2.5 million float32 parameters with random weights.

    Args:
        tokenizer: Determines the vocabulary size and the special tokens.
        max_length: Number of positions, raised to at least 1,024.
        seed: Seed of the weights; the global random state is unchanged.
    """
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(tokenizer, max_length=max_length))


def tiny_config(tokenizer: "PreTrainedTokenizerBase", *, max_length: int) -> Any:
    """Create the configuration of `tiny_model`."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **TINY_SHAPE,
        vocab_size=len(tokenizer),
        max_position_embeddings=max(max_length, 1024),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def load_config(name: str) -> Any:
    """Load the configuration of a model from a folder or by its name, without its weights.

    Raises:
        InputError: It does not exist, or is not that of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=is_local(name))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} has no configuration that transformers supports: {first_line(error)}.") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(f"{name} is a {config.model_type} model, which is not a causal language model.")
    return config


def model_from_config(config: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Create the model of a configuration with random weights; on ``meta`` without weights or memory."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_model(name: str, *, dtype: torch.dtype | Literal["auto"]) -> "PreTrainedModel":
    """Load a causal language model from a folder or by its name, without running code of the model.

    Raises:
        InputError: It does not exist, is not a causal language model, or has missing or mismatched weights.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=is_local(name),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with a one-line message
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} does not load as a causal language model: {first_line(error)}.") from error
    _check_weights(name, found)
    return model


def _check_weights(name: str, found: dict[str, Any]) -> None:
    """Raise if weights do not match the configuration: transformers would initialize them randomly."""
    missing, mismatched = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    problem = f"{name} does not load as a causal language model: its weights"
    if mismatched:
        key, stored, expected = mismatched[0]
        raise InputError(
            f"{problem} have another shape than its configuration in {plural(len(mismatched), 'tensor')}, such as "
            f"{key}: {list(stored)} and not {list(expected)}."
        )
    if missing:
        raise InputError(f"{problem} lack {plural(len(missing), 'tensor')}, such as {missing[0]}.")


def save_model(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    *,
    write_more: Callable[[Path], object] | None = None,
) -> None:
    """Save a model and its tokenizer as a transformers folder; LoRA adapters are merged into a copy of the weights.

    ``write_more`` writes more files into the folder before it gets its name.
    """
    with save_folder(folder) as partial:
        if hasattr(model, "merge_and_unload"):
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if write_more is not None:
            write_more(partial)


@contextmanager
def save_folder(folder: Path) -> Iterator[Path]:
    """Yield the name of a temporary folder to write; after the block it is synced to disk and renamed to ``folder``.

    So a folder of that name is always complete; an older one is renamed before and removed afterwards. A link at any
    of these names is replaced, not followed.
    """
    partial, older = (folder.with_name(folder.name + ending) for ending in (PARTIAL, ".older"))
    for stale in (partial, older):
        remove(stale)
    yield partial
    for path in (*partial.rglob("*"), partial):
        sync_folder(path)
    replace_folder(partial, folder, old=older)
