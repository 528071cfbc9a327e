"""Processes that encode batches, on every core; their blocks come back in the order of the batches.

batches → this process and its workers → blocks

A worker is a plain child process with pipes, not one of `multiprocessing`: it does not run the caller's main module
again, and it ends when the caller ends for any reason, because its pipe does.
"""

import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

from bigbatch.errors import BigbatchError
from bigbatch.lm.data.conversations import TrainOn
from bigbatch.lm.data.pair_encoding import PairEncoder
from bigbatch.lm.data.pairs import Objective
from bigbatch.lm.data.token_store.encoding import Batch, DocumentBatch, Encoder, encode_batch
from bigbatch.lm.data.token_store.writer import Block
from bigbatch.lm.data.tokenization import DocumentEncoder
from bigbatch.lm.data.tokenizer import AnyTokenizer

START_CHARACTERS = 4_000_000
"""Characters that are encoded in this process before workers start, which takes each about two seconds."""
_QUEUED = 3  # batches for each worker
_MOST_THREADS = 33  # bounds the memory of machines with many cores
_START = "import sys; sys.path[:] = {path!r}; from bigbatch.lm.data.token_store.workers import serve; serve()"


@dataclass(frozen=True)
class Encoding:
    """How batches become blocks.

    Attributes:
        tokenizer: With its chat template.
        train_on: Which turns of conversations are trained on.
        skip_broken: Whether documents that cannot be encoded are left out.
        objective: Whether documents are texts and conversations, or have parts that are compared.
    """

    tokenizer: AnyTokenizer
    train_on: TrainOn = "all-assistant"
    skip_broken: bool = False
    objective: Objective = "sft"

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder of this process."""
        if self.objective != "sft":
            return PairEncoder(self.tokenizer, self.objective)
        return DocumentEncoder(self.tokenizer, train_on=self.train_on)

    @property
    def joins_texts(self) -> bool:
        """Whether prompts with strings as completions are tokenized as one text, of which the tokens may differ."""
        return isinstance(self.encoder, DocumentEncoder) and bool(self.encoder.joined_texts)

    def encode(self, batch: Batch) -> Block:
        """Encode a batch in this process."""
        return encode_batch(batch, self.encoder, skip_broken=self.skip_broken)


def encode_all(batches: Iterable[Batch], encoding: Encoding, *, processes: int) -> Iterator[Block]:
    """Encode batches on ``processes`` cores; yield their blocks in order.

    Texts are tokenized by threads, outside of Python, where the tokenizer can. What needs Python for each document
    (conversations with their template, other tokenizers) is encoded by worker processes and, while every worker has
    enough to do, by this one. Memory is bounded by the number of batches that are queued.

    Raises:
        BigbatchError: A batch cannot be encoded (an `InputError`, as `encode_batch` raises it), or a worker ended.
    """
    if processes == 1:
        yield from map(encoding.encode, batches)
        return
    in_process = 0
    queued: deque[Future[Block] | Block] = deque()
    with ExitStack() as stack:
        threads = stack.enter_context(_Threads(encoding, min(processes + 1, _MOST_THREADS)))
        workers: _Workers | None = None
        for batch in batches:
            if not isinstance(batch, DocumentBatch) and encoding.encoder.releases_gil:
                queued.append(threads.submit(batch))
            elif in_process < START_CHARACTERS:
                in_process += batch.characters
                queued.append(encoding.encode(batch))
            else:
                workers = workers or stack.enter_context(_Workers(encoding, processes - 1))
                queued.append(workers.submit(batch) if workers.are_free else encoding.encode(batch))
            most_queued = threads.most_queued if workers is None else workers.most_queued
            while queued and (isinstance(queued[0], Block) or queued[0].done() or len(queued) > most_queued):
                yield _result(queued.popleft())
        while queued:
            yield _result(queued.popleft())


def _result(found: "Future[Block] | Block") -> Block:
    return found if isinstance(found, Block) else found.result()


class _Threads:
    """Threads that tokenize, one more than cores: one of them may make arrays of what is tokenized."""

    def __init__(self, encoding: Encoding, number: int) -> None:
        self._encode = encoding.encode
        self._threads = ThreadPoolExecutor(number, thread_name_prefix="tokenize")
        self.most_queued = number

    def __enter__(self) -> "_Threads":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def submit(self, batch: Batch) -> "Future[Block]":
        return self._threads.submit(self._encode, batch)


class _Workers:
    """Child processes, each with a thread that sends it one batch at a time."""

    def __init__(self, encoding: Encoding, number: int) -> None:
        settings = encoding.tokenizer, encoding.train_on, encoding.skip_broken, encoding.objective
        self._encoding = pickle.dumps(settings, protocol=5)
        self._number = number
        self._unfinished = 0
        self._lock = threading.Lock()
        self._local = threading.local()
        self._children: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(number, thread_name_prefix="tokenize", initializer=self._start)
        self.most_queued = 4 * _QUEUED * number

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for child in self._children:
                child.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            for pipe in (child.stdin, child.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            child.wait()

    @property
    def are_free(self) -> bool:
        """Whether fewer batches are queued than the workers should have."""
        return self._unfinished < _QUEUED * self._number

    def submit(self, batch: Batch) -> "Future[Block]":
        with self._lock:
            self._unfinished += 1
        return self._threads.submit(self._encode, batch)

    def _start(self) -> None:
        code = _START.format(path=sys.path)
        # The child uses one core; this process would print tokenizers' warnings about forks without the setting.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._children.append(child)
        self._local.child = child
        with suppress(OSError):  # a child that ended at once is reported with the first batch
            _send(child.stdin, self._encoding)

    def _encode(self, batch: Batch) -> Block:
        child = self._local.child
        try:
            _send(child.stdin, pickle.dumps(batch, protocol=5))
            answer = pickle.loads(_receive(child.stdout))
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise BigbatchError(
                f"a process that tokenizes the data ended with exit code {child.wait()}, perhaps because memory ran "
                "out. Start again, with fewer cores (taskset) or more memory."
            ) from error
        finally:
            with self._lock:
                self._unfinished -= 1
        if isinstance(answer, BaseException):
            raise answer
        return answer  # type: ignore[no-any-return]


def serve() -> None:
    """Run a worker: read how to encode, and batches, from standard input, write blocks to standard output."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent decides
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the blocks
    with suppress(EOFError, BrokenPipeError):
        encoding = Encoding(*pickle.loads(_receive(source)))
        while True:
            batch = pickle.loads(_receive(source))
            try:
                answer: Block | Exception = encoding.encode(batch)
            except Exception as error:  # noqa: BLE001  raised again by the parent
                answer = error
            _send(target, _pickled(answer))


def _pickled(answer: "Block | Exception") -> bytes:
    try:
        return pickle.dumps(answer, protocol=5)
    except Exception:  # noqa: BLE001  an error that cannot be pickled
        return pickle.dumps(BigbatchError(str(answer)), protocol=5)


def _send(pipe: IO[bytes] | Any, data: bytes) -> None:
    pipe.write(len(data).to_bytes(8, "little"))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes] | Any) -> bytes:
    """Read one message.

    Raises:
        EOFError: The pipe ended.
    """
    header = pipe.read(8)
    if len(header) < 8:
        raise EOFError
    size = int.from_bytes(header, "little")
    data: bytes = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data
