"""Training the embedded model as a command: what is saved, what a kill leaves, and which folder it goes on in."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from helpers import settings
from helpers.llms import check_weights
from helpers.tiny_gpt_oss import optimizers, tokenizer, train
from helpers.tiny_gpt_oss.batches import Bucket, Packer
from helpers.tiny_gpt_oss.curriculum import Shape
from helpers.tiny_gpt_oss.train import Stage, Training

FEW = Bucket(Shape((1, 1), (60, 120), 2), 2, 144)
FEW_ONLY = (("few", 1.0),)
STAGES = (Stage(4, 1e-3, FEW_ONLY),)


def narrow(*sizes):
    """Return the shipped architecture narrow and with two layers."""
    changed = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32, "layer_types": None}
    return GptOssConfig(**train.model_config(*sizes).to_dict() | changed)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small batches, few steps, and neither the head start nor reading the curriculum, which take seconds."""
    monkeypatch.setattr(train, "initialize", lambda model, known: None)
    monkeypatch.setattr(train, "fingerprint", lambda: "the curriculum")
    monkeypatch.setattr(train, "BUCKETS", {"few": FEW})
    monkeypatch.setattr(train, "STAGES", (Stage(2, 1.0, FEW_ONLY),))  # high: steps count little while they ramp up
    monkeypatch.setattr(train, "LATER_STAGES", (Stage(1, 1e-6, FEW_ONLY),))
    monkeypatch.setattr(train, "Training", partial(Training, config=narrow))


@pytest.fixture
def folder(tmp_path):
    train.prepare(tmp_path, settings.TINY_GPT_OSS)
    return tmp_path


def make(folder, **changed):
    return Training(folder, **{"stages": STAGES, "config": narrow} | changed)


def test_an_interrupted_training_goes_on_with_the_same_next_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT", 2)
    for name in ("whole", "stopped"):
        train.prepare(tmp_path / name, settings.TINY_GPT_OSS)
    with train.Writers(tmp_path / "whole", train.WINDOW, 1) as writers:
        whole = make(tmp_path / "whole")
        whole.run(writers)
        stopped = make(tmp_path / "stopped")
        learn, seen = stopped.learn, []

        def until_the_third(bucket, batch):
            seen.append(batch)
            if len(seen) == 4:  # after the checkpoint at 2, a step is lost
                raise KeyboardInterrupt
            return learn(bucket, batch)

        stopped.learn = until_the_third
        with pytest.raises(KeyboardInterrupt):
            stopped.run(writers)
        resumed = make(tmp_path / "stopped")
        following = next(writers.batches(resumed.jobs()))
        assert resumed.step == 2 and np.array_equal(following.ids, seen[2].ids)
        resumed.run(writers)
    steps = [json.loads(line)["step"] for line in resumed.log.read_text().splitlines()]
    assert steps == sorted(steps)
    for (name, weight), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.allclose(weight, other, atol=1e-6), name
    whole.export(tmp_path / "model")
    loaded = GptOssForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16 and not loaded.config.tie_word_embeddings
    check_weights(tmp_path / "model")


