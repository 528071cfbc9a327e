"""What is trained on in conversations: the mask of transformers where a template has marks, and an oracle elsewhere."""

import json
import re
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bigbatch.errors import InputError
from bigbatch.lm.data.conversations import ConversationRenderer, TrainOn
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.named_templates import NAMED_TEMPLATES
from bigbatch.lm.data.tokenization import Encoded, encode_documents
from bigbatch.lm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from support.chats import TOOL, chat_tokenizer, chats, transformers_mask
from support.tiers import slow, slow_except

COUNT = 200
FEW = 40  # conversations of the other variants
SIMPLE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Q1, Q2, Q3 = ({"role": "user", "content": text} for text in ("q1", "q2", "q3"))
A1, A2, A3 = ({"role": "assistant", "content": text} for text in ("a1", "a2", "a3"))
QWEN3 = NAMED_TEMPLATES["qwen3"].template
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rom"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}


def tokenizer_with(template: Any) -> Any:
    tokenizer = train_tokenizer([], vocabulary_size=259)
    tokenizer.chat_template = template
    return tokenizer


def shown(
    template: Any, *messages: dict[str, Any], tools: Any = None, train_on: TrainOn = "all-assistant"
) -> list[str]:
    """Return the renderings of a conversation, with what is trained on in guillemets."""
    tokenizer = tokenizer_with(template)
    document = Document("a.jsonl:3", messages=messages, tools=tools)
    texts = []
    for rendering in ConversationRenderer(tokenizer, train_on=train_on).render(document):
        text = rendering.text
        for start, stop, _ in reversed(rendering.spans):
            text = f"{text[:start]}«{text[start:stop]}»{text[stop:]}"
        texts.append(text)
    return texts


def refusal(template: Any, *messages: dict[str, Any], tools: Any = None) -> str:
    with pytest.raises(InputError) as caught:
        shown(template, *messages, tools=tools)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def conversations_for(name: str, count: int = COUNT) -> list[Document]:
    return chats(count, has_tools=name != "gemma", has_reasoning=name == "qwen3")


def unmarked(template: str) -> str:
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "{#- -#}", template)


@pytest.mark.parametrize("has_special_tokens", [True, False], ids=["special", "split"])
@pytest.mark.parametrize("name", ["chatml", "llama-3", slow("gemma")])
def test_marks_give_mask_of_transformers(name: str, has_special_tokens: bool) -> None:
    tokenizer = chat_tokenizer(name, has_special_tokens=has_special_tokens)
    documents = conversations_for(name, COUNT if has_special_tokens else FEW)
    found = list(encode_documents(documents, tokenizer))
    assert [encoded.document for encoded in found] == list(range(len(documents)))
    for document, encoded in zip(documents, found, strict=True):
        assert (encoded.tokens, list(encoded.trained)) == transformers_mask(tokenizer, document)
        assert encoded.weights is None


@pytest.mark.parametrize("has_special_tokens", [True, False], ids=["special", "split"])
@pytest.mark.parametrize("name", slow_except(NAMED_TEMPLATES, "chatml", "llama-3"))
def test_every_turn_has_mask_of_transformers_once(name: str, has_special_tokens: bool) -> None:
    tokenizer = chat_tokenizer(name, has_special_tokens=has_special_tokens)
    documents = conversations_for(name, COUNT if has_special_tokens else FEW)
    by_document: dict[int, list[Encoded]] = {}
    for encoded in encode_documents(documents, tokenizer):
        by_document.setdefault(encoded.document, []).append(encoded)
    for index, document in enumerate(documents):
        assert document.messages is not None
        num_trained = 0
        for end, message in enumerate(document.messages, 1):
            if message["role"] == "assistant":
                turn = last_marked(*transformers_mask(tokenizer, document, end))
                assert any(holds(encoded, *turn) for encoded in by_document[index])
                num_trained += sum(turn[1])
        assert num_trained == sum(sum(encoded.trained) for encoded in by_document[index])


