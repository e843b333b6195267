"""Training an adapter: the plan before it, what comes of it, and what happens when it is stopped, killed or harmed."""

import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import time
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import stand_in_model
from transformers import AutoConfig

from helpers import finetuning, planning, settings, storage
from helpers.dataset import BadDataset, DatasetReport, check_dataset
from helpers.finetuning import TrainingFailed, load_base, load_finetuned, train
from helpers.four_bit import check_adapter
from helpers.planning import PRESETS, PlanRefused, Recipe, plan

ROWS = [
    {"instruction": f"{ask} {thing}?", "output": f"From the quay: {thing} is {colour}. Late, but lit."}
    for ask, colour in (("What is", "blue"), ("Say the colour of", "green"))
    for thing in "lamp rope tide oar net buoy mast keel anchor sail gull crab pier bell fog lens stair boat".split()
]
QUICK = {"epochs": 2, "learning_rate": 1e-2, "checkpoints": 6}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return stand_in_model.make(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return stand_in_model.write_rows(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "RUNS", tmp_path / "runs")
    return tmp_path / "runs" / "training"


@pytest.fixture
def presets(base, monkeypatch):
    """The table with a stand-in for the embedded model, and a machine whose speed is known."""
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], model=base))
    monkeypatch.setattr(planning, "_speed", lambda device, dtype: (1e11, 1e10))


def teach(base, dataset, out, **options):
    return train(base, dataset, out, **{"questions": None, "say": lambda _: None} | QUICK | options)


@pytest.fixture(scope="module")
def trained(base, dataset, tmp_path_factory):
    """One training that all tests of what comes of it share."""
    folder, seen = tmp_path_factory.mktemp("trained"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "RUNS", folder / "runs")
        done = teach(base, dataset, folder / "adapter", watch=lambda *given: seen.append(given))
        assert list((folder / "runs" / "training").glob("*/")) == []  # its checkpoints are gone
    return done, seen


def lengths(*tokens):
    """A set of which only the lengths of its rows are known."""
    return DatasetReport(Path("set.jsonl"), "", [ROWS[0]] * len(tokens), [], [(count, 20) for count in tokens])


# --- The plan ---------------------------------------------------------------------------------------------------------


def test_gpt_oss_20b_by_arithmetic(presets):
    """20.9 billion weights, 9.5 GiB of experts and attention in NF4; the goals are 22 and 16 GB."""
    wide = plan("gpt-oss-20b", lengths(*[512] * 40), device="cuda", free_memory=80)
    assert wide.batch == 4 and wide.checkpointing and wide.dtype == "bfloat16" and wide.optimizer == "paged_adamw_32bit"
    assert wide.seconds == 0 and "another machine's" in str(wide)
    assert wide.memory["matrices in NF4"] == pytest.approx(19.75e9 * 4.127 / 8 / 2**30, rel=0.01)
    assert wide.memory["matrices unpacked at once"] == pytest.approx(3 * 32 * 2880**2 * 2 / 2**30)
    assert wide.memory["embeddings, head, norms"] == pytest.approx(2.17, abs=0.02)
    assert 14 < wide.total < 22e9 / 2**30  # all of it; of which torch counts what is not CUDA's own
    long = plan("gpt-oss-20b", lengths(*[1024] * 40), device="cuda", free_memory=80, batch=1)
    assert 13 < long.total - long.memory["CUDA's own"] < 16e9 / 2**30
    half = plan("gpt-oss-20b", lengths(*[512] * 40), device="cuda", free_memory=80, four_bit=False)
    assert half.memory["matrices in 16 bits"] == pytest.approx(36.8, abs=0.1) and half.total > 40


def test_a_preset_by_the_name_of_its_model_is_that_preset(presets):
    named, known = (
        plan(name, lengths(512), device="cuda", dtype="float16", free_memory=80)
        for name in ("openai/gpt-oss-20b", "gpt-oss-20b")
    )
    assert named == replace(known, base="openai/gpt-oss-20b", free_disk=named.free_disk)
    assert "leave the range of float16" in named.problem


def test_experts_that_would_stay_in_16_bits_are_said_before_anything_is_fetched(presets, tmp_path):
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 32}
    AutoConfig.for_model("qwen3_moe", **shape, num_attention_heads=2, num_key_value_heads=2).save_pretrained(tmp_path)
    with pytest.raises(PlanRefused, match="bitsandbytes leaves the experts of a qwen3_moe in 16 bits: four_bit"):
        plan(str(tmp_path), lengths(80), free_memory=80).check()
    plan(str(tmp_path), lengths(80), free_memory=80, four_bit=False).check()


