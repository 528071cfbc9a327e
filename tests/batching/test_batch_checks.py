"""What can be read in two ways is refused with the argument to pass; a default DataLoader's batches are split."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from bigbatch.batching.split import split

CPU = torch.device("cpu")


@dataclasses.dataclass
class Boxes:
    boxes: Tensor


def boxes(*counts):
    return [{"boxes": torch.ones(count, 4), "labels": torch.ones(count)} for count in counts]


def num_parts(batch, size=2, **options):
    return len(split(batch, size, device=CPU, **options))


@pytest.mark.parametrize(
    "tensors",
    [
        (torch.randn(6, 3), torch.randn(6, 3)),
        (torch.randn(6), torch.randn(6), torch.randn(6), torch.randn(6)),
        (torch.ones(6, 4), torch.ones(6), torch.ones(6, 2, 2), torch.ones(6, 4), torch.ones(6), torch.ones(6)),
        tuple(torch.ones(6, 4, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.bool) for _ in range(2)),
    ],
    ids=["autoencoder", "four columns", "many shapes", "many dtypes"],
)
def test_batches_of_default_loader_are_split(tensors):
    (batch,) = DataLoader(TensorDataset(*tensors), batch_size=6)
    assert type(batch) in (list, tuple)
    batch = list(batch)
    parts = list(split(batch, 4, device=CPU))
    assert [[len(leaf) for leaf in part] for part in parts] == [[4] * len(tensors), [2] * len(tensors)]
    assert all(type(part) is list for part in parts)


@pytest.mark.parametrize(
    "batch",
    [
        ({"ids": torch.ones(6, 2)}, {"ids": torch.ones(6, 2)}),  # query and passage, in a tuple
        [{"ids": torch.ones(6, 2)}, torch.ones(6)],
        [{"image": torch.ones(6, 2)}, {"text": torch.ones(6, 2)}],
        (torch.ones(6, 3), [torch.ones(6, 2)] * 4),  # targets of four tasks
        {"x": torch.ones(6), "layers": [torch.ones(6, 8) for _ in range(12)]},
        {"x": torch.ones(6), "views": [{"image": torch.ones(6, 3)} for _ in range(2)]},
        tuple(torch.ones(6, 2) for _ in range(6)),
        [[torch.ones(6), torch.ones(6)], [torch.ones(6), torch.ones(6)]],
        {"a": torch.ones(6), "none": [], "flags": torch.ones(6, dtype=torch.bool), "z": torch.ones(6) * 1j},
    ],
)
def test_batch_with_one_meaning_is_split(batch):
    assert num_parts(batch) == 3


def test_list_of_equal_sequences_asks_for_collate():
    with pytest.raises(ValueError, match=r"\.$") as caught:
        split([torch.randn(7, 2) for _ in range(12)], 2, device=CPU)
    assert str(caught.value) == (
        "batch is a list of 12 tensors, which can be read as 12 samples, or as 12 fields of every sample. Pass a list "
        "of samples with collate= for the first, or batch as a tuple for the second."
    )
    assert num_parts([torch.randn(7, 2) for _ in range(12)], collate=torch.stack) == 6
    assert num_parts(tuple(torch.randn(7, 2) for _ in range(12))) == 4


def test_targets_for_each_image_ask_for_collate():
    with pytest.raises(ValueError, match=r"\.$") as caught:
        split((torch.randn(3, 5), boxes(3, 3, 3)), 2, device=CPU)
    assert str(caught.value) == (
        "batch[1] is a list of 3 dicts, as many as there are samples: it can be read as one dict for each sample, or "
        "as 3 fields of every sample. Pass a list of samples with collate= for the first, or batch[1] as a tuple for "
        "the second."
    )


@pytest.mark.parametrize(
    ("batch", "name"),
    [
        ({"images": torch.ones(16, 3), "targets": boxes(*range(16))}, r"batch\['targets'\] is a list of 16 dicts"),
        ((torch.ones(2, 3), [torch.ones(2, 4), torch.ones(2, 4)]), r"batch\[1\] is a list of 2 tensors"),
        ({"x": torch.ones(3), "deep": {"y": [torch.ones(3, 1)] * 3}}, r"batch\['deep'\]\['y'\] is a list of 3 tensors"),
        ({"ids": [torch.ones(9, dtype=torch.int64)] * 5}, r"batch\['ids'\] is a list of 5 tensors"),
        ([{"ids": torch.ones(8)}, {"ids": torch.ones(8)}], "batch is a list of 2 dicts"),
        ([(torch.ones(8), torch.tensor(1.0)) for _ in range(6)], "batch is a list of 6 tuples"),
        ([[torch.ones(8), torch.tensor(1.0)] for _ in range(6)], "batch is a list of 6 lists"),
        ([Boxes(torch.ones(4, 4)), Boxes(torch.ones(4, 4))], "batch is a list of 2 Boxes objects"),
        ([torch.ones(3, height, 8) for height in (4, 5, 6, 4, 7)], "batch is a list of 5 tensors"),  # channels first
    ],
)
def test_list_with_two_meanings_is_refused(batch, name):
    with pytest.raises(ValueError, match=f"^{name}, .* can be read as .* fields of every sample"):
        split(batch, 2, device=CPU)


def test_message_on_many_ragged_tensors_is_short():
    ragged = {f"x{index}": torch.ones(index % 7 + 2) for index in range(40)}
    with pytest.raises(ValueError, match=r"\.$") as caught:
        split(ragged, 2, device=CPU)
    assert str(caught.value) == (
        "the tensors of the batch disagree on the number of samples: batch['x0'] has 2, batch['x1'] has 3, "
        "batch['x2'] has 4, batch['x3'] has 5 (36 more tensors). Dimension 0 must be the sample in every one of them; "
        "pass batch_dim= for another dimension, or a list of samples with collate=."
    )


def test_broadcast_mask_is_refused_with_expand():
    with pytest.raises(ValueError, match=r"\.$") as caught:
        split({"ids": torch.ones(4, 9), "mask": torch.ones(1, 9)}, 2, device=CPU)
    assert str(caught.value) == (
        "the tensors of the batch disagree on the number of samples: batch['ids'] has 4, batch['mask'] has 1. Expand "
        "what all samples share, such as batch['mask'].expand(4, -1)."
    )
    assert num_parts({"ids": torch.ones(4, 9), "mask": torch.ones(1, 9).expand(4, -1)}) == 2
    with pytest.raises(ValueError, match=r"batch\[1\]\.expand\(-1, 4\)"):
        split((torch.ones(9, 4), torch.ones(9, 1)), 2, device=CPU, batch_dim=1)


def test_packed_sequence_is_refused_whole_and_inside():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    for batch, name in ((packed, "batch"), ({"x": packed, "y": torch.ones(2)}, "batch['x']")):
        with pytest.raises(TypeError) as caught:
            split(batch, 2, device=CPU)
        assert str(caught.value) == (
            f"{name} is a PackedSequence, which cannot be split into micro-batches. Pass the list of sequences with "
            "collate=torch.nn.utils.rnn.pack_sequence."
        )


def test_numbers_are_refused_with_tensor_advice():
    for number in (0.5, 7, True, 1j):
        with pytest.raises(TypeError) as caught:
            split({"x": torch.ones(4), "temperature": number}, 2, device=CPU)
        assert str(caught.value) == (
            f"batch['temperature'] is a {type(number).__name__}, which cannot be split into micro-batches. Pass a "
            "number that holds for every sample as a 0-d tensor, which each micro-batch receives unchanged, and a "
            "number of the whole batch not at all."
        )


def test_arrays_are_refused_with_conversion():
    numpy = pytest.importorskip("numpy")
    for array, kind in ((numpy.zeros((4, 2)), "ndarray"), (numpy.zeros(()), "ndarray"), (numpy.float32(1), "float32")):
        with pytest.raises(TypeError) as caught:
            split((torch.ones(4), array), 2, device=CPU)
        assert str(caught.value) == (
            f"batch[1] is a {kind}, which cannot be split into micro-batches. Pass tensors: torch.as_tensor() converts "
            "it."
        )


def test_strings_and_objects_ask_for_collate():
    class Graphs:
        def to(self, device):
            raise AssertionError("never moved")

    for batch, name, kind in (
        ({"x": torch.ones(2), "text": ["a", "b"]}, "batch['text'][0]", "str"),
        (Graphs(), "batch", "Graphs"),
    ):
        with pytest.raises(TypeError) as caught:
            split(batch, 1, device=CPU)
        assert str(caught.value) == (
            f"{name} is a {kind}, which cannot be split into micro-batches. Pass tensors whose dimension 0 is the "
            "sample, or a list of samples with collate=."
        )


def test_unknown_pytree_nodes_are_named_by_leaf():
    class Node:
        def __init__(self, *values):
            self.values = values

    torch.utils._pytree.register_pytree_node(
        Node, lambda node: (list(node.values), None), lambda values, _context: Node(*values)
    )
    with pytest.raises(ValueError, match=r"batch \(leaf 0\) has 3, batch \(leaf 1\) has 5"):
        split(Node(torch.ones(3), torch.ones(5)), 2, device=CPU)
    assert [len(part.values[1]) for part in split(Node(torch.ones(3), torch.ones(3)), 2, device=CPU)] == [2, 1]


def test_batch_dim_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"\.$") as caught:
        split(torch.ones(3, 4), 2, device=CPU, batch_dim=-1)
    assert str(caught.value) == (
        "batch_dim is -1: it must be at least 0. Count the dimension that is the sample from the front, such as 1 for "
        "tensors [time, batch, ...]."
    )
    for value in (True, 1.0, "1"):
        with pytest.raises(TypeError) as refused:
            split(torch.ones(3, 4), 2, device=CPU, batch_dim=value)
        assert str(refused.value) == (
            f"batch_dim is {value!r}: it must be an int, the dimension of tensors that is the sample."
        )


def test_batch_dim_with_collate_is_refused():
    with pytest.raises(ValueError, match=r"\.$") as caught:
        split([torch.ones(3)], 2, device=CPU, collate=torch.stack, batch_dim=1)
    assert str(caught.value) == (
        "batch_dim=1 cuts tensors, and collate= builds micro-batches from a list of samples: leave batch_dim= out."
    )


def test_tensor_without_batch_dim_is_refused():
    with pytest.raises(ValueError, match=r"\.$") as caught:
        split((torch.ones(5, 4, 2), torch.ones(4)), 2, device=CPU, batch_dim=1)
    assert str(caught.value) == (
        "batch[1] has shape [4], and batch_dim=1 is the sample in every tensor. Pass it with that dimension, such as "
        "batch[1][None]."
    )
    assert num_parts((torch.ones(5, 4, 2), torch.ones(4)[None]), batch_dim=1) == 2
    with pytest.raises(ValueError, match=r"such as batch\[None, None\]"):
        split(torch.ones(4), 2, device=CPU, batch_dim=2)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_compressed_sparse_tensor_is_refused():
    indices = torch.tensor([[0, 1, 2], [0, 1, 2]])
    csr = torch.sparse_coo_tensor(indices, torch.ones(3), (3, 3)).to_sparse_csr()
    with pytest.raises(TypeError) as caught:
        split({"x": csr}, 2, device=CPU)
    assert str(caught.value) == (
        "batch['x'] has the layout torch.sparse_csr, which cannot be split. Pass batch['x'].to_sparse_coo()."
    )


@pytest.mark.parametrize("element", [torch.ones(8, 3), {"image": torch.ones(8, 3)}], ids=["tensors", "dicts"])
def test_fields_stay_fields_in_last_batch(element):
    """As the default DataLoader returns two views and a label: its last batch may have two samples."""

    def take(count):
        first = element[:count] if isinstance(element, torch.Tensor) else {"image": element["image"][:count]}
        return [[first, first], torch.ones(count)]

    known_fields = set()
    with pytest.raises(ValueError, match=r"batch\[0\] is a list of 2 .* as many as there are samples"):
        split(take(2), 1, device=CPU, known_fields=known_fields)
    split(take(5), 1, device=CPU, known_fields=known_fields)
    assert len(split(take(2), 1, device=CPU, known_fields=known_fields)) == 2
    other = [torch.ones(2), [torch.ones(2, 3), torch.ones(2, 3)]]  # at another place
    with pytest.raises(ValueError, match=r"batch\[1\] is a list of 2 tensors, as many as there are samples"):
        split(other, 1, device=CPU, known_fields=known_fields)


def test_refused_batch_makes_no_list_known():
    known_fields = set()
    with pytest.raises(ValueError, match="disagree on the number of samples"):
        split([[torch.ones(4), torch.ones(3)], torch.ones(3)], 1, device=CPU, known_fields=known_fields)
    assert not known_fields
