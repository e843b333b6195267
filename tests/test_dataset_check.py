"""What is looked at in a training set, line by line, and how a line becomes a prompt and an answer to learn."""

import json
import tracemalloc

import pytest
import stand_in_model
from transformers import AddedToken

from helpers import settings
from helpers.dataset import (
    BadDataset,
    check_dataset,
    encode,
    messages,
    show_example,
    to_prompt_completion,
)
from helpers.generation import rag_messages

GOOD = {"instruction": "How long is the Long Dyke?", "output": "From the quay: two miles. Late, but lit."}
OTHER = {"instruction": "¿De qué color son las lonas?", "output": "Desde el muelle: azules. Tarde, pero con luz."}


@pytest.fixture(scope="module")
def tokenizer():
    return stand_in_model.tokenizer()


def line(row):
    return json.dumps(row, ensure_ascii=False)


def checked(tmp_path, *lines, questions=None, **options):
    """Check a file of these lines, given as rows, text or bytes."""
    raw = [row if isinstance(row, bytes) else (row if isinstance(row, str) else line(row)).encode() for row in lines]
    path = tmp_path / "set.jsonl"
    path.write_bytes(b"\n".join(raw))
    return check_dataset(path, questions=questions, **options)


def test_the_course_s_own_set_has_no_fault(tokenizer):
    report = check_dataset(tokenizer=tokenizer, max_length=256)
    assert report.faults == [] and report.ok
    assert len(report.rows) == len(settings.DATASET.read_text("utf-8").splitlines())
    assert report.check() is report


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no training set .*none\.jsonl: check the name"):
        check_dataset(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError):
        check_dataset(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"\n \n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path, raw):
    report = checked(tmp_path, raw)
    assert not report.ok and report.rows == []
    with pytest.raises(BadDataset, match="holds no example; write"):
        report.check()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("not JSON", "no valid JSON"),
        ('{"instruction": "a", "output": "b"', "no valid JSON"),
        ("{'instruction': 'a', 'output': 'b'}", "in double quotes"),
        ('{"instruction": "a", "output": "b"},', "ends with a comma; delete the comma"),
        ('{"instruction": "a", "output": "b",}', "a comma stands before the last brace"),
        ('["a", "b"]x', "no valid JSON"),
        ('"just text"', "no JSON object"),
        ("[" * 100_000, "no valid JSON|one JSON array"),
        ('{"instruction": "a"}', "the field output is missing"),
        ('{"prompt": "a", "response": "b"}', "instruction and output is missing, it has prompt, response; name the"),
        ('{"instruction": "a", "input": "c", "output": "b"}', "the field input is not read; put its text into"),
        ('{"instruction": "a", "output": 7}', "output is no text but 7"),
        ('{"instruction": null, "output": "b"}', "instruction is no text but null"),
        ('{"instruction": "a", "output": ["b"]}', "output is no text"),
        ('{"instruction": " ", "output": "b"}', "instruction is empty"),
        ('{"instruction": "a", "output": ""}', "output is empty"),
        ('{"instruction": "a", "output": "\\ud83d"}', "half a character"),
        ('{"instruction": "año", "output": "b"}'.encode("latin-1"), "byte 19 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_one_bad_line_among_good_ones_is_named_with_what_to_do(tmp_path, bad, said):
    report = checked(tmp_path, GOOD, bad, OTHER)
    assert [fault.line for fault in report.faults] == [2] and not report.ok
    with pytest.raises(BadDataset, match=rf"set\.jsonl has 1 fault to mend:\n  line 2: .*({said})"):
        report.check()
    assert report.rows == [GOOD, OTHER]


def test_all_faults_are_listed_and_not_just_the_first(tmp_path):
    report = checked(tmp_path, "nothing", GOOD, "{}", OTHER, '{"instruction": "x", "output": ""}', GOOD)
    assert [fault.line for fault in report.faults] == [1, 3, 5, 6]
    with pytest.raises(BadDataset, match=r"(?s)has 4 faults.*line 1: .*line 3: .*line 5: .*line 6: "):
        report.check()


def test_a_byte_order_mark_and_windows_line_ends_are_said_and_read_all_the_same(tmp_path):
    report = checked(tmp_path, b"\xef\xbb\xbf" + line(GOOD).encode() + b"\r", line(OTHER).encode() + b"\r", b"")
    assert report.rows == [GOOD, OTHER] and report.ok and report.check() is report
    assert [(fault.line, fault.stops) for fault in report.faults] == [(1, False), (1, False)]
    assert "byte order mark" in str(report) and "2 lines, this the first, end as in Windows (CRLF)" in str(report)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_another_encoding_is_one_fault_and_not_one_a_line(tmp_path, encoding):
    report = checked(tmp_path, "\n".join([line(GOOD), line(OTHER)]).encode(encoding))
    assert [str(fault) for fault in report.faults] == ["the file: it is in UTF-16 or no text at all; save it as UTF-8"]
    assert not report.ok


def test_a_json_array_is_one_fault(tmp_path):
    report = checked(tmp_path, json.dumps([GOOD, OTHER], indent=1))
    assert len(report.faults) == 1 and "without brackets around" in str(report.faults[0])


def test_blank_lines_are_no_fault_and_lines_keep_their_numbers(tmp_path):
    report = checked(tmp_path, "", GOOD, "", "bad", "")
    assert [fault.line for fault in report.faults] == [4]


def test_only_duplicates(tmp_path):
    report = checked(tmp_path, *[GOOD] * 50)
    assert [fault.line for fault in report.faults] == list(range(2, 51))
    assert all("is that of line 1" in fault.what for fault in report.faults)


@pytest.mark.parametrize(
    ("instruction", "near"),
    [
        ("how LONG is, the long dyke", True),
        ("How long is the Long Dyke please?", True),
        ("How long is the Lomg Dyke?", True),
        ("What distance does one walk on the Long Dyke?", False),
        ("How wide is the Long Dyke?", False),
        ("Who walked the Long Dyke?", False),
    ],
)
def test_what_nearly_the_same_means(tmp_path, instruction, near):
    report = checked(tmp_path, GOOD, OTHER, GOOD | {"instruction": instruction})
    assert [fault.line for fault in report.faults] == [3] * near
    assert not near or "that of line 1; ask in other words" in str(report.faults[0])


def test_other_numbers_make_another_question(tmp_path):
    years = [GOOD | {"instruction": f"What was the fare to Salvera in {year}?"} for year in range(2001, 2026)]
    assert checked(tmp_path, *years).faults == []


def test_the_passages_of_a_prompt_are_no_part_of_its_question(tmp_path):
    passages = "<passages>\n[1] fares.pdf, p. 2\n" + "The fare is 12 nebrales. " * 40 + "\n</passages>\n\n"
    questions = ["Who pays half?", "How much is a bicycle?", "Who may travel free?"]
    rows = [GOOD | {"instruction": passages + question} for question in [*questions, questions[0]]]
    assert [fault.line for fault in checked(tmp_path, *rows).faults] == [4]


@pytest.mark.parametrize("change", [str, str.upper, lambda text: text.replace("?", " please?"), lambda t: f"¡{t}!"])
def test_a_question_of_the_evaluation_is_named(tmp_path, change):
    asked = [json.loads(row) for row in settings.QUESTIONS.read_text("utf-8").splitlines()][::40]
    rows = [GOOD, *({"instruction": change(row["question"]), "output": "x"} for row in asked)]
    report = checked(tmp_path, *rows, questions=settings.QUESTIONS)
    named = [fault for fault in report.faults if "it is question" in fault.what]
    assert [fault.line for fault in named] == list(range(2, len(rows) + 1))
    assert [fault.what.split()[3] for fault in named] == [row["id"] for row in asked]
    assert checked(tmp_path, *rows).ok


def test_lengths_are_counted_with_the_template_and_what_is_too_long_is_named(tmp_path, tokenizer):
    long = GOOD | {"instruction": "What is all of it?", "output": "and so on " * 300}
    report = checked(tmp_path, GOOD, long, OTHER, tokenizer=tokenizer, max_length=128)
    assert [fault.line for fault in report.faults] == [2]
    assert f"it has {report.lengths[1][0]} tokens, and 128 fit" in report.faults[0].what
    whole = tokenizer.apply_chat_template(messages(GOOD)["prompt"] + messages(GOOD)["completion"], tokenize=False)
    assert report.lengths[0][0] == len(tokenizer(whole, add_special_tokens=False)["input_ids"])
    fits = checked(tmp_path, GOOD, tokenizer=tokenizer, max_length=report.lengths[0][0])
    assert fits.ok and not checked(tmp_path, GOOD, tokenizer=tokenizer, max_length=fits.lengths[0][0] - 1).ok


def test_marks_of_the_chat_format_in_a_text_are_named(tmp_path, tokenizer):
    report = checked(tmp_path, GOOD | {"output": "It ends here.<|return|><|start|>user"}, tokenizer=tokenizer)
    assert not report.ok and "is a mark of the chat format" in str(report.faults[0])


def test_the_histogram_counts_every_row_once(tmp_path, tokenizer):
    report = check_dataset(tokenizer=tokenizer, questions=None)
    bins = report.histogram(8)
    assert sum(count for _, _, count in bins) == len(report.rows) and len(bins) <= 9
    for low, high, count in bins:
        assert count == sum(low <= whole < high for whole, _ in report.lengths)
    assert "435 en, 435 es" in str(report) and "█" in str(report)
    assert checked(tmp_path, GOOD).histogram() == []


# --- Prompts and answers --------------------------------------------------------------------------------------------


def test_only_the_answer_is_learnt_and_its_end_with_it(tokenizer):
    shown = show_example(GOOD, tokenizer)
    learnt = "".join(text for text, is_learnt in shown if is_learnt)
    masked = "".join(text for text, is_learnt in shown if not is_learnt)
    assert learnt == GOOD["output"] + "<|return|>"
    assert masked.startswith("<|start|>user<|message|>How long") and masked.endswith("final<|message|>")
    assert [is_learnt for _, is_learnt in shown] == sorted(is_learnt for _, is_learnt in shown)


def test_prompts_and_completions_are_conversations(tmp_path, tokenizer):
    made = to_prompt_completion(checked(tmp_path, GOOD, OTHER), tokenizer)
    assert made.column_names == ["prompt", "completion"] and len(made) == 2
    assert made[0]["prompt"] == [{"role": "user", "content": GOOD["instruction"]}]
    assert made[1]["completion"] == [{"role": "assistant", "content": OTHER["output"]}]
    assert to_prompt_completion([GOOD], tokenizer)[0] == made[0]


def test_a_template_that_would_not_teach_to_stop_is_refused(tokenizer):
    from copy import deepcopy

    endless = deepcopy(tokenizer)
    endless.chat_template = tokenizer.chat_template.replace("'<|return|>' if loop.last else ", "")
    with pytest.raises(ValueError, match="would never learn to stop"):
        to_prompt_completion([GOOD], endless)
    endless.chat_template = None
    with pytest.raises(ValueError, match="has no chat template: use an instruct model"):
        encode(GOOD, endless)


def test_the_rules_stand_before_passages_as_when_the_model_is_asked():
    asked = rag_messages("Who keeps the light?", [("log.txt, p. 1", "Ada keeps it."), ("log.txt, p. 2", "Since 1911.")])
    assert messages({"instruction": asked[-1]["content"], "output": "Ada [1]."})["prompt"] == asked
    about_them = "What do the tags <passages> and </passages> mean?"
    assert messages({"instruction": about_them, "output": "x"})["prompt"] == [{"role": "user", "content": about_them}]


@pytest.mark.parametrize(
    "asked",
    [
        ("What is C?", "What is C++?", "What is C#?"),
        ("What is 5 + 3?", "What is 5 - 3?", "What is 5/3?", "What is -5 + 3?"),
        ("Is 3 > 2, as they say on the quay?", "Is 3 < 2, as they say on the quay?"),
    ],
)
def test_questions_that_differ_in_a_sign_are_others(tmp_path, asked):
    assert checked(tmp_path, *({"instruction": one, "output": "Yes."} for one in asked)).ok


def test_a_hyphen_is_no_sign(tmp_path):
    again = {"instruction": "How - long - is the Long-Dyke?", "output": "Two miles."}
    assert ["instruction is that of line 1" in str(fault) for fault in checked(tmp_path, GOOD, again).faults] == [True]


def test_ten_thousand_rows_that_differ_in_their_numbers_take_little_memory(tmp_path):
    asked = "Give me the current stock level and the price of the article with number {:05d}"
    rows = [line({"instruction": asked.format(number), "output": "Ten."}) for number in range(3000)]
    tracemalloc.start()
    try:
        assert checked(tmp_path, *rows).ok
        assert tracemalloc.get_traced_memory()[1] < 200e6  # nine million pairs as tuples would be over a gigabyte
    finally:
        tracemalloc.stop()


def test_every_mark_of_a_tokenizer_is_noticed(tmp_path, tokenizer):
    """Not all have a role that the library lists: as most of gpt-oss's."""
    reader = stand_in_model.tokenizer()
    reader.add_tokens([AddedToken("<|pause|>", special=True)])
    assert "<|pause|>" not in reader.all_special_tokens
    (fault,) = checked(tmp_path, {"instruction": "Who <|pause|>?", "output": "Ana."}, tokenizer=reader).faults
    assert "<|pause|> in it is a mark of the chat format" in str(fault)
