"""Writes a small random Llama model: real weights, a tokenizer trained on the spot, a chat template. And LoRA adapters.

The same arguments give the same bytes. The weights are scaled so that attention is peaked and the output layer is not
tied to the embedding: what the model says depends on the whole context, and KV with wrong bytes shows in the tokens.
An adapter changes keys and values as much as the model's own weights make them differ: so does its KV.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ATTENTION_GAIN = 1.6
"""Standard deviation of queries and keys; attention scores then spread by its square, about 2.6."""

LOGIT_GAIN = 2.0
"""Standard deviation of the logits: keeps the two best tokens apart by far more than float noise."""

ADAPTER_GAIN = 1.0
"""Standard deviation of what an adapter adds to keys and values: as large as the values themselves."""

ADAPTER_RANK = 8
"""The least that vLLM's `--max-lora-rank` allows, but for 1."""

ADAPTED = ("k_proj", "v_proj")
"""What an adapter changes: whatever else it did would not be seen in the first layer's KV."""

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size of a model. `hidden` must be `heads * head_dim`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    dtype: str
    vocab: int = 1024
    positions: int = 32768

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def processor_has(*flags: str) -> bool:
    """Whether the kernel names any of these abilities of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return any(flag in found for flag in flags)


_DEMO = Shape(layers=8, hidden=512, heads=8, kv_heads=4, intermediate=1536, dtype="bfloat16")

PRESETS = {
    "tiny": Shape(layers=2, hidden=128, heads=4, kv_heads=2, intermediate=256, dtype="float32"),
    "demo": _DEMO,
    "demo-float32": dataclasses.replace(_DEMO, dtype="float32"),
    # 64 KiB of KV per token, half of what models with 8 billion weights have; its weights are made in some ten seconds.
    "gpu": Shape(layers=16, hidden=2048, heads=16, kv_heads=8, intermediate=4096, dtype="bfloat16"),
}

DEMO = "demo" if processor_has("avx512bw", "bf16") else "demo-float32"
"""The larger preset for CPU builds, as this processor computes it best: oneDNN multiplies bfloat16 with AVX-512 (on Arm
with BF16), and what remains without is ten times slower than float32."""

SKELETONS = {
    # Llama 3.1's of 8 billion but for its vocabulary.
    "llama-8b": Shape(layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, dtype="bfloat16"),
}
"""Models without weights: vLLM makes some up (`--load-format dummy`). They cost what it costs and say nothing."""


def words(count: int, seed: int) -> str:
    """Pseudo-English of `count` words, the same on every machine and Python version."""
    rng = random.Random(seed)
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in ("a", "e", "i", "o", "u", "ar", "en", "is", "ot")]
    lexicon = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(2000)]
    return " ".join(rng.choices(lexicon, k=count))


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level BPE tokenizer with exactly `vocab` entries and the chat template."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words(20_000, seed=7)], trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise SystemExit(
            f"the tokenizer has {tokenizer.get_vocab_size()} entries, not {vocab}: choose a smaller --vocab"
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def write_config(folder: Path, shape: Shape) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "max_position_embeddings": shape.positions,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": SPECIAL_TOKENS.index("<s>"),
        "eos_token_id": SPECIAL_TOKENS.index("</s>"),
        "torch_dtype": shape.dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def weights(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """All tensors of the model in float32, keyed by their names in the checkpoint."""
    import numpy as np

    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * (gain / math.sqrt(columns))).astype(np.float32)

    def ones() -> np.ndarray:
        return np.ones(shape.hidden, dtype=np.float32)

    kv_width = shape.kv_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": rng.standard_normal((shape.vocab, shape.hidden)).astype(np.float32)}
    for layer in range(shape.layers):
        name = f"model.layers.{layer}."
        tensors[name + "input_layernorm.weight"] = ones()
        tensors[name + "self_attn.q_proj.weight"] = matrix(shape.hidden, shape.hidden, ATTENTION_GAIN)
        tensors[name + "self_attn.k_proj.weight"] = matrix(kv_width, shape.hidden, ATTENTION_GAIN)
        tensors[name + "self_attn.v_proj.weight"] = matrix(kv_width, shape.hidden, 1.0)
        tensors[name + "self_attn.o_proj.weight"] = matrix(shape.hidden, shape.hidden, 1.0)
        tensors[name + "post_attention_layernorm.weight"] = ones()
        tensors[name + "mlp.gate_proj.weight"] = matrix(shape.intermediate, shape.hidden, 1.0)
        tensors[name + "mlp.up_proj.weight"] = matrix(shape.intermediate, shape.hidden, 1.0)
        tensors[name + "mlp.down_proj.weight"] = matrix(shape.hidden, shape.intermediate, 1.0)
    tensors["model.norm.weight"] = ones()
    tensors["lm_head.weight"] = matrix(shape.vocab, shape.hidden, LOGIT_GAIN)
    return tensors


def write_weights(folder: Path, shape: Shape, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, shape.dtype)
    tensors = {name: torch.from_numpy(value).to(dtype) for name, value in weights(shape, seed).items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def make_skeleton(folder: Path, shape: Shape) -> Path:
    """Writes the model without its weights into `folder`; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, shape)
    write_tokenizer(folder, shape.vocab)
    return folder


