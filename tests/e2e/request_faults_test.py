"""Faults 8 to 12, 15 to 20 and 23: bad and interrupted requests, over a real socket."""

import math
import threading
import time

import grpc
import pytest

from harness import (Answer, Server, bf16, copy_model, generate, pb, read_safetensors, reason_of,
                     refused, request, spb, wait_for, write_safetensors)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
LONG = dict(max_new_tokens=4000, ignore_eos=True)


def is_invalid(server, message, *fragments):
    error = refused(lambda: server.inference.Generate(message, timeout=10))
    assert error.code() == INVALID, error
    for fragment in fragments:
        assert fragment in error.details(), (fragment, error.details())


# 8 --------------------------------------------------------------------------------------------------

TRIGGER = 777


@pytest.fixture(scope="module", params=["logits", "state"])
def overflowing(request, tmp_path_factory):
    """bard-6m with one token, TRIGGER, whose logits or whose state overflow, and with every other one as
    before but for a hidden dimension that is silenced."""
    folder = copy_model(tmp_path_factory.mktemp("overflow") / "model")
    path = folder / "model.safetensors"
    header, data = read_safetensors(path)

    def put(name, row, column, value):
        begin = header[name]["data_offsets"][0]
        at = begin + 2 * (row * header[name]["shape"][1] + column)
        data[at:at + 2] = bf16(value)

    for token in range(2048):
        put("model.embeddings.weight", token, 0, 1e4 if token == TRIGGER else 0.0)
    for name, entry in header.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            for column in range(entry["shape"][1]):
                put(name, 0, column, 0.0)
    put("lm_head.weight" if request.param == "logits" else "model.layers.1.attn.k_proj.weight",
        5, 0, 3e38)
    write_safetensors(path, header, data)
    with Server(model=folder) as running:
        running.overflowing = request.param
        yield running


def test_8_non_finite_logits_end_one_stream_and_roll_its_session_back(overflowing):
    server = overflowing
    server.sessions.CreateSession(spb.CreateSessionRequest(session_id="s"))
    server.sessions.CreateSession(spb.CreateSessionRequest(session_id="twin"))
    for name in ("s", "twin"):
        generate(server, [1, 100, 200, 300], session_id=name, max_new_tokens=4, ignore_eos=True)
    before = server.sessions.GetSession(spb.GetSessionRequest(session_id="s")).position
    neighbour = server.inference.Generate(request(max_new_tokens=300, ignore_eos=True))
    trips = server.metric("gla_numeric_guard_trips_total")
    error = refused(lambda: server.inference.Generate(
        request([10, 20, TRIGGER], session_id="s", max_new_tokens=4)))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "non-finite logits" in error.details()
    assert server.metric("gla_numeric_guard_trips_total") == trips + 1
    assert server.sessions.GetSession(spb.GetSessionRequest(session_id="s")).position == before
    alone = generate(server, max_new_tokens=300, ignore_eos=True)
    assert Answer(neighbour).token_ids == alone.token_ids
    after = [generate(server, [50, 60], session_id=name, max_new_tokens=8, ignore_eos=True).token_ids
             for name in ("s", "twin")]
    assert after[0] == after[1]


def test_8_a_row_without_logits_never_ruins_a_session(overflowing):
    """Inside a prompt, and as the last token that a session takes in."""
    server, ruined = overflowing, overflowing.overflowing == "state"
    last = dict(sampling=dict(temperature=0, logit_bias={TRIGGER: 100}), max_new_tokens=1)
    for fields in (dict(prompt=[10, TRIGGER] + [20] * 600, max_new_tokens=2), dict(prompt=[10], **last)):
        server.sessions.CreateSession(spb.CreateSessionRequest(session_id="kept"))
        position = generate(server, [1, 100], session_id="kept", max_new_tokens=2,
                            ignore_eos=True).finish.session_position
        if ruined:
            error = refused(lambda: server.inference.Generate(request(session_id="kept", **fields)))
            assert error.code() == grpc.StatusCode.INTERNAL
            assert "non-finite activations at token position" in error.details()
        else:
            position = generate(server, session_id="kept", **fields).finish.session_position
        generate(server, [50, 60], session_id="kept", max_new_tokens=8, ignore_eos=True,
                 expected_position=position)
        server.sessions.DeleteSession(spb.DeleteSessionRequest(session_id="kept"))


# 9 --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [0, -1, -2**31, 2**31 - 1])
def test_9_max_new_tokens(server, value):
    is_invalid(server, request(max_new_tokens=value), "max_new_tokens", str(value))


