"""Configuration: frozen dataclasses, one YAML file, and dotted `a.b=c` overrides.

The same dotted names are used in YAML, on the command line, in Ray Tune's search spaces and as
MLflow params. Importing this module loads neither yaml nor pydantic.
"""

import ast
import difflib
import functools
import hashlib
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Interval

T = TypeVar("T")

Count = Annotated[int, Ge(0)]
PositiveInt = Annotated[int, Gt(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
BelowOne = Annotated[float, Interval(ge=0, lt=1)]


class UserError(Exception):
    """Something the user can mend; its message says what is wrong and what to do."""


class ConfigError(UserError):
    """A configuration that cannot be used."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that rejects unknown keys when it is loaded."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # pyright: ignore[reportAttributeAccessIssue]
    return dataclass(frozen=True, kw_only=True)(cls)


def load_config(cls: type[T], path: Path | None, overrides: Mapping[str, Any]) -> T:
    """Read the YAML at `path`, set each dotted override in it, and validate the result as `cls`.

    Raises:
        ConfigError: naming the file and every field that is unknown, missing or out of range.
    """
    tree = read_yaml(path) if path else {}
    for name, value in overrides.items():
        _set_dotted(tree, name, value)
    return absolute_paths(build_config(cls, tree, source=str(path) if path else "the command line"))


def overridden(value: T, overrides: Mapping[str, Any], source: str) -> T:
    """`value` with each dotted override set in it, validated anew.

    Raises:
        ConfigError: naming `source` and every field that is unknown or out of range.
    """
    tree = to_tree(value)
    for name, item in overrides.items():
        _set_dotted(tree, name, item)
    return build_config(type(value), tree, source)


def absolute_paths(value: T) -> T:
    """`value` with every path in it made absolute: workers run in folders of their own."""
    if isinstance(value, Path):
        return value if is_url(value) else value.expanduser().absolute()
    if isinstance(value, tuple):
        return type(value)(map(absolute_paths, value))
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(
        value, **{field.name: absolute_paths(getattr(value, field.name)) for field in fields(value)}
    )


def as_url(place: str | Path) -> str:
    """A place as text. `Path` folds the slashes of a URL, as in s3:/bucket; they are put back.

    After file: there are three, as no host follows.
    """
    url = re.sub(r"^([a-z][a-z0-9+.\-]+):/+(?=[^/])", r"\1://", str(place))
    return url.replace("file://", "file:///", 1) if url.startswith("file://") else url


def is_url(place: str | Path) -> bool:
    """Whether a place lies behind a URL that fsspec opens."""
    return "://" in as_url(place)


def build_config(cls: type[T], tree: Mapping[str, Any], source: str) -> T:
    """Validate the plain `tree` as `cls`; `source` says in errors where the tree came from.

    A class may have a static method `fill(tree)` that derives fields from others beforehand.
    """
    from pydantic import TypeAdapter, ValidationError

    if hasattr(cls, "fill"):
        cls.fill(tree)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        lines = [_explain(cls, entry) for entry in error.errors()]
        raise ConfigError(f"The configuration from {source} cannot be used:\n" + "\n".join(lines)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file at `path`; an empty file is an empty mapping."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(
            f"There is no configuration file {path}. Check the path after --config: it is relative to this "
            "folder, or begins with ray_configs/ for one that comes with samssl."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a YAML file: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of field: value, not a {type(tree).__name__}.")
    return tree


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["optim.lr=3e-4", "seeds=[0, 1]"]` -> `{"optim.lr": "3e-4", "seeds": [0, 1]}`.

    Numbers stay strings until they are validated, so that `3e-4` becomes a float and a field that
    holds text may hold `007`.
    """
    import yaml

    overrides: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or not name or name.startswith("-"):
            raise ConfigError(
                f"'{argument}' is not an override. Write it as field.name=value, as in optim.lr=3e-4."
            )
        structured = text.startswith(("[", "{")) or text in ("null", "~", "")
        try:
            overrides[name] = yaml.safe_load(text) if structured else text
        except yaml.YAMLError:
            raise ConfigError(f"The value of '{argument}' is not a valid YAML list or mapping.") from None
    return overrides


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A config (or nested mapping) as `{dotted name: value}`; lists stay values."""
    tree: Mapping[str, Any] = value if isinstance(value, Mapping) else asdict(value)
    flat: dict[str, Any] = {}
    for name, item in tree.items():
        if isinstance(item, Mapping) and item:
            flat |= flatten(item, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = item
    return flat


def to_tree(value: Any) -> dict[str, Any]:
    """`value` as plain dicts, lists, numbers and text that YAML and JSON hold."""
    return json.loads(json.dumps(asdict(value), default=str))


def dump_yaml(value: Any) -> str:
    """The resolved config as YAML, fields in the order in which the class declares them."""
    import yaml

    return yaml.safe_dump(to_tree(value), sort_keys=False)


def config_digest(value: Any, ignore: Sequence[str] = ()) -> str:
    """SHA-256 over the dotted fields of a config, without those named in `ignore`."""
    flat = {name: item for name, item in flatten(value).items() if name not in ignore}
    return hashlib.sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Field:
    """One leaf of a config class, as `--help` lists it."""

    name: str
    type: str
    default: str
    help: str


def describe(cls: type, prefix: str = "") -> Iterator[Field]:
    """Every leaf field of `cls` with its dotted name, type, default and the docstring below it."""
    hints = get_type_hints(cls, include_extras=True)
    docs = _field_docs(cls)
    for field in fields(cls):
        hint = hints[field.name]
        group = next(
            (part for part in (hint, *get_args(hint)) if isinstance(part, type) and is_dataclass(part)), None
        )
        if group is not None:
            one_of_many = "NAME." if get_origin(hint) is dict else ""
            yield from describe(group, f"{prefix}{field.name}.{one_of_many}")  # pyright: ignore[reportArgumentType]
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        text = "required" if default is MISSING else _as_yaml(default)
        yield Field(f"{prefix}{field.name}", _type_name(hint), text, docs.get(field.name, ""))


def _type_name(hint: Any) -> str:
    """A type in the words of YAML: alternatives, lists and mappings as they are written there."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _type_name(parts[0]) + "".join(f" {_bound_name(bound)}" for bound in parts[1:])
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, parts))
    if origin in (tuple, list):
        names = [_type_name(part) for part in parts if part is not Ellipsis]
        return f"[{', '.join(names)}{', ...' if Ellipsis in parts or origin is list else ''}]"
    if origin is dict:
        return f"{{{': '.join(map(_type_name, parts))}}}"
    if hint is NoneType:
        return "null"
    return getattr(hint, "__name__", str(hint))