def last_marked(tokens: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
    """Keep the last run of marked tokens, which is the last turn: between two turns there are tokens of roles."""
    stop = len(mask) - mask[::-1].index(1)
    start = stop - next((i for i, marked in enumerate(mask[:stop][::-1]) if not marked), stop)
    return tokens[:stop], [0] * start + [1] * (stop - start)


def holds(encoded: Encoded, tokens: list[int], mask: list[int]) -> bool:
    """Return whether a turn is trained on after what it sees when it is generated."""
    start = mask.index(1)
    return encoded.tokens[: len(tokens)] == tokens and list(encoded.trained[start : len(mask)]) == mask[start:]


@pytest.mark.parametrize("has_special_tokens", [True, False], ids=["special", "split"])
@pytest.mark.parametrize("name", slow_except(NAMED_TEMPLATES, "chatml", "llama-3"))
def test_template_without_marks_gives_same_mask(name: str, has_special_tokens: bool) -> None:
    tokenizer = chat_tokenizer(name, has_special_tokens=has_special_tokens)
    documents = conversations_for(name, FEW)
    marked = list(encode_documents(documents, tokenizer))
    tokenizer.chat_template = unmarked(tokenizer.chat_template)
    assert "generation %}" not in tokenizer.chat_template.replace("add_generation_prompt", "")
    assert list(encode_documents(documents, tokenizer)) == marked


def test_rewritten_turns_are_trained_as_generated() -> None:
    # Written by hand: the reasoning of an answer is trained on, and is not in front of a later question.
    thought = A1 | {"reasoning_content": "\nhm\n"}
    asked = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    later = "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"
    assert shown(QWEN3, Q1, thought, Q2, A2 | {"content": "<think>\no\n</think>\n\na2"}) == [
        f"{asked}«<think>\nhm\n</think>\n\na1<|im_end|>»\n",
        f"{asked}a1<|im_end|>\n{later}«<think>\no\n</think>\n\na2<|im_end|>»\n",
    ]
    # With a question at the end, the last answer is rendered without its reasoning, and trained with it.
    assert shown(QWEN3, Q1, thought, Q2) == [f"{asked}«<think>\nhm\n</think>\n\na1<|im_end|>»\n"]


def test_reasoning_within_content_is_no_lost_content() -> None:
    for content, text in (
        ("<think>hm</think>a1", "<think>\nhm\n</think>\n\na1"),
        ("<think>hm</think>", "<think>\nhm\n</think>\n\n"),
    ):
        (found,) = shown(QWEN3, Q1, {"role": "assistant", "content": content})
        assert found.endswith(f"«{text}<|im_end|>»\n")


def test_turns_rendered_alike_share_one_rendering() -> None:
    # Between a call and the answer there is no question: the reasoning of the call stays, and both are trained at once.
    call = {"role": "assistant", "content": "", "reasoning_content": "look", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "12"}
    (text,) = shown(QWEN3, Q1, call, result, A1 | {"reasoning_content": "ok"})
    assert text.count("«") == 2
    assert "«<think>\nlook\n</think>\n\n<tool_call>\n" in text
    assert text.endswith("<|im_start|>assistant\n«<think>\nok\n</think>\n\na1<|im_end|>»\n")


def test_tools_before_last_question_are_trained_by_turn() -> None:
    tools = f"[AVAILABLE_TOOLS] [{tojson(TOOL)}][/AVAILABLE_TOOLS]"
    assert shown(NAMED_TEMPLATES["mistral"].template, Q1, A1, Q2, A2, tools=(TOOL,)) == [
        f"<|begin|>{tools}[INST] q1[/INST]« a1<|end|>»",
        f"<|begin|>[INST] q1[/INST] a1<|end|>{tools}[INST] q2[/INST]« a2<|end|>»",
    ]


def tojson(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def test_last_turn_is_answer_to_last_question() -> None:
    text = "<user>q1</>\n<assistant>a1</>\n<user>q2</>\n<assistant>a2</>\n<assistant>a3</>\n"
    expected = text.replace("a2</>", "«a2</>»").replace("a3</>", "«a3</>»")
    assert shown(SIMPLE, Q1, A1, Q2, A2, A3, train_on="last-turn") == [expected]
    assert shown(SIMPLE, Q1, A1, Q2, train_on="last-turn") == ["<user>q1</>\n<assistant>«a1</>»\n<user>q2</>\n"]
    assert shown(QWEN3, Q1, A1, Q2, A2, train_on="last-turn") == shown(QWEN3, Q1, A1, Q2, A2)[1:]


def test_nothing_after_end_mark_is_trained() -> None:
    whole = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant: ' if "
    assert shown(SIMPLE, Q1, A1) == ["<user>q1</>\n<assistant>«a1</>»\n"]
    assert shown(whole + "add_generation_prompt }}", Q1, A1, Q2, A2) == [
        "user: q1\nassistant: «a1\n»user: q2\nassistant: «a2\n»"  # the line break is the end mark
    ]
    # A special token ends the turn; what a template writes at the end of a conversation is not part of the answer.
    closed = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token + '\n' }}{% endfor %}"
    closed += "{{ 'assistant:' if add_generation_prompt else bos_token }}"
    assert shown(closed, Q1, A1, Q2, A2) == [
        "user:q1<|end|>\nassistant:«a1<|end|>»\nuser:q2<|end|>\nassistant:«a2<|end|>»\n<|begin|>"
    ]


