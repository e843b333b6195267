"""The base model in four bits: each of its weight matrices in NF4, gpt-oss's experts too, and a count that proves it.

The usual call quantizes `nn.Linear` and nothing else. In gpt-oss nine weights in ten are in the experts, which are
plain tensors, and its checkpoint comes in another four-bit format (MXFP4) that can't be trained through. So its experts
are read one by one, put into 16 bits and from there into NF4: not even a layer is ever in 16 bits as a whole.
"""

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from helpers import settings
from helpers.embeddings import _hub_answers
from helpers.storage import put_back, sha256_of

# Dettmers et al. 2023: 16 levels at the quantiles of a normal distribution, a scale for each 64 weights, and the scales
# themselves in 8 bits ("double quantization"): 4.127 bits a weight.
NF4 = {"quant_type": "nf4", "compress_statistics": True}
BLOCK = 64  # weights with one scale
SCALES = (1.0, 0.95, 0.9, 0.85, 0.8)  # tried for it, as shares of a block's largest weight
TEMPLATE_DATE = date(2026, 1, 1)  # instead of today in chat templates: else ids and losses change from day to day
LEFT_OVER = 0.1  # the share of the weights that should be in 4 bits and may not be


class NotInFourBits(ValueError):
    """A load that was to be in four bits and for a good part isn't."""


def training_dtype(device: str) -> str:
    """Return what a device computes in: 'bfloat16', 'float16' (GPUs before Ampere, such as a T4) or 'float32'."""
    import torch

    if device != "cuda" or not torch.cuda.is_available():
        return "bfloat16" if device == "cuda" else "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def hub_options(base: str | Path) -> dict:
    """Return how to load `base`: from the cache alone where the hub can't be reached, or it is tried for minutes."""
    return {} if Path(base).is_dir() or _hub_answers() else {"local_files_only": True}


def load_config(base: str | Path):
    """Return the configuration of a model: a folder, or a name on the hub. Raises OSError with what to do."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(base), **hub_options(base))
    except (OSError, ValueError) as error:
        raise OSError(
            f"The base model {str(base)!r} can't be loaded: it is no folder with a model in it, and it is not on the "
            "hub or the hub can't be reached. Check the name and the network, or use base='tiny', which needs none."
        ) from error


def load_tokenizer(base: str | Path):
    """Return the tokenizer of a model; a chat template that writes today's date writes the same one every day."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base), **hub_options(base))
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = re.sub(
            r"strftime_now\(\s*([\"'])(.*?)\1\s*\)",
            lambda found: json.dumps(TEMPLATE_DATE.strftime(found[2])),
            tokenizer.chat_template,
        )
    return tokenizer


def marks_of(tokenizer) -> list[str]:
    """Return the marks of a tokenizer that are no text: those that start and end turns, and the like."""
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def is_tiny(base: str | Path) -> bool:
    """Say whether a base is the embedded model, whatever path leads there."""
    return Path(base).resolve() == settings.TINY_GPT_OSS.resolve()


def check_weights(folder: Path) -> str:
    """Compare every file of a folder with its SHA256SUMS; return the hash of the weights. Raises OSError."""
    sums, mend = folder / "SHA256SUMS", f"get it anew with `git checkout -- helpers/{folder.name}`"
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.exists() else []
    listed = [found.groups() for found in map(re.compile(r"([0-9a-f]{64})  (\S+)").fullmatch, lines) if found]
    expected = {name: digest for digest, name in listed}
    if "model.safetensors" not in expected or len(expected) < len(lines):
        raise OSError(f"SHA256SUMS in {folder.name} is missing or damaged: {mend}, or use 'quotes', without weights.")
    for name, digest in expected.items():
        if not (folder / name).exists() or sha256_of(folder / name) != digest:
            raise OSError(
                f"{name} in {folder.name} is damaged or incomplete (its SHA-256 isn't the one in SHA256SUMS): {mend}."
            )
    return expected["model.safetensors"]


