"""Several data sets as one: weights, held-out records, shapes."""

from __future__ import annotations

from collections import Counter

import pytest

from misa_engine.cli.data import LoadedData
from misa_engine.cli.data_mix import mix
from misa_engine.cli.record_formats import FORMATS
from misa_engine.errors import UserError


def part(name: str, count: int, column: str = "text") -> LoadedData:
    from datasets import Dataset

    return LoadedData(Dataset.from_dict({column: [f"{name}{i}" for i in range(count)]}), FORMATS[-1])


def texts(dataset: object) -> list[str]:
    return [row["text"] for row in dataset]  # type: ignore[attr-defined]


def test_weights_say_how_often_each_record_is_taken() -> None:
    made = mix([part("a", 10), part("b", 8)], ["a", "b"], [2.5, 0.25], fraction=None, seed=1)
    counts = Counter(texts(made.train))
    assert sum(counts[f"a{i}"] for i in range(10)) == 25 and {counts[f"a{i}"] for i in range(10)} == {2, 3}
    assert sum(counts[f"b{i}"] for i in range(8)) == 2
    assert made.lines == (
        "data set a: 10 records x 2.5 = 25",
        "data set b: 8 records x 0.25 = 2, 6 are left out (drawn by --seed)",
    )
    again = mix([part("a", 10), part("b", 8)], ["a", "b"], [2.5, 0.25], fraction=None, seed=1)
    other = mix([part("a", 10), part("b", 8)], ["a", "b"], [2.5, 0.25], fraction=None, seed=2)
    assert texts(again.train) == texts(made.train) != texts(other.train)


def test_one_data_set_is_left_as_it_is() -> None:
    made = mix([part("a", 3)], ["a"], [], fraction=None, seed=1)
    assert texts(made.train) == ["a0", "a1", "a2"] and made.held_out is None and made.lines == ()


def test_no_record_is_trained_on_and_held_out_whatever_its_weight() -> None:
    made = mix([part("a", 10), part("b", 10)], ["a", "b"], [3, 1], fraction=0.2, seed=1)
    held = texts(made.held_out)
    assert len(held) == 4 and {text[0] for text in held} == {"a", "b"}
    assert not set(held) & set(texts(made.train)) and len(made.train) == 3 * 8 + 8


@pytest.mark.parametrize(
    ("parts", "weights", "text"),
    [
        ([part("a", 2), part("b", 2)], [1.0], "gives 1 numbers for 2 data sets"),
        ([part("a", 2)], [0.0], "above 0; got 0"),
        ([part("a", 2)], [float("nan")], "above 0; got nan"),
        ([part("a", 2)], [0.1], "0.1 of the 2 records of a is none"),
        ([part("a", 2), part("b", 2, "messages")], [], "bring them to one shape"),
        ([LoadedData(iter(()), FORMATS[-1]), part("b", 2)], [], "--dataset_streaming reads one data set"),
    ],
)
def test_what_cannot_be_put_together_is_refused(parts: list[LoadedData], weights: list[float], text: str) -> None:
    with pytest.raises(UserError, match=text):
        mix(parts, ["a", "b"][: len(parts)], weights, fraction=None, seed=1)
