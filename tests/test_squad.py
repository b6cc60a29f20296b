"""SQuAD: windows that hold their answers, answers in the context's own words, and the official scores."""

import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import letters
from earlybert import squad, squad_files
from earlybert.config import EarlyBertError
from earlybert.squad_files import Question

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "squad"


LETTERS = letters.tokenizer()


def question(context, answer=None, *, text="who?", id="q", at=None):
    if answer is None:
        return Question(id, text, context, (), ())
    return Question(id, text, context, (answer,), (context.index(answer) if at is None else at,))


def logits_for(cut, chosen, *, null=0.0):
    """Logits of a model that is sure of the tokens of each window's chosen (first, last), else of [CLS]."""
    starts, ends = [], []
    for window, ids in enumerate(cut.input_ids):
        start, end = np.full(len(ids), -5.0), np.full(len(ids), -5.0)
        start[0] = end[0] = null
        if chosen[window] is not None:
            start[chosen[window][0]], end[chosen[window][1]] = 4.0, 4.0
        starts.append(start)
        ends.append(end)
    return starts, ends


texts = st.lists(st.text("abcé É.,'-", min_size=1, max_size=8), min_size=1, max_size=40).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(context=texts, data=st.data())
def test_a_model_that_knows_the_tokens_gives_the_answer_back_letter_by_letter(context, data):
    words = [word for word in context.split() if any(c.isalnum() for c in word)]
    if not words:
        return
    word = data.draw(st.sampled_from(words))
    asked = question(context, word)
    cut = squad.windows([asked], LETTERS, length=100, stride=20)
    held = [(s, e) if s else None for s, e in zip(cut.starts.tolist(), cut.ends.tolist(), strict=True)]
    assert any(held), "a word of at most 8 letters lies whole in a window, since they overlap by 20"
    (answered,) = squad.answers([asked], cut, *logits_for(cut, held), impossible=True)
    assert answered.best() == word
    assert answered.null_odds == pytest.approx(0.0 - 8.0)


def test_windows_cover_the_context_overlap_and_mark_the_answer_only_where_all_of_it_lies():
    context = " ".join(f"{'abcdefghij'[n % 10]}{n % 7}" for n in range(150))
    asked = question(context, "c6 d0", text="why " * 100)
    cut = squad.windows([asked], LETTERS, length=120, stride=30)
    assert len(cut) > 3 and max(map(len, cut.input_ids)) == 120
    covered = set()
    for window, (ids, types) in enumerate(zip(cut.input_ids, cut.token_type_ids, strict=True)):
        own = [pair for pair in cut.offsets[window].tolist() if pair[0] >= 0]
        assert len(own) == sum(types) - 1 and len(ids) - len(own) == 64 + 3, "64 tokens of the question"
        covered |= {place for pair in own for place in range(*pair)}
        whole = any(a[0] <= asked.starts[0] for a in own) and any(b[1] >= asked.starts[0] + 5 for b in own)
        assert whole == bool(cut.starts[window])
        if whole:
            first, last = cut.offsets[window][cut.starts[window]], cut.offsets[window][cut.ends[window]]
            assert context[first[0] : last[1]] == "c6 d0"
    assert covered == {place for place, c in enumerate(context) if c != " "}


@pytest.mark.parametrize("at_a_time", [1, 2, 1000])
def test_windows_are_those_of_the_tokenizer_however_many_questions_it_gets_at_a_time(monkeypatch, at_a_time):
    asked = [question(" ".join(["abc"] * (7 * n)), id=str(n), text="who " * n) for n in range(1, 12)]
    told = LETTERS(
        [q.text for q in asked], [q.context for q in asked], truncation="only_second", max_length=120,
        stride=20, return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
    )  # fmt: skip
    monkeypatch.setattr(squad, "_AT_A_TIME", at_a_time)
    cut = squad.windows(asked, LETTERS, length=120, stride=20)
    assert list(cut.questions) == told["overflow_to_sample_mapping"] and len(cut) > len(asked)
    assert [ids.tolist() for ids in cut.input_ids] == told["input_ids"]
    assert [types.tolist() for types in cut.token_type_ids] == told["token_type_ids"]
    for window, offsets in enumerate(cut.offsets):
        sides = told.sequence_ids(window)
        pairs = [
            list(pair) if side == 1 else [-1, -1]
            for pair, side in zip(told["offset_mapping"][window], sides, strict=True)
        ]
        assert offsets.tolist() == pairs


