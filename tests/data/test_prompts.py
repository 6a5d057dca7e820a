"""Generation and instruction data: what is read, what carries the loss, what is cut, left out or refused."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, T5Config

from lte_lightning.data import DataError, GenerationData, InstructData
from lte_lightning.data.instruct import alpaca_prompt

ANIMALS = ["cat", "dog", "fish", "bird", "cow"]


def e2e_rows(*references):
    return [
        {"meaning_representation": f"name[{animal}]", "human_reference": reference.format(animal)}
        for animal in ANIMALS
        for reference in references or ["the {} eats."]
    ]


@pytest.fixture
def lm_folder(make_lm_tokenizer, tmp_path):
    """`lm_folder(chat=..., **tokens)` saves a tokenizer and returns its folder."""

    def save(**options):
        return str(make_lm_tokenizer(**options).save_pretrained(tmp_path / "lm")[0].rpartition("/")[0])

    return save


@pytest.fixture
def e2e(write_splits, lm_folder):
    def make(train=None, validation=None, tokens=None, **options):
        source = write_splits(train=train or e2e_rows(), validation=validation or e2e_rows())
        defaults = {"task": "e2e", "source": source, "max_length": 128, "max_new_tokens": 20, "batch_size": 3}
        return GenerationData(**{"tokenizer": lm_folder(**(tokens or {})), **defaults, **options})

    return make


@pytest.fixture
def instruct(write_splits, lm_folder):
    def make(rows, tokens=None, **options):
        defaults = {"source": write_splits(train=rows, validation=rows), "max_length": 256, "max_new_tokens": 20}
        return InstructData(**{"tokenizer": lm_folder(**(tokens or {})), **defaults, **options})

    return make


def texts(data, batch):
    """For each row its real tokens as text, and those that carry the loss."""
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        found.append((data.tokenizer.decode(ids[mask.bool()]), data.tokenizer.decode(ids[labels != -100])))
    return found


def only_batch(loader):
    (batch,) = loader
    return batch


# Prompt and answer


def test_the_loss_is_on_answer_and_end_alone(e2e):
    data = e2e(batch_size=8)
    data.setup("fit")
    prompt = "Input:\nname[{}]\n---\nOutput:\n"
    expected = [(f"{prompt.format(a)}the {a} eats.</s>", f"the {a} eats.</s>") for a in ANIMALS]
    assert sorted(texts(data, only_batch(data.train_dataloader()))) == sorted(expected)


def test_the_model_s_loss_equals_one_computed_by_hand_without_padding(e2e):
    train = e2e_rows("the {} eats.", "a {}")
    data = e2e(train=train, batch_size=16)
    data.setup("fit")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=128)).eval()
    batch = only_batch(data.train_dataloader())
    assert (batch["attention_mask"] == 0).any()
    losses = []
    for row in train:
        prompt = data.tokenizer(f"Input:\n{row['meaning_representation']}\n---\nOutput:\n")["input_ids"]
        answer = [*data.tokenizer(row["human_reference"])["input_ids"], data.tokenizer.eos_token_id]
        log_probabilities = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        losses += [-log_probabilities[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]
    torch.testing.assert_close(model(**batch).loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_training_pads_right_and_generation_left(e2e):
    data = e2e(train=e2e_rows("a", "the {} eats a fish."), batch_size=16)
    data.setup("fit")
    data.setup("predict")
    mask = only_batch(data.train_dataloader())["attention_mask"]
    assert (mask.diff(dim=1) <= 0).all()
    assert (mask == 0).any()
    batch = only_batch(data.predict_dataloader())
    assert (batch["attention_mask"].diff(dim=1) >= 0).all()
    prompts = [
        data.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert prompts == batch["prompt"]
    assert all(prompt.endswith("Output:\n") for prompt in prompts)


@pytest.mark.parametrize("tokens", [{}, {"pad_token": "<unk>"}])
def test_end_tokens_stay_real_whether_or_not_they_also_pad(e2e, tokens):
    data = e2e(tokens=tokens, train=e2e_rows("a", "the {} eats a fish."), batch_size=16)
    data.setup("fit")
    batch = only_batch(data.train_dataloader())
    end = data.tokenizer.eos_token_id
    real = batch["attention_mask"].bool()
    assert ((batch["input_ids"] == end) & real).sum() == (batch["labels"] == end).sum() == 10
    assert (batch["labels"][~real] == -100).all()


def test_a_beginning_token_that_the_tokenizer_adds_comes_first_in_training_and_generation(e2e):
    data = e2e(batch_size=8, tokens={"bos_token": "<s>"})
    tokenizer = AutoTokenizer.from_pretrained(data._tokenizer_name)
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.save_pretrained(data._tokenizer_name)
    data.setup("fit")
    data.setup("predict")
    batch = only_batch(data.train_dataloader())
    assert (batch["input_ids"][:, 0] == 1).all()
    assert (batch["labels"][:, 0] == -100).all()
    assert (batch["input_ids"] * batch["attention_mask"] == 2).sum() == 5  # only behind the answers
    prompts = only_batch(data.predict_dataloader())
    first = prompts["attention_mask"].argmax(1)
    assert (prompts["input_ids"].gather(1, first[:, None]) == 1).all()
    assert (prompts["input_ids"] * prompts["attention_mask"] != 2).all()


# References, cutting, leaving out


def test_rows_with_the_same_input_are_one_example_of_several_references(e2e):
    validation = [*e2e_rows("the {} eats.", "a {}"), *e2e_rows("{}!")[:1]]
    data = e2e(validation=validation, eval_batch_size=4)
    data.setup("test")
    answers, prompts = data.test_dataloader()
    assert sum(len(batch["labels"]) for batch in answers) == 11
    found = {row: refs for batch in prompts for row, refs in zip(batch["row"], batch["references"], strict=True)}
    assert found[0] == ["the cat eats.", "a cat", "cat!"]
    assert {row: refs for row, refs in found.items() if row} == {
        2 * i: [f"the {ANIMALS[i]} eats.", f"a {ANIMALS[i]}"] for i in range(1, 5)
    }


def test_a_long_input_is_cut_at_its_end_and_the_words_around_it_stay(write_splits, lm_folder, capsys):
    rows = [{"document": "the cat " * 200, "summary": "a cat"}, {"document": "a {dog}", "summary": "dog"}]
    source = write_splits(train=rows, validation=rows)
    data = GenerationData("xsum", lm_folder(), source, max_length=128, max_new_tokens=28)
    data.setup("fit")
    data.setup("predict")
    found = sorted(texts(data, only_batch(data.train_dataloader())))
    assert found[0] == ("Summarize this document:\na {dog}\n---\nSummary:\ndog</s>", "dog</s>")
    text, answer = found[1]
    assert answer == "a cat</s>"
    assert text.startswith("Summarize this document:\nthe cat the cat")
    assert text.endswith("\n---\nSummary:\na cat</s>")
    batch = only_batch(data.predict_dataloader())
    assert 90 <= batch["attention_mask"].sum(1).max() <= 100
    assert batch["prompt"][0] + "a cat</s>" == text


def test_no_room_for_the_words_around_the_input(e2e):
    data = e2e(max_length=24, max_new_tokens=20)
    with pytest.raises(
        DataError, match=r"max_length is 24: 4 tokens before 20 new ones do not hold the prompt.*by 7 at"
    ):
        data.setup("fit")


def test_no_room_for_a_prompt_at_all(e2e):
    with pytest.raises(DataError, match="leaves no room for a prompt before 128 new tokens"):
        e2e(max_new_tokens=128).setup("fit")


def alpaca(instruction="say a", context="", output="a"):
    return {"instruction": instruction, "input": context, "output": output}


def test_an_answer_beyond_the_limit_is_left_out_counted_and_reported(instruct):
    data = instruct([alpaca(), alpaca("cat " * 300), alpaca(output=" ")])
    with pytest.warns(UserWarning, match=r"2 of 3 (training|validation) rows are left out: their answer") as told:
        data.setup("fit")
    assert len(told) == 2
    assert all("does not fit into 256 tokens (1), or is empty (1)" in str(warning.message) for warning in told)
    assert data.skipped == {"train": 2, "validation": 2}
    assert [answer for _, answer in texts(data, only_batch(data.train_dataloader()))] == ["a</s>"]


def test_an_answer_that_loses_its_end_is_counted_and_reported(instruct):
    data = instruct([alpaca(), alpaca(output="cat " * 300), alpaca("cat " * 300)])
    with pytest.warns(UserWarning, match="training rows|validation rows") as told:
        data.setup("fit")
    said = [str(warning.message) for warning in told]
    assert [text.partition(";")[0] for text in said if "end" in text] == [
        f"the answers of 1 of 2 {role} rows do not end within 256 tokens" for role in ("training", "validation")
    ]
    assert data.cut_answers == {"train": 1, "validation": 1}
    assert data.skipped == {"train": 1, "validation": 1}


def test_what_an_encoder_decoder_cuts_is_counted_too(instruct, caplog):
    data = instruct([alpaca(), alpaca("cat " * 300), alpaca(output="cat " * 300)])
    T5Config(vocab_size=400).save_pretrained(data._tokenizer_name)
    with (
        pytest.warns(UserWarning, match="the answers of 1 of 3 test rows do not end"),
        pytest.warns(match="test prompts"),
    ):
        data.setup("test")
    assert data.cut_answers == {"test": 1}
    assert "the inputs of 1 of 3 test rows were cut to 256 tokens" in caplog.text


def test_a_prompt_that_leaves_no_room_to_generate_is_left_out_of_generation(instruct, make_lm_tokenizer):
    tokenizer = make_lm_tokenizer()
    count = next(n for n in range(999) if len(tokenizer(alpaca_prompt("cat " * n))["input_ids"]) > 236)
    data = instruct([alpaca(), alpaca("cat " * count)])
    with pytest.warns(UserWarning, match="1 of 2 test prompts are left out: their prompts are longer than 236"):
        data.setup("test")
    assert data.skipped == {"test prompts": 1}


def test_nothing_is_left(instruct):
    with pytest.raises(DataError, match="none of the 1 training rows has an answer within its first 256 tokens"):
        instruct([alpaca("cat " * 300)]).setup("fit")


# Instructions


def test_alpaca_s_prompt_where_there_is_no_template(instruct):
    data = instruct([alpaca("say it", "a cat", "a cat eats"), alpaca("eat")], batch_size=2)
    data.setup("fit")
    found = dict(texts(data, only_batch(data.train_dataloader())))
    opening = "Below is an instruction that describes a task"
    wanted = "Write a response that appropriately completes the request."
    with_input = (
        f"{opening}, paired with an input that provides further context. {wanted}\n\n"
        "### Instruction:\nsay it\n\n### Input:\na cat\n\n### Response:a cat eats</s>"
    )
    without = f"{opening}. {wanted}\n\n### Instruction:\neat\n\n### Response:a</s>"
    assert found == {with_input: "a cat eats</s>", without: "a</s>"}


def test_the_chat_template_where_there_is_one(instruct):
    data = instruct([alpaca("say it", "a cat", "a cat eats")], tokens={"chat": True})
    data.setup("fit")
    data.setup("predict")
    expected = [("<|user|>say it\n\na cat\n<|assistant|>a cat eats</s>", "a cat eats</s>")]
    assert texts(data, only_batch(data.train_dataloader())) == expected
    prompts = only_batch(data.predict_dataloader())
    assert prompts["prompt"] == ["<|user|>say it\n\na cat\n<|assistant|>"]
    assert prompts["references"] == [["a cat eats"]]


CONVERSATION = [
    {"role": "system", "content": "eat"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "cat"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "dog"},
    {"role": "user", "content": "c"},
]


def test_every_answer_of_a_conversation_carries_loss(instruct):
    data = instruct([{"messages": CONVERSATION, "id": 1}], tokens={"chat": True})
    data.setup("fit")
    data.setup("predict")
    whole = "<|system|>eat\n<|user|>a\n<|assistant|>cat</s>\n<|user|>b\n<|assistant|>dog</s>"
    assert texts(data, only_batch(data.train_dataloader())) == [(whole, "cat</s>dog</s>")]
    prompts = only_batch(data.predict_dataloader())
    assert prompts["prompt"] == [whole.removesuffix("dog</s>")]
    assert prompts["references"] == [["dog"]]


def test_a_conversation_in_alpaca_s_words(instruct):
    data = instruct([{"messages": CONVERSATION}])
    data.setup("fit")
    turn = "### Instruction:\n{}\n\n### Response:{}</s>".format
    assert texts(data, only_batch(data.train_dataloader())) == [
        (f"eat\n\n{turn('a', 'cat')}\n\n{turn('b', 'dog')}", "cat</s>dog</s>")
    ]


def test_a_set_of_training_rows_only_is_tested_on_its_held_out_rows(write_splits, lm_folder):
    source = write_splits(train=[alpaca(animal) for animal in ANIMALS])
    data = InstructData(lm_folder(), source, max_length=256, holdout=0.4)
    data.setup("fit")
    data.setup("predict")
    held_out = [text for text, _ in texts(data, only_batch(data.val_dataloader()))]
    assert len(held_out) == 2
    prompts = only_batch(data.predict_dataloader())["prompt"]
    assert sorted(prompt + "a</s>" for prompt in prompts) == sorted(held_out)


def test_samples_are_the_first_validation_rows(instruct):
    data = instruct([alpaca(animal) for animal in ANIMALS])
    assert data.sample_prompts(2)["prompt"] == [alpaca_prompt("cat"), alpaca_prompt("dog")]


def test_samples_are_prompts_that_leave_room_and_not_counted_as_left_out(instruct):
    data = instruct([alpaca("cat " * 300), alpaca("dog"), alpaca("cow")])
    assert data.sample_prompts(1)["prompt"] == [alpaca_prompt("dog")]
    assert data.skipped == {}
    assert instruct([alpaca("cat " * 300)]).sample_prompts(1) is None


# Refused


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"instruct": "a", "input": "", "output": "b"}], {}, "no column 'instruction' \\(do you mean 'instruct'"),
        ([{"instruction": "a", "context": "", "output": "b"}], {}, "no column 'input'; it has"),
        ([alpaca(output=None)], {}, "none of the 1 training rows has an answer .*: 1 are missing or empty"),
        ([alpaca(instruction=None)], {}, "row 0 .*instruction is None, not text"),
        ([{"messages": []}], {}, "row 0 .*not a conversation"),
        ([{"messages": [{"role": "bot", "content": "a"}]}], {}, "no message with a role .system, user, assistant"),
        ([alpaca()], {"prompt": "chat"}, "has no chat template; use prompt alpaca"),
        ([alpaca()], {"tokens": {"eos_token": None}}, "has no EOS token, so no text could end"),
    ],
)
def test_bad_input(rows, options, message, instruct):
    with pytest.raises(DataError, match=message):
        instruct(rows, **options).setup("fit")


def test_a_template_that_refuses_a_conversation_and_one_that_rewrites_it(instruct):
    data = instruct([{"messages": CONVERSATION}], tokens={"chat": True})
    data.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refuses a conversation .roles must alternate"):
        data.setup("fit")
    data.tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="writes earlier turns of a conversation differently"):
        data.setup("fit")


def test_a_renamed_column(e2e):
    rows = [{"mr": row["meaning_representation"], "human_reference": "a"} for row in e2e_rows()]
    with pytest.raises(DataError, match=r"e2e/train .* has no column 'meaning_representation'; it has mr, human_refer"):
        e2e(train=rows).setup("fit")


def test_an_unknown_task(e2e):
    with pytest.raises(
        DataError, match=r"unknown generation task 'xsums' \(do you mean 'xsum'\?\); known are e2e, xsum"
    ):
        e2e(task="xsums")


def test_the_hub_s_sets_come_from_parquet_revisions(lm_folder):
    for task, source in (("e2e", "tuetschek/e2e_nlg"), ("xsum", "EdinburghNLP/xsum")):
        data = GenerationData(task, lm_folder())
        assert (data.source, data.revision) == (source, "refs/convert/parquet")
    assert GenerationData("e2e", lm_folder(), source="somebody/e2e").revision is None


def test_tokens_are_cached_by_what_they_depend_on(e2e, datasets_cache):
    def files():
        return {path.name for path in datasets_cache.rglob("cache-*.arrow")}

    first = e2e()
    first.setup("fit")
    seen = files()
    assert seen
    again = GenerationData("e2e", first._tokenizer_name, first.source, max_length=128, max_new_tokens=20)
    again.setup("fit")
    assert files() == seen
    other = GenerationData("e2e", first._tokenizer_name, first.source, max_length=120, max_new_tokens=20)
    other.setup("fit")
    assert files() > seen


def test_rows_to_predict_need_no_answer(e2e, tmp_path):
    data = e2e()
    test = [{"meaning_representation": f"name[{animal}]"} for animal in ("cow", "cat", "cow")]
    (Path(data.source) / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    data.setup("predict")
    batch = only_batch(data.predict_dataloader())
    assert sorted(zip(batch["row"], batch["references"], strict=True)) == [(0, []), (1, [])]
    data.setup("test")  # which needs them, and so reads the validation rows
    assert len(data._ready["test"][1]) == 5


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("messages", [True, False])
def test_instructions_to_predict_need_no_answer(instruct, chat, messages):
    def row(*turns):
        if messages:
            return {"messages": [{"role": role, "content": text} for role, text in turns]}
        return {"instruction": turns[0][1], "input": ""} | ({"output": turns[1][1]} if turns[1:] else {})

    data = instruct([row(("user", "eat"), ("assistant", "a cat"))], tokens={"chat": chat})
    (Path(data.source) / "test.jsonl").write_text("".join(json.dumps(row(("user", a))) + "\n" for a in ("cow", "owl")))
    data.setup("predict")
    batch = only_batch(data.predict_dataloader())
    asked = "<|user|>{}\n<|assistant|>" if chat else alpaca_prompt("{}")
    assert dict(zip(batch["row"], batch["prompt"], strict=True)) == {0: asked.format("cow"), 1: asked.format("owl")}
    assert batch["references"] == [[], []]
