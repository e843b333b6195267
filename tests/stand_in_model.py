"""Models of random weights in the shapes of the real ones, small enough to train in a second."""

import json
from pathlib import Path

from helpers import settings

GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 16, "max_position_embeddings": 256, "vocab_size": 4096, "router_aux_loss_coef": 0.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "vocab_size": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip


def tokenizer():
    """Return the embedded model's tokenizer, chat template and all."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(settings.TINY_GPT_OSS)


def make(folder, shape=GPT_OSS, seed=0, **changes):
    """Write a model of a shape and its tokenizer into `folder`; return the folder as text."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    texts = tokenizer()
    config = AutoConfig.for_model(
        **shape
        | {"pad_token_id": texts.pad_token_id, "eos_token_id": texts.eos_token_id, "bos_token_id": None}
        | changes
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder)
    texts.save_pretrained(folder)
    return str(folder)


def make_mxfp4(folder, shards=3, seed=0, **changes):
    """Write a gpt-oss model as the hub has it: experts in MXFP4, several shards and their index."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**GPT_OSS | changes)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config).named_parameters()}
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in shapes.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = size
            rows = (experts, outer, inner // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*rows, 16), dtype=torch.uint8, generator=random)
            # The scale is a power of two, stored with 127 added.
            tensors[f"{name}_scales"] = torch.randint(119, 123, rows, dtype=torch.uint8, generator=random)
        else:
            tensors[name] = (0.05 * torch.randn(size, generator=random)).to(torch.bfloat16)
    names, index = list(tensors), {}
    for number in range(shards):
        file = f"model-{number:05d}-of-{shards - 1:05d}.safetensors"  # the hub's names count from 0
        part = names[len(names) * number // shards : len(names) * (number + 1) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    whole = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole), encoding="utf-8")
    quantized = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    described = config.to_dict() | {"architectures": ["GptOssForCausalLM"], "quantization_config": quantized}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return str(folder)


def write_rows(folder: Path, rows: list[dict]) -> Path:
    """Write a training set into a folder; return its file."""
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
