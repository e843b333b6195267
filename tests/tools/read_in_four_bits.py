"""Let the embedded model read the same passages in 16 bits (32 on a CPU) and in 4, and keep what came of it as rows.

python tests/tools/read_in_four_bits.py [--out FILE] [--prompts N]

A first line says with what; then one a question: whether each of the two answered it right, and how far their logits
are apart at the end of the prompt, as root mean square, beside how far the first model's spread. Notebook 05 shows it.
"""

import argparse
import json
import time
from dataclasses import replace
from datetime import date
from itertools import islice
from pathlib import Path

import torch

from helpers import settings
from helpers.evaluation import share
from helpers.finetuning import base_digest, load_base
from helpers.four_bit import audit, load_tokenizer
from helpers.llms import TransformersChat, answer_all
from helpers.recording import describe_machine
from helpers.tiny_gpt_oss.measure import BATCH, ONE, cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=settings.RESULTS / "four_bits.jsonl", help="file of the rows")
    parser.add_argument("--prompts", type=int, default=250, help="in each language (default %(default)s)")
    options, started = parser.parse_args(), time.perf_counter()
    tokenizer = load_tokenizer(settings.TINY_GPT_OSS)
    chats = {
        bits: TransformersChat(model=load_base("tiny", four_bit=bits == 4), tokenizer=tokenizer, max_tokens=48)
        for bits in (16, 4)
    }
    found = audit(chats[4].model)
    head = {
        "base_digest": base_digest(settings.TINY_GPT_OSS), "in_four_bits": found.share, "matrices": found.matrices,
        "machine": describe_machine(), "date": date.today().isoformat(),
    }  # fmt: skip
    rows = []
    for language in ("en", "es"):
        asked = list(islice(cases("one", language, ("value",), ONE), options.prompts))
        said = {bits: answer_all(chat, [case.messages for case in asked], BATCH) for bits, chat in chats.items()}
        for number, case in enumerate(asked):
            right = {f"right_{bits}": replace(case, text=texts[number]).right for bits, texts in said.items()}
            rows.append({"language": language, "number": number} | right | apart(chats, case.messages))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in (head, *rows)), encoding="utf-8")
    for bits in chats:
        print(f"{bits:>2} bits: {share(row[f'right_{bits}'] for row in rows)} right")
    far, wide = (sum(row[name] for row in rows) / len(rows) for name in ("apart", "spread"))
    print(f"logits {far:.3f} apart, which spread by {wide:.3f}; {found}")
    print(
        f"{len(rows)} questions in {settings.format_seconds(time.perf_counter() - started)}, now in {options.out.name}"
    )


def apart(chats: dict, messages: list[dict]) -> dict[str, float]:
    """Return how far the logits of the first token of an answer are apart, and how far they spread."""
    logits = []
    for chat in chats.values():
        ids = chat.tokenizer(chat.prompt(messages), add_special_tokens=False, return_tensors="pt").input_ids
        with torch.inference_mode():
            logits.append(chat.model(input_ids=ids.to(chat.model.device), logits_to_keep=1).logits[0, -1].float())
    return {
        "apart": round(float((logits[0] - logits[1]).square().mean().sqrt()), 4),
        "spread": round(float(logits[0].std()), 4),
    }


if __name__ == "__main__":
    main()
