"""From a person's command line to Hydra's: text settings stand as they were typed, wrong keys are answered here."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from clipkit.config.schema import SettingsError, allows_none, leaves, unknown_setting, without_none

FLAGS_WITH_VALUE = {"--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg",
                    "-c", "--info", "-i", "--experimental-rerun"}
HYDRAS_OPEN = ("hydra/launcher", "hydra/sweeper", "hydra.launcher.", "hydra.sweeper.", "hydra.sweep.", "hydra.verbose")
SWEEP = re.compile(r"(choice|range|interval|glob)\(.*\)$")  # Hydra's words for several values under -m


def conf_dir() -> Path:
    """The folder of YAML settings: inside an installed wheel, else beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def hydra_arguments(arguments: Iterable[str], schema: type, groups: Mapping[str, Iterable[str]],
                    implied: Mapping[str, Mapping[str, str]] | None = None) -> list[str]:
    """Translate `key=value` arguments into overrides that Hydra reads as they were meant.

    Args:
      arguments: What stands after `clipkit <command>`.
      schema: The command's settings dataclass.
      groups: Settings groups with their choices, {"model": ["emoji", "tiny"]}.
      implied: {setting: {group: choice}}: groups that follow from a setting, unless they are given too.

    Returns:
      Arguments for Hydra: text quoted, repeated list settings collected.

    Raises:
      SettingsError: an argument is not key=value, its key is unknown, a choice does not exist, or a key is repeated.
    """
    known = leaves(schema)
    passed, given = _split(arguments)
    sweep = "-m" in passed or "--multirun" in passed
    collected: dict[str, list[str]] = {}
    for key, value in given:
        collected.setdefault(key.lstrip("+"), []).append(value)
    for key, choices in (implied or {}).items():
        items = [item for value in collected.get(key, ()) for item in _items(value)]
        if items and (key, items) != ("data.train", ["emoji"]):  # the embedded data are the default
            for group, choice in choices.items():
                collected.setdefault(group, [choice])
    overrides = []
    for name, values in collected.items():
        if name in groups:
            nullable = not any(other.startswith(f"{name}.") for other in known)  # experiment: has no settings of its own
            overrides.append(_group_override(name, values, [*groups[name], *(["null"] if nullable else [])], sweep))
        elif name in known:
            value = _quoted(known[name][0], values, name, sweep)
            # Hydra would merge a mapping into the one that is there; null first makes it take its place.
            overrides += [f"{name}=null", f"++{name}={value}"] if value.startswith("{") else [f"{name}={value}"]
        elif name.startswith(("hydra.", "hydra/")) and (not name.startswith(HYDRAS_OPEN) or "_target_" in f"{name}{values}"):
            raise SettingsError(f"{name}={values[-1]}: this part of Hydra makes folders or runs code by itself; a run's folder "
                                f"is set by name=...; of Hydra's own settings these are open: {', '.join(HYDRAS_OPEN)}")
        elif name.startswith(HYDRAS_OPEN) or _inside_mapping(name, known):
            overrides.append(f"{'++' if _inside_mapping(name, known) else ''}{name}={values[-1]}")
        elif any(other.startswith(f"{name}.") for other in known):
            raise SettingsError(f"{name}={values[-1]}: {name} is a group of settings; give {name}.<setting>=..., one of "
                                f"{', '.join(sorted(k for k in known if k.startswith(f'{name}.')))}")
        else:
            raise unknown_setting(name, [*known, *groups])
    return [*passed, *overrides]


def groups_of(folders: Iterable[Path]) -> dict[str, list[str]]:
    """List the settings groups below some folders, with the choices that their YAML files give."""
    groups: dict[str, list[str]] = {}
    for folder in folders:
        for file in sorted(folder.glob("*/**/*.yaml")):
            choices = groups.setdefault(str(file.parent.relative_to(folder)), [])
            if file.stem not in choices:  # a command's own file stands before a shared one of its name
                choices.append(file.stem)
    return groups


def _split(arguments: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    passed, given = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if argument.startswith("-"):
            passed.append(argument)
            if argument in FLAGS_WITH_VALUE:
                passed += [value for value in [next(waiting, None)] if value is not None]
            continue
        key, equals, value = argument.partition("=")
        if key.startswith("~"):
            raise SettingsError(f"{argument!r} would remove a setting, and each has to have a value; give "
                                f"{key.lstrip('~')}=... (null where it may have none)")
        if not equals:
            raise SettingsError(f"{argument!r} is not a setting; settings are given as key=value, as in optim.lr=1e-3")
        given.append((key, value))
    return passed, given


def _group_override(name: str, values: list[str], choices: Sequence[str], sweep: bool) -> str:
    if len(values) > 1:
        raise SettingsError(f"{name} is given {len(values)} times ({', '.join(values)}); give it once")
    names = values[0].split(",") if sweep else values
    for choice in names:
        if choice not in choices:
            raise SettingsError(f"{name}={choice}: no such choice; choose one of {', '.join(sorted(choices))}")
    return f"{name}={values[0]}"


def _inside_mapping(name: str, known: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{key}.") and get_origin(without_none(hint)) is dict for key, (hint, _) in known.items())


def _quoted(hint: Any, values: list[str], name: str, sweep: bool) -> str:
    plain = without_none(hint)
    if get_origin(plain) is tuple:
        items = [item for value in values for item in _items(value)]
        if items == ["null"] and allows_none(hint):
            return "null"
        return f"[{','.join(quote(item) if get_args(plain)[0] is str else item for item in items)}]"
    if len(values) > 1:
        raise SettingsError(f"{name} is given {len(values)} times ({', '.join(values)}); it takes one value")
    value = values[0]
    if plain is not str or (value == "null" and allows_none(hint)) or (sweep and SWEEP.match(value)):
        return value
    return quote(value)


def quote(text: str) -> str:
    r"""Quote a text for Hydra's grammar. Only backslashes before ${, before a quote and at the end are escapes."""
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    text = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    text = re.sub(r"(\\+)$", lambda match: match[1] * 2, text)
    return f"'{text}'"


def _items(value: str) -> list[str]:
    """The items of `[a,b]`, split at commas outside quotes and brackets; any other value is one item."""
    if not (value.startswith("[") and value.endswith("]")):
        return [value]
    items, depth, mark, start, inner = [], 0, "", 0, value[1:-1]
    for index, letter in enumerate(inner):
        if mark:
            mark = "" if letter == mark else mark
        elif letter in "'\"" and not inner[start:index].strip():
            mark = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth == 0:
            items.append(inner[start:index])
            start = index + 1
    items.append(inner[start:])
    return [_unquoted(item.strip()) for item in items if item.strip()]


def _unquoted(item: str) -> str:
    return item[1:-1] if len(item) > 1 and item[0] == item[-1] and item[0] in "'\"" else item