def test_windows_take_a_few_bytes_a_token_and_not_what_python_takes_for_a_number(monkeypatch):
    asked = [question(" ".join(["abc"] * 150), id=str(n)) for n in range(100)]
    monkeypatch.setattr(squad, "_AT_A_TIME", 5)
    squad.windows(asked[:1], LETTERS, length=120, stride=20)  # what is imported and remembered once
    tracemalloc.start()
    cut = squad.windows(asked, LETTERS, length=120, stride=20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tokens = sum(map(len, cut.input_ids))
    assert tokens > 50_000 and peak < 40 * tokens
    assert len(squad.windows([], LETTERS, length=120, stride=20)) == 0


def test_of_overlapping_windows_the_surest_one_answers_and_none_is_the_least_sure_null():
    context = " ".join(["ab"] * 60 + ["z"] + ["ef"] * 60)
    asked = [question(context, "z", id="1"), question(context, id="2")]
    cut = squad.windows(asked, LETTERS, length=120, stride=40)
    owners = np.array(cut.questions)
    assert (np.diff(owners) >= 0).all() and set(owners) == {0, 1}
    starts, ends = logits_for(cut, [None] * len(cut))
    for window, owner in enumerate(cut.questions):
        token = cut.starts[window] if owner == 0 and cut.starts[window] else len(cut.input_ids[window]) - 2
        starts[window][token] = ends[window][token] = 3.0 if owner == 0 and cut.starts[window] else 1.0
        starts[window][0] = ends[window][0] = window / 10
    first, second = squad.answers(asked, cut, starts, ends, impossible=True)
    assert first.best() == "z" and first.candidates[0].text == "z"
    assert sum(c.probability for c in first.candidates) == pytest.approx(1)
    least = min(w / 5 for w, owner in enumerate(cut.questions) if owner == 1)
    assert second.null_odds == pytest.approx(least - 2.0)
    assert second.best(threshold=-10.0) == "" and second.best(threshold=10.0) != ""
    (certain, _) = squad.answers(asked, cut, starts, ends, impossible=False)
    assert certain.null_odds is None and certain.best() == "z"


def test_no_answer_ends_before_it_begins_or_is_longer_than_asked():
    asked = question("ab cd ef", "cd")
    cut = squad.windows([asked], LETTERS, length=100, stride=10)
    starts, ends = logits_for(cut, [None])
    places = np.flatnonzero(cut.offsets[0][:, 0] >= 0)
    starts[0][places[4]] = ends[0][places[0]] = 9.0
    (told,) = squad.answers([asked], cut, starts, ends, impossible=False, longest=3)
    assert told.candidates and all(1 <= len(c.text.replace(" ", "")) <= 3 for c in told.candidates)
    assert len(told.candidates) == len({c.text for c in told.candidates}) <= 20


@pytest.mark.parametrize(
    ("told", "right", "exact", "f1"),
    [
        ("The Broncos", "Denver Broncos", 0, 2 / 3),  # an article is no word
        ("the denver broncos!", "Denver Broncos", 1, 1),
        ("a an the", "", 1, 1),  # nothing is left
        ("Denver", "", 0, 0),
        ("", "Denver", 0, 0),
        ("in 1066, in 1066", "1066", 0, 2 * 1 / 5),  # each word counts as often as it stands on both sides
        ("U.S.", "us", 1, 1),  # punctuation goes without a space
        ("well-known", "well known", 0, 0),
        ("theory of  the\tgames", "theory of games", 1, 1),  # "the" within a word stays
    ],
)
def test_exact_match_and_f1_are_the_official_ones(told, right, exact, f1):
    found = squad.evaluate([question(right or "x", right or None)], {"q": told}, impossible=True)
    assert found["exact"] == 100 * exact and found["f1"] == pytest.approx(100 * f1)


@pytest.mark.parametrize(
    ("told", "right", "first", "second"),
    [
        ("the", ("a",), (1, 0), (1, 1)),  # both are of articles alone: 1.1 finds no word that they share
        (".", ("the", "one"), (1, 0), (0, 0)),  # 2.0 leaves such an answer out where there are others
        ("one", ("the", "one"), (1, 1), (1, 1)),
        ("one", ("a",), (0, 0), (0, 0)),
    ],
)
def test_answers_of_no_words_count_as_each_versions_own_script_counts(told, right, first, second):
    asked = [Question("q", "?", "a one the", right, tuple(map("a one the".index, right)))]
    for impossible, (exact, f1) in ((False, first), (True, second)):
        found = squad.evaluate(asked, {"q": told}, impossible=impossible)
        assert found == {"exact": 100 * exact, "f1": 100 * f1}


def test_where_no_span_fits_the_odds_of_no_answer_are_a_number():
    asked = [question("one two", id="a")]
    cut = squad.windows(asked, LETTERS, length=100, stride=8)
    length = len(cut.input_ids[0])
    inside = np.flatnonzero(cut.offsets[0][:, 0] >= 0)
    start, end = np.zeros(length), np.zeros(length)
    start[inside[-1]] = end[inside[0]] = start[0] = 5.0
    (told,) = squad.answers(asked, cut, [start], [end], impossible=True, n_best=1)
    assert told.null_odds == 5.0 and told.best() == told.best(threshold=9.0) == ""


def test_the_best_of_several_right_answers_counts_and_kinds_are_told_apart():
    asked = [
        Question("1", "?", "one two three", ("one", "two three"), (0, 4)),
        Question("2", "?", "one", (), ()),
        Question("3", "?", "one", (), ()),
    ]
    found = squad.evaluate(asked, {"1": "three", "2": "", "3": "one"}, impossible=True)
    assert found == pytest.approx(
        {
            "exact": 100 / 3, "f1": 100 * (2 / 3 + 1) / 3, "answerable exact": 0.0,
            "answerable f1": 200 / 3, "unanswerable exact": 50.0, "unanswerable f1": 50.0,
        }
    )  # fmt: skip
    with pytest.raises(EarlyBertError, match="question 3: no answer was given"):
        squad.evaluate(asked, {"1": "", "2": ""}, impossible=True)


@pytest.mark.parametrize("metric", ["f1", "exact"])
@settings(max_examples=100, deadline=None)
@given(
    cases=st.lists(
        st.tuples(st.integers(-5, 5), st.sampled_from(["right", "half", "wrong", "none"])), min_size=1
    )
)
def test_the_best_threshold_is_the_best_of_all(metric, cases):
    asked, answered = [], []
    for number, (odds, kind) in enumerate(cases):
        context = "yes sir no"
        asked.append(question(context, None if kind == "none" else "yes sir", id=str(number)))
        text = {"wrong": "no", "half": "yes"}.get(kind, "yes sir")
        answered.append(squad.Answered((squad.Candidate(text, 0.0, 1.0),), float(odds)))

    def reached(threshold):
        told = {q.id: a.best(threshold=threshold) for q, a in zip(asked, answered, strict=True)}
        return squad.evaluate(asked, told, impossible=True)[metric]

    threshold, best = squad.best_threshold(asked, answered, getattr(squad, metric))
    assert reached(threshold) == pytest.approx(best)
    assert best == pytest.approx(max(reached(t) for t in np.arange(-6.5, 6.5, 0.5)))


def as_json(*asked, impossible=False):
    return {
        "version": "v2.0" if impossible else "1.1",
        "data": [
            {
                "title": "t",
                "paragraphs": [
                    {
                        "context": q.context,
                        "qas": [
                            {
                                "id": q.id,
                                "question": q.text,
                                "answers": [
                                    {"text": t, "answer_start": s}
                                    for t, s in zip(q.answers, q.starts, strict=True)
                                ],
                                **({"is_impossible": not q.answers} if impossible else {}),
                            }
                        ],
                    }
                    for q in asked
                ],
            }
        ],
    }


def test_json_packed_json_and_parquet_read_the_same(tmp_path):
    asked = (question("one two", "two", id="a"), question("three", id="b"))
    (tmp_path / "v2.json").write_text(json.dumps(as_json(*asked, impossible=True)))
    with lzma.open(tmp_path / "v2.json.xz", "wt") as file:
        json.dump(as_json(*asked, impossible=True), file)
    rows = [
        {
            "id": q.id, "title": "t", "context": q.context, "question": q.text,
            "answers": {"text": list(q.answers), "answer_start": list(q.starts)},
        }
        for q in asked
    ]  # fmt: skip
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "v2.parquet")
    for name in ("v2.json", "v2.json.xz", "v2.parquet"):
        assert squad_files.read(tmp_path / name) == asked


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v["data"][0]["paragraphs"][1]["qas"][0].pop("question"), "question 2: 'question'"),
        (lambda v: v.pop("data"), "'data' is missing"),
        (lambda v: v.update(data=[]), "the file has no questions"),
        (
            lambda v: v["data"][0]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start=1),
            "question 1 (a): the answer 'two' does not stand at character 1 of its context; it stands at 4",
        ),
        (
            lambda v: v["data"][0]["paragraphs"][0]["qas"][0]["answers"][0].update(text="four"),
            "question 1 (a): the answer 'four' does not stand at character 4 of its context; nor does it",
        ),
        (lambda v: v["data"][0]["paragraphs"][1]["qas"][0].update(id="a"), "2 questions have the id 'a'"),
        (lambda v: v["data"][0]["paragraphs"][1].update(qas=["who"]), "question 2: "),
        (lambda v: v["data"][0]["paragraphs"][1]["qas"][0].update(question=None), "question = None is not"),
        (lambda v: v["data"][0]["paragraphs"][1].update(context=None), "question 2: context = None is not"),
        (
            lambda v: v["data"][0]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start=-3),
            "question 1 (a): the answer 'two' does not stand at character -3 of its context; it stands at 4",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_with_its_question(tmp_path, change, says):
    values = as_json(question("one two", "two", id="a"), question("three", "three", id="b"))
    change(values)
    (tmp_path / "bad.json").write_text(json.dumps(values))
    with pytest.raises(EarlyBertError, match="bad.json") as refused:
        squad_files.read(tmp_path / "bad.json")
    assert says in str(refused.value)


