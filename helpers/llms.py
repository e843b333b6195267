"""The models that answer, one interface for all: Ollama, transformers, or none at all (`quotes`).

Each is a LangChain chat model, so it streams and composes with the rest of LangChain.
"""

import gc
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, convert_to_messages
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from helpers import ollama, settings
from helpers.four_bit import attach, check_adapter, check_weights, is_tiny, load_tokenizer, marks_of, read_base
from helpers.storage import put_back

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
FINAL = "<|channel|>final<|message|>"  # where, in the harmony format, the answer proper begins
ENDS = ("<|return|>", "<|end|>", "<|call|>")
CUT = " …"  # ends the text of an answer that ran out of tokens
# Tokens of a prompt that a CPU reads at once: the tables of attention, tokens by tokens, then stay in its cache. A
# prompt of 1,200 tokens is read in less than half the time.
READ_AT_ONCE = 256
# What takes a token of its own at most: a digit, a run of one mark, a letter of no Latin alphabet.
_ALONE = re.compile(r"\d|([^\w\s]|_)\1*|[^\W\d_a-zA-ZÀ-ɏ]")


class PromptTooLong(ValueError):
    """A prompt that doesn't fit the model's context with room for an answer."""


class TransformersChat(BaseChatModel):
    """A chat model that runs in this process with transformers: greedy, or sampled with a seed.

    `temperature` 0 takes the likeliest token each time; above 0 it draws, the same for the same `seed`. With
    `no_repeat` an answer never holds a stretch of so many tokens twice, so it can't fall into a loop; 0 leaves it free.
    What a checkpoint's own generation settings ask for (top_p and the like) is left aside: the loop is all there is.
    """

    model: Any
    tokenizer: Any
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = settings.ANSWER_TOKENS
    no_repeat: int = 0

    @property
    def _llm_type(self) -> str:
        return "transformers"

    @property
    def context(self) -> int:
        """Return how many tokens prompt and answer may have together."""
        return self.model.config.get_text_config().max_position_embeddings

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the messages as the text that the model reads, by the tokenizer's chat template."""
        from jinja2 import TemplateError

        # Qwen3 would think aloud before each answer, and its adapters learn answers alone; other templates don't ask.
        options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
        try:
            return self.tokenizer.apply_chat_template(list(messages), **options)
        except TemplateError as error:
            raise ValueError(f"The model's chat template refuses the prompt ({error}): take another model.") from error

    def count(self, messages: Sequence[Message]) -> int:
        """Return the length of the prompt in tokens."""
        return len(self._encode(self.prompt(messages)))

    def _encode(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]

    def _checked(self, prompt: str) -> list[int]:
        """Return a prompt's token ids. Raises PromptTooLong if it leaves no room for an answer."""
        ids = self._encode(prompt)
        if len(ids) + 1 > self.context:
            raise PromptTooLong(
                f"The prompt has {len(ids)} tokens and the model's context is {self.context}: give it fewer or "
                "shorter passages."
            )
        return ids

    def tokens(self, prompt: str) -> Iterator[int]:
        """Yield the answer's token ids one by one: read the prompt, then append the next token until it says stop.

        Raises PromptTooLong.
        """
        import torch

        ids = self._checked(prompt)
        stops = self.model.generation_config.eos_token_id
        stops = set(stops if isinstance(stops, list) else [stops]) | {self.tokenizer.eos_token_id}
        generator = torch.Generator().manual_seed(self.seed)
        unread, seen, said = ids, None, []
        for _ in range(min(self.max_tokens, self.context - len(ids))):
            (logits,), seen = self._read(unread, seen)
            logits[repeating(said, self.no_repeat)] = -torch.inf
            if self.temperature:
                token = int(torch.multinomial((logits / self.temperature).softmax(-1), 1, generator=generator))
            else:
                token = int(logits.argmax())
            if token in stops:
                return
            yield token
            unread = [token]
            said.append(token)

    def _read(self, ids: list[int], seen=None, every: bool = False):
        """Read `ids`, `seen` being the cache of what was read before; return logits and the cache of it all.

        The logits are (1, vocabulary), about the token that comes next; with `every` a row for each of `ids`.
        """
        import torch

        at_once = READ_AT_ONCE if self.model.device.type == "cpu" else len(ids)
        rows = []
        for start in range(0, len(ids), at_once):
            part = torch.tensor([ids[start : start + at_once]], device=self.model.device)
            with torch.inference_mode():
                output = self.model(
                    input_ids=part, past_key_values=seen, use_cache=True, logits_to_keep=0 if every else 1
                )
            seen = output.past_key_values
            rows = [*rows, output.logits[0]] if every else [output.logits[0, -1:]]
        return torch.cat(rows).float().cpu(), seen

    def probability(self, messages: Sequence[Message], text: str) -> float:
        """Return how likely the model finds it that its answer begins with `text`: the product over its tokens."""
        import torch

        said = self._encode(text)
        logits, seen = self._read(self._checked(self.prompt(messages)))
        if said[1:]:
            logits = torch.cat([logits, self._read(said[:-1], seen, every=True)[0]])
        return float(logits.log_softmax(-1)[range(len(said)), said].sum().exp())

    def _stream(self, messages, stop=None, run_manager=None, **_) -> Iterator[ChatGenerationChunk]:
        prompt = self.prompt(_plain(messages))
        ids: list[int] = []
        sent = ""
        for token in self.tokens(prompt):
            ids.append(token)
            text = self._visible(prompt, ids)
            # A character of several bytes may have come in half: wait for the rest.
            if len(text) > len(sent) and not text.endswith("\ufffd"):
                yield ChatGenerationChunk(message=AIMessageChunk(content=text[len(sent) :]))
                sent = text
        room = min(self.max_tokens, self.context - len(self._encode(prompt)))
        about = {"eval_count": len(ids), "done_reason": "length" if len(ids) == room else "stop"}
        yield ChatGenerationChunk(message=AIMessageChunk(content="", response_metadata=about))

    def _visible(self, prompt: str, ids: list[int]) -> str:
        """Return the part of the answer that is meant for the reader: in the harmony format, its final channel."""
        if FINAL in self.tokenizer.chat_template and not prompt.endswith(FINAL):
            return final_channel(self.tokenizer.decode(ids))
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _generate(self, messages, stop=None, run_manager=None, **_) -> ChatResult:
        text = "".join(chunk.message.content for chunk in self._stream(messages))
        return ChatResult(generations=[ChatGeneration(message=AIMessage(content=text))])


