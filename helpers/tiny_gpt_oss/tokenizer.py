"""The tokenizer: byte-level BPE on the curriculum's text, digits apart, with the harmony format's special tokens."""

import random
from pathlib import Path

from helpers.generation import rag_messages
from helpers.tiny_gpt_oss.curriculum import Shape, make_example

VOCABULARY = 4096
EXAMPLES = 12_000  # of which the merges are learnt
PAD, START, END, MESSAGE, CHANNEL, RETURN, CALL = (
    "<|endoftext|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<|call|>",
)
SPECIAL = (PAD, START, END, MESSAGE, CHANNEL, RETURN, CALL)
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def texts(seed: int, examples: int):
    """Yield the text of `examples` examples, English and Spanish in turn."""
    for number in range(examples):
        rng = random.Random(f"tokenizer {seed} {number}")
        example = make_example(rng, ("en", "es")[number % 2], Shape((1, 3), (100, 900), 4))
        passages = [(passage.place, passage.text) for passage in example.passages]
        for message in rag_messages(example.turns[0].question, passages):
            yield message["content"]
        for turn in example.turns:
            yield f"{turn.question}\n{turn.answer}"
        yield from ("system", "user", "assistant", "final")  # the roles and the channel, one token each


def make(seed: int, examples: int = EXAMPLES):
    """Train the tokenizer and return it as transformers' `PreTrainedTokenizerFast`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Digits apart first: then no merge holds a digit, and a number is copied digit by digit.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(seed, examples), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=RETURN,
        additional_special_tokens=[START, END, MESSAGE, CHANNEL, CALL],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE.read_text(encoding="utf-8").rstrip("\n"),
    )