# 10 -------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("name,value", [
    ("temperature", -0.1), ("temperature", NAN), ("temperature", INF), ("top_p", 0.0),
    ("top_p", 1.1), ("top_p", -1.0), ("top_p", NAN), ("top_k", -1), ("top_k", 2049),
    ("min_p", -0.1), ("min_p", 1.5), ("min_p", NAN), ("repetition_penalty", 0.0),
    ("repetition_penalty", NAN), ("repetition_penalty", -1.0), ("presence_penalty", 2.5),
    ("presence_penalty", NAN), ("frequency_penalty", -3.0), ("frequency_penalty", INF),
    ("logit_bias", {2048: 1.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", {5: NAN}),
    ("logit_bias", {5: 1000.0}),
])
def test_10_sampling_out_of_range(server, name, value):
    is_invalid(server, request(sampling={name: value}), name)


@pytest.mark.parametrize("fields,fragment", [
    (dict(logprobs=-1), "logprobs"), (dict(logprobs=21), "logprobs"),
    (dict(stop=[b""]), "stop"), (dict(stop=[b"x" * 65]), "stop"),
    (dict(stop=[b"x"] * 17), "stop"), (dict(stop=[b"\xff"]), "stop"),
    (dict(stop_token_ids=[2048]), "stop_token_ids"), (dict(stop_token_ids=[-1]), "stop_token_ids"),
    (dict(stop_token_ids=list(range(65))), "stop_token_ids"),
    (dict(expected_position=-1), "expected_position"), (dict(request_id="x" * 129), "request_id"),
    (dict(request_id="line\nbreak"), "request_id"), (dict(expected_position=0), "expected_position"),
])
def test_10_other_fields_out_of_range(server, fields, fragment):
    is_invalid(server, request(**fields), fragment)


# 11 -------------------------------------------------------------------------------------------------

def test_11_prompts(server):
    before = server.metric("gla_rejections_total")
    is_invalid(server, pb.GenerateRequest(), "prompt")
    is_invalid(server, request([]), "token_ids")
    is_invalid(server, request([5, 2048]), "2048")
    is_invalid(server, request([5, -7]), "-7")
    is_invalid(server, request([5] * 32769), "32769", "32768")
    is_invalid(server, request(b"a" * ((1 << 20) + 1)), "1048577", "1048576")
    # counted when the call is over, which may be after its answer: those of earlier tests, too
    wait_for(lambda: server.metric("gla_rejections_total") >= before + 6, 5, "counted rejections")


def test_11_unknown_model(server):
    error = refused(lambda: server.inference.Generate(request(model="other")))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert "other" in error.details()


# 12 -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text,offset", [(b"abc\xff", 3), (b"\xc0\x80", 0), (b"ab\xed\xa0\x80", 2),
                                         (b"abc\xe2\x82", 3), (b"\xf5\x80\x80\x80", 0)])
def test_12_invalid_utf8(server, text, offset):
    is_invalid(server, request(text), "UTF-8", str(offset))


def test_12_nul_bytes_and_one_letter(server):
    answer = generate(server, b"a\0b", max_new_tokens=4)
    assert answer.finish.usage.tokens_prefilled >= 3
    tokens = server.inference.Tokenize(pb.TokenizeRequest(text=b"a" * (1 << 20), omit_pieces=True),
                                       timeout=20)
    text = server.inference.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids), timeout=20)
    assert text.text == b"a" * (1 << 20)


# 15 -------------------------------------------------------------------------------------------------

def test_15_unknown_method_old_and_new_clients(server):
    raw = server.channel.unary_unary("/gla.v1.InferenceService/Teleport",
                                     request_serializer=bytes, response_deserializer=bytes)
    assert refused(lambda: raw(b"")).code() == grpc.StatusCode.UNIMPLEMENTED
    raw = server.channel.unary_unary("/gla.v2.InferenceService/Generate",
                                     request_serializer=bytes, response_deserializer=bytes)
    assert refused(lambda: raw(b"")).code() == grpc.StatusCode.UNIMPLEMENTED
    newer = request(max_new_tokens=4).SerializeToString() + b"\xfa\x3e\x03new"  # field 1007
    stream = server.channel.unary_stream("/gla.v1.InferenceService/Generate",
                                         request_serializer=bytes,
                                         response_deserializer=pb.GenerateResponse.FromString)
    assert len(Answer(stream(newer)).token_ids) == 4
    for later in ("ForkSession", "RewindSession"):
        raw = server.channel.unary_unary(f"/gla.v1.SessionService/{later}",
                                         request_serializer=bytes, response_deserializer=bytes)
        assert refused(lambda: raw(b"")).code() == grpc.StatusCode.UNIMPLEMENTED