def make_model(folder: Path, shape: Shape, seed: int = 1) -> Path:
    """Writes the model into `folder` unless the same one is there already; returns `folder`."""
    stamp = folder / "greenroom-model.json"
    wanted = (
        json.dumps({"shape": dataclasses.asdict(shape), "seed": seed, "format": 1}, indent=1, sort_keys=True) + "\n"
    )
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    write_config(folder, shape)
    write_tokenizer(folder, shape.vocab)
    write_weights(folder, shape, seed)
    stamp.write_text(wanted)
    return folder


def adapter_weights(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """All tensors of an adapter for keys and values, in float32, by the names that PEFT gives them."""
    import numpy as np

    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(shape.layers):
        for projection in ADAPTED:
            name = f"base_model.model.model.layers.{layer}.self_attn.{projection}."
            down = rng.standard_normal((ADAPTER_RANK, shape.hidden)) / math.sqrt(shape.hidden)
            up = rng.standard_normal((shape.kv_heads * shape.head_dim, ADAPTER_RANK)) / math.sqrt(ADAPTER_RANK)
            tensors[name + "lora_A.weight"] = down.astype(np.float32)
            tensors[name + "lora_B.weight"] = (up * ADAPTER_GAIN).astype(np.float32)
    return tensors


def make_adapter(folder: Path, shape: Shape, seed: int) -> Path:
    """Writes a LoRA adapter for a model of this shape, as PEFT saves them; returns `folder`."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": ADAPTER_RANK,
        # The factor that what an adapter adds is multiplied by is alpha / r.
        "lora_alpha": ADAPTER_RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ADAPTED),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    dtype = getattr(torch, shape.dtype)
    tensors = {name: torch.from_numpy(value).to(dtype) for name, value in adapter_weights(shape, seed).items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    return folder


def kv_bytes_per_token(folder: Path) -> int:
    """Bytes of keys and values per token of any model with plain attention, from its config file."""
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    width = 4 if dtype == "float32" else 2
    kv_heads = config.get("num_key_value_heads") or heads
    return int(2 * config["num_hidden_layers"] * kv_heads * head_dim * width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    for size in ("layers", "hidden", "heads", "kv-heads", "intermediate", "vocab"):
        parser.add_argument(f"--{size}", type=int)
    given = vars(parser.parse_args())
    names = {field.name for field in dataclasses.fields(Shape)}
    changed = {name: value for name, value in given.items() if name in names and value is not None}
    shape = dataclasses.replace(PRESETS[given["preset"]], **changed)
    if shape.hidden != shape.heads * shape.head_dim:
        parser.error("--hidden must be a multiple of --heads")
    make_model(given["folder"], shape, given["seed"])
    print(f"{given['folder']}: {shape}, {kv_bytes_per_token(given['folder'])} bytes of KV per token")


if __name__ == "__main__":
    main()
