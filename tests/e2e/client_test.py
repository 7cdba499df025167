"""The command line client: output, JSON, exit codes, interruption; and the load generator."""

import json
import os
import pty
import signal
import subprocess
import time

import pytest

from harness import BIN, CLIENT


def gla(server, *arguments, code=0, stdin=None, binary=CLIENT):
    result = subprocess.run([str(binary), *map(str, arguments), "--target", server.target],
                            capture_output=True, text=True, timeout=120, input=stdin)
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    return result


def gla_json(server, *arguments, **fields):
    return json.loads(gla(server, *arguments, "--json", **fields).stdout.splitlines()[-1])


def test_generate(server):
    plain = gla(server, "generate", "--prompt", "In the beginning God", "--max-new-tokens", 16,
                "--temperature", 0)
    assert "LENGTH" in plain.stderr and "tokens/s" in plain.stderr
    assert "\033" not in plain.stdout + plain.stderr  # no colours but on a terminal
    answer = gla_json(server, "generate", "--prompt", "In the beginning God", "--max-new-tokens", 16,
                      "--temperature", 0)
    assert plain.stdout.strip("\n") == answer["text"].strip("\n")
    assert len(answer["token_ids"]) == 16
    assert answer["usage"]["tokens_generated"] == 16
    assert gla_json(server, "generate", "--prompt-file", "-", "--max-new-tokens", 16,
                    "--temperature", 0, stdin="In the beginning God")["text"] == answer["text"]
    sampled = [gla_json(server, "generate", "--prompt", "ROMEO:", "--seed", seed)["token_ids"]
               for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    for largest in (2**63, 2**64 - 1):  # every seed that the server may draw can be asked for again
        answer = gla_json(server, "generate", "--prompt", "ROMEO:", "--seed", largest)
        assert answer["seed"] == largest
    stopped = gla_json(server, "generate", "--prompt", "In the beginning God", "--temperature", 0,
                       "--stop", "Israel", "--logprobs", 2)
    assert stopped["finish_reason"] == "STOP_SEQUENCE" and "Israel" not in stopped["text"]
    assert len(stopped["logprobs"][0]["top"]) == 2


def test_sessions_info_health_tokenize_score(server):
    assert gla_json(server, "sessions", "create", "cli")["position"] == 0
    turn = gla_json(server, "generate", "--session", "cli", "--prompt-ids", "1,2,3",
                    "--max-new-tokens", 2, "--ignore-eos")
    assert turn["session_position"] == 5
    assert gla_json(server, "sessions", "get", "cli")["position"] == 5
    assert "cli" in [one["session_id"] for one in gla_json(server, "sessions", "list")["sessions"]]
    gla(server, "sessions", "delete", "cli")
    gla(server, "sessions", "get", "cli", code=4)
    info = gla_json(server, "info")
    assert info["model"] == "bard-6m" and info["parameters"] == 6201728
    assert info["state_bytes_per_session"] == 6 * 4 * 32 * 64 * 4
    assert gla(server, "health").stdout == "SERVING\n"
    assert gla_json(server, "tokenize", "First Citizen:\nBefore we proceed")["token_ids"] == [
        1, 1091, 1968, 2009, 13, 2021, 1983, 437, 415, 562, 1758]
    assert gla_json(server, "tokenize", "--ids", "1,796,261")["text"] == "In the"
    score = gla_json(server, "score", "--ids", "1,796,261,815")
    assert len(score["logprobs"]) == 3 and all(value < 0 for value in score["logprobs"])


def test_chat(server):
    result = gla(server, "chat", "--max-new-tokens", 8, "--temperature", 0,
                 stdin="Who art thou?\nAnd now?\n")
    assert result.stderr.count("LENGTH") + result.stderr.count("EOS") == 2
    assert "2" not in result.stderr.split("[")[0]


@pytest.mark.parametrize("arguments,code", [
    (["generate"], 2), (["generate", "--prompt", "a", "--prompt-ids", "1"], 2),
    (["generate", "--prompt-ids", "1,x"], 2), (["generate", "--prompt-file", "/no/such"], 2),
    (["generate", "--prompt", "a", "--max-new-tokens", "0"], 4),
    (["generate", "--prompt", "a", "--session", "nobody"], 4),
    (["generate", "--prompt", "a", "--max-new-tokens", "8000", "--ignore-eos", "--timeout", "0.1"], 5),
    (["generate", "--prompt", "a", "--max-new-tokens", str(2**32 + 1)], 2),
    (["generate", "--prompt", "a", "--seed", "-1"], 2), (["generate", "--prompt-ids", str(2**32)], 2),
    (["chat", "--timeout", "1"], 2), (["score", "--ids", "1"], 4), (["sessions", "rename", "x"], 2), (["frobnicate"], 2),
])
def test_exit_codes(server, arguments, code):
    result = gla(server, *arguments, code=code)
    assert result.stderr


def test_unreachable():
    result = subprocess.run([str(CLIENT), "health", "--target", "127.0.0.1:9"], capture_output=True)
    assert result.returncode == 3


def test_ctrl_c_cancels_the_request(server):
    cancelled = server.metric("gla_finished_total", reason="cancelled")
    client = subprocess.Popen([str(CLIENT), "generate", "--prompt", "In", "--max-new-tokens", "8000",
                               "--ignore-eos", "--target", server.target], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
    client.stdout.read(20)
    client.send_signal(signal.SIGINT)
    assert client.wait(5) == 130
    server.wait_idle(3)
    assert server.metric("gla_finished_total", reason="cancelled") == cancelled + 1


def test_a_terminal_gets_colour_and_a_progress_bar(server):
    main, terminal = pty.openpty()
    client = subprocess.Popen([str(CLIENT), "generate", "--prompt-file", "-", "--max-new-tokens", "2",
                               "--target", server.target], stdin=subprocess.PIPE,
                              stdout=subprocess.DEVNULL, stderr=terminal,
                              env={**os.environ, "NO_COLOR": ""})
    client.stdin.write(b"And it came to pass in those days. " * 2500)
    client.stdin.close()
    os.close(terminal)
    seen = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:
            break
        if not part:
            break
        seen += part
    assert client.wait(60) == 0
    assert b"\033[2m" in seen and b"tokens/s" in seen
    assert b"prompt [" in seen and b"left" in seen


def test_load_generator(server):
    load = gla_json(server, "--users", 4, "--requests", 12, "--prompt-tokens", 5, "--new-tokens", 8,
                    binary=BIN / "gla-load")
    assert load["requests_ok"] == 12 and load["generated_tokens"] == 96
    assert load["time_to_first_token_seconds"]["p99"] >= load["time_to_first_token_seconds"]["p50"] > 0
    began = time.monotonic()
    load = gla_json(server, "--users", 8, "--rate", 30, "--duration", 1, "--turns", 2,
                    "--new-tokens", 4, binary=BIN / "gla-load")
    assert time.monotonic() - began < 10
    assert load["requests_failed"] == 0 and load["codes"]["OK"] % 2 == 0
    text = gla(server, "--users", 2, "--requests", 4, "--new-tokens", 4, binary=BIN / "gla-load").stdout
    assert "time to first token" in text and "tokens/s" in text
    gla(server, "--users", 0, code=2, binary=BIN / "gla-load")


def test_load_ramp_spreads_the_users(server):
    load = subprocess.Popen([str(BIN / "gla-load"), "--users", "3", "--ramp", "1.5", "--duration", "2",
                             "--new-tokens", "400", "--json", "--target", server.target],
                            stdout=subprocess.PIPE, text=True)
    seen = {}  # when so many requests were first seen running
    while load.poll() is None:
        seen.setdefault(server.metric("gla_requests_running"), time.monotonic())
    report = json.loads(load.stdout.read())
    assert report["requests_failed"] == 0 and report["ramp_seconds"] == 1.5
    assert seen[2] - seen[1] > 0.25 and seen[3] - seen[2] > 0.25, seen  # begun 0.5 s after each other


def test_load_warmup_is_not_counted(server):
    generated = server.metric("gla_generated_tokens_total")
    load = gla_json(server, "--users", 2, "--duration", 1.2, "--warmup", 0.8, "--new-tokens", 4,
                    binary=BIN / "gla-load")
    sent = load["codes"]["OK"]
    assert server.metric("gla_generated_tokens_total") - generated == 4 * sent  # carried out
    assert 0 < load["requests_ok"] < sent and 0 < load["generated_tokens"] < 4 * sent
    assert load["seconds"] == pytest.approx(0.4)
    assert load["tokens_per_second"] == pytest.approx(load["generated_tokens"] / 0.4)
    # A first request, in the warm-up, that is longer than what is counted: tokens, but no latencies.
    load = gla_json(server, "--users", 1, "--requests", 1, "--duration", 0.2, "--warmup", 0.05,
                    "--new-tokens", 8000, "--prompt-tokens", 1, binary=BIN / "gla-load")
    assert load["generated_tokens"] > 0 and load["codes"] == {"OK": 1}
    assert load["time_to_first_token_seconds"]["max"] == load["request_seconds"]["max"] == 0


@pytest.mark.parametrize("flags,message", [
    (["--ramp", "-1"], "--ramp: expected 0 or more seconds, got -1"),
    (["--ramp", "1", "--rate", "5"], "--ramp: expected a closed loop"),
    (["--ramp", "3", "--duration", "2"], "--ramp: expected less than --duration 2, got 3"),
    (["--warmup", "-0.5"], "--warmup: expected 0 or more seconds, got -0.5"),
    (["--warmup", "1", "--requests", "9"], "--warmup: expected --duration"),
    (["--warmup", "2", "--duration", "2"], "--warmup: expected less than --duration 2, got 2"),
])
def test_load_refuses_times_that_do_not_fit(server, flags, message):
    assert message in gla(server, *flags, code=2, binary=BIN / "gla-load").stderr
