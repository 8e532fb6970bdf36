"""Settings files of unknown origin (--config-dir): refused before Hydra reads them where they would do more than set values."""

import re
from collections.abc import Iterable
from pathlib import Path

from clipkit.config.schema import SettingsError

MAX_FILE_BYTES = 2**20
MAX_VALUES = 100_000  # with aliases written out; a file of our own has about 50
HYDRAS_OWN = re.compile(r"^hydra\s*:|@.*\bhydra\b", re.MULTILINE)  # a package or a key that would set Hydra itself


def check_settings_files(folders: Iterable[Path]) -> None:
    """Check every YAML file of some folders.

    Raises:
      SettingsError: as `check_settings_file`.
    """
    for folder in folders:
        for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
            check_settings_file(path)


def check_settings_file(path: Path) -> None:
    """Check that a YAML file only sets values.

    Hydra imports and calls what a `_target_` names, in its own settings too (launchers, callbacks), and aliases of aliases
    grow without bound where it writes them out.

    Args:
      path: of the file.

    Raises:
      SettingsError: it names code, sets Hydra itself, is too large, or is no YAML.
    """
    import yaml

    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SettingsError(f"{path} has more than {MAX_FILE_BYTES} bytes, which is no file of settings; take it away")
        text = path.read_text(encoding="utf-8")
        num_values = _num_values(yaml.compose(text, yaml.SafeLoader), {})
        foreign = [token.value for token in yaml.scan(text, yaml.SafeLoader) if isinstance(token, yaml.TagToken)]
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} is not readable as YAML ({' '.join(str(error).split())}); put it right") from error
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror}); put it right, or take it away") from error
    if num_values > MAX_VALUES:
        raise SettingsError(f"{path} holds {num_values:,} values with its aliases written out, allowed are {MAX_VALUES:,}; "
                            "take the aliases away")
    if "_target_" in text or foreign:
        what = "names code to run (_target_)" if "_target_" in text else f"has the YAML tag {''.join(map(str, foreign[0]))}"
        raise SettingsError(f"{path} {what}; settings are plain values: take that line away")
    if HYDRAS_OWN.search(text):
        raise SettingsError(f"{path} sets Hydra itself; give launcher and sweep on the command line (hydra.launcher...=...)")


def _num_values(node: object, known: dict[int, int]) -> int:
    """How many values a YAML node stands for; each node is looked at once."""
    if id(node) not in known:
        known[id(node)] = MAX_VALUES  # while it is counted: an alias inside its own anchor never ends
        parts = getattr(node, "value", None)
        parts = parts if isinstance(parts, list) else []
        inner = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_num_values(one, known) for one in inner)
    return known[id(node)]
