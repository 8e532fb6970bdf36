"""Classes of one name: refused, kept as published results keep them, or merged."""

import pytest

from clipkit.evaluation.tasks import load_task
from clipkit.evaluation.zero_shot import measure
from tests.test_tasks import benchmark_set, read


@pytest.fixture
def cranes(tmp_path):
    """Five pictures of three classes, two of which are called crane."""
    root = benchmark_set(tmp_path / "cranes", "test", [b"2", b"0", b"1", b"2", b"0"])
    (root / "classnames.txt").write_text("crane\nfox\ncrane\n")
    return str(root)


def test_classes_of_one_name_are_refused_unless_it_is_said_what_to_do(cranes):
    with pytest.raises(ValueError, match=r"1 class names of .* more than once \('crane' 2 times\), so no text .* give "
                                         r"duplicates=merge .* or duplicates=keep"):
        load_task(cranes)
    with pytest.raises(ValueError, match="duplicates is 'drop'; choose one of"):
        load_task(cranes, duplicates="drop")


def test_of_kept_classes_only_the_first_is_guessed(cranes, tiny_model):
    task = load_task(cranes, duplicates="keep")
    assert task.classes == ("crane", "fox", "crane") and [sample.label for sample in read(task)] == [2, 0, 1, 2, 0]
    assert task.notes[0].endswith("('crane' 2 times): of each only the first is ever guessed, as in published results")
    predictions = measure(tiny_model, task).predictions
    assert predictions is not None
    cranes_guessed = predictions["guess_name"] == "crane"
    assert set(predictions.loc[cranes_guessed, "guess"]) <= {0} and (predictions["tied"] == cranes_guessed).all()


def test_merged_classes_have_one_number(cranes):
    task = load_task(cranes, duplicates="merge")
    assert task.classes == ("crane", "fox") and [sample.label for sample in read(task)] == [0, 0, 1, 0, 0]
    assert "2 in the place of 3" in task.notes[0]
    assert len(next(iter(task.prompts.values()))) == 2
