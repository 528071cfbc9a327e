"""Section with the result of ``bigbatch verify --json`` that is stored in a run directory."""

import math

from bigbatch.lm.config.field_types import join_texts
from bigbatch.lm.report.html import table, tag, text
from bigbatch.lm.report.run_reader import Run
from bigbatch.lm.runs.file_names import VERIFICATION


def verification(run: Run) -> str:
    """Return the table of ``bigbatch verify``, or how to store one if the run has none."""
    found = run.verification
    cuts = found.get("cuts")
    if not isinstance(cuts, list) or not all(isinstance(cut, dict) for cut in cuts) or not cuts:
        return tag(
            "p",
            "No verification is stored in this run. To add one, run "
            f"{tag('code', 'bigbatch verify --json > RUN/' + VERIFICATION)} with the flags of the run.",
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
    fp8 = found.get("fp8")
    is_fp8 = isinstance(fp8, dict) and fp8.get("is_within_tolerance") is True
    if is_fp8:
        verdict = "Not exact: the rounding of products in fp8 depends on the cut; every cut is within the tolerance."
    return (
        tag("p", tag("strong", text(verdict), class_=_verdict_class(exact, is_fp8)) + _verified_on(run))
        + (tag("p", text(f"{fp8.get('note')}.")) if isinstance(fp8, dict) else "")
        + table(
            ["micro-batch", "micro-batches", "bigbatch", "mean of means"],
            rows,
            caption="Relative error of the gradient against the full batch",
            numeric=range(4),
        )
        + "".join(tag("p", text(f"Cause: {cause}")) for cause in _strings(found.get("causes")))
    )


def _verdict_class(exact: bool, is_fp8: bool) -> str:
    return "verdict" if is_fp8 else f"verdict {'exact' if exact else 'wrong'}"


def _verified_on(run: Run) -> str:
    """Return the model, data and machine of the verification, and whether the run has the same model and data."""
    found = run.verification
    on = [str(found[name]) for name in ("model", "data", "machine") if found.get(name)]
    size = _whole(found.get("num_samples"))
    words = f" {size} sequences" + (f" of {on[1]} with {on[0]}, on {on[2]}" if len(on) == 3 else "")
    words += "" if len(on) == 3 else f", {found.get('dtype')}"  # the machine includes the precision
    words += f", tolerance {_error(found.get('tolerance'))}."
    others = [
        name
        for name in ("model", "data")
        if found.get(name) and found[name] != join_texts(run.settings.get(name, found[name]))
    ]
    if others:
        words += f" The {' and '.join(others)} differ{'s' if len(others) == 1 else ''} from the run's."
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
