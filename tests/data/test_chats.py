"""Every form of instructions and conversations gives the same tokens."""

import json

import pytest

from lte_lightning.data import DataError, InstructData
from lte_lightning.data.chats import conversation, find_form
from lte_lightning.data.instruct import alpaca_prompt

MESSAGES = [{"role": "user", "content": "eat"}, {"role": "assistant", "content": "a cat"}]
SHARE = [{"from": "human", "value": "eat"}, {"from": "gpt", "value": "a cat"}]
FORMS = {
    "messages": {"messages": MESSAGES},
    "sharegpt": {"conversations": SHARE},
    "alpaca": {"instruction": "eat", "input": "", "output": "a cat"},
    "alpaca without input": {"instruction": "eat", "output": "a cat"},
    "prompt": {"prompt": "eat", "completion": "a cat"},
    "prompt as messages": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
}
NAMED = {
    ("dialog",): {"dialog": MESSAGES},
    ("turns",): {"turns": SHARE},
    ("question", "reply"): {"question": "eat", "reply": "a cat"},
    ("task", "context", "reply"): {"task": "eat", "context": "", "reply": "a cat"},
}


@pytest.fixture
def chats(tmp_path, make_lm_tokenizer):
    """`chats(row, chat=True)`: a module on one file of twenty rows like it."""

    def make(row, chat=True, name="chats.jsonl", count=20, **options):
        make_lm_tokenizer(chat=chat).save_pretrained(tmp_path / "lm")
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
        return InstructData(
            str(tmp_path / "lm"), str(tmp_path / name), **{"max_length": 256, "batch_size": 32} | options
        )

    return make


def read(data, loader):
    """The first row's tokens as text, and those that carry the loss."""
    batch = next(iter(loader))
    ids, mask, labels = (batch[name][0] for name in ("input_ids", "attention_mask", "labels"))
    return data.tokenizer.decode(ids[mask.bool()]), data.tokenizer.decode(ids[labels != -100])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_by_the_chat_template(chats, form):
    data = chats(FORMS[form])
    data.setup("fit")
    assert read(data, data.train_dataloader()) == ("<|user|>eat\n<|assistant|>a cat</s>", "a cat</s>")
    assert [len(rows) for rows in (data._ready["train"][0], data._ready["validation"][0])] == [18, 2]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_without_a_template(chats, form):
    data = chats(FORMS[form], chat=False)
    data.setup("fit")
    opening = "eat" if form == "prompt" else alpaca_prompt("eat")
    assert read(data, data.train_dataloader()) == (f"{opening}a cat</s>", "a cat</s>")


@pytest.mark.parametrize("columns", NAMED)
def test_columns_of_other_names(chats, columns):
    data = chats(NAMED[columns] | {"prompt": "other", "completion": "x"}, columns=list(columns))
    data.setup("fit")
    assert read(data, data.train_dataloader()) == ("<|user|>eat\n<|assistant|>a cat</s>", "a cat</s>")


def test_plain_text_although_there_is_a_template(chats):
    data = chats(FORMS["prompt"], prompt="plain")
    data.setup("fit")
    assert read(data, data.train_dataloader()) == ("eata cat</s>", "a cat</s>")


@pytest.mark.parametrize(
    ("row", "references"),
    [
        ({"messages": MESSAGES[:1]}, []),
        ({"conversations": SHARE[:1]}, []),
        ({"instruction": "eat", "input": ""}, []),
        ({"prompt": "eat"}, []),
        ({"prompt": MESSAGES[:1]}, []),
        ({"prompt": "eat", "completion": "a cat"}, ["a cat"]),
    ],
)
def test_what_is_to_predict_may_end_with_what_is_asked(chats, row, references):
    data = chats(row, count=2)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["prompt"] == ["<|user|>eat\n<|assistant|>"]
    assert batch["references"] == [references * 2]


def test_a_lone_column_of_texts_asks(chats):
    data = chats({"anything": "eat"}, count=2)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["prompt"] == ["<|user|>eat\n<|assistant|>"]
    with pytest.raises(DataError, match=r"no column 'instruction'; it has anything"):
        chats({"anything": "eat"}).setup("fit")


def test_a_conversation_that_the_model_opens_is_read_with_its_opening(chats):
    opened = [{"from": "gpt", "value": "the dog"}, *SHARE]
    data = chats({"conversations": opened})
    data.setup("fit")
    assert read(data, data.train_dataloader()) == (
        "<|assistant|>the dog</s>\n<|user|>eat\n<|assistant|>a cat</s>",
        "a cat</s>",
    )


