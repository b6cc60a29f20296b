"""Order, masks, packing and the loader: the same data on any number of ranks, after any stop."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ranks
from corpora import CLS, MASK, PAD, SEP, V, random_documents, write_corpus
from earlybert.config import EarlyBertError, SettingsError
from earlybert.data import (
    DataSettings,
    PackedSamples,
    Position,
    Split,
    check_vocabulary,
    split_documents,
)
from earlybert.loader import Loader, MicroBatch, held_out_batches
from earlybert.masking import mask, predictions_a_row, read_vocabulary, words_a_row
from earlybert.mixing import BLOCK
from earlybert.order import key_of, permute, words
from earlybert.shards import Corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", random_documents(60, longest=90))


@pytest.fixture(scope="module")
def telling_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Document d is ten tokens from 10 d + 5 up, each a sentence, so a token names document and place."""
    documents = [(np.arange(10) + 10 * d + 5, list(range(10))) for d in range(49)]
    return write_corpus(tmp_path_factory.mktemp("data") / "telling", documents)


def packed(
    corpus: Corpus, *, length: int = 16, seed: int = 1, split: Split = "train", **changes
) -> PackedSamples:
    chosen = DataSettings(**{"corpus": str(corpus.folder), "held_out": 0.1, **changes})
    return PackedSamples(corpus, settings=chosen, sequence_length=length, seed=seed, split=split)


@contextmanager
def loading(samples: PackedSamples, **changes) -> Iterator[Loader]:
    shape = {"micro_batch": 4, "accumulation": 1, "rank": 0, "world_size": 1}
    with closing(Loader(samples, **{**shape, **changes})) as loader:
        yield loader


def take(loader: Loader, count: int) -> list[MicroBatch]:
    return [{name: tensor.clone() for name, tensor in next(loader).items()} for _ in range(count)]


def assert_same(a: list[MicroBatch], b: list[MicroBatch]) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def unmasked(batch: MicroBatch) -> torch.Tensor:
    """Put the labels back where they were masked."""
    input_ids = batch["input_ids"].clone()
    row, slot = (batch["masked_labels"] >= 0).nonzero(as_tuple=True)
    input_ids[row, batch["masked_positions"][row, slot]] = batch["masked_labels"][row, slot]
    return input_ids


# order


@given(length=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_the_permutation_is_a_bijection(length: int, key: int) -> None:
    found = permute(np.arange(length), length=length, key=key)
    assert np.array_equal(np.sort(found), np.arange(length))


@given(length=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
@settings(max_examples=40, deadline=None)
def test_one_position_is_sent_where_an_array_sends_it(length: int, key: int, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=5)))
    assert permute(places, length=length, key=key).tolist() == [
        permute(int(place), length=length, key=key) for place in places
    ]


def test_each_place_is_as_likely_as_another() -> None:
    seen = np.zeros((12, 12))
    for key in range(3000):
        seen[np.arange(12), permute(np.arange(12), length=12, key=key_of("test", key))] += 1
    expected = 3000 / 12
    assert ((seen - expected) ** 2 / expected).sum() < 250  # 121 degrees of freedom: mean 121, deviation 16


def test_a_position_outside_is_refused() -> None:
    with pytest.raises(IndexError, match="position 7 of 7"):
        permute(7, length=7, key=1)


def test_order_and_words_are_the_ones_that_old_checkpoints_count_on() -> None:
    assert permute(np.arange(8), length=8, key=key_of("order", "train", 0, 0)).tolist() == [
        6,
        0,
        7,
        3,
        2,
        5,
        4,
        1,
    ]
    found = words(2, seed=1, purpose="train mask", epoch=2, sample=3)
    assert found.tolist() == [15626386120433315668, 8878966770080071764]


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), unique=True, min_size=2, max_size=2))
@settings(max_examples=20, deadline=None)
def test_no_two_keys_share_random_words(keys: list[tuple[int, int, int]]) -> None:
    a, b = (words(200, seed=s, purpose="p", epoch=e, sample=i) for s, e, i in keys)
    assert not np.intersect1d(a, b).size


