"""Texts to features and to the weights of classes: stored, trimmed, in the same batches for any number of processes."""

from pathlib import Path

import pytest
import torch

from clipkit.evaluation.classifier import class_weights
from clipkit.evaluation.encode import encode_texts, evaluation_mode
from clipkit.evaluation.store import EmbeddingStore, identify, text_key
from clipkit.evaluation.text_features import _text_batches, average_prompts, stored_class_weights
from clipkit.model.trim import encode_by_length
from tests.test_store import TEXTS, change_a_byte, cut, refuse


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "cache")


def test_stored_texts_are_read_and_only_the_others_encoded(tiny_model, store, monkeypatch) -> None:
    expected = encode_texts(tiny_model, TEXTS, batch_size=4)
    assert torch.equal(encode_texts(tiny_model, TEXTS[:2], batch_size=4, store=store), expected[:2])
    asked, tokenize = [], tiny_model.tokenize
    monkeypatch.setattr(tiny_model, "tokenize", lambda texts: asked.append(texts) or tokenize(texts))
    torch.testing.assert_close(encode_texts(tiny_model, TEXTS, batch_size=4, store=store), expected, atol=1e-6, rtol=0)
    assert asked[-1] == ["rain", "two red cars, and a lorry"]
    monkeypatch.setattr(tiny_model.towers, "encode_text", refuse)
    again = encode_texts(tiny_model, TEXTS[::-1], batch_size=4, store=store)
    torch.testing.assert_close(again, expected.flip(0), atol=1e-6, rtol=0)
    assert len(list(store.folder.glob("texts-*/*.arrow"))) == 2


@pytest.mark.parametrize("damage", [cut, change_a_byte, lambda path: path.write_bytes(b"")], ids=["cut", "byte", "empty"])
def test_a_damaged_file_of_texts_is_encoded_again(tiny_model, store, damage) -> None:
    expected = encode_texts(tiny_model, TEXTS, batch_size=4, store=store)
    damage(next(store.folder.glob("texts-*/*.arrow")))
    with pytest.warns(UserWarning, match=r"arrow is damaged .* and what it held is encoded again"):
        assert torch.equal(encode_texts(tiny_model, TEXTS, batch_size=4, store=store), expected)
    assert torch.equal(encode_texts(tiny_model, TEXTS, batch_size=4, store=store), expected)


def test_trimmed_batches_give_the_features_of_the_whole_tower(tiny_model) -> None:
    texts = [*TEXTS, "word " * 40, "", "a photo of many different animals in a garden, seen from far above"]
    tokens = tiny_model.tokenize(texts)
    features = torch.empty(len(texts), 16)
    with evaluation_mode(tiny_model):
        for rows, part in encode_by_length(tiny_model.towers, tokens, batch_size=2, device=torch.device("cpu")):
            features[rows] = part
        expected = tiny_model.towers.encode_text(tokens)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-6)  # other shapes sum in another order


def test_the_order_of_the_texts_changes_no_bit(tiny_model) -> None:
    texts = [f"a {colour} {thing}" for colour in ("red", "dark blue", "green") for thing in ("car", "fire engine", "cat")]
    forward = encode_texts(tiny_model, texts, batch_size=2)
    assert torch.equal(encode_texts(tiny_model, texts[::-1], batch_size=2), forward.flip(0))


@pytest.mark.parametrize("trims", [True, False])
def test_the_batches_of_texts_are_the_same_for_any_number_of_processes(tiny_model, monkeypatch, trims) -> None:
    texts = sorted(f"a {colour} {thing}{' and more' * number}" for colour in ("red", "dark blue") for number in range(5)
                   for thing in ("car", "fire engine", "cat"))
    monkeypatch.setattr(tiny_model, "trims_text", trims)

    def batches(world_size: int) -> list[tuple[tuple[int, ...], bytes]]:
        with evaluation_mode(tiny_model):
            found = [batch for rank in range(world_size) for batch in _text_batches(tiny_model, texts, 2, rank, world_size)]
        return sorted((tuple(places.tolist()), features.numpy().tobytes()) for places, features in found)

    alone = batches(1)
    assert sorted(place for places, _ in alone for place in places) == list(range(30))
    assert all(batches(world_size) == alone for world_size in (2, 3, 4, 50))


def test_class_weights_come_from_the_store_alone_with_the_same_bits(tiny_model, store) -> None:
    prompts = [["a cat", "the cat"], ["a dog"], ["a car", "cars", "a car"]]
    weights = class_weights(tiny_model, prompts, store=store)
    key = text_key(identify(tiny_model))
    found = stored_class_weights(store, key, prompts)
    assert found is not None and torch.equal(found, weights)
    assert stored_class_weights(store, key, [*prompts, ["a tree"]]) is None
    with pytest.raises(ValueError, match="class 1 of 2 has no prompt; give each class at least one text"):
        class_weights(tiny_model, [["a cat"], []])


def test_the_mean_of_a_class_hangs_on_no_other_class() -> None:
    texts = [str(number) for number in range(90)]
    features = torch.nn.functional.normalize(torch.randn(90, 7, generator=torch.Generator().manual_seed(0)), dim=-1)
    prompts = [texts[:80], texts[3:5], texts[80:]]
    weights = average_prompts(features, texts, prompts)
    for number, of_class in enumerate(prompts):
        rows = [int(text) for text in of_class]
        assert torch.equal(average_prompts(features, texts, [of_class])[0], weights[number])
        mean = features[rows].double().mean(dim=0)
        torch.testing.assert_close(weights[number].double(), mean / mean.norm(), atol=1e-7, rtol=0)  # fp32 rounding
