"""What ``bigbatch verify --json`` said, where it was kept beside a run."""

import math

from bigbatch.lm.report.html import table, tag, text
from bigbatch.lm.report.run_reader import Run
from bigbatch.lm.runs.file_names import VERIFICATION


def proof(run: Run) -> str:
    """Write the table of ``bigbatch verify``, where its JSON was kept beside the run."""
    found = run.proof
    cuts = found.get("cuts")
    if not isinstance(cuts, list) or not all(isinstance(cut, dict) for cut in cuts) or not cuts:
        return tag(
            "p",
            f"No proof is kept with this run: "
            f"{tag('code', 'bigbatch verify --json > RUN/' + VERIFICATION)}, with the flags "
            "of the run, puts it here.",
            class_="missing",
        )
    tolerance = _float(found.get("tolerance"))
    rows = [
        [
            text(_whole(cut.get("microbatch"))),
            text(_whole(cut.get("num_microbatches"))),
            text(_error(cut.get("relative_error"))) + _mark(_float(cut.get("relative_error")), tolerance),
            text(_error(cut.get("mean_of_means_error"))),
        ]
        for cut in cuts
    ]
    exact = found.get("exact") is True
    verdict = (
        "Exact: every cut gives the full-batch gradient, up to rounding."
        if exact
        else "NOT exact: a cut changes the gradient."
    )
    return (
        tag("p", tag("strong", text(verdict), class_=f"verdict {'exact' if exact else 'wrong'}") + _proved(run))
        + table(
            ["micro-batch", "micro-batches", "bigbatch", "mean of means"],
            rows,
            caption="Relative error of the gradient against the full batch",
            numeric=range(4),
        )
        + "".join(tag("p", text(f"Cause: {cause}")) for cause in _strings(found.get("causes")))
    )


def _proved(run: Run) -> str:
    """Say what was proved on, and whether that is what this run trains."""
    found = run.proof
    on = [str(found[name]) for name in ("model", "data", "machine") if found.get(name)]
    size = _whole(found.get("num_samples"))
    words = f" {size} sequences" + (f" of {on[1]} with {on[0]}, on {on[2]}" if len(on) == 3 else "")
    words += "" if len(on) == 3 else f", {found.get('dtype')}"  # a machine names its precision
    words += f", tolerance {_error(found.get('tolerance'))}."
    others = [
        name for name in ("model", "data") if found.get(name) and found[name] != run.settings.get(name, found[name])
    ]
    if others:
        words += f" This is another {' and other '.join(others)} than the run's."
    return text(words)


def _mark(error: float, tolerance: float) -> str:
    return "" if error <= tolerance else " " + tag("strong", "not exact")


def _strings(value: object) -> list[str]:
    return [part for part in value if isinstance(part, str)] if isinstance(value, list) else []


def _float(value: object) -> float:
    return float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]


def _error(value: object) -> str:
    found = _float(value)
    return "–" if math.isnan(found) else f"{found:.1e}"


def _whole(value: object) -> str:
    return f"{value:,}" if type(value) is int else "–"
