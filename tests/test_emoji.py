"""The embedded emoji set: rows, captions, and shards in the cache."""

import hashlib
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from clipkit.data.emoji import emoji_shards, shards
from clipkit.data.emoji.captions import emoji_captions
from clipkit.data.emoji.pack import CELL_SIZE, PACK_FOLDER, EmojiRow, read_emoji_rows
from clipkit.data.emoji.shards import damaged_shards, deal_rows, default_cache_dir

SPLIT_SIZES = {"train": 8311, "val": 338, "test_concept": 785, "test_style": 1358}  # README.md of the pack
RED_HEART = EmojiRow(
    style="fluent-3d",
    index=0,
    emoji="❤️",
    concept="2764",
    label="red heart",
    tags=("heart", "red", "love"),
    group="smileys & emotion",
    subgroup="heart",
    split="train",
    license="MIT",
)


@pytest.fixture
def small_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_emoji_rows()
    few = [row for row in rows if row.style in ("fxemoji", "emojitwo") and row.index % 20 == 0]
    monkeypatch.setattr(shards, "read_emoji_rows", lambda: few)


def read_members(path: str | Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # pyright: ignore[reportOptionalMemberAccess]


def test_captions_say_label_keywords_group_and_style() -> None:
    captions = emoji_captions(RED_HEART)
    assert captions["label"] == "red heart"
    assert captions["keywords"] == "red heart, heart, red, love"
    assert captions["tags_only"] == "heart, red, love"
    assert captions["with_group"] == "red heart, smileys & emotion"
    assert captions["with_style"] == "red heart, fluent 3d style"
    assert captions["in_template"][0] == "a picture of a red heart"
    assert set(captions["captions"]) > {"red heart", "heart, red, love", "an emoji of a red heart"}


def test_splits_have_the_sizes_of_the_readme_and_every_row_is_dealt_once() -> None:
    dealt = deal_rows(read_emoji_rows())
    for split, size in SPLIT_SIZES.items():
        rows = [row for name, part in dealt.items() if name.startswith(f"emoji-{split}-") for row in part]
        assert len(rows) == len(set(rows)) == size
        assert {row.split for row in rows} == {split}


def test_each_train_shard_mixes_styles_and_groups() -> None:
    dealt = deal_rows(read_emoji_rows())
    for name, rows in dealt.items():
        if name.startswith("emoji-train-"):
            assert len(rows) in (519, 520)
            assert len({row.style for row in rows}) == 7
            assert len({row.group for row in rows}) == 9


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)], ids=["every eighth", "all"])
def test_the_set_is_unpacked_with_every_sample_and_its_drawing(step: int, tmp_path: Path, monkeypatch) -> None:
    taken = read_emoji_rows()[::step]
    monkeypatch.setattr(shards, "read_emoji_rows", lambda: taken)
    train = emoji_shards("train", tmp_path)
    assert len(train) == 16
    assert damaged_shards(Path(train[0]).parent) == []
    sizes = json.loads((Path(train[0]).parent / "sizes.json").read_text())
    assert sum(sizes.values()) == len(taken)
    for split in SPLIT_SIZES:
        assert sum(sizes[Path(path).name] for path in emoji_shards(split, tmp_path)) == sum(row.split == split for row in taken)
    members = {name: content for path in train for name, content in read_members(path).items()}
    assert len(members) == 2 * sum(row.split == "train" for row in taken)
    rows = {shards.sample_key(row): row for row in taken}
    sheets: dict[str, Image.Image] = {}
    for name, content in members.items():
        row = rows[name.rsplit(".", 1)[0]]
        if name.endswith(".json"):
            fields = json.loads(content)
            assert (fields["label"], fields["concept"], fields["split"]) == (row.label, row.concept, "train")
            assert fields["tags"] == list(row.tags)
            assert fields["captions"] == emoji_captions(row)["captions"]
            continue
        if row.style not in sheets:
            with Image.open(PACK_FOLDER / f"{row.style}.webp") as file:
                sheets[row.style] = file.convert("RGB")
        y, x = (CELL_SIZE * cell for cell in divmod(row.index, 40))
        expected = sheets[row.style].crop((x, y, x + CELL_SIZE, y + CELL_SIZE))
        with Image.open(io.BytesIO(content)) as drawing:
            assert drawing.tobytes() == expected.tobytes()


@pytest.mark.usefixtures("small_pack")
def test_the_same_pack_gives_the_same_bytes(tmp_path: Path) -> None:
    hashes = [
        [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in emoji_shards("train", tmp_path / name)]
        for name in ("a", "b")
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.usefixtures("small_pack")
def test_many_processes_may_unpack_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: emoji_shards("test_style", tmp_path), range(4)))
    assert all(answer == answers[0] for answer in answers)
    assert damaged_shards(Path(answers[0][0]).parent) == []
    assert [path.name for path in tmp_path.iterdir()] == [Path(answers[0][0]).parent.name]


@pytest.mark.usefixtures("small_pack")
@pytest.mark.parametrize("damage", ["cut", "removed", "manifest"])
def test_a_damaged_cache_is_written_anew(tmp_path: Path, damage: str) -> None:
    shard = Path(emoji_shards("val", tmp_path)[0])
    whole = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(whole[:1000])
    elif damage == "removed":
        shard.unlink()
    else:
        (shard.parent / "manifest.json").write_text("{")
    assert Path(emoji_shards("val", tmp_path)[0]).read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("small_pack")
def test_a_changed_byte_is_found_by_the_checksum(tmp_path: Path) -> None:
    shard = Path(emoji_shards("val", tmp_path)[0])
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    assert damaged_shards(shard.parent) == [shard.name]


@pytest.mark.usefixtures("small_pack")
def test_another_pack_gets_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = emoji_shards("val", tmp_path)
    monkeypatch.setattr(shards, "pack_fingerprint", lambda: "another")
    assert Path(emoji_shards("val", tmp_path)[0]).parent != Path(first[0]).parent


@pytest.mark.usefixtures("small_pack")
def test_the_cache_is_found_through_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("CLIPKIT_CACHE", raising=False)
    assert default_cache_dir() == tmp_path / "xdg" / "clipkit"
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "own"))
    assert Path(emoji_shards("val")[0]).parents[1] == tmp_path / "own"
    monkeypatch.delenv("CLIPKIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "clipkit"


def test_an_unknown_split_is_answered_with_the_splits_there_are() -> None:
    with pytest.raises(ValueError, match=r"split is 'test'; choose one of .*test_style"):
        emoji_shards("test")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot unpack the emoji shards into .*file.*set data.cache_dir or"):
        emoji_shards("val", tmp_path / "file")
