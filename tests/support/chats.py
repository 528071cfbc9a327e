"""Conversations as people have them, made of templates of turns, and the masks that transformers gives them."""

import random
from typing import Any

from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.named_templates import NAMED_TEMPLATES
from bigbatch.lm.data.tokenizer import train_tokenizer

QUESTIONS = (
    "What is the capital of {}?",
    "Übersetze „{}“ ins Deutsche, bitte.",
    "请解释一下 {} 是什么意思。",
    "```python\nfor {} in range(3):\n    print({})\n```\nWhy does this print nothing?",
    "  {} \n\n",
    "",
    "Write <|im_end|> and </s> after {}.",
)
ANSWERS = (
    "It is {}.",
    "\n\nOf course!\n\n1. {}\n2. 🦊🇩🇪 e\u0301\n",
    "```c\nint {}(void) {{ return 0; }}\n```",
    "לא, {} שלום",
    "",
    "{} 👩‍👩‍👧",
    "A {} of many words. " + "It goes on and on, 日本語 included. " * 40,
)
NAMES = ("x", "Köln", "naïve", "Ωmega", "a_b")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city – today",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def chat_tokenizer(name: str, *, has_special_tokens: bool = True) -> Any:
    """Return a small tokenizer with a named template, and with its special tokens if wanted."""
    tokenizer = train_tokenizer([*QUESTIONS, *ANSWERS] * 3, vocabulary_size=400)
    named = NAMED_TEMPLATES[name]
    if has_special_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(named.special_tokens)})
    tokenizer.chat_template = named.template
    return tokenizer


def chats(count: int, *, has_tools: bool, has_reasoning: bool = False, seed: int = 0) -> list[Document]:
    """Return conversations of one to six questions: with and without a system message, tools, long and empty texts."""
    rng = random.Random(seed)
    documents = []
    while len(documents) < count:
        messages: list[dict[str, Any]] = []
        uses_tools = has_tools and rng.random() < 0.4
        if rng.random() < 0.4:
            messages.append({"role": "system", "content": rng.choice(("Be brief.", "  Répondez en français.\n"))})
        for _ in range(rng.randint(1, 6)):
            messages += _round(rng, uses_tools=uses_tools, has_reasoning=has_reasoning)
        if rng.random() < 0.15:
            messages.append({"role": "user", "content": "Thanks!"})
        if any(turn["role"] == "assistant" and turn["content"] for turn in messages):
            tools = (TOOL,) if uses_tools else None
            documents.append(Document(f"chat {len(documents)}", messages=tuple(messages), tools=tools))
    return documents


def _round(rng: random.Random, *, uses_tools: bool, has_reasoning: bool) -> list[dict[str, Any]]:
    def text(choices: tuple[str, ...]) -> str:
        found, name = rng.choice(choices), rng.choice(NAMES)
        return found.format(*[name] * 2)

    turns: list[dict[str, Any]] = [{"role": "user", "content": text(QUESTIONS)}]
    if uses_tools and rng.random() < 0.7:
        function = {"name": "get_weather", "arguments": {"city": rng.choice(NAMES)}}
        call = {"type": "function", "id": "call00001", "function": function}
        turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
        turns.append({"role": "tool", "content": '{"degrees": 12}', "tool_call_id": "call00001"})
    turns.append({"role": "assistant", "content": text(ANSWERS)})
    if has_reasoning:
        for turn in turns:
            if turn["role"] == "assistant" and rng.random() < 0.5:
                turn["reasoning_content"] = f"Let me see.\n{rng.choice(NAMES)} it is."
    return turns


def transformers_mask(tokenizer: Any, document: Document, stop: int | None = None) -> tuple[list[int], list[int]]:
    """Return tokens and mask of the first messages of a conversation, as transformers computes them."""
    assert document.messages is not None
    found = tokenizer.apply_chat_template(
        list(document.messages[:stop]),
        tools=None if document.tools is None else list(document.tools),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], found["assistant_masks"]