def test_only_marked_turns_are_trained() -> None:
    last = (
        "{% for m in messages %}{{ m.role }}:{% if loop.last and m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    )
    assert shown(last, Q1, A1, Q2, A2) == ["user:q1<|end|>assistant:a1<|end|>user:q2<|end|>assistant:«a2»<|end|>"]
    twice = (
        "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}-{% generation %}.{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert shown(twice, Q1, A1, Q2, A2) == ["userq1assistant«a1»-«.»userq2assistant«a2»-«.»"]


def test_weights_of_messages_reach_their_tokens() -> None:
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    messages = (Q1, A1 | {"weight": 0}, Q2, A2 | {"weight": 0.5}, Q3, A3)
    (found,) = encode_documents([Document("a", messages=messages)], tokenizer)
    assert found.weights is not None
    assert bytes(weight > 0 for weight in found.weights) == found.trained
    by_weight = {
        weight: [t for t, w in zip(found.tokens, found.weights, strict=True) if w == weight] for weight in (0.5, 1)
    }
    assert {weight: tokenizer.decode(tokens) for weight, tokens in by_weight.items()} == {
        0.5: "a2<|end|>",
        1: "a3<|end|>",
    }
    (masked,) = encode_documents([Document("a", messages=(Q1, A1 | {"weight": 0}, Q2, A2))], tokenizer)
    assert masked.weights is None
    assert tokenizer.decode([t for t, on in zip(masked.tokens, masked.trained, strict=True) if on]) == "a2<|end|>"
    (plain,) = encode_documents([Document("a", messages=(Q1, A1, Q2, A2))], tokenizer)
    assert masked.tokens == plain.tokens  # the template is not given the weights


def test_developer_is_system_where_template_lacks_it() -> None:
    developer = {"role": "developer", "content": "d"}
    assert shown(SIMPLE, developer, Q1, A1)[0].startswith("<system>d</>")
    assert shown(SIMPLE + "{# developer #}", developer, Q1, A1)[0].startswith("<developer>d</>")


def test_tools_are_passed_to_template() -> None:
    texts = shown(CHAT_TEMPLATE, Q1, CALLS, {"role": "tool", "content": "12"}, A1, tools=(TOOL,))
    line = 'call: {"name": "get_weather", "arguments": {"city": "Rom"}}'
    assert texts == [
        f"<|begin|>tools:\n[{tojson(TOOL)}]\nuser:\nq1\nassistant:\n«{line}\n{line}<|end|>»tool:\n12\nassistant:\n«a1<|end|>»"
    ]
    several = {"default": CHAT_TEMPLATE, "tool_use": "tools" + CHAT_TEMPLATE}
    assert shown(several, Q1, A1, tools=(TOOL,))[0].startswith("tools")
    assert shown(several, Q1, A1)[0].startswith("<|begin|>user")


def without(role: str) -> str:
    return SIMPLE.replace("m in messages", f"m in messages if m.role != '{role}'")


@pytest.mark.parametrize(
    ("template", "messages", "tools", "lost"),
    [
        (SIMPLE, (Q1, CALLS), None, "the calls of tools of message 2 (assistant)"),
        (SIMPLE, (Q1, A1 | {"reasoning_content": "hm"}), None, "the reasoning of message 2 (assistant)"),
        (SIMPLE, (Q1, A1), (TOOL,), "the tools"),
        (
            without("system"),
            ({"role": "system", "content": "x\ns1 "}, Q1, A1),
            None,
            "the content of message 1 (system)",
        ),
        (without("tool"), (Q1, A1, {"role": "tool", "content": "12"}), None, "the content of message 3 (tool)"),
    ],
    ids=["calls", "reasoning", "tools", "system", "after-last-turn"],
)
def test_content_that_template_leaves_out_is_rejected(template: str, messages: Any, tools: Any, lost: str) -> None:
    message = refusal(template, *messages, tools=tools)
    assert message.startswith(f"a.jsonl:3: the chat template leaves out {lost}")
    assert message.endswith(". Remove it from the record, or pass a --chat-template that renders it.")


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("gemma", (Q1, Q2, A1), "in the gemma format, user and assistant take turns, and the user begins"),
        (
            "gemma",
            (Q1, A1, {"role": "tool", "content": "x"}),
            "the gemma format has only user, assistant and one system",
        ),
        ("mistral", (Q1, A1, A2), "in the mistral format, user and assistant take turns, and the user begins"),
        (
            "mistral",
            (Q1, A1, {"role": "system", "content": "x"}, Q2, A2),
            "the mistral format has only user, assistant,",
        ),
        ("llama-3", (Q1, A1 | {"tool_calls": [CALL]}), "a Llama 3 message is either text or one call of a tool"),
    ],
)
def test_format_without_such_turns_is_rejected(name: str, messages: Any, reason: str) -> None:
    found = refusal(NAMED_TEMPLATES[name].template, *messages)
    assert found.startswith(f"a.jsonl:3: the chat template rejects the conversation: {reason}")