# masks


def random_rows(vocabulary_size: int, *, rows: int, length: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocabulary_size, (rows, length))  # [UNK], [SEP] and the like among them
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    for row in range(0, rows, 3):  # every third row is short
        end = int(rng.integers(4, length))
        tokens[row, end - 1], tokens[row, end:] = SEP, PAD
    return tokens


def masked(corpus: Corpus, tokens: np.ndarray, *, probability: float, whole_word: bool, seed: int = 0):
    P = predictions_a_row(tokens.shape[1], probability=probability)
    width = words_a_row(tokens.shape[1], predictions=P)
    chance = [words(width, seed=seed, purpose="test", epoch=0, sample=i) for i in range(len(tokens))]
    return mask(
        tokens,
        read_vocabulary(corpus.tokenizer_folder),
        words_BW=np.stack(chance),
        probability=probability,
        predictions=P,
        whole_word=whole_word,
    )


@given(
    length=st.integers(8, 80),
    probability=st.floats(0.01, 0.6),
    whole_word=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_masks_keep_their_promises(
    corpus: Corpus, length: int, probability: float, whole_word: bool, seed: int
) -> None:
    tokens = random_rows(V, rows=6, length=length, seed=seed)
    before = tokens.copy()
    input_ids, positions, labels = masked(corpus, tokens, probability=probability, whole_word=whole_word)
    P = max(1, round(probability * (length - 2)))
    assert np.array_equal(tokens, before) and positions.shape == labels.shape == (6, P)
    for row in range(6):
        eligible = int((tokens[row] > MASK).sum())
        wanted = max(1, round(probability * (int((tokens[row] != PAD).sum()) - 2)))
        used = labels[row] >= 0
        if whole_word:
            assert used.sum() <= min(P, wanted, eligible)
        else:
            assert used.sum() == min(P, wanted, eligible)
        places = positions[row][used]
        assert np.array_equal(np.sort(used)[::-1], used) and (np.diff(places) > 0).all()
        assert (positions[row][~used] == 0).all() and (labels[row][~used] == -100).all()
        assert np.array_equal(tokens[row][places], labels[row][used])
        assert (tokens[row][places] > MASK).all(), "a special token was masked"
        assert (input_ids[row][places] >= MASK).all(), "a random replacement was a special token"
        untouched = np.setdiff1d(np.arange(length), places)
        assert np.array_equal(input_ids[row][untouched], tokens[row][untouched])


def test_a_full_row_asks_for_exactly_the_same_number_of_predictions(corpus: Corpus) -> None:
    tokens = np.random.default_rng(0).integers(5, V, (50, 128))
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    for whole_word in (False, True):
        _, _, labels = masked(corpus, tokens, probability=0.15, whole_word=whole_word)
        assert ((labels >= 0).sum(axis=1) == round(0.15 * 126)).all()


def test_eight_of_ten_become_mask_one_is_random_one_stays(corpus: Corpus) -> None:
    tokens = np.random.default_rng(0).integers(5, V, (800, 128))
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    input_ids, positions, labels = masked(corpus, tokens, probability=0.15, whole_word=False)
    found = np.take_along_axis(input_ids, positions, axis=1)
    n = labels.size
    for share, expected in [
        ((found == MASK).mean(), 0.8),
        ((found == labels).mean(), 0.1 + 0.1 / (V - 5)),
        (((found != MASK) & (found != labels)).mean(), 0.1 - 0.1 / (V - 5)),
    ]:
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
    every_place = np.bincount(positions.ravel(), minlength=128)[1:127]
    assert every_place.min() > 0.5 * every_place.mean() and every_place.max() < 1.5 * every_place.mean()


def test_whole_words_stay_whole(corpus: Corpus) -> None:
    tokens = random_rows(V, rows=60, length=64, seed=3)
    _, positions, labels = masked(corpus, tokens, probability=0.3, whole_word=True)
    for row in range(60):
        chosen = set(positions[row][labels[row] >= 0].tolist())
        place = 1
        while place < 64:  # reference: walk from word to word
            if tokens[row][place] <= MASK:
                place += 1
                continue
            word = [place]
            while tokens[row][word[-1] + 1] > MASK and tokens[row][word[-1] + 1] % 3 == 0:
                word.append(word[-1] + 1)
            assert chosen.issuperset(word) or chosen.isdisjoint(word)
            place = word[-1] + 1
    assert (labels >= 0).sum() > 0.9 * sum(max(1, round(0.3 * ((r != PAD).sum() - 2))) for r in tokens)


def test_a_tokenizer_without_bert_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"[PAD]": 0, "a": 1}}}))
    with pytest.raises(EarlyBertError, match=r"has no token '\[CLS\]'"):
        read_vocabulary(tmp_path)