def _as_yaml(default: Any) -> str:
    return default if isinstance(default, str) else json.dumps(default, default=str)


def _bound_name(bound: Any) -> str:
    limits = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    given = [(symbol, getattr(bound, name, None)) for name, symbol in limits.items()]
    return " and ".join(f"{symbol} {limit}" for symbol, limit in given if limit is not None)


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """The docstring that follows each field in the source of `cls` or of what it refines."""
    docs = {
        name: doc
        for base in reversed(cls.__mro__[1:])
        if is_dataclass(base)
        for name, doc in _field_docs(base).items()
    }
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def derive(tree: dict[str, Any], name: str, value: Any) -> bool:
    """Set the dotted field `name` of `tree`; whether that replaced another value that was given."""
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            return False  # validation will say that it is no group of fields
    given = node.get(leaf, value)
    node[leaf] = value
    return given != value


def _set_dotted(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"'{name}' cannot be set: '{parent}' holds a value, not a group of fields.")
        node = child
    node[leaf] = value


def _explain(cls: type, entry: Any) -> str:
    """One pydantic error as a sentence that names the dotted field and what to do."""
    name = ".".join(str(part) for part in entry["loc"])
    kind = entry["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [field.name for field in describe(cls)]
        groups = {known_name.rsplit(".", 1)[0] for known_name in known if "." in known_name}
        near = difflib.get_close_matches(name, [*known, *sorted(groups)], n=1, cutoff=0)
        return (
            f"  {name}: there is no such field; the nearest is '{near[0]}'."
            if near
            else f"  {name}: unknown."
        )
    if kind in ("missing", "missing_argument"):
        return f"  {name}: is required; set it in the YAML or as {name}=VALUE."
    if kind == "value_error":
        return f"  {name or 'configuration'}: {entry['ctx']['error']}"
    return f"  {name}: {entry['msg'][0].lower()}{entry['msg'][1:]} (got {entry['input']!r})."
