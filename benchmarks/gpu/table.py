"""The short table at the end of `make gpu`, from the JSON alone."""

from __future__ import annotations


def summary(content: dict) -> str:
    sections = content["sections"]
    lines = [f"{name:10} {section['status']}, {section['seconds']} s" for name, section in sections.items()]
    limits = sections.get("limits", {}).get("result", {})
    if limits:
        lines += [
            "",
            f"{limits['device']}, driver {limits['driver']}, torch {limits['torch']}, commit {limits['commit']}",
            f"measured limits: bf16 {limits['bf16_tflops']:.1f} TFLOP/s, fp32 {limits['fp32_tflops']:.1f} TFLOP/s, "
            f"copy {limits['copy_gb_s']:.0f} GB/s",
        ]
    for entry in sections.get("energy", {}).get("result", []):
        place = f"{entry['case']:5}{entry['chains']:>8} EnergyMLP, gradient in {entry['what']}"
        if "skipped" in entry:
            lines.append(f"{place}: not measured ({entry['skipped']})")
        else:
            fused, plain = entry["fused"]["median_ms"], entry["plain"]["median_ms"]
            lines.append(f"{place}, ms: fused {fused:.3g}, plain {plain:.3g}")
    chains = sections.get("chains", {}).get("result", {})
    if chains:
        lines += ["", *_times(chains["measurements"], limits)]
    return "\n".join(lines)


def _times(measurements: list[dict], limits: dict) -> list[str]:
    """One line per problem and number of chains: milliseconds of each contender, and what the fastest of ours wins."""
    lines, groups = [], {}
    for m in measurements:
        groups.setdefault((m["case"], m["chains"]), []).append(m)
    for (case, chains), group in groups.items():
        times = {m["name"]: m["median_ms"] for m in group if "median_ms" in m}
        ours = {name: t for name, t in times.items() if name.startswith(("cuda", "triton"))}
        text = ", ".join(f"{name} {t:.3g}" for name, t in times.items())
        won = ""
        if ours and "eager" in times:
            best = min(ours, key=ours.get)
            won = f"   eager / {best}: {times['eager'] / ours[best]:.1f}"
        for m in group:
            if m["name"] in ("cuda bf16", "cuda bf16 warpgroup") and "median_ms" in m and limits.get("bf16_tflops"):
                share = m["flops"] / m["median_ms"] / 1e9 / limits["bf16_tflops"]
                won += f"   {m['name'].removeprefix('cuda ')}: {100 * share:.0f} % of the measured matrix rate"
        lines.append(f"{case:5}{chains:>8} chains, ms: {text}{won}")
        missing = [f"{m['name']} ({m['skipped']})" for m in group if "skipped" in m]
        if missing:
            lines.append(f"{'':21}not measured: {'; '.join(missing)}")
    return lines
