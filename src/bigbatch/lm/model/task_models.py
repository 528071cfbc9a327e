"""Models of the objectives: a language model, one with a head that scores a text, or one that returns hidden states.

sft, dpo    AutoModelForCausalLM
reward      AutoModelForSequenceClassification with one label, whose head is new unless the folder has one
embedding   AutoModel
"""

from typing import Any, Literal

import torch

from bigbatch.errors import InputError, first_line
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.hub import is_local
from bigbatch.lm.data.tokenizer import AnyTokenizer
from bigbatch.lm.model.pretrained import load_model, tiny_config, tiny_model
from bigbatch.lm.text import plural

PEFT_TASKS = {"sft": "CAUSAL_LM", "dpo": "CAUSAL_LM", "reward": "SEQ_CLS", "embedding": "FEATURE_EXTRACTION"}
AUTO_CLASSES = {
    "sft": "AutoModelForCausalLM",
    "dpo": "AutoModelForCausalLM",
    "reward": "AutoModelForSequenceClassification",
    "embedding": "AutoModel",
}


def make_tiny(tokenizer: AnyTokenizer, config: TrainConfig) -> Any:
    """Create the tiny model of an objective with random weights."""
    assert config.max_length is not None, "resolved() gives it a value"
    if config.generates_text:
        return tiny_model(tokenizer, max_length=config.max_length, seed=config.seed)
    settings = task_settings(config.objective, tiny_config(tokenizer, max_length=config.max_length))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return auto_class(config.objective).from_config(settings)


def load_task_model(
    name: str, objective: str, *, dtype: "torch.dtype | Literal['auto']", seed: int = 0, pad_id: int | None = None
) -> Any:
    """Load the model of an objective from a folder or by its name, without running code of the model.

    The global random state is unchanged.

    Args:
        name: Of the model.
        objective: Of the run.
        dtype: Of the weights.
        seed: Of the weights of a head that the folder lacks.
        pad_id: Token that pads rows, which a reward model must know to find the end of a text.

    Raises:
        InputError: It does not exist, is not of the kind, or has missing or mismatched weights.
    """
    if AUTO_CLASSES[objective] == "AutoModelForCausalLM":
        return load_model(name, dtype=dtype)
    kind = auto_class(objective)
    settings: dict[str, Any] = {"num_labels": 1} if objective == "reward" else {}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, found = kind.from_pretrained(
                name,
                dtype=dtype,
                trust_remote_code=False,
                local_files_only=is_local(name),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with a one-line message
                **settings,
            )
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} does not load as {AUTO_CLASSES[objective]}: {first_line(error)}.") from error
    _check_weights(name, objective, model, found)
    if objective == "reward":
        model.config.get_text_config().pad_token_id = pad_id
    return model


def _check_weights(name: str, objective: str, model: Any, found: dict[str, Any]) -> None:
    """Raise if weights of the body are missing, or any has another shape."""
    problem = f"{name} does not load as {AUTO_CLASSES[objective]}: its weights"
    if mismatched := sorted(found["mismatched_keys"]):
        key, stored, expected = mismatched[0]
        raise InputError(
            f"{problem} have another shape in {plural(len(mismatched), 'tensor')}, such as {key}: {list(stored)} and "
            f"not {list(expected)}."
        )
    prefix = f"{model.base_model_prefix}."
    of_body = [
        key
        for key in sorted(found["missing_keys"])
        if (key.startswith(prefix) if objective == "reward" else not key.startswith("pooler."))
    ]
    if of_body:
        raise InputError(f"{problem} lack {plural(len(of_body), 'tensor')}, such as {of_body[0]}.")


def task_model_from_config(objective: str, settings: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Create the model of an objective with random weights; on ``meta`` without weights or memory."""
    with torch.device(device):
        return auto_class(objective).from_config(task_settings(objective, settings), dtype=dtype)


def task_settings(objective: str, settings: Any) -> Any:
    """Return the configuration of a model for an objective."""
    if objective == "reward":
        settings.num_labels = 1
        text = settings.get_text_config()
        text.pad_token_id = 0 if text.pad_token_id is None else text.pad_token_id
    return settings


def auto_class(objective: str) -> Any:
    """Return the class of transformers that loads the models of an objective."""
    import transformers

    return getattr(transformers, AUTO_CLASSES[objective])
