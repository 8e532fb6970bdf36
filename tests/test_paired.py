"""Paired comparisons against scipy, enumeration, and cases worked by hand."""

from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from clipkit.evaluation.paired import compare_predictions, exact_p_value, holm


def predictions(ranks: list[int] | np.ndarray, *, task: str = "cats", keys: list[str] | None = None,
                direction: str = "", name: str = "a") -> pd.DataFrame:
    n = len(ranks)
    return pd.DataFrame({"name": name, "task": task, "kind": "zeroshot_classification", "prompts": "openai80",
                         "direction": direction, "key": keys or [f"{i:03d}" for i in range(n)], "label": 0,
                         "label_name": "cat", "rank": ranks})


def test_one_question_an_image_gives_mcnemars_exact_test() -> None:
    ranks_a, ranks_b = np.array([0] * 50 + [1] * 4 + [0] * 13 + [3] * 33), np.array([0] * 50 + [0] * 4 + [2] * 13 + [3] * 33)
    shuffled = predictions(ranks_b, name="b").sample(frac=1, random_state=0)
    [result] = compare_predictions(predictions(ranks_a), shuffled)
    assert (result.n, result.num_images, result.only_a, result.only_b) == (100, 100, 13, 4)
    assert (result.value_a, result.value_b, result.difference) == (0.63, 0.54, -0.09)
    assert result.p_value == pytest.approx(binomtest(4, 17).pvalue)
    assert result.p_holm == result.p_value
    error = np.sqrt((17 / 100 - 0.09**2) / 100)  # of paired differences, at large n
    assert (result.ci_low, result.ci_high) == pytest.approx((-0.09 - 1.96 * error, -0.09 + 1.96 * error), abs=0.015)
    assert result.metric == "acc1"


@pytest.mark.parametrize("differences", [[1, 1, 1, -1, 0, 0], [2, -1, 3, 1, -2, 0, 5], [4, 4, -1], [0, 0]])
def test_the_p_value_of_clusters_is_that_of_trying_all_signs(differences: list[int]) -> None:
    signs = np.array(list(product([-1, 1], repeat=len(differences))))
    totals = np.abs(signs @ np.abs(differences))
    assert exact_p_value(np.array(differences)) == pytest.approx((totals >= abs(sum(differences))).mean())


def test_p_values_are_found_for_many_questions() -> None:
    assert exact_p_value(np.repeat([1, -1, 0], [600, 500, 20_000])) == pytest.approx(binomtest(500, 1100).pvalue)
    assert 0 <= exact_p_value(np.repeat([1, 3, -2], [900, 400, 50])) < 1e-12


def test_captions_of_one_image_count_as_one_piece_of_evidence() -> None:
    rng = np.random.default_rng(0)
    ranks_a, ranks_b = rng.integers(0, 2, (2, 40))
    keys = [f"{i // 5}" for i in range(200)]
    alone = compare_predictions(predictions(ranks_a), predictions(ranks_b))[0]
    five = compare_predictions(predictions(ranks_a.repeat(5), keys=keys, direction="image_retrieval"),
                               predictions(ranks_b.repeat(5), keys=keys, direction="image_retrieval"))[0]
    assert (five.n, five.num_images, five.metric) == (200, 40, "image_retrieval_recall@1")
    assert (five.p_value, five.difference) == (pytest.approx(alone.p_value), alone.difference)
    assert (five.ci_low, five.ci_high) == pytest.approx((alone.ci_low, alone.ci_high))


def test_a_model_against_itself_differs_by_nothing_within_an_honest_interval() -> None:
    [result] = compare_predictions(predictions([0, 1] * 50), predictions([0, 1] * 50, name="b"))
    assert (result.difference, result.p_value) == (0, 1)
    assert result.ci_low == -result.ci_high == pytest.approx(-0.027, abs=1e-3)  # 2.77 / 102


def test_several_tasks_are_compared_in_order_and_corrected_together() -> None:
    rng = np.random.default_rng(0)
    tasks = ["z", "a", "m"]
    a = pd.concat([predictions(rng.integers(0, 2, 60), task=task) for task in tasks])
    b = pd.concat([predictions(rng.integers(0, 3 + 3 * number, 60), task=task) for number, task in enumerate(tasks)])
    results = compare_predictions(a, b)
    assert [result.task for result in results] == tasks
    assert [result.p_holm for result in results] == holm([result.p_value for result in results])
    at_5 = compare_predictions(a, b, k=5)
    assert at_5[0].metric == "acc5" and at_5[0].value_a == 1


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    p = np.random.default_rng(0).random(6) ** 3
    subsets = [set(chosen) for size in range(1, 7) for chosen in combinations(range(6), size)]
    closed = [max(min(1, len(s) * min(p[list(s)])) for s in subsets if i in s) for i in range(6)]
    assert holm(p.tolist()) == pytest.approx(closed)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_different_questions_are_refused_with_their_numbers() -> None:
    a, b = predictions([0] * 10), predictions([0] * 12).iloc[3:]
    with pytest.raises(ValueError, match="of 10 questions in a and 9 in b, 3 are only in a and 2 only in b; evaluate both"):
        compare_predictions(a, b)
    with pytest.raises(ValueError, match="of 10 questions in a and 20 in b, 0 are only in a and 10 only in b"):
        compare_predictions(a, pd.concat([a, predictions([0] * 10, task="dogs")]))


def test_different_right_answers_are_refused() -> None:
    b = predictions([0] * 10).assign(label_name=["dog"] * 2 + ["cat"] * 8)
    with pytest.raises(ValueError, match="2 of 10 questions have another right answer in b than in a"):
        compare_predictions(predictions([0] * 10), b)


def test_a_table_of_two_models_or_without_its_columns_is_refused() -> None:
    a = predictions([0] * 10)
    with pytest.raises(ValueError, match=r"the predictions b are of 2 models \['a', 'x'\]; give those of one"):
        compare_predictions(a, pd.concat([a, predictions([0], name="x")]))
    with pytest.raises(ValueError, match=r"the predictions a lack the columns \['rank'\]; give a predictions.parquet"):
        compare_predictions(a.drop(columns="rank"), a)