def test_a_smaller_batch_is_chosen_where_the_whole_one_doesn_t_fit(presets):
    roomy = plan("gpt-oss-20b", lengths(*[1024] * 8), device="cuda", free_memory=24)
    tight = plan("gpt-oss-20b", lengths(*[1024] * 8), device="cuda", free_memory=roomy.total - 0.01)
    assert (roomy.batch, roomy.accumulation) == (4, 1) and (tight.batch, tight.accumulation) == (2, 2)
    assert tight.steps == roomy.steps == 6 and tight.total < roomy.total and tight.problem == ""


def test_what_doesn_t_fit_is_refused_with_numbers_and_the_next_smaller_choice(presets):
    found = plan("gpt-oss-20b", lengths(*[512] * 8), device="cuda", free_memory=12)
    said = (
        r"gpt-oss-20b can't be trained here: it needs 1\d\.\d GiB of memory even row by row \(matrices in NF4 9\.5, .*"
    )
    with pytest.raises(
        PlanRefused, match=said + r"12\.0 are free; the next smaller choice is base='small', which needs 1"
    ):
        found.check()
    assert "Refused: " in str(found)
    with pytest.raises(PlanRefused, match="or train on a machine with more"):
        plan("tiny", lengths(80), free_memory=0.001).check()


def test_the_time_on_another_machine_follows_from_its_data_sheet(presets):
    there = {"device": "cuda", "dtype": "float16", "free_memory": 14.6}
    slow, fast = (
        plan("small", lengths(*[60] * 800), **there, speed=speed).seconds for speed in ((65e12, 320e9), (130e12, 640e9))
    )
    assert 60 < fast < slow < 1200
    assert plan("small", lengths(*[60] * 800), **there).seconds == 0


def test_too_little_disk_is_refused(presets, monkeypatch):
    usage = planning.shutil.disk_usage(settings.ROOT)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    with pytest.raises(PlanRefused, match=r"it needs 14\.\d GB of disk \(13\.8 to fetch\), and 1\.0 are free"):
        plan("gpt-oss-20b", lengths(80), device="cuda", free_memory=80).check()
    assert plan("tiny", lengths(80), free_memory=8).problem == ""


def test_what_is_fetched_is_measured_on_the_disk_of_the_hubs_cache(presets, monkeypatch, tmp_path):
    def free(*places):
        return lambda place: usage._replace(free=10**12 if Path(place) in places else 10**9)

    usage, cache = planning.shutil.disk_usage(settings.ROOT), Path("/dev")  # another disk than the course's
    monkeypatch.setattr(planning, "_hub_cache", lambda: cache)
    for roomy, rank in ((settings.ROOT, 16), (cache, 512)):  # too little for the download, for the checkpoints
        monkeypatch.setattr(planning.shutil, "disk_usage", free(roomy))
        found = plan("gpt-oss-20b", lengths(80), device="cuda", free_memory=80, rank=rank)
        assert re.search(r"\d GB of disk \(13\.8 to fetch\), and 1\.0 are free", found.problem)
    monkeypatch.setattr(planning.shutil, "disk_usage", free(settings.ROOT, cache))
    assert plan("gpt-oss-20b", lengths(80), device="cuda", free_memory=80).problem == ""


def test_a_checkpoint_is_here_when_all_its_shards_are(monkeypatch, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}}))
    here = {index.name: str(index)}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda model, name: here.get(name))
    assert planning._to_fetch("some/model", 10.0) == 10.0
    here["1.safetensors"] = "there"
    assert planning._to_fetch("some/model", 10.0) == 5.0
    here["2.safetensors"] = "there"
    assert planning._to_fetch("some/model", 10.0) == 0.0
    here.clear()
    assert planning._to_fetch("some/model", 10.0) == 10.0


