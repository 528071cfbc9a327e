"""Micro-batches have the type of the batch: mappings, dataclasses, named tuples, and objects that move themselves."""

import collections
import dataclasses
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from bigbatch.batching.batch_types import flatten
from bigbatch.batching.prefetch import Prefetcher
from bigbatch.batching.split import split
from bigbatch.execution.cuda_graphs import _describe

CPU, META = torch.device("cpu"), torch.device("meta")


def column(samples: int, *shape: int) -> Tensor:
    return torch.arange(samples * max(1, torch.Size(shape).numel())).reshape(samples, *shape)


class Encoded(collections.UserDict):
    """As a tokenizer's output: attributes are items, and something is kept besides them."""

    def __init__(self, data: dict[str, Any], kind: str = "words") -> None:
        super().__init__(data)
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class Attributes(dict):
    """A dict whose attributes are its items: the same memory."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.__dict__ = self


class Features(dict):
    source = "unset"


class Frame(Mapping):
    """Cannot be written to."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self._columns = columns

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name]

    def __iter__(self):
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


class Shared(Frame):
    """Can be written to, and a shallow copy of it shares its columns."""

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._columns[name] = value


@dataclasses.dataclass(frozen=True)
class Pair:
    left: Tensor
    right: dict[str, Tensor] | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class Slots:
    x: Tensor


class Point(NamedTuple):
    x: Tensor
    y: Tensor


class Graphs:
    """A batch of graphs: no container for torch, but it moves itself."""

    def __init__(self, nodes: Tensor) -> None:
        self.nodes = nodes

    def to(self, device: torch.device) -> "Graphs":
        return Graphs(self.nodes.to(device))


class MovesInPlace(Graphs):
    def to(self, device: torch.device) -> None:  # type: ignore[override]
        self.nodes = self.nodes.to(device)


