"""From an adapter to a merged model, a GGUF file and Ollama: every number of the file against its source."""

import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
import torch
import trl
from ollama_stand_in import StandIn
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GptOssForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from helpers import export, four_bit, ollama, settings
from helpers.tiny_gpt_oss.train import model_config

YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": False, "original_max_position_embeddings": 4096,
}  # fmt: skip
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ATTENTION, EXPERTS = ["q_proj", "v_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(settings.TINY_GPT_OSS)


def make_base(folder, tokenizer, dtype=torch.float32, seed=0, layers=2, hidden=64, vocabulary=4096, **changes):
    """Save a small model with random weights, none of them zero, and the embedded model's tokenizer."""
    config = model_config(vocabulary, tokenizer.pad_token_id, tokenizer.eos_token_id)
    config.update({"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 32, "head_dim": 16})
    config.update({"layer_types": ["sliding_attention", "full_attention", "sliding_attention"][:layers]} | changes)
    torch.manual_seed(seed)
    model = GptOssForCausalLM(config)
    for name, weight in model.named_parameters():
        weight.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder, base, experts=False, size=0.2, **config):
    """Save an adapter on a base as PEFT saves it; `size` is how large its second factor is."""
    model = AutoModelForCausalLM.from_pretrained(base, **config)
    parameters = EXPERTS if experts else None
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, target_parameters=parameters, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    torch.manual_seed(7)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, size)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    return make_base(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base):
    return make_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture
def own_adapter(tmp_path, adapter):
    """A copy of the adapter that a test may damage."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def edit(path, **changes):
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def ids(tokenizer):
    return tokenizer("<|start|>user<|message|>¿Cuánto cuesta el billete 12?<|end|>", return_tensors="pt")["input_ids"]


# Merging


@pytest.mark.parametrize("experts", [False, True], ids=["attention", "experts too"])
def test_a_merged_model_answers_as_base_and_adapter_do(tmp_path, base, tokenizer, experts):
    adapter = make_adapter(tmp_path / "adapter", base, experts)
    found = export.merge(adapter, tmp_path / "merged")
    assert found["error"] < 1e-4 < 0.05 < found["effect"] and found["same"] == 1
    both = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.inference_mode():
        difference = both(input_ids=ids(tokenizer)).logits - merged(input_ids=ids(tokenizer)).logits
    assert difference.abs().max() < 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == tokenizer.get_vocab()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged", "merged.lock"}


def test_the_weights_are_the_base_and_the_product_of_the_thin_ones(tmp_path, base, adapter):
    export.merge(adapter, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    thin = load_file(adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        added = (
            2 * thin[f"{stem}.lora_B.weight"] @ thin[f"{stem}.lora_A.weight"] if f"{stem}.lora_A.weight" in thin else 0
        )
        torch.testing.assert_close(after[name], weight + added, atol=1e-6, rtol=1e-6)


def test_sixteen_bits_stay_sixteen_bits(tmp_path, tokenizer):
    base = make_base(tmp_path / "base", tokenizer, torch.bfloat16)
    found = export.merge(make_adapter(tmp_path / "adapter", base), tmp_path / "merged")
    assert {weight.dtype for weight in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert 0 < found["error"] < 0.1 * found["effect"]


def test_a_base_in_mxfp4_is_merged_in_sixteen_bits(tmp_path, tokenizer):
    base = make_base(tmp_path / "base", tokenizer, torch.bfloat16)
    weights, experts = load_file(base / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        count, rows, columns = weights.pop(name).mT.shape
        weights[f"{name}_blocks"] = torch.randint(0, 256, (count, rows, columns // 32, 16), dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(122, 126, (count, rows, columns // 32), dtype=torch.uint8)
        experts[name] = convert_moe_packed_tensors(weights[f"{name}_blocks"], weights[f"{name}_scales"])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    edit(base / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    export.merge(make_adapter(tmp_path / "adapter", base, dtype=torch.bfloat16), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert len(experts) == 4
    for name, weight in experts.items():
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], weight)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "merged"), "quantization_config")
    export.to_gguf(tmp_path / "merged", tmp_path / "model.gguf")


def test_a_wrong_merge_is_found_and_the_older_model_stays(tmp_path, base, adapter, monkeypatch):
    out = tmp_path / "merged"
    export.merge(adapter, out)
    before = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)  # adds nothing
    with pytest.raises(ValueError, match=r"The merged model isn't .* with its adapter: their logits differ by \d\.\d+"):
        export.merge(adapter, out)
    assert (out / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "merged.lock"}


def test_a_newer_merged_model_takes_the_place_of_an_older(tmp_path, base, adapter, tokenizer):
    out = make_base(tmp_path / "merged", tokenizer, seed=3)
    for name in ("left over", export.MARK):
        (out / name).write_text("")
    export.merge(adapter, out)
    assert not (out / "left over").exists()
    heads = [load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (out, base)]
    assert torch.equal(*heads)


def full_disk(self, folder, **_):
    (Path(folder) / "model.safetensors").write_bytes(b"half")
    raise OSError(28, "No space left on device")


def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path, adapter, base, monkeypatch):
    monkeypatch.setattr(GptOssForCausalLM, "save_pretrained", full_disk)
    with pytest.raises(OSError, match=r"merged couldn't be written \(.*No space left on device\): free disk space"):
        export.merge(adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged.lock"]


@pytest.mark.parametrize("what", ["disk", "memory"])
def test_what_has_no_room_is_refused_with_numbers(tmp_path, adapter, monkeypatch, what):
    few = {"disk": (shutil, "disk_usage", "free"), "memory": (psutil, "virtual_memory", "available")}[what]
    real = getattr(few[0], few[1])
    monkeypatch.setattr(few[0], few[1], lambda *arguments: real(*arguments)._replace(**{few[2]: 10_000}))
    with pytest.raises(OSError, match=rf"merged takes 0\.00 GB of {what}, 0\.00 are free: make room first"):
        export.merge(adapter, tmp_path / "merged")


BAD_ADAPTERS = {
    "none": (lambda f, _: (f / "adapter_config.json").unlink(), r"holds no adapter \(adapter_config\.json"),
    "no weights": (lambda f, _: (f / "adapter_model.safetensors").unlink(), r"holds no adapter \(adapter_model\.safet"),
    "damaged settings": (lambda f, _: (f / "adapter_config.json").write_text("{"), r"damaged \(its JSON can't be read"),
    "damaged weights": (
        lambda f, _: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 40), r"doesn't fit its base .*damaged"
    ),
    "no such base": (
        lambda f, _: edit(f / "adapter_config.json", base_model_name_or_path="nowhere/to-be-found"),
        r"'nowhere/to-be-found' can't be loaded",
    ),
    "a base of another width": (
        lambda f, t: edit(f / "adapter_config.json", base_model_name_or_path=str(make_base(f / "b", t, hidden=96))),
        r"doesn't fit its base .*set base_model_name_or_path",
    ),
    "a base with more layers": (
        lambda f, t: edit(f / "adapter_config.json", base_model_name_or_path=str(make_base(f / "b", t, layers=3))),
        r"doesn't fit its base \(4 weights are only in one of them",
    ),
    "other weights in the base": (
        lambda f, _: (f / "run.json").write_text('{"base_digest": "0123"}'), r"has other weights than when"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path, own_adapter, tokenizer, damage, message):
    damage(own_adapter, tokenizer)
    with pytest.raises((OSError, ValueError), match=message):
        export.merge(own_adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_is_never_merged_onto_a_copy_in_four_bits(tmp_path, own_adapter, tokenizer):
    base = make_base(tmp_path / "base", tokenizer)
    edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    edit(own_adapter / "adapter_config.json", base_model_name_or_path=str(base))
    with pytest.raises(ValueError, match=r"is a copy in few bits \(bitsandbytes\).* to the 16-bit model"):
        export.merge(own_adapter, tmp_path / "merged")


def test_no_folder_of_something_else_is_overwritten(tmp_path, base, own_adapter, tokenizer):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("Dear")
    other = make_base(tmp_path / "another model", tokenizer)
    (tmp_path / "link").symlink_to(base, target_is_directory=True)
    for out in (tmp_path / "letters", own_adapter, base, other, tmp_path / "link", base / ".." / base.name):
        before = sorted(path.name for path in out.iterdir())
        with pytest.raises(ValueError, match="holds something else than an older merged model: choose another folder"):
            export.merge(own_adapter, out)
        assert sorted(path.name for path in out.iterdir()) == before
    (base / export.MARK).write_text("")  # a merged model may be a base, which isn't replaced either
    with pytest.raises(ValueError, match="holds something else"):
        export.merge(own_adapter, tmp_path / "link")
    (base / export.MARK).unlink()


@pytest.mark.parametrize("name", ["tiny_gpt_oss", "new"])
def test_nothing_is_merged_into_the_package(adapter, name):
    folder = settings.ROOT / "notebooks" / ".." / "helpers" / name
    with pytest.raises(ValueError, match="is in the package helpers: choose another folder"):
        export.merge(adapter, folder)
    assert not (settings.ROOT / "helpers" / "new").exists()


# The GGUF file


def expected(weights, dtype):
    """Return what a GGUF file of these weights must hold, written down apart from the code under test."""
    plain = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    inner = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "self_attn.sinks": "attn_sinks", "mlp.router": "ffn_gate_inp",
    }  # fmt: skip
    found = {}
    for name, weight in weights.items():
        weight = weight.float().numpy()
        if name in plain:
            found[f"{plain[name]}.weight"] = weight
            continue
        _, _, layer, rest = name.split(".", 3)
        stem, _, kind = rest.rpartition(".")
        if rest.startswith("mlp.experts."):
            kind = "bias" if rest.endswith("_bias") else "weight"
            weight = weight if kind == "bias" else weight.transpose(0, 2, 1)
            if "down_proj" in rest:
                found[f"blk.{layer}.ffn_down_exps.{kind}"] = weight
            else:
                found[f"blk.{layer}.ffn_gate_exps.{kind}"] = weight[:, 0::2]
                found[f"blk.{layer}.ffn_up_exps.{kind}"] = weight[:, 1::2]
        elif rest == "self_attn.sinks":
            found[f"blk.{layer}.attn_sinks.weight"] = weight
        else:
            found[f"blk.{layer}.{inner[stem]}.{kind}"] = weight
    for name, weight in found.items():
        matrix = weight.ndim > 1 and name.endswith(".weight") and not name.endswith("ffn_gate_inp.weight")
        found[name] = weight.astype(dtype if matrix else "float32")
    return found


def check_file(path, folder, dtype):
    """Compare every tensor and key of a file with the model it was written from; return its keys."""
    weights = {}
    for shard in folder.glob("*.safetensors"):
        weights |= load_file(shard)
    reader, wanted = gguf.GGUFReader(path), expected(weights, dtype)
    assert {tensor.name for tensor in reader.tensors} == wanted.keys()
    for tensor in reader.tensors:
        assert tensor.data.dtype == wanted[tensor.name].dtype, tensor.name
        assert np.array_equal(tensor.data, wanted[tensor.name]), tensor.name
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = keys.pop("tokenizer.ggml.tokens")
    known = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens == [*known, *(f"[PAD{n}]" for n in range(len(known), config.vocab_size))]
    special = set(tokenizer.all_special_ids)
    assert keys.pop("tokenizer.ggml.token_type") == [
        (3 if n in special else 1) if n < len(known) else 5 for n in range(config.vocab_size)
    ]
    assert [tuple(pair.split(" ")) for pair in keys.pop("tokenizer.ggml.merges")] == list(map(tuple, model["merges"]))
    assert keys.pop("tokenizer.chat_template") == tokenizer.chat_template
    rope = config.rope_parameters
    wanted = {
        "general.architecture": "gpt-oss",
        "general.name": path.stem,
        "general.file_type": 1 if dtype == "float16" else 0,
        "gpt-oss.block_count": config.num_hidden_layers,
        "gpt-oss.context_length": config.max_position_embeddings,
        "gpt-oss.embedding_length": config.hidden_size,
        "gpt-oss.feed_forward_length": 32,
        "gpt-oss.expert_feed_forward_length": 32,
        "gpt-oss.expert_count": 4,
        "gpt-oss.expert_used_count": 2,
        "gpt-oss.attention.head_count": 4,
        "gpt-oss.attention.head_count_kv": 2,
        "gpt-oss.attention.key_length": 16,
        "gpt-oss.attention.value_length": 16,
        "gpt-oss.attention.sliding_window": 128,
        "gpt-oss.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "gpt-oss.rope.freq_base": rope["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    pre = keys.pop("tokenizer.ggml.pre")
    scaling = {name: keys.pop(name) for name in list(keys) if ".rope.scaling." in name}
    assert keys == wanted
    return pre, scaling


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_tensor_and_key_of_the_file_is_that_of_the_model(tmp_path, base, dtype):
    path = export.to_gguf(base, tmp_path / "deep" / "model.gguf", dtype)
    assert check_file(path, base, dtype) == ("smollm", {})
    assert [found.name for found in path.parent.iterdir()] == ["model.gguf"]


def test_shards_yarn_and_rows_without_a_token(tmp_path, tokenizer):
    """What gpt-oss-20b has and the embedded model hasn't, in 16 bit: and these are written without a loss."""
    base = make_base(tmp_path / "base", tokenizer, torch.bfloat16, vocabulary=4224, rope_parameters=YARN)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "shards", max_shard_size="400KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    _, scaling = check_file(export.to_gguf(tmp_path / "shards", tmp_path / "m.gguf"), tmp_path / "shards", "float16")
    assert scaling == {
        "gpt-oss.rope.scaling.type": "yarn",
        "gpt-oss.rope.scaling.factor": 32.0,
        "gpt-oss.rope.scaling.original_context_length": 4096,
        "gpt-oss.rope.scaling.yarn_beta_fast": 32.0,
        "gpt-oss.rope.scaling.yarn_beta_slow": 1.0,
    }
    exact = load_file(base / "model.safetensors")["lm_head.weight"].float().numpy()
    head = next(tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors if tensor.name == "output.weight")
    assert np.abs(head.data - exact).max() < 1e-7


def test_one_weight_at_a_time_is_in_memory(tmp_path, base, monkeypatch):
    read, alive = four_bit._Checkpoint.read, []

    def watched(self, *arguments):
        assert not [name for name, weight in alive if weight() is not None]
        weight = read(self, *arguments)
        alive.append((arguments[0], weakref.ref(weight)))
        return weight

    monkeypatch.setattr(four_bit._Checkpoint, "read", watched)
    export.to_gguf(base, tmp_path / "model.gguf")
    assert len(alive) > 30


def byte_level(cut):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<|return|>": 3}, [("a", "b")]))
    tokenizer.pre_tokenizer = cut
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|return|>", pad_token="<|return|>")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
ISOLATED = (pre_tokenizers.Split(Regex(O200K), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False))


@pytest.mark.parametrize(
    "cut, name",
    [
        (BYTES, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), "smollm"),
        (pre_tokenizers.Sequence(list(ISOLATED)), "gpt-4o"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTES]), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"), ISOLATED[1]]), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Metaspace(), None),
    ],
    ids=["gpt-2", "digits apart", "gpt-oss", "digits together", "another pattern", "a space before", "words"],
)
def test_how_text_is_cut_is_named_or_refused(tmp_path, base, cut, name):
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    byte_level(cut).save_pretrained(folder)
    if name is None:
        with pytest.raises(ValueError, match=r"tokenizer\.json is no byte-level BPE of 4096 tokens that cuts text as"):
            export.to_gguf(folder, tmp_path / "model.gguf")
        assert not (tmp_path / "model.gguf").exists()
        return
    fields = gguf.GGUFReader(export.to_gguf(folder, tmp_path / "model.gguf")).fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert fields["tokenizer.ggml.tokens"].contents()[:5] == ["a", "b", "ab", "<|return|>", "[PAD4]"]


