"""Recipes: what is to be known of a public data set, as data; a YAML file each in recipes/public.

A recipe fills in settings of `data` and `split` that the user has not given.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from samssl.config import UserError, build_config, config, to_tree
from samssl.data.layouts.path_rules import PathRule
from samssl.data.scans import Axis, Modality

_FOLDER = "recipes/public"
_DEFAULTS = ("labels", "mask_values", "window_hu", "axis", "cases_per_patient", "volume", "mask_threshold")
"""Fields of a recipe that are fields of `data` under the same name."""


@config
class Archive:
    """One file to download and unpack."""

    url: str
    """Where it lies, by HTTPS."""
    checksum: str
    """`md5:...` or `sha256:...`."""
    folder: str = ""
    """Folder, below the chosen one, that it is unpacked into; empty: the chosen one."""

    def __post_init__(self) -> None:
        """Nothing is downloaded that cannot be checked."""
        if not self.url.startswith("https://"):
            raise ValueError(f"'{self.url}' is not an HTTPS address")
        if not re.fullmatch("md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", self.checksum):
            raise ValueError(f"'{self.checksum}' is no checksum; write md5: or sha256: and its digits")
        if self.folder.startswith("/") or ".." in self.folder.split("/"):
            raise ValueError(f"'{self.folder}' is not below the chosen folder")


@config
class Table:
    """A CSV file of the data set, with a row for each image."""

    file: str
    """Its name, in the folder of the data set or below."""
    key: str
    """Column that names the image, as `row` of the layout's rules does."""
    separator: str = ","
    patient: str = ""
    """Column of the patient; empty: the rules say it."""
    split: str = ""
    """Column with train, val or test; empty: the rules say it."""


@config
class Recipe:
    """One public data set."""

    title: str
    """What its authors call it."""
    modality: Modality
    body_part: str
    """What is seen."""
    cases: int | None = None
    """Labelled scans, where they are known to be as many."""
    layout: Literal["msd"] | list[PathRule]
    """Name of a layout that `prepare` knows, or rules for the paths."""
    table: Table | None = None
    """Where patients or splits stand, if paths do not tell them."""
    variants: dict[str, Modality] | None = None
    """Kinds of image of which `data.variant` chooses one, with their modality; the first is the default."""
    labels: dict[int, str]
    """Names of the label ids."""
    labels_from: str
    """Where the label map was read."""
    mask_values: dict[int, int] | None = None
    """Values in the mask files to label ids, where they differ."""
    window_hu: tuple[float, float] | None = None
    """Window of CT, in HU."""
    axis: Axis | None = None
    """Axis across which volumes are cut, where it is not to be guessed."""
    cases_per_patient: int | None = None
    """2: images numbered 2k-1 and 2k are one person."""
    volume: int | None = None
    """Which volume of a 4D file is taken."""
    mask_threshold: float | None = None
    """From which value on masks of one label are the label, where they are soft or JPEG."""
    split: dict[str, float] | None = None
    """Shares or numbers of patients for pool, train, val and test, if not the defaults of `split`."""
    licence: str
    """What its authors allow."""
    doi: list[str]
    """To cite."""
    homepage: str
    """Where it is described."""
    download: list[Archive] | None = None
    """Files to download, where the licence allows it and URL and checksum are known."""
    how_to_get: str
    """What a person does to get it, and which folder is `data.root`."""
    verified: Literal["sample", "official page", "repository"]
    """What layout and labels were checked against: files of the set itself, its authors' page or code, or
    code of others that reads it."""
    verified_with: str
    """Which page, repository or file that was."""
    notes: str = ""
    """What surprises."""

    def __post_init__(self) -> None:
        """Check the variants against the rules."""
        rules = self.layout if isinstance(self.layout, list) else []
        if {rule.variant for rule in rules} - {""} != set(self.variants or {}):
            raise ValueError("variants: the rules of the layout name other ones")

    @property
    def has_official_test(self) -> bool:
        """Whether the data set itself says which labelled images are tested on."""
        rules = self.layout if isinstance(self.layout, list) else []
        return any(rule.split == "test" for rule in rules) or bool(self.table and self.table.split)

    def rules(self, variant: str) -> list[PathRule]:
        """The rules for one variant; empty: the first."""
        assert not isinstance(self.layout, str), "only recipes with rules of their own are asked for them"
        chosen = variant or next(iter(self.variants or {}), "")
        return [self._spelt_out(rule) for rule in self.layout if rule.variant in ("", chosen)]

    def _spelt_out(self, rule: PathRule) -> PathRule:
        """A rule with `{label}` in its mask as one that names a file for each label."""
        pattern = rule.mask or ""
        if "{label}" not in pattern:
            return rule
        masks = {label: pattern.replace("{label}", name) for label, name in self.labels.items()}
        return replace(rule, mask=None, masks=masks)


