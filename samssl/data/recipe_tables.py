"""Recipes as tables for the terminal."""

from collections.abc import Mapping
from typing import Any

from samssl.data.recipe import Recipe, read_recipe, recipe_names, recipe_tree

_WIDTH = 118


def describe_recipes(name: str | None) -> str:
    """All recipes, a line each, or with `name` everything about one.

    Raises:
        UserError: there is no recipe of this name.
    """
    return _describe(name) if name else _list()


def _list() -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    widths = {"name": 19, "modality": 8, "shows": 19, "cases": 5, "labels": 19, "licence": 18, "got by": 9}
    for heading, width in widths.items():
        side = "right" if heading == "cases" else "left"
        table.add_column(heading, justify=side, width=width, no_wrap=True, overflow="ellipsis")
    for name in recipe_names():
        recipe = read_recipe(name)
        table.add_row(name, *_row(recipe))
    console = Console(width=_WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip() + "\n\n`samssl datasets NAME` says all about one."


def _row(recipe: Recipe) -> tuple[str, ...]:
    modalities = dict.fromkeys([recipe.modality, *(recipe.variants or {}).values()])
    names = list(recipe.labels.values())
    shown = ", ".join(names) if len(names) <= 3 else f"{names[0]}, ... ({len(names)})"
    return (
        ", ".join(modalities),
        recipe.body_part,
        "" if recipe.cases is None else str(recipe.cases or ""),
        shown or "none",
        recipe.licence,
        "download" if recipe.download else "by hand",
    )


def _describe(name: str) -> str:
    tree = recipe_tree(name)
    return "\n".join(_lines(name, tree))


def _lines(name: str, tree: Mapping[str, Any]) -> list[str]:
    import yaml

    heading = f"{name}: {tree['title']}"
    body = {key: value for key, value in tree.items() if key != "title"}
    text = yaml.safe_dump(body, sort_keys=False, width=_WIDTH, allow_unicode=True, default_flow_style=None)
    use = f"samssl prepare data.recipe={name} data.root=FOLDER name={name} out=runs/{name}/store"
    return [heading, "", text.rstrip(), "", use]
