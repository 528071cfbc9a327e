"""One self-contained HTML page of a run, or of several beside one another. No torch, no network, no script needed.

    run directory → reading (rows as columns, events, proof) → sections (charts, figures, tables) → page

journal     what a run writes for it besides metrics: events.jsonl
reading     a run directory as it lies there, whole or not, running or not
columns     metrics.jsonl as columns of numbers, in constant work a line
reduction   many updates as few points that keep every spike
scales      axes: linear or logarithmic, their ticks, and numbers with units
drawing     a chart as SVG; blocks draws the micro-batches of a window
markup      text that cannot become markup
charts      which charts there are; figures, what stands beside them
sections    what else is told of a run; proof, comparison
page        the whole page; writing puts it in its place at once
"""
