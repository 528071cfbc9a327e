"""One self-contained HTML page of one run or several. Needs no torch, no network and no script.

    run directory → run_reader → sections, charts, figures, tables → page

run_reader            a run directory: settings, updates, events, verification, and whether it is running
metrics_table         metrics.jsonl as columns of numbers
downsampling          many updates as few points that keep every spike
axes                  axes: linear or logarithmic, their ticks, and numbers with units
svg_chart             a chart as SVG; window_plan_chart draws the micro-batches of a window
html                  escaped markup; html_figures puts legend, text and table around a chart
run_charts            the charts of a page
sections              status, history, settings and versions; verification_section, comparison
page                  the whole page; output_file writes it atomically
"""