def test_broken_conversations_are_skipped_and_reported() -> None:
    tokenizer = tokenizer_with(NAMED_TEMPLATES["gemma"].template)
    documents = [
        Document("a:1", messages=(Q1, A1)),
        Document("a:2", messages=(Q1, Q2, A1)),
        Document("a:3", text="text"),
        Document("a:4", messages=(Q1, A1 | {"weight": 0})),
    ]
    broken: list[str] = []
    assert [encoded.document for encoded in encode_documents(documents, tokenizer, broken=broken)] == [0, 2]
    assert [message.split(":")[1][:1] for message in broken] == ["2", "4"]
    with pytest.raises(InputError, match="a:2: the chat template rejects"):
        list(encode_documents(documents, tokenizer))
    with pytest.raises(InputError, match="a:2: the chat template rejects"):  # nothing is left
        list(encode_documents(documents[1:2], tokenizer, broken=[]))


def test_dropped_white_space_does_not_move_the_mask() -> None:
    # transformers would mask all later turns here, or train on them, since the spans begin and end with no token.
    backend = Tokenizer(
        models.WordLevel({"[UNK]": 0, "[END]": 1, "q1": 2, "a1": 3, "q2": 4, "a2": 5}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + ' ' }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    (found,) = encode_documents([Document("a", messages=(Q1, A1, Q2, A2, Q3))], tokenizer)
    assert tokenizer.convert_ids_to_tokens(found.tokens) == ["q1", "a1", "q2", "a2", "[UNK]"]
    assert list(found.trained) == [0, 1, 0, 1, 0]
