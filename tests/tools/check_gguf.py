"""Compare a GGUF file with the model it was written from: llama.cpp's tokens and greedy answers with transformers'.

python tests/tools/check_gguf.py MODEL_FOLDER [FILE.gguf] [--python PYTHON]

Without a file, one is written with `export.to_gguf` into a temporary folder. llama.cpp comes as llama-cpp-python, which
builds from source for many minutes and may want other versions than the course has: give it an environment of its own
(`python -m venv llama && llama/bin/pip install llama-cpp-python`) and name that with `--python llama/bin/python`.
Exit code 1 if anything differs, 2 without llama-cpp-python.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    options = _options()
    if options.answer:
        return answer(options.answer, json.load(sys.stdin))
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llama_cpp') is None)"
    if shutil.which(options.python) is None or subprocess.run([options.python, "-c", look]).returncode:
        print(
            "llama-cpp-python is missing: install it and name its Python with --python (see --help).", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        path = options.gguf
        if path is None:
            from helpers.export import to_gguf

            path = to_gguf(options.model, Path(folder) / "model.gguf", options.dtype)
        return compare(options, path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="folder of the model and its tokenizer")
    parser.add_argument("gguf", nargs="?", type=Path, help="the file written from it")
    parser.add_argument("--python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of a file written here")
    parser.add_argument(
        "--cache", choices=("float16", "float32"), default="float32", help="llama.cpp's keys and values"
    )
    parser.add_argument("--prompts", type=int, default=20, help="how many (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer at most (default %(default)s)")
    parser.add_argument("--answer", metavar="GGUF", help=argparse.SUPPRESS)  # the part that runs llama.cpp
    options = parser.parse_args()
    if not options.model and not options.answer:
        parser.error("name the folder of the model")
    return options


def answer(path: str, asked: dict) -> int:
    """Read texts and prompts as JSON; write the tokens of all and the answers to the prompts, with llama.cpp."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        path,
        n_ctx=asked["context"],
        n_threads=1,
        n_gpu_layers=0,
        verbose=False,
        type_k=asked["cache"],
        type_v=asked["cache"],
    )

    def encode(text):
        return model.tokenize(text.encode(), add_bos=False, special=True)

    answers, logits = [], []
    for prompt in asked["prompts"]:
        model.reset()
        model.eval(encode(prompt))
        said = []
        while len(said) < asked["tokens"]:
            scores = np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), (model.n_vocab(),))
            if not said:
                logits.append(scores.tolist())
            said.append(int(scores.argmax()))
            if said[-1] in asked["stops"]:
                break
            model.eval(said[-1:])
        answers.append(said)
    version = {"llama-cpp-python": llama_cpp.__version__}
    tokens = {kind: [encode(text) for text in asked[kind]] for kind in ("prompts", "texts")}
    json.dump({"version": version, "tokens": tokens, "answers": answers, "logits": logits}, sys.stdout)
    return 0


def compare(options: argparse.Namespace, path: Path) -> int:
    """Print what differs between llama.cpp and transformers; return the exit code."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(options.model)
    if config.rope_parameters.get("truncate") is False:
        print("llama.cpp rounds where YaRN begins and ends, this model doesn't: compared as if it did.")
        config.rope_parameters["truncate"] = True
    model = AutoModelForCausalLM.from_pretrained(options.model, config=config, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    asked = {
        "prompts": make_prompts(tokenizer, options.prompts),
        "texts": make_texts(),
        "stops": [tokenizer.eos_token_id],
        "tokens": options.tokens,
        "cache": int(options.cache == "float16"),  # ggml's numbers of the two
        "context": min(model.config.max_position_embeddings, 4096),
    }
    command = [options.python, __file__, "--answer", str(path)]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    if done.returncode:
        print(f"llama.cpp can't run {path}:\n{done.stderr.strip()[-2000:]}", file=sys.stderr)
        return 1
    theirs = json.loads(done.stdout)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {theirs['version']}")
    wrong = 0
    for kind in ("prompts", "texts"):
        ours = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in asked[kind]]
        odd = [number for number, ids in enumerate(ours) if ids != theirs["tokens"][kind][number]]
        print(f"{kind}: {len(ours) - len(odd)} of {len(ours)} cut into the same tokens, {sum(map(len, ours))} in all")
        for number in odd[:3]:
            print(f"  differs: {asked[kind][number][:100]!r}")
        wrong += len(odd)
    same, worst, lengths, distinct = 0, 0.0, [], set()
    for number, prompt in enumerate(asked["prompts"]):
        said, scores = greedy(model, tokenizer, prompt, options.tokens)
        apart = (scores[0] - torch.tensor(theirs["logits"][number])).abs().max().item()
        worst = max(worst, apart / scores[0].std().item())
        lengths.append(len(said))
        distinct |= set(said)
        if said == theirs["answers"][number]:
            same += 1
            continue
        at = next(
            (n for n, pair in enumerate(zip(said, theirs["answers"][number], strict=False)) if pair[0] != pair[1])
        )
        first, second = scores[at].topk(2).values.tolist()
        print(f"  prompt {number} differs at token {at}, where the two likeliest are {first - second:.4f} apart")
    print(
        f"answers: {same} of {len(lengths)} the same, {sum(lengths)} tokens, {len(distinct)} different ones among them"
    )
    print(f"logits after the prompt: at most {worst:.5f} standard deviations apart")
    return int(wrong > 0 or same < len(lengths))


def greedy(model, tokenizer, prompt: str, limit: int):
    """Return the likeliest tokens one by one, the stop token last, and the logits of each."""
    import torch

    unread, seen, said, scores = (
        tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"],
        None,
        [],
        [],
    )
    while len(said) < limit:
        with torch.inference_mode():
            output = model(input_ids=unread, past_key_values=seen, use_cache=True, logits_to_keep=1)
        seen = output.past_key_values
        scores.append(output.logits[0, -1])
        said.append(int(scores[-1].argmax()))
        if said[-1] == tokenizer.eos_token_id:
            break
        unread = torch.tensor([said[-1:]])
    return said, scores


def make_prompts(tokenizer, count: int) -> list[str]:
    """Return prompts of the course in both languages, with one to four passages."""
    from helpers.generation import rag_messages
    from helpers.tiny_gpt_oss.curriculum import Shape, make_example

    prompts = []
    for number in range(count):
        rng = random.Random(f"gguf {number}")
        example = make_example(rng, ("en", "es")[number % 2], Shape((1, 4), (120, 900), 1))
        passages = [(passage.place, passage.text) for passage in example.passages]
        messages = rag_messages(example.turns[0].question, passages)
        prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    return prompts


def make_texts() -> list[str]:
    """Return every page of the sample documents, and what tokenizers stumble over."""
    from helpers.chunking import load_documents
    from helpers.settings import DOCUMENTS

    pages = [document.text for document in load_documents(DOCUMENTS)[0]]
    return [
        *pages,
        "a  12\n\n34 5",
        "x\t\t7 ½ m² 10³",
        "¿Qué? «así» 1.234,56 €",
        "naïve 東京 🙂 e\u0301",
        "  ",
        "don't 'll 9's",
    ]


if __name__ == "__main__":
    sys.exit(main())