def test_each_weight_belongs_to_one_optimizer_and_experts_step_each_for_itself():
    torch.manual_seed(0)
    model = GptOssForCausalLM(narrow(4096, 0, 5))
    model.lm_head.weight = model.model.embed_tokens.weight
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    made = optimizers.make(model, 1e-3)
    parts = [part for kind in made.values() for group in kind.param_groups for part in group["params"]]
    assert sorted(map(id, parts)) == sorted(map(id, model.parameters()))
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    for kind in made.values():
        kind.step()
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, before[name]), name
    name = "model.layers.0.mlp.experts.down_proj"
    for step in model.get_parameter(name).detach() - before[name] * (1 - 1e-3 * optimizers.WEIGHT_DECAY):
        lengths = torch.linalg.svdvals(step)  # of one expert, in every direction
        assert lengths.max() < 3 * lengths.min()


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 0.02), ("bfloat16", 0.04)])
def test_muon_steps_as_that_of_pytorch_does(monkeypatch, dtype, apart):
    """PyTorch's computes in bfloat16: the steps differ by 1 % where ours are in float32, by 2 % in bfloat16."""
    monkeypatch.setenv("HELPERS_DTYPE", dtype)
    torch.manual_seed(0)
    stacks = [torch.randn(shape) for shape in ((24, 16), (16, 24), (3, 24, 16), (2, 16, 16))]
    ours = [torch.nn.Parameter(stack.clone()) for stack in stacks]
    theirs = [[torch.nn.Parameter(m.clone()) for m in stack.reshape(-1, *stack.shape[-2:])] for stack in stacks]
    one_by_one = [matrix for matrices in theirs for matrix in matrices]
    both = (
        optimizers.Muon(ours, 1e-2, 0.05),
        torch.optim.Muon(one_by_one, 1e-2, 0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for weight, matrices in zip(ours, theirs, strict=True):
            weight.grad = torch.randn_like(weight) * torch.linspace(0.1, 1, weight.shape[-1])
            for matrix, gradient in zip(matrices, weight.grad.reshape(-1, *weight.shape[-2:]), strict=True):
                matrix.grad = gradient.clone()
        for optimizer in both:
            optimizer.step()
    for stack, weight, matrices in zip(stacks, ours, theirs, strict=True):
        other = torch.stack(list(matrices)).view_as(weight)
        assert (weight - other).norm() < apart * (weight - stack).norm()


def test_orthogonalized_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for rows, columns in ((48, 32), (32, 48)):
        found = torch.linalg.svdvals(optimizers.orthogonalize(torch.randn(3, rows, columns)))
        assert found.min() > 0.6 and found.max() < 1.25
    assert not optimizers.orthogonalize(torch.zeros(1, 4, 4)).any()  # of an expert that no token chose


def logged(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]


def pretend(training, monkeypatch, losses, seconds=1.0):
    """Run a training whose steps only take time and give losses; return the steps at which it saved."""
    clock, coming, saved, save = [0.0], iter(losses), [], training.save

    def learn(bucket, batch):
        clock[0] += seconds
        return torch.tensor([next(coming), 2.0, 0.5])

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(training, "learn", learn)
    monkeypatch.setattr(training, "accuracy", lambda name, batches: {})
    monkeypatch.setattr(training, "save", lambda: (saved.append(training.step), save()))
    batch = SimpleNamespace(ids=np.zeros(10))
    training.run(SimpleNamespace(batches=lambda jobs: [batch] * len(jobs)))
    return saved


def test_a_checkpoint_is_written_by_the_clock_where_steps_are_slow(folder, monkeypatch):
    stages = (Stage(6, 1e-3, FEW_ONLY),)
    assert pretend(make(folder, stages=stages), monkeypatch, [1.0] * 6, seconds=250) == [3, 6]
    assert logged(folder)[0] == {"step": 6, "tokens": 60, "seconds": 1500, "loss": 1.0, "pointing": 2.0, "right": 0.5}
    (folder / "checkpoint.safetensors").unlink()
    assert pretend(make(folder, stages=stages), monkeypatch, [1.0] * 6) == [6]


def test_the_log_has_the_mean_of_the_steps_since_its_last_line_or_since_resuming(folder, monkeypatch):
    monkeypatch.setattr(train, "LOG", 3)
    monkeypatch.setattr(train, "UNSAVED", 100)
    stages = (Stage(8, 1e-3, FEW_ONLY),)
    first = make(folder, stages=stages)
    with pytest.raises(StopIteration):  # the losses are at an end after step 5: the last checkpoint is of step 4
        pretend(first, monkeypatch, [1.0, 2.0, 3.0, 9.0, 9.0], seconds=50)
    resumed = make(folder, stages=stages)
    assert resumed.step == 4 and resumed.seconds == 200
    pretend(resumed, monkeypatch, [4.0, 6.0, 7.0, 9.0])
    lines = [(entry["step"], entry["loss"], entry["seconds"]) for entry in logged(folder) if "loss" in entry]
    assert lines == [(3, 2.0, 150), (6, 5.0, 202), (8, 8.0, 204)]


def test_a_checkpoint_is_not_written_of_a_loss_that_is_no_number(folder, monkeypatch):
    """It would be gone on from for ever: the log looks at the loss at other steps than the clock saves at."""
    with pytest.raises(SystemExit, match="The loss is nan at step 3: start again from the checkpoint"):
        pretend(make(folder), monkeypatch, [1.0, float("nan"), 1.0, 1.0], seconds=250)
    assert not (folder / "checkpoint.safetensors").exists()


def test_going_on_with_another_recipe_is_refused(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "fingerprint", lambda: pytest.fail("It is read where it is needed alone."))
        training = make(folder)
    training.step = 2
    training.save()
    assert make(folder).step == 2
    for changed, named in (
        ({"stages": (*STAGES, *STAGES)}, "stages"),
        ({"smaller": 2}, "buckets"),
        ({"stages": train.LATER_STAGES, "smaller": 2}, "stages and buckets"),
    ):
        with pytest.raises(SystemExit) as refused:
            make(folder, **changed)
        assert str(refused.value) == (
            f"The run in {folder} differs in {named}: go on as it began (--go-on, --smaller, curriculum), or begin "
            "another in a folder of its own, by --folder."
        )
    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "make", lambda model, rate: {"adamw": torch.optim.AdamW(model.parameters())})
        with pytest.raises(SystemExit, match="differs in optimizers: go on as it began"):
            make(folder)
    monkeypatch.setattr(train, "fingerprint", lambda: "another")
    with pytest.raises(SystemExit, match="differs in curriculum: go on as it began"):
        make(folder)


def test_a_line_of_the_log_that_was_cut_off_is_left_out(folder):
    training = make(folder)
    training.step = 2
    training.save()
    whole = ['{"step": 0, "device": "cpu"}', '{"step": 2, "accuracy": {"few": {}}}']
    for rest in ("", '\n{"step": 3, "tok', '\n{"step": 2, "accuracy": {"few": {}\n', "\n" + "\0" * 9):
        training.log.write_text("\n".join(whole) + rest, encoding="utf-8")
        resumed = make(folder)
        resumed.write(step=3)
        assert training.log.read_text(encoding="utf-8").splitlines() == [*whole, '{"step": 3}']


def test_a_kill_while_the_log_is_shortened_leaves_the_old_one(folder, monkeypatch):
    training = make(folder)
    training.save()
    training.write(step=0)
    training.write(step=5)
    monkeypatch.setattr(train.os, "replace", lambda *paths: pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception, match="killed here"):
        make(folder)
    assert logged(folder) == [{"step": 0}, {"step": 5}]


@pytest.mark.parametrize("weights", [settings.TINY_GPT_OSS, None], ids=["weights", "nothing"])
def test_a_tokenizer_whose_files_are_not_all_there_is_completed(tmp_path, monkeypatch, weights):
    made = train.AutoTokenizer.from_pretrained(settings.TINY_GPT_OSS)
    monkeypatch.setattr(tokenizer, "make", lambda seed: made)
    shutil.copy(settings.TINY_GPT_OSS / "tokenizer.json", tmp_path)
    train.prepare(tmp_path, weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(train.FILES)
    Packer(train.AutoTokenizer.from_pretrained(tmp_path), train.WINDOW)  # needs the chat template


def test_a_disk_that_is_full_leaves_no_half_of_a_tokenizer(tmp_path, monkeypatch):
    def copy(source, target):
        (target / source.name).write_bytes(source.read_bytes()[:100])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(shutil, "copy", copy)
        train.prepare(tmp_path, settings.TINY_GPT_OSS)
    train.prepare(tmp_path, settings.TINY_GPT_OSS)
    for name in train.FILES:
        assert (tmp_path / name).read_bytes() == (settings.TINY_GPT_OSS / name).read_bytes()


@pytest.mark.parametrize("share", [0, 0.001, 0.5])
def test_a_checkpoint_that_is_cut_off_is_named(folder, share):
    make(folder).save()
    path = folder / "checkpoint.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(SystemExit) as refused:
        make(folder)
    assert str(refused.value) == f"{path} is damaged: delete it to begin anew."


@pytest.mark.parametrize("smaller", ["0", "-3"])
def test_batches_are_divided_by_one_or_more(folder, capsys, smaller):
    with pytest.raises(SystemExit) as refused:
        train.main(["--folder", str(folder), "--smaller", smaller])
    assert refused.value.code == 2
    assert "--smaller divides the rows of every batch: give a whole number from 1 on." in capsys.readouterr().err


class Here:
    """Writers without processes of their own, which take seconds to start."""

    def __init__(self, folder, window, processes):
        self.packer = Packer(train.AutoTokenizer.from_pretrained(folder), window)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def batches(self, jobs):
        return [self.packer.batch(*job) for job in jobs]


def test_the_command_trains_from_nothing_and_goes_on_from_those_weights(tmp_path, monkeypatch):
    tokens = tokenizer.make(train.SEED, 200)
    monkeypatch.setattr(tokenizer, "make", lambda seed: tokens)
    first, second = tmp_path / "first", tmp_path / "second"
    train.main(["--folder", str(first), "--smaller", "2"])
    check_weights(first / "model")
    start, *_, losses, held_out = logged(first)
    assert start["curriculum"] == "the curriculum" and start["step"] == 0
    assert losses["step"] == held_out["step"] == 3 and losses["tokens"] > 0 and set(held_out["accuracy"]) == {"few"}
    model = GptOssForCausalLM.from_pretrained(first / "model")
    assert model.config.hidden_size == 64 and model.dtype == torch.bfloat16

    monkeypatch.setattr(train, "Writers", Here)
    monkeypatch.setattr(settings, "TINY_GPT_OSS", first / "model")
    train.main(["--folder", str(second), "--go-on"])
    check_weights(second / "model")
    other = GptOssForCausalLM.from_pretrained(second / "model")
    for (name, weight), changed in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(weight, changed, rtol=0.01, atol=1e-3), name

    with pytest.raises(SystemExit, match="differs in stages: go on as it began"):
        train.main(["--folder", str(second)])
    train.main(["--folder", str(second), "--go-on"])  # at its end already
    assert [entry["step"] for entry in logged(second)] == [0, 1, 1, 1]
