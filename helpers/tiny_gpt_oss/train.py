"""Train the embedded model from nothing: `python -m helpers.tiny_gpt_oss.train`.

The course of it: short passages with many questions first, because copying is learnt from answers seen; then more and
longer passages. A killed run goes on from its last checkpoint with the batch that would have come next.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GptOssConfig, GptOssForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from helpers import settings
from helpers.generation import rag_messages
from helpers.tiny_gpt_oss import packing, tokenizer
from helpers.tiny_gpt_oss.curriculum import Example, Shape, Turn, fingerprint, make_closed_book, make_example
from helpers.tiny_gpt_oss.initialization import ROPE, initialize

RUN = settings.RUNS / "tiny_gpt_oss"
SEED = 1
WARMUP, DECAY = 200, 0.35  # steps; share of all steps in which the learning rate falls to a fiftieth
TEXT_LOSS = 0.03  # share of the tokens outside answers that are learnt: drawn anew for each batch
# The weight of a second loss: the last layer's second pair of heads is to look at what the answer copies next. Without
# it no run had learnt to heed the question after 17 million tokens; it named some value of the passage.
POINT = 1.0
CLOSED_BOOK = 0.05  # share of rows without passages
CHECKPOINT, EVALUATE = 250, 500  # every so many steps
_MARK = "\x00"


@dataclass(frozen=True)
class Bucket:
    """Rows of one layout: the examples' shape, rows a batch, and lengths in tokens."""

    shape: Shape
    rows: int
    prefix: int
    branch: int = 40
    rules: bool = True  # whether the prompt starts with the course's rules


@dataclass(frozen=True)
class Stage:
    """A stretch of training: so many steps at a learning rate, each from one of the buckets, drawn by weight."""

    steps: int
    rate: float
    buckets: tuple[tuple[str, float], ...]


BUCKETS = {
    "dense": Bucket(Shape((1, 1), (150, 320), 5, (60, 90)), 11, 144, rules=False),
    "one": Bucket(Shape((1, 1), (80, 400), 6), 9, 224),
    "some": Bucket(Shape((1, 3), (120, 500), 12), 5, 512),
    "full": Bucket(Shape((1, 5), (250, 1000), 16), 3, 1152, 44),
}
STAGES = (
    Stage(2000, 1e-3, (("dense", 1.0),)),
    Stage(1000, 6e-4, (("dense", 1.0),)),
    Stage(6000, 6e-4, (("dense", 0.15), ("one", 0.35), ("some", 0.5))),
    Stage(8000, 5e-4, (("one", 0.1), ("some", 0.4), ("full", 0.5))),
)


def model_config(vocabulary: int, pad: int, stop: int) -> GptOssConfig:
    """Return the architecture: gpt-oss in small, with everything it has (experts, sinks, biases, sliding windows)."""
    return GptOssConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE},
        tie_word_embeddings=False,
        router_aux_loss_coef=0.0,
        pad_token_id=pad,
        eos_token_id=stop,
        bos_token_id=None,
    )


@dataclass(frozen=True)
class Batch:
    """Token ids (rows, tokens), prefix padding (rows, prefix), and which tokens to predict the next of.

    `pointed`: (rows, branches x branch), for a token of a branch the place in the prefix of what comes next, or -1.
    """

    ids: torch.Tensor
    padding: torch.Tensor
    learnt: torch.Tensor
    answers: torch.Tensor
    pointed: torch.Tensor
    layout: packing.Layout


