"""Language models: text in blocks, conversations of which the answers are learnt, and what they say afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trady
from tests.command import trady_here
from tests.fresh_process import afresh
from tests.small_texts import WORDS, bert_folder, llama_folder, sentences, write_table
from tests.text_commands import finetune, predicted, refused, result_of
from trady.errors import DataError
from trady.training.texts.dataset import NO_LOSS
from trady.training.texts.language import PLAIN_TEMPLATE, blocks, conversations, read_chats
from trady.training.texts.load import read_for
from trady.training.texts.reading import Reading
from trady.training.texts.tokens import load_tokenizer

pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    found = load_tokenizer(str(llama))
    found.chat_template = PLAIN_TEMPLATE
    return found


def chats(count: int, seed: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": WORDS[label][0]}]}
        for text, label in sentences(count, seed)
    ]


def test_texts_are_packed_into_blocks_with_their_ends(tokenizer: Any) -> None:
    found = blocks(tokenizer, ["a film", "the plot is fine"], 5)
    stream = [4, *tokenizer("a film", add_special_tokens=False)["input_ids"], 5, 4]
    stream += [*tokenizer("the plot is fine", add_special_tokens=False)["input_ids"], 5]
    assert found.ids.flat.tolist() == stream[:10]
    assert found.ids.lengths.tolist() == [5, 5]
    assert found.lengths.tolist() == [4, 6]
    assert blocks(tokenizer, ["a film"], 64).ids.lengths.tolist() == [4]
    with pytest.raises(DataError, match="there is no text"):
        blocks(tokenizer, [], 8)


def test_answers_alone_are_learnt(tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": "a film"},
        {"role": "assistant", "content": "grand"},
        {"role": "user", "content": "the plot"},
        {"role": "assistant", "content": "very dull"},
    ]
    found = conversations(tokenizer, [chat], 64, refuse=False)
    ids, labels = found.ids[0].tolist(), found.labels[0].tolist()
    words = tokenizer.convert_ids_to_tokens([label for label in labels if label != NO_LOSS])
    assert [word for word in words if word not in ("\n", "</s>", "[UNK]")] == ["grand", "very", "dull"]
    assert all(label in (NO_LOSS, token) for token, label in zip(ids, labels, strict=True))
    assert "film" in tokenizer.convert_ids_to_tokens(ids)


def test_conversations_are_cut_left_out_or_refused(tokenizer: Any) -> None:
    short, long = (
        chats(1, 0)[0]["messages"],
        [
            {"role": "user", "content": "a " * 40},
            {"role": "assistant", "content": "fine"},
        ],
    )
    found = conversations(tokenizer, [short, long], 30, refuse=False)
    assert (len(found.ids), found.cut, found.lost) == (1, 1, 1)
    with pytest.raises(DataError, match=r"conversation 2 has \d+ tokens, and up to 30 are taken"):
        conversations(tokenizer, [short, long], 30, refuse=True)
    with pytest.raises(DataError, match=r"no conversation has an answer within 30 tokens"):
        conversations(tokenizer, [long], 30, refuse=False)
    with pytest.raises(DataError, match=r"conversation 1 has no answer: no message has the role assistant"):
        conversations(tokenizer, [short[:1]], 30, refuse=False)


def test_conversations_are_read_in_the_words_that_others_have() -> None:
    expected = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    shared = {"conversations": [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]]}
    assert read_chats(shared, ("conversations",)) == expected
    assert read_chats({"prompt": ["a"], "completion": ["b"]}, ("prompt", "completion")) == expected
    with pytest.raises(DataError, match=r"conversation 1 is 'a', not a list of messages"):
        read_chats({"messages": ["a"]}, ("messages",))
    with pytest.raises(DataError, match=r"conversation 1 has the message .* which lacks a role or a content"):
        read_chats({"messages": [[{"role": "user"}]]}, ("messages",))


def test_the_last_tenth_of_one_text_is_held_out(llama: Path, tmp_path: Path) -> None:
    text = "\n".join(text for text, _ in sentences(200, 0))
    (tmp_path / "book.txt").write_text(text)
    parts = read_for(str(llama), Reading(str(tmp_path / "book.txt"), longest=16))
    found = parts.train.tokenizer.decode(parts.evaluation.columns["input_ids"][0])
    assert found.removeprefix("<s>").split()[:5] != text.split()[:5]
    sizes = [len(part) for part in (parts.train, parts.evaluation)]
    assert sizes[0] == pytest.approx(9 * sizes[1], rel=0.2)
    assert "attention_mask" not in parts.train.batch([0, 1])


def test_a_text_is_learnt_and_gone_on_with(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n".join(["the film was grand"] * 400))
    said = finetune(
        llama, tmp_path / "book.txt", tmp_path / "run", "--policy", "full", "--epochs", 3, "--max-length", 16
    )
    assert "tokens to train on and" in said
    assert "blocks of 16" in said
    result = result_of(tmp_path / "run")
    assert result["accuracy"] is None
    assert result["measures"]["perplexity"] < 3
    shown = predicted(tmp_path / "run", "the film", "--max-new-tokens", 2)["predictions"]
    assert shown == [{"text": "the film", "generated": " was grand"}]
    shown_as_text = trady_here("predict", tmp_path / "run", "the film", "", "--max-new-tokens", 2)
    assert "the film was grand" in shown_as_text.stdout
    assert "cannot be gone on with: the prompt is empty" in shown_as_text.stdout
    found = afresh(
        f"""