@pytest.mark.parametrize(
    ("device", "dtype", "free_memory", "chosen", "said"),
    [
        ("cuda", "bfloat16", 24, "gpt-oss-20b", "the largest preset that fits"),
        ("cuda", "bfloat16", 12, "small", r"gpt-oss-20b: it needs 1\d\.\d GiB of memory"),
        ("cuda", "float16", 15.6, "small", "gpt-oss-20b: its numbers leave the range of float16"),
        ("cpu", "float32", 64, "tiny", r"gpt-oss-20b: about \d+ hours on this cpu; small: about \d hours on this cpu"),
        ("cpu", "float32", 1, "tiny", "gpt-oss-20b: it needs .* small: it needs"),
    ],
)
def test_auto_is_the_largest_preset_that_fits_and_says_why(
    presets, monkeypatch, device, dtype, free_memory, chosen, said
):
    read = planning.load_config
    monkeypatch.setattr(planning, "load_config", lambda model: read(model) if Path(model).is_dir() else None)
    found = plan("auto", lengths(*[100] * 800), device=device, dtype=dtype, free_memory=free_memory)
    assert found.base == chosen and found.why.startswith("the largest preset that fits") and found.why in str(found)
    assert re.search(said, found.why), found.why


def test_auto_passes_over_what_can_t_be_fetched(presets):
    found = plan("auto", lengths(*[100] * 8), device="cuda", free_memory=80)
    assert found.base == "tiny"
    assert "gpt-oss-20b: its files are not here and can't be fetched; small: its files are not here" in found.why


def test_auto_where_nothing_fits(presets):
    with pytest.raises(PlanRefused, match=r"No preset can be trained here\. gpt-oss-20b: .* small: .* tiny: it needs"):
        plan("auto", lengths(100), free_memory=0.001)


def test_the_course_s_settings():
    course = Recipe()
    assert (course.rank, course.alpha, course.dropout, course.batch, course.epochs) == (16, 32, 0.05, 4, 3)
    assert course.targets == ("q_proj", "k_proj", "v_proj", "o_proj") and course.learning_rate == 2e-4
    for preset in PRESETS.values():
        assert preset.licence and (not preset.changes or preset.why)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rnak": 8}, r"There is no setting rnak: choose among rank, alpha"),
        ({"rank": 0}, "rank is 0: set it to more than 0"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001"),
        ({"dropout": 1.5}, "dropout and evaluation are shares"),
        ({"evaluation": 0, "patience": 2}, "patience needs an evaluation: set"),
        ({"targets": ("no_proj",)}, r"targets is \('no_proj',\): a gpt_oss has no layer of such a name"),
    ],
)
def test_a_setting_that_can_t_be_is_refused(base, changes, said):
    with pytest.raises(ValueError, match=said):
        plan(base, lengths(80), **changes)


def test_the_plan_s_bytes_are_those_of_the_loaded_model(base, dataset, tmp_path):
    """Weights to the byte, but for the tables of NF4 codes, which weigh in so small a model; adapters to the number."""
    report = check_dataset(dataset, stand_in_model.tokenizer(), questions=None)
    made = plan(base, report)
    model = finetuning.read_base(base, True)
    held = finetuning.audit(model).bytes_by_dtype
    planned = {part: size * 2**30 for part, size in made.memory.items()}
    assert planned["embeddings, head, norms"] == pytest.approx(held["float32"], rel=0.01)
    assert planned["matrices in NF4"] == pytest.approx(held["nf4"] - 12 * 1088, rel=0.02)
    trainer = finetuning.make_trainer(model, stand_in_model.tokenizer(), report, made, tmp_path)
    trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    assert planned["optimizer"] == 8 * trainable


class Alive:
    """Follows the bytes of all tensors that operations make while it is open."""

    def __enter__(self):
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_iter

        sizes, alive = {}, self
        alive.now = alive.most = 0

        def gone(key):
            alive.now -= sizes.pop(key)

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, given=(), options=None):
                out = function(*given, **(options or {}))
                for tensor in tree_iter(out):
                    if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in sizes:
                        storage = tensor.untyped_storage()
                        sizes[id(storage)] = storage.nbytes()
                        alive.now += storage.nbytes()
                        alive.most = max(alive.most, alive.now)
                        weakref.finalize(storage, gone, id(storage))
                return out

        self.mode = Mode()
        self.mode.__enter__()
        return self

    def __exit__(self, *error):
        self.mode.__exit__(*error)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_plan_s_activations_are_near_what_a_step_holds(tmp_path, monkeypatch, checkpointing):
    import torch
    from peft import LoraConfig, get_peft_model

    shape = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8}
    folder = stand_in_model.make(tmp_path / "base", **shape, num_key_value_heads=2)
    monkeypatch.setattr(planning._Shape, "checkpointing", checkpointing)
    made = plan(folder, lengths(*[200] * 4), evaluation=0)
    model = finetuning.read_base(folder, True)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model = get_peft_model(model.train(), LoraConfig(r=16, target_modules=list(made.recipe.targets)))
    ids = torch.randint(0, 4000, (4, 200))
    with Alive() as alive:
        model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    planned = (made.memory["activations"] + made.memory["matrices unpacked at once"]) * 2**30
    assert 0.7 < alive.most / planned < 1.15, alive.most / planned


