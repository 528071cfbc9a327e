"""Answers in a conversation: the prompt of the chat template, streamed text, and where an answer ends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bigbatch.errors import InputError
from bigbatch.lm.data.chat_templates import set_chat_template
from bigbatch.lm.data.named_templates import NAMED_TEMPLATES
from bigbatch.lm.model.chat import Answer, ChatModel, _AnswerStream
from support.language_models import save_model_folder

LINES = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class ScriptedModel:
    """A causal language model whose answer is a given text; everything around it is that of a real one."""

    def __init__(self, folder: Path, answer: str) -> None:
        self.real = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
        self.prompt: list[int] = []
        self.real.register_forward_hook(self._replace, with_kwargs=True)
        self.done = 0

    def _replace(self, module: Any, arguments: Any, options: Any, output: Any) -> Any:
        if not self.done:
            self.prompt = options["input_ids"][0].tolist()
        output.logits.fill_(0)
        output.logits[:, -1, self.tokens[min(self.done, len(self.tokens) - 1)]] = 10
        self.done += 1
        return output


def answer(folder: Path, template: str | None, says: str, messages: Any = None, **options: Any) -> tuple[Answer, Any]:
    """Return the answer of a model that says something, the parts of its text, and its prompt."""
    model = ScriptedModel(folder, says)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if template in NAMED_TEMPLATES:
        set_chat_template(tokenizer, template)
    elif template is not None:
        tokenizer.chat_template = template
    parts: list[str] = []
    found = ChatModel(model.real, tokenizer, name="base").answer(
        messages or [{"role": "user", "content": "q"}],
        max_new_tokens=options.pop("max_new_tokens", 300),
        temperature=0,
        on_text=parts.append,
    )
    assert "".join(parts) == found.text
    return found, (parts, tokenizer.decode(model.prompt))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model_folder(tmp_path_factory.mktemp("base"), kind="qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]) > 1
    return folder


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, "<|end|>"),
        ("chatml", "<|im_end|>"),
        ("llama-3", "<|eot_id|>"),
        ("qwen3", "<|im_end|>"),
        ("gemma", "<end_of_turn>"),
        ("mistral", "<|end|>"),
        (LINES, "\nuser:"),
    ],
)
def test_answer_ends_at_end_of_turn(folder: Path, template: str | None, end: str) -> None:
    said = "für 日本語\n\nx <|im"
    found, (parts, _) = answer(folder, template, f"{said}{end} and more")
    assert (found.text, found.is_complete) == (said, True)
    assert len(parts) > 5  # streamed


def test_prompt_is_that_of_the_template(folder: Path) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    _, (_, prompt) = answer(folder, "chatml", "x<|im_end|>", messages)
    assert prompt == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    )
    _, (_, prompt) = answer(folder, None, "x<|end|>")
    assert prompt.count("<|begin|>") == 1


def test_limit_of_tokens_cuts_the_answer(folder: Path) -> None:
    found, _ = answer(folder, None, "a b c d e f", max_new_tokens=3)
    assert (found.num_tokens, found.is_complete) == (3, False)


def test_characters_are_sent_whole(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("☃é𝄞", add_special_tokens=False)["input_ids"]
    assert len(tokens) > 3
    parts: list[str] = []
    stream = _AnswerStream(tokenizer, "", parts.append)
    stream.put(torch.tensor([[0]]))
    for token in tokens:
        stream.put(torch.tensor([token]))
    stream.put(torch.tensor([tokens[0]]))  # the first byte of a character
    stream.end()
    assert parts == ["☃", "é", "𝄞", "\ufffd"]


def test_model_without_template_is_refused(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    with pytest.raises(InputError) as caught:
        ChatModel(AutoModelForCausalLM.from_pretrained(folder), tokenizer, name="base")
    assert str(caught.value) == (
        "base has no chat template, so it cannot chat: pass the text to continue as PROMPT, or train with "
        "--chat-template."
    )


def test_template_without_system_is_refused(folder: Path) -> None:
    no_system = LINES.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]
    with pytest.raises(InputError) as caught:
        answer(folder, no_system, "x", messages)
    assert str(caught.value) == (
        "the chat template leaves out the content of message 1 (system). Leave it out, or use a model that has it."
    )
