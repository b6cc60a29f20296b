"""Fine-tuning experiments: what is refused before anything is read."""

from pathlib import Path

import pytest

from earlybert import recipes
from earlybert.config import EarlyBertError, SettingsError
from earlybert.recipes import Recipe, defaults
from earlybert.tuning import Plan

FILE = Path(__file__).parent.parent / "scripts" / "experiments" / "finetune" / "glue.toml"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ticket.minimum_step=10"], "ticket.minimum_step = 10: fine-tuning searches for search_epochs"),
        (["ticket.latest_step=500"], "ticket.latest_step = 500: fine-tuning searches for search_epochs"),
        (["ticket.every=5"], "ticket.every = 5: "),
        (["ticket.settled_distance=0.2"], "ticket.settled_distance = 0.2: "),
        (["ticket.on_breakdown=stop"], "ticket.on_breakdown = stop: "),
        (["ticket.rewind_step=5"], "ticket.rewind_step = 5: fine-tuning rewinds to the pretrained weights"),
        (["hang_seconds=0.0"], "hang_seconds = 0.0: must be positive"),
        (
            ["ticket.enabled=true", "ticket.start=keep", "recipe.epochs=0.2"],
            "search_epochs = 0.2: cola trains for 0.2 epochs, and with ticket.start=keep nothing",
        ),
        (
            ["ticket.enabled=true", "ticket.start=keep", 'recipes=[{task="wnli", epochs=0.1}]'],
            "search_epochs = 0.2: wnli trains for 0.1 epochs",
        ),
    ],
)
def test_a_setting_that_could_do_nothing_is_refused(words, says):
    with pytest.raises(SettingsError) as refused:
        recipes.load(FILE, words, kind="glue")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["ticket.enabled=true", "ticket.start=rewind", "recipe.epochs=0.1"],  # the epochs come on top
        ["ticket.enabled=true", "ticket.start=keep", "ticket.kind=random", "recipe.epochs=0.1"],  # one step
        ["ticket.start=keep", "recipe.epochs=0.1"],
        ["ticket.enabled=true", "ticket.start=keep", "recipe.epochs=0.3"],
    ],
)
def test_a_search_that_leaves_something_to_train_is_taken(words):
    recipes.load(FILE, words, kind="glue")


def test_a_set_so_small_that_no_step_would_follow_the_draw_is_refused():
    recipe = Recipe(**{**defaults("rte"), "epochs": 1.0})
    with pytest.raises(EarlyBertError, match="rte: 9 rows give 1 steps of 32, .* after step 1: nothing"):
        Plan(recipe, 9, 1, rewinds=False, seed=1)
    assert Plan(recipe, 9, 1, rewinds=True, seed=1).total == 2
    assert Plan(recipe, 9, 0, rewinds=False, seed=1).total == 1
