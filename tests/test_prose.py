"""Claims about the prose of real Wikipedia pages, beside drafts corrected by hand from reading them."""

import pytest

import prose
from data_prep import wikitext

PAGES = [(dump, id) for dump, pages in prose.recipes().items() for id in pages]


def test_twenty_pages_of_two_languages_are_written_down() -> None:
    assert len(PAGES) == 20
    assert {dump[:2] for dump, _ in PAGES} == {"en", "it"}


@pytest.mark.skipif(not prose.SHARED.is_dir(), reason="the shared Wikipedia dumps are not on this machine")
@pytest.mark.parametrize("dump", sorted(prose.recipes()))
def test_of_each_page_at_least_98_percent_of_the_characters_come_out_right(dump: str) -> None:
    recipes = prose.recipes()[dump]
    right = {}
    for page in prose.articles(dump, set(recipes)):
        found = wikitext.plain(page.text, dropped_prefixes=page.dropped_prefixes, title=page.title)
        right[page.title] = prose.share_right(prose.follow(recipes[page.id], page.text), found)
    assert len(right) == len(recipes)
    assert min(right.values()) >= 0.98, right


def test_a_recipe_gives_the_prose_back() -> None:
    source = "'''Rome''' is a [[city]] in {{nowrap|[[Italy]]}}."
    recipe = prose.recipe_of("Rome is a large city in Italy.", source)
    assert prose.follow(recipe, source) == "Rome is a large city in Italy."
    assert "Rome" not in recipe


def test_a_missing_and_a_surplus_word_both_count_as_wrong() -> None:
    assert prose.share_right("one two three", "one two three") == 1
    assert prose.share_right("one two three", "one three") == pytest.approx(9 / 13)
    assert prose.share_right("one three", "one two three") == pytest.approx(9 / 13)
