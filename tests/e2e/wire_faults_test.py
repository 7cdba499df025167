"""Faults 13 and 14: what no gRPC client would send. The process lives and its memory stays flat."""

import os
import socket
import subprocess

import grpc
import pytest

from harness import generate, pb, refused, request, wait_for

PATH = "/gla.v1.InferenceService/Generate"


def curl(server, body, *headers, path=PATH, version="--http2-prior-knowledge"):
    """Headers and trailers of a raw POST."""
    command = ["curl", "-sS", version, "-D", "-", "-o", "/dev/null", "-m", "5", "-X", "POST",
               "-H", "te: trailers"]
    for header in headers or ("content-type: application/grpc",):
        command += ["-H", header]
    command += ["--data-binary", "@-", f"http://{server.target}{path}"]
    result = subprocess.run(command, input=body, capture_output=True)
    return result.returncode, result.stdout.decode(errors="replace").lower()


def frame(message, compressed=0, length=None):
    return bytes([compressed]) + (len(message) if length is None else length).to_bytes(4, "big") + message


GOOD = request(max_new_tokens=2).SerializeToString()


def test_13_a_good_frame_by_hand_is_answered(server):
    assert "grpc-status: 0" in curl(server, frame(GOOD))[1]


@pytest.mark.parametrize("body", [
    frame(b"\xff\xff\xff\xff"), frame(GOOD[:-3]), frame(b"\x0a\xff\xff\xff\xff\x0f"),
    frame(GOOD, length=len(GOOD) + 50), frame(GOOD, compressed=7), b"", b"\0", os.urandom(300),
], ids=["garbage", "cut-message", "huge-field", "cut-frame", "bad-flag", "nothing", "one-byte",
        "random"])
def test_13_malformed_frames(server, body):
    code, text = curl(server, body)
    assert code != 0 or "grpc-status: 0" not in text
    assert server.alive()
    assert len(generate(server, max_new_tokens=2).token_ids) == 2


def test_13_what_grpc_itself_lets_through(server):
    """gRPC 1.51 takes a frame that is marked compressed without naming a codec, and any content type, as if
    they were in order; the message is checked as every other."""
    curl(server, frame(GOOD, compressed=1))
    curl(server, frame(GOOD), "content-type: text/plain")
    assert len(generate(server, max_new_tokens=2).token_ids) == 2


def test_13_other_protocols(server):
    assert "grpc-status: 0" not in curl(server, GOOD, version="--http1.1")[1]
    host, port = server.target.split(":")
    for content in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(1000), b"\x16\x03\x01" + b"x" * 200):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(content)
            connection.settimeout(.3)
            try:
                connection.recv(1 << 16)
            except OSError:
                pass
    assert len(generate(server, max_new_tokens=2).token_ids) == 2


def test_14_message_over_the_limit(server):
    message = request([5] * 5_000_000)
    error = refused(lambda: server.inference.Generate(message))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(generate(server, max_new_tokens=2).token_ids) == 2


def test_14_metadata_over_the_limit(server):
    error = refused(lambda: server.inference.Generate(
        request(max_new_tokens=2), metadata=[("x-big", "v" * 100_000)]))
    assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE,
                            grpc.StatusCode.INTERNAL)
    many = [(f"x-{i}", "v") for i in range(10_000)]
    refused(lambda: server.inference.GetModelInfo(pb.GetModelInfoRequest(), metadata=many))
    assert server.alive()

    def serves_again():  # the connection of the offence may end first
        try:
            return len(generate(server, max_new_tokens=2).token_ids) == 2
        except grpc.RpcError:
            return False
    wait_for(serves_again, 10, "answer")


def test_13_memory_stays_flat_under_garbage(server):
    host, port = server.target.split(":")

    def flood(count):
        for _ in range(count):
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(500))
    flood(200)
    before = server.rss_kib()
    flood(400)
    generate(server, max_new_tokens=2)
    assert server.rss_kib() - before < 8 * 1024
