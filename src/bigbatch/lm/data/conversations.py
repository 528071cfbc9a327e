"""Render conversations with a chat template, and locate what the assistant says in the text.

    conversation → one rendering whose spans are trained on, if the template renders earlier turns unchanged
                 → else one rendering for each turn of the assistant, as it is rendered when it is generated

A turn is located by the ``{% generation %}`` marks of the template, or in a template without marks as

    render(messages up to the turn) = render(messages before it, with the generation prompt) + turn

of which the content and its end mark are trained on, and nothing after them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

from jinja2 import TemplateError

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.lost_content import lost_part, lost_tools
from bigbatch.lm.data.tokenizer import AnyTokenizer

TrainOn: TypeAlias = Literal["all-assistant", "last-turn"]
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE = "zq7answer"  # content that no template has in it
# A template is a program, and may fail in every way that one can.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class Span(NamedTuple):
    """Characters of a rendering that are trained on, from ``start`` up to ``stop``, and the weight of their loss."""

    start: int
    stop: int
    weight: float


@dataclass(frozen=True)
class Rendering:
    """A conversation as text.

    Attributes:
        text: With special tokens.
        spans: In order; none overlap.
        marks: Bounds of the ``{% generation %}`` marks, of which the spans are some; None if the template has none.
    """

    text: str
    spans: tuple[Span, ...]
    marks: frozenset[tuple[int, int]] | None

    @property
    def trained_text(self) -> str:
        """The text up to the end of the last span."""
        return self.text[: self.spans[-1].stop] if self.spans else ""

    def continued(self, later: Rendering) -> Rendering | None:
        """Return a longer rendering with the spans of both, or None if it changes what is trained on in this one.

        A mark that the longer rendering lacks is left out, as in the mask that transformers makes of it.
        """
        if not later.text.startswith(self.trained_text):
            return None
        own = (span for span in self.spans if later.marks is None or (span.start, span.stop) in later.marks)
        return replace(later, spans=(*own, *later.spans))


class ConversationRenderer:
    """Renders the conversations of documents for one tokenizer.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        train_on: ``"all-assistant"``, or ``"last-turn"``: what the assistant says after the last message of the user
            that it answers.

    Raises:
        InputError: The tokenizer has no chat template, or does not return token offsets.
    """

    def __init__(self, tokenizer: AnyTokenizer, *, train_on: TrainOn = "all-assistant") -> None:
        if not tokenizer.chat_template:
            raise InputError(
                "the data has conversations, and the tokenizer has no chat template to render them. Pass "
                "--chat-template with chatml, llama-3, qwen3, gemma, mistral or the file of a template."
            )
        if not tokenizer.is_fast:
            raise InputError(
                f"{type(tokenizer).__name__} does not return token offsets, so the turns of a conversation cannot be "
                "masked. Use the model's fast tokenizer (tokenizer.json)."
            )
        self._tokenizer = tokenizer
        self._train_on = train_on

    def render(self, document: Document) -> list[Rendering]:
        """Return the renderings of a conversation, at least one.

        Raises:
            InputError: No turn is trained on, or the template rejects the conversation, leaves a part of it out, or has
                a turn that does not begin with its generation prompt.
        """
        assert document.messages is not None
        weights = trained_weights(document.messages, self._train_on)
        if not weights:
            raise InputError(f"{document.source} yields no training token: no trained message has a weight above 0.")
        conversation = _Conversation(self, document)
        renderings: list[Rendering] = []
        for index, weight in weights.items():
            turn = conversation.turn(index, weight)
            joined = renderings[-1].continued(turn) if renderings else None
            renderings[-1:] = [*renderings[-1:], turn] if joined is None else [joined]
        if index + 1 < len(document.messages):
            renderings[-1] = renderings[-1].continued(conversation.whole()) or renderings[-1]
        return [rendering for rendering in renderings if rendering.spans]

    def continuation(self, document: Document, num_context: int) -> tuple[str, str]:
        """Return a conversation up to an answer to generate after ``num_context`` messages, and all of it.

        Raises:
            InputError: The template rejects the conversation, leaves a part of it out, or renders the messages before
                the answer differently when it is generated.
        """
        conversation = _Conversation(self, document)
        return (conversation.opening(num_context) if num_context else ""), conversation.whole().text

    def template_for(self, tools: object) -> str:
        """Return the template, of several the one for conversations with or without tools.

        Raises:
            InputError: There are several, and none is for such conversations.
        """
        try:
            template: str = self._tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise InputError(f"the tokenizer has no chat template for this: {first_line(error)}.") from None
        return template

    def apply(
        self, messages: Sequence[dict[str, Any]], tools: Any, source: str, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return messages as text, and the bounds of its generation marks.

        Raises:
            InputError: The template rejects them.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, marks = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=(template := self.template_for(tools)),
                return_assistant_tokens_mask=has_marks(template),
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        except _TEMPLATE_ERRORS as error:
            raise InputError(f"{source}: the chat template rejects the conversation: {first_line(error)}.") from None
        return str(rendered[0]), marks[0] if marks else []

    @cached_property
    def closing(self) -> tuple[str, str]:
        """What a template without marks writes after the content of an answer, and the end mark at its beginning.

        The end mark reaches to the end of the first special token, or without one to the last visible character.
        """
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        try:
            text, _ = self.apply(probe, None, "")
        except InputError:
            return "", ""
        tail = text.rpartition(_PROBE)[2] if _PROBE in text else ""
        tokenizer = self._tokenizer
        special = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
        ends = [(tail.index(token), -len(token)) for token in special if token.strip() and token in tail]
        if ends:
            start, length = min(ends)
            return tail, tail[: start - length]
        return tail, tail.rstrip() or tail


def trained_weights(messages: Sequence[dict[str, Any]], train_on: TrainOn) -> dict[int, float]:
    """Return the weight of each message that is trained on, by its index; those of weight 0 are not trained on."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last-turn" and answers:
        asked = [index for index, message in enumerate(messages[: answers[-1]]) if message["role"] == "user"]
        answers = [index for index in answers if not asked or index > asked[-1]]
    weights = {index: messages[index].get("weight", 1) for index in answers}
    return {index: weight for index, weight in weights.items() if weight}


