"""The page of a run: its content, its escaping, and how it handles any content of a run directory."""

import json
import math
import re
import time
from collections import Counter
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.report.axes import number, step_scale, value_scale, wants_log
from bigbatch.lm.report.downsampling import MOST_POINTS, reduced
from bigbatch.lm.report.guidance import Guidance
from bigbatch.lm.report.metrics_table import read_columns
from bigbatch.lm.report.output_file import check_place, write_page
from bigbatch.lm.report.page import page
from bigbatch.lm.report.run_reader import read_run
from bigbatch.lm.report.window_plan_chart import window_of
from bigbatch.lm.runs.lock import RunLock
from support.checkpoints import mounted
from support.run_directories import BEGIN, CHOICE, PROOF, WINDOW, make_rich_run, make_run, rows

VOID = {"col", "meta", "link"}
CHARTS = {"loss", "lr", "grad-norm", "noise", "speed", "memory", "ranks"}


class Parsed(HTMLParser):
    """Parser of a page that fails on unclosed elements."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), f"{tag} has an attribute twice: {attrs}"
        self.elements.append((tag, found))
        if "id" in found:
            self.ids[str(found["id"])] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [
            found
            for name, found in self.elements
            if name == tag and all(found.get(key.rstrip("_")) == value for key, value in attributes.items())
        ]


def written(*folders: Path, **options: Any) -> str:
    return page([read_run(folder) for folder in folders], **options)


def parsed(*folders: Path) -> Parsed:
    return Parsed(written(*folders))


def figures(found: Parsed) -> set[str]:
    return {str(figure["id"]) for figure in found.all("figure") if figure["class"] != "sample"}


# the whole -------------------------------------------------------------------------------------------------------


def test_rich_run_has_every_section(tmp_path: Path) -> None:
    found = parsed(make_rich_run(tmp_path / "rich"))
    assert figures(found) == CHARTS | {"window"}
    for sentence in (
        "Finished: 300 of 300 updates done.",
        "of the updates were clipped to 1.",
        "The estimate of the gradient noise scale is 382 sequences at the end; the last batch has 32.",
        "The validation loss has its minimum, 2.401, at update 300 (perplexity 11.03).",
        "after update 300, from the prompt def",
        "after update 150, from the prompt def",
        "return x < 1 & x",
        "8 sequences, 900 tokens, in 3 micro-batches of at most 408 tokens, padded: 60 of 960 tokens are padding",
        "The measured peak is 953.67 MiB for the whole process, 8.2 % more than the expected 881.46 MiB: 801.09 MiB of "
        "Python, libraries and data before the first update, and a predicted 80.38 MiB of tensors.",
        "Of 4 ranks, the slowest has a median share of",
        "the process ended unexpectedly (killed?)",
        "skipped step-150: model.safetensors has 1 bytes, and the manifest says 2,048; with memory = 16GiB",
        "stopped by SIGTERM, after saving",
        "skipped without a change: non-finite gradient",
        "out of memory 2 times; retried with smaller micro-batches",
        "Exact: every cut gives the full-batch gradient, up to rounding.",
        "16 sequences of python-stdlib with tiny, on cpu, float32",
        "max_grad_norm",
        "2.13.0",
    ):
        assert sentence in found.text, sentence
    assert re.search(r"75 to 76 .*skipped", found.text)


def test_page_is_valid_and_self_contained(tmp_path: Path) -> None:
    html = written(make_rich_run(tmp_path / "rich"))
    found = Parsed(html)
    assert html.startswith("<!doctype html>\n<html lang=")
    assert {name: number for name, number in found.ids.items() if number > 1} == {}
    for tag, attributes in found.elements:
        for key in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(key) in (None, "data:,"), (tag, attributes)
    assert "url(" not in html
    assert "@import" not in html
    assert re.findall(r"https?://[^\"' <]+", html) == ["http://www.w3.org/2000/svg"]  # a name, not an address


def test_every_drawing_has_title_and_description(tmp_path: Path) -> None:
    html = written(make_rich_run(tmp_path / "rich"))
    found = Parsed(html)
    drawings = found.all("svg", role="img")
    assert len(drawings) == 3 * len(CHARTS | {"window"})  # in three widths
    for drawing in drawings:
        for reference in str(drawing["aria-labelledby"]).split():
            assert re.search(rf'id="{reference}">[^<]{{4,}}<', html), reference
    assert len(found.all("summary")) == len(CHARTS | {"window"})  # each has its figures as a table
    assert all(svg.get("role") == "img" or svg.get("aria-hidden") == "true" for svg in found.all("svg"))


def test_missing_data_is_reported_instead_of_empty_chart(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 3.0, "skipped": None}, {"step": 2, "loss": 2.5, "skipped": None}]
    run = make_run(tmp_path / "bare", lines, events=[])
    (run / "config.json").unlink()
    found = parsed(run)
    assert figures(found) == {"loss"}
    for sentence in (
        "This run has no validation loss yet.",
        "This run has not recorded the plan of its first window.",
        "This run has not recorded its starts, stops and resumes.",
        "No verification is stored in this run. To add one, run bigbatch verify --json > RUN/verify.json",
        "config.json does not exist or cannot be read",
        "This run has not recorded its machine and versions.",
        "No update was skipped or ran out of memory.",
    ):
        assert sentence in found.text.replace("  ", " "), sentence


def test_run_without_updates_is_reported(tmp_path: Path) -> None:
    found = parsed(make_run(tmp_path / "empty", [], events=[BEGIN]))
    assert figures(found) == {"window"}
    assert "No update has been logged yet." in found.text
    assert "Not running and not finished: no update has been logged yet." in found.text
    (tmp_path / "empty" / "metrics.jsonl").unlink()
    assert "No update has been logged yet." in parsed(tmp_path / "empty").text


def test_one_update_is_a_dot_in_every_chart(tmp_path: Path) -> None:
    html = written(make_run(tmp_path / "one", rows(1, validation_every=1), choice=CHOICE))
    for key in ("loss", "lr", "grad-norm", "speed", "memory"):
        inside = html[html.index(f'id="{key}"') :].partition("</figure>")[0]
        assert '<circle class="dot' in inside, key
    assert "NaN" not in html
    assert "nan" not in Parsed(html).text


def test_numbers_of_any_size_are_drawn(tmp_path: Path) -> None:
    values = [1e308, -1e308, 1e300, -1e300, 5e-324, 0.0, math.inf, math.nan]
    lines = [
        row | {"loss": value, "lr": value, "grad_norm": abs(value)} for row, value in zip(rows(8), values, strict=True)
    ]
    html = written(make_run(tmp_path / "run", lines))
    assert figures(Parsed(html)) >= {"loss", "lr", "grad-norm"}
    assert not re.search(r'(d|cx|cy|x1|y1)="[^"]*(nan|inf)', html)


def test_chart_without_finite_values_is_omitted(tmp_path: Path) -> None:
    lines = [row | {"grad_norm": None, "tokens_per_s": float("nan")} for row in rows(5)]
    assert figures(parsed(make_run(tmp_path / "run", lines))) == {"loss", "lr", "memory", "window"}


def test_sample_plan_page_has_no_budget(tmp_path: Path) -> None:
    window = WINDOW | {"token_budget": None, "layout": "packed", "laid_out_tokens": 900}
    found = parsed(make_run(tmp_path / "run", rows(3), events=[BEGIN | {"window": window}]))
    assert "8 sequences, 900 tokens, in 3 micro-batches, packed: no padding." in found.text


def test_undrawn_microbatches_are_counted(tmp_path: Path) -> None:
    window = WINDOW | {"num_microbatches": 40, "last": [[5, 4]]}
    found = parsed(make_run(tmp_path / "run", rows(3), events=[BEGIN | {"window": window}]))
    assert "… 36 more" in found.text


@pytest.mark.parametrize(
    "window",
    [
        None,
        [],
        {},
        WINDOW | {"first": []},
        WINDOW | {"first": [["x"]]},
        WINDOW | {"num_microbatches": 1},
        WINDOW | {"tokens": -1},
    ],
)
def test_invalid_window_is_not_drawn(window: Any) -> None:
    assert window_of(window) is None


# escaping --------------------------------------------------------------------------------------------------------

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e日本語"


def test_run_content_never_becomes_markup(tmp_path: Path) -> None:
    folder = tmp_path / "<script>alert(3)<‹script> für 日本"
    events = [BEGIN | {"machine": HOSTILE, "versions": {HOSTILE: HOSTILE}}, {"event": "failed", "why": HOSTILE}]
    lines = [row | {"skipped": HOSTILE} for row in rows(3)]
    proof = PROOF | {"model": HOSTILE, "causes": [HOSTILE], "dtype": HOSTILE}
    run = make_run(folder, lines, events=events, settings={HOSTILE: HOSTILE, "data": HOSTILE}, proof=proof)
    for folders in ((run,), (run, make_run(tmp_path / "b", rows(4)))):
        html = written(*folders)
        found = Parsed(html)
        assert found.all("img") == []
        assert all(not key.startswith("on") for _, attributes in found.elements for key in attributes)
        scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
        assert len(scripts) == len(found.all("script"))
        assert "alert" not in scripts[-1]
        for script in scripts[:-1]:
            assert "<" not in script
            json.loads(script)  # the data of a chart, with any names
        assert "\u202e" not in html  # it reverses the text after it
        assert "日本語" in found.text
        assert "<script>alert(3)" in found.text


# numbers ---------------------------------------------------------------------------------------------------------


def test_unreadable_lines_are_counted_except_incomplete_last_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "loss": NaN, "grad_norm": 1}',
        "garbage",
        "[1, 2]",
        '{"step": "2"}',
        '{"step": true}',
        '{"step": -4}',
        "",
        '{"step": 3, "loss": Infinity, "lr": 1' + "0" * 400 + "}",
        '{"step": 2, "loss": 5, "skipped": "no items"}',
        '{"step": 3, "loss": 1e308, "grad_norm": "7"}',
        '{"step": 3, "loss": 4.5, "grad_norm": true}',
        '{"step": 4, "loss": 1e305}',
        '{"step": 5, "loss": 9.0, "lr',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    found = read_columns(path)
    assert list(found.steps) == [1, 2, 3, 4]
    assert found.num_unreadable == 5
    assert [value if value == value else None for value in found["loss"]] == [None, 5.0, 4.5, None]
    assert [value if value == value else None for value in found["grad_norm"]] == [1.0, None, None, None]
    assert not found.has("lr")
    assert math.isnan(found["lr"][0])
    assert [(skip.step, skip.reason) for skip in found.skipped] == [(2, "no items")]
    assert found.num_bytes == len("\n".join(lines[:-1])) + 1


def test_page_counts_unreadable_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows(4))
    with (run / "metrics.jsonl").open("a") as file:
        file.write("garbage\n{}\n")
    assert "2 lines of metrics.jsonl could not be read and were skipped." in parsed(run).text


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=900), st.integers(1, 50))
def test_points_keep_spikes_and_combine_equal_counts(values: list[float], most: int) -> None:
    steps = list(range(1, len(values) + 1))
    points = reduced(steps, values, most)
    assert len(points.x) <= most
    assert len(points.x) == -(-len(values) // points.each)
    finite = [value for value in values if value == value]
    assert min(points.finite, default=None) == min(finite, default=None)
    assert max(points.finite, default=None) == max(finite, default=None)
    for low, mean, high in zip(points.low, points.mean, points.high, strict=True):
        assert mean != mean or low <= mean + 1e-6 <= high + 2e-6
    assert list(points.x) == sorted(points.x)
    assert 1 <= points.x[0] <= points.x[-1] <= len(values)


def test_few_updates_are_drawn_individually() -> None:
    points = reduced([1, 2, 3], [3.0, math.nan, 1.0])
    assert points.each == 1
    assert points.mean[::2] == (3.0, 1.0)
    assert reduced(range(MOST_POINTS + 1), [0.0] * (MOST_POINTS + 1)).each == 2


@given(
    st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=20),
    st.booleans(),
    st.sampled_from(["plain", "bytes", "share", "count"]),
)
def test_any_axis_covers_values_with_few_ticks(values: list[float], from_zero: bool, kind: Any) -> None:
    is_log = wants_log(values)
    scale = value_scale(values, is_log=is_log, from_zero=from_zero, kind=kind, most_ticks=6)
    assert scale.low <= min(values) <= max(values) <= scale.high
    assert scale.low < scale.high
    assert all(scale.low <= tick * (1 + 1e-9) or tick == 0 for tick in scale.ticks)
    assert 1 <= len(scale.ticks) <= 9
    assert all(0.0 <= scale.at(value) <= 1.0 for value in values)


def test_ticks_are_round_and_distinct() -> None:
    def labels(values: list[float], **options: Any) -> list[str]:
        options = {"is_log": False, "from_zero": False, "kind": "plain"} | options
        scale = value_scale(values, most_ticks=6, **options)
        return [scale.label(tick) for tick in scale.ticks]

    assert labels([5.8, 8.6]) == ["6.0", "6.5", "7.0", "7.5", "8.0", "8.5"]
    assert labels([0.01, 1200.0], is_log=True) == ["0.01", "0.1", "1", "10", "100", "1,000"]
    assert labels([0, 5e-3], from_zero=True) == ["0", "0.001", "0.002", "0.003", "0.004", "0.005"]
    assert labels([0, 9e9], from_zero=True, kind="bytes")[:3] == ["0", "2 GiB", "4 GiB"]
    assert labels([0, 2e-5], from_zero=True)[1] == "5×10⁻⁶"
    assert [step_scale(1, 100_000, most_ticks=8).label(tick) for tick in (20_000.0, 100_000.0)] == ["20k", "100k"]
    assert [tick % 1 for tick in step_scale(1, 4, most_ticks=10).ticks] == [0.0] * 4


def test_numbers_are_formatted_with_units() -> None:
    assert number(None) == number(math.nan) == number(math.inf) == "–"
    assert number(8.56915) == "8.569"
    assert number(-0.5) == "−0.5"
    assert number(6_787.6, "count") == "6,788"
    assert number(2**30, "bytes") == "1.00 GiB"
    assert number(0.1784, "share") == "17.8 %"
    assert number(3.14e-7) == "3.14×10⁻⁷"


def test_spike_of_long_run_is_in_page(tmp_path: Path) -> None:
    lines = rows(5_000)
    lines[3_211]["loss"] = 40.0
    html = written(make_run(tmp_path / "run", lines))
    assert "maximum at 3,212 (40)" in html
    inside = html[html.index('id="loss"') :].partition("</figure>")[0]
    assert "Each point combines 14 updates" in inside
    band = re.search(r'<path class="band s0" d="([^"]+)"', inside)
    assert band is not None
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", band[1])]
    assert min(heights) < 40  # the top of the chart is at 12


def test_widely_spread_values_have_labelled_log_axis(tmp_path: Path) -> None:
    lines = [row | {"grad_norm": 10.0 ** (row["step"] % 4)} for row in rows(20)]
    html = written(make_run(tmp_path / "run", lines))
    assert "logarithmic" in html[html.index('id="grad-norm"') :].partition("</figure>")[0]
    assert "logarithmic" not in html[html.index('id="speed"') :].partition("</figure>")[0]


def test_distant_clip_limit_does_not_flatten_the_line(tmp_path: Path) -> None:
    html = written(make_run(tmp_path / "run", rows(20), settings={"max_grad_norm": 1e6}))
    assert "clipped above" not in html
    assert "0 % of the updates were clipped to 1,000,000." in html.replace("0.0 %", "0 %")


@pytest.mark.slow
def test_page_of_100000_updates_is_small_and_fast(tmp_path: Path) -> None:
    run = make_rich_run(tmp_path / "long", 100_000)
    started_s = time.process_time()
    html = written(run)
    assert time.process_time() - started_s < 10
    assert len(html.encode()) < 5_000_000
    assert "Each point combines 278 updates" in html


# state ----------------------------------------------------------------------------------------------------------


def state_of(run: Path) -> str:
    return read_run(run).state


def test_run_is_running_while_its_lock_is_held(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows(4), events=[BEGIN | {"total_steps": 9}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    with RunLock(run):
        found = read_run(run)
        assert (found.state, found.steps) == ("running", 4)
        assert "Running: 4 of 9 updates done." in parsed(run).text
    assert state_of(run) == "ended"
    (run / ".lock").write_text('{"pid": 1, "host": "h", "since": "s"}')  # left by a killed process
    assert state_of(run) == "ended"


def test_state_comes_from_the_last_event(tmp_path: Path) -> None:
    for kind in ("finished", "stopped", "failed"):
        run = make_run(tmp_path / kind, rows(4), events=[BEGIN, {"event": kind, "why": "SIGTERM"}])
        assert state_of(run) == kind
    old = make_run(tmp_path / "old", rows(4), events=[], settings={"steps": 4})
    assert state_of(old) == "ended"
    (old / "model").mkdir()
    assert state_of(old) == "finished"


def test_second_start_without_checkpoint_is_listed(tmp_path: Path) -> None:
    found = parsed(make_run(tmp_path / "run", rows(4), events=[BEGIN, BEGIN]))
    assert "the process ended unexpectedly" in found.text
    assert "started again without a checkpoint on cpu, float32" in found.text


def test_invalid_events_are_ignored(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows(2))
    odd = [
        {"event": "resume", "passed_over": 3, "settings": [1], "step": "x"},
        {"event": 7},
        {},
        {"event": "begin", "at": 5},
    ]
    (run / "events.jsonl").write_text("garbage\n[]\n" + "".join(json.dumps(event) + "\n" for event in odd) + '{"ev')
    assert "resumed from checkpoint None" in parsed(run).text


@pytest.mark.parametrize("proof", [{"cuts": 3}, {"cuts": []}, {"cuts": [1]}, {}])
def test_invalid_verification_is_not_shown(tmp_path: Path, proof: Any) -> None:
    assert "No verification is stored in this run" in parsed(make_run(tmp_path / "run", rows(2), proof=proof)).text


def test_failed_or_foreign_verification_is_marked(tmp_path: Path) -> None:
    cuts = [PROOF["cuts"][0] | {"relative_error": 0.3}, {"microbatch": None}]
    proof = PROOF | {"exact": False, "cuts": cuts, "model": "another", "causes": ["dropout in layer 3"]}
    found = parsed(make_run(tmp_path / "run", rows(2), proof=proof))
    assert "NOT exact: a cut changes the gradient." in found.text
    assert "3.0e-01 not exact" in found.text
    assert "Cause: dropout in layer 3" in found.text
    assert "The model differs from the run's." in found.text


def test_gpu_memory_is_compared_with_the_prediction(tmp_path: Path) -> None:
    lines = [row | {"peak_bytes": 11 * 2**30} for row in rows(3)]
    events = [BEGIN | {"device": "cuda"}]
    run = make_run(tmp_path / "run", lines, events=events, choice=CHOICE | {"peak_bytes": 10 * 2**30})
    assert "The measured peak is 11.00 GiB, 10.0 % more than the predicted 10.00 GiB." in parsed(run).text
    (run / "microbatch.json").unlink()
    assert "there is no prediction, because the micro-batch was set" in parsed(run).text


def test_unknown_process_memory_is_not_added(tmp_path: Path) -> None:
    begin = {name: value for name, value in BEGIN.items() if name != "process_bytes"}
    text = parsed(make_run(tmp_path / "run", rows(3), events=[begin], choice=CHOICE)).text
    assert "on the CPU this is the whole process with Python and libraries. The prediction of 80.38 MiB covers" in text
    assert "predicted tensors only 80.38 MiB" in text


def test_runs_of_pairs_show_their_metrics(tmp_path: Path) -> None:
    lines = [
        row | {"accuracy": 0.5, "margin": 0.1 * row["step"], "noise_scale_items": 9.0, "noise_scale_sequences": 9.0}
        for row in rows(10)
    ]
    for row in lines[4::5]:
        row |= {"validation_loss": 0.6, "validation_accuracy": 0.05 * row["step"], "validation_margin": 0.2}
    found = parsed(make_run(tmp_path / "run", lines, settings={"objective": "dpo"}))
    assert figures(found) >= {"accuracy", "margin", "loss"}
    assert "nats per pair" in found.text
    assert "nats per token" not in found.text
    assert "best validation accuracy 50.0 %" in found.text
    assert "has its maximum, 50.0 %, at update 10, and is 50.0 % at the last validation." in found.text
    assert "is 9 pairs at the end; the last batch has 32." in found.text
    assert "8 pairs, 900 tokens, in 3 micro-batches" in found.text
    assert "perplexity" not in found.text


def test_old_runs_compare_noise_and_batch_in_items(tmp_path: Path) -> None:
    lines = [{**row, "noise_scale_items": 5000.0} for row in rows(4)]
    for row in lines:
        del row["sequences"]
    text = parsed(make_run(tmp_path / "run", lines)).text
    assert "is 5,000 items at the end; the last batch has 4," in text


def test_advice_and_commands_are_shown_as_given(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", rows(4)))
    given = Guidance("The batch is <fine>.", "bigbatch advise runs/x", ("bigbatch resume runs/x", "ls   lists & shows"))
    text = Parsed(page([run], guidance=[given])).text
    assert "The batch is <fine>. See also bigbatch advise runs/x" in " ".join(text.split())
    assert "Next: bigbatch resume runs/x ls lists & shows" in " ".join(text.split())
    both = Parsed(page([run, run], guidance=[given, Guidance()])).text
    assert both.count("bigbatch resume runs/x") == 1
    assert "Next:" not in Parsed(page([run])).text


def test_changed_batch_is_drawn_without_noise_scale(tmp_path: Path) -> None:
    lines = [row | {"global_batch": 32 if row["step"] < 6 else 64} for row in rows(10)]
    assert "global-batch" in figures(parsed(make_run(tmp_path / "run", lines)))


# several ---------------------------------------------------------------------------------------------------------


def test_runs_are_compared_in_one_page(tmp_path: Path) -> None:
    first = make_rich_run(tmp_path / "first")
    second = make_run(tmp_path / "second", rows(200, seed=2, validation_every=20), settings={"lr": 0.001})
    html = written(first, second)
    found = Parsed(html)
    assert {name: number for name, number in found.ids.items() if number > 1} == {}
    assert figures(found) == CHARTS
    assert "first vs. second" in found.text
    assert "Settings in which they differ" in found.text
    assert re.search(r"lr +0\.005 +0\.001", found.text)
    for name in ("first: training", "second: training", "first: validation", "second: validation"):
        assert name in found.text
    inside = html[html.index('id="loss"') :].partition("</figure>")[0].partition("</ul>")[2]
    assert 'class="line line s0"' in inside
    assert 'class="line line s1"' in inside


def test_runs_with_different_batches_are_compared_by_tokens(tmp_path: Path) -> None:
    small = make_run(tmp_path / "small", rows(40))
    large = make_run(tmp_path / "large", [row | {"tokens": 2 * row["tokens"]} for row in rows(40)])
    assert "loss-by-tokens" in figures(parsed(small, large))
    assert "loss-by-tokens" not in figures(parsed(small, make_run(tmp_path / "same", rows(40, seed=1))))


def test_runs_with_one_name_are_named_by_path(tmp_path: Path) -> None:
    one, other = (make_run(tmp_path / name / "run", rows(3)) for name in ("a", "b"))
    assert f"{one}: training" in parsed(one, other).text


def test_more_runs_than_colours_are_rejected(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", rows(2)))
    with pytest.raises(InputError, match="9 runs are too many for one page: name at most 8"):
        page([run] * 9)


# places ----------------------------------------------------------------------------------------------------------


def test_page_reloads_only_with_refresh(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows(2))
    assert 'http-equiv="refresh"' not in written(run)
    assert '<meta http-equiv="refresh" content="10">' in written(run, refresh=True)


def test_same_run_makes_the_same_page(tmp_path: Path) -> None:
    run, now = make_rich_run(tmp_path / "run"), datetime(2025, 5, 1, tzinfo=UTC)
    assert written(run, now=now) == written(run, now=now)


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run: it has neither config\.json nor metrics\.jsonl\."):
        read_run(tmp_path)


def test_unreadable_metrics_are_a_failure(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows(2))
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(BigbatchError, match=r"metrics\.jsonl cannot be read: is a directory\."):
        read_run(run)


def test_page_is_written_atomically(tmp_path: Path) -> None:
    place = tmp_path / "report.html"
    assert write_page(place, "<!doctype html>é\ud800") == len(b"<!doctype html>\xc3\xa9?")
    check_place(place)
    write_page(place, "<!doctype html>2")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert place.read_bytes() == b"<!doctype html>2"


def test_unwritable_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for place, why in (
        (tmp_path, f"--out {tmp_path} is a folder: name a file, such as {tmp_path / 'report.html'}."),
        (tmp_path / "no" / "a.html", f"--out {tmp_path / 'no' / 'a.html'} cannot be written: there is no folder"),
        (
            tmp_path / "notes.txt",
            f"--out {tmp_path / 'notes.txt'} exists and is not a report: it would be over",
        ),
    ):
        with pytest.raises(InputError) as refused:
            check_place(place)
        assert why in str(refused.value)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_failed_write_keeps_the_previous_page(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=8k") as disk:
        place = disk / "report.html"
        write_page(place, "<!doctype html>1")
        with pytest.raises(InputError, match=r"report\.html cannot be written: no space left on device\."):
            write_page(place, "<!doctype html>2" + 2**16 * " ")
        assert [path.name for path in disk.iterdir()] == ["report.html"]
        assert place.read_bytes() == b"<!doctype html>1"
