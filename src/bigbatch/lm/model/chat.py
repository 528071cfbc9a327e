"""Answers of a model in a conversation: the chat template's prompt, streamed text, the end of the assistant's turn.

messages → chat template, as in training → tokens → model → characters of the answer, as soon as they are complete
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigbatch.errors import InputError
from bigbatch.lm.data.conversations import ConversationRenderer
from bigbatch.lm.data.lost_content import lost_part
from bigbatch.lm.model.generation import continue_tokens, max_fitting
from bigbatch.lm.text import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "zq7answer", "zq7question"  # contents that no template has in it
_INCOMPLETE = "\ufffd"  # decoded from bytes that are no whole character

Message = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """An answer of a model.

    Attributes:
        text: Without the end mark of the turn.
        num_tokens: Tokens generated, the end included.
        is_complete: Whether the model ended it; False if the largest number of tokens, or of positions, did.
    """

    text: str
    num_tokens: int
    is_complete: bool


class ChatModel:
    """A model that answers conversations, with the chat template of its tokenizer.

    Args:
        model: A transformers causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        name: Of the model, for messages.

    Raises:
        InputError: The tokenizer has no chat template.
    """

    def __init__(self, model: Any, tokenizer: "PreTrainedTokenizerBase", *, name: str) -> None:
        if not tokenizer.chat_template:
            raise InputError(
                f"{name} has no chat template, so it cannot chat: pass the text to continue as PROMPT, or train with "
                "--chat-template."
            )
        self._model = model
        self._tokenizer = tokenizer
        self._renderer = ConversationRenderer(tokenizer)
        configured = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        self._mark = self._end_of_turn()
        mark: list[int] = tokenizer(self._mark, add_special_tokens=False)["input_ids"] if self._mark else []
        if len(mark) == 1 or (mark and mark[-1] in tokenizer.added_tokens_decoder):
            ends, self._mark = {*ends, mark[-1]}, ""  # one token, which may not be decoded
        self._end_tokens = sorted(token for token in ends if token is not None)

    def answer(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float = 0.8,
        top_k: int = 50,
        on_text: Callable[[str], object] = lambda text: None,
    ) -> Answer:
        """Generate the assistant's next message.

        Args:
            messages: The conversation, with ``role`` and ``content``; the last one is of the user.
            max_new_tokens: Maximum number of new tokens.
            temperature: 0 selects the most likely token; higher values are more random.
            top_k: Sample from this many most likely tokens; 0 from all.
            on_text: Receives the text as it is generated, in parts of whole characters.

        Raises:
            InputError: The template rejects the messages or leaves out a part, or they use every position of the model.
        """
        tokens = self.prompt_tokens(messages)
        stream = _AnswerStream(self._tokenizer, self._mark, on_text)
        output = continue_tokens(
            self._model,
            self._tokenizer,
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            streamer=stream,
            eos_token_id=self._end_tokens,
            stopping_criteria=[stream.should_stop],
        )
        is_complete = stream.has_ended or output[-1] in self._end_tokens
        return Answer(stream.text, len(output) - len(tokens), is_complete)

    def prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation up to the beginning of the assistant's next message.

        Raises:
            InputError: As for `answer`.
        """
        text, _ = self._renderer.apply(messages, None, "the conversation", add_generation_prompt=True)
        if (lost := lost_part(messages, text, first=0, trained=None)) is not None:
            raise InputError(f"the chat template leaves out {lost}. Leave it out, or use a model that has it.")
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        positions = max_fitting(self._model, 0)
        if positions is not None and len(tokens) >= positions:
            raise InputError(
                f"the conversation has {plural(len(tokens), 'token')} and the model supports "
                f"{plural(positions, 'position')}: begin a new one, or shorten it."
            )
        return tokens

    def _end_of_turn(self) -> str:
        """Return the text that ends an answer; of a template without an end mark, the text before a question."""
        _, mark = self._renderer.closing
        if mark.strip():
            return mark
        answer, question = _PROBE
        turns = [("user", "a"), ("assistant", answer), ("user", question)]
        try:
            text, _ = self._renderer.apply([{"role": role, "content": content} for role, content in turns], None, "")
        except InputError:
            return ""
        return text.partition(answer)[2].partition(question)[0].rstrip(" ")


class _AnswerStream:
    """Streamer of transformers that decodes the answer, and ends before the mark of the end of the turn.

    Characters are held back until their bytes are complete, and as long as they may be the beginning of the mark.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", mark: str, on_text: Callable[[str], object]) -> None:
        self._tokenizer = tokenizer
        self._mark = mark
        self._on_text = on_text
        self._tokens: list[int] | None = None  # None before the prompt
        self.text = ""
        self.has_ended = False

    def put(self, tokens: Tensor) -> None:
        """Receive the prompt, and then each new token."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += tokens.flatten().tolist()
        self._emit(is_last=False)

    def end(self) -> None:
        """Send what was held back."""
        self._emit(is_last=True)

    def should_stop(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return whether the mark has been generated, as a stopping criterion of transformers."""
        return torch.full((len(input_ids),), self.has_ended, device=input_ids.device)

    def _emit(self, *, is_last: bool) -> None:
        decoded = self._tokenizer.decode(
            self._tokens or [], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        text = str(decoded)
        if self._mark and self._mark in text:
            text, self.has_ended = text.partition(self._mark)[0], True
        elif not is_last:
            text = text.rstrip(_INCOMPLETE)
            held = next((n for n in range(len(self._mark), 0, -1) if text.endswith(self._mark[:n])), 0)
            text = text[: len(text) - held]
        if len(text) > len(self.text) and text.startswith(self.text):
            new, self.text = text[len(self.text) :], text
            self._on_text(new)
