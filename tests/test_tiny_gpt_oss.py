"""The recipe of the embedded model: its curriculum, its tokenizer, its batches and a training that is interrupted."""

import hashlib
import json
import math
import random
import re
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssForCausalLM

from helpers import settings
from helpers.chunking import load_documents
from helpers.evaluation import load_questions
from helpers.generation import is_refusal, rag_messages
from helpers.language import fold, stems
from helpers.llms import PromptTooLong, load_llm
from helpers.tiny_gpt_oss import (
    batches,
    curriculum,
    packing,
    prose,
    scenes,
    thesaurus,
    tokenizer,
    train,
    worlds,
)
from helpers.tiny_gpt_oss.batches import Bucket, Packer, fingerprint
from helpers.tiny_gpt_oss.curriculum import REFUSAL, UNKNOWN, Shape, make_closed_book, make_example
from helpers.tiny_gpt_oss.initialization import initialize
from helpers.tiny_gpt_oss.measure import ONE, answered, cases, closed_book
from helpers.tiny_gpt_oss.train import Stage, Training, model_config
from helpers.tiny_gpt_oss.worlds import FOLDER, LANGUAGES, fill, reserved, words

HELD = (False, True)  # prose that is trained on, and that is not
SHAPES = [Shape((1, 1), (80, 300), 6), Shape((1, 5), (250, 1000), 8)]


@pytest.fixture(scope="module")
def reader():
    return AutoTokenizer.from_pretrained(settings.TINY_GPT_OSS)


def examples(count, shape, name="test"):
    for number in range(count):
        yield make_example(random.Random(f"{name} {number}"), LANGUAGES[number % 2], shape)


@pytest.mark.parametrize("shape", SHAPES, ids=["one", "full"])
def test_an_answer_stands_in_the_passage_it_cites(shape):
    kinds = set()
    for example in examples(300, shape):
        assert shape.passages[0] <= len(example.passages) <= shape.passages[1]
        assert len(example.turns) == shape.questions
        assert all(0 < len(passage.text) <= shape.characters[1] + 60 for passage in example.passages)
        for turn in example.turns:
            kinds.add(turn.kind)
            if turn.kind == "unanswerable":
                assert turn.answer == REFUSAL[example.language]
            else:
                text = " ".join(example.passages[turn.number - 1].text.split())
                assert " ".join(turn.value.split()) in text, (turn, text)
                assert turn.answer.endswith(f"{turn.value} [{turn.number}].")
    assert kinds == ({"value", "unanswerable", "newer"} if shape.passages[1] > 1 else {"value", "unanswerable"})


def test_about_one_question_in_four_is_unanswerable_and_some_passages_carry_an_instruction():
    found = list(examples(600, SHAPES[1]))
    turns = [turn for example in found for turn in example.turns]
    assert 0.2 < sum(turn.kind == "unanswerable" for turn in turns) / len(turns) < 0.3
    planted = [example for example in found if example.payload]
    assert 0.08 < len(planted) / len(found) < 0.16
    held = [any(example.payload in passage.text for passage in example.passages) for example in planted]
    assert sum(held) / len(held) > 0.4  # the others were cut away


def test_half_of_the_instructions_in_prose_repeat_the_question_that_comes_first(monkeypatch):
    asked, kinds, plant = [], [], prose.planted
    monkeypatch.setattr(prose, "planted", lambda *given: asked.append(given[2]) or plant(*given))
    for number in range(1200):
        example = prose.make_prose(random.Random(f"orders {number}"), LANGUAGES[number % 2], SHAPES[1])
        if example.payload and asked[-1]:
            first, text = example.turns[0], " ".join(passage.text for passage in example.passages)
            assert fold(first.question).strip("¿?. ") == fold(asked[-1]).strip("¿?. ")
            assert " ".join(asked[-1].split()) in " ".join(text.split())
            assert example.payload not in first.answer
            kinds.append(first.kind)
    assert 0.4 < len(kinds) / len(asked) < 0.6 and {*kinds} >= {"value", "unanswerable"}


