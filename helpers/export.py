"""From an adapter to a model that other programs run: `merge` adds it to its 16-bit base, `to_gguf` writes what
llama.cpp reads, `to_ollama` hands that to Ollama. What was there before stays until the new is whole.
"""

import gc
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

from helpers import ollama, settings
from helpers.finetuning import _quiet
from helpers.four_bit import _Checkpoint, attach, check_adapter, load_config, load_tokenizer, read_base
from helpers.generation import rag_messages
from helpers.llms import ENDS, FINAL
from helpers.storage import holds_other, locked, put_in_place, sha256_of

PROBES = (  # question, place, passage: the prompts on which a merged model is compared
    ("Who signs the lease?", "lease.pdf, p. 2", "The lease is signed by the tenant and by the owner."),
    ("¿Cuánto cuesta el billete?", "tarifas_2025.pdf, p. 7", "Un billete cuesta 12,40 € desde el 1 de enero."),
)
# How far logits may be apart (root mean square) as 16 bits round: shares of what the adapter changes and of the spread.
OF_EFFECT, OF_SPREAD = 0.2, 0.02
# What llama.cpp's graph of gpt-oss has built in, and the keys of a file with our configuration's names for them.
BUILT_IN = {"tie_word_embeddings": False, "attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
KEYS = """block_count=num_hidden_layers context_length=max_position_embeddings embedding_length=hidden_size
    feed_forward_length=intermediate_size expert_feed_forward_length=intermediate_size expert_count=num_local_experts
    expert_used_count=num_experts_per_tok attention.head_count=num_attention_heads
    attention.head_count_kv=num_key_value_heads attention.key_length=head_dim attention.value_length=head_dim
    attention.sliding_window=sliding_window rope.scaling.original_context_length=original_max_position_embeddings"""
FLOATS = """attention.layer_norm_rms_epsilon=rms_norm_eps rope.freq_base=rope_theta rope.scaling.factor=factor
    rope.scaling.yarn_beta_fast=beta_fast rope.scaling.yarn_beta_slow=beta_slow"""
TEXTS = "rope.scaling.type=rope_type"
# How tokenizers cut text before their merges, and llama.cpp's names for that. 'gpt-2' is not near enough where digits
# stand apart: it leaves a number the space before it.
WAYS = {"ByteLevel True": "gpt-2", "Digits True ByteLevel True": "smollm", "Split True ByteLevel False": "gpt-4o"}
O200K = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"  # gpt-oss's own
AGAIN = "make it anew with export.merge"
MARK = "merged.json"  # in a folder that `merge` wrote: no other is replaced


def merge(folder: str | Path, out: str | Path) -> dict[str, float]:
    """Add the adapter in `folder` to its 16-bit base, on the CPU, and write the model to the folder `out`.

    The base is read as it was published, never as the 4-bit copy that was trained on: rounding to four bits would
    swallow the adapter. Returns, of the logits on `PROBES` and as root mean squares, 'error', how far the written model
    is from base and adapter, and 'effect', how far these are from the base alone; and 'same', the share of positions
    with the same likeliest token. Raises OSError or ValueError with what to do; `out` is then as it was.
    """
    import torch
    from safetensors import SafetensorError
    from torch.nn.functional import mse_loss
    from transformers import AutoModelForCausalLM

    folder, out = Path(folder).resolve(), Path(out).resolve()
    base, dtype, wide = _base(folder, out)
    own = out.is_relative_to(Path(__file__).resolve().parent)
    if own or out == Path(base).resolve() or holds_other(out, MARK):
        why = "is in the package helpers" if own else "holds something else than an older merged model"
        raise ValueError(f"{out} {why}: choose another folder.")
    with _quiet(), locked(out):
        model = attach(read_base(base, False, wide, "cpu"), folder)
        tokenizer = load_tokenizer(folder if (folder / "tokenizer.json").exists() else base)
        adapted = _logits(model, tokenizer)
        with model.disable_adapter():
            effect = float(mse_loss(_logits(model, tokenizer), adapted).sqrt())
        try:
            with put_in_place(out) as new:
                model = model.merge_and_unload().to(getattr(torch, dtype))
                own = model.config.model_type != "gpt_oss"  # else weights that were MXFP4 would get its names again
                model.save_pretrained(new, max_shard_size="4GB", save_original_format=own)
                tokenizer.save_pretrained(new)
                made_of = {"base": base, "adapter_sha256": sha256_of(folder / "adapter_model.safetensors")}
                (new / MARK).write_text(json.dumps(made_of), encoding="utf-8")
                del model
                gc.collect()
                found = _logits(AutoModelForCausalLM.from_pretrained(new, dtype=wide), tokenizer)
                apart = float(mse_loss(found, adapted).sqrt())
                if not apart <= OF_EFFECT * effect + OF_SPREAD * float(adapted.std()):  # nor where one is no number
                    raise ValueError(
                        f"The merged model isn't {base} with its adapter: their logits differ by {apart:.3g}, and the "
                        f"adapter changes them by {effect:.3g}. Nothing was written: train again, or update peft."
                    )
        except (OSError, SafetensorError) as error:
            raise OSError(f"{out} couldn't be written ({error}): free disk space or move it.") from error
    return {"error": apart, "effect": effect, "same": float((found.argmax(-1) == adapted.argmax(-1)).float().mean())}


def _base(folder: Path, out: Path) -> tuple[str, str, str]:
    """Return an adapter's base, the dtype of its weights and the one to add in: float32 where memory has the room."""
    import psutil

    base, _ = check_adapter(folder)
    config = load_config(base)
    quantized = (getattr(config, "quantization_config", None) or {}).get("quant_method", "mxfp4")
    if quantized != "mxfp4":  # in which gpt-oss is published
        raise ValueError(
            f"{base} is a copy in few bits ({quantized}), whose rounding would swallow the adapter: set "
            f"base_model_name_or_path in {folder / 'adapter_config.json'} to the 16-bit model that it was made of."
        )
    dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
    needed = (4 if dtype == "float32" else 2) * sum(map(prod, _shapes(config).values()))
    free = psutil.virtual_memory().available
    _check_room(out, needed, "memory", free)
    _check_room(out, needed)
    return base, dtype, "float32" if free > 4 * needed else dtype


def _check_room(out: Path, needed: int, what: str = "disk", free: int | None = None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free if free is None else free
    if free < 1.05 * needed:
        raise OSError(f"{out} takes {needed / 1e9:.2f} GB of {what}, {free / 1e9:.2f} are free: make room first.")


def _shapes(config) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an architecture's weights by name."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return {name: tuple(w.shape) for name, w in AutoModelForCausalLM.from_config(config).state_dict().items()}


def _logits(model, tokenizer):
    """Return the logits at every position of the probes, (positions, vocabulary), in float32."""
    import torch

    found = []
    for question, *passage in PROBES:
        messages = rag_messages(question, [passage])
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            found.append(model.eval()(input_ids=ids).logits[0].float())
    return torch.cat(found)


def to_gguf(merged: str | Path, out: str | Path, dtype: str = "float16") -> Path:
    """Write the gpt-oss model in the folder `merged` as the GGUF file `out`, with its tokenizer and chat template.

    One weight at a time is in memory. Matrices become `dtype`, float16 or float32; norms, biases, sinks and routers
    float32. Raises OSError or ValueError with what to do; for another architecture, the command that converts it.
    """
    import gguf
    import numpy as np
    import torch
    from safetensors import SafetensorError

    merged, out = Path(merged).absolute(), Path(out).absolute()
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype is {dtype!r}: set it to float16 or float32.")
    config = _gpt_oss_config(merged, out)
    writer, new, parts = gguf.GGUFWriter(None, "gpt-oss"), out.with_name(out.name + ".new"), []
    writer.add_name(out.stem)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == "float16" else gguf.LlamaFileType.ALL_F32)
    values = config.to_dict() | config.rope_parameters
    for keys, add in ((KEYS, writer.add_uint32), (FLOATS, writer.add_float32), (TEXTS, writer.add_string)):
        for key, ours in (pair.split("=") for pair in keys.split()):
            if values.get(ours) not in (None, "default"):
                add(f"gpt-oss.{key}", values[ours])
    _write_tokenizer(writer, merged, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, config.num_hidden_layers)
    for name, shape in _shapes(config).items():
        for target, change in _parts(name, names):
            made = change(np.broadcast_to(np.float16(0), shape)).shape
            matrix = target.endswith(".weight") and len(made) > 1 and "ffn_gate_inp" not in target
            kind = np.dtype(dtype if matrix else "float32")
            writer.add_tensor_info(target, made, kind, prod(made) * kind.itemsize)
            parts.append((name, shape, change, kind))
    _check_room(out, sum(weight.nbytes for weight in writer.tensors[0].values()))
    try:
        checkpoint = _Checkpoint(merged)
        writer.write_header_to_file(new)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape, change, kind in parts:
            weight = change(checkpoint.read(name, shape, torch.float32, "cpu").numpy())
            with np.errstate(over="ignore"):
                weight = np.ascontiguousarray(weight, dtype=kind)
            if not np.isfinite(weight).all():
                raise ValueError(f"{name} in {merged} is more than {kind} holds: set dtype='float32', or train again.")
            writer.write_tensor_data(weight)
        writer.close()
        new.replace(out)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{out} couldn't be written ({error}): free disk space; a damaged {merged}, {AGAIN}.") from error
    finally:
        writer.close()
        new.unlink(missing_ok=True)
    return out


def _gpt_oss_config(merged: Path, out: Path):
    config = load_config(merged)
    if config.model_type != "gpt_oss":
        raise ValueError(
            f"{merged} is a {config.model_type}, and to_gguf writes gpt-oss alone. llama.cpp converts it: `git clone "
            "https://github.com/ggml-org/llama.cpp && pip install -r llama.cpp/requirements.txt && python "
            f"llama.cpp/convert_hf_to_gguf.py {merged} --outfile {out} --outtype f16`."
        )
    wanted = BUILT_IN | {"layer_types": (["sliding_attention", "full_attention"] * 99)[: config.num_hidden_layers]}
    odd = [name for name, value in wanted.items() if getattr(config, name, None) != value]
    odd += ["rope_parameters"] if config.rope_parameters["rope_type"] not in ("default", "yarn") else []
    if odd:
        raise ValueError(f"llama.cpp's gpt-oss can't be as {merged / 'config.json'} has it in {', '.join(odd)}.")
    return config


def _parts(name: str, names) -> list[tuple[str, Callable]]:
    """Return what becomes of a weight: its names in the file, and how each is made of it."""
    # Experts are (experts, in, out) here, with gate and up in turn along `out`, and (experts, out, in) there, apart.
    kind = "bias" if name.endswith("bias") else "weight"
    stem, turned = name.removesuffix(kind).rstrip("._"), ".experts." in name and kind == "weight"

    def change(weight, first: int = 0, step: int = 1):
        weight = weight[..., first::step]
        return weight.swapaxes(-1, -2) if turned else weight

    if not stem.endswith("gate_up_proj"):
        return [(f"{names.get_name(stem)}.{kind}", change)]
    apart = [names.get_name(stem.replace("gate_up", part)) for part in ("gate", "up")]
    return [(f"{target}.{kind}", partial(change, first=first, step=2)) for first, target in enumerate(apart)]


def _write_tokenizer(writer, merged: Path, rows: int) -> None:
    """Write a byte-level BPE tokenizer, with a token for each of the `rows` of the embeddings, and its template."""
    import gguf

    path, kinds = merged / "tokenizer.json", gguf.TokenType
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        added = {token["id"]: token for token in parts["added_tokens"]}
        tokens = {number: text for text, number in parts["model"]["vocab"].items()}
        tokens |= {number: token["content"] for number, token in added.items()}
        steps = parts["pre_tokenizer"].get("pretokenizers", [parts["pre_tokenizer"]])
        regexes = (step.get("use_regex", O200K in step.get("pattern", {}).get("Regex", "")) for step in steps)
        way = " ".join(f"{s['type']} {s.get('individual_digits', r)}" for s, r in zip(steps, regexes, strict=True))
        plain = parts["model"]["type"] == "BPE" and not parts["normalizer"] and not steps[-1].get("add_prefix_space")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{path} is missing or damaged ({error!r}): {AGAIN}.") from error
    if way not in WAYS or not plain or max(tokens) >= rows:
        raise ValueError(f"{path} is no byte-level BPE of {rows} tokens that cuts text as GPT-2, SmolLM or gpt-oss do.")
    types = [kinds.NORMAL if number in tokens else kinds.UNUSED for number in range(rows)]
    for number, token in added.items():
        types[number] = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(WAYS[way])
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types(types)
    writer.add_add_bos_token(False)  # the chat template writes all that a prompt has
    gguf.SpecialVocab(merged, load_merges=True, n_vocab=rows).add_to_gguf(writer, quiet=True)


def to_ollama(path: str | Path, name: str, host: str | None = None) -> Path:
    """Give a GGUF file to Ollama as the model `name`; return its Modelfile, written beside it. Raises OllamaError."""
    path = Path(path).absolute()
    target, text = path.with_suffix(".Modelfile"), modelfile(path)
    server, binary = ollama.Ollama(host), ollama.find_binary()
    server.start()
    if binary is None:
        raise ollama.NotInstalled("`ollama create` needs the program: install it from https://ollama.com/download.")
    target.write_text(text, encoding="utf-8")
    command = [binary, "create", name, "-f", str(target)]
    done = subprocess.run(command, env=os.environ | {"OLLAMA_HOST": server.url}, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2]
        raise ollama.OllamaError(f"`{' '.join(command)}` failed ({said}): mend that, or update Ollama.")
    server.require(name)
    return target


def modelfile(path: str | Path) -> str:
    """Return the Modelfile of a GGUF file: its chat template in Ollama's language, and what ends an answer.

    Where the template opens the final channel itself, Ollama must not look for the opening in the answer: it passes on
    what comes. Before 0.30 it cut every gpt-oss's text in one way, whatever the file said. Raises ValueError.
    """
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
        template, tokens = (fields[f"tokenizer.{key}"].contents() for key in ("chat_template", "ggml.tokens"))
        context = min(fields["gpt-oss.context_length"].contents(), settings.OLLAMA_CONTEXT)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is no gpt-oss with a chat template ({error}): export.to_gguf makes one.") from error
    text = go_template(template)
    lines = ["REQUIRES 0.30.0", f'FROM "{path}"', f'TEMPLATE """{text}"""', f"PARAMETER num_ctx {context}"]
    if text.endswith(FINAL):
        lines += ["PARSER passthrough", *(f'PARAMETER stop "{end}"' for end in ENDS if end in tokens)]
    return "\n".join(lines) + "\n"


def go_template(template: str) -> str:
    """Return a Jinja chat template in Ollama's language. Raises ValueError if more than a turn's role shapes it."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    def around(*roles: str, ask: bool = False) -> list[str]:
        talk = [{"role": role, "content": "\u2402"} for role in roles]
        return render_jinja_template([talk], chat_template=template, add_generation_prompt=ask)[0][0].split("\u2402")

    try:
        first, between, last = around("user", "user")
        _, before, after, _ = around("user", "assistant", "user")
        start, middle, _ = around("system", "user")
        user, head = between.removeprefix(last), first.removesuffix(between.removeprefix(last))
        turns = {  # what stands before and after what is said
            "system": (start.removeprefix(head), middle.removesuffix(user)), "user": (user, last),
            "assistant": (before.removeprefix(last), after.removesuffix(user)),
        }  # fmt: skip
        tail, roles = around("user", ask=True)[1].removeprefix(last), ("system", "user", "assistant", "user")
        made = head + "".join("\u2402".join(turns[role]) for role in roles) + tail
        plain = made.split("\u2402") == around(*roles, ask=True) and not re.search(r'\{\{|"""', made)
    except (TemplateError, ValueError):
        plain = False
    if not plain:
        raise ValueError("The chat template isn't one block to a turn: write the Modelfile's TEMPLATE by hand.")
    each = (f'{{{{ if eq .Role "{role}" }}}}{a}{{{{ .Content }}}}{b}{{{{ end }}}}' for role, (a, b) in turns.items())
    return f"{head}{{{{ range .Messages }}}}{''.join(each)}{{{{ end }}}}{tail}"
