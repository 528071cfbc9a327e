"""Loss against samples when the batch grows k-fold and a rule adjusts the hyper-parameters.

    python benchmarks/scaling_rules.py            # half a minute; writes docs/explanation/scaling-rules.svg as well

A noisy quadratic, L = h·θ²/2 with the gradient h·θ + σ·ξ/√B, in float64: thousands of independent copies in one tensor,
torch's own optimizers, only `bigbatch.rescale` applied. Each experiment runs k = 1, 4 and 16 with the right rule and
k = 16 with a wrong one. The deviation is the largest |L_k / L_1 − 1| over the run, compared at the same number of
samples (for adascale: of updates times gain). The bound is derived in docs/explanation/scaling-rules.md; six standard
errors of the measured losses are added to it.
"""

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigbatch.scaling.hyperparameters import rescale

FIGURE = Path(__file__).parents[1] / "docs" / "explanation" / "scaling-rules.svg"
POINTS = 24  # of a curve, after its beginning
COPIES = 16_384
STANDARD_ERRORS = 6


@dataclass(frozen=True)
class Experiment:
    """One rule in the regime that it was derived for, and wrong rules to compare with.

    Attributes:
        title: Title of its panel.
        rule: Rule that fits the regime.
        wrong: Rules that do not.
        optimizer: Makes the optimizer as tuned at a batch of 1.
        samples: Samples of a run; a multiple of all factors times the points.
        bound: Deviation that the derivation allows at factor k, without the standard errors.
        start: θ at the beginning.
        sigma: Standard deviation of the noise of one sample, after so many samples.
        noise_scale: Makes the noise of a sample √noise_scale times as large as the gradient; 0 for the noise above.
    """

    title: str
    rule: str
    wrong: tuple[str, ...]
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    samples: int
    bound: Callable[[int], float]
    start: float
    sigma: Callable[[float], float] = field(default=lambda samples: 1.0)
    noise_scale: float = 0.0


@dataclass(frozen=True)
class Curve:
    """Losses of one run at each point of the horizontal axis, relative to the first, with their standard errors."""

    progress: list[float]
    losses: list[float]
    errors: list[float]


X = 1 / 1024  # η·h at a batch of 1: relative contraction of one sample
FLOOR = X / 2  # of θ², where noise and contraction balance


def _sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=X)


def _adam(betas: tuple[float, float], *, lr: float = X, eps: float = 1e-8) -> Callable[[list[Tensor]], Any]:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=betas, eps=eps)


def _discrete(k: int, tau: float) -> float:
    """Return the deviation of one step for k: a contraction by k·x instead of k times by x, over tau = x·samples."""
    y = k * X
    return max(tau, 1) * y / (1 - y)


def _adaptive(k: int, tau: float, *, signal: float, beta2: float, lag: float, late: float = 0.0) -> float:
    """Return Adam's additional deviation: gradient against noise in v, v's fluctuations, beta1's memory."""
    of_lr = k * signal / 2 + (1 - beta2) + late
    return _discrete(k, tau) + 2 * max(tau, 1) * of_lr + 2 * tau * X * lag


def _lag(k: int, beta1: float) -> float:
    return k * beta1 / (1 - beta1)


GAIN_C = 0.5  # of the learning rate that is best at a batch of 1
GAIN_NOISE = 32.0
GAIN_X = 1 / (1 + GAIN_NOISE)  # that best rate, times h
GAIN_UPDATES = 132  # a multiple of every gain below
BEYOND = 128  # a batch of four noise scales


def gain(k: int) -> float:
    """Return AdaScale's gain over a batch of 1 at the noise scale of its experiment."""
    return k * (GAIN_NOISE + 1) / (GAIN_NOISE + k)


def _gain_bound(k: int) -> float:
    """Return the deviation of one update for gain(k): a contraction by 1 − f·r instead of (1 − f)^r."""
    f = (2 * GAIN_C - GAIN_C**2) * GAIN_X
    return GAIN_UPDATES * f * gain(k) * f / (2 * (1 - gain(k) * f))