def lm_head(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(**changes):
    return lambda folder: edit(folder / "config.json", **changes)


BAD_MODELS = {
    "nothing": (lambda f: (f / "config.json").unlink(), r"can't be loaded: it is no folder with a model"),
    "another architecture": (
        change_config(model_type="qwen3", architectures=["Qwen3ForCausalLM"], rope_parameters={"rope_type": "default"}),
        r"is a qwen3, and to_gguf writes gpt-oss alone\..*llama\.cpp/convert_hf_to_gguf\.py \S+ --outfile \S+gguf",
    ),
    "tied embeddings": (change_config(tie_word_embeddings=True), r"can't be as .*config\.json has it in tie_word_emb"),
    "another gate": (change_config(swiglu_limit=5.0), r"has it in swiglu_limit\."),
    "all layers alike": (change_config(layer_types=["full_attention"] * 2), r"has it in layer_types\."),
    "another rope": (
        change_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "in rope_parameters"
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"couldn't be written .*model\.safetensors"),
    "damaged weights": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), r"be written .*make it anew"),
    "a weight is missing": (
        lambda f: lm_head(f, lambda w: w.pop("lm_head.weight")), r"couldn't be written .*lm_head\.weight can't be read"
    ),
    "a weight of another shape": (
        lambda f: lm_head(f, lambda w: w.update({"lm_head.weight": torch.zeros(5, 64)})),
        r"couldn't be written .*damaged or incomplete: lm_head\.weight is \(5, 64\) and not \(4096, 64\)",
    ),
    "too large a number": (
        lambda f: lm_head(f, lambda w: w["lm_head.weight"].fill_(70_000)),
        r"lm_head\.weight in \S+ is more than float16 holds: set dtype='float32'",
    ),
    "no number": (lambda f: lm_head(f, lambda w: w["lm_head.weight"].fill_(float("nan"))), r"or train again\."),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"json is missing or damaged .*make it anew"),
    "a damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), r"json is missing or damaged"),
    "fewer rows than tokens": (change_config(vocab_size=4000), r"no byte-level BPE of 4000 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_model_that_cannot_be_written_is_refused_and_the_older_file_stays(tmp_path, base, damage, message):
    folder, out = Path(shutil.copytree(base, tmp_path / "base")), tmp_path / "model.gguf"
    out.write_text("older")
    damage(folder)
    with pytest.raises((OSError, ValueError), match=message):
        export.to_gguf(folder, out)
    assert out.read_text() == "older"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model.gguf"}


def test_too_large_a_number_fits_float32(tmp_path, base):
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    lm_head(folder, lambda weights: weights["lm_head.weight"].fill_(70_000))
    check_file(export.to_gguf(folder, tmp_path / "model.gguf", "float32"), folder, "float32")
    with pytest.raises(ValueError, match="dtype is 'int8': set it to float16 or float32"):
        export.to_gguf(folder, tmp_path / "model.gguf", "int8")


def test_a_disk_without_room_or_that_fills_up_leaves_no_half_file(tmp_path, base, monkeypatch):
    real = shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: real(place)._replace(free=10_000))
        with pytest.raises(OSError, match=r"model\.gguf takes 0\.00 GB of disk, 0\.00 are free: make room first"):
            export.to_gguf(base, tmp_path / "model.gguf")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(
        OSError, match=r"model\.gguf couldn't be written \(.*No space left on device\): free disk space"
    ):
        export.to_gguf(base, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


# Ollama


def run_go(template, messages):
    """Run the part of Go's template language that Ollama's templates here use: range, if eq, else nothing."""
    body = re.fullmatch(r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*?)", template, re.DOTALL)
    turns = re.findall(r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ \.Content \}\}(.*?)\{\{ end \}\}', body[2], re.DOTALL)
    assert "".join(f'{{{{ if eq .Role "{r}" }}}}{a}{{{{ .Content }}}}{b}{{{{ end }}}}' for r, a, b in turns) == body[2]
    said = "".join(
        before + message["content"] + after
        for message in messages
        for role, before, after in turns
        if role == message["role"]
    )
    return body[1] + said + body[3]