import json, transformers
write = transformers.pipeline("text-generation", model={str(tmp_path / "run")!r})
said = write("the film", max_new_tokens=2, do_sample=False, return_full_text=False)
print(json.dumps(said[0]["generated_text"]))
"""
    )
    assert found.split() == ["was", "grand"]
    finetune(tmp_path / "run", tmp_path / "book.txt", tmp_path / "on", "--budget", "1 MiB", "--max-length", 16)
    assert result_of(tmp_path / "on")["measures"]["perplexity"] < 3
    labelled = write_table(tmp_path / "d.csv", sentences(40, 0))
    finetune(tmp_path / "run", labelled, tmp_path / "head", "--policy", "head")
    body = trady.load(tmp_path / "run").model.state_dict()
    head = trady.load(tmp_path / "head").model.state_dict()
    assert all(torch.equal(value, head[name]) for name, value in body.items() if name in head)


def test_answers_are_learnt_inside_a_budget_and_given(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, chats(120, 0))))
    said = finetune(llama, tmp_path / "chat.jsonl", tmp_path / "run", "--budget", "1 MiB", "--epochs", 4, "--lr", 0.02)
    assert "the tokenizer has no chat template: it gets a plain one" in said
    assert "conversations, whose answers are learnt" in said
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert history[-1]["measures"]["perplexity"] < history[0]["measures"]["perplexity"]
    answers = [trady.load(tmp_path / "run").predict(text)[0].label for text, _ in sentences(4, 1)]
    assert set(answers) <= {"awful", "fine"}
    done = trady_here("predict", tmp_path / "run", "a film", "--temperature", 1.0, "--out", tmp_path / "p.csv")
    assert done.returncode == 0
    assert (tmp_path / "p.csv").read_text().startswith("prompt,generated\n")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    assert again.chat_template == PLAIN_TEMPLATE


def test_parts_of_a_batch_have_the_gradient_of_the_batch(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, chats(40, 0))))
    for name, more in (("whole", ()), ("parts", ("--micro-batch", 2))):
        options = ("--policy", "full", "--optimizer", "sgd", "--mode", "eval", *more)
        finetune(llama, tmp_path / "chat.jsonl", tmp_path / name, *options)
    whole, parts = (trady.load(tmp_path / name).model.state_dict() for name in ("whole", "parts"))
    assert all(torch.allclose(value, parts[name], atol=1e-6) for name, value in whole.items())


def test_models_that_cannot_continue_a_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n".join(text for text, _ in sentences(50, 0)))
    bert = bert_folder(tmp_path / "bert")
    options = ("--policy", "full", "--out", tmp_path / "run")
    assert "sees a text from both sides" in " ".join(refused("finetune", bert, tmp_path / "book.txt", *options).split())
    t5 = llama_folder(tmp_path / "t5")
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**small, decoder_start_token_id=0)).save_pretrained(
        t5
    )
    said = " ".join(refused("finetune", t5, tmp_path / "book.txt", *options).split())
    assert "reads one text and writes another (t5), which trady does not train from the command line" in said


def test_a_prompt_that_is_empty_or_too_long_has_a_row_that_says_so(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n".join(text for text, _ in sentences(50, 0)))
    finetune(llama, tmp_path / "book.txt", tmp_path / "run", "--policy", "full", "--max-length", 16)
    found = trady.load(tmp_path / "run").predict(["", "a " * 80, "the film"])
    assert [each.error is None for each in found] == [False, False, True]
    assert "the prompt is empty" in str(found[0].error)
    assert "the model takes 64 with what it says" in str(found[1].error)
