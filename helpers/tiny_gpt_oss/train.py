"""Train the embedded model from nothing: `python -m helpers.tiny_gpt_oss.train`.

The course of it: short passages with many questions first, because copying is learnt from answers seen; then more and
longer passages. A killed run goes on from its last checkpoint with the batch that would have come next.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GptOssConfig, GptOssForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

from helpers import settings
from helpers.tiny_gpt_oss import optimizers, packing, tokenizer
from helpers.tiny_gpt_oss.batches import Batch, Bucket, Packer, Writers, fingerprint
from helpers.tiny_gpt_oss.curriculum import Shape
from helpers.tiny_gpt_oss.initialization import ROPE, initialize

RUN = settings.RUNS / "tiny_gpt_oss"
SEED = 1
WARMUP, DECAY = 200, 0.35  # steps; share of all steps in which the learning rate falls to a fiftieth
# The weight of a second loss: the last layer's second pair of heads is to look at what the answer copies next. Without
# it no run had learnt to heed the question after 17 million tokens; it named some value of the passage.
POINT = 1.0
WINDOW = 128  # tokens that sliding layers see
CHECKPOINT, EVALUATE, LOG = 1000, 1000, 50  # every so many steps
UNSAVED = 600  # seconds: on a CPU 1000 steps are hours, and a kill would lose them
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Stage:
    """A stretch of training: so many steps at a learning rate, each from one of the buckets, drawn by weight."""

    steps: int
    rate: float
    buckets: tuple[tuple[str, float], ...]


BUCKETS = {
    "dense": Bucket(Shape((1, 1), (150, 320), 5, (60, 90)), 128, 144, rules=False),
    "one": Bucket(Shape((1, 1), (80, 400), 6), 96, 256),
    "some": Bucket(Shape((1, 3), (120, 500), 12), 52, 448),
    "three": Bucket(Shape((2, 3), (400, 1000), 16), 32, 896, 44),
    "full": Bucket(Shape((3, 5), (500, 1000), 16), 24, 1408, 44),
    "scenes": Bucket(Shape((1, 1), (120, 500), 12), 60, 320, scenes=1.0),
    "scenes three": Bucket(Shape((2, 3), (300, 1000), 16), 28, 1024, 44, scenes=1.0),
    "prose": Bucket(Shape((1, 1), (500, 1000), 10), 48, 512, 44, prose=1.0),
    "prose three": Bucket(Shape((2, 3), (600, 1000), 16), 24, 1280, 44, prose=1.0),
}
STAGES = (
    Stage(300, 2e-3, (("dense", 1.0),)),
    Stage(1150, 2e-3, (("dense", 0.1), ("one", 0.3), ("some", 0.6))),
    Stage(3000, 1.5e-3, (("one", 0.1), ("some", 0.2), ("three", 0.35), ("full", 0.35))),
)
# Then sentences that tell several things at once, other words in questions than in passages, and prose as people write.
LATER_STAGES = (
    Stage(3300, 1.5e-3, (
        ("scenes", 0.3), ("some", 0.2), ("one", 0.1), ("three", 0.1), ("scenes three", 0.1), ("prose", 0.1),
        ("prose three", 0.1),
    )),
    Stage(6700, 1.2e-3, (
        ("scenes", 0.1), ("scenes three", 0.18), ("some", 0.1), ("three", 0.12), ("full", 0.15), ("prose", 0.15),
        ("prose three", 0.2),
    )),
)  # fmt: skip


def model_config(vocabulary: int, pad: int, stop: int) -> GptOssConfig:
    """Return the architecture: gpt-oss in small, with everything it has (experts, sinks, biases, sliding windows)."""
    return GptOssConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE},
        tie_word_embeddings=False,
        router_aux_loss_coef=0.0,
        pad_token_id=pad,
        eos_token_id=stop,
        bos_token_id=None,
    )


def dense_experts(self, hidden_states, router_indices, routing_weights):
    """Compute every expert for every token and weight them: on few experts faster than sorting the tokens.

    The experts' matrices side by side are one: two products in all, and the second adds the experts up.
    """
    weights = torch.zeros(
        len(hidden_states), self.num_experts, dtype=routing_weights.dtype, device=hidden_states.device
    )
    weights = weights.scatter(1, router_indices, routing_weights)
    gate, up = (
        torch.addmm(
            self.gate_up_proj_bias[:, first::2].flatten(),
            hidden_states,
            self.gate_up_proj[..., first::2].transpose(0, 1).flatten(1),
        ).unflatten(1, (self.num_experts, -1))
        for first in (0, 1)
    )
    function = _compiled() if hidden_states.is_cuda else gated
    hidden = function(gate, up, weights, self.limit, self.alpha).flatten(1)
    return (hidden @ self.down_proj.flatten(0, 1) + weights @ self.down_proj_bias).to(hidden_states.dtype)


def gated(gate, up, weights, limit: float, alpha: float) -> torch.Tensor:
    """Return what experts hold between their two products, (tokens, experts, intermediate), each by its weight."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate) * weights[..., None]


