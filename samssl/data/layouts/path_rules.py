r"""Which files of a folder are images, which masks belong to them, and whose they are: patterns of paths.

A pattern is a path below the data set's folder, with `/` between its parts:

    {name}          some characters of one part, kept under this name; the same name again must match the same
    {name:regex}    as many as the regular expression takes, as in `{frame:\d+}`
    *               any characters of one part
    at the end /    the path is a folder, as of a DICOM series
    **/ at the start of a mask: a file of this name anywhere

Patterns may begin at any depth, so it does not matter whether the archive's own top folder is named.
Masks are patterns too, in which `{name}` stands for what the image's pattern kept.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from samssl.config import config

_PLACE = re.compile(r"\{(\w+)(?::((?:[^{}]|\{\d*,?\d*\})+))?\}|(\*)")


@config
class PathRule:
    """Images of one kind, and where their masks lie."""

    image: str
    """Pattern of the images' paths."""
    mask: str | None = None
    """Pattern of the mask of label ids, or with `{label}` of a file for each label, named as the label is;
    null: these images have no mask, or `masks`."""
    masks: dict[int, str] | None = None
    """Label id to the pattern of files that are not 0 where the label is; painted in this order."""
    patient: str = "{patient}"
    """The patient, in names that the image's pattern keeps, as in `{site}-{number}`."""
    case: str = ""
    """Likewise the case, where file names alone would not tell cases apart; else the file's name."""
    row: str = ""
    """Likewise, what names the image in the recipe's table."""
    split: Literal["", "val", "test"] = ""
    """The split that the data set itself puts these images into; empty: any."""
    variant: str = ""
    """Kind of image, where each patient has several of which one is chosen, as t1 or flair."""

    def __post_init__(self) -> None:
        """Check the patterns against each other."""
        if self.mask and self.masks:
            raise ValueError("give mask or masks, not both")
        known = {"label"} | set(re.compile(as_regex(self.image)).groupindex)
        patterns = [self.mask or "", *(self.masks or {}).values(), self.patient, self.case, self.row]
        used = {name for pattern in patterns for name, _, _ in _PLACE.findall(pattern) if name}
        if used - known:
            raise ValueError(f"'{self.image}' keeps no {', '.join(sorted(used - known))}")


@dataclass(frozen=True)
class Matched:
    """One image that a rule found; paths are relative, with `/` between their parts."""

    image: str
    mask: str | None
    parts: tuple[tuple[int, str], ...]
    """(label id, path) of masks that are one file for each label, in the order in which they are painted."""
    patient: str
    case: str
    """Empty: the image's own name tells it."""
    row: str
    split: str


def match_rules(rules: Sequence[PathRule], paths: Sequence[str]) -> Iterator[Matched]:
    """Every image among `paths`, once: the first rule that fits it counts. Folders end in `/`."""
    found: set[str] = set()
    listing = _Listing(paths)
    for rule in rules:
        regex = re.compile(as_regex(rule.image))
        for path in paths:
            kept = regex.fullmatch(path)
            if kept and path not in found:
                found.add(path)
                yield _matched(rule, path, kept.groupdict(), listing)


@cache
def as_regex(pattern: str) -> str:
    """The regular expression of a pattern, with the folders above it as the group `_above`."""
    text, end, seen = "(?P<_above>(?:[^/]+/)*)", 0, set()
    for place in _PLACE.finditer(pattern):
        name, regex, star = place.groups()
        text += re.escape(pattern[end : place.start()])
        if star:
            text += "[^/]*"
        elif name in seen:
            text += f"(?P={name})"
        else:
            text += f"(?P<{name}>{regex or '[^/]+'})"
            seen.add(name)
        end = place.end()
    return text + re.escape(pattern[end:])


def _filled(pattern: str, kept: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda place: kept[place[1]] if place[1] else "*", pattern)


class _Listing:
    """Paths by their folder, to look up a mask without reading through all of them."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = set(paths)
        self.by_folder: dict[str, list[str]] = {}
        self.by_name: dict[str, list[str]] = {}
        for path in sorted(paths):
            folder, _, name = path.rstrip("/").rpartition("/")
            self.by_folder.setdefault(folder, []).append(path)
            self.by_name.setdefault(name, []).append(path)

    def matching(self, path: str) -> list[str]:
        """The path itself, or with `*` in its last part all that fit it, if they are there."""
        if "**/" in path:
            return self.by_name.get(path.rpartition("**/")[2], [])[:1]
        if "*" not in path:
            return [path] if path in self.paths else []
        folder, _, name = path.rpartition("/")
        regex = re.compile("[^/]*".join(map(re.escape, name.split("*"))))
        return [
            other for other in self.by_folder.get(folder, []) if regex.fullmatch(other.rpartition("/")[2])
        ]


def _matched(rule: PathRule, path: str, kept: Mapping[str, str], listing: _Listing) -> Matched:
    above = kept["_above"]
    masks = listing.matching(above + _filled(rule.mask, kept)) if rule.mask else []
    parts = [
        (label, mask)
        for label, pattern in (rule.masks or {}).items()
        for mask in listing.matching(above + _filled(pattern, kept))
    ]
    if len(masks) > 1:  # several files that show the one label, as a second lesion in an image of its own
        masks, parts = [], [(1, mask) for mask in masks]
    return Matched(
        image=path,
        mask=masks[0] if masks else None,
        parts=tuple(parts),
        patient=_filled(rule.patient, kept),
        case=_filled(rule.case, kept),
        row=_filled(rule.row, kept),
        split=rule.split,
    )
