"""Documents of texts, which are made and hashed by a shorter way, are those of the constructor."""

import hashlib
import json
import pickle
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from bigbatch.lm.data.documents import Document, text_key


@given(st.text(st.characters(codec=None)) | st.sampled_from(["\x00\x7f\u2028", "\ud800", '"\\/', "😀"]))
def test_text_has_the_key_of_its_json(text: str) -> None:
    content = json.dumps([text, None, None, None], ensure_ascii=True, separators=(",", ":"))
    key = hashlib.sha256(content.encode("ascii")).hexdigest()
    assert Document("a", text=text).key == key
    assert text_key(text) == int(key[:16], 16)


def test_document_of_text_equals_constructed_one() -> None:
    found, expected = Document.of_text("a:1", "fox", shape="text"), Document("a:1", text="fox", shape="text")
    assert found == expected
    assert repr(found) == repr(expected)
    assert found.shape == expected.shape
    assert hash(found) == hash(expected)
    assert found.key == expected.key
    assert pickle.loads(pickle.dumps(found)) == expected
    assert replace(found, source="b") == Document("b", text="fox")
