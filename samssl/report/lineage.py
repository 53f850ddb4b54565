"""A study's lineage as a picture: what every result was made from, by digest.

Left to right: scans, slice store, pretraining, fine-tuning, evaluation. A line joins two runs where one read
what the other wrote; what no run of the study wrote is drawn as well.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

from samssl.report.comparison import Chart
from samssl.report.figures import GREEN, INK, svg_uri
from samssl.report.study import Stage
from samssl.report.verdict import arm_name

COLUMNS = {"prepare": 1, "pretrain": 2, "finetune": 3, "evaluate": 4, "nnunet": 4}
"""Where the runs of a stage are drawn; what comes from outside stands left of its readers."""
VERBS = {
    "prepare": "slice store",
    "pretrain": "pretraining",
    "finetune": "fine-tuning",
    "evaluate": "evaluation",
}
HEADINGS = ("source", "data and weights", "pretraining", "fine-tuning", "evaluation")
"""Above the columns."""
SCANS = "scans"
DRAWN = "random-"
MOST_ROWS = 12
"""With more results than this, the seeds of an arm are drawn as one."""
_WIDTH_IN, _ROW_IN = 7.4, 0.5
_BOX = 0.82
"""Width of a box; columns are 1.15 apart."""
_STEP = 1.15
_LETTERS = 17
"""So many letters fit into a box; longer labels are written smaller."""


@dataclass
class Node:
    """A box: one run, the runs of several seeds, or something from outside."""

    column: int
    title: str
    """What it is, in words."""
    label: str
    """What stands in the box, below the column's heading."""
    digests: list[str]
    arm: str | None = None
    row: float = 0.0

    @property
    def detail(self) -> str:
        """What stands below the title."""
        if len(self.digests) > 1:
            return f"{len(self.digests)} {'draws' if self.digests[0].startswith(DRAWN) else 'runs'}"
        digest = self.digests[0] if self.digests else ""
        return f"draw {digest.rpartition('-')[2]}" if digest.startswith(DRAWN) else digest[:10]


@dataclass(frozen=True)
class Graph:
    """Boxes by key, and which leads to which."""

    nodes: dict[str, Node]
    edges: list[tuple[str, str]]


def lineage_chart(stages: Sequence[Stage], colors: Mapping[str, str]) -> Chart | None:
    """The picture of a study's finished runs; `colors` by arm. None where nothing has finished."""
    graph = lineage_graph(stages)
    if not graph.nodes:
        return None
    _arrange(graph)
    rows = [node.row for node in graph.nodes.values()]
    low, high = min(rows), max(rows)

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("none")  # the axes fill it
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-0.02, max(node.column for node in graph.nodes.values()) * _STEP + _BOX + 0.02)
        axes.set_ylim(high + 0.5, low - 1.0)
        for column in sorted({node.column for node in graph.nodes.values()}):
            axes.text(column * _STEP + _BOX / 2, low - 0.7, HEADINGS[column], ha="center", va="center")
        for source, target in graph.edges:
            _draw_edge(axes, graph.nodes[source], graph.nodes[target], colors)
        for node in graph.nodes.values():
            _draw_node(axes, node, colors)

    return Chart(svg_uri(draw, _WIDTH_IN, _ROW_IN * (high - low + 1.5)), _in_words(graph))


def lineage_graph(stages: Sequence[Stage]) -> Graph:
    """The finished runs of a study and what they read, joined where digests are the same."""
    finished = [stage for stage in stages if stage.status == "finished" and stage.stage in COLUMNS]
    merged = sum(COLUMNS[stage.stage] == 4 for stage in finished) > MOST_ROWS
    nodes: dict[str, Node] = {}
    writers: dict[tuple[str, str], str] = {}
    for stage in finished:
        key = _key(stage, merged)
        node = nodes.setdefault(key, _node(stage, merged))
        node.digests.append(_main_digest(stage))
        writers |= {(role, digest): key for role, digest in stage.outputs.items()}
    edges: dict[tuple[str, str], None] = {}
    for stage in finished:
        target = _key(stage, merged)
        for role, digest in _read(stage):
            source = writers.get((role, digest)) or _from_outside(nodes, role, digest, merged)
            edges[source, target] = None
    return Graph(nodes, list(edges))


def _read(stage: Stage) -> Iterator[tuple[str, str]]:
    """What a run read, by role; `manifest_2` is a manifest too."""
    if stage.stage == "prepare":
        yield SCANS, stage.outputs.get("manifest", "")
    for role, digest in stage.inputs.items():
        yield role.rstrip("_0123456789"), digest