def test_other_names_of_special_tokens_are_read(tmp_path: Path) -> None:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<mask>": 3, "<unk>": 4, "a": 5, "##b": 6}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {"model": {"vocab": vocabulary}, "added_tokens": [{"content": "<x>", "id": 7, "special": True}]}
        )
    )
    names = {"pad": "<pad>", "cls": "<s>", "sep": "</s>", "mask": {"content": "<mask>"}, "unk": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({f"{k}_token": v for k, v in names.items()}))
    found = read_vocabulary(tmp_path)
    assert (found.pad, found.cls, found.sep, found.mask, found.size) == (0, 1, 2, 3, 8)
    assert found.replacements.tolist() == [5, 6] and np.flatnonzero(found.continues_V).tolist() == [6]


# packing


def test_boundaries_number_the_documents_of_a_row_and_count_positions_in_each(telling_corpus: Corpus) -> None:
    samples = packed(telling_corpus, length=31, boundaries=True)
    plain = packed(telling_corpus, length=31)
    assert samples.fingerprint != plain.fingerprint
    ids, epochs = samples.ids(np.arange(len(samples)))
    rows, same = samples.rows(ids, epochs=epochs), plain.rows(ids, epochs=epochs)
    assert np.array_equal(rows["input_ids"], same["input_ids"])
    tokens = rows["input_ids"].copy()
    for row, where, label in zip(tokens, rows["masked_positions"], rows["masked_labels"], strict=True):
        row[where[label >= 0]] = label[label >= 0]  # as they were
    for row, segments, positions in zip(tokens, rows["segments"], rows["position_ids"], strict=True):
        assert segments[0] == positions[0] == 0
        for place in range(1, len(row)):
            begins = row[place - 1] == samples.vocabulary.sep
            assert segments[place] == segments[place - 1] + begins
            assert positions[place] == (0 if begins else positions[place - 1] + 1)
            if segments[place] and row[place] != samples.vocabulary.sep:  # begun in this row
                assert positions[place] == (row[place] - 5) % 10
    with pytest.raises(SettingsError, match='boundaries = true needs objective = "mlm"'):
        packed(telling_corpus, boundaries=True, objective="mlm+nsp")


@pytest.mark.parametrize("length", [8, 16, 33])
def test_pieces_are_the_stream_cut_in_pieces(corpus: Corpus, length: int) -> None:
    samples = packed(corpus, length=length)
    train = split_documents(corpus, settings=samples.settings, split="train")
    stream = [token for i in train for token in [*corpus.document(int(i))[0].tolist(), SEP]]
    room = length - 2
    assert len(samples) == len(stream) // room
    rows = samples.rows(np.arange(len(samples)), epochs=np.zeros(len(samples), dtype=np.int64))
    restored = unmasked({name: torch.from_numpy(array) for name, array in rows.items()})
    for sample, row in enumerate(restored.tolist()):
        assert row == [CLS, *stream[sample * room : (sample + 1) * room], SEP]