@lru_cache
def _compiled():
    return torch.compile(gated, dynamic=True)  # on a GPU: one pass over memory instead of eight


def quicken(model: GptOssForCausalLM) -> None:
    """Make a model compute what it computes, for rows of a prefix and branches, with fewer passes over memory."""
    packing.use(model)
    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    model.set_experts_implementation("dense")
    for module in model.modules():
        if isinstance(module, GptOssRMSNorm):
            module.forward = partial(_rms_norm, module)


def _rms_norm(module, hidden_states):
    return F.rms_norm(hidden_states, module.weight.shape, module.weight, module.variance_epsilon)


def decay(step: int, steps: int) -> float:
    """Return the learning rate's factor at a step: a ramp up, a plateau, a straight line down to a fiftieth."""
    left = (steps - step) / (DECAY * steps)
    return min(1.0, (step + 1) / WARMUP, 0.02 + 0.98 * left)


def prepare(folder: Path, weights: Path | None = None) -> None:
    """Make a run's folder with the tokenizer in it, unless it is there already: that of the weights to go on from.

    Exits where the folder holds another tokenizer than those weights know: it is another run's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / "tokenizer.json"
    if weights and own.exists() and own.read_bytes() != (weights / own.name).read_bytes():
        raise SystemExit(f"{folder} holds a run with another tokenizer: go on in a folder of its own, by --folder.")
    if all((folder / name).exists() for name in FILES):
        return
    aside = folder / "tokenizer.partial"  # a kill may leave files missing in the folder, but none cut off
    aside.mkdir(exist_ok=True)
    if not weights:
        tokenizer.make(SEED).save_pretrained(aside)
    for name in FILES:
        if weights:
            shutil.copy(weights / name, aside)
        os.replace(aside / name, folder / name)
    shutil.rmtree(aside)


class Recorded:
    """A function of tensors on a GPU whose kernels are recorded once and replayed: hundreds of small ones a step.

    Started one by one from Python they would take longer than they run.
    """

    def __init__(self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], pool):
        self.inputs = [part.clone() for part in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.output = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for own, part in zip(self.inputs, inputs, strict=True):
            own.copy_(part, non_blocking=True)
        self.graph.replay()
        return self.output


class Training:
    """The state of a run: model, optimizer, step; saved to and resumed from a folder.

    `config` makes the model's configuration from the vocabulary's size and the ids of pad and stop. `smaller` divides
    the rows of every batch, for a machine on which a step would take minutes. `weights` is the folder of a model to go
    on from, instead of from nothing.
    """

    def __init__(self, folder: Path, stages=STAGES, device: str = "cpu", config=model_config, smaller=1, weights=None):
        self.folder, self.stages, self.device = folder, stages, device
        self.buckets = {name: replace(bucket, rows=-(-bucket.rows // smaller)) for name, bucket in BUCKETS.items()}
        prepare(folder, weights)
        self.steps = sum(stage.steps for stage in stages)
        self.log = folder / "training_log.jsonl"
        self.tokenizer = known = AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(SEED)
        self.model = GptOssForCausalLM(config(len(known), known.pad_token_id, known.eos_token_id))
        if weights:
            self.model.load_state_dict(load_file(weights / "model.safetensors"))
        else:
            initialize(self.model, known)
        self.model.to(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every shape; flash attention doesn't
        # One matrix to read tokens and to write them while training: copying a token is then a thing to be learnt once,
        # and not once for each of the 4,096. The exported model has two, as gpt-oss has.
        self.model.lm_head.weight = self.model.model.embed_tokens.weight
        quicken(self.model)
        self.packer = Packer(self.tokenizer, self.model.config.sliding_window)
        for weight in self.model.parameters():
            weight.grad = torch.zeros_like(weight)
        self.optimizers = optimizers.make(self.model, stages[0].rate)
        self.recorded: dict[Bucket, Recorded] = {}
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        if (folder / "checkpoint.safetensors").exists():
            self.resume()

    @cached_property
    def recipe(self) -> dict[str, str]:
        """Return what makes a run; the curriculum takes a second to read, so only where it is asked for."""
        kinds = map(type, self.optimizers.values())
        return {
            "stages": repr(self.stages),
            "buckets": repr(self.buckets),
            "curriculum": fingerprint(),
            "optimizers": ", ".join(f"{kind.__module__}.{kind.__name__}" for kind in kinds),
        }

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
        return self.buckets[random.Random(f"bucket {SEED} {step}").choices(names, weights)[0]]

    def jobs(self) -> Iterator[tuple[Bucket, str]]:
        """Yield the bucket and the seed of each batch from this step on."""
        for step in range(self.step, self.steps):
            yield self.bucket(step), f"train {SEED} {step}"

    def logits(self, layout, ids, padding, pointed, places) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the model says comes after the tokens at `places`, and how badly its heads point."""
        half = settings.encoder_dtype(self.device) == "bfloat16"  # without the hardware for it it is slower
        with torch.autocast(self.device, torch.bfloat16, enabled=half, cache_enabled=False):
            hidden, pointing = packing.forward(self.model.model, ids, padding, layout, pointed)
            return self.model.lm_head(hidden.flatten(0, 1).index_select(0, places)).float(), pointing

    def gradients(self, layout, ids, padding, pointed, places, targets, weights) -> torch.Tensor:
        """Put a batch's gradients in place; return the losses of tokens and pointing, and the share of tokens right."""
        for weight in self.model.parameters():
            weight.grad.zero_()
        logits, pointing = self.logits(layout, ids, padding, pointed, places)
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
        (loss + POINT * pointing).backward()
        right = ((logits.argmax(-1) == targets) * weights).sum()
        return torch.stack([loss.detach(), pointing.detach(), right])

    def learn(self, bucket: Bucket, batch: Batch) -> torch.Tensor:
        """Take one step; return its losses, which may still be being computed."""
        inputs = batch.tensors(bucket.most_learnt)
        if self.device == "cuda":
            inputs = tuple(part.pin_memory() for part in inputs)
            if bucket not in self.recorded:
                on_device = tuple(part.to(self.device) for part in inputs)
                pool = next((made.graph.pool() for made in self.recorded.values()), None)
                self.recorded[bucket] = Recorded(partial(self.gradients, batch.layout), on_device, pool)
            losses = self.recorded[bucket](*inputs)
        else:
            losses = self.gradients(batch.layout, *inputs)
        self.update(self.stage(self.step)[0].rate * decay(self.step, self.steps))
        return losses

    def update(self, rate: float) -> None:
        """Change the weights by their gradients, at a learning rate."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    @torch.no_grad()
    def accuracy(self, name: str, batches: int) -> dict[str, float]:
        """Return, by language and kind of question, the share of held-out answers right to the last token."""
        right: dict[str, list[bool]] = {}
        bucket = replace(self.buckets[name], rows=8)
        for number in range(batches):
            rows = self.packer.rows(random.Random(f"held out {name} {number}"), bucket, held_out=True)
            batch = self.packer.pack(rows, bucket)
            inputs = (part.to(self.device) for part in batch.tensors(bucket.most_learnt))
            ids, padding, pointed, places, targets, weights = inputs
            logits, _ = self.logits(batch.layout, ids, padding, pointed, places)
            missed = places[(logits.argmax(-1) != targets) & (weights > 0)].cpu()
            hits = torch.ones(batch.ids.size, dtype=torch.bool)
            hits[missed] = False
            shape = (bucket.shape.questions, -1)
            for row, (_, example, _) in enumerate(rows):
                own = hits.view(len(rows), -1)[row, bucket.prefix :].view(shape).all(-1)
                asked = batch.answers[row, bucket.prefix :].reshape(shape).any(-1)
                for turn, hit, there in zip(example.turns, own, asked, strict=True):
                    if there:
                        right.setdefault(f"{example.language} {turn.kind}", []).append(bool(hit))
        return {kind: round(sum(found) / len(found), 3) for kind, found in sorted(right.items())}

    def write(self, **entry) -> None:
        """Add a line to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(entry, flush=True)

    def save(self) -> None:
        """Write a checkpoint aside and put it in place."""
        tensors = {f"model.{name}": weight for name, weight in self.model.state_dict().items()}
        for kind, optimizer in self.optimizers.items():
            for number, state in optimizer.state_dict()["state"].items():
                tensors |= {
                    f"{kind}.{number}.{name}": value.reshape(-1) if value.ndim == 0 else value
                    for name, value in state.items()
                }
        counters = {"step": str(self.step), "tokens": str(self.tokens), "seconds": f"{self.seconds:.1f}"}
        aside = self.folder / "checkpoint.partial"
        save_file({name: value.clone() for name, value in tensors.items()}, aside, metadata=counters | self.recipe)
        os.replace(aside, self.folder / "checkpoint.safetensors")

    def resume(self) -> None:
        """Go on from the checkpoint, if it is whole and of this run; what the log says of later steps comes again."""
        path = self.folder / "checkpoint.safetensors"
        try:
            tensors = load_file(path, device=self.device)
            with safe_open(path, "pt") as file:
                saved = file.metadata()
        except SafetensorError as error:
            raise SystemExit(f"{path} is damaged: delete it to begin anew.") from error
        other = [name for name, value in self.recipe.items() if saved.get(name) != value]
        if other:
            raise SystemExit(
                f"The run in {self.folder} differs in {' and '.join(other)}: go on as it began (--go-on, --smaller, "
                "curriculum), or begin another in a folder of its own, by --folder."
            )
        self.step, self.tokens, self.seconds = int(saved["step"]), int(saved["tokens"]), float(saved["seconds"])
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        aside = self.folder / "training_log.partial"
        aside.write_text("".join(f"{line}\n" for line in lines if _step(line) <= self.step), encoding="utf-8")
        os.replace(aside, self.log)
        prefix = "model."
        self.model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for kind, optimizer in self.optimizers.items():
            state = optimizer.state_dict()
            for name, value in tensors.items():
                if name.startswith(f"{kind}."):
                    _, number, key = name.split(".")
                    state["state"].setdefault(int(number), {})[key] = value[0].cpu() if key == "step" else value
            optimizer.load_state_dict(state)

    def run(self, writers: Writers) -> None:
        """Train to the end."""
        started, saved = time.perf_counter() - self.seconds, self.seconds
        total, summed = torch.zeros(3, device=self.device), 0
        jobs = list(self.jobs())
        for (bucket, _), batch in zip(jobs, writers.batches(jobs), strict=True):
            total += self.learn(bucket, batch)
            summed += 1
            self.step += 1
            self.tokens += batch.ids.size
            last = self.step == self.steps
            log = last or self.step % LOG == 0
            save = last or self.step % CHECKPOINT == 0 or time.perf_counter() - started - saved >= UNSAVED
            if log or save:  # not at every step: reading the losses waits for the GPU
                means = (total / summed).tolist()
                if not math.isfinite(means[0]):
                    raise SystemExit(f"The loss is {means[0]} at step {self.step}: start again from the checkpoint.")
                self.seconds = time.perf_counter() - started
            if log:
                total, summed = torch.zeros_like(total), 0
                named = {name: round(mean, 3) for name, mean in zip(("loss", "pointing", "right"), means, strict=True)}
                self.write(step=self.step, tokens=self.tokens, seconds=round(self.seconds), **named)
            if last or self.step % EVALUATE == 0:
                held_out = {name: self.accuracy(name, 6) for name, _ in self.stage(self.step - 1)[0].buckets}
                self.write(step=self.step, tokens=self.tokens, accuracy=held_out)
            if save:
                self.save()
                saved = self.seconds

    def export(self, folder: Path) -> None:
        """Write the model as transformers loads it: 16-bit weights, configuration, tokenizer, and their hashes."""
        plain = GptOssForCausalLM(self.model.config.__class__.from_dict(self.model.config.to_dict()))
        plain.load_state_dict(self.model.state_dict())
        plain.to(torch.bfloat16).save_pretrained(folder)
        for name in FILES:
            shutil.copy(self.folder / name, folder)
        names = ("model.safetensors", "config.json", "generation_config.json", *FILES)
        sums = (f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
        (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def _step(line: str) -> float:
    """Return the step that a line of the log is of: past all where a kill or a full disk cut the line off."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


def main(arguments: list[str] | None = None) -> None:
    """Train, or go on training, and write the model into the run's folder."""
    parser = argparse.ArgumentParser(prog="python -m helpers.tiny_gpt_oss.train", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=RUN, help="where checkpoints, the log and the model go")
    parser.add_argument("--smaller", type=int, default=1, help="divide every batch's rows, 12 for a CPU (default 1)")
    parser.add_argument("--go-on", action="store_true", help="the later stages alone, from the shipped weights")
    options = parser.parse_args(arguments)
    if options.smaller < 1:
        parser.error("--smaller divides the rows of every batch: give a whole number from 1 on.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stages = LATER_STAGES if options.go_on else (*STAGES, *LATER_STAGES)
    weights = settings.TINY_GPT_OSS if options.go_on else None
    prepare(options.folder, weights)
    with Writers(options.folder, WINDOW, max(1, settings.machine().cores - 1)) as writers:
        training = Training(options.folder, stages, device, smaller=options.smaller, weights=weights)
        made = training.recipe["curriculum"]
        training.write(curriculum=made, torch=torch.__version__, device=device, step=training.step)
        training.run(writers)
    training.export(options.folder / "model")


if __name__ == "__main__":
    main()
