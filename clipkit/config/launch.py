"""Compose a command's settings with Hydra and call it; the user's errors become one line."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from clipkit.config.command_line import conf_dir, groups_of, hydra_arguments
from clipkit.config.schema import SettingsError, leaves, parse
from clipkit.config.settings_files import check_settings_files
from clipkit.config.visible import visible

Schema = TypeVar("Schema")
EXIT_BAD_INPUT = 2


def launch(command: str, schema: type[Schema], function: Callable[[Schema], int | None], arguments: Sequence[str],
           implied: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Run `function` with the settings that conf/<command>/ and `arguments` give, then exit with its code.

    Under `-m` (Hydra's multirun) it is called once for each combination.

    Args:
      command: Folder below conf/, "pretrain" or "shards/write".
      schema: The command's settings dataclass.
      function: Takes the parsed settings; returns an exit code or None.
      arguments: What stands on the command line after the command.
      implied: {setting: {group: choice}}: groups that follow from a setting, unless they are given too.
    """
    shared, own = conf_dir() / "shared", conf_dir() / command
    groups = groups_of([shared, own, *_config_dirs(arguments)])
    if "--help" in arguments or "-h" in arguments:
        print(usage(command, schema, groups))
        return
    with one_line_errors():
        check_settings_files(_config_dirs(arguments))
        overrides = hydra_arguments(arguments, schema, groups, implied)
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    @hydra.main(version_base="1.3", config_path=str(own), config_name="config")
    def task(values: Any) -> None:
        with one_line_errors():
            plain = OmegaConf.to_container(values, resolve=True, throw_on_missing=False)
            assert isinstance(plain, dict)
            code = function(parse(schema, {str(key): value for key, value in plain.items() if value != "???"}))
            if code:
                sys.exit(code)

    sys.argv = [f"clipkit {command.replace('/', ' ')}", *overrides, f"hydra.searchpath=[file://{shared}]"]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come as they are, in the place of Hydra's own report
    with one_line_errors():
        try:
            task()
        except (HydraException, OmegaConfBaseException) as error:
            raise SettingsError(str(error)) from error


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what the user has to change (ValueError, OSError) into one line and exit code 2, or the error's own `exit_code`.

    The environment variable CLIPKIT_TRACEBACK=1 shows where it came from.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("CLIPKIT_TRACEBACK"):
            raise
        print(f"clipkit: {visible(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        sys.exit(getattr(error, "exit_code", EXIT_BAD_INPUT))


def usage(command: str, schema: type, groups: Mapping[str, Sequence[str]]) -> str:
    """List a command's settings groups with their choices, and its settings with their meaning."""
    lines = [f"clipkit {command.replace('/', ' ')} [group=choice ...] [setting=value ...]"]
    names = {key.split(".")[0] for key in leaves(schema)}
    used = {name: choices for name, choices in sorted(groups.items()) if name == "experiment" or name in names}
    if used:
        lines += ["", "groups:", *(f"  {name:<12} {' | '.join(choices)}" for name, choices in used.items())]
    lines += ["", "settings:"]
    for key, (_, item) in leaves(schema).items():
        allowed = item.metadata["check"][0] if item.metadata["check"] else ""
        choices = " | ".join(map(str, item.metadata["choices"]))
        lines.append(f"  {key:<32} {item.metadata['meaning']}{f' ({choices or allowed})' if choices or allowed else ''}")
    lines += ["", "--cfg job prints the values, --config-dir <folder> adds settings of your own, -m runs combinations."]
    return "\n".join(lines)


def _config_dirs(arguments: Sequence[str]) -> list[Path]:
    flags = ("--config-dir", "-cd", "--config-path", "-cp")
    after = [Path(value) for flag, value in pairwise(arguments) if flag in flags]
    return after + [Path(flag.partition("=")[2]) for flag in arguments
                    if flag.startswith(("--config-dir=", "--config-path="))]
