"""The fit of benchmarks/scaling_h200.py to measured updates, and what docs/explanation/scaling.md says of it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RAW = ROOT / "benchmarks" / "results" / "scaling-fitted-h200.txt"
ROW = re.compile(r"(\w+(?:-\w+)?), (\d) cards?.* +(\d+) +([\d.]+) +([\d.]+) +([+-][\d.]+)% +([+-][\d.]+)%")


def rows() -> list[tuple[str, int, float, float]]:
    """Return way, cards, predicted and measured milliseconds of each table."""
    found = (ROW.fullmatch(line) for line in RAW.read_text(encoding="utf-8").splitlines())
    return [(way, int(cards), float(p), float(m)) for way, cards, _, p, m, *_ in (f.groups() for f in found if f)]


def test_raw_output_is_that_of_the_script():
    script = ROOT / "benchmarks" / "scaling_h200.py"
    output = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    assert RAW.read_text(encoding="utf-8") == f"$ python benchmarks/scaling_h200.py\n{output}"


def test_updates_of_replicas_are_predicted_to_five_percent():
    replicas = [(predicted, measured) for way, _, predicted, measured in rows() if not way.startswith("fsdp")]
    assert len(replicas) == 5
    assert all(abs(predicted / measured - 1) < 0.05 for predicted, measured in replicas)


def test_every_table_of_the_measurement_is_compared():
    results = [(RAW.parent / name).read_text(encoding="utf-8") for name in ("small-windows-h200.txt", "fsdp-h200.txt")]
    assert len(rows()) == sum(len(re.findall(r"^update +ms", text, re.MULTILINE)) for text in results)


def test_page_has_the_predicted_and_measured_numbers():
    page = (ROOT / "docs" / "explanation" / "scaling.md").read_text(encoding="utf-8")
    for _, _, predicted, measured in rows():
        assert f"{predicted:,.1f}" in page
        assert f"{measured:,.1f}" in page
