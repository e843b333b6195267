"""Teach the model: QLoRA, from a checked training set to an adapter that PEFT loads anywhere.

`train` checks and plans first, trains, goes on where a stopped run was, and puts a whole adapter in place or none;
`load_finetuned` gives the model back.
"""

import errno
import gc
import hashlib
import json
import math
import platform
import re
import shutil
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib import metadata
from pathlib import Path

from helpers import settings
from helpers.dataset import DatasetReport, check_dataset, show_example, to_prompt_completion
from helpers.four_bit import attach, audit, base_digest, check_adapter, load_config, load_tokenizer, read_base
from helpers.planning import CHECKPOINTS_KEPT, Plan, held_out, model_of, peak_memory, plan, recipe_of
from helpers.recording import describe_machine
from helpers.storage import holds_other, locked, put_in_place, sha256_of

__all__ = [
    "DatasetReport", "Plan", "Training", "TrainingFailed", "audit", "check_dataset", "load_base", "load_finetuned",
    "plan", "show_example", "to_prompt_completion", "train",
]  # fmt: skip

MARK = "complete.json"  # in a checkpoint that was written to its end
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")

Watch = Callable[[list[dict], int, int], None]  # gets the losses so far, the step and the steps, after each step

_loaded: dict[tuple, weakref.ref] = {}  # what was called for, and the model that it gave


class TrainingFailed(ValueError):
    """A training that stopped by itself; the message says why and what to change."""


@dataclass(frozen=True)
class Training:
    """A training that is done: the adapter's folder, what was planned and what came of it.

    `losses`: {"step", "epoch", and "loss" or "eval_loss"}. `peak_memory` in bytes is the GPU's, or else what this
    process held; `memory_before` what it was before. `resumed` says how often a stopped run went on.
    """

    folder: Path
    plan: Plan
    losses: list[dict]
    seconds: float
    peak_memory: int
    memory_before: int
    resumed: int

    def table(self) -> list[tuple[int, float, float]]:
        """Return (step, mean training loss since the row before, evaluation loss), a row for each evaluation."""
        rows, since = [], []
        for entry in self.losses:
            if "loss" in entry:
                since.append(entry["loss"])
            else:
                rows.append((entry["step"], sum(since) / len(since) if since else math.nan, entry["eval_loss"]))
                since = []
        return rows


def train(
    base: str = "auto",
    dataset: str | Path = settings.DATASET,
    out: str | Path = settings.FINE_TUNED,
    *,
    questions: str | Path | None = settings.QUESTIONS,
    watch: Watch | None = None,
    say: Callable[[str], None] = print,
    **changes,
) -> Training:
    """Train an adapter for `base` on `dataset` and put it into the folder `out`, with its tokenizer and run.json.

    `base` is a preset, a hub name, a folder or 'auto'; `changes` are of the `Recipe`. A run that was stopped, by
    whatever, goes on from its last checkpoint at the same call. Raises BadDataset, PlanRefused, TrainingFailed, OSError
    or ValueError with what to do; `out` is then as it was.
    """
    out = Path(out).resolve()  # a link to another disk stays one
    with locked(out):  # that it can't be written is better said before hours of training
        pass
    if holds_other(out, "adapter_config.json"):
        raise ValueError(f"{out} holds something else than an adapter: choose another folder with out=.")
    _release()
    chosen, report, tokenizer = prepare(base, dataset, questions, **changes)
    chosen.check()
    if (before := _base_of(out)) and Path(before).name != Path(chosen.model).name:  # a copy elsewhere is the same
        raise ValueError(f"{out} holds an adapter of {before}: move it, or name another folder with out=.")
    recipe = chosen.recipe
    if recipe.patience and not held_out(len(report.rows), recipe):
        raise ValueError(f"patience needs an evaluation, and {len(report.rows)} rows are too few to hold some out.")
    say(str(chosen))
    about = {
        **{name: getattr(chosen, name) for name in ("base", "model", "device", "dtype", "optimizer")},
        "base_digest": base_digest(chosen.model),
        "dataset": report.path.name,
        "dataset_sha256": report.sha256,
        "recipe": asdict(recipe),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
    }
    name = hashlib.sha256(json.dumps([about, str(out.resolve())]).encode()).hexdigest()[:12]
    # Not part of the name: with less memory free than before, a run goes on with fewer rows at once.
    about["batches"] = [chosen.batch, chosen.accumulation]
    folder = settings.RUNS / "training" / f"{out.name}-{name}"
    try:
        with _alone(folder), _quiet():
            done = _fit(chosen, report, tokenizer, folder, out, about, watch, say)
        shutil.rmtree(folder)
        return done
    except KeyboardInterrupt as error:
        _let_go(error)
        raise KeyboardInterrupt("Stopped. The same call goes on from the last checkpoint.") from None
    except Exception as error:
        _let_go(error)
        problem = _explained(error, chosen, folder)
        if problem is error:
            raise
        raise problem from error
    finally:
        _release()


