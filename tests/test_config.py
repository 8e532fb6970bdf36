"""clipkit.config.schema: what a setting may be, every message about one that may not, and the mirror rule with conf/."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipkit.config.command_line import conf_dir
from clipkit.config.pretrain import PretrainConfig
from clipkit.config.schema import (
    SettingsError,
    at_least,
    fraction,
    identity,
    leaves,
    parse,
    positive,
    setting,
    unknown_setting,
    within,
    without_none,
)
from clipkit.config.shards import ShardsCheckConfig, ShardsWriteConfig

SCHEMAS = {"pretrain": PretrainConfig, "shards/write": ShardsWriteConfig, "shards/check": ShardsCheckConfig}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = setting("how fast", positive)
    kind: str = setting("which", choices=("a", "b"))
    pair: tuple[float, float] = setting("two shares", fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    count: int = setting("how many", at_least(2))
    on: bool = setting("whether", runtime=True)
    words: tuple[str, ...] | None = setting("several")
    table: dict[str, Any] | None = setting("anything")
    limit: int | None = setting("at most", positive)
    inner: Inner

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < self.count:
            raise ValueError(f"limit is {self.limit}, below count {self.count}")


GOOD = {"count": 3, "on": True, "words": ["x", "y"], "table": {"k": 1}, "limit": None,
        "inner": {"rate": 1, "kind": "a", "pair": [0, 0.5]}}


def changed(**values: Any) -> dict[str, Any]:
    """GOOD with other values; `inner_rate` stands for inner.rate."""
    inner = {key.removeprefix("inner_"): value for key, value in values.items() if key.startswith("inner_")}
    outer = {key: value for key, value in values.items() if not key.startswith("inner_")}
    return {**GOOD, **({"inner": {**GOOD["inner"], **inner}} if inner else {}), **outer}


def test_plain_values_become_frozen_dataclasses_with_tuples_and_floats():
    parsed = parse(Outer, GOOD)
    assert parsed == Outer(count=3, on=True, words=("x", "y"), table={"k": 1}, limit=None,
                           inner=Inner(rate=1.0, kind="a", pair=(0.0, 0.5)))
    assert isinstance(parsed.inner.rate, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed.count = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_close_types_are_taken_and_one_value_stands_for_a_list():
    assert parse(Outer, changed(count=3.0)).count == 3
    assert parse(Outer, changed(words="x")).words == ("x",)
    assert parse(Outer, changed(words=[1, 2.5])).words == ("1", "2.5")
    assert parse(Outer, changed(words=None)).words is None
    assert parse(Outer, changed(limit=None, table=None)).limit is None


@pytest.mark.parametrize(("values", "message"), [
    (changed(cuont=3), "cuont is not a setting; did you mean count?"),
    (changed(zzzz=3), "zzzz is not a setting; choose one of count, inner, limit, on, table, words"),
    (changed(inner_rtae=3), "inner.rtae is not a setting; did you mean inner.rate?"),
    (changed(count="three"), "count is 'three'; it must be a whole number"),
    (changed(count=2.5), "count is 2.5; it must be a whole number"),
    (changed(count=True), "count is True; it must be a whole number"),
    (changed(count=None), "count is None; it must be a whole number"),
    (changed(limit="x"), "limit is 'x'; it must be a whole number or null"),
    (changed(on="yes"), "on is 'yes'; it must be true or false"),
    (changed(on=1), "on is 1; it must be true or false"),
    (changed(words=[["x"]]), "words is ['x']; it must be a text"),
    (changed(table=3), "table is 3; it must be a mapping or null"),
    (changed(inner=3), "inner is 3; it is a group of settings: give inner.<setting>=..."),
    (changed(inner_rate="fast"), "inner.rate is 'fast'; it must be a number"),
    (changed(inner_rate=0), "inner.rate is 0.0; it must be above 0"),
    (changed(inner_rate=float("nan")), "inner.rate is nan; it must be a number"),
    (changed(inner_rate=float("inf")), "inner.rate is inf; it must be a number"),
    (changed(inner_kind="c"), "inner.kind is 'c'; choose one of a, b"),
    (changed(inner_pair=[0.1]), "inner.pair is [0.1]; it must have 2 values, as in inner.pair=[a,b]"),
    (changed(inner_pair=[0.1, 1.5]), "inner.pair is 1.5; it must be from 0 to 1"),
    (changed(count=1), "count is 1; it must be at least 2"),
    (changed(limit=2), "limit is 2, below count 3"),
    ({key: value for key, value in GOOD.items() if key != "count"}, "count has no value; give count=... (how many)"),
    ({key: value for key, value in GOOD.items() if key != "inner"}, "inner has no value; give inner=... (settings group)"),
])
def test_what_is_wrong_is_said_in_one_line(values, message):
    with pytest.raises(SettingsError) as caught:
        parse(Outer, values)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e400])
def test_a_number_that_is_not_finite_is_no_whole_number(value):
    with pytest.raises(SettingsError, match=r"count is .*; it must be a whole number"):
        parse(Outer, changed(count=value))


def test_bounds_hold_at_their_ends():
    for check, inside, outside in ((positive, 1e-9, 0), (fraction, 1, 1.0001), (at_least(2), 2, 1.9), (within(1, 2), 1, 0.9)):
        assert check[1](inside)
        assert not check[1](outside)


def test_an_unknown_key_without_a_near_one_is_answered_with_all_there_are():
    assert str(unknown_setting("optimizer.momentum", ["seed", "name"])).endswith("choose one of name, seed")


def test_identity_is_everything_but_the_runtime_settings():
    found = identity(parse(Outer, GOOD))
    assert set(found) == {"count", "words", "table", "limit", "inner.rate", "inner.kind", "inner.pair"}
    assert found["inner.pair"] == (0.0, 0.5)


def test_leaves_name_every_setting_with_its_type():
    assert {key: hint for key, (hint, _) in leaves(Inner).items()} == {
        "rate": float, "kind": str, "pair": tuple[float, float]}
    assert list(leaves(Outer))[-3:] == ["inner.rate", "inner.kind", "inner.pair"]
    assert without_none(int | None) is int


# The mirror rule: conf/ holds the values of exactly the settings that clipkit/config/ names.

def groups(command: str) -> dict[str, list[Path]]:
    """{group: its choices} of a command, own and shared."""
    found: dict[str, list[Path]] = {}
    for folder in (conf_dir() / command, conf_dir() / "shared"):
        for file in sorted(folder.glob("*/*.yaml")):
            if file.stem not in {other.stem for other in found.get(file.parent.name, [])}:  # the command's own stands before
                found.setdefault(file.parent.name, []).append(file)
    return found if command == "pretrain" else {}


def keys(values: dict[str, Any], schema: type, path: str = "") -> set[str]:
    """Dotted keys of a YAML file's leaves; the inside of a mapping setting is one leaf."""
    found: set[str] = set()
    for name, value in values.items():
        key = f"{path}{name}"
        if key in leaves(schema) or not isinstance(value, dict):
            found.add(key)
        else:
            found |= keys(value, schema, f"{key}.")
    return found