class Packer:
    """Turns examples into rows; the same seed and step give the same batch."""

    def __init__(self, tokenizer_, window: int):
        self.tokenizer, self.window = tokenizer_, window
        self.pad = tokenizer_.pad_token_id
        bare = tokenizer_.apply_chat_template(
            [{"role": "user", "content": _MARK}], add_generation_prompt=True, tokenize=False
        )
        self.bare, self.asked = bare.split(_MARK)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts; special tokens in them count as such."""
        return [found.ids for found in self.tokenizer.backend_tokenizer.encode_batch(texts)]

    def prefix(self, example: Example, closed_book: bool = False, rules: bool = True) -> str:
        """Return the prompt up to where the question stands."""
        if closed_book:
            return self.bare
        messages = rag_messages(_MARK, [(passage.place, passage.text) for passage in example.passages])
        messages = messages if rules else messages[1:]
        return self.tokenizer.apply_chat_template(messages, tokenize=False).split(_MARK)[0]

    def batch(self, bucket: Bucket, seed: str) -> Batch:
        """Return a batch of fresh examples."""
        rng = random.Random(seed)
        rows = self.rows(rng, bucket, CLOSED_BOOK)
        return self.pack(rows, bucket, torch.Generator().manual_seed(rng.getrandbits(60)))

    def rows(self, rng: random.Random, bucket: Bucket, closed_book: float = 0.0) -> list[tuple[str, Example]]:
        """Return fresh (prefix, example) rows that fit, both languages alike, a share of them without passages."""
        rows = []
        while len(rows) < bucket.rows:
            language = rng.choice(("en", "es"))
            if rng.random() < closed_book:
                example = make_closed_book(rng, language, bucket.shape.questions)
                prefix = self.prefix(example, rng.random() < 0.7)
            else:
                example = make_example(rng, language, bucket.shape)
                prefix = self.prefix(example, rules=bucket.rules)
            if len(self.encode([prefix])[0]) <= bucket.prefix:
                rows.append((prefix, example))
        return rows

    def pack(self, rows: list[tuple[str, Example]], bucket: Bucket, generator=None) -> Batch:
        """Lay out (prefix, example) rows; a branch too long for the layout is left empty."""
        layout = packing.Layout(bucket.prefix, bucket.branch, bucket.shape.questions, self.window)
        ids = torch.full((len(rows), layout.tokens), self.pad)
        padding = torch.ones(len(rows), layout.prefix, dtype=torch.bool)
        text, answers = (torch.zeros(ids.shape, dtype=torch.bool) for _ in range(2))
        pointed = torch.full(ids.shape, -1)
        for row, (prefix, example) in enumerate(rows):
            found = self.tokenizer.backend_tokenizer.encode(prefix)
            start = layout.prefix - len(found)
            ids[row, start : layout.prefix] = torch.tensor(found.ids)
            padding[row, start:] = False
            text[row, start : layout.prefix - 1] = True
            asked = self.encode([turn.question + self.asked for turn in example.turns])
            said = self.encode([turn.answer + tokenizer.RETURN for turn in example.turns])
            for number, (question, answer) in enumerate(zip(asked, said, strict=True)):
                if len(question) + len(answer) > layout.branch:
                    continue
                first = layout.prefix + number * layout.branch
                middle, last = first + len(question), first + len(question) + len(answer)
                ids[row, first:last] = torch.tensor(question + answer)
                text[row, first : middle - 1] = True
                answers[row, middle - 1 : last - 1] = True
                for token, place in self.copied(prefix, example, example.turns[number]):
                    at = found.char_to_token(place)
                    pointed[row, middle - 1 + token] = -1 if at is None else start + at
        drawn = torch.rand(ids.shape, generator=generator) < TEXT_LOSS
        return Batch(ids, padding, answers | (text & drawn), answers, pointed[:, layout.prefix :], layout)

    def copied(self, prefix: str, example: Example, turn: Turn) -> Iterator[tuple[int, int]]:
        """Yield (token of the answer, place in the prefix of its last letter) for what the answer takes from there."""
        if not turn.number:
            return
        head = f"[{turn.number}] {example.passages[turn.number - 1].place}\n"
        header = prefix.index(head)
        value = turn.answer.index(turn.value)
        offsets = self.tokenizer.backend_tokenizer.encode(turn.answer).offsets
        begun = 0
        for token, (_, end) in enumerate(offsets):
            if value <= end <= value + len(turn.value):
                begun += 1
                if begun > 2:  # what follows is found by what it follows
                    continue
                yield token, header + len(head) + turn.start + end - 1 - value
            elif turn.answer[end - 1].isdigit() and end > value + len(turn.value):
                yield token, header + end - 1 - turn.answer.rindex("[")


def dense_experts(self, hidden_states, router_indices, routing_weights):
    """Compute every expert for every token and weight the results: on few experts faster than sorting the tokens."""
    weights = torch.zeros(
        len(hidden_states), self.num_experts, dtype=routing_weights.dtype, device=hidden_states.device
    )
    weights = weights.scatter(1, router_indices, routing_weights)
    states = hidden_states.expand(self.num_experts, -1, -1)
    gated = self._apply_gate(torch.baddbmm(self.gate_up_proj_bias[:, None], states, self.gate_up_proj))
    out = torch.baddbmm(self.down_proj_bias[:, None], gated, self.down_proj)
    return (out * weights.T[..., None]).sum(0).to(hidden_states.dtype)


def decay(step: int, steps: int) -> float:
    """Return the learning rate's factor at a step: a ramp up, a plateau, a straight line down to a fiftieth."""
    left = (steps - step) / (DECAY * steps)
    return min(1.0, (step + 1) / WARMUP, 0.02 + 0.98 * left)


