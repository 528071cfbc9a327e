"""New models from a configuration: random weights, initialized by the model's own code under the seed of the run.

config.json → checked against the tokenizer, whose special tokens it gets → model on the CPU, in float32 → its dtype
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bigbatch.errors import InputError, first_line
from bigbatch.lm.model.parallel_fills import filled_in_parallel
from bigbatch.lm.model.pretrained import load_config, model_from_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_SERIAL = 2**26
"""Weights that one thread fills, in the values of ``from_config`` after ``torch.manual_seed``: in about a second."""


def new_model_config(path: str, tokenizer: "PreTrainedTokenizerBase", *, tokenizer_name: str) -> Any:
    """Load the configuration of a new model, with the special tokens of its tokenizer.

    A padding token that also begins or ends documents is left out: models do not train the embedding of theirs.

    Args:
        path: A config.json, or a folder with one.
        tokenizer: With which the model is trained.
        tokenizer_name: In messages.

    Raises:
        InputError: It cannot be used, or has fewer tokens than the tokenizer.
    """
    config = load_config(path)
    text_config = config.get_text_config()
    if len(tokenizer) > text_config.vocab_size:
        raise InputError(
            f"--tokenizer {tokenizer_name} has {len(tokenizer):,} tokens, more than the vocab_size "
            f"{text_config.vocab_size:,} of --model-config {path}: set vocab_size to {len(tokenizer)} or more, or pass "
            "a smaller tokenizer."
        )
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    pad = None if tokenizer.pad_token_id in used else tokenizer.pad_token_id
    for part in {id(part): part for part in (config, text_config)}.values():
        part.bos_token_id, part.eos_token_id, part.pad_token_id = *used, pad
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # of trained weights
    return config


def new_model(config: Any, *, name: str, dtype: torch.dtype, seed: int) -> Any:
    """Create the model of a configuration on the CPU; the same values in every dtype, but for rounding.

    Up to `MOST_SERIAL` weights have the values that transformers gives them after ``torch.manual_seed(seed)``. Those of
    larger models are drawn by several threads, whose number makes no difference. The random state is restored.

    Args:
        config: From `new_model_config`.
        name: Of the configuration, in messages.
        dtype: Of the weights.
        seed: Of their values.

    Raises:
        InputError: The configuration describes no model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            make = partial(model_from_config, config, dtype=torch.float32)
            num_weights = sum(parameter.numel() for parameter in make(device=torch.device("meta")).parameters())
            on_cpu = partial(make, device=torch.device("cpu"))
            model = on_cpu() if num_weights <= MOST_SERIAL else filled_in_parallel(on_cpu, seed)
        except Exception as error:
            raise InputError(f"the configuration of {name} makes no model: {first_line(error)}.") from error
    for parameter in model.parameters():  # not the buffers: frequencies of rotary embeddings stay in float32
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model
