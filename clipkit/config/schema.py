"""What a setting is, and parse(): values from YAML and the command line into frozen dataclasses, checked."""

import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, TypeGuard, TypeVar, Union, get_args, get_origin

Check = Callable[[Any], bool]
Schema = TypeVar("Schema")
NUMBER = (int, float)


class SettingsError(ValueError):
    """A setting that the user has to change; its text is one line."""


def setting(meaning: str, check: tuple[str, Check] | None = None, *, choices: Sequence[Any] = (),
            runtime: bool = False) -> Any:
    """Declare one setting of a settings dataclass. The value itself stands in conf/.

    Args:
      meaning: What the value does, with its unit.
      check: What is allowed in words, and the test for it; see `positive` and its neighbours.
      choices: The allowed values, where they are few.
      runtime: True if a run may be resumed with another value. The default, False, makes the setting a part of the
        run's identity.
    """
    return field(metadata={"meaning": meaning, "check": check, "choices": tuple(choices), "runtime": runtime})


def at_least(low: float) -> tuple[str, Check]:
    return f"at least {low}", lambda value: value >= low


def within(low: float, high: float) -> tuple[str, Check]:
    return f"from {low} to {high}", lambda value: low <= value <= high


positive: tuple[str, Check] = ("above 0", lambda value: value > 0)
fraction = within(0, 1)


def parse(schema: type[Schema], values: Mapping[str, Any], path: str = "") -> Schema:
    """Build `schema` from plain values.

    Args:
      schema: A settings dataclass; its fields are settings or further settings dataclasses.
      values: Nested mapping of plain values, as Hydra composes it.
      path: Where `values` stands in the whole, for the messages ("optim").

    Raises:
      SettingsError: a key is unknown or has no value, a value has the wrong type or is not allowed.
    """
    known = {item.name: item for item in fields(schema)}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(schema)
    for key in values:
        if key not in known:
            raise unknown_setting(_join(path, str(key)), [_join(path, name) for name in known])
    parsed = {}
    for name, item in known.items():
        key = _join(path, name)
        if name in values:
            parsed[name] = _checked(item, _convert(hints[name], values[name], key), key)
        elif item.default is MISSING:
            raise SettingsError(f"{key} has no value; give {key}=... ({item.metadata.get('meaning', 'settings group')})")
    try:
        return schema(**parsed)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"{path + ': ' if path else ''}{error}") from error


def unknown_setting(key: str, known: Sequence[str]) -> SettingsError:
    """The error for a key that is no setting: what was meant, or what there is."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(sorted(known))}"
    return SettingsError(f"{key} is not a setting; {hint}")


def identity(config: Any, path: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of the settings that make the run what it is (all but the runtime ones)."""
    found: dict[str, Any] = {}
    for item in fields(config):
        value, key = getattr(config, item.name), _join(path, item.name)
        if is_dataclass(value):
            found |= identity(value, key)
        elif not item.metadata["runtime"]:
            found[key] = value
    return found


def leaves(schema: Any, path: str = "") -> dict[str, tuple[Any, Field[Any]]]:
    """Return {dotted key: (type, field)} of every setting below a settings dataclass."""
    found: dict[str, tuple[Any, Field[Any]]] = {}
    hints = typing.get_type_hints(schema)
    for item in fields(schema):
        key = _join(path, item.name)
        if is_dataclass(hints[item.name]):
            found |= leaves(hints[item.name], key)
        else:
            found[key] = (hints[item.name], item)
    return found


def allows_none(hint: Any) -> bool:
    return type(None) in get_args(hint)


def without_none(hint: Any) -> Any:
    """`X | None` -> `X`."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(option for option in get_args(hint) if option is not type(None))
    return hint


def _convert(hint: Any, value: Any, key: str) -> Any:
    if value is None and allows_none(hint):
        return None
    optional = " or null" if allows_none(hint) else ""
    hint = without_none(hint)
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise SettingsError(f"{key} is {value!r}; it is a group of settings: give {key}.<setting>=...")
        return parse(hint, value, key)  # pyright: ignore[reportArgumentType]
    if get_origin(hint) is tuple:
        return _convert_tuple(hint, value, key)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and is_number(value) and int(value) == value:
        return int(value)
    if hint is float and is_number(value):
        return float(value)
    if hint is str and isinstance(value, (str, *NUMBER)) and not isinstance(value, bool):
        return str(value)
    if get_origin(hint) is dict and isinstance(value, Mapping):
        return dict(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    raise SettingsError(f"{key} is {value!r}; it must be {names.get(hint, 'a mapping')}{optional}")


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, NUMBER) and not isinstance(value, bool) and math.isfinite(value)


def _convert_tuple(hint: Any, value: Any, key: str) -> tuple[Any, ...]:
    types_inside = get_args(hint)
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if types_inside[-1] is Ellipsis:
        return tuple(_convert(types_inside[0], item, key) for item in items)
    if len(items) != len(types_inside):
        raise SettingsError(f"{key} is {items}; it must have {len(types_inside)} values, as in {key}=[a,b]")
    return tuple(_convert(kind, item, key) for kind, item in zip(types_inside, items, strict=True))


def _checked(item: Field[Any], value: Any, key: str) -> Any:
    choices, check = item.metadata.get("choices", ()), item.metadata.get("check")
    for one in value if isinstance(value, tuple) else (value,):
        if one is not None and choices and one not in choices:
            raise SettingsError(f"{key} is {one!r}; choose one of {', '.join(map(str, choices))}")
        if one is not None and check and not check[1](one):
            raise SettingsError(f"{key} is {one!r}; it must be {check[0]}")
    return value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