# --- What comes of a training ---------------------------------------------------------------------------------------


def test_both_losses_fall_and_are_all_there(trained):
    done, seen = trained
    steps = [entry["step"] for entry in done.losses if "loss" in entry]
    assert steps == list(range(1, done.plan.steps + 1)) and done.plan.steps == 2 * math.ceil(32 / 4)
    table = done.table()
    assert table[0][0] == 0 and math.isnan(table[0][1]) and table[-1][0] == done.plan.steps
    assert table[-1][1] < table[1][1] - 1 and table[-1][2] < table[0][2] - 1
    assert [given[1] for given in seen if given[1]] and seen[-1][0] == done.losses
    assert seen[-1][1:] == (done.plan.steps, done.plan.steps)


def test_run_json_says_what_was_done_with_what(trained, base, dataset):
    done, _ = trained
    run = json.loads((done.folder / "run.json").read_text("utf-8"))
    assert run["losses"] == done.losses and run["recipe"]["seed"] == 1 and run["recipe"]["learning_rate"] == 1e-2
    assert run["dataset_sha256"] == check_dataset(dataset, questions=None).sha256
    assert run["base_digest"] == finetuning.base_digest(base) and len(run["base_digest"]) == 64
    assert run["adapter_sha256"] == finetuning.sha256_of(done.folder / "adapter_model.safetensors")
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "python"} <= run["versions"].keys()
    assert run["peak_memory"] >= run["memory_before"] > 0 and run["seconds"] > 0 and run["device"] == "cpu"
    assert run["dtype"] == "float32" and run["machine"] and run["resumed"] == 0 and run["planned_memory"] > 0


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.arange(50, 80)[None]).logits


def test_the_adapter_loads_with_plain_peft_and_with_load_finetuned(trained, base):
    import torch
    from peft import AutoPeftModelForCausalLM

    done, _ = trained
    plain = AutoPeftModelForCausalLM.from_pretrained(done.folder)
    assert all(weight.dtype == torch.float32 for name, weight in plain.named_parameters() if "lora_" in name)
    done.folder.rename(done.folder.with_name(f".{done.folder.name}.old"))  # where a kill between two renames leaves it
    model, tokenizer = load_finetuned(done.folder)
    assert tokenizer.chat_template == stand_in_model.tokenizer().chat_template
    assert finetuning.audit(model).share >= 0.9  # as it was trained
    with model.disable_adapter():
        untaught = logits(model)
    assert torch.allclose(untaught, logits(finetuning.read_base(base, True)), atol=1e-5)
    taught, in_32_bits = logits(model) - untaught, logits(model) - logits(plain)
    assert taught.abs().mean() > 4 * in_32_bits.abs().mean() > 0


def test_load_llm_answers_with_it(trained, base):
    """What was taught is many times likelier than from the base alone."""
    from helpers.llms import load_llm

    asked = [{"role": "user", "content": "What?"}]
    with_it, without = (
        load_llm(f"hf:{folder}").chat.probability(asked, "From the") for folder in (trained[0].folder, base)
    )
    assert with_it > 10 * without > 0


def test_many_are_answered_as_one_by_one(trained):
    from helpers.llms import CUT, answer_all, load_llm

    llm = load_llm(f"hf:{trained[0].folder}", answer_tokens=12)
    talks = [[{"role": "user", "content": text}] for text in ("What?", "Say the colour of rope?", "What is an oar?")]
    one_by_one = ["".join(llm.stream(talk)).removesuffix(CUT).strip() for talk in talks]
    assert answer_all(llm.chat, talks, batch=2) == one_by_one


def test_the_same_load_again_frees_the_first_and_nothing_else(trained, base):
    first, _ = load_finetuned(trained[0].folder)
    bare = load_base(base)
    second, _ = load_finetuned(trained[0].folder)
    assert vars(first) == {} and logits(second).isfinite().all()
    again = load_base(base)
    assert vars(bare) == {} and logits(again).isfinite().all() and logits(second).isfinite().all()


