"""Text generation from a prompt, for validation samples and ``bigbatch generate``."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigbatch.errors import InputError
from bigbatch.lm.text import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE_MARKS = "Ġ▁"  # leading space of a token in byte-level and SentencePiece vocabularies


def prompt_tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str, *, model: Any, name: str) -> list[int]:
    """Encode a prompt with the special tokens of training; an empty one becomes the first token of a document.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: The text to continue.
        model: Its positions must leave room for at least one more token.
        name: Name of the prompt in the error message.

    Raises:
        InputError: The prompt uses every position of the model.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    tokens: list[int] = tokenizer(prompt, verbose=False)["input_ids"] or [first]
    positions = _positions(model)
    if positions is not None and len(tokens) >= positions:
        raise InputError(
            f"{name} has {plural(len(tokens), 'token')} and the model supports {plural(positions, 'position')}: "
            "shorten it to leave room for new tokens."
        )
    return tokens


@torch.no_grad()
def generate_text(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    streamer: Any = None,
) -> str:
    """Continue a prompt, at most up to the last position of the model.

    Args:
        model: A transformers causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: The text to continue.
        max_new_tokens: Maximum number of new tokens.
        temperature: 0 selects the most likely token; higher values are more random.
        top_k: Sample from this many most likely tokens; 0 from all.
        streamer: A transformers streamer that receives the tokens as they are generated.

    Returns:
        The prompt and its continuation, without special tokens.

    Raises:
        InputError: The prompt uses every position of the model.
    """
    tokens, first = _without_last_space(
        tokenizer, prompt, prompt_tokens(tokenizer, prompt, model=model, name="the prompt")
    )
    output = continue_tokens(
        model,
        tokenizer,
        tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        streamer=streamer,
        logits_processor=[] if first is None else [_FirstToken(first, len(tokens), model.device)],
    )
    return str(tokenizer.decode(output, skip_special_tokens=True))


@torch.no_grad()
def continue_tokens(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    tokens: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    **options: Any,
) -> list[int]:
    """Continue tokens, at most up to the last position of the model; ``options`` are for ``model.generate``."""
    input_ids = torch.tensor([tokens], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    fitting = max_fitting(model, len(tokens))
    output_ids: Tensor = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens if fitting is None else min(max_new_tokens, fitting),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **sampling,
        **options,
    )
    found: list[int] = output_ids[0].tolist()
    return found


def max_fitting(model: Any, num_tokens: int) -> int | None:
    """Return how many tokens fit after ``num_tokens``; None if the model has no fixed number of positions."""
    positions = _positions(model)
    return None if positions is None else positions - num_tokens


class _FirstToken:
    """Logits processor that restricts the first token after the prompt to ``allowed``."""

    def __init__(self, allowed: list[int], num_prompt_tokens: int, device: torch.device) -> None:
        self._allowed = torch.tensor(allowed, device=device)
        self._num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self._num_prompt_tokens:
            return scores
        return torch.full_like(scores, -torch.inf).index_copy(1, self._allowed, scores[:, self._allowed])


def _without_last_space(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, tokens: list[int]
) -> tuple[list[int], list[int] | None]:
    """Return the prompt's tokens, and the tokens allowed after them; None for any.

    Tokens of words include the space before them, so a model has hardly seen tokens that end in a single space: the
    word after "def " starts with it. The space is removed, and the first new token has to start with one.
    """
    if not prompt.endswith(" ") or prompt.endswith("  ") or not prompt.strip():
        return tokens, None
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    with_space = [token for token, piece in enumerate(pieces) if piece and piece[0] in SPACE_MARKS and len(piece) > 1]
    shorter: list[int] = tokenizer(prompt[:-1], verbose=False)["input_ids"]
    return (shorter, with_space) if with_space and len(shorter) < len(tokens) else (tokens, None)


def _positions(model: Any) -> int | None:
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    return positions