def test_an_input_may_be_missing_in_a_row(chats):
    data = chats({"instruction": "eat", "input": None, "output": "a cat"})
    data.setup("fit")
    assert read(data, data.train_dataloader())[1] == "a cat</s>"


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"messages": [{"role": "user", "content": " "}, *MESSAGES[1:]]}, "a question of messages"),
        ({"prompt": "", "completion": "a cat"}, "prompt"),
    ],
)
def test_empty_questions_are_refused_if_all_are(chats, row, part):
    with pytest.raises(DataError, match=rf"instruct/train .*: {part} is empty in all rows \(20\)"):
        chats(row).setup("fit")


def test_a_conversation_in_a_text_is_refused(chats):
    with pytest.raises(DataError, match=r"messages is '\[.*, not a conversation but a text: write lists of messages"):
        chats({"messages": json.dumps(MESSAGES)}).setup("fit")


def test_streams_find_their_form_too(chats, tmp_path):
    make = chats(FORMS["sharegpt"], name="train.jsonl")
    (tmp_path / "validation.jsonl").write_text(json.dumps(FORMS["sharegpt"]) + "\n")
    data = InstructData(make._tokenizer_name, str(tmp_path), streaming=True, max_length=256)
    data.setup("fit")
    assert read(data, data.train_dataloader()) == ("<|user|>eat\n<|assistant|>a cat</s>", "a cat</s>")


def test_no_room_to_generate_is_needed_where_nothing_is_generated(chats):
    data = chats(FORMS["messages"], max_length=60, max_new_tokens=100)
    data.setup("fit")
    for stage in ("test", "predict"):
        with pytest.raises(DataError, match="leaves no room for a prompt before 100 new tokens"):
            data.setup(stage)


def test_hugging_face_s_older_lists_in_a_mapping_and_several_systems():
    turns = {"from": ["system", "human", "gpt"], "value": ["be brief", "eat", ""]}
    assert conversation(turns) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "eat"},
        {"role": "assistant", "content": ""},
    ]
    assert conversation([{"role": "user", "content": "a", "from": None, "value": None}])[0]["content"] == "a"


def test_several_forms_at_once_are_taken_by_their_order():
    assert find_form([["prompt", "completion", "messages"]]).columns == ("messages",)
    assert find_form([["question", "answer"]]).columns == ("instruction", "input", "output")


@pytest.mark.parametrize(
    ("row", "options", "complaint"),
    [
        (
            {"question": "a", "reply": "b"},
            {},
            r"no column 'instruction'.*in `messages` or `conv.*data\.columns",
        ),
        ({"prompt": "a", "response": "b"}, {}, r"no column 'completion'.*it has prompt, response; .*data\.columns"),
        ({"messages": "user: hi"}, {}, r"row 0 \(from 0\): messages is 'user: hi', not a conversation"),
        ({"messages": ["hi"]}, {}, r"row 0 .*'hi' is no message with a role \(system, user, assistant; ShareGPT"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, {}, r"'from': 'tool'.* is no message"),
        ({"conversations": [{"from": "human", "value": None}]}, {}, r"'value': None.* is no message"),
        (FORMS["messages"], {"prompt": "plain"}, "prompt is plain, but rows have messages"),
        (FORMS["prompt"], {"columns": ["prompt", "prompt"]}, "name one column of conversations, two of a prompt"),
        (FORMS["prompt"], {"columns": ["a", "b", "c", "d"]}, "or three of an instruction"),
        (FORMS["prompt"], {"columns": ["promt", "completion"]}, r"no column 'promt' \(do you mean 'prompt'\?\)"),
    ],
)
def test_what_is_no_chat_is_refused(chats, row, options, complaint):
    with pytest.raises(DataError, match=complaint):
        chats(row, **options).setup("fit")


SYSTEM = [{"role": "system", "content": "be brief"}, *MESSAGES]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": SYSTEM},
        {"messages": [{"role": "developer", "content": "be brief"}, *MESSAGES]},
        {"conversations": SHARE, "system": "be brief"},
        {"conversations": SYSTEM, "system": "another"},  # the conversation's own comes first
        {"prompt": "eat", "completion": "a cat", "system": "be brief"},
        {"instruction": "eat", "input": "", "output": "a cat", "system": "be brief"},
    ],
)
def test_a_system_prompt_is_a_message_or_a_column(chats, row):
    data = chats(row)
    data.setup("fit")
    whole, learnt = read(data, data.train_dataloader())
    assert "be brief" in whole
    assert whole.endswith("<|user|>eat\n<|assistant|>a cat</s>")
    assert learnt == "a cat</s>"
    predicted = chats({name: value for name, value in row.items() if name not in ("completion", "output")}, count=2)
    predicted.setup("predict")
    (batch,) = predicted.predict_dataloader()
    assert "be brief" in batch["prompt"][0]