def as_rows(*asked):
    return [
        {
            "id": q.id, "title": "t", "context": q.context, "question": q.text,
            "answers": {"text": list(q.answers), "answer_start": list(q.starts)},
        }
        for q in asked
    ]  # fmt: skip


@pytest.mark.parametrize(("task", "inner"), [("squad", "plain_text"), ("squad2", "squad_v2"), ("squad", "")])
def test_a_folder_of_the_hubs_files_is_read_all_parts_in_their_order(tmp_path, task, inner):
    asked = [question("one two", "two", id="a"), question("three", "three", id="b")]
    if task == "squad2":
        asked[1] = question("three", id="b")
    (tmp_path / inner).mkdir(exist_ok=True)
    for number, q in enumerate(asked):
        path = tmp_path / inner / f"train-0000{number}-of-00002.parquet"
        pa.parquet.write_table(pa.Table.from_pylist(as_rows(q)), path)
    assert squad_files.load(str(tmp_path), task, 0) == tuple(asked)
    with pytest.raises(EarlyBertError, match="dev-v.*is not there, nor packed or as parquet"):
        squad_files.load(str(tmp_path), task, 1)


def test_a_data_set_of_the_hub_is_read_by_its_name_and_one_that_is_not_there_is_told(monkeypatch):
    asked = (question("one two", "two", id="a"),)
    there = datasets.Dataset.from_list(as_rows(*asked))

    def load_dataset(name, split):
        if name != "rajpurkar/squad":
            raise FileNotFoundError("nothing there")
        assert split == "validation"
        return there

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert squad_files.load("rajpurkar/squad", "squad", 1) == asked
    with pytest.raises(EarlyBertError, match="who/knows is no folder.*nothing there"):
        squad_files.load("who/knows", "squad", 0)
    there = there.remove_columns("context")
    with pytest.raises(EarlyBertError, match="the column 'context' is missing"):
        squad_files.load("rajpurkar/squad", "squad", 1)


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        (None, "answers = None"), ("two", "answers = 'two'"), ([{"text": "two"}], "answers = "),
        ({"text": ["two", "two"], "answer_start": [4]}, "are not lists of one length"),
        ({"text": None, "answer_start": None}, "are not lists of one length"),
        ({"text": [None], "answer_start": [4]}, "need a text and a number"),
    ],
)  # fmt: skip
def test_answers_of_another_form_in_parquet_are_told_with_their_question(tmp_path, answers, says):
    row = {"id": "a", "question": "who?", "context": "one two", "answers": answers}
    pa.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "bad.parquet")
    with pytest.raises(EarlyBertError, match="bad.parquet, question 1") as refused:
        squad_files.read(tmp_path / "bad.parquet")
    assert says in str(refused.value)


