#!/usr/bin/env python3
"""Writes a GLA checkpoint of random bfloat16 weights, in the form that flash-linear-attention saves, to measure
a server with: make_random_checkpoint.py gla-340m|gla-1.3b FOLDER. Needs numpy only. The tokenizer is bard-6m's
(its 2,048 ids are the first of the 32,000); load it with token ids, as gla-load does."""

import json
import pathlib
import shutil
import struct
import sys

import numpy as np

SHAPES = {"gla-340m": dict(hidden_size=1024, num_hidden_layers=24, intermediate_size=2816),
          "gla-1.3b": dict(hidden_size=2048, num_hidden_layers=24, intermediate_size=5632)}


def tensors(config):
    d, m, heads, vocab = (config[key] for key in ("hidden_size", "intermediate_size", "num_heads",
                                                  "vocab_size"))
    key, value = d // 2, d
    yield "model.embeddings.weight", (vocab, d)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        yield name + "attn_norm.weight", (d,)
        yield name + "mlp_norm.weight", (d,)
        for part, width in (("q", key), ("k", key), ("v", value), ("g", value)):
            yield f"{name}attn.{part}_proj.weight", (width, d)
        yield name + "attn.gk_proj.0.weight", (16, d)
        yield name + "attn.gk_proj.1.weight", (key, 16)
        yield name + "attn.gk_proj.1.bias", (key,)
        yield name + "attn.g_norm_swish_gate.weight", (value // heads,)
        yield name + "attn.o_proj.weight", (d, value)
        yield name + "mlp.gate_proj.weight", (m, d)
        yield name + "mlp.up_proj.weight", (m, d)
        yield name + "mlp.down_proj.weight", (d, m)
    yield "model.norm.weight", (d,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, d)


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(model_type="gla", num_heads=4, expand_k=0.5, expand_v=1.0, vocab_size=32000,
                  bos_token_id=1, eos_token_id=2, hidden_act="swish",
                  tie_word_embeddings=sys.argv[1] == "gla-340m", **SHAPES[sys.argv[1]])
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    bard = pathlib.Path(__file__).resolve().parents[2] / "deploy/models/bard-6m"
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(bard / file, folder / file)
    header, end = {}, 0
    for name, shape in tensors(config):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(7)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors(config):
            values = np.ones(shape, np.float32) if "norm" in name else \
                0.02 * random.standard_normal(shape, np.float32)
            (values.view(np.uint32) >> 16).astype(np.uint16).tofile(file)
    print(f"{folder}: {sys.argv[1]}, {end / 2e6:.0f} M parameters")


main()