def test_what_the_trainer_learns_is_what_was_shown(base, dataset, tmp_path):
    """The tokens and the mask of `show_example`, and nothing that is padding."""
    from helpers.dataset import encode

    tokenizer = stand_in_model.tokenizer()
    report = check_dataset(dataset, tokenizer, questions=None)
    made = plan(base, report, evaluation=0)
    trainer = finetuning.make_trainer(finetuning.read_base(base, True), tokenizer, report, made, tmp_path)
    for row, given in zip(ROWS, trainer.train_dataset, strict=True):
        ids, start = encode(row, tokenizer)
        assert given["input_ids"] == ids and given["labels"] == [-100] * start + ids[start:]
    batch = next(iter(trainer.get_train_dataloader()))
    stops = (batch["labels"] == tokenizer.eos_token_id).sum(1)
    assert stops.tolist() == [1] * 4  # the end of an answer is learnt, padding isn't


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_adapters_are_trained_in_32_bits(base, dataset, tmp_path, monkeypatch, dtype):
    """TRL puts those on a 4-bit base into bfloat16, on which a T4's gradient scaler fails."""
    import torch
    from trl import SFTConfig

    made = replace(plan(base, dataset_report(dataset)), dtype=dtype)
    given = {}
    post = SFTConfig.__post_init__

    def without_gpu(config):
        given.update(bf16=config.bf16, fp16=config.fp16)
        config.bf16 = config.fp16 = False
        post(config)

    monkeypatch.setattr(SFTConfig, "__post_init__", without_gpu)
    model = finetuning.read_base(base, True)
    trainer = finetuning.make_trainer(model, stand_in_model.tokenizer(), dataset_report(dataset), made, tmp_path)
    trainable = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert trainable and {weight.dtype for weight in trainable} == {torch.float32}
    assert given == {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}


def dataset_report(path):
    return check_dataset(path, stand_in_model.tokenizer(), questions=None)


def test_training_stops_early_on_request(base, dataset, tmp_path):
    """At a learning rate that changes nothing no evaluation is better than the one before."""
    done = teach(base, dataset, tmp_path / "out", learning_rate=1e-12, patience=2)
    assert done.losses[-1]["step"] < done.plan.steps and (done.folder / "adapter_model.safetensors").exists()


def test_a_dense_model_without_four_bits_and_without_evaluation(dataset, tmp_path):
    folder = stand_in_model.make(tmp_path / "dense", stand_in_model.QWEN3)
    done = teach(
        folder, dataset, tmp_path / "out", four_bit=False, evaluation=0, epochs=1, targets=["q_proj", "v_proj"]
    )
    assert done.table() == [] and len(done.losses) == done.plan.steps == 9
    model, _ = load_finetuned(done.folder)
    assert finetuning.audit(model).share == 0


def test_a_date_in_the_chat_template_is_the_same_every_day(tmp_path):
    tokenizer = stand_in_model.tokenizer()
    tokenizer.chat_template = (
        "{{ strftime_now('%Y-%m-%d') }} {{ strftime_now(\"%d %b %Y\") }}" + tokenizer.chat_template
    )
    tokenizer.save_pretrained(tmp_path)
    frozen = finetuning.load_tokenizer(tmp_path)
    text = frozen.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.startswith("2026-01-01 01 Jan 2026<|start|>") and "strftime_now" not in frozen.chat_template


# --- Stopped, killed, harmed ----------------------------------------------------------------------------------------


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapter(one, other):
    import torch

    one, other = weights(one), weights(other)
    assert one.keys() == other.keys() and all(torch.allclose(one[k], other[k], atol=1e-6) for k in one)


def quietly(_):
    pass


def learn(base, dataset, folder, options):
    """Train in a process of its own, noting each step in a file, whole at any moment."""
    settings.RUNS = folder / "runs"

    def note(losses, step, steps):
        (folder / "next").write_text(str(step))
        (folder / "next").replace(folder / "step")

    teach(base, dataset, folder / "out", watch=note, **options)


def kill_at_random(base, dataset, folder, kills, seed, **options):
    """Train in processes that are killed `kills` times at random moments, each going on where the last was."""
    note, chance = folder / "step", random.Random(seed)
    note.write_text("0")
    for kill in range(kills + 1):
        process = multiprocessing.get_context("forkserver").Process(target=learn, args=(base, dataset, folder, options))
        process.start()
        if kill < kills:
            goal = int(note.read_text()) + chance.randint(1, 4)
            while process.is_alive() and int(note.read_text()) < goal:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.15))  # into a step, an evaluation or the writing of a checkpoint
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill < kills else 0)
        assert (folder / "out").exists() == (kill == kills)  # no half adapter


