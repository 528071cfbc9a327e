"""Records of pairs and of queries: their shapes, their tokens, and what happens to long ones."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import extract_prompt

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.pair_batches import collate_pairs
from bigbatch.lm.data.pair_dataset import encode_pairs
from bigbatch.lm.data.pairs import EXPECTED, Objective, shared_prefix, to_parts
from bigbatch.lm.data.records import RecordColumns, shape_notes, to_document
from bigbatch.lm.data.sources import ReadOptions, open_sources
from bigbatch.lm.data.tokenizer import AnyTokenizer, train_tokenizer
from support.language_models import examples, pairs, records, write_jsonl

ASKED = {"role": "user", "content": "Name a prime."}
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer() -> AnyTokenizer:
    return train_tokenizer([row["completion"] for row in records(50)], vocabulary_size=300)


def parts(record: dict[str, Any], objective: Objective = "dpo") -> list[tuple[str, Any, Any]]:
    document = to_parts(record, "a:1", objective)
    assert document.parts is not None
    return [(part.name, part.context, part.answer) for part in document.parts]


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_prompt_and_answers_are_two_sequences(objective: Objective) -> None:
    found = parts({"prompt": "p", "chosen": "a", "rejected": "b", "other": 3}, objective)
    assert found == [("chosen", "p", "a"), ("rejected", "p", "b")]


def test_prompt_of_strings_is_what_both_begin_with() -> None:
    assert parts({"chosen": "What? Yes", "rejected": "What? No"}) == [
        ("chosen", "What?", " Yes"),
        ("rejected", "What?", " No"),
    ]


def test_prompt_of_messages_is_what_both_begin_with() -> None:
    found = parts({"chosen": [ASKED, answer("7")], "rejected": [ASKED, answer("9")]})
    assert found == [("chosen", (ASKED,), (answer("7"),)), ("rejected", (ASKED,), (answer("9"),))]


def test_string_among_messages_is_that_of_its_role() -> None:
    found = parts({"prompt": "Name a prime.", "chosen": [answer("7")], "rejected": "9"})
    assert found == [("chosen", (ASKED,), (answer("7"),)), ("rejected", (ASKED,), (answer("9"),))]


@pytest.mark.parametrize("objective", ["dpo", "reward"])
@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("Name a prime.", [ASKED]),
        ("Name a prime. ", [ASKED]),
        ([ASKED], [ASKED]),
        ([{"from": "human", "value": "Name a prime."}], [ASKED]),
        ([SYSTEM, ASKED], [SYSTEM, ASKED]),
        ("Name a prime.", [SYSTEM, ASKED]),
        ([SYSTEM, ASKED], [ASKED]),
        ([ASKED, answer("7") | {"weight": 0}, ASKED], [ASKED, answer("7"), ASKED]),
        (" ", [ASKED]),
    ],
)
def test_prompt_of_whole_conversations_is_used_once(prompt: Any, start: list[Any], objective: Objective) -> None:
    record = {"prompt": prompt, "chosen": [*start, answer("7")], "rejected": [*start, answer("9")]}
    context = (SYSTEM, ASKED) if SYSTEM in [*start, *prompt] else tuple(start)
    assert parts(record, objective) == [
        ("chosen", context, (answer("7"),)),
        ("rejected", context, (answer("9"),)),
    ]


SEVEN, NINE = [answer("7")], [answer("9")]


@pytest.mark.parametrize("objective", ["dpo", "reward"])
@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [ASKED], "chosen": SEVEN, "rejected": NINE},
        {"prompt": "Name a prime.", "chosen": SEVEN, "rejected": "9", "history": []},
        {"prompt": "Name a prime.", "chosen": [ASKED, *SEVEN], "rejected": [ASKED, *NINE], "history": "[]"},
        {"chosen": [ASKED, *SEVEN], "rejected": [ASKED, *NINE], "history": None},
    ],
)
def test_system_of_a_pair_begins_its_prompt(
    record: dict[str, Any], objective: Objective, tokenizer: AnyTokenizer
) -> None:
    row = {"system": "Be brief.", **record}
    assert [context for _, context, _ in parts(row, objective)] == [(SYSTEM, ASKED)] * 2
    assert parts(record | {"system": ""}, objective) == parts(record | {"system": None}, objective)
    tokenizer.chat_template = CHAT
    data, _ = encode_pairs(documents([row], objective), tokenizer, objective, max_length=99)
    start = "system:Be brief.<|end|>user:Name a prime.<|end|>assistant:"
    assert [tokenizer.decode(row) for row in data[0]["sequences"]] == [f"{start}7<|end|>", f"{start}9<|end|>"]


def test_system_of_a_reward_pair_needs_no_prompt() -> None:
    record = {"system": "Be brief.", "chosen": SEVEN, "rejected": NINE}
    assert [context for _, context, _ in parts(record, "reward")] == [(SYSTEM,)] * 2


def test_system_of_parquet_is_read(tmp_path: Path) -> None:
    row = {"system": "Be brief.", "prompt": [ASKED], "chosen": SEVEN, "rejected": NINE}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (document,) = read_table(tmp_path / "a.parquet", "dpo")
    assert document.parts == to_parts(row, "a:1", "dpo").parts
    row = {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m", "negatives": "x"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "b.parquet")
    (document,) = read_table(tmp_path / "b.parquet", "embedding")
    assert [part.answer for part in document.parts or ()] == ["q", "p", "n", "m"]


def test_numbered_negatives_are_read_in_order() -> None:
    record = {
        "negative_10": "c",
        "negative_2": "b",
        "negative_3": None,
        "negative_4": " ",
        "negative_1": "a",
        "negative": None,
    }
    assert parts({"anchor": "q", "positive": "p", "negative_x": "x", **record}, "embedding")[2:] == [
        ("negative", "", text) for text in "abc"
    ]


def test_prompt_of_conversations_is_what_both_begin_with() -> None:
    start = [ASKED, answer("7"), {"role": "user", "content": "Another?"}]
    whole = {"chosen": [*start, answer("11")], "rejected": [*start, answer("12")]}
    assert parts({"prompt": "Name a prime.", **whole}) == parts(whole)


def test_question_that_is_asked_again_is_kept() -> None:
    again = {"prompt": [ASKED, answer("7")], "chosen": [ASKED, answer("11")], "rejected": [ASKED, answer("7")]}
    assert parts(again) == [
        ("chosen", (ASKED, answer("7")), (ASKED, answer("11"))),
        ("rejected", (ASKED, answer("7")), (ASKED, answer("7"))),
    ]
    twice = {"prompt": [ASKED, answer("8"), ASKED], "chosen": [answer("7")], "rejected": [answer("9")]}
    assert parts(twice, "reward")[0] == ("chosen", (ASKED, answer("8"), ASKED), (answer("7"),))


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_repeated_prompt_has_no_token_of_its_own(tokenizer: AnyTokenizer, objective: Objective) -> None:
    whole = {"chosen": [ASKED, answer("7")], "rejected": [ASKED, answer("9")]}
    tokenizer.chat_template = CHAT
    plain, both = (
        encode_pairs(documents([row], objective), tokenizer, objective, max_length=99)[0][0]
        for row in (whole, {"prompt": "Name a prime.", **whole})
    )
    texts = [tokenizer.decode(row) for row in both["sequences"]]
    assert texts == ["user:Name a prime.<|end|>assistant:7<|end|>", "user:Name a prime.<|end|>assistant:9<|end|>"]
    for name in {"sequences", "answers"} & set(plain):
        assert [row.tolist() for row in both[name]] == [row.tolist() for row in plain[name]]


@given(st.text("ab ", min_size=1, max_size=7), st.text("ab ", min_size=1, max_size=7))
def test_shared_prefix_is_that_of_trl(chosen: str, rejected: str) -> None:
    if chosen[0] != rejected[0]:  # TRL looks at the last character then
        assert shared_prefix(chosen, rejected) == 0
        return
    expected = extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"]
    assert chosen[: shared_prefix(chosen, rejected)] == expected


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({"query": "q", "positive": "p"}, ["query", "positive"]),
        ({"anchor": "q", "positive": "p", "negative": "n"}, ["query", "positive", "negative"]),
        ({"query": "q", "positive": "p", "negative": ["n", "m"]}, ["query", "positive", "negative", "negative"]),
        ({"query": "q", "positive": "p", "negative": None}, ["query", "positive"]),
    ],
)
def test_query_has_its_passages(record: dict[str, Any], names: list[str]) -> None:
    assert [name for name, _, _ in parts(record, "embedding")] == names


@pytest.mark.parametrize(
    ("objective", "record", "message"),
    [
        ("dpo", {"prompt": "p", "chosen": "a"}, f"a:1: the record has 'prompt', 'chosen'. {EXPECTED['dpo']}"),
        (
            "reward",
            {"chosen": "a", "rejected": None},
            f"a:1: the record has 'chosen', 'rejected' (null: 'rejected'). {EXPECTED['reward']}",
        ),
        ("embedding", {"query": "q"}, f"a:1: the record has 'query'. {EXPECTED['embedding']}"),
        (
            "reward",
            {"chosen": "a", "rejected": "b", "margin": 1.0},
            "a:1: the record has 'margin', which --objective reward does not use. Remove the column if the margins may "
            "be ignored.",
        ),
        (
            "dpo",
            {"chosen": [answer("7")], "rejected": [answer("9")]},
            "a:1: 'chosen' and 'rejected' begin with no message in common, which could be the prompt. Add it as "
            "'prompt'.",
        ),
        (
            "dpo",
            {"prompt": "Name a number.", "chosen": [ASKED, answer("7")], "rejected": [ASKED, answer("9")]},
            "a:1: 'prompt' ends with a message of the user, and 'chosen' begins with one of the user. Remove 'prompt' "
            "if 'chosen' and 'rejected' are whole conversations.",
        ),
        (
            "reward",
            {"prompt": "Name a prime.", "chosen": [answer("7")], "rejected": [ASKED, answer("9")]},
            "a:1: 'rejected' begins with the messages of 'prompt', and 'chosen' does not. Remove them from 'rejected'.",
        ),
        (
            "reward",
            {"prompt": "Name a prime.", "chosen": [ASKED, answer("7")], "rejected": [ASKED]},
            "a:1: 'chosen' and 'rejected' have no answer after the messages that both begin with.",
        ),
        (
            "dpo",
            {"prompt": "p", "chosen": str([answer("7")]), "rejected": str([answer("9")])},
            "a:1: the field 'chosen' is a list of messages in Python's notation, and must be JSON text. Write it with "
            "json.dumps.",
        ),
        (
            "embedding",
            {"query": "q", "positive": "p", "negative": "['n', 'm']"},
            "a:1: the field 'negative' is a list of strings in Python's notation, and must be JSON text. Write it with "
            "json.dumps.",
        ),
        (
            "embedding",
            {"query": "q", "positive": "p", "negative": """['it\\d'\n "isn't"]"""},
            "a:1: the field 'negative' is a list of strings in Python's notation, and must be JSON text. Write it with "
            "json.dumps.",
        ),
        (
            "dpo",
            {"prompt": "p", "chosen": "a", "rejected": "b", "system": "s", "history": [["q", "a"]], "tools": [{}]},
            "a:1: the record has 'system', 'history', 'tools' and a prompt that is a string, which cannot use it. Add "
            "it to 'prompt', make 'chosen' and 'rejected' messages, or remove it.",
        ),
        (
            "reward",
            {"chosen": "a", "rejected": "b", "system": "s"},
            "a:1: the record has 'system' and answers that are strings, which cannot use it. Add it to 'prompt', make "
            "'chosen' and 'rejected' messages, or remove it.",
        ),
        (
            "dpo",
            {"prompt": [SYSTEM, ASKED], "chosen": "7", "rejected": "9", "system": "s"},
            "a:1: the record has 'system', and 'prompt' begins with one. Keep one of them.",
        ),
        (
            "reward",
            {"chosen": [ASKED, answer("7")], "rejected": [SYSTEM, ASKED, answer("9")], "system": "s"},
            "a:1: the record has 'system', and 'rejected' begins with one. Keep one of them.",
        ),
        (
            "dpo",
            {"prompt": [ASKED], "chosen": "7", "rejected": "9", "history": [["q", "a"]]},
            "a:1: the record has 'history', which is not used with messages. Add its turns to 'prompt', or remove it.",
        ),
        (
            "embedding",
            {"query": "q", "positive": "p", "negative": "n", "negative_1": "m"},
            "a:1: the record has 'negative' and 'negative_1'. Keep one form of negatives.",
        ),
        ("dpo", {"prompt": "", "chosen": "", "rejected": ""}, "a:1: 'chosen' and 'rejected' are empty."),
        (
            "embedding",
            {"query": "q", "anchor": "q", "positive": "p"},
            "a:1: the record has 'query' and 'anchor', which are two names of one field. Keep one.",
        ),
        ("embedding", {"query": " ", "positive": "p"}, "a:1: the field 'query' is empty."),
        (
            "embedding",
            {"query": "q", "positive": "p", "negative": 3},
            "a:1: the field 'negative' is a number and must be a string or a list.",
        ),
    ],
)
def test_record_of_another_form_is_refused(objective: Objective, record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        to_document(record, "a:1", RecordColumns(objective=objective))
    assert str(caught.value) == message


def test_pairs_without_a_difference_are_counted() -> None:
    document = to_parts({"prompt": "p", "chosen": "a", "rejected": "a"}, "a:1", "dpo")
    assert shape_notes([document.shape, "preference"]) == [
        "1 pair whose chosen and rejected are equal: counted in the loss, without a gradient"
    ]


def read_table(path: Path, objective: Objective) -> list[Document]:
    options = ReadOptions(columns=RecordColumns(objective=objective))
    return [document for corpus in open_sources([str(path)], options=options).training for document in corpus]


def test_table_without_the_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na,b\n")
    with pytest.raises(InputError) as caught:
        read_table(path, "dpo")
    assert str(caught.value).endswith(f"has the columns 'prompt', 'completion'. {EXPECTED['dpo']}")


def test_csv_of_pairs_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("chosen,rejected,note\nab,ac,1\n")
    (document,) = read_table(path, "reward")
    assert [part.answer for part in document.parts or ()] == ["b", "c"]


@pytest.mark.parametrize(
    ("objective", "record"),
    [
        ("dpo", {"prompt": [ASKED], "chosen": [answer("7")], "rejected": [answer("9")]}),
        ("reward", {"prompt": "Name a prime.", "chosen": [ASKED, answer("7")], "rejected": [ASKED, answer("9")]}),
        ("reward", {"chosen": [ASKED, answer("[7]")], "rejected": [ASKED, answer("[9]")]}),
        ("embedding", {"query": "q", "positive": "[p]", "negative": ["n, 1", 'm "2"']}),
        ("embedding", {"query": "q", "positive": "p", "negative": []}),
    ],
)
def test_csv_with_lists_is_read_as_json(objective: Objective, record: dict[str, Any], tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(record))
        table.writeheader()
        table.writerow({name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in record.items()})
    (document,) = read_table(tmp_path / "a.csv", objective)
    assert document.parts == to_parts(record, "a:1", objective).parts


@pytest.mark.parametrize("text", ["[n]", "[1, 2]", '["n", 2]', '["n" and more', "['n'] is Python", "[n, 'm']"])
def test_negative_that_is_no_list_of_strings_stays_text(text: str) -> None:
    assert parts({"query": "q", "positive": "p", "negative": text}, "embedding")[2:] == [("negative", "", text)]


def test_key_depends_on_every_part() -> None:
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    assert len({to_parts(row, "a:1", "dpo").key for row in rows}) == 3


# tokens ----------------------------------------------------------------------------------------------------------


def documents(rows: list[dict[str, Any]], objective: Objective) -> list[Document]:
    return [to_parts(row, f"a:{number}", objective) for number, row in enumerate(rows, 1)]


def test_long_dpo_sequences_are_cut_and_full_prompts_left_out(tokenizer: AnyTokenizer) -> None:
    rows = [*pairs(12), {"prompt": "value " * 40, "chosen": "x", "rejected": "None"}]
    full, _ = encode_pairs(documents(rows, "dpo"), tokenizer, "dpo", max_length=10_000)
    cut, counts = encode_pairs(documents(rows, "dpo"), tokenizer, "dpo", max_length=16)
    starts = [min(int(a.int().argmax()) for a in full[i]["answers"]) for i in range(len(full))]
    kept = [i for i, start in enumerate(starts) if start < 16]
    assert 0 < len(kept) < len(rows)
    assert (counts.samples, counts.left_out) == (len(kept), len(rows) - len(kept))
    longer = 0
    for i, sample in zip(kept, (cut[j] for j in range(len(cut))), strict=True):
        for name in ("sequences", "answers"):
            for one, other in zip(sample[name], full[i][name], strict=True):
                assert one.tolist() == other[:16].tolist()
                longer += name == "answers" and len(other) > 16
    assert counts.cut == longer > 0
    assert counts.left_out == 1
    end = f"{longer} sequences cut to --max-length 16; 1 pair with a prompt that fills --max-length 16 left out"
    assert counts.describe("dpo", 16).endswith(end)


def test_long_reward_pairs_are_left_out(tokenizer: AnyTokenizer) -> None:
    full, _ = encode_pairs(documents(pairs(12), "reward"), tokenizer, "reward", max_length=10_000)
    limit = int(np.sort(full.lengths // 2)[6])
    kept, counts = encode_pairs(documents(pairs(12), "reward"), tokenizer, "reward", max_length=limit)
    assert len(kept) == counts.samples == int((full.lengths // 2 <= limit).sum()) < 12
    assert counts.left_out == 12 - counts.samples
    assert counts.cut == 0
    assert kept.longest_sequence <= limit


def test_cut_passages_keep_special_tokens_at_their_end(tokenizer: AnyTokenizer) -> None:
    from tokenizers import processors

    backend: Any = tokenizer.backend_tokenizer
    ends = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
    )
    before, backend.post_processor = backend.post_processor, ends
    try:
        data, counts = encode_pairs(documents(examples(9), "embedding"), tokenizer, "embedding", max_length=8)
        assert counts.cut > 0
        for i, row in enumerate(examples(9)):
            for name, tokens in zip(("query", "positive", "negative"), data[i]["sequences"], strict=True):
                text = row[name] if isinstance(row[name], str) else row[name][0]
                expected = tokenizer(text, truncation=True, max_length=8)["input_ids"]
                backend.no_truncation()
                assert tokens.tolist() == expected
    finally:
        backend.post_processor = before


def test_lengths_are_those_of_the_padded_sample(tokenizer: AnyTokenizer) -> None:
    rows = [row | {"negative": row["negative"][: i % 3]} for i, row in enumerate(examples(9, negatives=2))]
    data, counts = encode_pairs(documents(rows, "embedding"), tokenizer, "embedding", max_length=64)
    assert counts.sequences == sum(2 + len(row["negative"]) for row in rows)
    for i, row in enumerate(rows):
        sample = data[i]
        assert data.lengths[i] == collate_pairs([sample], pad_id=2)["input_ids"].numel()
        assert sample["present"].tolist() == [k < 2 + len(row["negative"]) for k in range(4)]


def test_pair_without_a_token_is_refused_or_counted(tokenizer: AnyTokenizer) -> None:
    rows = [*documents(pairs(2), "dpo"), Document("b:1", text="text")]
    with pytest.raises(InputError, match="b:1: it is a text and no record"):
        encode_pairs(rows, tokenizer, "dpo", max_length=64)
    broken: list[str] = []
    data, _ = encode_pairs(rows, tokenizer, "dpo", max_length=64, broken=broken)
    assert len(data) == 2
    assert broken == [f"b:1: it is a text and no record. {EXPECTED['dpo']}"]


def test_stored_pairs_are_split_as_wholes(tmp_path: Path) -> None:
    from bigbatch.lm.config.train_config import TrainConfig
    from bigbatch.lm.training.setup import set_up_training

    write_jsonl(tmp_path / "pairs.jsonl", pairs(60))
    config = TrainConfig.model_validate(
        {"data": str(tmp_path / "pairs.jsonl"), "objective": "reward", "validation_fraction": 0.2, "device": "cpu",
         "cache": str(tmp_path / "cache"), "max_length": 64}
    )  # fmt: skip
    first, again = set_up_training(config), set_up_training(config)
    assert first.validation is not None
    assert again.validation is not None
    assert len(first.training) + len(first.validation) == 60
    assert first.data_fingerprint == again.data_fingerprint
    texts = {
        tuple(first.tokenizer.decode(row, skip_special_tokens=True) for row in part[i]["sequences"])
        for part in (first.training, first.validation)
        for i in range(len(part))
    }
    assert texts == {(row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) for row in pairs(60)}