def has_marks(template: str) -> bool:
    """Return whether a template marks what the assistant generates."""
    return _GENERATION.search(template) is not None


class _Conversation:
    """One conversation with the texts that its template makes of it."""

    def __init__(self, renderer: ConversationRenderer, document: Document) -> None:
        assert document.messages is not None
        self._renderer = renderer
        self._source = document.source
        self._tools = None if document.tools is None else list(document.tools)
        template = renderer.template_for(self._tools)
        self._is_marked = has_marks(template)
        self._has_one_mark = len(_GENERATION.findall(template)) == 1  # so each answer has at most one
        renamed = {} if "developer" in template else {"developer": "system"}
        self._messages = [
            {name: value for name, value in message.items() if name != "weight"}
            | {"role": renamed.get(message["role"], message["role"])}
            for message in document.messages
        ]
        self._num_checked = 0

    def turn(self, index: int, weight: float) -> Rendering:
        """Render the conversation up to a message of the assistant, whose characters are the spans."""
        text, marks = self._apply(index + 1)
        self._check_complete(text, index)
        bounds = self._marks_of_last(marks, index) if self._is_marked else [self._bounds_of_last(text, index)]
        return self._rendering(text, marks, tuple(Span(*bound, weight) for bound in bounds))

    def whole(self) -> Rendering:
        """Render all messages, without spans."""
        text, marks = self._apply(len(self._messages))
        self._check_complete(text, None)
        return self._rendering(text, marks, ())

    def opening(self, num_context: int) -> str:
        """Return the text before an answer to generate after some of the messages, which all of them begin with."""
        before, _ = self._apply(num_context, add_generation_prompt=True)
        text, _ = self._apply(len(self._messages))
        if not text.startswith(before):
            raise InputError(f"{self._differs(num_context, before, text)}.")
        return before

    def _rendering(self, text: str, marks: list[tuple[int, int]], spans: tuple[Span, ...]) -> Rendering:
        return Rendering(text, spans, frozenset(marks) if self._is_marked else None)

    def _apply(self, stop: int, *, add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        return self._renderer.apply(
            self._messages[:stop], self._tools, self._source, add_generation_prompt=add_generation_prompt
        )

    def _marks_of_last(self, marks: list[tuple[int, int]], index: int) -> list[tuple[int, int]]:
        """Return the marks of the last message: the last one, or those that are more than without the message."""
        answers = sum(message["role"] == "assistant" for message in self._messages[: index + 1])
        if len(marks) == answers and self._has_one_mark:
            return marks[-1:]
        return marks[len(self._apply(index, add_generation_prompt=True)[1]) :]

    def _bounds_of_last(self, text: str, index: int) -> tuple[int, int]:
        """Return the bounds of the last message's content and end mark."""
        before, _ = self._apply(index, add_generation_prompt=True)
        if not text.startswith(before):
            raise InputError(f"{self._differs(index, before, text)}, or one with {{% generation %}} marks.")
        tail, mark = self._renderer.closing
        if text[len(before) :].endswith(tail):
            return len(before), len(text) - len(tail) + len(mark)
        return len(before), max(len(text.rstrip()), len(before)) if text[len(before) :].strip() else len(text)

    def _differs(self, index: int, before: str, text: str) -> str:
        return (
            f"{self._source}: the chat template renders message {index + 1} differently from how it begins an answer "
            f"to generate: {_difference(before, text)}. Pass another --chat-template"
        )

    def _check_complete(self, text: str, index: int | None) -> None:
        """Check that the messages after those checked before, up to ``index``, are in the text, and the tools."""
        stop = len(self._messages) if index is None else index + 1
        lost = lost_part(self._messages[:stop], text, first=self._num_checked, trained=index)
        if lost is None and not self._num_checked:
            lost = lost_tools(self._tools or (), text)
        if lost is not None:
            raise InputError(
                f"{self._source}: the chat template leaves out {lost}. Remove it from the record, or pass a "
                "--chat-template that renders it."
            )
        self._num_checked = stop


def _difference(before: str, after: str) -> str:
    """Return the two texts from where they differ, shortened."""
    at = next((i for i, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), len(after))
    return f"{after[at : at + 20]!r} and not {before[at : at + 20]!r}"