# 16, 17 ---------------------------------------------------------------------------------------------

def test_16_unknown_and_expired_sessions(server):
    error = refused(lambda: server.inference.Generate(request(session_id="nobody")))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
    server.sessions.CreateSession(spb.CreateSessionRequest(session_id="brief", idle_ttl_seconds=1))
    wait_for(lambda: server.metric("gla_sessions_ended_total", reason="expired") >= 1, 5, "expiry")
    for call in (lambda: server.inference.Generate(request(session_id="brief")),
                 lambda: server.sessions.GetSession(spb.GetSessionRequest(session_id="brief"))):
        error = refused(call)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.NOT_FOUND, "SESSION_EXPIRED")


def test_17_duplicate_create(server):
    server.sessions.CreateSession(spb.CreateSessionRequest(session_id="twice"))
    error = refused(lambda: server.sessions.CreateSession(
        spb.CreateSessionRequest(session_id="twice")))
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS
    for bad in ("spa ce", "x" * 129, "a/b"):
        error = refused(lambda: server.sessions.CreateSession(
            spb.CreateSessionRequest(session_id=bad)))
        assert error.code() == INVALID
    server.sessions.DeleteSession(spb.DeleteSessionRequest(session_id="twice"))
    assert refused(lambda: server.sessions.DeleteSession(
        spb.DeleteSessionRequest(session_id="twice"))).code() == grpc.StatusCode.NOT_FOUND


# 18, 19 ---------------------------------------------------------------------------------------------

def test_18_second_writer(server):
    server.sessions.CreateSession(spb.CreateSessionRequest(session_id="busy"))
    stream = server.inference.Generate(request(session_id="busy", **LONG))
    next(stream)
    error = refused(lambda: server.inference.Generate(request(session_id="busy")))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.ABORTED, "SESSION_BUSY")
    stream.cancel()
    wait_for(lambda: not server.sessions.GetSession(
        spb.GetSessionRequest(session_id="busy")).busy, 5, "idle session")
    server.sessions.DeleteSession(spb.DeleteSessionRequest(session_id="busy"))


def test_19_stale_position(server):
    server.sessions.CreateSession(spb.CreateSessionRequest(session_id="at"))
    first = generate(server, [1, 5, 6], session_id="at", max_new_tokens=4, expected_position=0,
                     ignore_eos=True)
    assert first.finish.session_position == 7
    for wrong in (0, 6, 8, 1 << 40):
        error = refused(lambda: server.inference.Generate(
            request([5], session_id="at", expected_position=wrong)))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.ABORTED, "STALE_POSITION")
        assert "7" in error.details() and str(wrong) in error.details()
    again = generate(server, [5], session_id="at", max_new_tokens=1, expected_position=7,
                     ignore_eos=True)
    assert again.finish.session_position == 9
    server.sessions.DeleteSession(spb.DeleteSessionRequest(session_id="at"))


# 20 -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("after", [0, 1, 20])
def test_20_cancel(server, after):
    cancelled = server.metric("gla_finished_total", reason="cancelled")
    server.sessions.CreateSession(spb.CreateSessionRequest(session_id=f"c{after}"))
    stream = server.inference.Generate(request([1] + [300] * 30000 if after == 0 else [1, 300],
                                               session_id=f"c{after}", **LONG))
    if after == 0:  # a call cancelled before the server reads it never becomes a request
        wait_for(lambda: server.metric("gla_requests_running") == 1, 5, "running request")
    for _ in range(after):
        next(stream)
    stream.cancel()
    server.wait_idle(5)
    assert server.metric("gla_finished_total", reason="cancelled") == cancelled + 1
    session = server.sessions.GetSession(spb.GetSessionRequest(session_id=f"c{after}"))
    assert not session.busy
    assert session.position >= (after + 1 if after else 0)
    generate(server, [5], session_id=f"c{after}", max_new_tokens=2,
             expected_position=session.position)
    server.sessions.DeleteSession(spb.DeleteSessionRequest(session_id=f"c{after}"))


def test_20_cancel_at_once(server):
    """Before, while or after the server reads the call: nothing stays behind."""
    for number in range(50):
        stream = server.inference.Generate(request(**LONG))
        time.sleep(number * 1e-4)
        stream.cancel()
    generate(server, [1, 300], max_new_tokens=2)
    server.wait_idle(5)


