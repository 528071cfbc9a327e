"""Text that goes on from a prompt: what a validation shows, and what ``bigbatch generate`` prints."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigbatch.errors import InputError
from bigbatch.lm.text import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE_MARKS = "Ġ▁"  # how byte-level and SentencePiece vocabularies write a space at the beginning of a token


def prompt_tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str, *, model: Any, name: str) -> list[int]:
    """Encode a prompt as training began a text: an empty one is the token that documents begin with.

    Args:
        tokenizer: Of the model.
        prompt: The text to go on from.
        model: Its positions must leave room for at least one token more.
        name: What the user calls the prompt, for the message.

    Raises:
        InputError: The prompt fills the model.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    tokens: list[int] = tokenizer(prompt, verbose=False)["input_ids"] or [first]
    positions = _positions(model)
    if positions is not None and len(tokens) >= positions:
        raise InputError(
            f"{name} has {plural(len(tokens), 'token')} and the model knows {plural(positions, 'position')}: "
            "shorten it, so that there is room to go on."
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
    """Write on from a prompt, at most to the end of the model's positions.

    Args:
        model: A transformers causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: The text to go on from.
        max_new_tokens: Tokens to write at most.
        temperature: 0 takes the likeliest token; higher is freer.
        top_k: Choose among that many likeliest tokens; 0 among all.
        streamer: A transformers streamer that is given the tokens as they come.

    Returns:
        The prompt and what follows it, without special tokens.

    Raises:
        InputError: The prompt fills the model.
    """
    tokens, first = _without_last_space(
        tokenizer, prompt, prompt_tokens(tokenizer, prompt, model=model, name="the prompt")
    )
    room = (_positions(model) or len(tokens) + max_new_tokens) - len(tokens)
    input_ids = torch.tensor([tokens], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    written = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=min(max_new_tokens, room),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        streamer=streamer,
        logits_processor=[] if first is None else [_FirstToken(first, len(tokens), model.device)],
        **sampling,
    )
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


class _FirstToken:
    """Lets only some tokens follow the prompt; a logits processor of transformers."""

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
    """Give the prompt's tokens, and those that may come first after them; None for any.

    Words bring the space before them, so a model has hardly seen a token that ends in one space: the word after "def "
    begins with it. The space is taken off, and the first token has to begin with it.
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