def base_digest(model: str | Path) -> str:
    """Return what names a model's weights: the SHA-256 of a folder's files; of a model on the hub its name alone.

    A commit there would tell more, and too much: it changes with each word of a model's card.
    """
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    if not files:
        return str(model)
    files.append(Path(model) / "config.json")
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()


def read_base(base: str | Path, four_bit: bool = True, dtype: str = "", device: str = ""):
    """Return the model `base` with frozen weights; `four_bit` puts its matrices into NF4, double quantization.

    `dtype` is what the rest is in and what is computed in, by default what the device has. Embeddings and the head stay
    in it, as is usual. Raises OSError for a model that can't be had, NotInFourBits by the audit.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel that isn't used here
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Mxfp4Config

    if is_tiny(base):
        check_weights(settings.TINY_GPT_OSS)
    device = device or settings.device()
    compute = getattr(torch, dtype or training_dtype(device))
    config = load_config(base)
    if four_bit and config.model_type == "gpt_oss":
        model = _read_gpt_oss(base, config, compute, device)
    else:
        options = {"dtype": compute, "device_map": {"": device}} | hub_options(base)
        if four_bit:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute,
            )
        elif config.model_type == "gpt_oss" and getattr(config, "quantization_config", None):
            options["quantization_config"] = Mxfp4Config(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(str(base), **options)
    model.requires_grad_(False)
    if four_bit:
        audit(model).check()
        for module in model.modules():
            # On some CPUs an evaluation would repack the weights for a faster kernel in bfloat16, which can't be
            # trained through afterwards and gives other numbers than other machines.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model.eval()


def check_adapter(folder: Path) -> tuple[str, dict]:
    """Return the base of the adapter in `folder` and what its run.json holds, {} without one.

    With one the hashes of the adapter and of a base in a folder are compared. Raises OSError for what is missing or
    damaged, ValueError for another base.
    """
    from peft import PeftConfig

    put_back(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise OSError(f"{folder} holds no adapter ({name} is missing): train one with `python -m helpers train`.")
    try:
        run = dict(json.loads((folder / "run.json").read_text("utf-8"))) if (folder / "run.json").exists() else {}
        base = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
        if not Path(base).is_dir() and Path(base).name == settings.TINY_GPT_OSS.name:  # trained in another copy of it
            base = str(settings.TINY_GPT_OSS)
    except (ValueError, TypeError, KeyError) as error:
        raise OSError(f"The adapter in {folder} is damaged (its JSON can't be read): train it again.") from error
    if run.get("adapter_sha256") not in (None, sha256_of(folder / "adapter_model.safetensors")):
        raise OSError(f"The adapter in {folder} is damaged (its SHA-256 is not the one in run.json): train it again.")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise OSError(
            f"The base of the adapter in {folder} isn't there: put {base} back, or set base_model_name_or_path in its "
            "adapter_config.json."
        )
    if "base_digest" in run and run["base_digest"] != base_digest(base):
        raise ValueError(
            f"The adapter in {folder} is of another base: {base} has other weights than when it was trained. Put them "
            "back, or train it again."
        )
    return base, run


def attach(model, folder: Path):
    """Return the loaded base `model` with the adapter in `folder` on it. Raises ValueError if they don't fit."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            names = set(file.keys())
        model = PeftModel.from_pretrained(model, str(folder)).eval()
        if odd := sorted(names ^ set(get_peft_model_state_dict(model))):  # PEFT leaves these out without a word
            raise ValueError(f"{len(odd)} weights are only in one of them, {odd[0]} first")
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split("\n")[0:2])[:200]
        raise ValueError(
            f"The adapter in {folder} doesn't fit its base ({reason}): it is damaged, or of another base; train it "
            "again, or set base_model_name_or_path in its adapter_config.json to the model it was trained on."
        ) from error
    return model


