"""Faults 1 to 7 of the reliability list: a broken checkpoint ends the server with exit code 2, one line that
names what is wrong, within a second and without taking memory by what the file claims."""

import json
import os
import struct
import subprocess
import time

import pytest

from harness import (BARD, SERVER, bf16, copy_model, edit_config, read_safetensors,
                     write_safetensors)


def start(folder, seconds=1.5):
    """Exit code, stderr lines, peak memory in MiB of a server that is expected to refuse."""
    began = time.monotonic()
    process = subprocess.Popen([str(SERVER), "--model", str(folder), "--host", "127.0.0.1", "--port", "0",
                                "--http-port", "0"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError("the server neither refused nor ended")
    took = time.monotonic() - began
    assert took < seconds, f"refused after {took:.1f} s"
    return process.returncode, errors


def refuses(folder, *fragments):
    code, errors = start(folder)
    assert code == 2, (code, errors)
    lines = [line for line in errors.splitlines() if line.startswith("gla-server:")]
    assert len(lines) == 1, errors
    for fragment in fragments:
        assert fragment in lines[0], (fragment, lines[0])


@pytest.fixture
def folder(tmp_path):
    return copy_model(tmp_path / "model")


def rewrite(folder, change):
    path = folder / "model.safetensors"
    header, data = read_safetensors(path)
    change(header, data)
    write_safetensors(path, header, data)


# 1: the length of the header ------------------------------------------------------------------------

@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 40) + b"{}",
                                     struct.pack("<Q", (100 << 20) + 1) + b"{}" * 100,
                                     struct.pack("<Q", 0), struct.pack("<Q", 1 << 63) + b"{}"],
                         ids=["empty", "7-bytes", "beyond-file", "over-100-MB", "zero", "2^63"])
