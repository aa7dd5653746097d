"""The records of a benchmark as text: plain tables that can be pasted into a document."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from jlebm_fast.bench.cases import CASES
from jlebm_fast.bench.sections import MANY

_RIVALS = ("eager loop", "eager loop, spectral norm", "torch.compile", "jax.jit scan", "torchebm")


def heading(about: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    computer = f"{about['cpu']}, {about['cores']} cores, {about['system']}"
    return f"{computer}\n{versions}; commit {about['commit']}; {about['date']}"


def table(title: str, columns: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """A left-aligned first column, right-aligned others; empty if there are no rows."""
    if not rows:
        return ""
    head = max(len(title), *(len(name) for name, _ in rows))
    widths = [max(len(column), *(len(cells[i]) for _, cells in rows)) for i, column in enumerate(columns)]
    lines = [title.ljust(head) + "".join(f"   {c:>{w}}" for c, w in zip(columns, widths))]
    lines += [name.ljust(head) + "".join(f"   {c:>{w}}" for c, w in zip(cells, widths)) for name, cells in rows]
    return "\n".join(lines) + "\n"


def report(results: list[dict]) -> str:
    """Everything measured, the last result being the one with all threads."""
    blocks = [_ratios(results)]
    for result in reversed(results):
        blocks += _chains(result)
    blocks += [_diagnostics(results[-1]), _ops(results[-1]), _machine(results)]
    failures = [
        f"FAILED {check['op']} on {check['backend']}: {check['error']:.1e}" for r in results for check in r["failed"]
    ]
    return "\n" + "\n".join(block for block in blocks if block) + "\n".join(failures)


def _of(result: dict, section: str, op: str | None = None) -> list[dict]:
    return [r for r in result["records"] if r["section"] == section and op in (None, r["op"])]


def _median(record: dict) -> float:
    return record["timing"]["median_s"]


def _contenders(records: list[dict]) -> list[str]:
    """Our backends first, then the rivals in their order."""
    names = list(dict.fromkeys(r["contender"] for r in records))
    return [n for n in names if n not in _RIVALS] + [n for n in _RIVALS if n in names]


def _cell(records: list[dict], case: str, contender: str) -> dict | None:
    return next((r for r in records if r["case"] == case and r["contender"] == contender), None)


def _threads(result: dict) -> str:
    return f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"


def _ratios(results: list[dict]) -> str:
    """How many times faster, and which fraction of the processor's multiply-add peak.

    Everybody has all threads, as a user's script has; small batches make some rivals slower with them, so where a
    rival was faster with fewer, a second row holds our call with all threads against that.
    """
    result = results[-1]
    records = _of(result, "chain")
    cases = [name for name in CASES if any(r["case"] == name for r in records)]
    rows = []
    for ours in (n for n in _contenders(records) if n not in _RIVALS):
        spectral = ours.endswith("spectral norm")
        for rival in (n for n in _RIVALS if n.endswith("spectral norm") == spectral):
            for many in (False, True):
                chosen = [r for r in records if (r["chains"] == MANY) == many]
                cells = [_faster(_cell(chosen, case, ours), _cell(chosen, case, rival)) for case in cases]
                size = f"{MANY:,} chains" if many else "one batch"
                if any(cells):
                    rows.append((f"{size}: {ours}, times faster than {rival}", cells))
                best = [_faster(_cell(chosen, case, ours), _at_its_best(results, case, many, rival)) for case in cases]
                if best != cells:
                    rows.append((f"{size}: {ours}, times faster than {rival}, threads that suit it", best))
        share = _of(result, "share")
        for title, key in (("median turn", "fma_fraction"), ("fastest call, highest peak", "fma_fraction_best")):
            cells = [_fraction(_cell(share, case, ours), key) for case in cases]
            if any(cells):
                rows.append((f"{MANY:,} chains: {ours}, fraction of the FMA peak, {title}", cells))
    columns = [f"{name} ({CASES[name].batch})" for name in cases]
    return table(f"Ratios, {_threads(result)} (in brackets: chains of one batch)", columns, rows)


def _faster(ours: dict | None, rival: dict | None) -> str:
    return f"{_median(rival) / _median(ours):.1f}" if ours and rival else ""


def _at_its_best(results: list[dict], case: str, many: bool, contender: str) -> dict | None:
    """The quickest record of a contender over the numbers of threads that it was measured with."""
    records = [r for result in results for r in _of(result, "chain") if (r["chains"] == MANY) == many]
    measured = [r for r in records if r["case"] == case and r["contender"] == contender]
    return min(measured, key=_median, default=None)


def _fraction(record: dict | None, key: str = "fma_fraction") -> str:
    return f"{record[key]:.2f}" if record and record[key] else ""


def _chains(result: dict) -> list[str]:
    """Milliseconds of whole runs, for one batch and for many chains."""
    blocks = []
    for many in (False, True):
        records = [r for r in _of(result, "chain") if (r["chains"] == MANY) == many]
        cases = list(dict.fromkeys(r["case"] for r in records))
        rows = []
        for contender in _contenders(records):
            cells = [_cell(records, case, contender) for case in cases]
            rows.append((contender, [f"{1e3 * _median(r):.2f}" if r else "" for r in cells]))
            if many and contender not in _RIVALS:
                rows.append(("  fraction of the FMA peak", [_fraction(r) for r in cells]))
        columns = [f"{case} ({r['chains']:,} x {r['n_steps']})" for case, r in _first_of_each(records)]
        blocks.append(table(f"ms per run (chains x steps), {_threads(result)}", columns, rows))
    return blocks


def _first_of_each(records: list[dict]) -> list[tuple[str, dict]]:
    first: dict[str, dict] = {}
    for record in records:
        first.setdefault(record["case"], record)
    return list(first.items())


def _diagnostics(result: dict) -> str:
    """What energy, gradient norm and displacement of every step add to a run."""
    records = _of(result, "diagnostics")
    rows = []
    for with_them in (r for r in records if r["contender"].endswith(" with diagnostics")):
        backend = with_them["contender"].removesuffix(" with diagnostics")
        without = next(r for r in records if r["contender"] == backend and _same_size(r, with_them))
        # turn by turn: neighbours in time met the same speed of a shared machine
        ratios = [a / b for a, b in zip(with_them["turns_s"], without["turns_s"], strict=True)]
        cost, error = 100 * (statistics.median(ratios) - 1), 100 * error_of_median(ratios)
        label = f"{backend}, {with_them['case']}, {with_them['chains']:,} chains"
        rows.append((label, [f"{cost:+.1f} %", f"{error:.1f} %"]))
    return table("Diagnostics of every step", ["cost", "+-"], rows)


def error_of_median(values: Sequence[float]) -> float:
    """Half the width of a 95 % interval of the median, 1.57 · interquartile range / √n (McGill, Tukey and Larsen, The
    American Statistician 32, 1978); infinite for a single value."""
    if len(values) < 2:
        return math.inf
    lower, _, upper = statistics.quantiles(values)
    return 1.57 * (upper - lower) / math.sqrt(len(values))


def _same_size(a: dict, b: dict) -> bool:
    return (a["case"], a["chains"]) == (b["case"], b["chains"])


def _ops(result: dict) -> str:
    """The smaller operations beside plain torch."""
    rows = []
    records = _of(result, "op")
    for record in records:
        torchs = next(
            (
                r
                for r in records
                if r["contender"] == "plain torch" and r["op"] == record["op"] and _same_size(r, record)
            ),
            None,
        )
        cells = [
            f"{1e3 * _median(record):.3f}",
            f"{_median(torchs) / _median(record):.1f}" if torchs else "",
            _fraction(record),
        ]
        rows.append((f"{record['op']}, {record['case']}, {record['chains']:,} chains: {record['contender']}", cells))
    return table(
        f"One call of an operation, {_threads(result)}", ["ms", "times faster than torch", "of FMA peak"], rows
    )


def _machine(results: list[dict]) -> str:
    rows = [(_threads(r), [f"{r['fma_peak_gflops']:.0f} GFLOP/s", f"{r['copy_gb_per_s']:.0f} GB/s"]) for r in results]
    return table("This machine, measured", ["FMA peak", "memory copy"], rows)
