"""Which tables `speed` measures; what they say is no test's."""

from __future__ import annotations

import pytest
import torch

from benchmarks import speed
from benchmarks.settings import InputError


def test_tables_are_chosen_by_words_of_their_titles_and_not_measured_for_it():
    titles = speed.tables(torch.device("cpu"))
    assert len(titles) == len(speed.choose(titles, "")) > 15
    chosen = speed.choose(titles, "k-fac STEP")
    assert [title.split(" on ")[0] for title in chosen] == ["A step of K-FAC", "A step of XK-FAC", "A step of K-FAC"]
    with pytest.raises(InputError, match=r"--only 'k-fca'.*A step of GPM on AlexNet"):
        speed.choose(titles, "k-fca")


def test_one_small_table_is_measured(capsys):
    speed.main("projection 200")
    printed = " ".join(capsys.readouterr().out.split())
    assert "OGD's projection of a gradient of the perceptron, 200 stored gradients" in printed
    assert "1.00" in printed
    assert "AlexNet" not in printed