def test_1_header_length(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refuses(folder, "model.safetensors")


# 2: the header's JSON -------------------------------------------------------------------------------

def json_file(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("text", [
    b"not json", b"[1, 2]", b"{\"a\": }", b" {}", b"{" * 200000, b"{\"a\":" + b"[" * 100000,
    b"{\"a\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},"
    b"\"a\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}",
    b"{" + b",".join(b"\"t%d\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}" % i
                     for i in range(100000)) + b"}",
    b"{\"\xff\xfe\": 1}",
], ids=["text", "array", "syntax", "leading-space", "open-braces", "deep-nesting", "duplicate",
        "100000-entries", "invalid-utf8"])
def test_2_header_json(folder, text):
    (folder / "model.safetensors").write_bytes(json_file(text))
    refuses(folder)


# 3: offsets, shapes, dtypes -------------------------------------------------------------------------

NORM = "model.norm.weight"
Q = "model.layers.0.attn.q_proj.weight"


def set_entry(name, **changes):
    def change(header, _):
        header[name].update(changes)
    return change


def shift(name, begin, end):
    def change(header, _):
        old = header[name]["data_offsets"]
        header[name]["data_offsets"] = [old[0] + begin, old[1] + end]
    return change


@pytest.mark.parametrize("change", [
    shift(NORM, -2, -2), shift(NORM, 2, 2), shift(NORM, 4, -600), shift(NORM, 0, 1 << 40),
    set_entry(Q, shape=[4194305, 4194305, 211106198978564]), set_entry(Q, shape=[-1, 256]),
    set_entry(Q, shape=[128, 255]), set_entry(Q, dtype="F32"), set_entry(Q, dtype="Q4"),
    set_entry(Q, shape="128x256"), set_entry(Q, data_offsets=[0]),
    set_entry(Q, data_offsets=[0.5, 2]), set_entry(Q, data_offsets=[1 << 64, 1 << 65]),
], ids=["overlap", "hole", "begin-after-end", "beyond-file", "overflow", "negative", "length",
        "dtype-length", "unknown-dtype", "shape-type", "one-offset", "fraction", "2^64"])
def test_3_tensor_entries(folder, change):
    rewrite(folder, change)
    refuses(folder, "model.safetensors")


def test_3_bytes_behind_the_last_tensor(folder):
    rewrite(folder, lambda header, data: data.extend(b"\0" * 16))
    refuses(folder, "model.safetensors")


# 4: incomplete checkpoints --------------------------------------------------------------------------

def test_4_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refuses(folder, "expected", "found")


def test_4_missing_file(folder):
    (folder / "model.safetensors").unlink()
    refuses(folder, "model.safetensors")


def split_into_shards(folder):
    header, data = read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [name for name in header if name != "__metadata__"]
    weight_map = {}
    for shard, part in enumerate((names[::2], names[1::2])):
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        entries, bytes_ = {}, bytearray()
        for name in part:
            begin, end = header[name]["data_offsets"]
            entries[name] = {**header[name], "data_offsets": [len(bytes_), len(bytes_) + end - begin]}
            bytes_ += data[begin:end]
            weight_map[name] = file
        write_safetensors(folder / file, entries, bytes_)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_4_missing_shard(folder):
    split_into_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refuses(folder, "model-00002-of-00002.safetensors")


def test_4_shard_outside_the_folder(folder):
    index = split_into_shards(folder)
    content = json.loads(index.read_text())
    content["weight_map"] = {name: "../" + file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    refuses(folder, "..")


# 5: config and tensors disagree ---------------------------------------------------------------------

@pytest.mark.parametrize("changes,fragments", [
    ({"num_hidden_layers": 7}, ["layers.6"]), ({"num_hidden_layers": 5}, ["layers.5"]),
    ({"num_heads": 8}, []), ({"hidden_size": 512}, ["expected", "256"]),
    ({"vocab_size": 2049}, ["2049", "2048"]), ({"expand_k": 1.0}, ["256", "128"]),
    ({"intermediate_size": 512}, ["512", "768"]), ({"num_heads": 3}, ["num_heads"]),
    ({"hidden_size": "256"}, ["hidden_size"]), ({"hidden_size": -1}, ["hidden_size"]),
    ({"hidden_size": 10**12}, ["hidden_size"]), ({"norm_eps": "small"}, ["norm_eps"]),
    ({"model_type": "mamba"}, ["mamba"]), ({"model_type": ...}, ["model_type"]),
    ({"use_gv": True}, ["use_gv"]), ({"attn": {"layers": [1]}}, ["attn"]),
    ({"attnres_block_size": 4}, ["attnres_block_size"]), ({"use_short_conv": True}, ["conv1d"]),
    ({"hidden_act": "gelu"}, ["hidden_act"]), ({"feature_map": "exotic"}, ["exotic"]),
    ({"some_new_option": 1}, ["some_new_option"]), ({"tie_word_embeddings": True}, ["lm_head"]),
    ({"use_output_gate": False}, ["g_"]),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_5_config(folder, changes, fragments):
    edit_config(folder, **changes)
    refuses(folder, *fragments)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{\"model_type\": {}}", "[" * 100000])
def test_5_config_json(folder, text):
    (folder / "config.json").write_text(text)
    refuses(folder, "config.json")


def test_5_missing_tensor(folder):
    def rename(header, _):
        header["model.norm.wieght"] = header.pop(NORM)
    rewrite(folder, rename)
    refuses(folder, NORM)


def test_5_extra_tensor(folder):
    def add(header, data):
        header["model.extra"] = {"dtype": "BF16", "shape": [4],
                                 "data_offsets": [len(data), len(data) + 8]}
        data.extend(b"\0" * 8)
    rewrite(folder, add)
    refuses(folder, "model.extra")


# 6: weights that are no numbers ---------------------------------------------------------------------

@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_6_non_finite_weights(folder, value):
    def poison(header, data):
        begin = header[Q]["data_offsets"][0]
        data[begin + 200:begin + 202] = bf16(value)
    rewrite(folder, poison)
    refuses(folder, Q)


# 7: the tokenizer -----------------------------------------------------------------------------------

def test_7_tokenizer_missing(folder):
    (folder / "tokenizer.model").unlink()
    refuses(folder, "tokenizer")


def test_7_tokenizer_is_garbage(folder):
    (folder / "tokenizer.model").write_bytes(os.urandom(5000))
    refuses(folder, "tokenizer.model")


def test_7_vocabulary_larger_than_the_embedding(folder):
    def shrink(header, data):
        for name in ("model.embeddings.weight", "lm_head.weight"):
            assert header[name]["shape"] == [2048, 256]
        entries, bytes_ = {}, bytearray()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if entry["shape"] == [2048, 256]:
                entry["shape"], end = [2000, 256], begin + 2000 * 512
            entries[name] = {**entry, "data_offsets": [len(bytes_), len(bytes_) + end - begin]}
            bytes_ += data[begin:end]
        header.clear()
        header.update(entries)
        data[:] = bytes_
    rewrite(folder, shrink)
    edit_config(folder, vocab_size=2000)
    refuses(folder, "2048", "2000")


def test_no_such_folder(tmp_path):
    refuses(tmp_path / "nowhere", "nowhere")


def test_the_unbroken_copy_loads_also_in_shards(folder):
    from harness import Server, generate
    with Server() as server:
        want = generate(server, max_new_tokens=8).token_ids
    split_into_shards(folder)
    with Server(model=folder) as server:
        assert generate(server, max_new_tokens=8).token_ids == want
    assert BARD.exists()