@pytest.mark.usefixtures("forkserver")
def test_killed_three_times_it_goes_on_to_the_same_adapter(trained, base, dataset, tmp_path):
    kill_at_random(base, dataset, tmp_path, 3, seed=4)
    assert_same_adapter(tmp_path / "out", trained[0].folder)
    run = json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))
    steps = [entry["step"] for entry in run["losses"] if "loss" in entry]
    assert steps == list(range(1, trained[0].plan.steps + 1)) and 1 <= run["resumed"] <= 3


@pytest.mark.stress
@pytest.mark.usefixtures("forkserver")
def test_killed_twenty_times_it_goes_on_to_the_same_adapter(base, dataset, tmp_path):
    """Long enough for twenty kills, and a checkpoint every other step, so that some are hit."""
    long = {"epochs": 20, "checkpoints": 80}
    whole = teach(base, dataset, tmp_path / "whole", **long)
    kill_at_random(base, dataset, tmp_path, 20, seed=1, **long)
    assert_same_adapter(tmp_path / "out", whole.folder)


@pytest.fixture
def loaded(monkeypatch):
    """Weak references to the bases that a training loads."""
    found = []

    def read(*given, read=finetuning.read_base):
        model = read(*given)
        found.append(weakref.ref(model))
        return model

    monkeypatch.setattr(finetuning, "read_base", read)
    return found


def test_ctrl_c_leaves_memory_free_and_the_same_call_goes_on(trained, base, dataset, tmp_path, loaded):
    said = []

    def interrupt(losses, step, steps):
        if step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="The same call goes on from the last checkpoint") as stop:
        teach(base, dataset, tmp_path / "out", watch=interrupt)
    assert stop.value and loaded[0]() is None and not (tmp_path / "out").exists()
    teach(base, dataset, tmp_path / "out", say=said.append)
    assert any("Going on from step 6." in line for line in said) and loaded[1]() is None
    assert_same_adapter(tmp_path / "out", trained[0].folder)


def test_other_settings_begin_anew(base, dataset, tmp_path):
    def until(last):
        def interrupt(losses, step, steps):
            if step == last:
                raise KeyboardInterrupt

        return interrupt

    said = []
    for options in ({"watch": until(8)}, {"watch": until(1), "seed": 2, "say": said.append}):
        with pytest.raises(KeyboardInterrupt):
            teach(base, dataset, tmp_path / "out", **options)
    assert said and not any("Going on" in line for line in said)


def test_it_goes_on_with_fewer_rows_at_once(trained, base, dataset, tmp_path, monkeypatch):
    """Where less memory is free than before; the steps are the same."""
    stopped, planned, said = [], finetuning.plan, []

    def stop(losses, step, steps):
        if step == 10 and not stopped:
            stopped.append(step)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(base, dataset, tmp_path / "out", watch=stop)
    halves = {"batch": 2, "accumulation": 2}
    monkeypatch.setattr(finetuning, "plan", lambda *given, **more: replace(planned(*given, **more), **halves))
    done = teach(base, dataset, tmp_path / "out", say=said.append)
    assert done.resumed == 1 and any(line.startswith("Going on from step") for line in said)
    once = [entry["loss"] for entry in trained[0].losses if "loss" in entry]
    assert [entry["loss"] for entry in done.losses if "loss" in entry] == pytest.approx(once, rel=0.02)


def test_one_gpu_of_several_is_used(base, dataset, tmp_path, monkeypatch):
    """Else TRL refuses; that there are two is said by the settings of the trainer, as on a machine with two."""
    import trl

    class TwoGpus(trl.SFTConfig):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setattr(trl, "SFTConfig", TwoGpus)
    chosen, report, tokenizer = finetuning.prepare(base, dataset, None, **QUICK)
    trainer = finetuning.make_trainer(load_base(base), tokenizer, report, chosen, tmp_path)
    assert trainer.args.n_gpu == 1


