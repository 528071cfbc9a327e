"""Every known shape of a record becomes its document; any other is refused in one sentence that lists what it has."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.prompt_completion import UNPAIRED
from bigbatch.lm.data.records import EXPECTED, PREFERENCES, RecordColumns, shape_notes, to_document
from bigbatch.lm.data.sources import read_corpus

USER, ANSWER = {"role": "user", "content": "Hallo?"}, {"role": "assistant", "content": "Grüß dich."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TEXT_CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln", "days": 2}'}}


def document(record: dict[str, Any], **columns: str) -> Document:
    return to_document(record, "a.jsonl:3", RecordColumns(**columns))


def refusal(record: object, **columns: str) -> str:
    with pytest.raises(InputError) as caught:
        to_document(record, "a.jsonl:3", RecordColumns(**columns))
    message = str(caught.value)
    assert message.startswith("a.jsonl:3: ")
    assert "\n" not in message
    return message.removeprefix("a.jsonl:3: ")


CHATS: dict[str, tuple[dict[str, Any], tuple[dict[str, Any], ...]]] = {
    "messages": ({"messages": [USER, ANSWER]}, (USER, ANSWER)),
    "messages-as-json-text": ({"messages": json.dumps([USER, ANSWER])}, (USER, ANSWER)),
    "null-and-extra-columns": (
        {"id": 7, "text": None, "prompt": "p", "messages": [USER | {"name": None}, ANSWER | {"refusal": None}]},
        (USER, ANSWER),
    ),
    "text-parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hal"}, {"text": "lo?"}]}, ANSWER]},
        (USER, ANSWER),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hallo?"}, {"from": "gpt", "value": "Grüß dich."}]},
        (USER, ANSWER),
    ),
    "sharegpt-with-roles": ({"conversations": [USER, ANSWER]}, (USER, ANSWER)),
    "system-column": (
        {"system": "Kurz.", "conversations": [USER, ANSWER]},
        ({"role": "system", "content": "Kurz."}, USER, ANSWER),
    ),
    "empty-system-column": ({"system": "", "messages": [USER, ANSWER]}, (USER, ANSWER)),
    "developer-and-name": (
        {"messages": [{"role": "developer", "content": "Kurz."}, USER | {"name": "Ada"}, ANSWER]},
        ({"role": "developer", "content": "Kurz."}, USER | {"name": "Ada"}, ANSWER),
    ),
    "weights": (
        {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1.0}, USER, ANSWER | {"weight": 0.5}]},
        (USER, ANSWER | {"weight": 0}, USER, ANSWER, USER, ANSWER | {"weight": 0.5}),
    ),
    "tool-calls": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [TEXT_CALL]},
                {"role": "tool", "tool_call_id": "a", "content": "12 °C"},
                ANSWER,
            ]
        },
        (
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "a"}]},
            {"role": "tool", "content": "12 °C", "tool_call_id": "a"},
            ANSWER,
        ),
    ),
    "function-call": (
        {
            "messages": [
                USER,
                {"role": "assistant", "function_call": TEXT_CALL["function"]},
                {**USER, "role": "function"},
            ]
        },
        (USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {**USER, "role": "tool"}),
    ),
    "sharegpt-function-call": (
        {
            "conversations": [
                {"from": "human", "value": "Hallo?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "12 °C"},
                {"from": "gpt", "value": "Grüß dich."},
            ]
        },
        (
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "12 °C"},
            ANSWER,
        ),
    ),
    "prompt-of-messages": (
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
        (USER, ANSWER | {"weight": 0}, USER, ANSWER),
    ),
    "prompt-of-messages-and-system": (
        {"system": "Kurz.", "prompt": [USER], "completion": [ANSWER]},
        ({"role": "system", "content": "Kurz."}, USER, ANSWER),
    ),
    "prompt-of-messages-and-text": ({"prompt": [USER], "completion": "Grüß dich."}, (USER, ANSWER)),
    "completion-that-repeats-the-prompt": (
        {"prompt": [USER, ANSWER, USER], "completion": [USER, ANSWER, USER, ANSWER]},
        (USER, ANSWER | {"weight": 0}, USER, ANSWER),
    ),
    "completion-that-repeats-text": ({"prompt": "Hallo?\n", "completion": [USER, ANSWER]}, (USER, ANSWER)),
    "completion-with-system-that-repeats-text": (
        {"prompt": "Hallo?", "completion": [{"role": "system", "content": "Kurz."}, USER, ANSWER]},
        ({"role": "system", "content": "Kurz."}, USER, ANSWER),
    ),
    "question-asked-again": (
        {"prompt": [USER, ANSWER], "completion": [USER, ANSWER | {"content": "Ja?"}]},
        (USER, ANSWER | {"weight": 0}, USER, ANSWER | {"content": "Ja?"}),
    ),
    "blank-prompt-and-messages": ({"prompt": "", "completion": [USER, ANSWER]}, (USER, ANSWER)),
    "prompt-and-completion-as-json-text": (
        {"system": "Kurz.", "prompt": json.dumps([USER]), "completion": f" {json.dumps([ANSWER], indent=1)}\n"},
        ({"role": "system", "content": "Kurz."}, USER, ANSWER),
    ),
    "text-and-completion-as-json-text": (
        {"prompt": "Hallo?", "completion": '[{"from": "gpt", "value": "Grüß dich."}]'},
        (USER, ANSWER),
    ),
    "text-and-completion-of-messages": ({"prompt": "Hallo?", "completion": [ANSWER]}, (USER, ANSWER)),
}


@pytest.mark.parametrize(("record", "messages"), CHATS.values(), ids=CHATS)
def test_chat_becomes_messages(record: dict[str, Any], messages: tuple[dict[str, Any], ...]) -> None:
    assert document(record) == Document("a.jsonl:3", messages=messages)


ARROW = [pytest.param(record, id=name) for name, (record, _) in CHATS.items() if name != "text-parts"]  # of one type


@pytest.mark.parametrize("record", ARROW)
def test_parquet_gives_same_chat_as_json(record: dict[str, Any], tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    assert read_corpus(str(tmp_path / "a.parquet")).documents[0].key == document(record).key


@pytest.mark.parametrize(
    ("record", "tools"),
    [
        ({"tools": [TOOL]}, (TOOL,)),
        ({"tools": json.dumps([TOOL])}, (TOOL,)),
        ({"functions": [TOOL["function"]]}, (TOOL,)),
        ({"tools": []}, None),
        ({"tools": ""}, None),
        ({"tools": None}, None),
    ],
    ids=["list", "json-text", "functions", "none", "empty", "null"],
)
def test_tools_of_a_record_are_kept(record: dict[str, Any], tools: Any) -> None:
    assert document({"messages": [USER, ANSWER], **record}).tools == tools


def test_key_depends_on_tools_only_if_there_are_some() -> None:
    plain = Document("a", messages=(USER, ANSWER)).key
    assert document({"messages": [USER, ANSWER], "tools": []}).key == plain
    assert document({"messages": [USER, ANSWER], "tools": [TOOL]}).key != plain


def test_alpaca_output_is_completion() -> None:
    record = {"instruction": "Übersetze.", "input": "Hello", "output": "Hallo"}
    prompt = "### Instruction:\nÜbersetze.\n\n### Input:\nHello\n\n### Response:\n"
    assert document(record) == Document("a.jsonl:3", prompt=prompt, completion="Hallo")
    without = "### Instruction:\nÜbersetze.\n\n### Response:\n"
    for nothing in ({"input": ""}, {"input": None}, {"input": " \n"}):
        assert document(record | nothing).prompt == without
    assert document({"instruction": "Übersetze.", "output": "Hallo", "id": 3}).prompt == without
    assert document({**record, "system": "Kurz."}).prompt == f"Kurz.\n\n{prompt}"
    earlier = f"{without}Hallo\n\n"
    assert document({**record, "history": [["Übersetze.", "Hallo"]]}).prompt == earlier + prompt
    assert document({**record, "instruction": "{input}"}).prompt == prompt.replace("Übersetze.", "{input}")


def test_rendered_text_of_alpaca_record_is_ignored() -> None:
    record = {"instruction": "Name a colour.\n", "input": "", "output": "Blue "}
    for text in (
        "Below is a task.\n\n### Instruction:\nName a colour.\n\n### Response:\nBlue",
        "Name a colour. Blue \n",
    ):
        assert document(record | {"text": text}) == document(record)
        assert document(record | {"text": text}, text="text").text == text
    others = ("Name a colour.", "Blue. Name a colour.", "Another text.", "Name a colour. Blue? No.")
    for rows in (*(record | {"text": text} for text in others), record | {"instruction": "", "text": "Blue"}):
        with pytest.raises(InputError, match=r"has 'text' and 'instruction\+output', but only one of them is allowed"):
            document(rows)


def test_wording_of_alpaca_prompts_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"text": "c"}\n')
    wording = "### Instruction:\\n{instruction}\\n\\n### Input:\\n{input}\\n\\n### Response:\\n"
    note = f'1 Alpaca record: the prompt is "{wording}", without its middle part if there is no input'
    corpus = read_corpus(str(path))
    assert len(corpus.documents) == 2
    shapes = "records of several shapes: 1 Alpaca, 1 text"
    assert corpus.notes == (f"2 records in 1 file from {path}", shapes, note)
    assert shape_notes(["text"]) == []


def test_named_columns_are_read_instead() -> None:
    record = {"text": "wrong", "body": "right", "dialog": [USER, ANSWER], "messages": [USER]}
    assert document(record, text="body") == Document("a.jsonl:3", text="right")
    assert document(record, messages="dialog") == Document("a.jsonl:3", messages=(USER, ANSWER))
    with_both = {"text": "right", "messages": [USER, ANSWER]}
    assert document(with_both, text="text").text == "right"
    assert document(with_both, messages="messages").messages == (USER, ANSWER)
    assert refusal({"body": None}, text="body") == (
        "the record cannot be trained on: its 'body' is null, and --text-column is 'body'."
    )
    assert refusal({"text": "a"}, messages="dialog") == "the record has 'text', and --messages-column is 'dialog'."


def test_named_column_missing_in_table_is_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    assert read_corpus(str(tmp_path), columns=RecordColumns(text="body")).documents[0].text == "a"
    with pytest.raises(InputError, match="has the columns 'body', and --text-column 'content' is not among them"):
        tuple(read_corpus(str(tmp_path), columns=RecordColumns(text="content")))


def test_saved_dataset_of_chats_is_read(tmp_path: Path) -> None:
    rows = [{"messages": [USER, ANSWER], "tools": json.dumps([TOOL]), "id": 1}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    (found,) = read_corpus(str(tmp_path / "set")).documents
    assert found == Document(f"{tmp_path / 'set'}:1", messages=(USER, ANSWER), tools=(TOOL,))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a", "answer": "b"}, f"the record has 'question', 'answer'. {EXPECTED}"),
        ({"instruction": "a", "response": "b"}, f"the record has 'instruction', 'response'. {EXPECTED}"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            f"the record has 'prompt', 'chosen', 'rejected'. {PREFERENCES}",
        ),
        (
            {"prompt": "a", "completion": "b", "label": False},
            "the record has 'label' False, and without it bad completions would be trained on like good ones. "
            f"{UNPAIRED} Or keep the good completions, and remove the column 'label'.",
        ),
        (
            {"prompt": "a", "completion": "b", "system": "c", "tools": [TOOL]},
            "the record has 'system', 'tools' and a prompt that is a string, which cannot use it. Add it to 'prompt', "
            "make 'prompt' and 'completion' messages, or remove it.",
        ),
        (
            {"prompt": [{"role": "system", "content": "a"}, USER], "completion": [ANSWER], "system": "b"},
            "the record has 'system', and 'prompt' begins with one. Keep one of them.",
        ),
        (
            {"prompt": [USER], "completion": [ANSWER], "history": [["a", "b"]]},
            "the record has 'history', which is not used with messages. Add its turns to 'prompt', or remove it.",
        ),
        ({"text": None, "id": None}, "the record cannot be trained on: its 'text' is null."),
        ({"prompt": "a", "completion": None}, "the record cannot be trained on: its 'completion' is null."),
        (
            {"text": None, "messages": None, "tools": None},
            "the record cannot be trained on: its 'text', 'messages' are null.",
        ),
        ({"prompt": "a", "id": None}, f"the record has 'prompt', 'id' (null: 'id'). {EXPECTED}"),
        (
            {"text": "a", "instruction": "b", "output": "c"},
            "the record has 'text' and 'instruction+output', but only one of them is allowed. Keep one, or pass "
            "--text-column text.",
        ),
        (
            {"conversations": [USER, ANSWER], "prompt": "b", "completion": "c"},
            "the record has 'prompt+completion' and 'conversations', but only one of them is allowed. Keep one.",
        ),
        ({"instruction": "a", "output": ""}, "the record yields no training token: its output is empty."),
        ({"instruction": 5, "output": "a"}, "the field 'instruction' is a number and must be a string."),
        (
            {"instruction": "a", "output": "b", "history": ["c"]},
            "the field 'history' must be a list of pairs of an instruction and its output.",
        ),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}, USER, ANSWER]},
            "the record has 'system', and 'messages' begins with one. Keep one of them.",
        ),
        ({"system": 5, "messages": [USER, ANSWER]}, "the field 'system' is a number and must be a string."),
        (
            {"tools": "search", "messages": [USER, ANSWER]},
            "the field 'tools' is a string and must be a list of objects, or its JSON text.",
        ),
        (
            {"prompt": [USER, ANSWER], "completion": [USER]},
            "the record yields no training token: every message of the assistant has the weight 0.",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_other_record_is_rejected(record: dict[str, Any], message: str) -> None:
    assert refusal(record) == message


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user"}, "message 2 has 'role' and must have 'role' and 'content', or 'from' and 'value'."),
        ({"from": "narrator", "value": "a"}, "message 2 is from 'narrator'; the senders are system, developer, user,"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "the content of message 2 has a part of type 'image_url' with 'type', 'image_url'; only parts of text can "
            "be trained on.",
        ),
        ({"role": "user", "content": {"a": 1}}, "the content of message 2 is an object and must be a string."),
        (
            {"role": "assistant", "content": "a", "weight": -1},
            "the weight of message 2 is -1 and must be",
        ),
        (
            {"role": "assistant", "content": "a", "weight": "1"},
            "the weight of message 2 is '1' and must be",
        ),
        ({"role": "assistant", "content": "a", "weight": True}, "the weight of message 2 is True and must be"),
        ({"role": "assistant", "content": "a", "weight": float("nan")}, "the weight of message 2 is nan and must be 0"),
        ({"role": "assistant", "content": "a", "weight": 1e39}, "the weight of message 2 is 1e+39 and must be"),
        (
            {"role": "assistant", "content": "a", "weight": 10**99},
            "the weight of message 2 is a number and must be",
        ),
        (
            {"role": "assistant", "content": "a", "weight": 1e-40},
            "the weight of message 2 is 1e-40 and must be",
        ),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "message 2 calls a tool, and its role is user;"),
        ({"role": "assistant", "tool_calls": "a"}, "'tool_calls' of message 2 is a string and must be a list."),
        ({"role": "assistant", "tool_calls": ["a"]}, "call 1 of message 2 is a string and must be an object"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "call 1 of message 2 has no 'function' with a 'name'."),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "the arguments of call 1 of message 2 are a string and must be an object, or the JSON text of one.",
        ),
        (
            {"from": "function_call", "value": "f()"},
            "message 2 calls a tool, and its value is a string and must be JSON",
        ),
        (
            {"role": "assistant", "content": "a", "name": "\ud800"},
            "the entry 'name' of message 2 has half of a surrogate",
        ),
    ],
    ids=range(18),
)
def test_other_message_is_rejected(message: dict[str, Any], error: str) -> None:
    assert refusal({"messages": [USER, message, ANSWER]}).startswith(error)


@pytest.mark.parametrize("label", [True, "TRUE", " false"], ids=["boolean", "upper-case", "text"])
def test_label_of_completion_is_rejected(label: object) -> None:
    assert refusal({"prompt": "a", "completion": "b", "label": label}).startswith(f"the record has 'label' {label!r}")


def test_label_of_parquet_is_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"], "label": [False]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="has 'label' False, and without it bad completions would be trained on"):
        tuple(read_corpus(str(tmp_path / "a.parquet")))


def test_table_of_preferences_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("chosen,rejected\nb,c\n")
    with pytest.raises(InputError) as caught:
        tuple(read_corpus(str(tmp_path / "a.csv")))
    assert str(caught.value).endswith(f"'chosen', 'rejected', none of which can be trained on. {PREFERENCES}")


@pytest.mark.parametrize(
    "text",
    [
        "[1] says so.",
        "[]",
        "[1, 2]",
        '["user", "content"]',
        '[{"from": "Paris", "to": "Oslo"}]',
        '[{"role": "editor", "name": "Ada"}]',
        '[{"role": "user", "content": "cut',
        '[{"role": "user", "content": "Hallo?"}, 3]',
        '{"role": "user", "content": "Hallo?"}',
        "[{'id': 3}]",
        "[{'role': 'user'}] is Python.",
    ],
)
def test_text_that_is_no_list_of_messages_stays_text(text: str) -> None:
    assert document({"prompt": text, "completion": "b"}) == Document("a.jsonl:3", prompt=text, completion="b")
    assert document({"prompt": "a", "completion": text}) == Document("a.jsonl:3", prompt="a", completion=text)


@pytest.mark.parametrize("text", [str([USER]), "[{'content': 'a', 'role': 'user'}\n {'content': 'b', 'role': 'user'}]"])
def test_messages_in_notation_of_python_are_rejected(text: str) -> None:
    assert refusal({"prompt": text, "completion": "b"}) == (
        "the field 'prompt' is a list of messages in Python's notation, and must be JSON text. Write it with "
        "json.dumps."
    )


def test_other_columns_do_not_change_completion() -> None:
    record = {"prompt": "a", "completion": "b", "label": 1, "system": "", "history": "[]", "tools": "[]"}
    assert document(record) == Document("a.jsonl:3", prompt="a", completion="b")


def test_conversation_without_training_token_is_rejected() -> None:
    masked = {"messages": [USER, ANSWER | {"weight": 0}]}
    assert refusal(masked) == "the record yields no training token: every message of the assistant has the weight 0."
    nothing = "the record yields no training token: no message of the assistant has content."
    assert refusal({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]}) == nothing
    assert refusal({"messages": [USER]}) == nothing


def test_many_or_long_columns_are_listed_in_short() -> None:
    message = refusal({f"column {i}": "a" for i in range(200)} | {"x" * 500: "a"})
    assert message.startswith("the record has 'column 0', 'column 1', ")
    assert "'column 19', and 181 more. A record must have" in message
    assert len(refusal({"x" * 500: "a"})) < 400


def test_deeply_nested_tools_do_not_end_the_process() -> None:
    nested: Any = {"a": 1}
    for _ in range(3000):
        nested = {"a": nested}
    assert refusal({"messages": [USER, ANSWER], "tools": [nested]}) == "the field 'tools' has a value that is not JSON."