def group_choices() -> list[tuple[str, Path]]:
    return [(group, file) for group, files in groups("pretrain").items() if group != "experiment" for file in files]


@pytest.mark.parametrize(("group", "file"), group_choices(), ids=lambda value: getattr(value, "stem", value))
def test_each_choice_of_a_group_gives_a_value_to_every_setting_of_it_and_to_no_other(group, file):
    hints = {item.name: item.type for item in dataclasses.fields(PretrainConfig)}
    assert keys(yaml.safe_load(file.read_text(encoding="utf-8")), hints[group]) == set(leaves(hints[group]))


@pytest.mark.parametrize("command", SCHEMAS)
def test_a_root_file_gives_values_to_the_settings_that_are_in_no_group(command):
    values = yaml.safe_load((conf_dir() / command / "config.yaml").read_text(encoding="utf-8"))
    chosen = {name for entry in values.pop("defaults") if isinstance(entry, dict) for name in entry}
    values.pop("hydra")
    in_groups = {key for key in leaves(SCHEMAS[command]) if key.split(".")[0] in groups(command)}
    assert set(values) == set(leaves(SCHEMAS[command])) - in_groups
    assert {key.split(".")[0] for key in in_groups} <= chosen


def test_every_setting_says_what_it_means():
    for schema in SCHEMAS.values():
        for key, (_, item) in leaves(schema).items():
            assert len(item.metadata["meaning"]) > 3, key


def test_settings_of_the_hardware_are_runtime_and_those_of_the_mathematics_are_not():
    runtime = {key for key, (_, item) in leaves(PretrainConfig).items() if item.metadata["runtime"]}
    assert {"device", "data.workers", "train.compile", "log.every", "checkpoint.keep", "evaluation.every"} <= runtime
    assert not runtime & {"seed", "data.train", "data.lanes", "train.global_batch_size", "train.precision", "optim.lr"}