def _from_outside(nodes: dict[str, Node], role: str, digest: str, merged: bool) -> str:
    """The key of the box for what no run of the study wrote."""
    if role == SCANS:
        title = "scans"
    elif digest.startswith(DRAWN):
        title = "random weights" if merged else f"random weights {digest.rpartition('-')[2]}"
    else:
        title = {"encoder": "initial weights", "manifest": "slice store"}.get(role, role)
    key = title if digest.startswith(DRAWN) else f"{role} {digest}"
    label = title.rstrip("0123456789 ")
    node = nodes.setdefault(key, Node(0 if role == SCANS else 1, title, label, []))
    if role != SCANS and digest not in node.digests:
        node.digests.append(digest)
    return key


def _key(stage: Stage, merged: bool) -> str:
    return f"{stage.stage} {stage.arm}" if merged and stage.stage != "prepare" else stage.folder


def _node(stage: Stage, merged: bool) -> Node:
    verb = VERBS.get(stage.stage, stage.stage)
    parts = [arm_name(stage.arm)] if stage.arm is not None else []
    if stage.seed is not None and not merged:
        parts.append(f"seed {stage.seed}")
    label = ", ".join(parts) or ("all seeds" if merged and stage.stage == "pretrain" else verb)
    return Node(COLUMNS[stage.stage], " ".join([verb, *parts]), label, [], stage.arm)


def _main_digest(stage: Stage) -> str:
    """Of what the run is about: the first of what it may have written."""
    for role in ("bundle", "encoder", "manifest", "cases"):
        if role in stage.outputs:
            return stage.outputs[role]
    return ""


def _arrange(graph: Graph) -> None:
    """Results one below the other by arm and seed; everything else at the middle of what it leads to."""
    readers: dict[str, list[str]] = {key: [] for key in graph.nodes}
    for source, target in graph.edges:
        readers[source].append(target)
    for column in sorted({node.column for node in graph.nodes.values()}, reverse=True):
        keys = [key for key, node in graph.nodes.items() if node.column == column]
        for place, key in enumerate(keys):
            rows = [graph.nodes[reader].row for reader in readers[key]]
            graph.nodes[key].row = sum(rows) / len(rows) if rows else float(place)
        _push_apart([graph.nodes[key] for key in keys])


def _push_apart(nodes: Iterable[Node]) -> None:
    """Move boxes of one column until none covers another, about their middle."""
    ordered = sorted(nodes, key=lambda node: node.row)
    middle = sum(node.row for node in ordered) / len(ordered)
    for above, below in pairwise(ordered):
        below.row = max(below.row, above.row + 1)
    shift = middle - sum(node.row for node in ordered) / len(ordered)
    for node in ordered:
        node.row += shift


def _color(node: Node, colors: Mapping[str, str]) -> str:
    if node.arm is not None:
        return colors.get(node.arm, INK)
    return GREEN if node.column == COLUMNS["pretrain"] else INK


def _draw_node(axes: Axes, node: Node, colors: Mapping[str, str]) -> None:
    left, color = node.column * _STEP, _color(node, colors)
    box = FancyBboxPatch(
        (left + 0.02, node.row - 0.36), _BOX - 0.04, 0.72, boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=to_rgba(color, 0.1), edgecolor=color, lw=1.0, mutation_aspect=4,
    )  # fmt: skip
    axes.add_patch(box)
    middle = left + _BOX / 2
    raised = node.row - 0.13 if node.detail else node.row
    size = min(7.5, 7.5 * _LETTERS / len(node.label))
    axes.text(middle, raised, node.label, ha="center", va="center", fontsize=size, fontweight="bold")
    axes.text(
        middle, node.row + 0.17, node.detail, ha="center", va="center", fontsize=6.5, family="monospace"
    )


def _draw_edge(axes: Axes, source: Node, target: Node, colors: Mapping[str, str]) -> None:
    start, end = source.column * _STEP + _BOX - 0.02, target.column * _STEP + 0.02
    bend = (start + end) / 2
    points = [(start, source.row), (bend, source.row), (bend, target.row), (end, target.row)]
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
    from_data = source.column == COLUMNS["prepare"] and source.label == VERBS["prepare"]
    color = INK if from_data else _color(target if target.arm else source, colors)
    axes.add_patch(
        PathPatch(curve, fill=False, edgecolor=color, lw=1.0, alpha=0.2 if from_data else 0.8, zorder=0)
    )


def _in_words(graph: Graph) -> str:
    """For readers who do not see the picture: each run and what it was made from."""
    sentences = []
    for key, node in graph.nodes.items():
        sources = [graph.nodes[source].title for source, target in graph.edges if target == key]
        if sources:
            sentences.append(f"{node.title} from {', '.join(sources)}")
    return f"What every result was made from: {'; '.join(sentences)}."