def test_white_space_around_an_answer_does_not_lose_it():
    cut, plain = (
        squad.windows([Question("a", "who", "one two three", (told,), (at,))], LETTERS, length=90, stride=10)
        for told, at in ((" two ", 3), ("two", 4))
    )
    assert cut.starts.tolist() == plain.starts.tolist() != [0] and cut.ends.tolist() == plain.ends.tolist()


def test_files_that_are_no_json_or_not_there_and_windows_without_room_are_refused(tmp_path):
    (tmp_path / "bad.json").write_text('{"data": [')
    (tmp_path / "bad.json.xz").write_bytes(b"\xfd7zXZ\x00rest")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    for name in ("bad.json", "bad.json.xz", "bad.parquet", "none.json"):
        with pytest.raises(EarlyBertError, match=name):
            squad_files.read(tmp_path / name)
    for name, content in (("deep.json", b"[" * 200_000), ("list.json", b"[]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EarlyBertError, match=name):
            squad_files.read(tmp_path / name)
    packed = bytearray(gzip.compress(b'{"data": []}' * 1000))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "damaged.json.gz").write_bytes(packed)
    with pytest.raises(EarlyBertError, match="damaged.json.gz"):
        squad_files.read(tmp_path / "damaged.json.gz")
    row = {"id": [b"a"], "question": [b"\xff"], "context": [b"one"], "answers": [None]}
    table = pa.table({**row, "question": pa.array([b"\xff"]).view(pa.string())})
    pa.parquet.write_table(table, tmp_path / "letters.parquet")
    with pytest.raises(EarlyBertError, match="letters.parquet"):
        squad_files.read(tmp_path / "letters.parquet")
    with pytest.raises(EarlyBertError, match="or a stride below 33"):
        squad.windows([question("a", "a")], LETTERS, length=100, stride=33)
    with pytest.raises(EarlyBertError, match="use a sequence_length of at least 68"):
        squad.check_room(length=67, stride=0)
    squad.check_room(length=68, stride=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="SQuAD's files are not here")
def test_the_real_files_have_their_official_counts_and_perfect_answers_score_100():
    dev = squad_files.read(SHARED / "dev-v1.1.json.xz")
    assert len(dev) == 10570
    perfect = {q.id: q.answers[0] for q in dev}
    assert squad.evaluate(dev, perfect, impossible=False) == {"exact": 100.0, "f1": 100.0}
    part = squad_files.read(SHARED / "part-v2.0.json.xz")
    none = sum(not q.answers for q in part)
    assert len(part) == 6078 and 0 < none < 6078
    found = squad.evaluate(part, {q.id: "" for q in part}, impossible=True)
    assert found["exact"] == pytest.approx(100 * none / 6078) and found["unanswerable f1"] == 100


def test_questions_of_the_other_version_are_refused_with_the_task_that_they_are_for(tmp_path):
    for name, version, asked in (
        ("train-v1.1", "2.0", [question("one", "one", id="a"), question("two", id="b")]),
        ("train-v2.0", "1.1", [question("one", "one", id="a")]),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(as_json(*asked, impossible=version == "2.0")))
    with pytest.raises(EarlyBertError, match='question b has no answer.*use tasks=."squad2"'):
        squad_files.load(str(tmp_path), "squad", 0)
    with pytest.raises(EarlyBertError, match='not SQuAD 2.0; use tasks=."squad".*rajpurkar/squad_v2'):
        squad_files.load(str(tmp_path), "squad2", 0)