def test_20_cancel_at_the_last_token(server):
    for _ in range(50):
        stream = server.inference.Generate(request([1, 300], max_new_tokens=3, ignore_eos=True))
        tokens = 0
        try:
            for message in stream:
                tokens += len(message.token_ids)
                if tokens == 3:
                    stream.cancel()
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.CANCELLED
    server.wait_idle()


def test_20_delete_ends_the_running_generation(server):
    server.sessions.CreateSession(spb.CreateSessionRequest(session_id="gone"))
    stream = server.inference.Generate(request(session_id="gone", **LONG))
    next(stream)
    server.sessions.DeleteSession(spb.DeleteSessionRequest(session_id="gone"))
    assert refused(lambda: stream).code() == grpc.StatusCode.CANCELLED


# 23 -------------------------------------------------------------------------------------------------

def test_23_deadlines(server):
    deadline = grpc.StatusCode.DEADLINE_EXCEEDED
    assert refused(lambda: server.inference.Generate(request(**LONG), timeout=0)).code() == deadline
    assert refused(lambda: server.inference.Generate(request(**LONG), timeout=.001)).code() == deadline
    # in the prompt: 30,000 tokens take longer than 0.2 s here
    long_prompt = request([1] + [300] * 30000, **LONG)
    assert refused(lambda: server.inference.Generate(long_prompt, timeout=.2)).code() == deadline
    stream = server.inference.Generate(request(**LONG), timeout=.3)
    next(stream)
    assert refused(lambda: stream).code() == deadline
    began = time.monotonic()
    server.wait_idle(5)
    assert time.monotonic() - began < 1
    wait_for(lambda: server.metric("gla_finished_total", reason="deadline") >= 2, 5, "deadlines")


def test_23_deadline_in_the_queue():
    with Server("--max-num-seqs", 1) as server:
        running = server.inference.Generate(request(**LONG))
        next(running)
        waiting = [server.inference.Generate(request(**LONG), timeout=.2) for _ in range(3)]
        for stream in waiting:
            assert refused(lambda: stream).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        generated = server.metric("gla_generated_tokens_total")
        running.cancel()
        server.wait_idle()
        assert generated > 0
        assert server.stop() == 0


# the queue's bounds ---------------------------------------------------------------------------------

def test_queue_full_is_refused_at_once_with_a_retry_delay():
    with Server("--max-num-seqs", 1, "--max-num-queued-reqs", 2) as server:
        streams = [server.inference.Generate(request(**LONG))]
        next(streams[0])
        streams += [server.inference.Generate(request(**LONG)) for _ in range(2)]
        wait_for(lambda: server.metric("gla_requests_queued") == 2, 5, "full queue")
        began = time.monotonic()
        error = refused(lambda: server.inference.Generate(request()))
        assert time.monotonic() - began < .5
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        pushback = dict(error.trailing_metadata())["grpc-retry-pushback-ms"]
        assert 200 <= int(pushback) <= 2000
        for stream in streams:
            stream.cancel()
        server.wait_idle()


def test_one_session_too_many():
    # bard-6m: 192 KiB a state; 2 MiB hold 10 slots, 8 of them for requests
    with Server("--max-num-seqs", 8, "--state-memory", "2MiB") as server:
        info = server.inference.GetModelInfo(pb.GetModelInfoRequest())
        assert info.capacity_sessions == (2 << 20) // info.state_bytes_per_session - 8
        for _ in range(info.capacity_sessions):
            server.sessions.CreateSession(spb.CreateSessionRequest())
        error = refused(lambda: server.sessions.CreateSession(spb.CreateSessionRequest()))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED,
                                                    "SESSIONS_FULL")
        assert len(generate(server, max_new_tokens=4).token_ids) == 4


def test_a_client_that_is_killed_frees_its_slot(server):
    import signal
    import subprocess

    from harness import CLIENT
    client = subprocess.Popen([str(CLIENT), "generate", "--prompt", "In", "--max-new-tokens", "8000",
                               "--ignore-eos", "--target", server.target],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: server.metric("gla_requests_running") == 1, 5, "running request")
    client.send_signal(signal.SIGKILL)
    client.wait()
    server.wait_idle(3)


def test_many_threads_of_mixed_bad_requests_leave_the_server_clean(server):
    def work(index):
        for round_ in range(10):
            kind = (index + round_) % 4
            if kind == 0:
                refused(lambda: server.inference.Generate(request(max_new_tokens=0)))
            elif kind == 1:
                stream = server.inference.Generate(request(**LONG))
                next(stream)
                stream.cancel()
            elif kind == 2:
                refused(lambda: server.inference.Generate(request(**LONG), timeout=.05))
            else:
                generate(server, max_new_tokens=3)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.wait_idle()
