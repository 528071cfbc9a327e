"""Documents are read as they stand, and what cannot be read is refused in one sentence that says where."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigbatch.errors import InputError
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.reading import SKIP_ADVICE
from bigbatch.lm.data.sources import ReadOptions, open_sources, read_corpus

CONVERSATION = [{"role": "user", "content": "Hallo?"}, {"role": "assistant", "content": "Grüß dich."}]


def write_lines(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def read(data: str | Path) -> Corpus:
    """Return the documents of a source after one pass over them."""
    corpus = read_corpus(str(data))
    assert corpus.documents
    return corpus


def refusal(data: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        read(data)
    return str(caught.value)


def test_text_file_is_one_unchanged_document(tmp_path: Path) -> None:
    text = "Füße, 你好, עברית\r\n\tπ\u2028 end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = read(tmp_path / "a.txt")
    assert corpus.documents == (Document(str(tmp_path / "a.txt"), text=text),)
    assert corpus.notes == (f"1 text file from {tmp_path / 'a.txt'}",)


def test_byte_order_mark_is_stripped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}')
    assert [document.text for document in read_corpus(str(tmp_path)).documents] == ["hello", "hello"]


def test_folder_is_read_recursively_sorted_without_hidden_entries(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/c/y.py", ".hidden", ".git/config", "__pycache__/x.pyc"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\xff" if name.startswith((".", "_")) else name.encode())
    corpus = read(tmp_path)
    assert [document.text for document in corpus.documents] == ["a/c/y.py", "a/z.md", "b.txt"]
    assert corpus.documents[0].source == str(tmp_path / "a/c/y.py")
    assert corpus.notes == (f"3 text files from {tmp_path}", "3 hidden or __pycache__ entries left out")


def test_json_lines_accept_every_record_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        {"text": "one\u2028two", "id": 7},
        "",
        {"prompt": "", "completion": " "},
        {"messages": CONVERSATION, "prompt": "ignored without a completion"},
    ]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) if line else "  " for line in lines))
    first, second, third = read_corpus(str(path)).documents
    assert first == Document(f"{path}:1", text="one\u2028two")
    assert second == Document(f"{path}:3", prompt="", completion=" ")
    assert third == Document(f"{path}:4", messages=tuple(CONVERSATION))


def test_parquet_gives_same_documents_as_json_lines(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"text": "été"}, {"prompt": "p", "completion": "c"}, {"messages": CONVERSATION}]
    columns = ("text", "prompt", "completion", "messages")
    rows = [{name: record.get(name) for name in columns} | {"id": 1} for record in records]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_lines(tmp_path / "b.jsonl", *records)
    corpus = read(tmp_path)
    keys = [document.key for document in corpus.documents]
    assert keys[:3] == keys[3:]
    assert corpus.documents[1].source == f"{tmp_path / 'a.parquet'}:2"
    shapes = "records of several shapes: 2 text, 2 prompt-completion, 2 messages"
    assert corpus.notes == (f"6 records in 2 files from {tmp_path}", shapes)


def test_key_depends_on_content_not_path() -> None:
    assert Document("a", text="x").key == Document("b", text="x").key
    keys = {
        Document("a", text="x").key,
        Document("a", prompt="x", completion="").key,
        Document("a", prompt="", completion="x").key,
        Document("a", messages=({"role": "user", "content": "x"},)).key,
    }
    assert len(keys) == 4
    reordered = Document("a", messages=({"content": "x", "role": "user"},))
    assert reordered.key in keys
    # A fixed value: a run that goes on elsewhere must hold out the same documents.
    assert Document("a", text="x").key.startswith("4133a35047c6c214")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: it yields no training token."),
        (b" \n\t\n", "contains only white space: it yields no training token."),
        (b"\xef\xbb\xbf", "contains only white space: it yields no training token."),
        (b"caf\xe9 au lait", "is not UTF-8: byte 0xe9 at offset 3. Convert it to UTF-8, or remove it."),
    ],
)
def test_empty_or_misencoded_text_is_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert refusal(path) == f"{path} {message}"
    (tmp_path / "good.txt").write_text("good")
    assert refusal(tmp_path) == f"{path} {message} {SKIP_ADVICE}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "not valid JSON: Expecting property name enclosed in double quotes at column 2."),
        ('{"text": "a"', "not valid JSON: Expecting ',' delimiter at column 13."),
        ("[" * 100_000, "JSON that Python cannot read: maximum recursion depth"),
        ("1" * 5000, "JSON that Python cannot read: Exceeds the limit"),
        ('["a"]', "the record is a list and not an object. A record must have 'text', or 'prompt' and 'completion'"),
        ('"a"', "the record is a string and not an object."),
        ("null", "the record is null and not an object."),
        ("{}", "the record has no field. A record must have"),
        ('{"content": "a", "id": 1}', "the record has 'content', 'id'. A record must have 'text', or"),
        ('{"prompt": "a"}', "the record has 'prompt'. A record must have 'text', or 'prompt' and 'completion', or"),
        (
            '{"text": "a", "messages": []}',
            "has 'text' and 'messages', but only one of them is allowed. Keep one, or pass --text-column text or "
            "--messages-column messages.",
        ),
        ('{"text": 5}', "the field 'text' is a number and must be a string."),
        ('{"text": null}', "the record cannot be trained on: its 'text' is null. "),
        (
            '{"prompt": ["a"], "completion": "b"}',
            "message 1 is a string and must be an object with 'role' and 'content'.",
        ),
        ('{"prompt": "a", "completion": {}}', "the field 'completion' is an object and must be a string."),
        ('{"text": " \\n"}', "the record yields no training token: its text is empty."),
        ('{"prompt": "a", "completion": ""}', "the record yields no training token: its completion is empty."),
        ('{"text": "a\\ud800"}', "the field 'text' has half of a surrogate pair, '\\ud800', which is not a character."),
        ('{"messages": "a"}', "the field 'messages' is a string and must be a list."),
        ('{"messages": []}', "the record yields no training token: its list of messages is empty."),
        ('{"messages": ["a"]}', "message 1 is a string and must be an object with 'role' and 'content'."),
        (
            '{"messages": [{"from": "user", "text": "a"}]}',
            "message 1 has 'from', 'text' and must have 'role' and 'content', or 'from' and 'value'.",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "a"}]}',
            "message 2 has the role 'bot'; the roles are system, developer, user, assistant, tool.",
        ),
        (
            '{"messages": [{"role": "user", "content": ["a"]}]}',
            "the content of message 1 has a part that is a string and must be an object with 'text'.",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "message 1 is from the assistant and answers nothing. Start with a system or user message.",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
            "the record yields no training token: no message of the assistant has content.",
        ),
    ],
)
def test_broken_record_is_rejected_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    found = refusal(path)
    assert found.startswith(f"{path}:3: ")
    assert message in found
    assert "\n" not in found


def test_misencoded_json_lines_name_line_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n')
    assert refusal(path).startswith(f"{path}:2 is not UTF-8: byte 0xe9 at offset 30.")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_json_lines_without_records_are_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert refusal(tmp_path / "a.jsonl") == f"{tmp_path / 'a.jsonl'} is empty: it yields no training token."


def test_broken_parquet_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet at all")
    assert refusal(path).startswith(f"{path} cannot be read as a Parquet file: ")
    pq.write_table(pa.table({"body": ["a"]}), path)
    assert refusal(path).startswith(
        f"{path} has the columns 'body', none of which can be trained on. A record must have 'text'"
    )
    pq.write_table(pa.table({"text": [1]}), path)
    assert refusal(path) == f"{path}:1: the field 'text' is a number and must be a string. {SKIP_ADVICE}"
    pq.write_table(pa.table({"text": ["a", None]}), path)
    assert refusal(path).startswith(f"{path}:2: the record has no field. A record must have")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert refusal(path) == f"{path} is empty: it yields no training token."


def test_empty_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("a")
    assert refusal(tmp_path) == f"the folder {tmp_path} contains no file to train on."


def test_link_to_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'link'} is a link to a folder.")


def test_special_file_is_rejected(tmp_path: Path) -> None:
    expected = "{} is a {}, but --data needs a regular file or a folder. Copy its content into a file."
    assert refusal("/dev/null") == expected.format("/dev/null", "device")
    os.mkfifo(tmp_path / "a.jsonl")
    assert refusal(tmp_path / "a.jsonl") == expected.format(tmp_path / "a.jsonl", "pipe")


def test_special_files_in_folder_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "sub" / "b.parquet")
    pipe = tmp_path / "sub" / "b.parquet"
    assert refusal(tmp_path) == (
        f"the folder {tmp_path} contains no file to train on: {pipe} is a pipe and is left out."
    )
    (tmp_path / "a.txt").write_text("hello")
    assert read(tmp_path).notes[-1] == f"{pipe} is a pipe and is left out"
    (tmp_path / "null").symlink_to("/dev/null")
    assert read(tmp_path).notes == (
        f"1 text file from {tmp_path}",
        f"2 entries that are not regular files are left out, such as {tmp_path / 'null'}, a device",
    )


def test_broken_link_in_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere.txt")
    assert refusal(tmp_path) == f"cannot read {tmp_path / 'a.txt'}: no such file or directory."


def test_missing_path_is_rejected_with_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "data.jsonl").write_text("")
    missing = tmp_path / "corpus" / "date.jsonl"
    assert refusal(missing) == f"there is no file or folder '{missing}'. Did you mean {tmp_path}/corpus/data.jsonl?"
    below = tmp_path / "corpsu" / "data.jsonl"
    assert refusal(below) == f"there is no file or folder '{below}'. Did you mean {tmp_path}/corpus?"
    assert "The built-in sources are python-stdlib and" in refusal(tmp_path / "else.txt")
    assert refusal("x" * 5000 + ".txt").startswith("there is no file or folder")
    assert refusal("").startswith("there is no file or folder ''.")


def test_misspelt_source_is_not_looked_up_on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = refusal("python-stdlbi")
    assert found == "there is no file or folder 'python-stdlbi'. Did you mean python-stdlib?"


def test_saved_dataset_is_read_from_train_split(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": "a", "id": 1}, {"text": "b", "id": 2}])
    rows.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "test-only"))
    for name in ("plain", "splits"):
        corpus = read(tmp_path / name)
        assert [document.text for document in corpus.documents] == ["a", "b"]
        assert corpus.documents[1].source == f"{tmp_path / name}:2"
        of_split = ", split train" if name == "splits" else ""
        assert corpus.notes[0] == f"2 records of the saved dataset {tmp_path / name}{of_split}"
    assert read(tmp_path / "plain").notes[1:] == ()
    assert read(tmp_path / "splits").notes[1:] == (
        f"the saved dataset {tmp_path / 'splits'} has other splits, which are not used: test",
    )
    only = tmp_path / "test-only"
    assert refusal(only) == (
        f"the saved dataset {only} has the split test and none of the name train: choose one with --split, as --split "
        "test."
    )
    (tmp_path / "plain" / "state.json").write_text("{")
    assert refusal(tmp_path / "plain").startswith(f"the saved dataset {tmp_path / 'plain'} cannot be read: ")


def test_pipe_in_saved_dataset_is_rejected(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "set"))
    file = next((tmp_path / "set").glob("*.arrow"))
    file.unlink()
    os.mkfifo(file)
    assert refusal(tmp_path / "set") == (
        f"the saved dataset {tmp_path / 'set'} contains {file.name}, a pipe. Remove it."
    )


def test_unreachable_hub_fails_fast_with_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = refusal("somebody/some-dataset")  # tests run in the hub's offline mode
    assert found.startswith("'somebody/some-dataset' is not a path on this machine and cannot be loaded from the hub:")
    assert "\n" not in found


def test_reading_text_loads_no_torch_or_model_library() -> None:
    program = (
        "import sys; from bigbatch.lm.data import sources; sources.read_corpus(sys.argv[1]);"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program, __file__], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_several_sources_keep_their_order(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", {"text": "b"})
    write_lines(tmp_path / "a:1.jsonl", {"text": "a"})
    opened = open_sources([str(tmp_path / "b.jsonl"), str(tmp_path / "a:1.jsonl")])
    assert [[document.text for document in corpus] for corpus in opened.training] == [["b"], ["a"]]
    assert [corpus.name for corpus in opened.training] == [str(tmp_path / "b.jsonl"), str(tmp_path / "a:1.jsonl")]
    assert opened.training[1].files == (tmp_path / "a:1.jsonl",)
    assert opened.validation == ()


def test_corpus_is_read_again_each_time(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": 5}, {"text": "two"})
    corpus = read_corpus(path, skip_broken=True)
    first, notes = corpus.documents, None
    for _ in range(2):
        assert corpus.documents == first
        assert notes in (None, corpus.notes)
        notes = corpus.notes
    assert corpus.left_out == (
        f"1 broken record left out; the first: {path}:2: the field 'text' is a number and must be a string.",
    )


def test_validation_data_is_apart(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {"text": "a"})
    write_lines(tmp_path / "b.jsonl", {"text": "b"})
    opened = open_sources([str(tmp_path / "a.jsonl")], validation_data=[str(tmp_path / "b.jsonl")])
    assert [document.text for document in opened.validation[0]] == ["b"]


def test_file_in_two_sources_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_lines(tmp_path / "sub" / "a.jsonl", {"text": "a"})
    file, folder = str(tmp_path / "sub/a.jsonl"), str(tmp_path / "sub")
    remedy = "Leave it out of one of them."
    for data, validation, message in (
        ([file, file], [], f"{file} would be read twice: it is in {file}, given twice. {remedy}"),
        ([file, folder], [], f"{file} would be read twice: it is in {file} and {folder}. {remedy}"),
        ([folder], [file], f"{file} would be trained on and validated on: it is in {folder} and {file}. {remedy}"),
    ):
        with pytest.raises(InputError) as caught:
            open_sources(data, validation_data=validation)
        assert str(caught.value) == message


@pytest.mark.parametrize("flag", ["split", "subset"])
def test_split_of_plain_files_is_rejected(flag: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(InputError) as caught:
        open_sources([path], options=ReadOptions(**{flag: "x"}))
    assert str(caught.value) == f"--{flag} x does nothing: {path} has no {flag}s. Leave it out."


def test_test_split_that_is_named_is_noted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "test.jsonl", {"text": "a"})
    note = f"{path} is trained on: --data names it, although it is named as the split test"
    assert read(path).left_out == (note,)


def test_validation_split_of_saved_dataset_is_used(tmp_path: Path) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "validation", "extra")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
    about = f"the saved dataset {tmp_path / 'set'}"
    opened = open_sources([str(tmp_path / "set")])
    assert [document.text for document in opened.validation[0]] == ["validation"]
    assert opened.notes == (f"validation: the split validation of {tmp_path / 'set'}; nothing is held out of the data",)
    (extra,) = open_sources([str(tmp_path / "set")], options=ReadOptions(split="extra")).training
    assert [document.text for document in extra] == ["extra"]
    with pytest.raises(InputError) as caught:
        open_sources([str(tmp_path / "set")], options=ReadOptions(split="dev"))
    assert str(caught.value) == f"{about} has no split 'dev': it has train, validation, extra."
