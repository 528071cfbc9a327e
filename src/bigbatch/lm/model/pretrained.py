"""The model: a tiny Llama from a config, or any causal language model that transformers loads; LoRA through peft."""

import copy
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.hub import is_local
from bigbatch.lm.files import PARTIAL, replace_folder, sync_folder
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
    """Make a Llama of about 2.5 million float32 parameters with random weights.

    Args:
        tokenizer: Gives the vocabulary's size and the special tokens.
        max_length: Positions that the model can tell apart, at least 1,024.
        seed: Decides the weights; the caller's random state is left as it was.
    """
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(tokenizer, max_length=max_length))


def tiny_config(tokenizer: "PreTrainedTokenizerBase", *, max_length: int) -> Any:
    """Make the configuration of `tiny_model`."""
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
    """Load the configuration of a model from a folder or by its name; its weights need not be there.

    Raises:
        InputError: There is none, or it is not one of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=is_local(name))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} has no configuration that transformers knows: {first_line(error)}.") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(f"{name} is a {config.model_type} model, which is no causal language model.")
    return config


def model_from_config(config: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Make the model of a configuration, with random weights; on the device ``meta`` it has none, and no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_model(name: str, *, dtype: torch.dtype) -> "PreTrainedModel":
    """Load a causal language model from a folder or by its name, without running code that comes with it.

    Raises:
        InputError: There is no such model, it is not a causal language model, or its weights are not whole.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=is_local(name),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one sentence and not in a table
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} does not load as a causal language model: {first_line(error)}.") from error
    _check_whole(name, found)
    return model


def _check_whole(name: str, found: dict[str, Any]) -> None:
    """Refuse weights that do not fit the configuration: transformers would fill in random numbers."""
    missing, mismatched = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    problem = f"{name} does not load as a causal language model: its weights"
    if mismatched:
        key, theirs, ours = mismatched[0]
        raise InputError(
            f"{problem} have another shape than its configuration in {plural(len(mismatched), 'tensor')}, such as "
            f"{key}: {list(theirs)} and not {list(ours)}."
        )
    if missing:
        raise InputError(f"{problem} lack {plural(len(missing), 'tensor')}, such as {missing[0]}.")


def add_lora(model: "PreTrainedModel", *, rank: int, alpha: float, seed: int) -> Any:
    """Freeze the weights and put trainable low-rank adapters on every linear layer but the head.

    Source: Hu et al., "LoRA", 2021, section 4, as peft implements it.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2's linear layers
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers, about names of theirs
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def save_model(model: Any, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write an ordinary model folder with its tokenizer; LoRA adapters are merged into a copy of the weights.

    Written to ``NAME.partial``, synced and renamed, so that a folder of that name is always complete. An existing one
    is renamed first and removed last.
    """
    aside, older = (folder.with_name(folder.name + ending) for ending in (PARTIAL, ".older"))
    for left_over in (aside, older):
        shutil.rmtree(left_over, ignore_errors=True)
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for path in (*aside.rglob("*"), aside):
        sync_folder(path)
    replace_folder(aside, folder, old=older)