def talk(*roles):
    return [{"role": role, "content": f"{role} {n}\n¿{{x}}?"} for n, role in enumerate(roles)]


@pytest.mark.parametrize("kind", ["embedded", "gpt-oss"])
def test_ollama_gets_the_prompt_that_transformers_writes(tokenizer, kind):
    published = Path(trl.__file__).parent / "chat_templates" / "gptoss.jinja"
    template = tokenizer.chat_template if kind == "embedded" else published.read_text(encoding="utf-8")
    go = export.go_template(template)
    for roles in (
        ["user"],
        ["system", "user"],
        ["user", "assistant", "user"],
        ["system", *["user", "assistant"] * 3, "user"],
    ):
        messages = talk(*roles)
        wanted = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        assert run_go(go, messages) == wanted


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{{ raise_exception('only one turn') }}",
        "{% for m in messages %}{{ '{{' }}{{ m.role }}{{ m.content }}{% endfor %}",
        '{% for m in messages %}{{ \'"""\' }}{{ m.role }}{{ m.content }}{% endfor %}',
    ],
    ids=["numbered", "twice", "refuses", "Go's own braces", "the Modelfile's own quotes"],
)
def test_a_template_that_is_more_than_blocks_is_refused(template):
    with pytest.raises(ValueError, match="isn't one block to a turn: write the Modelfile's TEMPLATE by hand"):
        export.go_template(template)