@pytest.mark.parametrize("objective", ["mlm", "mlm+sop"])
def test_every_training_token_comes_once_an_epoch_up_to_the_dropped_tail(
    telling_corpus: Corpus, objective: str
) -> None:
    samples = packed(telling_corpus, length=11, objective=objective)
    train = split_documents(telling_corpus, settings=samples.settings, split="train")
    with loading(samples, micro_batch=len(samples)) as loader:
        for batch in take(loader, 2):
            seen = Counter(unmasked(batch).flatten().tolist())
            expected = Counter(token for i in train for token in telling_corpus.document(int(i))[0].tolist())
            missing = expected - Counter({token: n for token, n in seen.items() if token > MASK})
            assert set(token for token in seen if token > MASK) <= set(expected)
            assert max(n for token, n in seen.items() if token > MASK) == 1
            assert sum(missing.values()) < (11 - 2 if objective == "mlm" else 1)


def parts(batch: MicroBatch, row: int) -> tuple[list[int], list[int]]:
    """Read A and B from a row, checking its frame, types and attention."""
    tokens = unmasked(batch)[row].tolist()
    length = int(batch["attention_mask"][row].sum())
    middle = tokens.index(SEP)
    assert (
        tokens[0] == CLS and tokens[length - 1] == SEP and tokens[length:] == [PAD] * (len(tokens) - length)
    )
    assert batch["attention_mask"][row, :length].all()
    types = [0] * (middle + 1) + [1] * (length - middle - 1) + [0] * (len(tokens) - length)
    assert batch["token_type_ids"][row].tolist() == types
    return tokens[1:middle], tokens[middle + 1 : length - 1]


@pytest.mark.parametrize("length", [9, 11, 16])
def test_next_sentence_label_1_means_that_b_is_from_another_document(
    telling_corpus: Corpus, length: int
) -> None:
    samples = packed(telling_corpus, length=length, objective="mlm+nsp")
    train = set(split_documents(telling_corpus, settings=samples.settings, split="train").tolist())
    labels = []
    with loading(samples, micro_batch=100) as loader:
        for batch in take(loader, 4):
            for row in range(100):
                first, second = parts(batch, row)
                documents = [{(token - 5) // 10 for token in part} for part in (first, second)]
                assert len(documents[0]) == len(documents[1]) == 1 and documents[0] | documents[1] <= train
                label = int(batch["next_sentence_label"][row])
                assert label == (documents[0] != documents[1])
                assert label or second[0] == first[-1] + 1
                assert (np.diff(first) == 1).all() and (np.diff(second) == 1).all()
                labels.append(label)
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / np.sqrt(len(labels))


def test_sentence_order_label_1_means_that_a_and_b_changed_places(telling_corpus: Corpus) -> None:
    samples = packed(telling_corpus, length=11, objective="mlm+sop")
    with loading(samples, micro_batch=200) as loader:
        (batch,) = take(loader, 1)
    for row in range(200):
        first, second = parts(batch, row)
        if batch["next_sentence_label"][row]:
            first, second = second, first
        assert second[0] == first[-1] + 1
    assert 60 < int(batch["next_sentence_label"].sum()) < 140


@given(
    lengths=st.lists(st.integers(1, 60), min_size=4, max_size=12),
    every=st.integers(1, 70),
    length=st.integers(8, 40),
    objective=st.sampled_from(["mlm", "mlm+nsp", "mlm+sop"]),
)
@settings(max_examples=30, deadline=None)
def test_documents_of_any_shape_are_packed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], every: int, length: int, objective: str
) -> None:
    documents = [(np.full(n, 5 + d), list(range(0, n, every))) for d, n in enumerate(lengths)]
    corpus = write_corpus(tmp_path_factory.mktemp("any") / "corpus", documents)
    try:
        samples = packed(corpus, length=length, objective=objective)
    except EarlyBertError as error:
        assert "larger corpus" in str(error)
        return
    with loading(samples, micro_batch=40) as loader:
        (batch,) = take(loader, 1)
    assert batch["input_ids"].shape == (40, length)
    if objective != "mlm":
        for row in range(40):
            first, second = parts(batch, row)
            assert len(set(first)) == len(set(second)) == 1
            assert (first[0] != second[0]) == (
                objective == "mlm+nsp" and bool(batch["next_sentence_label"][row])
            )


# the loader