def _read_gpt_oss(base: str | Path, config, dtype, device: str):
    """Build the model without memory and fill it piece by piece, quantizing on the way."""
    import torch
    from accelerate import init_empty_weights
    from bitsandbytes.nn import Linear4bit, Params4bit
    from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
    from transformers import AutoModelForCausalLM, GenerationConfig

    if hasattr(config, "quantization_config"):
        del config.quantization_config  # MXFP4 ends here
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    checkpoint = _Checkpoint(base)
    for name, shape in [(name, weight.shape) for name, weight in model.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if len(shape) == 3:  # the matrices of all experts of a layer
            experts = (fitted(checkpoint.read(name, shape[1:], dtype, device, expert)) for expert in range(shape[0]))
            packed, state = _packed(experts, shape)
            setattr(module, leaf, torch.nn.Parameter(packed, requires_grad=False))
            replace_parameter_4bit_prequantized(module, leaf, state.as_dict(), device)
            continue
        weight = checkpoint.read(name, shape, dtype, device)
        if leaf == "weight" and owner.endswith("_proj"):
            linear = Linear4bit(*shape[::-1], module.bias is not None, dtype, **NF4, device="meta")
            linear.weight = Params4bit(fitted(weight), module=linear, **NF4).to(device)
            model.set_submodule(owner, linear)
        else:
            setattr(module, leaf, torch.nn.Parameter(weight, requires_grad=False))
    model.tie_weights()
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        # What transformers falls back to on these cards computes a gradient for the frozen experts, in 16 bits.
        model.set_experts_implementation("eager")
    with suppress(OSError):  # a checkpoint need not have one
        model.generation_config = GenerationConfig.from_pretrained(str(base), **hub_options(base))
    model.is_loaded_in_4bit = True  # what PEFT and TRL ask
    return model.to(device)


def fitted(weight):
    """Return `weight` with the largest numbers of each block cut to where NF4 then errs least, in squares.

    bitsandbytes takes a block's largest number as its scale. A smaller scale costs that number, and rounds the other 63
    more finely. The search is that of Choukroun et al. 2019 (OMSE), over the shares in `SCALES`.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    best, least = blocks, torch.full_like(largest, math.inf, dtype=torch.float32)
    for share in SCALES:
        cut = blocks.clamp(-share * largest, share * largest)
        rounded = dequantize_4bit(*quantize_4bit(cut, quant_type=NF4["quant_type"]))
        error = (rounded - blocks).float().square().sum(1, keepdim=True)
        best, least = torch.where(error < least, cut, best), torch.minimum(error, least)
    return best.flatten()[: weight.numel()].view_as(weight)


def _packed(matrices: Iterable, shape):
    """Return matrices one after the other in NF4, and the state to unpack them as one tensor of `shape`.

    The same numbers as bitsandbytes' `replace_parameter_4bit` gives, which needs ten times the tensor on a CPU.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    packed, scales = [], []
    for matrix in matrices:
        numbers, state = quantize_4bit(matrix, quant_type=NF4["quant_type"])
        packed.append(numbers)
        scales.append(state.absmax)
    scales = torch.cat(scales)
    state.offset, state.shape, state.nested = scales.mean(), shape, True
    state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=256)
    return torch.cat(packed), state


