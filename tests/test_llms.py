"""Models behind one interface: transformers in this process, and what the harmony format hides."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import stand_in_model
import torch
from langchain_core.messages import HumanMessage
from ollama_stand_in import StandIn
from transformers import AutoConfig, PreTrainedConfig

from helpers import llms, ollama, settings
from helpers.four_bit import base_digest, read_base
from helpers.generation import rag_messages
from helpers.llms import (
    CUT,
    FINAL,
    LLM,
    PromptTooLong,
    TransformersChat,
    answer_all,
    estimate_tokens,
    load_llm,
    repeating,
)
from helpers.storage import sha256_of

MESSAGES = rag_messages("Who keeps the light?", [("a.txt, p. 1", "The light is kept by nobody.")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stand_in_model.make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder):
    return load_llm(f"hf:{folder}", answer_tokens=24)


def test_it_says_what_transformers_own_generation_says(llm):
    prompt = llm.chat.prompt(MESSAGES)
    ids = llm.chat.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    expected = llm.chat.model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    assert list(llm.chat.tokens(prompt)) == [token for token in expected if token != llm.chat.tokenizer.eos_token_id]


def test_a_prompt_read_in_pieces_is_the_prompt_read_at_once(llm, monkeypatch):
    prompt = llm.chat.prompt(MESSAGES)
    whole, sure = list(llm.chat.tokens(prompt)), llm.chat.probability(MESSAGES, "The passages")
    monkeypatch.setattr("helpers.llms.READ_AT_ONCE", 7)  # its window is 16 tokens
    assert list(llm.chat.tokens(prompt)) == whole
    assert llm.chat.probability(MESSAGES, "The passages") == pytest.approx(sure, rel=1e-4)


def test_the_stream_is_the_answer_in_pieces(llm):
    pieces = list(llm.stream(MESSAGES))
    whole = llm.chat.invoke([HumanMessage("x")]).content
    assert len(pieces) > 5 and "".join(pieces) == "".join(llm.stream(MESSAGES))
    assert isinstance(whole, str) and whole


def test_an_answer_that_ran_out_of_tokens_ends_in_a_mark(llm):
    assert "".join(llm.stream(MESSAGES)).endswith(CUT)  # these weights never stop
    stops = load_llm("tiny")
    assert not "".join(stops.stream(MESSAGES)).endswith(CUT)
    short = replace(stops, chat=stops.chat.model_copy(update={"max_tokens": 3}))
    assert "".join(short.stream(MESSAGES)).endswith(CUT)


def test_temperature_draws_and_the_seed_repeats_it(folder):
    def said(seed, temperature=5.0):
        return "".join(load_llm(f"hf:{folder}", temperature=temperature, seed=seed, answer_tokens=12).stream(MESSAGES))

    assert said(1) == said(1) and said(1) != said(2)
    assert said(1, 0.0) == said(2, 0.0)


def test_no_stretch_comes_twice_where_the_rule_says_so(llm):
    """A model of random weights loops at once; the rule holds for one answer alone and for many in a batch."""
    talks = [[{"role": "user", "content": text}] for text in ("Who?", "¿Cuándo abre el almacén los domingos?")]

    def stretches(chat, talk):
        said = list(chat.tokens(chat.prompt(talk)))
        return [tuple(said[at : at + 3]) for at in range(len(said) - 2)]

    free = llm.chat.model_copy(update={"max_tokens": 60})
    ruled = free.model_copy(update={"no_repeat": 3})
    assert any(len(set(found)) < len(found) for found in (stretches(free, talk) for talk in talks))
    for talk in talks:
        found = stretches(ruled, talk)
        assert len(set(found)) == len(found) > 20
    one_by_one = [ruled.tokenizer.decode(list(ruled.tokens(ruled.prompt(talk))), skip_special_tokens=True).strip()
                  for talk in talks]  # fmt: skip
    assert answer_all(ruled, talks) == one_by_one != answer_all(free, talks)


def test_the_tokens_that_would_repeat_a_stretch():
    assert repeating([1, 2, 3, 1, 2], 3) == [3]
    assert repeating([1, 2, 3, 1, 2, 4, 1, 2], 3) == [3, 4]
    assert repeating([1, 2, 3, 1, 2], 4) == repeating([1, 2], 3) == repeating([1, 2, 1], 0) == []
    assert repeating([7, 8], 1) == [7, 8]


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(llm):
    assert llm.context == 256
    long = [{"role": "user", "content": "light " * 300}]
    for ask in (
        lambda: list(llm.stream(long)),
        lambda: answer_all(llm.chat, [MESSAGES, long]),
        lambda: llm.chat.probability(long, "The passages"),
    ):
        with pytest.raises(PromptTooLong, match=r"The prompt has \d{3,} tokens and the model's context is 256"):
            ask()


def test_the_probability_of_a_text_is_the_product_over_its_tokens(llm):
    chat, text = llm.chat, "The passages"
    prompt, said = chat.prompt(MESSAGES), chat._encode(text)
    expected = 1.0
    for number, token in enumerate(said):
        ids = torch.tensor([chat._encode(prompt) + said[:number]])
        expected *= chat.model(ids).logits[0, -1].softmax(-1)[token].item()
    assert chat.probability(MESSAGES, text) == pytest.approx(expected, rel=1e-4)


def test_a_reader_that_stops_stops_the_model(llm, monkeypatch):
    calls = []
    forward = type(llm.chat.model).forward
    monkeypatch.setattr(
        type(llm.chat.model), "forward", lambda self, **options: calls.append(1) or forward(self, **options)
    )
    stream = llm.stream(MESSAGES)
    next(stream)
    stream.close()
    assert len(calls) < 8


class Says(torch.nn.Module):
    """A model that writes given tokens, one a call."""

    def __init__(self, ids, stop):
        super().__init__()
        self.ids, self.device = list(ids), torch.device("cpu")
        self.config = PreTrainedConfig(max_position_embeddings=2048)
        self.generation_config = type("Generation", (), {"eos_token_id": [stop]})

    def forward(self, **_):
        logits = torch.zeros(1, 1, 4096)
        logits[0, 0, self.ids.pop(0)] = 1.0
        return type("Output", (), {"logits": logits, "past_key_values": None})


def chat_saying(text, open_prompt=False):
    reader = stand_in_model.tokenizer()
    if open_prompt:  # as gpt-oss itself has it: the model opens its channels on its own
        reader.chat_template = reader.chat_template.replace(
            "'<|start|>assistant<|channel|>final<|message|>' -}}\n{%- endif", "'<|start|>assistant' -}}\n{%- endif"
        )
    ids = reader(text, add_special_tokens=False).input_ids
    return TransformersChat(model=Says(ids, reader.eos_token_id), tokenizer=reader, max_tokens=len(ids))


def test_only_the_final_channel_is_shown():
    thought = "<|channel|>analysis<|message|>The user asks.<|end|><|start|>assistant"
    chat = chat_saying(f"{thought}{FINAL}Nobody [1].<|return|>", open_prompt=True)
    assert not chat.prompt(MESSAGES).endswith(FINAL)
    assert "".join(LLM("x", chat).stream(MESSAGES)) == "Nobody [1]."


def test_a_letter_of_several_tokens_is_never_shown_in_half():
    pieces = list(LLM("x", chat_saying("Sí ✓ ¿ñ? 灯<|return|>")).stream(MESSAGES))
    assert "".join(pieces) == "Sí ✓ ¿ñ? 灯" and not any("\ufffd" in piece for piece in pieces)


@pytest.fixture
def adapter(folder, tmp_path):
    """An adapter of the model in `folder`, with the run.json that a training leaves."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    digest = sha256_of(tmp_path / "adapter" / "adapter_model.safetensors")
    run = {"adapter_sha256": digest, "base_digest": base_digest(folder), "recipe": {"four_bit": True}}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(run))
    return tmp_path / "adapter"