def _base_of(folder: Path) -> str:
    """Return the base of the adapter in a folder; '' where it can't be told."""
    try:
        return str(json.loads((folder / "run.json").read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def prepare(
    base="auto", dataset: str | Path = settings.DATASET, questions: str | Path | None = settings.QUESTIONS, **changes
) -> tuple[Plan, DatasetReport, object]:
    """Return the plan of a training, its checked rows with their lengths, and the tokenizer. Raises as `train` does."""
    why = ""
    if base == "auto":
        chosen = plan(base, check_dataset(dataset, questions=questions).check(), **changes)
        base, why = chosen.base, chosen.why
    recipe, model = recipe_of(base, changes), model_of(base)
    room = min(recipe.max_length, getattr(load_config(model), "max_position_embeddings", recipe.max_length))
    tokenizer = load_tokenizer(model)
    report = check_dataset(dataset, tokenizer, room, questions).check()
    return replace(plan(base, report, **changes), why=why), report, tokenizer


def load_base(base: str | Path, four_bit: bool = True):
    """Return the model `base`, a preset, a hub name or a folder, with its matrices in NF4 (see `four_bit.read_base`).

    The same call again frees the model of the first.
    """
    model = model_of(str(base))
    _release(("base", model, four_bit))
    with _quiet():
        return _remember(("base", model, four_bit), read_base(model, four_bit))


def _remember(key: tuple, model):
    _loaded[key] = weakref.ref(model)
    return model


def _release(key: tuple | None = None) -> None:
    """Empty the model that the call `key` gave before, whoever still holds it, and give free memory back.

    A notebook's cell that is run again holds its old model until the new one is there: two don't fit a GPU.
    """
    old = _loaded.pop(key, lambda: None)()
    if old is not None:
        vars(old).clear()
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fit(chosen: Plan, report, tokenizer, folder: Path, out: Path, about: dict, watch, say) -> Training:
    """Load, train, save. What is loaded hangs on this frame alone."""
    checkpoint, so_far = _last_checkpoint(folder)
    if checkpoint:
        say(f"Going on from step {checkpoint.name.rpartition('-')[2]}.")
    with peak_memory(chosen.device, so_far["peak_memory"]) as peak:
        before, started = peak[0], time.perf_counter() - so_far["seconds"]
        model = read_base(chosen.model, chosen.recipe.four_bit, chosen.dtype, chosen.device)
        say(f"Loaded: {audit(model)}.")

        def mark() -> dict:
            return {"seconds": time.perf_counter() - started, "peak_memory": peak[0], "resumed": so_far["resumed"] + 1}

        trainer = make_trainer(model, tokenizer, report, chosen, folder, watch, mark, resumed=checkpoint is not None)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        losses = _losses(trainer.state.log_history)
    seconds = time.perf_counter() - started
    about |= {
        "machine": describe_machine(),
        "date": date.today().isoformat(),
        "planned_memory": round(chosen.total * 2**30),
        "peak_memory": peak[0],
        "memory_before": before,
        "seconds": round(seconds, 1),
        "resumed": so_far["resumed"],
        "losses": losses,
    }
    with locked(out), put_in_place(out) as new:
        trainer.model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        about["adapter_sha256"] = sha256_of(new / "adapter_model.safetensors")
        (new / "run.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    return Training(out, chosen, losses, seconds, peak[0], before, so_far["resumed"])


def make_trainer(model, tokenizer, report, chosen: Plan, folder: Path, watch=None, mark=dict, resumed: bool = False):
    """Return TRL's trainer for a loaded base and the plan made for it; checkpoints go to `folder`.

    `report` holds the rows; a `datasets.Dataset` of "input_ids" does too. `mark` returns what to note in a checkpoint.
    """
    from peft import LoraConfig
    from transformers import EarlyStoppingCallback, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    recipe = chosen.recipe
    rows = to_prompt_completion(report, tokenizer) if isinstance(report, DatasetReport) else report
    parts = {"train": rows, "test": None}
    if held_out(len(rows), recipe):
        parts = rows.train_test_split(held_out(len(rows), recipe), seed=recipe.seed)
    every = math.ceil(chosen.steps / recipe.checkpoints)
    config = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=chosen.batch,
        per_device_eval_batch_size=chosen.batch,
        gradient_accumulation_steps=chosen.accumulation,
        learning_rate=recipe.learning_rate,
        warmup_steps=0.03,  # the share of all steps
        optim=chosen.optimizer,
        bf16=chosen.dtype == "bfloat16",
        fp16=chosen.dtype == "float16",
        use_cpu=chosen.device == "cpu",
        dataloader_pin_memory=chosen.device == "cuda",
        gradient_checkpointing=chosen.checkpointing,
        max_length=None,  # every row was measured: nothing is to be cut in silence
        completion_only_loss=True if isinstance(report, DatasetReport) else None,
        router_aux_loss_coef=0.0,  # the routers of a mixture of experts are frozen
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would put zero for a loss that is no number
        eval_strategy="steps" if parts["test"] else "no",
        eval_on_start=bool(parts["test"]) and not resumed,
        eval_steps=every,
        save_steps=every,
        save_total_limit=CHECKPOINTS_KEPT,
        load_best_model_at_end=recipe.patience > 0,
        metric_for_best_model="eval_loss" if recipe.patience else None,
        restore_callback_states_from_checkpoint=recipe.patience > 0,
        seed=recipe.seed,
        data_seed=recipe.seed,
        report_to="none",
        disable_tqdm=True,
    )
    if config.n_gpu > 1:  # one holds all of it: the trainer would copy it to each, and then refuse to
        config._n_gpu = 1
    lora = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    callbacks = [_callback(chosen, watch, mark)]
    if recipe.patience:
        callbacks.append(EarlyStoppingCallback(recipe.patience))
    trainer = SFTTrainer(
        model=model, args=config, processing_class=tokenizer, peft_config=lora, train_dataset=parts["train"],
        eval_dataset=parts["test"], callbacks=callbacks,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    for weight in trainer.model.parameters():
        # TRL puts adapters on a 4-bit base into bfloat16, whose 8 bits lose small updates, and which the gradient
        # scaler of float16 on a T4 can't take at all.
        if weight.requires_grad:
            weight.data = weight.data.float()
    return trainer


def _callback(chosen: Plan, watch: Watch | None, mark: Callable[[], dict]):
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        """Stops at a loss that is no number, passes the losses on, and marks checkpoints that are whole."""

        def on_log(self, args, state, control, logs=None, **_):
            loss = (logs or {}).get("loss", (logs or {}).get("eval_loss", 0.0))
            if not math.isfinite(loss):
                half = " float16 can't hold numbers over 65,504: a GPU with bfloat16 can." * (chosen.dtype == "float16")
                raise TrainingFailed(
                    f"The loss is {loss} at step {state.global_step}: training stopped. Lower learning_rate, which is "
                    f"{chosen.recipe.learning_rate:g}; at another one a run begins anew.{half}"
                )
            if watch:
                watch(_losses(state.log_history), state.global_step, state.max_steps)

        def on_save(self, args, state, control, **_):
            note = Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARK
            note.write_text(json.dumps(mark()), encoding="utf-8")

    return Watcher()


def _losses(history: list[dict]) -> list[dict]:
    """Return the trainer's log without what is no loss."""
    kinds = ("loss", "eval_loss")
    return [
        {"step": entry["step"], "epoch": round(entry["epoch"], 4)}
        | {kind: entry[kind] for kind in kinds if kind in entry}
        for entry in history
        if any(kind in entry for kind in kinds)
    ]


def _last_checkpoint(folder: Path) -> tuple[Path | None, dict]:
    """Return the last checkpoint that is whole, and what was noted in it; those that a kill cut off are deleted."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            note = json.loads((path / MARK).read_text(encoding="utf-8"))
            whole.append((int(path.name.rpartition("-")[2]), path, note))
        except (OSError, ValueError):
            shutil.rmtree(path)
    _, path, note = max(whole, default=(0, None, {"seconds": 0.0, "peak_memory": 0, "resumed": 0}))
    return path, note


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from the same training. Raises TrainingFailed if one is at it."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(folder.name + ".lock"), timeout=0):
            yield
    except Timeout as error:
        raise TrainingFailed("The same training runs in another process: wait for it, or stop it.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and notes on coming versions out of the notebook."""
    import datasets
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
        datasets.enable_progress_bars()


def _let_go(error: BaseException | None) -> None:
    """Empty the frames that a traceback keeps alive: they hold the model, as long as a notebook holds the error."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _explained(error: Exception, chosen: Plan, folder: Path) -> Exception:
    """Return an error in words where it is one of a full disk or of full memory; else as it is."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(
        r"No space left|File too large|PytorchStreamWriter|inline_container", text
    ):
        return OSError(
            f"The disk is full: a checkpoint in {folder} or the adapter could not be written. Free {chosen.disk:.1f} "
            "GB; the same call then goes on from the last checkpoint, and an adapter that was there is as it was."
        )
    if isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate memory", text):
        return TrainingFailed(
            f"Memory ran out: {chosen.total:.1f} GiB were planned and {chosen.free_memory:.1f} free at the start. "
            "Close what else uses it and call again, which goes on from the last checkpoint; or set batch=1 or a "
            "smaller base."
        )
    return error


def load_finetuned(folder: str | Path = settings.FINE_TUNED):
    """Return (model, tokenizer): the adapter in `folder` on its base, loaded as it was trained, 4 bits or not.

    Any PEFT adapter will do; with a run.json beside it the hashes of adapter and base are compared first. The same call
    again frees the model of the first. Raises OSError for what is missing or damaged, ValueError for another base.
    """
    folder = Path(folder)
    base, run = check_adapter(folder)
    _release(("fine-tuned", str(folder)))
    with _quiet():
        model = attach(read_base(base, run.get("recipe", {}).get("four_bit", True)), folder)
        tokenizer = load_tokenizer(folder if (folder / "tokenizer.json").exists() else base)
    return _remember(("fine-tuned", str(folder)), model), tokenizer