class _Checkpoint:
    """The tensors of a checkpoint in safetensors, whole or in shards, read one by one.

    A shard is fetched from the hub when its first tensor is read; one at a time is mapped into memory.
    """

    def __init__(self, base: str | Path):
        from safetensors import safe_open

        self.base, self.options = str(base), hub_options(base)
        self.name, self.shard = "", None
        try:
            index = self._path("model.safetensors.index.json")
            self.shard_of = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        except OSError:  # one file, no index
            with safe_open(self._path("model.safetensors"), "pt") as file:
                self.shard_of = dict.fromkeys(file.keys(), "model.safetensors")

    def _path(self, name: str) -> str:
        from transformers.utils import cached_file

        return cached_file(self.base, name, **self.options)

    def read(self, name: str, shape, dtype, device: str, expert: int | None = None):
        """Return a tensor, or that of one expert in it, of `shape` in `dtype` on `device`; MXFP4 is dequantized.

        Raises OSError if it is missing or not of that shape.
        """
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        if name not in self.shard_of and f"{name}_blocks" in self.shard_of:  # blocks of 32 numbers with a scale each
            blocks, scales = (self._raw(f"{name}_{part}", expert).to(device) for part in ("blocks", "scales"))
            tensor = convert_moe_packed_tensors(blocks, scales, dtype=dtype)[0]
        else:
            tensor = self._raw(name, expert).to(device, dtype, copy=True)  # a copy, or the shard would stay mapped
            tensor = tensor if expert is None else tensor[0]
        if tensor.shape != shape:
            raise self._damaged(f"{name} is {tuple(tensor.shape)} and not {tuple(shape)}")
        return tensor

    def _raw(self, name: str, expert: int | None):
        from safetensors import SafetensorError, safe_open

        try:
            if self.shard_of[name] != self.name:
                self.name = self.shard_of[name]
                self.shard = safe_open(self._path(self.name), "pt")
            if expert is None:
                return self.shard.get_tensor(name)
            return self.shard.get_slice(name)[expert : expert + 1]
        except (KeyError, SafetensorError) as error:
            raise self._damaged(f"{name} can't be read ({error})") from error

    def _damaged(self, what: str) -> OSError:
        return OSError(f"The checkpoint {self.base} is damaged or incomplete: {what}. Delete it and fetch it again.")


@dataclass(frozen=True)
class Audit:
    """What a loaded model holds: bytes by dtype ('nf4' with its scales), and how far its matrices are in four bits.

    `matrices` counts the weights of all matrices but embeddings, head and adapters, `in_four_bits` those in NF4 among
    them; `left` names the largest that aren't, with their counts.
    """

    bytes_by_dtype: dict[str, int]
    matrices: int
    in_four_bits: int
    left: tuple[tuple[str, int], ...]

    @property
    def share(self) -> float:
        """Return the share of the weights that should be in four bits and are."""
        return self.in_four_bits / self.matrices if self.matrices else 1.0

    def check(self) -> None:
        """Raise NotInFourBits if more than a tenth of what should be in four bits isn't."""
        if self.share < 1 - LEFT_OVER:
            raise NotInFourBits(
                f"This 4-bit load left {1 - self.share:.0%} of the weights that should be in 4 bits as they were, most "
                f"in {self.left[0][0]}: bitsandbytes quantizes nn.Linear only. Use a dense model or gpt-oss, or "
                "four_bit=False."
            )

    def __str__(self) -> str:
        held = ", ".join(f"{dtype} {size / 2**20:,.1f} MiB" for dtype, size in self.bytes_by_dtype.items())
        return f"{held}; {self.share:.1%} of {self.matrices / 1e6:,.1f} M matrix weights in 4 bits"


def audit(model) -> Audit:
    """Count the bytes of a model by dtype, and the weights that are in four bits among those that should be."""
    spared = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    size, matrices, in_four_bits, left = Counter(), 0, 0, Counter()
    for owner, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            # bitsandbytes keeps a state with packed weights: on them in a linear layer, else on what unpacks them.
            holder = weight if hasattr(weight, "quant_state") else module[0] if name == "original" else None
            state = getattr(holder, "quant_state", None)
            if state is not None:
                matrices, in_four_bits = matrices + state.shape.numel(), in_four_bits + state.shape.numel()
                scales = [state.absmax, state.code, *([state.state2.absmax, state.state2.code] if state.nested else [])]
                size[state.quant_type] += weight.nbytes + sum(tensor.nbytes for tensor in scales)
                continue
            size[str(weight.dtype).removeprefix("torch.")] += weight.nbytes
            if weight.ndim > 1 and id(weight) not in spared and "lora_" not in owner and "bias" not in name:
                matrices += weight.numel()
                left[f"{owner}.{name}"] += weight.numel()
    return Audit(dict(size), matrices, in_four_bits, tuple(left.most_common(5)))
