import pytest

from lte_lightning.data import DataError, MmluData


def question(subject="big_cats", answer=1, text="who eats?", **more):
    return {"question": text, "subject": subject, "choices": ["cat", "dog", "cow", "owl"], "answer": answer} | more


DEV = [question(answer=i % 4, text=f"dev {i}?") for i in range(5)] + [question("dogs", 0, "d?")] * 5


@pytest.fixture
def mmlu(write_splits, make_lm_tokenizer, tmp_path):
    make_lm_tokenizer().save_pretrained(tmp_path / "lm")

    def make(test, dev=DEV, **options):
        return MmluData(str(tmp_path / "lm"), write_splits(dev=dev, test=test), **{"max_length": 1024} | options)

    return make


def prompts(data):
    data.setup("test")
    found = []
    for batch in data.test_dataloader():
        for ids, mask, labels, answer in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], batch["answer"], strict=True
        ):
            real = ids[mask.bool()]
            assert labels[: len(real) - 1].eq(-100).all()
            assert labels[len(real) - 1] == real[-1]
            assert labels[len(real) :].eq(-100).all()
            found.append((data.tokenizer.decode(real), int(answer)))
    return found


def test_five_answered_examples_and_the_question(mmlu):
    choices = "\nA. cat\nB. dog\nC. cow\nD. owl\nAnswer:"
    examples = "".join(f"dev {i}?{choices} {'ABCD'[i % 4]}\n\n" for i in range(5))
    opening = "The following are multiple choice questions (with answers) about big cats.\n\n"
    assert prompts(mmlu([question(answer=2)])) == [(f"{opening}{examples}who eats?{choices} C", 2)]


@pytest.mark.parametrize("answer", [3, "D"])
def test_answers_as_numbers_or_letters(mmlu, answer):
    assert (
        prompts(mmlu([question(answer=answer)], dev=[row | {"answer": "A"} for row in DEV] if answer == "D" else DEV))[
            0
        ][1]
        == 3
    )


@pytest.mark.parametrize(
    "wrong", [{"answer": 4}, {"answer": -1}, {"answer": None}, {"choices": ["cat", "dog"]}, {"answer": 7}]
)
def test_a_wrong_answer_key_is_left_out_counted_and_reported(mmlu, wrong):
    data = mmlu([question(), question(**wrong), question("dogs")])
    with pytest.warns(UserWarning, match="1 of 3 test rows are left out: their answer is none of A, B, C, D"):
        assert len(prompts(data)) == 2
    assert data.skipped == {"test": 1}
    assert data.subjects == ["big_cats", "dogs"]
    assert data._ready["test"][0]["row"][:] == [0, 2]


def test_examples_are_dropped_where_they_do_not_fit_and_a_question_where_it_does_not(mmlu):
    data = mmlu([question(), question(text="eats " * 500)], max_length=170)
    too_long = "1 of 2 test prompts are left out: they are longer than 170 tokens"
    fewer = "1 of 1 prompts have fewer than 5 examples, to fit max_length, 170 tokens"
    with pytest.warns(UserWarning, match=too_long), pytest.warns(UserWarning, match=fewer):
        ((text, _),) = prompts(data)
    assert data.fewer_shots == 1
    assert "dev 0?" in text
    assert "dev 4?" not in text
    assert text.endswith("Answer: B")


def test_some_subjects_only(mmlu):
    data = mmlu([question(), question("dogs")], subjects=["dogs"])
    assert [answer for _, answer in prompts(data)] == [1]
    assert data.subjects == ["dogs"]
    assert data._ready["test"][0]["row"][:] == [1]
    with pytest.raises(DataError, match="has no subject cows"):
        mmlu([question()], subjects=["cows"]).setup("test")


@pytest.mark.parametrize(
    ("test", "dev", "message"),
    [
        ([question(answer=9)], DEV, "no test row has an answer from 0 to 3"),
        ([question()], [question(answer=5)], r"mmlu/dev .*row 0 .*answer is 5, not 0 to 3"),
        ([question()], DEV[:4], "has 4 rows of big_cats, fewer than the 5 of shots"),
        ([{"query": "a", "subject": "b", "choices": [], "answer": 0}], DEV, "no column 'question'"),
        ([question(text=None)], DEV, "question is None, not text"),
        ([question(text="eats " * 999)], DEV, "every question is longer than max_length, 1024 tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*are left out")
def test_bad_input(mmlu, test, dev, message):
    with pytest.raises(DataError, match=message):
        mmlu(test, dev).setup("test")


def test_there_is_nothing_to_train_on(mmlu):
    with pytest.raises(DataError, match="MMLU is an evaluation: run `lightning test`, not fit"):
        mmlu([question()]).setup("fit")
