"""A broken row of CSV costs no other row, and rows of many lines stay whole."""

from pathlib import Path

import pytest

from bigbatch.errors import InputError
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.sources import read_corpus

HEAD = "prompt,completion\nx,y\n"
LATER = "".join(f"q{i},a{i}\n" for i in range(100))
PAIRS = [(f"q{i}", f"a{i}") for i in range(100)]


def read(path: Path, content: str, *, skip_broken: bool = True) -> tuple[Corpus, list[tuple[str | None, str | None]]]:
    path = path / "a.csv"
    path.write_text(content)
    corpus = read_corpus(str(path), skip_broken=skip_broken)
    return corpus, [(document.prompt, document.completion) for document in corpus]


@pytest.mark.parametrize("broken", ['"5 inches,b\n', 'z,"5 inches\n', '"5 inches,b\r\n', '"a"b,c\n'])
@pytest.mark.parametrize("end", ["", '"z",w\n', 'z,"w"\n'])
def test_open_quote_costs_one_row(tmp_path: Path, broken: str, end: str) -> None:
    corpus, found = read(tmp_path, HEAD + broken + LATER + end)
    assert found == [("x", "y"), *PAIRS, *([("z", "w")] if end else [])]
    assert corpus.left_out[0].startswith(f"1 broken record left out; the first: {tmp_path}/a.csv:3: not valid CSV: ")


def test_two_open_quotes_cost_two_rows(tmp_path: Path) -> None:
    corpus, found = read(tmp_path, f'{HEAD}"5 inches,b\n{LATER}"6 inches,c\n{LATER}')
    assert found == [("x", "y"), *PAIRS, *PAIRS]
    assert corpus.left_out[0].startswith("2 broken records")


def test_lines_are_numbered_on_after_open_quote(tmp_path: Path) -> None:
    corpus, _ = read(tmp_path, f'{HEAD}"5 inches,b\n{LATER}')
    assert [document.source.rpartition(":")[2] for document in corpus] == ["2", *map(str, range(4, 104))]


def test_message_says_how_far_quotes_reach(tmp_path: Path) -> None:
    corpus, _ = read(tmp_path, f'{HEAD}"5 inches,b\n{LATER}')
    assert corpus.left_out[0] == (
        f"1 broken record left out; the first: {tmp_path}/a.csv:3: not valid CSV: unexpected end of data (its quotes "
        "reach over 101 lines; those after the first are read again, as rows of their own)."
    )


def test_cell_of_many_lines_is_whole(tmp_path: Path) -> None:
    cell = f'say ""hi""\n\n{LATER}'
    _, found = read(tmp_path, f'{HEAD}q,"{cell}"\n{LATER}')
    assert found == [("x", "y"), ("q", cell.replace('""', '"')), *PAIRS]


def test_valid_row_without_cells_says_its_lines(tmp_path: Path) -> None:
    corpus, found = read(tmp_path, f'{HEAD}"5 inches,b\n{LATER}6"\n{LATER}')
    assert found == [("x", "y"), *PAIRS]
    assert f"{tmp_path}/a.csv:3: the row has 1 cell over 102 lines, and the first row 2 cells." in corpus.left_out[0]


def test_open_quote_without_skipping_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.csv:3: not valid CSV: unexpected end of data\. Pass --skip-broken"):
        read(tmp_path, f'{HEAD}"5 inches,b\n{LATER}', skip_broken=False)