EXPERIMENTS = {
    "linear": Experiment(
        title="SGD: linear",
        rule="linear",
        wrong=("none", "sqrt"),
        optimizer=_sgd,
        samples=1536,
        bound=lambda k: _discrete(k, 1.5),
        start=math.sqrt(16 * FLOOR),
    ),
    "sqrt": Experiment(
        title="Adam: sqrt",
        rule="sqrt",
        wrong=("none", "linear"),
        optimizer=_adam((0.5, 0.999)),
        samples=1536,
        bound=lambda k: _adaptive(k, 1.5, signal=4 * FLOOR, beta2=0.999, lag=_lag(k, 0.5)),
        start=math.sqrt(4 * FLOOR),
    ),
    "sde": Experiment(
        title="Adam with ε = √v and a long memory: sde",
        rule="sde",
        wrong=("sqrt", "linear"),
        optimizer=_adam((1 - 1 / 64, 0.999), lr=2 * X, eps=1.0),
        samples=1536,
        bound=lambda k: _adaptive(k, 1.5, signal=4 * FLOOR, beta2=1 - k / 1000, lag=63 - _lag(k, 1 - k / 64)),
        start=math.sqrt(4 * FLOOR),
    ),
    "half-life": Experiment(
        title="Adam, noise falls to an eighth: sqrt+half-life",
        rule="sqrt+half-life",
        wrong=("sqrt", "half-life"),
        optimizer=_adam((0.5, 1 - 1 / 256)),
        samples=3072,
        bound=lambda k: _adaptive(k, 2.125, signal=8 * FLOOR, beta2=(1 - 1 / 256) ** k, lag=_lag(k, 0.5), late=k / 512),
        start=math.sqrt(8 * FLOOR),
        sigma=lambda samples: 8.0 if samples < 1024 else 1.0,
    ),
    "adascale": Experiment(
        title="SGD, noise in step with the gradient: adascale",
        rule="adascale",
        wrong=("none", "linear"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=GAIN_C * GAIN_X),
        samples=GAIN_UPDATES,
        bound=_gain_bound,
        start=1.0,
        noise_scale=GAIN_NOISE,
    ),
}


def run(experiment: Experiment, k: int, rule: str | None = None, *, copies: int = COPIES, seed: int = 0) -> Curve:
    """Train with a batch of k under a rule, by default that of the experiment."""
    rule = experiment.rule if rule is None else rule
    theta = torch.full((copies,), experiment.start, dtype=torch.float64, requires_grad=True)
    optimizer = experiment.optimizer([theta])
    needs = {"noise_scale": experiment.noise_scale, "batch": 1.0} if rule == "adascale" else {}
    rescale(optimizer, k, rule=rule, **needs)
    generator = torch.Generator().manual_seed(seed + k)
    worth = gain(k) if experiment.noise_scale else float(k)  # of an update, on the horizontal axis
    updates = round(experiment.samples / worth)
    shown = {round(updates * i / POINTS) for i in range(POINTS + 1)}
    curve = Curve([], [], [])
    for update in range(updates + 1):
        if update in shown:
            walk = 4 * experiment.noise_scale * update / k * float(optimizer.param_groups[0]["lr"]) ** 2
            _note(curve, update * worth, theta.detach() / experiment.start, walk)
        theta.grad = theta.detach() + _noise(experiment, theta.detach(), update * k, generator) / math.sqrt(k)
        optimizer.step()
    return curve


