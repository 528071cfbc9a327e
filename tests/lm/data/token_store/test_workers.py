"""Several processes yield the blocks of one, in order, and their failures are those of one."""

import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.token_store import encoding, workers
from bigbatch.lm.data.token_store.encoding import Batch, DocumentBatch, TextBatch
from bigbatch.lm.data.token_store.workers import Encoding, encode_all
from bigbatch.lm.data.token_store.writer import concatenated
from bigbatch.lm.data.tokenization import encode_documents
from bigbatch.lm.data.tokenizer import train_tokenizer
from support.forked_processes import ForkedProcess

ENCODING = Encoding(train_tokenizer(["the quick brown fox"] * 4, vocabulary_size=280))


@pytest.fixture(autouse=True)
def workers_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START_CHARACTERS", 1)


class ForkedWorker(ForkedProcess):
    """A worker that is a fork of the loaded process: a new interpreter takes two seconds to import the tokenizer."""

    def __init__(self, _words: list[str], **_options: Any) -> None:
        source, target = os.pipe()
        super().__init__(workers.serve, stdin=source)
        os.close(source)
        self.stdin = os.fdopen(target, "wb")
        self.stdout = self.stdout.detach()  # type: ignore[attr-defined]


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ForkedWorker]]:
    """Make the workers forks; yield those that are started."""
    started: list[ForkedWorker] = []

    def start(*words: Any, **options: Any) -> ForkedWorker:
        started.append(ForkedWorker(*words, **options))
        return started[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", start)
    yield started
    for fork in started:
        with fork:
            pass


def batches(number: int) -> Iterator[Batch]:
    for i in range(number):
        chat = ({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "fox"})
        found = [Document("a", text=f"the {i}"), Document("b", messages=chat)]
        yield DocumentBatch([*found, Document(f"c:{i}", messages=chat[:1])] if i % 5 == 4 else found)


@pytest.mark.slow
def test_blocks_keep_order_content_and_broken_documents() -> None:
    encoding = Encoding(ENCODING.tokenizer, skip_broken=True)
    alone = list(encode_all(batches(40), encoding, processes=1))
    together = list(encode_all(batches(40), encoding, processes=2))
    assert len(alone) == len(together) == 40
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.trained, other.trained)
        assert np.array_equal(one.keys, other.keys)
        assert one.broken == other.broken
    assert [len(block.broken) for block in together] == [i % 5 == 4 for i in range(40)]


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("processes", [1, 2])
def test_texts_keep_order_and_content_among_others(processes: int) -> None:
    chat = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "fox"})
    found = [
        Document(f"{i}:{j}", messages=chat)
        if i % 7 == 3 and j == 2
        else Document(f"{i}:{j}", text=f"the {i} {'é' * j}")
        for i in range(60)
        for j in range(4)
    ]
    encoded = list(encode_documents(found, ENCODING.tokenizer))
    grouped = [*batches_of(found[i : i + 4] for i in range(0, len(found), 4))]
    assert {type(batch) for batch in grouped} == {DocumentBatch, TextBatch}
    block = concatenated(encode_all(grouped, ENCODING, processes=processes))
    assert block.tokens.tolist() == [token for one in encoded for token in one.tokens]
    assert block.trained.tobytes() == b"".join(one.trained for one in encoded)
    assert block.counts.tolist() == [len(one.tokens) for one in encoded]
    assert block.keys.tolist() == [int(document.key[:16], 16) for document in found]


def batches_of(groups: Iterable[list[Document]]) -> Iterator[Batch]:
    for group in groups:
        yield from encoding.batches(group, ENCODING.encoder)


@pytest.mark.usefixtures("forks")
def test_document_that_fails_raises_its_sentence() -> None:
    with pytest.raises(InputError, match=r"^c:4[: ].*"):
        list(encode_all(batches(40), ENCODING, processes=2))


def test_killed_worker_is_one_sentence(forks: list[ForkedWorker]) -> None:
    def some() -> Iterator[Batch]:
        for batch in batches(10**6):
            if forks:
                os.kill(forks[0].pid, signal.SIGKILL)
            yield batch

    with pytest.raises(BigbatchError, match=r"^a process that tokenizes the data ended with exit code -9, perhaps "):
        list(encode_all(some(), Encoding(ENCODING.tokenizer, skip_broken=True), processes=2))


def test_abandoned_iteration_ends_workers(forks: list[ForkedWorker]) -> None:
    found = encode_all(batches(10**6), Encoding(ENCODING.tokenizer, skip_broken=True), processes=2)
    for _ in range(30):
        next(found)
    found.close()  # type: ignore[attr-defined]
    assert [fork.poll() is not None for fork in forks] == [True]