def test_an_adapter_of_another_copy_of_the_embedded_model(tmp_path):
    """The course was moved, or the adapter was trained on Colab: the path in it leads nowhere."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    about = {"peft_type": "LORA", "base_model_name_or_path": f"/content/course/helpers/{settings.TINY_GPT_OSS.name}"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    assert check_adapter(tmp_path)[0] == str(settings.TINY_GPT_OSS)


def test_the_same_training_does_not_run_twice_at_once(base, dataset, tmp_path, runs):
    problems = []

    def again(losses, step, steps):
        if step == 1 and not problems:
            with pytest.raises(TrainingFailed, match="runs in another process") as problem:
                teach(base, dataset, tmp_path / "out", epochs=1)
            problems.append(problem)

    teach(base, dataset, tmp_path / "out", watch=again, epochs=1)
    assert len(problems) == 1


def test_an_adapter_is_put_in_place_under_its_lock(base, dataset, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(storage, "LOCK_SECONDS", 0.1)
    held = storage.locked(out)

    def hold(losses, step, steps):
        if step == steps - 1:  # another writer comes while it trains
            held.__enter__()

    with pytest.raises(TimeoutError, match=r"out\.lock .*: wait for it or stop it"):
        teach(base, dataset, out, epochs=1, watch=hold)
    held.__exit__(None, None, None)
    assert not out.exists()
    assert teach(base, dataset, out, epochs=1).folder == out  # no step again: only the last part was missing


def test_what_a_kill_between_two_renames_left_is_put_back(tmp_path):
    out, old = tmp_path / "out", tmp_path / ".out.old"
    old.mkdir()
    (old / "adapter_config.json").write_text("{}")
    storage.put_back(out)
    assert (out / "adapter_config.json").exists() and not old.exists()
    storage.put_back(out)
    storage.put_back(tmp_path / "none")
    assert not (tmp_path / "none.lock").exists()


def test_a_loss_that_is_no_number_stops_it_with_an_explanation(base, dataset, tmp_path, loaded):
    said = r"The loss is (nan|inf) at step \d+: training stopped\. Lower learning_rate, which is 1e\+20"
    with pytest.raises(TrainingFailed, match=said):
        teach(base, dataset, tmp_path / "out", learning_rate=1e20)
    assert loaded[0]() is None and not (tmp_path / "out").exists()


@contextmanager
def disk_of(size):
    """Let no file grow over `size` bytes: writing fails as on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [30_000, 100_000])
def test_a_full_disk_is_said_and_what_was_there_stays(trained, base, dataset, tmp_path, size, loaded):
    """First the adapter doesn't fit, then the tokenizer; each library says it in its own way."""
    out = tmp_path / "out"
    out.mkdir()
    for path in trained[0].folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    before = weights(out)
    with (
        disk_of(size),
        pytest.raises(OSError, match=r"The disk is full: .*\. Free \d+\.\d GB; the same call then goes on"),
    ):
        teach(base, dataset, out, epochs=1)
    assert loaded[0]() is None and {path.name for path in tmp_path.glob("out*")} <= {"out", "out.lock"}
    assert all((weights(out)[key] == before[key]).all() for key in before)
    assert teach(base, dataset, out, epochs=1).folder == out