class Training:
    """The state of a run: model, optimizer, step; saved to and resumed from a folder.

    `config` makes the model's configuration from the vocabulary's size and the ids of pad and stop.
    """

    def __init__(self, folder: Path, stages, device: str, compiled: bool, config=model_config):
        self.folder, self.stages, self.device = folder, stages, device
        folder.mkdir(parents=True, exist_ok=True)
        self.steps = sum(stage.steps for stage in stages)
        self.log = folder / "training_log.jsonl"
        if not (folder / "tokenizer.json").exists():
            tokenizer.make(SEED).save_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(SEED)
        config = config(len(self.tokenizer), self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        self.model = GptOssForCausalLM(config).to(device)
        # One matrix to read tokens and to write them while training: copying a token is then a thing to be learnt once,
        # and not once for each of the 4,096. The exported model has two, as gpt-oss has.
        self.model.lm_head.weight = self.model.model.embed_tokens.weight
        initialize(self.model, self.tokenizer)
        packing.use(self.model)
        ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
        self.model.set_experts_implementation("dense")
        self.packer = Packer(self.tokenizer, config.sliding_window)
        matrices = [weight for weight in self.model.parameters() if weight.ndim > 1]
        vectors = [weight for weight in self.model.parameters() if weight.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=stages[0].rate, betas=(0.9, 0.98), fused=True)
        self.forward = torch.compile(packing.forward, dynamic=False) if compiled else packing.forward
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        if (folder / "checkpoint.safetensors").exists():
            self.resume()

    def stage(self, step: int) -> tuple[Stage, int]:
        """Return the stage of a step and how many steps it is into it."""
        for stage in self.stages:
            if step < stage.steps:
                break
            step -= stage.steps
        return stage, step

    def bucket(self, step: int) -> Bucket:
        """Return the bucket of a step's batch."""
        stage, step = self.stage(step)
        names, weights = zip(*stage.buckets, strict=True)
        return BUCKETS[random.Random(f"bucket {SEED} {step}").choices(names, weights)[0]]

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        return self.packer.batch(self.bucket(step), f"train {SEED} {step}")

    def hidden(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last hidden states of a batch, (rows, tokens, width), and how badly its heads point."""
        with torch.autocast(self.device, torch.bfloat16):
            ids, padding = batch.ids.to(self.device), batch.padding.to(self.device)
            return self.forward(self.model.model, ids, padding, batch.layout, batch.pointed.to(self.device))

    def logits(self, batch: Batch, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the model says comes after the tokens `where`, what does, and how badly its heads point."""
        hidden, pointing = self.hidden(batch)
        with torch.autocast(self.device, torch.bfloat16):
            logits = self.model.lm_head(hidden[where.to(self.device)]).float()
        return logits, batch.ids.roll(-1, 1)[where].to(self.device), pointing

    def learn(self, batch: Batch) -> tuple[float, float, float]:
        """Take one step; return the loss of all that was learnt, that of the answers and that of the pointing."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage(self.step)[0].rate * decay(self.step, self.steps)
        logits, targets, pointing = self.logits(batch, batch.learnt)
        losses = F.cross_entropy(logits, targets, reduction="none")
        (losses.mean() + POINT * pointing).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        answers = batch.answers[batch.learnt].to(self.device)
        return losses.mean().item(), losses.detach()[answers].mean().item(), pointing.item()

    def accuracy(self, name: str, batches: int) -> dict[str, float]:
        """Return, by language and kind of question, the share of held-out answers right to the last token."""
        right: dict[str, list[bool]] = {}
        bucket = BUCKETS[name]
        for number in range(batches):
            rng = random.Random(f"held out {name} {number}")
            rows = self.packer.rows(rng, bucket)
            examples = [example for _, example in rows]
            batch = self.packer.pack(rows, bucket)
            # With gradients, though none are needed: without them the model would be compiled a second time.
            logits, targets, _ = self.logits(batch, batch.answers)
            hits = torch.ones(batch.ids.shape, dtype=torch.bool)
            hits[batch.answers] = (logits.argmax(-1) == targets).cpu()
            start = batch.layout.prefix
            hits = hits[:, start:].reshape(len(examples), bucket.shape.questions, -1).all(-1)
            asked = batch.answers[:, start:].reshape(len(examples), bucket.shape.questions, -1).any(-1)
            for row, example in enumerate(examples):
                for column, turn in enumerate(example.turns):
                    if asked[row, column]:
                        right.setdefault(f"{example.language} {turn.kind}", []).append(bool(hits[row, column]))
        return {kind: round(sum(found) / len(found), 3) for kind, found in sorted(right.items())}

    def write(self, **entry) -> None:
        """Add a line to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(entry, flush=True)

    def save(self) -> None:
        """Write a checkpoint aside and put it in place."""
        tensors = {f"model.{name}": weight for name, weight in self.model.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{number}.{name}": value.reshape(-1) if value.ndim == 0 else value
                for name, value in state.items()
            }
        counters = {"step": str(self.step), "tokens": str(self.tokens), "seconds": f"{self.seconds:.1f}"}
        aside = self.folder / "checkpoint.partial"
        save_file({name: value.clone() for name, value in tensors.items()}, aside, metadata=counters)
        os.replace(aside, self.folder / "checkpoint.safetensors")

    def resume(self) -> None:
        """Go on from the checkpoint; what the log says of later steps comes again."""
        path = self.folder / "checkpoint.safetensors"
        tensors = load_file(path, device=self.device)
        with safe_open(path, "pt") as file:
            counters = file.metadata()
        self.step, self.tokens = int(counters["step"]), int(counters["tokens"])
        self.seconds = float(counters["seconds"])
        lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True) if self.log.exists() else []
        kept = "".join(line for line in lines if json.loads(line)["step"] <= self.step)
        self.log.write_text(kept, encoding="utf-8")
        prefix = "model."
        self.model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        state = self.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                state["state"].setdefault(int(number), {})[key] = value[0].cpu() if key == "step" else value
        self.optimizer.load_state_dict(state)

    def run(self) -> None:
        """Train to the end."""
        started = time.perf_counter() - self.seconds
        means: list[float] = []
        with ThreadPoolExecutor(1) as pool:  # the next batch is written while this one is learnt
            coming = pool.submit(self.batch, self.step)
            while self.step < self.steps:
                batch = coming.result()
                coming = pool.submit(self.batch, self.step + 1)
                losses = self.learn(batch)
                if not math.isfinite(losses[0]):
                    raise SystemExit(f"The loss is {losses[0]} at step {self.step}: start again from the checkpoint.")
                means = [0.98 * old + 0.02 * new for old, new in zip(means or losses, losses, strict=True)]
                self.step += 1
                self.tokens += batch.ids.numel()
                self.seconds = time.perf_counter() - started
                if self.step % 50 == 0:
                    named = dict(
                        zip(("loss", "answer_loss", "pointing"), (round(mean, 3) for mean in means), strict=True)
                    )
                    self.write(step=self.step, tokens=self.tokens, seconds=round(self.seconds), **named)
                if self.step % EVALUATE == 0 or self.step == self.steps:
                    buckets = self.stage(self.step - 1)[0].buckets
                    held_out = {name: self.accuracy(name, 12) for name, _ in buckets}
                    self.write(step=self.step, tokens=self.tokens, accuracy=held_out)
                if self.step % CHECKPOINT == 0 or self.step == self.steps:
                    self.save()

    def export(self, folder: Path) -> None:
        """Write the model as transformers loads it: 16-bit weights, configuration, tokenizer."""
        plain = GptOssForCausalLM(self.model.config.__class__.from_dict(self.model.config.to_dict()))
        plain.load_state_dict(self.model.state_dict())
        plain.to(torch.bfloat16).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(self.folder / name, folder)


def main(arguments: list[str] | None = None) -> None:
    """Train, or go on training, and write the model into the run's folder."""
    parser = argparse.ArgumentParser(prog="python -m helpers.tiny_gpt_oss.train", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=RUN, help="where checkpoints, the log and the model go")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which needs a C++ compiler")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training = Training(options.folder, STAGES, device, not options.no_compile)
    training.write(curriculum=fingerprint(), torch=torch.__version__, device=device, step=training.step)
    training.run()
    training.export(options.folder / "model")


if __name__ == "__main__":
    main()