def global_batches(samples: PackedSamples, *, world_size: int, total: int = 8, count: int = 6, **changes):
    """Global batches as every rank together sees them: the rows of micro 0 of all ranks, then micro 1, ..."""
    accumulation = total // (2 * world_size)
    ranks = []
    for rank in range(world_size):
        shape = {"micro_batch": 2, "accumulation": accumulation, "rank": rank, "world_size": world_size}
        with loading(samples, **shape, **changes) as loader:
            ranks.append(take(loader, accumulation * count))
    batches = []
    for k in range(count):
        micros = [ranks[r][k * accumulation + m] for m in range(accumulation) for r in range(world_size)]
        batches.append({name: torch.cat([micro[name] for micro in micros]) for name in micros[0]})
    return batches


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp", "mlm+sop"])
def test_global_batch_k_has_the_same_samples_and_masks_on_1_2_and_4_ranks(
    corpus: Corpus, objective: str
) -> None:
    samples = packed(corpus, objective=objective)
    alone = global_batches(samples, world_size=1)
    assert_same(global_batches(samples, world_size=2), alone)
    assert_same(global_batches(samples, world_size=4), alone)
    rows = torch.cat([unmasked(batch) for batch in alone])
    assert objective != "mlm" or len(torch.unique(rows, dim=0)) == len(rows), (
        "a sample came twice in an epoch"
    )


