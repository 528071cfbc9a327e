"""Benchmark of bigbatch against other training tools: one workload, one process, updates in alternation.

    entries → workload → shared model → reference gradient → rounds of timed updates, the first one checked → rows

A contestant is a class with ``turn(stage, meter)``: a `Peer` runs micro-batches of some samples, a `PackedLoop` rows of
equal size in a compiled model. Only `bigbatch_runner` uses bigbatch's own engine.
"""
