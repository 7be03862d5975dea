"""Texts as data: columns and labels found, rows left out and held out, tokens, batches of like length, measures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.small_texts import bert_folder, sentences, write_table
from trady.errors import DataError
from trady.training.data.loaders import training_batches
from trady.training.texts.columns import Columns, find_columns
from trady.training.texts.dataset import NO_LOSS, LengthSampler, TextDataset
from trady.training.texts.labels import read_labels
from trady.training.texts.load import read_for
from trady.training.texts.objectives import Classification, MultiLabel, NextToken, Regression, macro_f1, mean_of_parts
from trady.training.texts.reading import Reading
from trady.training.texts.split import complete_rows, held_out, limited
from trady.training.texts.tables import Table
from trady.training.texts.tokens import encode, load_tokenizer, longest_of

pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")


def table(**columns: list[Any]) -> Table:
    return Table("t.csv", columns)


# Columns


@pytest.mark.parametrize(
    ("names", "texts", "labels"),
    [
        (("idx", "sentence", "label"), ("sentence",), ("label",)),
        (("label", "Text"), ("Text",), ("label",)),
        (("premise", "hypothesis", "label"), ("premise", "hypothesis"), ("label",)),
        (("question", "answer", "target"), ("question", "answer"), ("target",)),
        (("sentence1", "sentence2", "score"), ("sentence1", "sentence2"), ("score",)),
        (("text",), ("text",), ()),
    ],
)
def test_columns_are_found_by_name(names: tuple[str, ...], texts: tuple[str, ...], labels: tuple[str, ...]) -> None:
    assert find_columns(table(**{name: ["x"] for name in names})) == Columns(texts, labels)


@pytest.mark.parametrize("names", [("messages",), ("prompt", "completion"), ("instruction", "output")])
def test_conversations_are_found_by_name(names: tuple[str, ...]) -> None:
    assert find_columns(table(**{name: ["x"] for name in names})) == Columns(names, (), chat=True)


def test_columns_that_are_said_go_before_those_that_are_found() -> None:
    given = table(text=["x"], label=["0"], satz=["y"], urteil=["1"])
    assert find_columns(given, ("satz",), ("urteil",)) == Columns(("satz",), ("urteil",))
    assert find_columns(given, task="language-model") == Columns(("text",), ())


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        (("satz", "urteil"), ((), ()), r"no column of texts that trady knows.*it has satz, urteil.*--text-column NAME"),
        (("text", "urteil"), ((), ()), r"no column of labels.*it has text, urteil.*--label-column.*--task language-m"),
        (("premise", "hypothesis"), ((), ()), r"pairs of texts \(premise and hypothesis\) and no column of labels"),
        (
            ("text", "label"),
            (("txet",), ()),
            r"no column 'txet' \(--text-column\); it has text, label. Did you mean text",
        ),
        (("text", "label"), ((), ("x",)), r"no column 'x' \(--label-column\); it has text, label"),
        (("tokens", "ner_tags"), ((), ()), r"a label for each word \(ner_tags\).*trady.tune"),
    ],
)
def test_columns_that_are_missing_are_refused_with_those_that_there_are(
    names: tuple[str, ...], asked: tuple[tuple[str, ...], tuple[str, ...]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        find_columns(table(**{name: ["x"] for name in names}), *asked)


# Labels


@pytest.mark.parametrize(
    ("values", "task", "classes", "numbers"),
    [
        (["pos", "neg", "pos"], "classification", ("neg", "pos"), [1, 0, 1]),
        (["10", "9", "10"], "classification", ("9", "10"), [1, 0, 1]),
        ([True, False], "classification", ("False", "True"), [1, 0]),
        ([1.0, 0.0], "classification", ("0", "1"), [1, 0]),
        (["0.5", "2", "1e1"], "regression", (), [0.5, 2.0, 10.0]),
        ([["a", "b"], [], ["b"]], "multi-label", ("a", "b"), [[1, 1], [0, 0], [0, 1]]),
    ],
)
def test_labels_say_what_they_are_for(
    values: list[Any], task: str, classes: tuple[str, ...], numbers: list[Any]
) -> None:
    found = read_labels(table(label=values), ("label",))
    assert (found.task, found.classes, found.values.tolist()) == (task, classes, numbers)


def test_several_columns_of_zeros_and_ones_are_several_labels() -> None:
    found = read_labels(table(rude=["0", "1"], false=[True, False]), ("rude", "false"))
    assert (found.task, found.classes) == ("multi-label", ("rude", "false"))
    assert found.values.tolist() == [[0, 1], [1, 0]]


def test_whole_numbers_are_numbers_where_somebody_says_so() -> None:
    assert read_labels(table(label=["1", "5"]), ("label",), "regression").values.tolist() == [1.0, 5.0]
    assert read_labels(table(label=["1", "x"]), ("label",), "classification").classes == ("1", "x")


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (["1", "0", "pos"], {}, r"labels of mixed types: 2 numbers and 1 texts; row 3 is 'pos'.*--task classification"),
        (["pos", "pos"], {}, r"one class only, 'pos'"),
        (list(map(str, range(60))), {}, r"60 different whole numbers in 60 rows.*--task regression"),
        (["a", "b"], {"task": "regression"}, r"holds 'a', which is no number"),
        (["a", "b"], {"task": "multi-label"}, r"one label a text; several are a list"),
        (["a", "c"], {"classes": ("a", "b")}, r"classes that the training part has not: c; there are a, b"),
        ([["a"], "b"], {}, r"labels of mixed types: most are lists, and row 2 is 'b'"),
        ([[], []], {}, r"no label at all"),
    ],
)
def test_labels_that_cannot_be_are_refused(values: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(table(label=values), ("label",), **options)


def test_a_column_of_several_labels_that_holds_something_else_is_refused() -> None:
    with pytest.raises(DataError, match=r"column b, row 2 is '2'; where each label has a column, it holds 0 or 1"):
        read_labels(table(a=["0", "1"], b=["0", "2"]), ("a", "b"))


# Rows


def test_rows_without_a_text_or_a_label_are_left_out_and_named() -> None:
    given = table(text=["a", " ", "c", None], label=["0", "1", "", "1"])
    kept, remark = complete_rows(given, ("text",), ("label",))
    assert list(kept.columns["text"]) == ["a"]
    assert remark == "left out of t.csv: 3 rows: 2 (text is empty), 3 (label is empty), 4 (text is empty)"
    with pytest.raises(DataError, match=r"no row with text and label: all 1 lack one"):
        complete_rows(table(text=[""], label=["1"]), ("text",), ("label",))
    with pytest.raises(DataError, match=r"column text, row 1 is a list, not a text"):
        complete_rows(table(text=[["a"]], label=["1"]), ("text",), ("label",))


def test_a_tenth_is_held_out_with_every_class_in_it() -> None:
    keys = np.asarray([0] * 70 + [1] * 20 + [2] * 10)
    kept, apart = held_out(100, keys, 3, "t")
    assert sorted([*kept, *apart]) == list(range(100))
    assert np.bincount(keys[apart]).tolist() == [7, 2, 1]
    assert held_out(100, keys, 3, "t")[1].tolist() == apart.tolist()
    assert held_out(100, keys, 4, "t")[1].tolist() != apart.tolist()
    assert [len(part) for part in held_out(3, None, 0, "t")] == [2, 1]
    rare = np.asarray([0] * 15 + list(range(1, 26)))
    assert set(rare[held_out(40, rare, 0, "t")[0]].tolist()) == set(range(26))
    with pytest.raises(DataError, match=r"t has 1 row; two are needed"):
        held_out(1, None, 0, "t")


def test_a_limit_keeps_the_order_and_goes_by_the_seed() -> None:
    given = table(text=[str(number) for number in range(50)])
    found = [int(value) for value in limited(given, 10, 1).columns["text"]]
    assert found == sorted(found)
    assert len(found) == 10
    assert found != [int(value) for value in limited(given, 10, 2).columns["text"]]
    assert limited(given, None, 0) is given


# Tokens


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("models") / "bert")


def test_texts_and_pairs_become_the_tokens_of_the_tokenizer(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))
    one = encode(tokenizer, [["a film", "the plot is fine"]], 32, "truncate")
    assert [one.columns["input_ids"][at].tolist() for at in (0, 1)] == tokenizer(["a film", "the plot is fine"])[
        "input_ids"
    ]
    two = encode(tokenizer, [["a film"], ["was dull"]], 32, "truncate")
    assert two.columns["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_a_long_text_is_cut_or_split_or_refused(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))
    texts = [["a film", " ".join(["plot"] * 50), "the end"]]
    cut = encode(tokenizer, texts, 16, "truncate")
    assert (cut.cut, cut.rows.tolist(), cut.columns["input_ids"].lengths.tolist()) == (1, [0, 1, 2], [4, 16, 4])
    split = encode(tokenizer, texts, 16, "split")
    assert split.rows.tolist() == [0, 1, 1, 1, 1, 2]
    plot = tokenizer.convert_tokens_to_ids("plot")
    parts = [split.columns["input_ids"][at].tolist() for at in range(1, 5)]
    assert all(len(part) <= 16 for part in parts)
    assert sum(part.count(plot) for part in parts) == 50 + 3 * 2  # two of each part are in the part before as well
    with pytest.raises(DataError, match=r"1 texts are longer than 16 tokens \(row 2; the longest has 52\).*--overflow"):
        encode(tokenizer, texts, 16, "error")
    with pytest.raises(DataError, match=r"--overflow split cuts single texts"):
        encode(tokenizer, texts * 2, 16, "split")


@pytest.mark.parametrize(
    ("tokenizer_limit", "config", "expected"),
    [
        (512, transformers.BertConfig(max_position_embeddings=256), 256),
        (int(1e30), transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (int(1e30), transformers.GPT2Config(n_positions=1024), 1024),
        (512, transformers.T5Config(), 512),
        (int(1e30), transformers.T5Config(), None),
    ],
)
def test_what_a_model_takes_at_most(tokenizer_limit: int, config: Any, expected: int | None) -> None:
    assert longest_of(SimpleNamespace(model_max_length=tokenizer_limit), config) == expected


# Batches


@pytest.fixture(scope="module")
def data(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    path = write_table(tmp_path_factory.mktemp("data") / "d.csv", sentences(103, 0))
    return read_for(str(bert), Reading(str(path))).train


def test_a_batch_is_padded_to_a_multiple_of_eight_and_masked(data: TextDataset) -> None:
    batch = data.batch([0, 1, 2])
    longest = max(int(data.lengths[at]) for at in range(3))
    assert batch["input_ids"].shape == (3, -(-longest // 8) * 8)
    assert batch["attention_mask"].sum(1).tolist() == data.lengths[:3].tolist()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert batch["labels"].tolist() == [data.labels[at] for at in range(3)]


def test_no_batch_is_larger_than_the_largest(data: TextDataset) -> None:
    largest = data.largest(8)
    assert largest["input_ids"].shape[0] == 8
    assert not largest["attention_mask"].all()
    loader = training_batches(data, 8, 0)
    widths = [batch["input_ids"].shape[1] for batch in loader]
    assert max(widths) == widths[0] == largest["input_ids"].shape[1]


def test_an_epoch_has_every_text_once_in_batches_of_like_length(data: TextDataset) -> None:
    sampler = LengthSampler(data.lengths, 8, 5)
    first = list(sampler)
    assert sorted(first) == list(range(len(data)))
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    batches = [first[start : start + 8] for start in range(0, len(first), 8)]
    spread = np.mean([np.ptp(data.lengths[batch]) for batch in batches])
    order = np.random.default_rng(0).permutation(len(data))
    at_random = np.mean([np.ptp(data.lengths[order[start : start + 8]]) for start in range(0, len(data), 8)])
    assert spread < at_random / 3


def test_the_order_of_an_evaluation_is_by_length(data: TextDataset) -> None:
    ordered = data.by_length()
    assert (np.diff(ordered.lengths) <= 0).all()
    assert sorted(ordered.rows.tolist()) == sorted(data.rows.tolist())


# Measures


def test_macro_f1_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    said, right = (torch.randint(5, (200,), generator=generator) for _ in range(2))
    said[said == 3] = 4
    assert macro_f1(said, right, 6) == pytest.approx(metrics.f1_score(right, said, average="macro"))


def test_measures_of_numbers_and_of_several_labels() -> None:
    metrics, statistics = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randn(50, 2, generator=generator)
    accuracy, found = Regression().measure(pairs)
    assert accuracy is None
    assert found["mse"] == pytest.approx(float(((pairs[:, 0] - pairs[:, 1]) ** 2).mean()), rel=1e-5)
    assert found["pearson"] == pytest.approx(float(statistics.pearsonr(*pairs.T.numpy()).statistic), rel=1e-5)
    assert Regression().measure(torch.ones(3, 2))[1]["pearson"] == 0.0
    scores, right = torch.randn(60, 3, generator=generator), torch.randint(2, (60, 3), generator=generator)
    accuracy, found = MultiLabel().measure(torch.cat([scores, right.float()], 1))
    said = (scores > 0).int()
    assert accuracy == pytest.approx(metrics.accuracy_score(right, said))
    for name in ("macro", "micro"):
        assert found[f"{name}_f1"] == pytest.approx(metrics.f1_score(right, said, average=name))


def test_the_loss_of_a_language_model_is_that_of_its_parts_and_ignores_padding() -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(4, 6, 9, generator=generator)
    labels = torch.randint(9, (4, 6), generator=generator)
    labels[0, 3:], labels[2, :4] = NO_LOSS, NO_LOSS
    objective = NextToken()
    whole = objective.loss(scores, labels)
    parts = [objective.loss(scores[start : start + 2], labels[start : start + 2]) for start in (0, 2)]
    assert torch.allclose(whole, torch.stack(parts).mean())
    losses = [
        -scores[n, t].log_softmax(-1)[labels[n, t + 1]] for n in range(4) for t in range(5) if labels[n, t + 1] >= 0
    ]
    expected = float(torch.stack(losses).mean().exp())
    assert objective.measure(objective.values(scores, labels))[1]["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_the_parts_of_a_text_are_judged_together() -> None:
    values = torch.tensor([[3.0, 0.0, 1.0], [0.0, 4.0, 1.0], [2.0, 0.0, 0.0]])
    rows = np.asarray([7, 7, 2])
    assert mean_of_parts(values, rows).tolist() == [[1.5, 2.0, 1.0], [2.0, 0.0, 0.0]]
    assert Classification(2, rows).measure(values)[0] == 1.0
    assert Classification(2).measure(values)[0] == pytest.approx(2 / 3)
