"""What a fine-tuning folder holds already."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from integration.test_finetune import Folder, write_rte

import ranks
from earlybert import finetune, recipes, state_files, tuned, tuning
from earlybert.config import EarlyBertError
from earlybert.export import MARK
from earlybert.recipes import Recipe, defaults


def done(folder, **recipe):
    """A seed that was tuned by a recipe."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"recipe": recipe}))


def test_a_setting_that_an_older_result_does_not_name_was_as_its_default_is(tmp_path):
    now = Recipe(**defaults("squad"))
    told = now.deciding
    del told["ignore_padding"]
    done(tmp_path / "seed-1", **told)
    tuned.check_task(tmp_path, now, precision="fp32")
    with pytest.raises(EarlyBertError, match="seed-1 is tuned with ignore_padding = False, not True; give"):
        tuned.check_task(tmp_path, Recipe(**{**defaults("squad"), "ignore_padding": True}), precision="fp32")


@pytest.mark.parametrize(
    ("task", "name", "value", "decides"),
    [
        ("rte", "epochs", 1.0, True), ("rte", "micro_batch", 8, False), ("rte", "stride", 1, False),
        ("rte", "ignore_padding", True, False), ("squad", "stride", 1, True),
    ],
)  # fmt: skip
def test_what_has_no_effect_on_a_task_is_not_compared(tmp_path, task, name, value, decides):
    done(tmp_path / "seed-2", **defaults(task))
    now = Recipe(**{**defaults(task), name: value})
    if decides:
        with pytest.raises(EarlyBertError, match=f"seed-2 is tuned with {name} = "):
            tuned.check_task(tmp_path, now, precision="fp32")
    else:
        tuned.check_task(tmp_path, now, precision="fp32")


def test_what_was_begun_without_a_checkpoint_binds_nobody(tmp_path):
    tuned.begin(tmp_path / "seed-1", Recipe(**defaults("rte")))
    other = Recipe(**{**defaults("rte"), "epochs": 1.0})
    tuned.check_task(tmp_path, other, precision="fp32")
    (tmp_path / "seed-1" / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(EarlyBertError, match="seed-1 is tuned with epochs = 5.0, not 1.0"):
        tuned.check_task(tmp_path, other, precision="fp32")


class Task:
    train, judged = SimpleNamespace(sha256="t"), "j"


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"rows": "t", "judged": "j"}, None), ({}, None),
        ({"rows": "u"}, "was tuned on other rows than those of glue now"),
        ({"judged": "k"}, "was judged by other rows than those of glue now"),
    ],
)  # fmt: skip
def test_a_finished_seed_of_other_rows_is_refused_whichever_seed_is_asked_for(tmp_path, told, says):
    (tmp_path / "seed-3").mkdir()
    (tmp_path / "seed-3" / "result.json").write_text(json.dumps(told))
    if says is None:
        tuned.check_rows(tmp_path, Task, data="glue")
        return
    with pytest.raises(EarlyBertError, match=says):
        tuned.check_rows(tmp_path, Task, data="glue")


def test_a_finished_seed_of_another_precision_is_refused(tmp_path):
    (tmp_path / "seed-1").mkdir()
    (tmp_path / "seed-1" / "result.json").write_text(
        json.dumps({"recipe": defaults("rte"), "precision": "bf16"})
    )
    recipe = Recipe(**defaults("rte"))
    tuned.check_task(tmp_path, recipe, precision="bf16")
    with pytest.raises(EarlyBertError, match="seed-1 is tuned in bf16, not fp32; give it a DeepSpeed JSON"):
        tuned.check_task(tmp_path, recipe, precision="fp32")


def stopped_on_a_full_disk(path):
    """Tune RTE and be asked to stop at once, where no checkpoint can be written; what is told."""

    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state_files.write = write
    tuning.Tuning._asked = lambda self: True
    settings, values = recipes.load(Path(path, "e.toml"), kind="glue")
    try:
        return str(finetune.tune(settings, values, where="e.toml"))
    except EarlyBertError as error:
        return str(error)


def test_a_stop_whose_checkpoint_cannot_be_written_is_no_good_end(tmp_path):
    Folder(tmp_path, tasks=["rte"])
    write_rte(tmp_path / "data", rows=32)
    for told in ranks.run("test_tuned:stopped_on_a_full_disk", ranks=2, path=str(tmp_path)):
        assert "the checkpoint of step 1 could not be saved" in told and "No space left" in told
        assert "make room, then start the same command again" in told


@pytest.mark.parametrize(
    ("kept", "asked", "told"),
    [
        (None, "none", False),
        (None, "compact", True),
        ("compact", "compact", False),
        ("compact", "dense", True),
    ],
)  # fmt: skip
def test_a_finished_seed_says_where_its_model_is_not_there_in_the_form_that_is_asked_for(
    tmp_path, capsys, kept, asked, told
):
    (tmp_path / "result.json").write_text('{"score": 71.5}')
    if kept is not None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / MARK).write_text(json.dumps({"form": kept}))
    finetune._tell_done("rte", {2: tmp_path}, form=asked)
    said = capsys.readouterr().out
    assert said.startswith("rte, seed 2: done before, 71.50")
    assert (f"its model was not kept in the {asked} form: remove {tmp_path}" in said) == told
