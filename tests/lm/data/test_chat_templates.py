"""Chat templates by name and from files; what does not fit the tokenizer is said or refused."""

from pathlib import Path
from typing import Any

import pytest

from bigbatch.errors import InputError
from bigbatch.lm.data.chat_templates import describe_template, set_chat_template, template_digest
from bigbatch.lm.data.named_templates import NAMED_TEMPLATES, check_chat_template
from bigbatch.lm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from support.chats import TOOL, chat_tokenizer

TEMPLATE = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Weather?"},
]
RENDERED = {  # as the models of these formats are prompted
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n",
    "llama-3": "<|begin|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWeather?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<|begin|><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
    "<start_of_turn>user\nWeather?<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "<|begin|>[INST] Be brief.\n\nHi[/INST] Hello.<|end|>[INST] Weather?[/INST]",
}
RENDERED["qwen3"] = RENDERED["chatml"]


def fresh() -> Any:
    return train_tokenizer(["ab"], vocabulary_size=259)


def refusal(choice: str) -> str:
    with pytest.raises(InputError) as caught:
        set_chat_template(fresh(), choice)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_named_template_renders_its_format(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == RENDERED[name]
    assert set_chat_template(tokenizer, name)[1:] == ()  # no split token


def test_calls_of_tools_have_the_form_of_each_format() -> None:
    function = {"name": "get_weather", "arguments": {"city": "Köln"}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "a", "function": function}]}
    result = {"role": "tool", "content": "12 °C", "tool_call_id": "a"}

    def tail(name: str) -> str:
        messages = [CHAT[1], call, result]
        text: str = chat_tokenizer(name).apply_chat_template(messages, tools=[TOOL], tokenize=False)
        assert '"get_weather"' in text
        return text.partition("Hi")[2]

    tags = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>\n'
    assert tail("chatml") == (
        f"<|im_end|>\n<|im_start|>assistant\n{tags}"
        "<|im_start|>tool\n<tool_response>\n12 °C\n</tool_response><|im_end|>\n"
    )
    assert tail("qwen3").endswith(
        f"<|im_start|>assistant\n{tags}<|im_start|>user\n<tool_response>\n12 °C\n</tool_response><|im_end|>\n"
    )
    assert tail("llama-3") == (
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "get_weather", "parameters": {"city": "Köln"}}<|eot_id|>'
        "<|start_header_id|>ipython<|end_header_id|>\n\n12 °C<|eot_id|>"
    )
    assert tail("mistral") == (
        '[/INST][TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Köln"}, "id": "a"}]<|end|>'
        '[TOOL_RESULTS] {"content": "12 °C", "call_id": "a"}[/TOOL_RESULTS]'
    )


def test_results_of_several_calls_are_one_turn_of_qwen3() -> None:
    result = {"role": "tool", "content": "12"}
    text = chat_tokenizer("qwen3").apply_chat_template([CHAT[1], CHAT[2], result, result], tokenize=False)
    block = "\n<tool_response>\n12\n</tool_response>"
    assert text.endswith(f"<|im_start|>user{block}{block}<|im_end|>\n")


def test_thinking_is_turned_off_by_variable() -> None:
    text = chat_tokenizer("qwen3").apply_chat_template(
        CHAT[1:2], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_split_tokens_and_other_end_are_noted() -> None:
    tokenizer = fresh()
    assert set_chat_template(tokenizer, "chatml") == (
        "--chat-template chatml: the tokenizer splits <|im_start|> (12 tokens), <|im_end|> (10 tokens), which a model "
        "of that format has as single tokens; train enough for the model to learn them",
        "--chat-template chatml ends an answer with <|im_end|>, and generation stops at <|end|>: bigbatch generate "
        '--chat stops there, other programs need stop_strings=["<|im_end|>"]',
    )
    assert tokenizer.chat_template == NAMED_TEMPLATES["chatml"].template
    tokenizer = chat_tokenizer("chatml")
    tokenizer.eos_token = "<|im_end|>"
    assert set_chat_template(tokenizer, "chatml") == ()


def test_tokenizer_that_loses_special_tokens_is_rejected() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[EOS]": 1, "hi": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]")
    with pytest.raises(InputError, match="--chat-template gemma: the tokenizer cannot encode <start_of_turn>"):
        set_chat_template(tokenizer, "gemma")


def test_no_choice_keeps_template_of_tokenizer() -> None:
    tokenizer = fresh()
    assert set_chat_template(tokenizer, None) == ()
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_template_of_a_file_is_used(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_bytes(b"\xef\xbb\xbf" + TEMPLATE.encode())
    tokenizer = fresh()
    assert set_chat_template(tokenizer, str(path)) == ()
    assert tokenizer.chat_template == TEMPLATE
    assert describe_template(tokenizer, str(path)) == f"{path}, with {{% generation %}} marks"
    path.write_text("{{ raise_exception('not this one') }}{{ messages }}")  # of the test conversation only
    assert set_chat_template(tokenizer, str(path)) == ()


def test_unusable_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    assert refusal(str(path)) == (
        f"--chat-template '{path}' is no file and no name. The names are chatml, llama-3, qwen3, gemma, mistral."
    )
    path.write_text("\n{% for m in messages %}")
    assert refusal(str(path)).startswith(f"--chat-template {path} is no Jinja template: ")
    assert refusal(str(path)).endswith(" in line 2.")
    path.write_text('{"model_type": "llama"}')
    assert refusal(str(path)).startswith(f"--chat-template {path} does not use the variable messages.")
    path.write_bytes(b"{{ messages }}\xff")
    assert refusal(str(path)) == f"--chat-template {path} is not UTF-8. Convert it to UTF-8."
    assert refusal(str(tmp_path)).startswith(f"--chat-template {tmp_path} is not a regular file.")


@pytest.mark.parametrize(("choice", "near"), [("chat_ml", "chatml"), ("llama3", "llama-3"), ("Qwen-3", "qwen3")])
def test_misspelt_name_is_rejected_with_nearest(choice: str, near: str) -> None:
    with pytest.raises(InputError) as caught:
        check_chat_template(choice)
    assert str(caught.value) == (
        f"--chat-template {choice!r} is no file and no name. Did you mean {near}? "
        "The names are chatml, llama-3, qwen3, gemma, mistral."
    )


def test_digest_changes_with_template() -> None:
    tokenizer = fresh()
    digests = {template_digest(tokenizer)}
    for template in (TEMPLATE, {"default": TEMPLATE}, {"default": TEMPLATE, "tool_use": TEMPLATE}, None):
        tokenizer.chat_template = template
        digests.add(template_digest(tokenizer))
    assert len(digests) == 5
    assert None in digests