@pytest.mark.parametrize(
    "batch",
    [
        Encoded({"x": column(5), "mask": column(5, 2)}),
        Attributes(x=column(5)),
        Features(x=column(5), y={"z": column(5, 1)}),
        Frame({"x": column(5)}),
        Shared({"x": column(5), "y": column(5)}),
        types.MappingProxyType({"x": column(5)}),
        Pair(column(5), {"r": column(5, 3)}),
        Pair(column(5)),
        Slots(x=column(5)),
        Point(column(5), column(5, 2)),
        (Encoded({"x": column(5)}), column(5)),
        {"pair": Pair(column(5)), "more": [Encoded({"deep": Pair(column(5, 2))})]},
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_microbatches_keep_type_and_rows(batch: Any) -> None:
    before, _ = flatten(batch)
    parts = split(batch, 2, device=CPU)
    taken = [parts.take(rows) for rows in parts.groups]
    assert parts.num_samples == 5
    for rows, part in zip(parts.groups, taken, strict=True):
        assert type(part) is type(batch)
        leaves, structure = flatten(part)
        assert structure == flatten(batch)[1]
        for leaf, whole in zip(leaves, before, strict=True):
            assert leaf is whole is None or torch.equal(leaf, whole[rows.start : rows.stop])
    assert all(a is b for a, b in zip(flatten(batch)[0], before, strict=True)), "the batch is unchanged"


def test_attributes_of_mappings_are_their_items() -> None:
    for batch in (Encoded({"x": column(4)}), Attributes(x=column(4))):
        first, second = split(batch, 2, device=CPU)
        assert first.x.tolist() == first["x"].tolist() == [0, 1]
        assert second.x.tolist() == second["x"].tolist() == [2, 3]
        second["x"] = None
        assert first.x.tolist() == [0, 1]
        assert len(batch.x) == 4


def test_other_attributes_of_mapping_are_kept() -> None:
    features = Features(x=column(4))
    features.source = "web"
    assert [part.source for part in split(features, 3, device=CPU)] == ["web", "web"]
    assert [part.kind for part in split(Encoded({"x": column(2)}, kind="pieces"), 1, device=CPU)] == ["pieces"] * 2


def test_tokenizer_output_keeps_its_type() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    encoding = [tokenizers.Encoding() for _ in range(4)]
    batch = transformers.BatchEncoding({"input_ids": column(4, 3)}, encoding)
    first, second = split(batch, 2, device=CPU)
    assert type(first) is transformers.BatchEncoding
    assert torch.equal(second.input_ids, column(4, 3)[2:])
    assert second.to(META).input_ids.is_meta
    assert dict(**second).keys() == {"input_ids"}
    assert second.encodings is None, "those of other samples would be wrong"
    assert batch.encodings == encoding


def test_collated_tokenizer_output_keeps_its_encodings() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    def collate(samples: list[int]) -> Any:
        return transformers.BatchEncoding({"x": torch.tensor(samples)}, [tokenizers.Encoding() for _ in samples])

    assert [len(part.encodings) for part in split([3, 4, 5], 2, device=CPU, collate=collate)] == [2, 1]


def test_model_output_is_split_as_model_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    batch = outputs.CausalLMOutput(logits=column(4, 2), hidden_states=(column(4, 3), column(4, 1)))
    first, _ = split(batch, 3, device=CPU)
    assert type(first) is outputs.CausalLMOutput
    assert first.logits.shape == first["logits"].shape == (3, 2)
    assert [state.shape for state in first.hidden_states] == [(3, 3), (3, 1)]


def test_collated_objects_move_and_keep_type() -> None:
    packed = split([torch.ones(3), torch.ones(2)], 2, device=META, collate=pack_sequence)
    for make, nodes in (
        (Graphs, lambda part: part.nodes),
        (MovesInPlace, lambda part: part.nodes),
        (lambda x: Encoded({"x": x}), lambda part: part.x),
        (Pair, lambda part: part.left),
        (lambda x: Point(x, x), lambda part: part.y),
        (lambda x: [Graphs(x), "text", 3], lambda part: part[0].nodes),
    ):
        parts = split([1, 2, 3], 2, device=META, collate=lambda some, make=make: make(torch.tensor(some)))
        with Prefetcher(parts) as prefetcher:
            for taken in (parts.take(parts.groups[1]), prefetcher.take(parts.groups[0])):
                assert type(taken) is type(make(torch.ones(1)))
                assert nodes(taken).is_meta
    (part,) = packed
    assert type(part) is PackedSequence
    assert part.data.is_meta


def test_packed_sequences_move_without_their_sizes() -> None:
    """Recurrent layers require the sizes on the CPU, whatever the device of the data."""
    parts = split([torch.ones(3, 1), torch.ones(2, 1)], 2, device=CPU, collate=pack_sequence)
    (part,) = parts
    outputs, _ = torch.nn.GRU(1, 2)(part)
    assert outputs.batch_sizes.tolist() == [2, 2, 1]
    (moved,) = split([torch.ones(3)], 1, device=META, collate=pack_sequence)
    assert not moved.batch_sizes.is_meta


def test_settings_in_collated_microbatch_stay_same_object() -> None:
    @dataclasses.dataclass
    class Settings:
        name: str
        seen: int = dataclasses.field(init=False, default=0)

    settings = Settings("first")
    parts = split([1], 1, device=META, collate=lambda some: (torch.tensor(some), settings, types.MappingProxyType({})))
    ((tensor, passed, empty),) = parts
    assert tensor.is_meta
    assert passed is settings
    assert empty == {}


def test_mapping_that_cannot_be_rebuilt_is_refused() -> None:
    class Fixed(Frame):
        def __init__(self) -> None:
            super().__init__({"x": column(4)})

    with pytest.raises(TypeError) as caught:
        split(Fixed(), 2, device=CPU)
    assert str(caught.value) == (
        "a Fixed in the batch cannot be built again from its values, so no micro-batch of that type can be made. Pass "
        "a dict, or a list of samples with a collate= that returns a dict."
    )
    with pytest.raises(TypeError, match="a Fixed in the batch"):
        list(split([1], 1, device=CPU, collate=lambda _: Fixed()))


def test_dataclass_field_outside_constructor_is_refused() -> None:
    @dataclasses.dataclass
    class Summed:
        x: Tensor
        total: Tensor = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            self.total = self.x

    with pytest.raises(TypeError) as caught:
        split(Summed(column(4)), 2, device=CPU)
    assert str(caught.value) == (
        "the field 'total' of Summed has init=False, so a micro-batch cannot be built with it. Make it a property, or "
        "pass a dict."
    )


def test_dataclass_that_changes_its_values_is_refused() -> None:
    @dataclasses.dataclass
    class Scaled:
        x: Tensor

        def __post_init__(self) -> None:
            self.x = self.x * 2

    with pytest.raises(TypeError, match="a Scaled in the batch cannot be built again from its values"):
        split(Scaled(column(4)), 2, device=CPU)


def test_structures_compare_by_type_and_names() -> None:
    """As keys of captured graphs: equal for every micro-batch of a loop, different if anything but tensors is."""
    keys = [
        flatten(tree)[1]
        for tree in (Encoded({"x": column(2)}), Features(x=column(2)), Pair(column(2)), Encoded({"y": column(2)}))
    ]
    assert len(set(keys)) == 4
    assert flatten(Encoded({"x": column(3)}))[1] == keys[0]
    assert hash(flatten(Encoded({"x": column(3)}))[1]) == hash(keys[0])
    assert flatten(Encoded({"x": column(2)}, kind="pieces"))[1] != keys[0]


def test_graph_keys_exclude_what_replay_cannot_copy() -> None:
    jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    for leaf in (Graphs(column(2)), torch.eye(2).to_sparse(), jagged, pack_sequence([torch.ones(2)])):
        with pytest.raises(TypeError, match="may move between micro-batches"):
            _describe(leaf)
    assert _describe(column(2)) == _describe(column(2) + 1)
    assert [_describe(leaf) for leaf in (3, "text", None)] == [3, "text", None]
