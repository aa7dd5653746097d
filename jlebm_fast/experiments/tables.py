"""Cells' results as the tables of the report: means and standard errors over seeds, beside the paper's numbers."""

from __future__ import annotations

import itertools
import statistics
from typing import Any, NamedTuple

from .cells import Plan

# FID of the papers' tables: SVHN, CelebA-64, CIFAR-10 (Inception features: for the order, not the size)
PAPER_FID = {
    "abp": (49.71, 51.50, None), "lvae": (39.26, 53.40, None), "biva": (31.65, 33.58, None),
    "sri": (35.23, 36.84, None), "vlae": (43.95, 44.05, None), "two_stage_vae": (42.81, 44.40, 72.90),
    "rae": (40.02, 40.95, 74.16), "ncp_vae": (33.23, 42.07, 78.06), "multi_ncp": (26.19, 35.38, 65.01),
    "lebm": (29.44, 37.87, 70.15), "joint": (24.16, 32.15, 63.42),
}  # fmt: skip
PAPER_CHAIN_STEPS = {15: 56.42, 30: 39.89, 60: 32.15, 150: 31.20, 300: 30.78}  # CelebA-64
PAPER_WIDTHS = {0: 43.95, 10: 41.72, 20: 33.10, 50: 30.42, 100: 24.16}  # SVHN
PAPER_LAYERS = {"joint": (32.6, 58.3, 67.6), "vlae": (35.7, 57.9, 52.1)}  # MNIST, %
PAPER_ANOMALY = {1: 0.722, 4: 0.949, 5: 0.980, 7: 0.941, 9: 0.935}  # MNIST, joint prior
PAPER_ANOMALY_LEBM = {1: 0.336, 4: 0.630, 5: 0.619, 7: 0.463, 9: 0.413}
ANOMALY_SCORES = {"auprc": "−log p(x, z)", "auprc_prior": "−log p(z)"}  # name of the measure: what it scores by


class Table(NamedTuple):
    """Rows of text under a title.

    rows    the first is the head
    notes   sentences below
    """

    title: str
    rows: list[list[str]]
    notes: list[str]


class Estimate(NamedTuple):
    """Mean over seeds and its standard error, None for a single seed."""

    mean: float
    error: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.error is None else f"{self.mean:.1f} ± {self.error:.1f}"


def estimate(values: list[float]) -> Estimate | None:
    """Mean and standard error of what there is; None where there is nothing yet.

    Example:
        >>> estimate([1.0, 2.0, 3.0])
        Estimate(mean=2.0, error=0.5773502691896258, n=3)
    """
    if not values:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error, len(values))


class Results:
    """Finished cells by run identity, and what the tables ask of them."""

    def __init__(self, plan: Plan, found: dict[str, dict[str, Any]]) -> None:
        self.plan, self.found = plan, found

    def values(self, part: str, row: Any, measure: str, name: str) -> list[Any]:
        """One measured value per finished cell of a row."""
        cells = [identity for (key, _), identity in self.plan.tables[part].items() if key == row]
        results = [self.found[identity]["measures"] for identity in cells if identity in self.found]
        return [measures[measure][name] for measures in results if measure in measures]

    def failures(self, part: str, row: Any) -> int:
        cells = [identity for (key, _), identity in self.plan.tables[part].items() if key == row]
        return sum("failed" in self.found.get(identity, {}) for identity in cells)

    def rows(self, part: str) -> list[Any]:
        return list(dict.fromkeys(key for key, _ in self.plan.tables[part]))

    def curve(self, part: str) -> list[tuple[int, float, float | None]]:
        """(row, mean distance, standard error) of the finished rows."""
        found = [(row, estimate(self.values(part, row, "distance", "frechet"))) for row in self.rows(part)]
        return [(row, e.mean, e.error) for row, e in found if e is not None]


def _cell_text(value: Estimate | None, digits: int = 1) -> str:
    if value is None:
        return "–"
    if value.error is None:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} ± {value.error:.{digits}f}"


def models_table(results: Results) -> Table:
    rows = [["model", "Fréchet distance ↓", "class score ↑", "reconstruction error", "seeds", "paper: FID on SVHN",
             "CelebA-64", "CIFAR-10"]]  # fmt: skip
    order = []
    for name in results.rows("models"):
        distance = estimate(results.values("models", name, "distance", "frechet"))
        score = estimate(results.values("models", name, "distance", "class_score"))
        error = estimate(results.values("models", name, "distance", "reconstruction_mse"))
        paper = ["" if value is None else f"{value:.2f}" for value in PAPER_FID.get(name, (None,) * 3)]
        failed = results.failures("models", name)
        seeds = f"{distance.n if distance else 0}" + (f" ({failed} diverged)" if failed else "")
        row = [name, _cell_text(distance), _cell_text(score, 2), _cell_text(error, 4), seeds, *paper]
        order.append((distance.mean if distance else float("inf"), row))
    rows += [row for _, row in sorted(order, key=lambda entry: entry[0])]
    return Table("All models, the same generator and number of updates", rows, claims(results))


