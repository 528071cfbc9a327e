"""bigbatch beside what a user would pick instead: one workload, one process, updates taken in turn.

    names → workload → stage → reference gradient → a checked update each → rounds of timed updates → rows

A contestant is a class with ``turn(stage, meter)``. `ours.ours` alone knows how bigbatch is run.
"""
