"""Tables of plain values and two sources side by side, as chapters show them."""

import re

import pytest

from t2t_ref import T2TViT, ViT
from t2t_ref.book.shown import side_by_side, source_lines, table


def test_a_table_sets_numbers_at_the_right():
    shown = table("model | parameters | share", [("first", 1234567, 0.5), ("second <b>", 89, -1.25)])
    assert str(shown).splitlines() == [
        "model       parameters  share",
        "first        1,234,567   0.50",
        "second <b>          89  -1.25",
    ]
    page = shown._repr_html_()
    assert "second &lt;b&gt;" in page and '<td style="text-align: right">89</td>' in page
    assert '<td style="text-align: right">first' not in page


def test_truth_values_and_texts_are_no_numbers():
    assert str(table("what | is so", [("a", True)])) == "what  is so\na      True"
    assert str(table("what | how far | n", [("a", "+3 %", 1000), ("b", "", 22)])).splitlines() == [
        "what  how far      n",
        "a        +3 %  1,000",
        "b                 22",
    ]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError):
        table("one | two", [(1, 2, 3)])


def before(number, word="a"):
    """Left out."""
    return number + 1


def after(number, word="b"):
    return number + 1


def test_two_sources_lose_no_line():
    pair = side_by_side(ViT.__init__, T2TViT.__init__)
    assert [line for _, old, _ in pair.parts for line in old] == source_lines(ViT.__init__)
    assert [line for _, _, new in pair.parts for line in new] == source_lines(T2TViT.__init__)


def test_what_differs_is_marked():
    pair = side_by_side(before, after)
    assert repr(pair).splitlines() == [
        "- before",
        "+ after",
        '- def before(number, word="a"):',
        '+ def after(number, word="b"):',
        "      return number + 1",
    ]
    assert (pair.removed, pair.added) == (['def before(number, word="a"):'], ['def after(number, word="b"):'])
    assert len(re.findall('class="(?:left|right) only"', pair._repr_html_())) == 2
    assert "word=&quot;a&quot;" in pair._repr_html_()