@pytest.mark.parametrize("row", [{"system": "be brief"}, {"system": None}, {}])
def test_a_system_prompt_without_a_template(chats, row):
    written = {}
    for form in ("prompt", "alpaca", "messages"):
        data = chats(FORMS[form] | row, chat=False)
        data.setup("fit")
        written[form] = read(data, data.train_dataloader())[0]
    assert all(("be brief" in text) == bool(row.get("system")) for text in written.values())


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "User", "content": "eat"}, {"role": " ASSISTANT", "content": "a cat"}],
        [{"from": "human", "value": "eat"}, {"from": "model", "value": "a cat"}],
        [{"role": "user", "content": [{"type": "text", "text": "ea"}, {"type": "text", "text": "t"}]}, MESSAGES[1]],
    ],
)
def test_relatives_of_the_forms(turns):
    assert conversation(turns) == MESSAGES


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "first", [{"content": ""}, {"content": "a dog", "weight": 0}, {"content": "x", "train": False}]
)
def test_turns_without_loss(chats, first, chat):
    turns = [MESSAGES[0], {"role": "assistant"} | first, *MESSAGES]
    data = chats({"messages": turns}, chat=chat)
    data.setup("fit")
    whole, learnt = read(data, data.train_dataloader())
    assert learnt == "a cat</s>"
    assert first["content"] in whole


def test_rows_without_an_answer_to_learn_are_left_out(chats):
    with pytest.raises(DataError, match="none of the 18 training rows has an answer"):
        chats({"messages": [MESSAGES[0], MESSAGES[1] | {"weight": 0}]}).setup("fit")


@pytest.mark.parametrize("form", [name for name, row in FORMS.items() if len(row) > 1])
def test_rows_whose_answer_is_missing_are_left_out(chats, tmp_path, form):
    data = chats(FORMS[form], holdout=0.1)
    row = dict(FORMS[form])
    answer = list(row)[-1]
    file = tmp_path / "chats.jsonl"
    lines = [json.dumps(row | {answer: None}), json.dumps({k: v for k, v in row.items() if k != answer})]
    file.write_text("\n".join([*lines * 5, *file.read_text().splitlines()]) + "\n")
    with pytest.warns(UserWarning, match="rows are left out: their answer .* or is empty"):
        data.setup("fit")
    assert len(data._ready["train"][0]) + len(data._ready["validation"][0]) == 20
    assert data.skipped["train"] + data.skipped["validation"] == 10


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "3"},
        {"role": "Tool", "content": "3"},
        {"from": "function_call", "value": "{}"},
    ],
)
def test_calls_of_tools_are_refused_by_name(chats, turn):
    with pytest.raises(DataError, match=r"row 0 .*calls of tools and their results are not read"):
        chats({"messages": [MESSAGES[0], turn, MESSAGES[1]]}).setup("fit")


def test_pictures_are_refused(chats):
    seen = [{"role": "user", "content": [{"type": "image", "text": None}]}, MESSAGES[1]]
    with pytest.raises(DataError, match="is no message with a role"):
        chats({"messages": seen}).setup("fit")


def test_columns_that_are_not_read_are_named(chats, caplog):
    with caplog.at_level("INFO"):
        chats(FORMS["messages"] | {"tools": "[]", "id": 3}).setup("fit")
    assert "that are not read: " in caplog.text
    assert "tools" in caplog.text


def test_the_option_for_other_columns_is_written_out(chats):
    with pytest.raises(DataError, match=r'--data\.columns "\[question,answer\]"'):
        chats({"row_id": 1, "question": "a", "answer": "b"}).setup("fit")
    with pytest.raises(DataError, match=r'--data\.columns "\[chat\]"'):
        chats({"chat": MESSAGES}).setup("fit")


def test_a_folder_without_readable_files_is_refused_in_one_line(tmp_path, make_lm_tokenizer):
    for name in ("train.txt", "validation.txt"):
        (tmp_path / name).write_text("hi\n")
    make_lm_tokenizer(chat=True).save_pretrained(tmp_path / "lm")
    with pytest.raises(DataError, match=r"has no split 'train' for instruct"):
        InstructData(str(tmp_path / "lm"), str(tmp_path)).setup("fit")