@pytest.fixture(scope="module")
def file(tmp_path_factory, base):
    return export.to_gguf(base, tmp_path_factory.mktemp("gguf") / "a model.gguf")


def test_the_modelfile_carries_template_and_ends(file):
    assert export.modelfile(file).splitlines() == [
        "REQUIRES 0.30.0",
        f'FROM "{file}"',
        'TEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|start|>system<|message|>{{ .Content }}<|end|>{{ end }}'
        '{{ if eq .Role "user" }}<|start|>user<|message|>{{ .Content }}<|end|>{{ end }}'
        '{{ if eq .Role "assistant" }}<|start|>assistant<|channel|>final<|message|>{{ .Content }}<|end|>{{ end }}'
        '{{ end }}<|start|>assistant<|channel|>final<|message|>"""',
        "PARAMETER num_ctx 2048",
        "PARSER passthrough",
        'PARAMETER stop "<|return|>"',
        'PARAMETER stop "<|end|>"',
        'PARAMETER stop "<|call|>"',
    ]


def test_a_template_that_lets_the_model_think_is_left_to_ollamas_parser(tmp_path, base):
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    shutil.copy(Path(trl.__file__).parent / "chat_templates" / "gptoss.jinja", folder / "chat_template.jinja")
    text = export.modelfile(export.to_gguf(folder, tmp_path / "model.gguf"))
    assert text.count('<|start|>assistant"""\n') == 1
    assert "PARSER" not in text and "stop" not in text