@dataclass(frozen=True)
class Filled:
    """What a recipe put into settings, to be told."""

    recipe: str
    fields: dict[str, Any]


@cache
def recipe_names() -> tuple[str, ...]:
    """The names of all recipes, sorted."""
    folder = files("samssl.data").joinpath(_FOLDER)
    return tuple(
        sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    )


@cache
def read_recipe(name: str) -> Recipe:
    """The recipe of a data set.

    Raises:
        UserError: there is none of this name.
    """
    import difflib

    import yaml

    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=3, cutoff=0)
        raise UserError(
            f"There is no recipe '{name}'. Near it are {', '.join(near)}; `samssl datasets` lists all."
        )
    text = files("samssl.data").joinpath(_FOLDER, f"{name}.yaml").read_text(encoding="utf-8")
    return build_config(Recipe, yaml.safe_load(text), source=f"{_FOLDER}/{name}.yaml")


def fill_from_recipe(tree: dict[str, Any]) -> Filled | None:
    """Set in the settings `tree` of prepare what its recipe knows and nobody has given; None without one.

    Raises:
        UserError: there is no such recipe, or it has no such variant.
    """
    data = tree.get("data")
    name = data.get("recipe") if isinstance(data, dict) else None
    if not name:
        return None
    assert isinstance(data, dict)
    recipe = read_recipe(str(name))
    known = {
        "data": _data_of(recipe, str(data.get("variant") or "")),
        "split": _split_of(recipe, tree.get("split")),
    }
    if data.get("csv") or str(data.get("root", "")).endswith(".csv"):
        del known["data"]["layout"]  # a CSV always overrides
    return Filled(str(name), _set_missing(tree, known))


def _data_of(recipe: Recipe, variant: str) -> dict[str, Any]:
    variants = recipe.variants or {}
    if variant and variant not in variants:
        choice = ", ".join(variants) or "none, as this data set has one kind of image"
        raise UserError(f"data.variant: '{variant}' is not among the variants of the recipe: {choice}.")
    chosen = variant or next(iter(variants), "")
    given = {name: getattr(recipe, name) for name in _DEFAULTS}
    layout = recipe.layout if isinstance(recipe.layout, str) else "recipe"
    known = {"layout": layout, "modality": variants.get(chosen, recipe.modality), "variant": chosen, **given}
    return {name: value for name, value in known.items() if value not in (None, "")}


def _split_of(recipe: Recipe, given: Any) -> dict[str, Any]:
    """The recipe's split; its shares are those of the patients beside the official test ones."""
    refused = isinstance(given, dict) and str(given.get("official", True)).lower() in ("false", "no", "0")
    official = {"official": True, "train": 0.8, "val": 0.2}
    return (official if recipe.has_official_test and not refused else {}) | (recipe.split or {})


def _set_missing(tree: dict[str, Any], known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Set the leaves of `known` that `tree` lacks; returns them under dotted names."""
    done: dict[str, Any] = {}
    for group, values in known.items():
        node = tree.setdefault(group, {})
        if node is None:
            node = tree[group] = {}
        if not isinstance(node, dict):
            continue  # validation will say that it is no group of fields
        for name, value in values.items():
            if node.get(name) is None:
                node[name] = value
                done[f"{group}.{name}"] = value
    return done


def recipe_tree(name: str) -> dict[str, Any]:
    """A recipe as plain data, without what it leaves open."""
    tree = to_tree(read_recipe(name))
    if isinstance(tree["layout"], list):
        tree["layout"] = [{key: value for key, value in rule.items() if value} for rule in tree["layout"]]
    return {key: value for key, value in tree.items() if value not in (None, "")}