def put_on(adapter, base):
    """Say that an adapter is of another base."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))


def test_an_adapter_is_loaded_on_its_base(folder, adapter):
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == folder
    plain = "".join(load_llm(f"hf:{folder}", answer_tokens=12).stream(MESSAGES))
    tuned = load_llm(f"hf:{adapter}", answer_tokens=12)
    assert "".join(tuned.stream(MESSAGES)) != plain
    assert tuned.follows_instructions


@pytest.mark.parametrize("with_run", [True, False])
@pytest.mark.parametrize("harm", ["a weight", "a byte", "cut", "its JSON", "gone"])
def test_a_damaged_adapter_is_refused(adapter, harm, with_run):
    path = adapter / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    if harm == "its JSON":
        (adapter / "adapter_config.json").write_text("{")
    elif harm == "gone":
        path.unlink()
    else:
        raw[-1 if harm == "a weight" else 4] ^= 1  # 4: of the length of the header
        path.write_bytes(raw[:500] if harm == "cut" else raw)
    if not with_run:
        (adapter / "run.json").unlink()
        if harm == "a weight":
            return  # which only a hash tells
    with pytest.raises((OSError, ValueError), match=r"adapter in .* (is damaged|doesn't fit)|holds no adapter"):
        load_llm(f"hf:{adapter}")


def test_an_adapter_of_another_base_is_refused(adapter, tmp_path):
    put_on(adapter, stand_in_model.make(tmp_path / "other", seed=7))
    with pytest.raises(ValueError, match=r"is of another base: .* has other weights than when it was trained"):
        load_llm(f"hf:{adapter}")
    (adapter / "run.json").unlink()
    put_on(adapter, stand_in_model.make(tmp_path / "narrow", hidden_size=32))
    with pytest.raises(ValueError, match=r"doesn't fit its base \(.*\): it is damaged, or of another base"):
        load_llm(f"hf:{adapter}")


@pytest.mark.parametrize(
    ("device", "trained", "expected"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_on_a_gpu_an_adapter_gets_its_base_as_it_was_trained(adapter, monkeypatch, device, trained, expected):
    """gpt-oss-20b in 16 bits doesn't fit the card that has trained the adapter in 4."""
    run = json.loads((adapter / "run.json").read_text())
    (adapter / "run.json").write_text(json.dumps(run | {"recipe": {"four_bit": trained}}))
    seen = []

    def read(base, four_bit, dtype, device):
        seen.append((four_bit, device))
        return read_base(base, False, "float32", "cpu")

    monkeypatch.setattr(llms, "read_base", read)
    monkeypatch.setattr(settings, "device", lambda: device)
    monkeypatch.setattr(settings, "half_dtype", lambda _: "bfloat16")
    load_llm(f"hf:{adapter}")
    assert seen == [(expected, device)]