@given(
    steps=st.integers(0, 40),
    worlds=st.tuples(*[st.sampled_from([1, 2, 4])] * 2),
    objective=st.sampled_from(["mlm", "mlm+nsp"]),
)
@settings(max_examples=15, deadline=None)
def test_a_run_resumed_anywhere_on_any_number_of_ranks_continues_exactly(
    corpus: Corpus, steps: int, worlds: tuple[int, int], objective: str
) -> None:
    samples = packed(corpus, length=64, objective=objective)  # about 40 samples: epochs end within the steps
    unbroken = global_batches(samples, world_size=worlds[0], count=steps + 2)
    position = samples.position(steps * 8)
    assert position == Position(steps * 8 // len(samples), steps * 8 % len(samples), samples.fingerprint)
    position = Position(**json.loads(json.dumps(dataclasses.asdict(position))))
    assert_same(global_batches(samples, world_size=worlds[1], count=2, position=position), unbroken[steps:])


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # where there is no GPU to pin for
@pytest.mark.parametrize(("workers", "pinned"), [(1, False), (2, False), (1, True)])
def test_workers_change_nothing_and_the_position_counts_what_was_handed_out(
    corpus: Corpus, workers: int, pinned: bool
) -> None:
    samples = packed(corpus)
    with loading(samples, accumulation=2) as loader:
        expected = take(loader, 20)
    with loading(samples, accumulation=2, workers=workers, pin_memory=pinned) as loader:
        assert loader.position == samples.position(0)
        first = take(loader, 7)
        assert loader.position == samples.position(3 * 8), "half a global batch counts as none"
        first += take(loader, 1)
        position = loader.position
        assert position == samples.position(4 * 8)
    with loading(samples, accumulation=2, workers=workers, position=position) as loader:
        assert loader.position == position
        assert_same(first + take(loader, 12), expected)
        assert loader.position == samples.position(10 * 8)


def test_a_global_batch_crosses_from_one_epoch_into_the_next(corpus: Corpus) -> None:
    samples = packed(corpus)
    n = len(samples)
    ids, epochs = samples.ids(np.arange(3 * n))
    for epoch in range(3):
        assert np.array_equal(np.sort(ids[epochs == epoch]), np.arange(n))
    assert not np.array_equal(ids[:n], ids[n : 2 * n])
    with loading(samples, micro_batch=n + 3) as loader:
        (batch,) = take(loader, 1)
        assert loader.position == Position(1, 3, samples.fingerprint)
    rows = samples.rows(ids[: n + 3], epochs=epochs[: n + 3])
    assert np.array_equal(batch["input_ids"].numpy(), rows["input_ids"])


def test_masks_change_from_epoch_to_epoch_and_from_seed_to_seed(corpus: Corpus) -> None:
    ids = np.arange(20)
    first = packed(corpus).rows(ids, epochs=np.zeros(20, dtype=np.int64))
    next_epoch = packed(corpus).rows(ids, epochs=np.ones(20, dtype=np.int64))
    other_seed = packed(corpus, seed=2).rows(ids, epochs=np.zeros(20, dtype=np.int64))
    assert not np.array_equal(first["masked_positions"], next_epoch["masked_positions"])
    assert not np.array_equal(first["masked_positions"], other_seed["masked_positions"])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_left_alone(corpus: Corpus, workers: int) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with loading(packed(corpus), workers=workers) as loader:
        take(loader, 2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state


def hold_a_loader(folder: str) -> None:
    """Write the pids of a loader's worker and of the server that it was forked from, and wait to be
    killed."""
    samples = packed(Corpus.open(Path(folder) / "corpus"))
    with loading(samples, workers=1) as loader:
        next(loader)
        workers = loader._batches._workers
        pids = [workers[0].pid, psutil.Process(workers[0].pid).ppid()]
        (Path(folder) / "pids").write_text(json.dumps(pids))
        time.sleep(60)


@pytest.mark.thorough
def test_workers_are_not_forked_from_a_rank_and_go_when_it_is_killed(tmp_path: Path) -> None:
    """gloo's threads in a rank make a fork of it dangerous; a killed rank must leave no process behind."""
    write_corpus(tmp_path / "corpus", random_documents(20, longest=60))
    (rank,) = ranks.launch("test_data:hold_a_loader", [str(tmp_path)], ranks=1, logs=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    worker, server = json.loads((tmp_path / "pids").read_text())
    assert server != rank._process.pid and psutil.pid_exists(worker)
    rank.kill()
    rank.wait()
    while (psutil.pid_exists(worker) or psutil.pid_exists(server)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(worker) and not psutil.pid_exists(server)


def test_workers_live_through_the_signals_that_stop_a_job_and_end_with_the_loader(corpus: Corpus) -> None:
    before = set(multiprocessing.active_children())
    samples = packed(corpus)
    with loading(samples) as loader:
        expected = take(loader, 30)
    with loading(samples, workers=1) as loader:
        found = take(loader, 1)
        (worker,) = set(multiprocessing.active_children()) - before
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
        found += take(loader, 29)
        assert_same(found, expected)
    assert not set(multiprocessing.active_children()) - before
    loader.close()


# the held-out split


@given(share=st.floats(0.001, 0.999), objective=st.sampled_from(["mlm", "mlm+nsp"]))
@settings(max_examples=25, deadline=None)
def test_every_document_is_trained_on_or_held_out(corpus: Corpus, share: float, objective: str) -> None:
    chosen = DataSettings(corpus="x", held_out=share, objective=objective)  # type: ignore[arg-type]
    train, held = (split_documents(corpus, settings=chosen, split=split) for split in ("train", "held_out"))
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(len(corpus)))
    assert len(held) == min(max(round(60 * share), 2), 58)
    other = dataclasses.replace(chosen, objective="mlm" if objective == "mlm+nsp" else "mlm+nsp")
    assert np.array_equal(held, split_documents(corpus, settings=other, split="held_out")), (
        "rows that are evaluated under another objective were not trained on"
    )


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp"])
@pytest.mark.parametrize("limit", [None, 1, 13])
def test_the_held_out_batches_are_shared_between_ranks_without_loss(
    corpus: Corpus, objective: str, limit: int | None
) -> None:
    samples = packed(corpus, split="held_out", objective=objective)

    def counted(world_size: int) -> tuple[list[str], set[int]]:
        rows, batches = [], set()
        for rank in range(world_size):
            shares = list(
                held_out_batches(samples, micro_batch=3, rank=rank, world_size=world_size, limit=limit)
            )
            batches.add(len(shares))
            for batch in shares:
                assert batch["input_ids"].shape == (3, 16)
                for row in range(3):
                    if (batch["masked_labels"][row] >= 0).any():
                        rows.append(repr([tensor[row].tolist() for tensor in batch.values()]))
                    elif objective != "mlm":
                        assert batch["next_sentence_label"][row] == -100
        return sorted(rows), batches

    alone, _ = counted(1)
    assert len(alone) == (limit or len(samples))
    for world_size in (2, 3, 4):
        rows, batches = counted(world_size)
        assert rows == alone and len(batches) == 1, "ranks differ in their number of micro-batches"


def test_the_held_out_batches_are_the_same_for_every_seed_and_each_time(corpus: Corpus) -> None:
    def batches(seed: int) -> list[MicroBatch]:
        samples = packed(corpus, split="held_out", seed=seed)
        return list(held_out_batches(samples, micro_batch=4, rank=0, world_size=1))

    assert_same(batches(1), batches(1))
    assert_same(batches(1), batches(2))


# what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_probability": 0.0}, "mask_probability = 0.0"),
        ({"held_out": 1.0}, "held_out = 1.0"),
        ({"workers": -1}, "workers = -1"),
    ],
)
def test_settings_check_themselves(change: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DataSettings(corpus="x", **change)


CHANGES: list[Callable[[Corpus], PackedSamples]] = [
    lambda corpus: packed(corpus, seed=2),
    lambda corpus: packed(corpus, length=17),
    lambda corpus: packed(corpus, split="held_out"),
    lambda corpus: packed(corpus, objective="mlm+sop"),
    lambda corpus: packed(corpus, mask_probability=0.2),
    lambda corpus: packed(corpus, whole_word=True),
    lambda corpus: packed(corpus, held_out=0.2),
]


@pytest.mark.parametrize("changed", CHANGES)
def test_a_position_counted_in_other_data_is_refused(
    corpus: Corpus, changed: Callable[[Corpus], PackedSamples]
) -> None:
    position = packed(corpus).position(8)
    assert packed(corpus, workers=3).consumed(position) == 8
    with pytest.raises(EarlyBertError, match=r"fingerprint .* restore the corpus, seed"):
        Loader(changed(corpus), micro_batch=1, accumulation=1, rank=0, world_size=1, position=position)


def test_a_corpus_too_small_for_one_sample_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", [(np.arange(5, 12), [0]), (np.arange(5, 12), [0])])
    with pytest.raises(EarlyBertError, match=r"train split .* 7 tokens, too few for one sample of 128"):
        packed(corpus, length=128)
    with pytest.raises(EarlyBertError, match="or a larger held_out"):
        packed(corpus, length=128, split="held_out")
    with pytest.raises(EarlyBertError, match=r"has 2 documents, objective 'mlm\+nsp' .* needs 4"):
        packed(corpus, length=8, objective="mlm+nsp")


def test_a_vocabulary_that_does_not_match_the_shards_is_refused(corpus: Corpus) -> None:
    check_vocabulary(corpus, vocab_size=V, tokenizer_sha256=corpus.manifest.tokenizer_sha256)
    check_vocabulary(corpus, vocab_size=V + 12)
    with pytest.raises(EarlyBertError, match=rf"vocab_size {V - 1}.*{V} tokens; set it to {V} or more"):
        check_vocabulary(corpus, vocab_size=V - 1)
    with pytest.raises(EarlyBertError, match="tokenizer has sha256"):
        check_vocabulary(corpus, vocab_size=V, tokenizer_sha256="0" * 64)


def of_sources(folder: Path, sizes: dict[str, int]) -> Corpus:
    """A corpus of documents of ten tokens from three sources, mixed; a token names its document."""
    names = [name for name, count in sizes.items() for _ in range(count)]
    np.random.default_rng(0).shuffle(names)
    documents = [(np.arange(10) + 10 * d + 5, list(range(10))) for d in range(len(names))]
    return write_corpus(folder, documents, sources=names)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return of_sources(tmp_path_factory.mktemp("data") / "mixed", {"books": 12, "wikipedia": 25, "web": 12})


def source_of(corpus: Corpus, samples: PackedSamples, sample: int) -> str:
    (source,) = {corpus.origin(document)[0] for document in samples.documents_of(sample)}
    return source


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp", "mlm+sop"])
def test_samples_come_in_the_shares_of_the_weights_each_source_with_its_own_epochs(
    mixed: Corpus, objective: str
) -> None:
    samples = packed(mixed, objective=objective, weights={"books": 3.0, "wikipedia": 1.0, "web": 0.0})
    ids, epochs = samples.ids(np.arange(BLOCK))
    named = [source_of(mixed, samples, sample) for sample in ids.tolist()]
    assert Counter(named) == {"books": BLOCK * 3 // 4, "wikipedia": BLOCK // 4}
    seen = Counter(zip(named, epochs.tolist(), ids.tolist(), strict=True))
    assert set(seen.values()) == {1}  # no row comes twice in an epoch of its source
    for name in ("books", "wikipedia"):
        counts = Counter(epoch for source, epoch, _ in seen if source == name)
        *whole, last = (counts[epoch] for epoch in sorted(counts))
        assert sorted(counts) == list(range(len(counts)))
        assert len(set(whole)) == 1 and last <= whole[0]  # and none is left out
    rows = samples.rows(ids[:8], epochs=epochs[:8])
    assert rows["input_ids"].shape == (8, 16)


@pytest.mark.thorough
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_weights_are_kept_in_every_block_and_resume_at_any_position(
    mixed: Corpus, data: st.DataObject
) -> None:
    weights = data.draw(
        st.fixed_dictionaries({n: st.floats(0.1, 100) for n in ("books", "wikipedia", "web")})
    )
    samples = packed(mixed, weights=weights)
    start = data.draw(st.integers(0, 3 * BLOCK))
    ids, _ = samples.ids(np.arange(start, start + BLOCK))
    total = sum(weights.values())
    counts = Counter(source_of(mixed, samples, sample) for sample in ids.tolist())
    for name, weight in weights.items():
        assert abs(counts[name] - BLOCK * weight / total) <= 2
    again, _ = samples.ids(np.arange(start + 100, start + BLOCK))
    assert (again == ids[100:]).all()


def test_weights_are_part_of_the_position_and_held_out_rows_do_not_know_them(mixed: Corpus) -> None:
    even = dict.fromkeys(("books", "wikipedia", "web"), 1.0)
    plain, weighted = packed(mixed), packed(mixed, weights=even)
    assert plain.fingerprint != weighted.fingerprint != packed(mixed, weights=even | {"web": 2.0}).fingerprint
    with pytest.raises(EarlyBertError, match="the position in the data was counted with fingerprint"):
        weighted.consumed(plain.position(7))
    held = [packed(mixed, weights=weights, split="held_out") for weights in (None, even)]
    assert held[0].fingerprint == held[1].fingerprint and len(held[0]) == len(held[1])
    with loading(weighted, micro_batch=2, accumulation=2) as loader:
        assert len(take(loader, 3)) == 3


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"books": 1.0, "wikipedia": 1.0}, "nothing is said of web"),
        (
            {"books": 1.0, "wikipedia": 1.0, "web": 1.0, "news": 1.0},
            r"weights.news: the corpus has no source 'news'",
        ),
        ({"books": 1.0, "wikipedia": 1.0, "web": 1e-9}, "weights.web is less than one in 4,096"),
        ({"books": -1.0}, "weights.books = -1.0"),
        ({"books": 0.0}, "weights are all 0"),
    ],
)
def test_wrong_weights_name_the_source(mixed: Corpus, weights: dict[str, float], message: str) -> None:
    with pytest.raises(EarlyBertError, match=message):
        packed(mixed, weights=weights)


def test_a_source_too_small_for_a_sample_is_named(tmp_path: Path) -> None:
    corpus = of_sources(tmp_path / "c", {"books": 40, "web": 1})
    with pytest.raises(
        EarlyBertError, match="source 'web' in the train split .* too few for one sample of 64"
    ):
        packed(corpus, length=64, weights={"books": 1.0, "web": 1.0})