def _noise(experiment: Experiment, theta: Tensor, samples: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(theta.shape, dtype=theta.dtype, generator=generator)
    if experiment.noise_scale:  # E|noise|² = noise_scale·|gradient|², in any direction
        return noise * theta.norm() * math.sqrt(experiment.noise_scale / theta.numel())
    return noise * experiment.sigma(samples)


def _note(curve: Curve, progress: float, theta: Tensor, walk: float) -> None:
    """Append the mean of θ² over independent copies, or over the coordinates of one trajectory."""
    square = theta.square()
    mean = square.mean().item()
    variance = mean**2 * walk if walk else square.var().item()
    curve.progress.append(progress)
    curve.losses.append(mean)
    curve.errors.append(math.sqrt(variance / len(theta)))


def deviation(curve: Curve, base: Curve) -> tuple[float, float]:
    """Return the largest relative distance of a curve from another, and the largest standard error of that."""
    relative = [(_at(curve, p), loss, e) for p, loss, e in zip(base.progress, base.losses, base.errors, strict=True)]
    if not all(math.isfinite(value) for (value, _), _, _ in relative):
        return math.inf, 0.0
    return (
        max(abs(value / loss - 1) for (value, _), loss, _ in relative),
        max(math.hypot(error, e) / loss for (_, error), loss, e in relative),
    )


def _at(curve: Curve, progress: float) -> tuple[float, float]:
    """Interpolate a curve linearly in log loss."""
    for i in range(1, len(curve.progress)):
        if curve.progress[i] >= progress or i == len(curve.progress) - 1:
            left, right = curve.progress[i - 1], curve.progress[i]
            share = (progress - left) / (right - left)
            low, high = (math.log(curve.losses[j]) for j in (i - 1, i))
            return math.exp(low + share * (high - low)), max(curve.errors[i - 1 : i + 1])
    raise AssertionError("a curve has points")


# figure ----------------------------------------------------------------------------------------------------------

STYLE = """
  .paper { fill: #ffffff } text { fill: #24292f; font: 12px system-ui, sans-serif } .axis { stroke: #8c959f }
  .title { font-weight: 600; font-size: 13px } .small { font-size: 11px }
  polyline { fill: none; stroke-linejoin: round }
  .k1 { stroke: #9ec5f5; stroke-width: 7 } .k4 { stroke: #0a58ca; stroke-width: 2.4 }
  .k16 { stroke: #111827; stroke-width: 1.6; stroke-dasharray: 6 4 } .wrong { stroke: #d1242f; stroke-width: 1.8 }
  .wrong2 { stroke: #bc6c00; stroke-width: 1.8; stroke-dasharray: 2 3 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } text { fill: #e6edf3 } .k1 { stroke: #1f4e8c } .k4 { stroke: #79b8ff }
    .k16 { stroke: #f0f6fc } .wrong { stroke: #ff7b72 } .wrong2 { stroke: #e3b341 }
  }
"""
WIDTH, HEIGHT, MARGIN, COLUMNS = 350, 250, 44, 3


@dataclass(frozen=True)
class Panel:
    """Curves with their labels and CSS classes."""

    title: str
    across: str
    curves: list[tuple[str, str, Curve]]


def figure(panels: list[Panel]) -> str:
    """Draw the panels as one SVG."""
    rows = math.ceil(len(panels) / COLUMNS)
    width, height = COLUMNS * WIDTH, rows * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>Loss against samples for k = 1, 4 and 16, by rule</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
    ]
    for index, panel in enumerate(panels):
        x, y = index % COLUMNS * WIDTH, index // COLUMNS * HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> list[str]:
    right, bottom, top = WIDTH - 14, HEIGHT - 36, 30
    across = max(curve.progress[-1] for _, _, curve in panel.curves)
    drawn = [value for _, _, curve in panel.curves for value in curve.losses if 0 < value < 30]
    low, high = math.log10(min(drawn)) - 0.05, math.log10(max(drawn)) + 0.05

    def point(progress: float, loss: float) -> str:
        x = MARGIN + progress / across * (right - MARGIN)
        return f"{x:.1f},{bottom - (math.log10(loss) - low) / (high - low) * (bottom - top):.1f}"

    parts = [f'<text class="title" x="{MARGIN}" y="18">{panel.title}</text>']
    parts.append(f'<path class="axis" fill="none" d="M{MARGIN} {top}V{bottom}H{right}"/>')
    for power in range(math.ceil(low), math.floor(high) + 1):
        y = point(0, 10.0**power).partition(",")[2]
        parts.append(f'<text class="small" x="{MARGIN - 6}" y="{y}" text-anchor="end">{10.0**power:g}</text>')
    parts.append(f'<text class="small" x="{right}" y="{bottom + 28}" text-anchor="end">{panel.across}</text>')
    parts.append(f'<text class="small" x="{right}" y="{bottom + 14}" text-anchor="end">{across:,.0f}</text>')
    for row, (label, style, curve) in enumerate(panel.curves):
        shown = [point(p, v) for p, v in zip(curve.progress, curve.losses, strict=True) if 0 < v < 30]
        parts.append(f'<polyline class="{style}" points="{" ".join(shown)}"/>')
        x, y = MARGIN + 10, bottom - 12 - 15 * (len(panel.curves) - 1 - row)
        parts.append(f'<polyline class="{style}" points="{x},{y} {x + 26},{y}"/>')
        parts.append(f'<text class="small" x="{x + 32}" y="{y + 4}">{label}</text>')
    return parts


def main() -> None:
    """Print the table and write the figure."""
    print(f"torch {torch.__version__}, float64, {COPIES:,} copies, {platform.machine()} CPU")
    print(f"\n{'experiment':<48}{'k':>4} {'rule':<15}{'deviation':>10}{'bound':>8}")
    panels = []
    for experiment in EXPERIMENTS.values():
        base = run(experiment, 1)
        curves = [("k = 1", "k1", base)]
        for k, rule in [(4, experiment.rule), (16, experiment.rule), *((16, wrong) for wrong in experiment.wrong)]:
            curve = run(experiment, k, rule)
            _row(experiment, k, rule, curve, base)
            style = f"k{k}" if rule == experiment.rule else ("wrong" if rule == experiment.wrong[0] else "wrong2")
            curves.append((f"k = {k}, {rule}", style, curve))
        across = "updates × gain" if experiment.noise_scale else "samples"
        panels.append(Panel(experiment.title, across, curves))
    experiment = EXPERIMENTS["adascale"]
    base = run(experiment, 1)
    beyond = [(rule, run(experiment, BEYOND, rule)) for rule in ("adascale", "linear")]
    for rule, curve in beyond:
        _row(experiment, BEYOND, rule, curve, base, bound=False)
    lines = [(f"k = {BEYOND}, {rule}", style, c) for (rule, c), style in zip(beyond, ("k16", "wrong"), strict=True)]
    panels.append(Panel("The same, at four noise scales", "updates × gain", [("k = 1", "k1", base), *lines]))
    FIGURE.write_text(figure(panels), encoding="utf-8")


def _row(experiment: Experiment, k: int, rule: str, curve: Curve, base: Curve, *, bound: bool = True) -> None:
    found, error = deviation(curve, base)
    allowed = f"{experiment.bound(k) + STANDARD_ERRORS * error:8.3f}" if bound and rule == experiment.rule else ""
    print(f"{experiment.title:<48}{k:>4} {rule:<15}{found:>10.3f}{allowed}")


if __name__ == "__main__":
    main()