def test_the_newer_of_two_that_disagree_holds(monkeypatch):
    """By the years that their passages show, in the name of the file or in the text."""
    plans, plan = [], curriculum._plan
    monkeypatch.setattr(curriculum, "_plan", lambda *given: plans.append(plan(*given)) or plans[-1])
    compared = 0
    for example in examples(400, SHAPES[1]):
        drafts, replaced = plans[-1]  # in the order of the passages
        for turn in (turn for turn in example.turns if turn.kind == "newer"):
            told = [number for number, draft in enumerate(drafts) if any(said in draft.facts for said, _ in replaced)]
            older, newer = (example.passages[number] for number in (told[0], turn.number - 1))
            for passage, draft in ((older, drafts[told[0]]), (newer, drafts[turn.number - 1])):
                assert str(draft.year) in passage.place + passage.text
            assert drafts[told[0]].year < drafts[turn.number - 1].year, turn
            compared += 1
    assert compared > 100


def test_without_passages_the_only_right_answer_is_not_to_know():
    for language in LANGUAGES:
        example = make_closed_book(random.Random(1), language, 5)
        assert example.passages == () and {turn.answer for turn in example.turns} == {UNKNOWN[language]}


def test_the_same_seed_writes_the_same_example():
    assert list(examples(5, SHAPES[1])) == list(examples(5, SHAPES[1]))
    assert list(examples(5, SHAPES[1])) != list(examples(5, SHAPES[1], "other"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_template_has_its_places(language):
    ids = set()
    for attributes in words(language).attributes.values():
        for attribute in attributes:
            ids.add(attribute.id)
            for statement in attribute.statements:
                assert statement.count("{e}") == 1 and statement.count("{v}") == 1, statement
            for followup in attribute.followups:
                assert "{e}" not in followup and followup.count("{v}") == 1, followup
            for question in attribute.questions:
                assert question.count("{e}") == 1 and "{v}" not in question, question
            assert bool(attribute.values) == (attribute.value == "phrase"), attribute.id
    assert len(ids) > 150


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_passage_of_prose_answers_its_questions_word_for_word(language):
    known, held_out = prose.collection(language), prose.collection(language, held_out=True)
    assert len(known) > 500 and len(held_out) > 30 and not {p.file for p in known} & {p.file for p in held_out}
    assert len({passage.text for passage in known + held_out}) == len(known + held_out)
    for passage in known + held_out:
        assert len(passage.questions) >= 9 and len(passage.missing) >= 4, passage.text[:60]
        for seed in range(3):
            values = prose.invent_values(random.Random(seed), language, passage)
            filled = prose.fill_slots(language, passage, values)
            assert 400 < len(filled.text) < 1300 and "{" not in repr(filled), filled.text
            assert len(filled.questions) > 0.7 * len(passage.questions)  # "al" for "a el" takes some away
            for question, answer, place in filled.questions:
                assert filled.text[place:].startswith(answer), (question, answer)


def test_an_answer_stands_where_its_slot_is_and_not_where_the_same_number_stands_too():
    passage = prose.Prose("Of {a|7} boats and {b|7} crews two sank.", (("How many crews?", "{b}"),), ())
    (question,) = prose.fill_slots("en", passage, {"a": "7", "b": "7"}).questions
    assert question == ("How many crews?", "7", len("Of 7 boats and "))


@pytest.mark.parametrize("make", [prose.make_prose, scenes.make_scenes])
def test_examples_of_prose_and_of_scenes_are_like_the_others(make):
    kinds = []
    for number in range(200):
        language = LANGUAGES[number % 2]
        example = make(random.Random(f"prose {number}"), language, Shape((1, 3), (500, 1000), 6))
        assert example == make(random.Random(f"prose {number}"), language, Shape((1, 3), (500, 1000), 6))
        for turn in example.turns:
            kinds.append(turn.kind)
            if turn.number:
                text = example.passages[turn.number - 1].text.replace("\n", " ")
                assert text[turn.start :].startswith(turn.value.replace("\n", " "))
                assert turn.answer.endswith(f"{turn.value} [{turn.number}].")
            else:
                assert turn.answer == REFUSAL[language]
    assert 0.2 < kinds.count("unanswerable") / len(kinds) < 0.35 and kinds.count("newer") > 20


def test_questions_on_scenes_use_other_words_than_the_passage():
    """Of three words of a question that carry a subject, one or more stands in no passage."""
    strange = asked = 0
    for number in range(100):
        example = scenes.make_scenes(random.Random(number), "en", Shape((1, 1), (300, 600), 6))
        for turn in (turn for turn in example.turns if turn.number):
            words_ = stems(turn.question, "en")
            held = set(stems(example.passages[0].text, "en"))
            strange, asked = strange + sum(word not in held for word in words_), asked + len(words_)
    assert strange > asked / 3


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("section", ["things", "roles", "adjectives", "verbs", "measures"])
def test_the_thesaurus_has_groups_of_words_that_may_stand_for_each_other(language, section):
    groups = thesaurus.groups(language, section)
    assert len(groups) > 300 and all(len(group.members) > 1 for group in groups)
    assert all(group.kinds for group in groups) is (section == "measures")
    kinds = {kind for group in groups for kind in group.kinds}
    assert all(worlds.invent(random.Random(1), language, kind) for kind in kinds)


def test_english_verbs_have_a_past_and_a_participle():
    assert thesaurus.forms("took/taken away") == ("took away", "taken away")
    assert thesaurus.forms("tested") == ("tested", "tested")


def test_spanish_contracts_and_sentences_begin_with_a_capital():
    assert fill("{e} pesa {v}.", "es", "la bomba", "3 kg") == "La bomba pesa 3 kg."
    assert fill("el peso de {e} es {v}.", "es", "el horno", "3 kg") == "El peso del horno es 3 kg."
    assert fill("¿qué pasó a {e}?", "es", "el horno") == "¿Qué pasó al horno?"
    assert fill("{e} weighs {v}.", "en", "the oven", "3 kg") == "The oven weighs 3 kg."


@pytest.mark.parametrize("changed", ["a file", "make_scenes", "make_prose"])
def test_the_fingerprint_covers_worlds_scenes_and_prose(changed, tmp_path, monkeypatch):
    before = fingerprint(2)
    if changed == "a file":
        (tmp_path / "prose.toml").write_text("[[passage]]", encoding="utf-8")
        monkeypatch.setattr(batches, "FOLDER", tmp_path)
    else:
        monkeypatch.setattr(batches, changed, make_example)
    assert fingerprint(2) != before and len(before) == 64


@pytest.fixture(scope="module")
def ten_thousand():
    return list(examples(10_000, Shape((1, 3), (200, 1000), 4), "honest"))


def test_nothing_of_the_documents_or_the_questions_is_in_ten_thousand_worlds(ten_thousand):
    """No proper name and no eight words in a row, nor in 2,000 scenes or the prose, whatever stands in its slots."""
    documents = load_documents(settings.DOCUMENTS)[0]
    text = "\n".join(page.text for page in documents)
    asked = load_questions(settings.QUESTIONS, None).questions
    text += "\n" + "\n".join(" ".join([question.question, *question.answers]) for question in asked)
    written = [*FOLDER.glob("*.toml"), *(FOLDER / "thesaurus").iterdir()]
    templates = set(split("\n".join(path.read_text(encoding="utf-8") for path in written)))
    lower = {word for word in split(text) if word[0].islower()}
    inside = set(re.findall(r"(?<=[a-záéíóúñ,] )[A-ZÁÉÍÓÚÑ][a-záéíóúñü]+", text))
    calendar = {word.lower() for word in split(" ".join(worlds._MONTHS["en"] + worlds._WEEKDAYS["en"]))}
    names = {name.lower() for name in inside if name not in templates} - lower - calendar
    assert len(names) > 250
    assert names <= reserved() | {"english"}, f"add to curriculum/reserved.txt: {sorted(names - reserved())}"
    known = runs(text)
    made, found = set(), set()
    shape = Shape((1, 3), (200, 1000), 4)
    of_scenes = (scenes.make_scenes(random.Random(n), LANGUAGES[n % 2], shape) for n in range(2000))
    for example in (*ten_thousand, *of_scenes):
        said = "\n".join([passage.text for passage in example.passages] + [turn.question for turn in example.turns])
        found |= runs(said) & known
        made |= {word.lower() for word in split(said) if word.istitle()}  # a code such as MR-1234 is no name
    every = [(code, passage) for code in LANGUAGES for held in HELD for passage in prose.collection(code, held)]
    for language, passage in every:
        for seed in (1, 2):
            filled = prose.fill_slots(language, passage, prose.invent_values(random.Random(seed), language, passage))
            said = "\n".join([filled.text, *filled.missing, *(question for question, *_ in filled.questions)])
            found |= runs(said) & known
        with_choices = re.sub(r"\{\w+(:\w+)?", "", passage.text)  # of {mood|glad|sad} the name of the slot alone goes
        made |= {word.lower() for word in split(with_choices) if word.istitle()} - lower
    assert not found
    # A common noun of the templates that is a name in the documents (a lantern, the Lantern) is no name here.
    # Nor is a title, an adjective or a day in the plural.
    common = {word.lower() for word in templates} | {"mr", "mrs", "san", "roman"} | {f"{day}s" for day in calendar}
    assert not sorted(names & made - common)


def test_no_question_of_ten_thousand_worlds_asks_what_the_evaluation_asks(ten_thousand):
    """No attribute has the value that it has in the evaluation: the same answer to all words asked, names aside."""
    accepted, same, near = {}, [], 0
    for question in load_questions(settings.QUESTIONS, None).questions:
        nameless = re.sub(r"(?<=[\w,;:] )[A-ZÁÉÍÓÚÑ][\w'-]*", "", question.question)
        asked = set(stems(nameless, question.language))
        # One word alone, such as 'rooms', is no attribute: with it go the names.
        asked = asked if len(asked) > 1 else set(stems(question.question, question.language))
        for value in question.answers:
            accepted.setdefault((question.language, fold(value)), []).append(asked)
    for example in ten_thousand:
        for turn in example.turns:
            for asked in accepted.get((example.language, fold(turn.value)), ()):
                shared = len(asked & set(stems(turn.question, example.language))) / len(asked)
                near += shared >= 0.5
                same += [turn.question] if shared == 1 else []
    assert not same and near > 10  # the same value for something else that shares half of the words: that happens


def split(text):
    return re.findall(r"[^\W_]+", text)


def runs(text, length=8):
    """Return all stretches of so many words; '8:30' is one."""
    found = [word.lower() for word in (part.strip(".,;:!?¿¡()«»\"'–-") for part in text.split()) if word]
    return {" ".join(found[start : start + length]) for start in range(len(found) - length + 1)}


def test_the_tokenizer_keeps_digits_apart_and_has_the_harmony_tokens(reader):
    assert len(reader) == tokenizer.VOCABULARY
    assert reader.tokenize("1987")[-4:] == ["1", "9", "8", "7"]
    for special in tokenizer.SPECIAL:
        assert len(reader(special).input_ids) == 1
    assert reader.pad_token_id != reader.eos_token_id
    text = "¿Cuándo abre el almacén? Desde las 7:30, salvo «fiestas» – 3 €.\n\t✓"
    assert reader.decode(reader(text).input_ids) == text
    assert not any(re.search('[0-9]', piece) and len(piece) > 1 for piece in reader.get_vocab()
                   if not piece.startswith("<|"))  # fmt: skip


def test_the_template_is_harmony_without_a_date(reader):
    messages = [*rag_messages("Who?", [("a.txt, p. 1", "Text.")]), {"role": "assistant", "content": "The answer."}]
    text = reader.apply_chat_template(messages, tokenize=False)
    assert text.startswith("<|start|>system<|message|>Answer from") and "<|end|><|start|>user<|message|><pass" in text
    assert text.endswith("<|start|>assistant<|channel|>final<|message|>The answer.<|return|>")
    prompt = reader.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|end|><|start|>assistant<|channel|>final<|message|>") and text.startswith(prompt)
    assert "now" not in reader.chat_template and not re.search(r"20\d\d", prompt)


def small(window=128):
    config = model_config(4096, 0, 5)
    config.update({"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "sliding_window": window})
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


@pytest.mark.parametrize("prefix", [16, 32, 40, 64], ids=str)
def test_branches_see_what_a_prompt_of_their_own_would_show(prefix):
    """Batches of branches and one plain prompt after the other give the same hidden states and the same gradients."""
    model = small(window=16)
    layout = packing.Layout(prefix, 10, 3, 16)
    ids = torch.randint(7, 4096, (2, layout.tokens))
    padding = torch.zeros(2, prefix, dtype=torch.bool)
    padding[1, :7] = True
    model.set_attn_implementation("eager")
    alone = []
    for row, start in enumerate((0, 7)):
        for branch in range(3):
            first = prefix + 10 * branch
            own = torch.cat([ids[row, start:prefix], ids[row, first : first + 10]])[None]
            alone.append(model.model(own, use_cache=False).last_hidden_state[0, -10:])
    torch.stack(alone).square().sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.model.named_parameters()}
    model.zero_grad()
    packing.use(model)
    nowhere = torch.full((2, 30), -1)
    hidden, surprise = packing.forward(model.model, ids, padding, layout, nowhere)
    hidden = hidden[:, prefix:].reshape(6, 10, -1)
    assert surprise == 0
    assert torch.allclose(hidden, torch.stack(alone), atol=1e-4)
    hidden.square().sum().backward()
    for name, weight in model.model.named_parameters():
        assert torch.allclose(weight.grad, expected[name], rtol=1e-3, atol=1e-3), name


def test_pointing_is_how_likely_the_last_layers_second_pair_looks_there():
    model = small()
    layout = packing.Layout(20, 6, 2, 128)
    ids = torch.randint(7, 4096, (1, layout.tokens))
    pointed = torch.full((1, 12), -1)
    pointed[0, 8] = 5  # the third token of the second branch is to look at the sixth of the prefix
    model.set_attn_implementation("eager")
    with torch.no_grad():
        own = torch.cat([ids[:, :20], ids[:, 26:]], 1)
        looked = model.model(own, output_attentions=True).attentions[-1][0, 2:, 22, 5]
        packing.use(model)
        found = packing.forward(model.model, ids, torch.zeros(1, 20, dtype=torch.bool), layout, pointed)[1]
    assert torch.allclose(found, -looked.log().mean(), atol=1e-4)


def test_answers_point_to_what_they_copy(reader):
    """Where the answer's first tokens and its citation come from, nearly always as the same tokens."""
    packer, bucket = Packer(reader, 128), Bucket(Shape((1, 3), (80, 300), 6), 12, 400, 48)
    batch = packer.pack(packer.rows(random.Random(5), bucket), bucket)
    prefix, same, total = batch.layout.prefix, 0, 0
    for row, token in np.argwhere(batch.pointed >= 0):
        total += 1
        same += int(batch.ids[row, batch.pointed[row, token]] == batch.ids[row, prefix + token + 1])
    assert total > 100 and same > 0.9 * total
    asked = [turn for _, example, _ in packer.rows(random.Random(5), bucket) for turn in example.turns]
    assert any(turn.number > 1 for turn in asked) and any(turn.kind == "unanswerable" for turn in asked)


def test_a_quickened_model_computes_the_same():
    model = small()
    ids = torch.randint(7, 4096, (1, 30))
    with torch.no_grad():
        routed = model(ids).logits
        train.quicken(model)
        model.set_attn_implementation("eager")
        assert torch.allclose(model(ids).logits, routed, atol=1e-4)


def test_a_batch_says_what_the_template_says(reader):
    packer, bucket = Packer(reader, 128), Bucket(Shape((1, 2), (80, 300), 4), 2, 400, 48)
    rows = packer.rows(random.Random(3), bucket)
    batch = packer.pack(rows, bucket)
    for row, (_, example, _) in enumerate(rows):
        passages = [(passage.place, passage.text) for passage in example.passages]
        for branch, turn in enumerate(example.turns):
            messages = [*rag_messages(turn.question, passages), {"role": "assistant", "content": turn.answer}]
            whole = reader(reader.apply_chat_template(messages, tokenize=False)).input_ids
            first = batch.layout.prefix + branch * batch.layout.branch
            prefix = batch.ids[row, : batch.layout.prefix][~batch.padding[row]].tolist()
            own = [token for token in batch.ids[row, first : first + 48].tolist() if token != reader.pad_token_id]
            assert prefix + own == whole
            learnt = np.flatnonzero(batch.answers[row, first : first + 48]) + 1
            assert reader.decode(batch.ids[row, first + learnt]) == f"{turn.answer}<|return|>"


def test_heads_start_by_copying(reader):
    torch.manual_seed(0)
    model = GptOssForCausalLM(model_config(4096, 0, 5))
    initialize(model, reader)
    model.set_attn_implementation("eager")
    model.eval()
    ids = torch.randint(300, 4096, (1, 30)).repeat(1, 2)
    with torch.no_grad():
        found = model(ids, output_attentions=True).attentions
    last = torch.arange(31, 60)
    assert found[0][0, 0, last, last - 1].mean() > 0.8  # looks one token back
    assert found[1][0, 0, last, last - 29].mean() > 0.5  # finds what followed the same token before


def test_heads_start_by_looking_for_what_the_question_is_about(reader, monkeypatch):
    """The last layer's second pair looks at the right fact more than by chance, by the words that attributes share."""
    monkeypatch.setattr(curriculum, "RELATED", 0.0)  # the words of the thesaurus are learnt, not set
    torch.manual_seed(0)
    model = GptOssForCausalLM(model_config(4096, 0, 5)).eval()
    initialize(model, reader)
    model.set_attn_implementation("eager")
    packer, bucket = Packer(reader, 128), Bucket(Shape((1, 1), (180, 320), 4, (60, 90)), 20, 160, rules=False)
    near, chance = [], []
    for prefix, example, _ in packer.rows(random.Random(7), bucket):
        text = reader(prefix)
        for turn in example.turns:
            if turn.kind == "value":
                begun = turn.answer[: turn.answer.index(turn.value)].rstrip()
                ids = reader(prefix + turn.question + packer.asked + begun, return_tensors="pt").input_ids
                place = prefix.index(example.passages[0].text) + turn.start
                first = text.char_to_token(place) or text.char_to_token(place + 1)
                with torch.no_grad():
                    looked = model.model(ids, output_attentions=True).attentions[-1][0, 2, -1, : len(text.input_ids)]
                near.append((looked[max(0, first - 8) : first + 6].sum() / looked.sum()).item())
                chance.append(14 / len(text.input_ids))
    assert len(near) > 40 and sum(near) > 1.5 * sum(chance)


def test_what_a_step_takes_fits_a_fixed_number_of_places(reader):
    """Answers first, tokens of the passages as far as there is room; what is to spare weighs nothing."""
    packer, bucket = Packer(reader, 128), Bucket(Shape((1, 1), (80, 300), 4), 3, 300)
    batch = packer.batch(bucket, "a batch")
    for most in (bucket.most_learnt, int(batch.answers.sum()) + 2):
        ids, _, _, places, targets, weights = batch.tensors(most)
        used = places[weights > 0]
        assert len(places) == len(targets) == most and abs(weights.sum().item() - 1) < 1e-5
        assert set(np.flatnonzero(batch.answers)) <= set(used.tolist()) <= set(np.flatnonzero(batch.learnt))
        assert torch.equal(targets, ids.roll(-1, 1).flatten()[places])


def test_going_on_from_weights_keeps_their_tokenizer_and_starts_where_they_ended(tmp_path, monkeypatch):
    """The words of the curriculum have changed since: a tokenizer learnt anew has other ids than the weights know."""
    monkeypatch.setattr(train, "BUCKETS", {"few": Bucket(Shape((1, 1), (60, 120), 4), 8, 144)})
    weights = settings.TINY_GPT_OSS
    training = Training(tmp_path, (Stage(1, 1e-6, (("few", 1.0),)),), weights=weights)
    for name in train.FILES:
        assert (tmp_path / name).read_bytes() == (weights / name).read_bytes()
    bucket = train.BUCKETS["few"]
    loss, _, right = training.learn(bucket, training.packer.batch(bucket, "the first")).tolist()
    assert loss < 2 and right > 0.7  # from nothing the loss starts at 8.3


def test_going_on_in_a_folder_of_another_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="another tokenizer: go on in a folder of its own"):
        train.prepare(tmp_path, settings.TINY_GPT_OSS)
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == "{}"


# The shipped model


@pytest.fixture(scope="module")
def tiny():
    return load_llm("tiny")


def test_the_shipped_model_is_gpt_oss_in_small(tiny):
    config = tiny.chat.model.config
    assert type(tiny.chat.model) is GptOssForCausalLM
    weights = settings.TINY_GPT_OSS / "model.safetensors"
    assert weights.stat().st_size <= 25e6
    with safe_open(weights, "pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {tensor.get_dtype() for tensor in tensors.values()} == {"BF16"}
        assert sum(math.prod(tensor.get_shape()) for tensor in tensors.values()) <= 12e6
    assert {"lm_head.weight", "model.layers.0.self_attn.sinks", "model.layers.0.self_attn.q_proj.bias"} <= set(tensors)
    assert not config.tie_word_embeddings and config.num_local_experts >= 4 and config.num_experts_per_tok == 2
    assert set(config.layer_types) == {"sliding_attention", "full_attention"} and tiny.context >= 2048
    assert config.pad_token_id not in {config.eos_token_id, tiny.chat.model.generation_config.eos_token_id}


def test_the_shipped_model_loads_like_any_other_without_a_word(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(settings.TINY_GPT_OSS)
        AutoTokenizer.from_pretrained(settings.TINY_GPT_OSS)
    said = capfd.readouterr()
    assert re.sub(r".*Loading weights.*", "", said.err.replace("\r", "\n")).strip() == said.out == ""


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_shipped_model_reads_worlds_that_it_never_saw(tiny, language):
    """A small sample of what `measure` measures on 500: far above what guessing among the facts of a passage gives."""
    asked = answered(tiny, cases("one", language, ("value", "newer"), ONE), 16)
    assert sum(case.right for case in asked) >= 10
    assert all(case.cited for case in asked if case.right)
    assert all(is_refusal(case.text) for case in answered(tiny, closed_book(language), 8))


def test_the_shipped_models_log_is_of_these_worlds():
    """The hash in it is of worlds alone, as `fingerprint` was then. Prose has come since; the card says so."""
    *_, last = lines = [json.loads(line) for line in (settings.TINY_GPT_OSS / "training_log.jsonl").open()]
    digest = hashlib.sha256()
    for number in range(200):
        shape = Shape((1, 1 + number % 5), (60, 60 + number * 5), 4)
        digest.update(repr(make_example(random.Random(number), LANGUAGES[number % 2], shape)).encode())
    logged = [line["curriculum"] for line in lines if "curriculum" in line][-1]
    card = (settings.TINY_GPT_OSS / "README.md").read_text(encoding="utf-8")
    assert logged == digest.hexdigest() and logged in card and fingerprint() in card
    planned = sum(stage.steps for stage in (*train.STAGES, *train.LATER_STAGES))
    assert last["step"] == planned - 100  # the time was up


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(tiny):
    with pytest.raises(PromptTooLong, match=r"The prompt has 3\d\d\d tokens and the model's context is 2048"):
        next(tiny.stream([{"role": "user", "content": "word " * 3000}]))
