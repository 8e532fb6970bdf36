"""Prompts of random words: as many as said, the same each time, no sense in them."""

import re

import pytest

from clipkit.evaluation.prompt_rules import prompt_rules
from clipkit.evaluation.random_words import random_word_templates


def test_the_templates_are_thirty_and_the_same_each_time() -> None:
    templates = random_word_templates()
    assert len(set(templates)) == 30 and templates == random_word_templates() != random_word_templates(1)
    for words, letters in zip(templates[::2], templates[1::2], strict=True):
        endings = [re.fullmatch(r"a photo of a \{\}, which has ([a-z]{4,9}) ([a-z]{4,9})\.", text) for text in (words, letters)]
        assert all(endings)
        lengths = [[len(word) for word in ending.groups()] for ending in endings if ending]
        assert lengths[0] == lengths[1]  # letters as long as the words


def test_waffle_is_a_prompt_rule_with_the_same_endings_for_every_class() -> None:
    rules = prompt_rules(["cat", "red fox"], ["plain", "waffle"])
    assert list(rules) == ["plain", "waffle"]
    cat, fox = rules["waffle"]
    assert len(cat) == 30 and [text.replace("cat", "red fox", 1) for text in cat] == fox
    with pytest.raises(ValueError, match=r"choose one of \['openai80', 'openai7', 'plain', 'waffle', 'set'\]"):
        prompt_rules(["cat"], "waffles")