@pytest.mark.parametrize("content", [None, b"", b"GGUF\x03\x00\x00\x00", b"no GGUF at all, and long enough to be read"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"model\.gguf is no gpt-oss with a chat template \(.*: export\.to_gguf makes one"
    ):
        export.to_ollama(tmp_path / "model.gguf", "house-style")


def test_a_file_cut_short_is_refused(tmp_path, file):
    (tmp_path / "model.gguf").write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"model\.gguf is no gpt-oss with a chat template"):
        export.modelfile(tmp_path / "model.gguf")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """An `ollama` that notes what it was called with, and fails if STAND_IN_FAILS says how."""
    path = tmp_path / "bin" / "ollama"
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable} -SE\nimport json, os, sys\n"
        f"note = {{'arguments': sys.argv[1:], 'host': os.environ['OLLAMA_HOST'], 'text': open(sys.argv[4]).read()}}\n"
        f"open({str(tmp_path / 'note.json')!r}, 'w').write(json.dumps(note))\n"
        "if os.environ.get('STAND_IN_FAILS'): sys.exit('gathering\\n' + os.environ['STAND_IN_FAILS'])\n"
    )
    path.chmod(0o755)
    monkeypatch.setattr(ollama, "find_binary", lambda: str(path))
    return tmp_path / "note.json"