def test_a_disk_that_fills_while_the_adapter_is_written(base, dataset, tmp_path, monkeypatch):
    import errno

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="The disk is full"):
        patch.setattr(finetuning, "describe_machine", lambda: patch.setattr("peft.PeftModel.save_pretrained", full))
        teach(base, dataset, tmp_path / "out", epochs=1)
    assert [path.name for path in tmp_path.glob("out*")] == ["out.lock"]
    said = []
    teach(base, dataset, tmp_path / "out", epochs=1, say=said.append)
    assert "Going on from step 8." in said  # all steps were done


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")])
def test_memory_that_runs_out_is_said_with_the_numbers(base, dataset, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(finetuning, "read_base", fail)
    with pytest.raises(
        TrainingFailed, match=r"Memory ran out: \d+\.\d GiB were planned and \d+\.\d free .*or set batch=1"
    ):
        teach(base, dataset, tmp_path / "out")


# --- Bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(finetuning, "read_base", lambda *_: pytest.fail("the base was loaded"))


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "There is no training set"),
        ("", "holds no example"),
        ("\n".join(map(json.dumps, [ROWS[0], {"instruction": "x"}, ROWS[1]])), "line 2: the field output is missing"),
        ('{"prompt": "a", "completion": "b"}', "name the fields instruction and output"),
        ("\n".join([json.dumps(ROWS[0])] * 3), r"(?s)line 2: .*that of line 1.*line 3: "),
        (json.dumps({"instruction": "x", "output": "and on " * 400}), r"line 1: .* tokens, and 256 fit"),
    ],
)
def test_a_bad_training_set_is_refused_before_anything_is_loaded(base, tmp_path, text, said):
    path = tmp_path / "set.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises((BadDataset, FileNotFoundError), match=said):
        teach(base, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_question_of_the_evaluation_in_it_is_refused(base, tmp_path):
    asked = json.loads(settings.QUESTIONS.read_text("utf-8").splitlines()[3])
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"instruction": asked["question"], "output": "x"}), encoding="utf-8")
    with pytest.raises(BadDataset, match=f"line 1: it is question {asked['id']}"):
        train(base, path, tmp_path / "out", say=quietly)


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("name", ["nobody/no-such-model", "no such folder"])
def test_a_base_that_can_t_be_had_is_said_in_one_sentence(dataset, tmp_path, name):
    with pytest.raises(OSError, match=r"^The base model '.*' can't be loaded: .*base='tiny', which needs none\.$"):
        teach(name, dataset, tmp_path / "out")


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_plan_that_doesn_t_fit_is_refused(base, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_free_memory", lambda device: 0.001)
    with pytest.raises(PlanRefused, match="GiB of memory even row by row"):
        teach(base, dataset, tmp_path / "out")


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_folder_with_something_else_in_it_is_not_overwritten(base, dataset, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"dear to me")
    with pytest.raises(ValueError, match="holds something else than an adapter: choose another folder with out="):
        teach(base, dataset, tmp_path)


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy of the trained adapter that a test may harm."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in trained[0].folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_folder_without_an_adapter_is_said(adapter, tmp_path):
    for folder, name in ((tmp_path / "none", "adapter_config.json"), (adapter, "adapter_model.safetensors")):
        (folder / name).unlink(missing_ok=True)
        with pytest.raises(
            OSError, match=rf"holds no adapter \({name} is missing\): train one with `python -m helpers"
        ):
            load_finetuned(folder)


@pytest.mark.parametrize("with_run", [True, False])
@pytest.mark.parametrize("harm", ["a byte", "cut", "empty", "its JSON"])
def test_a_damaged_adapter_is_refused(adapter, harm, with_run):
    path = adapter / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    if harm == "its JSON":
        (adapter / "adapter_config.json").write_text("{", encoding="utf-8")
    elif harm == "a byte":
        raw[4] ^= 1  # of the length of the header; elsewhere a byte is a weight, which only a hash tells
    path.write_bytes(raw[:500] if harm == "cut" else b"" if harm == "empty" else raw)
    if not with_run:
        (adapter / "run.json").unlink()
    with pytest.raises((OSError, ValueError), match=r"adapter in .*adapter (is damaged|doesn't fit)"):
        load_finetuned(adapter)


def test_a_single_changed_weight_is_noticed(adapter):
    path = adapter / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(OSError, match=r"its SHA-256 is not the one in run\.json"):
        load_finetuned(adapter)


def test_an_adapter_of_another_base_is_refused(adapter, tmp_path):
    """Of the same shape, which its hash tells; of another shape; and with layers that are not there."""
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))

    def put_on(**changes):
        folder = stand_in_model.make(tmp_path / f"base{len([*tmp_path.iterdir()])}", **changes)
        new = config | {"base_model_name_or_path": folder}
        (adapter / "adapter_config.json").write_text(json.dumps(new), encoding="utf-8")

    put_on(seed=7)
    with pytest.raises(ValueError, match=r"is of another base: .* has other weights than when it was trained"):
        load_finetuned(adapter)
    (adapter / "run.json").unlink()
    assert load_finetuned(adapter)[0].active_adapter == "default"  # nothing tells
    for changes in ({"hidden_size": 32}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}):
        put_on(**changes)
        with pytest.raises(ValueError, match=r"doesn't fit its base \(.*\): it is damaged, or of another base"):
            load_finetuned(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone"}), "utf-8")
    with pytest.raises(OSError, match="The base model 'gone' can't be loaded"):
        load_finetuned(adapter)


def test_a_link_to_another_disk_stays_one(base, dataset, tmp_path):
    """Twice: the second training moves the first adapter aside."""
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk")
    for rank in (2, 4):
        done = teach(base, dataset, link, epochs=1, rank=rank)
        assert link.is_symlink() and done.folder == tmp_path / "disk"


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_folder_that_cannot_be_written_is_said_before_the_training(base, dataset, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"file/adapter can't be written \(.*\): make it writable, or name another place"):
        teach(base, dataset, tmp_path / "file" / "adapter")


@pytest.mark.usefixtures("nothing_is_loaded")
def test_an_adapter_of_another_base_is_not_replaced(base, dataset, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    (out / "run.json").write_text(json.dumps({"model": "openai/gpt-oss-20b"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"out holds an adapter of openai/gpt-oss-20b: move it, or name another"):
        teach(base, dataset, out)
    assert (out / "run.json").exists()