def repeating(said: Sequence[int], length: int) -> list[int]:
    """Return the tokens that would end a stretch of `length` tokens which `said` holds already; [] for a length of 0.

    The rule is transformers' `no_repeat_ngram_size`, which counts the prompt too: an answer could then copy nothing.
    """
    if not length:
        return []
    end, last = len(said) - length + 1, tuple(said[len(said) - length + 1 :])
    return [said[at + length - 1] for at in range(end) if tuple(said[at : at + length - 1]) == last]


def _without_repeats(length: int, no_repeat: int, ids, scores):
    """Rule out, in each row, the tokens that would repeat a stretch of what follows its prompt of `length` tokens."""
    for row, said in zip(scores, ids[:, length:].tolist(), strict=True):
        row[repeating(said, no_repeat)] = -math.inf
    return scores


def answer_all(chat: TransformersChat, talks: Sequence[Sequence[Message]], batch: int = 16) -> list[str]:
    """Return the likeliest answer to each of many conversations, `batch` at a time: far sooner than one by one.

    They are as the model said them: without `CUT`. Raises PromptTooLong before the first is asked.
    """
    import torch

    said, prompts = [], [chat.prompt(talk) for talk in talks]
    for prompt in prompts:
        chat._checked(prompt)
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        inputs = chat.tokenizer(some, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        options = {"max_new_tokens": chat.max_tokens, "do_sample": False}
        if chat.no_repeat:
            options["logits_processor"] = [partial(_without_repeats, length, chat.no_repeat)]
        if chat.model.device.type == "cpu":
            options["prefill_chunk_size"] = READ_AT_ONCE
        with torch.inference_mode():
            ids = chat.model.generate(**inputs.to(chat.model.device), **options)
        answers = ids[:, length:].tolist()
        said += [chat._visible(prompt, answer).strip() for prompt, answer in zip(some, answers, strict=True)]
    return said


def final_channel(raw: str) -> str:
    """Return the part of a text in the harmony format that is meant for the reader; '' where it hasn't begun."""
    text = raw.split(FINAL, 1)[1] if FINAL in raw else ""
    return next((text.split(end)[0] for end in ENDS if end in text), text)


@dataclass(frozen=True)
class LLM:
    """A model ready to answer. `chat` is None for `quotes`; lengths in tokens; `why` says how `auto` chose it.

    `marks`: what starts and ends its turns, where that is known, for `generation.as_data`.
    `sentences`: how many of the passages' sentences it is given, the likeliest, and where the search isn't sure it
    isn't asked; 0: the passages whole, and always.
    """

    name: str
    chat: BaseChatModel | None = None
    context: int = 0
    answer_tokens: int = 0
    count: Callable[[Sequence[Message]], int] = len
    follows_instructions: bool = False  # beyond reading passages: rewriting a question, a style guide
    digest: str = ""
    why: str = ""
    sentences: int = 0
    marks: tuple[str, ...] = ()

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        """Yield the answer piece by piece, `CUT` last if it ran out of tokens. Raises OllamaError or PromptTooLong."""
        metadata, text, on_ollama = {}, "", self.name.startswith("ollama:")
        try:
            # Closed at once when the reader stops, so that the server stops too.
            with closing(self.chat.stream(convert_to_messages(list(messages)))) as chunks:
                for chunk in chunks:
                    metadata |= chunk.response_metadata
                    text += chunk.content
                    if chunk.content:
                        yield chunk.content
        except Exception as error:
            if not on_ollama:
                raise
            raise ollama.explain(error, self.name.removeprefix("ollama:")) from error
        if on_ollama:
            served = _server(self.chat.base_url).served_context(self.chat.model)
            ollama.check_final(metadata, text, self.count(messages), self.context, served)
        if metadata.get("done_reason") == "length":
            yield CUT

    def warm_up(self) -> None:
        """Have Ollama load the model now rather than at the first question; others are loaded. Raises OllamaError."""
        if self.name.startswith("ollama:"):
            _server(ollama.address()).warm_up(self.name.removeprefix("ollama:"), self.context)


QUOTES = LLM("quotes")


def load_llm(
    name: str = "auto",
    fallback: str = "quotes",
    *,
    temperature: float = 0.0,
    seed: int = 0,
    answer_tokens: int = settings.ANSWER_TOKENS,
    pull: bool = False,
) -> LLM:
    """Return the model called `name`.

    'ollama:MODEL' is any model of Ollama, whose server is started if none runs; 'hf:NAME' a model of the hub or a
    folder, an adapter's too; 'tiny' the embedded model, given few sentences; 'quotes' no model. 'auto' is the course's
    Ollama model where it can be had, else `fallback`, and `LLM.why` says which and why; the environment variable
    HELPERS_LLM overrides it. `pull` allows a download by Ollama. Raises OllamaError, OSError or ValueError, each with
    what to do.
    """
    options = {"temperature": temperature, "seed": seed, "answer_tokens": answer_tokens}
    if name == "auto":
        if os.environ.get("HELPERS_LLM", "auto") not in ("", "auto"):
            return _because(load_llm(os.environ["HELPERS_LLM"], **options), "HELPERS_LLM says so")
        try:
            return _because(load_llm(f"ollama:{settings.OLLAMA_MODEL}", **options, pull=pull), "Ollama has it")
        except ollama.OllamaError as error:
            return _because(load_llm(fallback, **options), str(error))
    if name == "quotes":
        return QUOTES
    if name == "tiny":
        return _load_local(str(settings.TINY_GPT_OSS), "tiny", **options)
    kind, _, model = name.partition(":")
    if kind == "hf" and model:
        put_back(settings.ROOT / model)
        folder = place_of(model)
        return _load_local(str(folder) if folder.is_dir() else model, name, **options)
    if kind == "ollama" and model:
        return _load_ollama(model, pull=pull, **options)
    raise ValueError(f"llm is {name!r}: set it to auto, ollama:MODEL, hf:NAME_OR_FOLDER, tiny or quotes.")


def place_of(model: str) -> Path:
    """Return the folder of a local model, below ROOT from wherever a program runs; a hub name has none."""
    name = settings.TINY_GPT_OSS if model == "tiny" else Path(model.removeprefix("hf:"))
    return settings.ROOT / name if (settings.ROOT / name).is_dir() and not name.is_dir() else name


def _because(llm: LLM, why: str) -> LLM:
    return LLM(**{**llm.__dict__, "why": why})


def _plain(messages) -> list[Message]:
    roles = {"human": "user", "ai": "assistant"}
    return [{"role": roles.get(message.type, message.type), "content": message.content} for message in messages]


def _load_local(name: str, shown: str, *, temperature: float, seed: int, answer_tokens: int) -> LLM:
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    model, tokenizer, base, digest = _read_once(name)
    chat = TransformersChat(
        model=model, tokenizer=tokenizer, temperature=temperature, seed=seed, max_tokens=answer_tokens
    )
    sentences = settings.TINY_SENTENCES if is_tiny(name) else 0  # its adapters learnt another prompt
    return LLM(
        shown, chat, chat.context, answer_tokens, chat.count, not is_tiny(base), digest, sentences=sentences,
        marks=tuple(marks_of(tokenizer)),
    )  # fmt: skip


_kept: dict[tuple, tuple] = {}  # the one model that stays in memory, by its name and when its files were written


def _read_once(name: str):
    """Return what `_read` does, the same at the next call; what was trained again is read again."""
    written = max((path.stat().st_mtime_ns for path in Path(name).glob("*.safetensors")), default=0)
    if (name, written) not in _kept:
        _kept.clear()  # before the next is read: two may not fit a GPU
        gc.collect()
        _kept[name, written] = _read(name)
    return _kept[name, written]


def _read(name: str):
    """Load a model; return it with its tokenizer, the name of its base and its hash."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a second's work, and a bar on stderr
    folder = Path(name)
    device = settings.device()
    dtype = "float32" if device == "cpu" else settings.half_dtype(device)
    if (folder / "adapter_config.json").exists():
        base, run = check_adapter(folder)
        # In 16 bits the base may not fit the card that has trained the adapter.
        four_bit = device == "cuda" and run.get("recipe", {}).get("four_bit", False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between two of the libraries
            model = attach(read_base(base, four_bit, "" if four_bit else dtype, device), folder)
        return model, load_tokenizer(folder if (folder / "tokenizer.json").exists() else base), base, ""
    digest = check_weights(folder) if is_tiny(folder) else ""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The model {name!r} can't be loaded: it is neither a folder with a whole model in it nor to be had from "
            f"the hub now ({str(error).splitlines()[0]}). Check the name and the network, or use 'tiny'."
        ) from error
    return model.to(device).eval(), tokenizer, name, digest


def _load_ollama(name: str, *, pull: bool, temperature: float, seed: int, answer_tokens: int) -> LLM:
    server = _server(ollama.address())
    server.start()
    digest = server.require(name, pull=pull)
    if "thinking" in server.capabilities(name):
        answer_tokens += settings.THINKING_TOKENS
    chat = server.chat_model(
        name, num_ctx=settings.OLLAMA_CONTEXT, temperature=temperature, seed=seed, num_predict=answer_tokens
    )
    return LLM(f"ollama:{name}", chat, settings.OLLAMA_CONTEXT, answer_tokens, estimate_tokens, True, digest)


@lru_cache
def _server(url: str) -> ollama.Ollama:
    return ollama.Ollama(url)


def estimate_tokens(messages: Sequence[Message]) -> int:
    """Return about how many tokens messages have for a tokenizer that isn't at hand.

    A token to 3 characters of words, where English has 4 to 5 and Spanish 3.5 to 4; a token to each digit and mark, as
    some tokenizers have it: so it errs on the safe side, also for tables of figures.
    """
    texts = [" ".join(message["content"].split()) for message in messages]
    return sum(len(_ALONE.findall(text)) + len(_ALONE.sub("", text)) // 3 + 8 for text in texts)