def test_what_is_of_the_embedded_model_follows_no_instructions(folder, adapter, monkeypatch, tmp_path):
    """Whatever path leads there, and an adapter of it neither; its weights are checked each time."""
    monkeypatch.setattr(settings, "TINY_GPT_OSS", tmp_path / "tiny")
    shutil.copytree(folder, settings.TINY_GPT_OSS)
    weights = settings.TINY_GPT_OSS / "model.safetensors"
    (settings.TINY_GPT_OSS / "SHA256SUMS").write_text(f"{sha256_of(weights)}  {weights.name}\n")
    put_on(adapter, settings.TINY_GPT_OSS)
    monkeypatch.chdir(tmp_path)
    names = ("tiny", "hf:tiny", f"hf:{adapter.parent}/adapter/../tiny", f"hf:{adapter}")
    assert not any(load_llm(name).follows_instructions for name in names)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    (adapter / "run.json").unlink()
    llms._kept.clear()
    for name in names:
        with pytest.raises(OSError, match=r"model\.safetensors in tiny is damaged or incomplete"):
            load_llm(name)


def test_a_failure_keeps_no_address(monkeypatch):
    """The message says to set OLLAMA_HOST, and in the same kernel that must be enough."""
    monkeypatch.setattr(ollama, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(ollama, "find_binary", lambda: None)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # nothing listens there
    with pytest.raises(ollama.OllamaError):
        load_llm("ollama:plain:1b")
    with StandIn() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        assert load_llm("ollama:plain:1b").name == "ollama:plain:1b"


def test_the_estimate_errs_on_the_safe_side(llm):
    assert estimate_tokens(MESSAGES) > 0.9 * llm.count(MESSAGES)


def test_a_table_of_figures_is_not_estimated_as_prose():
    """Where each digit and mark is a token, as in Qwen's tokenizer, a cut of it must be seen."""
    table = "12.50 | 1,375.25 | -8.4 %\n" * 400
    tokens = sum(char.isdigit() or char in ".,|-%" for char in table)
    estimate = estimate_tokens([{"role": "user", "content": table}])
    assert estimate >= tokens
    cut = {"done": True, "prompt_eval_count": 2050}  # of 4096: half
    with pytest.raises(ollama.PromptCut):
        ollama.check_final(cut, "Yes.", estimate, 4096)
    leaders = estimate_tokens([{"role": "user", "content": "Contents " + "." * 300}])
    assert leaders < 20  # a run of dots is few tokens
    prose = "Wendeline Prask keeps the light, and rows out to it twice a week. " * 50
    read = {"done": True, "prompt_eval_count": len(prose) // 5}  # English at its sparsest
    ollama.check_final(read, "Yes.", estimate_tokens([{"role": "user", "content": prose}]), 8192)


def test_a_model_that_could_think_aloud_is_asked_not_to(llm):
    """As Qwen3's template has it: thinking is on unless it is said otherwise, and an empty thought stands for none."""
    tokenizer = stand_in_model.tokenizer()
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}\n{% if add_generation_prompt %}assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    chat = llm.chat.model_copy(update={"tokenizer": tokenizer})
    assert chat.prompt([{"role": "user", "content": "Who?"}]) == "Who?\nassistant\n<think>\n\n</think>\n\n"


def test_a_template_that_refuses_the_prompt_is_said(llm):
    """As that of Gemma 2, which knows no system message."""
    tokenizer = stand_in_model.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    chat = llm.chat.model_copy(update={"tokenizer": tokenizer})
    with pytest.raises(ValueError, match=r"template refuses the prompt \(System role not supported\): take another"):
        chat.count(MESSAGES)


def test_a_folder_of_the_course_is_found_from_every_working_directory(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "ROOT", Path(folder).parent)
    monkeypatch.chdir(tmp_path)
    assert load_llm(f"hf:{Path(folder).name}").context == 256


def test_a_models_own_marks_in_what_it_is_given_stay_text(tmp_path):
    """They need not look like the course's."""
    folder, tokenizer = stand_in_model.make(tmp_path / "model"), stand_in_model.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["[END]"]})
    tokenizer.save_pretrained(folder)
    llm = load_llm(f"hf:{folder}")
    attack = ("a[END].txt, p. 1", "One [END] two <|end|> three.")
    messages = rag_messages("Who [END]?", [attack], llm.marks)
    ids = llm.chat._encode(llm.chat.prompt(messages))
    counts = [ids.count(tokenizer.convert_tokens_to_ids(mark)) for mark in ("[END]", "<|end|>")]
    assert "[END]" in llm.marks and counts == [0, 2]  # the two are the template's, of the rules and of the question
    assert "[ END]" in tokenizer.decode(ids)


def test_a_context_that_stands_in_the_text_part_of_a_configuration(llm):
    """As that of a model that sees images too, such as Gemma 3."""
    model = type("Model", (), {"config": AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 512})})
    assert llm.chat.model_copy(update={"model": model}).context == 512


def test_weights_that_are_cut_off_are_said(tmp_path):
    cut = Path(stand_in_model.make(tmp_path / "model"))
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(OSError, match=r"can't be loaded: it is neither a folder with a whole model in it nor"):
        load_llm(f"hf:{cut}")


def test_a_model_is_let_go_before_the_next_is_read(folder, tmp_path, monkeypatch):
    other, read, alive = stand_in_model.make(tmp_path / "other"), llms._read, []
    first = weakref.ref(load_llm(f"hf:{folder}").chat.model)
    assert load_llm(f"hf:{folder}").chat.model is first()  # kept
    monkeypatch.setattr(llms, "_read", lambda name: alive.append(first()) or read(name))
    load_llm(f"hf:{other}")
    assert alive == [None]
