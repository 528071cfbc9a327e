"""Documents are counted, split and sampled without being kept."""

from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.document_counts import sample_documents, training_texts
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.validation_split import split_documents


def corpus_of(documents: list[Document]) -> Corpus:
    return Corpus(lambda reading: iter(documents), name="documents")


def test_sampled_documents_are_spaced_and_include_longest() -> None:
    documents = [Document(str(i), text="x" * (9 if i == 17 else 1)) for i in range(100)]
    corpus = corpus_of(documents)
    assert sample_documents([corpus], 0.0, 100) == (documents, 100)
    chosen, number = sample_documents([corpus], 0.0, 11)
    assert [int(document.source) for document in chosen] == [0, 17, 18, 27, 36, 45, 54, 63, 72, 81, 90]
    assert number == 100


def test_training_texts_equal_those_of_split() -> None:
    documents = [Document(str(i), text=f"text {i % 70}") for i in range(90)]
    training, _ = split_documents(documents, validation_fraction=0.2)
    texts, characters = training_texts([corpus_of(documents[:40]), corpus_of(documents[40:])], 0.2)
    found = list(texts)
    assert found == [document.text for document in training]
    assert characters == sum(map(len, found))


def test_single_text_is_cut_for_tokenizer() -> None:
    document = Document("a", text="".join(f"line {i}\n" for i in range(50)))
    training, _ = split_documents([document], validation_fraction=0.1)
    texts, characters = training_texts([corpus_of([document])], 0.1)
    assert list(texts) == [training[0].text]
    assert characters == len(training[0].text or "")
