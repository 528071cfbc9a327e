"""The small tokenizer is exact and reproducible, and a model's own is refused where it cannot work."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from bigbatch.errors import InputError
from bigbatch.lm.data import tokenizer as module
from bigbatch.lm.data.tokenizer import SMALLEST_VOCABULARY, load_tokenizer, train_tokenizer

TEXTS = [f"def f_{i}(x):\n    return x + {i}\n" for i in range(50)]
TOKENIZER = train_tokenizer(TEXTS, vocabulary_size=275)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "\nBye."},
]


def refusal(name: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        load_tokenizer(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@given(st.text())
def test_every_text_round_trips_after_begin_token(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(ids[1:]) == text


def test_vocabulary_is_learned_and_keeps_its_size() -> None:
    assert len(TOKENIZER) == 275
    assert len(train_tokenizer(["ab"], vocabulary_size=4096)) == SMALLEST_VOCABULARY
    ids = TOKENIZER("    return x + 1\n", add_special_tokens=False)["input_ids"]
    assert len(ids) < 9
    assert len({TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id}) == 3


def test_same_texts_give_same_tokenizer() -> None:
    again = train_tokenizer(iter(TEXTS), vocabulary_size=275)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_vocabulary_too_small_for_bytes_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"vocabulary_size=258 cannot hold the 256 bytes .* Use at least 259\."):
        train_tokenizer(TEXTS, vocabulary_size=258)


def test_large_corpus_is_sampled_evenly() -> None:
    long = "".join(chr(i % 1000 + 32) for i in range(100_000))
    short = ["x" * 100] * 1000
    pieces = list(module._evenly_spread([long, *short], 200_000, 50_000))
    from_short = sum(map(len, (piece for piece in pieces if set(piece) == {"x"})))
    assert 50_000 - 4096 <= sum(map(len, pieces)) <= 50_000 + 4096
    assert 25_000 - 4096 <= from_short <= 25_000 + 4096
    assert list(module._evenly_spread(["a", "b"], 2, 2)) == ["a", "b"]


def test_chat_template_renders_first_turns_as_prefix() -> None:
    whole = TOKENIZER.apply_chat_template(TURNS, tokenize=False)
    assert whole == (
        "<|begin|>system:\nBe brief.\nuser:\nHi\nassistant:\nHello.<|end|>user:\nBye\nassistant:\n\nBye.<|end|>"
    )
    for i in range(1, len(TURNS)):
        assert whole.startswith(TOKENIZER.apply_chat_template(TURNS[:i], tokenize=False))
        if TURNS[i]["role"] == "assistant":
            assert whole.startswith(
                TOKENIZER.apply_chat_template(TURNS[:i], tokenize=False, add_generation_prompt=True)
            )


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_saved_tokenizer_loads_identically(tmp_path: Path, beside_a_model: bool) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    if beside_a_model:
        # A model's type makes transformers prefer its own tokenizer class, which would split texts otherwise.
        LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert loaded(TEXTS)["input_ids"] == TOKENIZER(TEXTS)["input_ids"]
        assert loaded.special_tokens_map == TOKENIZER.special_tokens_map
        assert loaded.apply_chat_template(TURNS) == TOKENIZER.apply_chat_template(TURNS)
        assert loaded.decode(loaded("a . b n't")["input_ids"], skip_special_tokens=True) == "a . b n't"


def test_tokenizer_without_padding_uses_end_token(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    edit_config(tmp_path, pad_token=None)
    assert load_tokenizer(str(tmp_path)).pad_token_id == TOKENIZER.eos_token_id


def test_tokenizer_without_end_token_is_rejected(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    edit_config(tmp_path, eos_token=None)
    assert refusal(tmp_path).startswith(f"the tokenizer of {tmp_path} has no end token to terminate documents with.")


def test_folder_without_tokenizer_is_rejected(tmp_path: Path) -> None:
    # From this configuration alone transformers would build a tokenizer with an empty vocabulary.
    GPT2Config().save_pretrained(tmp_path)
    assert refusal(tmp_path).startswith(
        f"the folder {tmp_path} contains no tokenizer. Save the model's tokenizer into it"
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert refusal(tmp_path).startswith(f"the tokenizer of {tmp_path} cannot encode text:")


@pytest.mark.parametrize("content", ["{broken", "{}", '{"model": {"type": "None"}}'])
def test_broken_tokenizer_is_rejected(tmp_path: Path, content: str) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    assert refusal(tmp_path).startswith(f"the tokenizer of {tmp_path} cannot be loaded: ")


def test_unreachable_hub_is_one_sentence() -> None:
    # Tests run in the hub's offline mode.
    assert refusal("somebody/some-model").startswith("'somebody/some-model' is not a folder, and the hub")
    assert refusal("no such/folder/here").startswith("'no such/folder/here' is neither a path on this machine nor a")