def test_a_file_is_given_to_ollama(file, program):
    with StandIn() as server:
        server.models["house-style:latest"] = 1_000
        target = export.to_ollama(file, "house-style", server.url)
    note = json.loads(program.read_text())
    assert target == file.with_suffix(".Modelfile")
    assert note["arguments"] == ["create", "house-style", "-f", str(target)]
    assert note["host"] == server.url
    assert note["text"] == export.modelfile(file)


def test_what_goes_wrong_in_ollama_is_said(file, program, monkeypatch):
    with StandIn() as server:
        with pytest.raises(ollama.ModelMissing, match="house-style"):  # the program said nothing, and nothing is there
            export.to_ollama(file, "house-style", server.url)
        monkeypatch.setenv("STAND_IN_FAILS", "Error: invalid model name")
        with pytest.raises(
            ollama.OllamaError, match=r"create b@d -f .*` failed \(Error: invalid model name\): mend that"
        ):
            export.to_ollama(file, "b@d", server.url)
        monkeypatch.setattr(ollama, "find_binary", lambda: None)
        with pytest.raises(ollama.NotInstalled, match="`ollama create` needs the program"):
            export.to_ollama(file, "house-style", server.url)
    with pytest.raises(ollama.NotInstalled):
        export.to_ollama(file, "house-style", server.url)


# The command that asks llama.cpp itself


def test_the_check_says_that_llama_cpp_is_missing(base, file):
    command = [sys.executable, settings.ROOT / "tests" / "tools" / "check_gguf.py", base, file, "--prompts", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "llama-cpp-python is missing: install it and name its Python with --python" in done.stderr