def claims(results: Results) -> list[str]:
    """Whether the joint prior beats the same net without f by two standard errors, and halves its distance."""
    joint, vlae = (estimate(results.values("models", name, "distance", "frechet")) for name in ("joint", "vlae"))
    if joint is None or vlae is None:
        return ["The joint prior and the VLAE are not both finished yet."]
    ratio = joint.mean / vlae.mean
    halved = "at most half" if ratio <= 0.5 else "more than half, the mark that was set"
    sentences = [
        f"The joint prior's distance is {joint}, the VLAE's (the same net, f = 0) {vlae}: "
        f"a ratio of {ratio:.2f}, {halved}."
    ]
    if joint.error is None or vlae.error is None:
        return [*sentences, "With one seed there are no standard errors to compare the difference with."]
    error = (joint.error**2 + vlae.error**2) ** 0.5
    difference = vlae.mean - joint.mean
    verdict = "more" if difference > 2 * error else "not more"
    size = f"{difference / error:.1f}" if error > 0 else "∞"
    return [*sentences, f"The difference is {size} standard errors of the difference: {verdict} than two."]


def curve_table(results: Results, part: str) -> Table:
    paper, title, name, where = {
        "chain_steps": (PAPER_CHAIN_STEPS, "More Langevin steps K, training and sampling", "K", "CelebA-64"),
        "energy_width": (PAPER_WIDTHS, "Wider f; 0 is the VLAE", "hidden units", "SVHN"),
    }[part]
    rows = [[name, "Fréchet distance ↓", f"paper: FID on {where}"]]
    for row in results.rows(part):
        distance = estimate(results.values(part, row, "distance", "frechet"))
        rows.append([str(row), _cell_text(distance), f"{paper[row]:.2f}" if row in paper else ""])
    return Table(title, rows, [])


def layers_table(results: Results) -> Table:
    n_layers = len(results.plan.settings.latent_dims)
    head = [f"z_{i + 1}" + {0: " (bottom)", n_layers - 1: " (top)"}.get(i, "") for i in range(n_layers)]
    rows = [["model", *head]]
    for model in results.rows("layers"):
        per_seed = results.values("layers", model, "content", "layer_accuracy")
        columns = [estimate([100 * seed[i] for seed in per_seed]) for i in range(n_layers)]
        rows.append([f"{model}, %", *map(_cell_text, columns)])
        if n_layers == len(PAPER_LAYERS[model]):
            rows.append([f"{model}, paper, %", *(f"{value:.1f}" for value in PAPER_LAYERS[model])])
    return Table("What each layer knows of the label: accuracy of a classifier on it alone", rows, [])


def anomaly_table(results: Results) -> Table:
    digits = list(dict.fromkeys(digit for _, digit in results.plan.tables["anomaly"]))
    rows = [["held out", *map(str, digits)]]
    for model, (name, score) in itertools.product(results.rows("anomaly"), ANOMALY_SCORES.items()):
        row = [f"{model}, {score}"]
        for digit in digits:
            found = results.found.get(results.plan.tables["anomaly"][model, digit], {}).get("measures", {})
            row.append(f"{found['anomaly'][name]:.3f}" if "anomaly" in found else "–")
        rows.append(row)
    for name, paper in (("joint, paper", PAPER_ANOMALY), ("lebm, paper", PAPER_ANOMALY_LEBM)):
        rows.append([name, *(f"{paper[digit]:.3f}" if digit in paper else "" for digit in digits)])
    return Table(
        "Anomaly detection: AUPRC of the digit that was not trained on", rows,
        ["Scores at the encoded z, on the held-out images; the first seed. −log p(x, z) is for the most part the "
         "squared error of the reconstruction."],
    )  # fmt: skip


def all_tables(results: Results) -> list[Table]:
    """The tables of the parts that were asked for."""
    makers = {
        "models": models_table,
        "chain_steps": lambda r: curve_table(r, "chain_steps"),
        "energy_width": lambda r: curve_table(r, "energy_width"),
        "layers": layers_table,
        "anomaly": anomaly_table,
    }
    return [make(results) for part, make in makers.items() if part in results.plan.tables]
