"""The page of `samssl inspect`, and the same in the terminal."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samssl.config import UserError, to_tree
from samssl.data.copies import Pair, find_copies
from samssl.data.findings import Finding, Recommendation, find_all, foreground_shares, recommend
from samssl.data.fingerprint import RANGE_HU, SIDES_PX, CaseFingerprint, label_totals
from samssl.data.inspection import InspectConfig, Inspection, write_fingerprint
from samssl.files import write_text
from samssl.report.comparison import Chart
from samssl.report.figures import BLUE, INK, label_color, overlay, svg_uri
from samssl.report.page import template

_LISTED = 60
"""Rows of a list on the page; the rest is counted."""


@dataclass(frozen=True)
class Written:
    """What was made of an inspection."""

    page: Path
    settings: list[Path]
    """YAML files of recommended settings."""
    findings: list[Finding]
    recommendations: list[Recommendation]


def write_inspection(seen: Inspection, settings: InspectConfig) -> Written:
    """Write the page, the fingerprint and the recommended settings; a store gets its fingerprint too."""
    copies = find_copies(seen.cases)
    findings, advice = find_all(seen, copies), recommend(seen)
    more = {
        "findings": [asdict(finding) for finding in findings],
        "recommendations": [asdict(entry) for entry in advice],
    }
    for folder in [settings.out, *([settings.source] if seen.store else [])]:
        write_fingerprint(seen, folder, more)
    yamls = write_recommended(seen, advice, settings.out)
    write_text(settings.out / "inspect.html", render(seen, settings, copies, findings, advice))
    return Written(settings.out / "inspect.html", yamls, findings, advice)


def render(
    seen: Inspection,
    settings: InspectConfig,
    copies: Sequence[Pair],
    findings: Sequence[Finding],
    advice: Sequence[Recommendation],
) -> str:
    """The whole page as text."""
    return template("inspection.html").render(
        name=seen.name,
        tiles=_tiles(seen),
        notes=seen.notes if seen.public_names else seen.notes[:1],
        findings=[(finding, finding.cases[:_LISTED]) for finding in findings],
        advice=advice,
        groups=group_rows(seen),
        labels=label_rows(seen),
        sides=SIDES_PX,
        charts=charts(seen),
        examples=pictures(seen, settings.examples),
        copies=copies[:_LISTED],
        num_copies=len(copies),
        rejected=seen.rejected[:_LISTED],
        num_rejected=len(seen.rejected),
        colors={name: label_color(label) for label, name in seen.labels.items() if label},
    )


def write_recommended(seen: Inspection, advice: Iterable[Recommendation], out: Path) -> list[Path]:
    """Write the recommended settings of each stage as `--config` takes them; returns the files."""
    import yaml

    trees: dict[str, dict[str, Any]] = {"prepare": {}, "finetune": {}}
    if seen.data is not None:
        given = to_tree(seen.data)
        kept = ("root", "recipe", "variant", "layout", "csv", "modality", "labels", "public_names")
        trees["prepare"] = {"name": seen.name, "data": {key: given[key] for key in kept if given[key]}}
    comments = defaultdict(list)
    for entry in advice:
        comments[entry.stage].append(f"# {entry.field}: {entry.reason}")
        if entry.stage == "prepare" and seen.store:
            continue  # the store is prepared already; the reason stands in the page
        node = trees[entry.stage]
        *groups, leaf = entry.field.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = entry.value
    written = []
    for stage, tree in trees.items():
        if tree:
            text = "\n".join([f"# Recommended by samssl inspect for {seen.name}.", *comments[stage]])
            path = out / f"recommended_{stage}.yaml"
            write_text(path, text + "\n" + yaml.safe_dump(tree, sort_keys=False))
            written.append(path)
    return written


def group_rows(seen: Inspection) -> list[dict[str, Any]]:
    """Counts and sizes by split and modality."""
    groups: dict[tuple[str, str], list[CaseFingerprint]] = defaultdict(list)
    for entry in seen.cases:
        groups[entry.split or "all", entry.modality].append(entry)
    return [
        {
            "split": split,
            "modality": modality,
            "patients": len({entry.patient for entry in cases}),
            "cases": len(cases),
            "labelled": sum(entry.labelled for entry in cases),
            "slices": sum(entry.shape[0] for entry in cases),
            "shape": _spread([entry.shape for entry in cases], "{:.0f}"),
            "spacing": _spread([entry.spacing_mm for entry in cases], "{:.3g}"),
            "planes": ", ".join(name for name, _ in Counter(entry.plane for entry in cases).most_common()),
        }
        for (split, modality), cases in sorted(groups.items())
    ]


def _spread(values: Sequence[tuple[float, ...]], form: str) -> str:
    """The median of each axis, z x y x x, and the range of all where they differ."""
    table = np.array(values, dtype=float)
    median = " x ".join(form.format(value) for value in np.median(table, axis=0))
    if (table == table[0]).all():
        return median
    low, high = (" x ".join(form.format(value) for value in row) for row in (table.min(0), table.max(0)))
    return f"{median} ({low} to {high})"


def label_rows(seen: Inspection) -> list[dict[str, Any]]:
    """What is labelled: how often, how much of the voxels, how many objects vanish at each size."""
    shares, totals = foreground_shares(seen.cases), label_totals(seen.cases)
    return [
        {
            "name": seen.labels.get(label, str(label)),
            "color": label_color(label),
            "cases": sum(label in entry.labels for entry in seen.cases),
            "slices": facts.slices,
            "share": f"{100 * shares[label]:.3g} %",
            "objects": facts.objects,
            "vanish": [facts.vanish[str(side)] for side in SIDES_PX],
        }
        for label, facts in totals.items()
    ]


def _tiles(seen: Inspection) -> dict[str, str]:
    labelled = sum(entry.labelled for entry in seen.cases)
    return {
        "cases": str(len(seen.cases)),
        "patients": str(len({entry.patient for entry in seen.cases})),
        "with masks": str(labelled),
        "slices": str(sum(entry.shape[0] for entry in seen.cases)),
        "labels": str(sum(label != 0 for label in seen.labels)),
        "files not used": str(len(seen.rejected)),
    }


def charts(seen: Inspection) -> dict[str, Chart]:
    """Histograms of intensities, sizes and spacings."""
    made = {}
    for modality in sorted({entry.modality for entry in seen.cases}):
        cases = [entry for entry in seen.cases if entry.modality == modality]
        made[f"Intensities, {modality}"] = _intensities(modality, cases)
    made["Sizes and pixel spacing"] = _geometry(seen.cases)
    return made


def _intensities(modality: str, cases: Sequence[CaseFingerprint]) -> Chart:
    """Each case's histogram as a line, and their mean."""
    shares = np.array([entry.histogram for entry in cases], dtype=float)
    shares /= shares.sum(axis=1, keepdims=True).clip(1)
    low, high = RANGE_HU if modality == "CT" else (0.0, 1.0)
    places = np.linspace(low, high, shares.shape[1] + 1)[:-1] + (high - low) / shares.shape[1] / 2

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for row in shares[:: max(1, len(shares) // 60)]:
            axes.plot(places, row, color=INK, alpha=0.15, lw=0.7)
        axes.plot(places, shares.mean(axis=0), color=BLUE, lw=1.8)
        axes.set_xlabel("HU" if modality == "CT" else "from each case's 0.5 to its 99.5 percentile")
        axes.set_ylabel("share of voxels")
        axes.set_yticks([])

    words = (
        f"Mean histogram of {len(cases)} {modality} scans above their background, in blue over single ones"
    )
    return Chart(svg_uri(draw, 7.2, 2.4), words)


def _geometry(cases: Sequence[CaseFingerprint]) -> Chart:
    panels = {
        "rows": [entry.shape[1] for entry in cases],
        "columns": [entry.shape[2] for entry in cases],
        "slices": [entry.shape[0] for entry in cases],
        "mm in the slice": [entry.spacing_mm[2] for entry in cases],
        "mm between slices": [entry.spacing_mm[0] for entry in cases],
    }

    def draw(figure: Any) -> None:
        for axes, (label, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            axes.hist(values, bins=16, color=BLUE)
            axes.set_xlabel(label)
            axes.set_yticks([])

    words = ", ".join(f"{label} {min(values):g} to {max(values):g}" for label, values in panels.items())
    return Chart(svg_uri(draw, 7.2, 1.7), f"Histograms of sizes and spacings: {words}")


@dataclass(frozen=True)
class Picture:
    """A slice with its labels."""

    case: str
    caption: str
    uri: str


def pictures(seen: Inspection, count: int) -> list[Picture]:
    """The slice with most labels of cases spread evenly over all, labelled ones first."""
    ordered = sorted(seen.cases, key=lambda entry: (not entry.labels, entry.case))
    labelled = [entry for entry in ordered if entry.labels] or ordered
    places = np.linspace(0, len(labelled) - 1, min(count, len(labelled))).round().astype(int)
    made = (_picture(seen, labelled[place]) for place in places)
    return [picture for picture in made if picture]


def _picture(seen: Inspection, entry: CaseFingerprint) -> Picture | None:
    try:
        scan, mask = seen.read(entry.case)
    except UserError:
        return None
    z = len(scan.voxels) // 2 if mask is None else int((mask > 0).sum(axis=(1, 2)).argmax())
    low, high = entry.percentiles[0], entry.percentiles[2]
    image = ((scan.voxels[z].astype(np.float32) - low) / max(high - low, 1e-6)).clip(0, 1)
    labels = np.zeros(image.shape, np.uint8) if mask is None else mask[z]
    step = max(1, -(-max(image.shape) // 256))
    aspect = scan.spacing_mm[1] / scan.spacing_mm[2]
    uri = overlay(image[::step, ::step], labels[::step, ::step], aspect)
    where = f"slice {z + 1} of {len(scan.voxels)}" if len(scan.voxels) > 1 else "image"
    return Picture(entry.case, f"{entry.split + ', ' if entry.split else ''}{where}", uri)


def terminal(seen: Inspection, written: Written) -> str:
    """The page's tables and findings for a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    groups = Table(box=box.SIMPLE, pad_edge=False)
    headings = ("split", "modality", "patients", "cases", "labelled", "slices", "shape", "spacing", "planes")
    _fill(groups, headings, group_rows(seen))
    labels = Table(box=box.SIMPLE, pad_edge=False)
    rows = [
        {**row, **{f"gone at {side}": lost for side, lost in zip(SIDES_PX, row["vanish"], strict=True)}}
        for row in label_rows(seen)
    ]
    _fill(labels, ("name", "cases", "slices", "share", "objects", *(f"gone at {s}" for s in SIDES_PX)), rows)
    console = Console(width=118, highlight=False)
    with console.capture() as captured:
        console.print(groups)
        if rows:
            console.print(labels)
    lines = [captured.get().rstrip()]
    lines += [f"{'LOOK: ' if found.serious else '- '}{found.text}" for found in written.findings]
    lines += [
        f"{entry.stage}: {entry.field}={entry.value}  ({entry.reason})" for entry in written.recommendations
    ]
    lines += [f"inspect: {path}" for path in (written.page, *written.settings)]
    return "\n".join(lines)


def _fill(table: Any, headings: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(str(row[heading]) for heading in headings))
