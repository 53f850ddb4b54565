"""Which boxes a study's lineage has, and what joins them."""

import base64

from samssl.report.lineage import MOST_ROWS, lineage_chart, lineage_graph
from samssl.report.study import Stage

STORE = Stage("store", "prepare", None, None, "p", "finished", outputs={"manifest": "d" * 64})


def run(kind: str, seed: int, arm: str | None, reads: dict[str, str], writes: dict[str, str]) -> Stage:
    folder = f"{kind}/{arm}/seed{seed}"
    return Stage(folder, kind, arm, seed, folder, "finished", inputs=reads, outputs=writes)


def study(seeds: int) -> list[Stage]:
    """Pretraining from random weights, and two arms, over several seeds."""
    stages, data = [STORE], {"manifest": "d" * 64}
    for seed in range(seeds):
        base, ssl = f"random-micro-{seed}", f"{seed:02}" * 32
        stages.append(run("pretrain", seed, None, data | {"encoder": base}, {"encoder": ssl, "state": "s"}))
        for arm, start in (("ssl", ssl), ("no_ssl", base)):
            bundle = f"{arm}{seed}".ljust(64, "x")
            stages.append(run("finetune", seed, arm, data | {"encoder": start}, {"bundle": bundle}))
            stages.append(run("evaluate", seed, arm, data | {"bundle": bundle}, {"cases": f"c{arm}{seed}"}))
    return stages


def test_every_result_leads_back_to_the_scans() -> None:
    graph = lineage_graph(study(2))
    joined = {(graph.nodes[source].title, graph.nodes[target].title) for source, target in graph.edges}
    assert {
        ("scans", "slice store"),
        ("slice store", "pretraining seed 0"),
        ("random weights 0", "pretraining seed 0"),
        ("pretraining seed 0", "fine-tuning SSL seed 0"),
        ("random weights 1", "fine-tuning no SSL seed 1"),
        ("fine-tuning no SSL seed 1", "evaluation no SSL seed 1"),
        ("slice store", "evaluation SSL seed 1"),
    } <= joined
    assert ("random weights 0", "fine-tuning SSL seed 0") not in joined
    assert ("pretraining seed 0", "fine-tuning SSL seed 1") not in joined
    assert len(graph.nodes) == 2 + 2 * (1 + 1 + 2 + 2)  # scans, store; a seed: weights, pretraining, arms


def test_what_another_study_wrote_is_not_joined_with_this_one() -> None:
    stages = study(1)
    stages[-1] = run("evaluate", 0, "no_ssl", {"manifest": "d" * 64, "bundle": "e" * 64}, {"cases": "c"})
    graph = lineage_graph(stages)
    titles = {(graph.nodes[source].title, graph.nodes[target].title) for source, target in graph.edges}
    assert ("fine-tuning no SSL seed 0", "evaluation no SSL seed 0") not in titles
    assert ("bundle", "evaluation no SSL seed 0") in titles


def test_many_seeds_are_drawn_as_one() -> None:
    graph = lineage_graph(study(MOST_ROWS))
    titles = {node.title: node.detail for node in graph.nodes.values()}
    assert titles["evaluation SSL"] == titles["pretraining"] == f"{MOST_ROWS} runs"
    assert titles["random weights"] == f"{MOST_ROWS} draws"


def test_the_picture_says_in_words_what_it_shows() -> None:
    chart = lineage_chart(study(3), {"ssl": "#0072b2", "no_ssl": "#d55e00"})
    assert chart is not None
    svg = base64.b64decode(chart.source.partition(",")[2]).decode()
    assert "no SSL, seed 2" in svg
    assert "fine-tuning SSL seed 1 from slice store, pretraining seed 1" in chart.alt


def test_unfinished_runs_are_left_out() -> None:
    assert lineage_chart([Stage("store", "prepare", None, None, "p", "running")], {}) is None
