"""Compiled layers of a sharded model."""

from support.gloo_processes import run

from .compiled_shards_cases import inputs_that_are_no_tensors


def test_only_the_length_of_rows_is_no_constant_in_compiled_layers_of_shards() -> None:
    (graphs,) = run(inputs_that_are_no_tensors, 1, (8, 12, 16))
    assert graphs
    assert all(len(sizes) == 1 for sizes in graphs), graphs
