"""Faults 24, 27 and 41: connections, signals, ports; and what a server says of itself."""

import re
import resource
import signal
import socket
import subprocess
import time

import grpc
import pytest

from harness import (BARD, SERVER, Answer, Server, generate, inference_pb2_grpc, pb, reason_of,
                     refused, request, spb, wait_for)

LONG = dict(max_new_tokens=4000, ignore_eos=True)


# 24 -------------------------------------------------------------------------------------------------

def test_24_descriptors_run_out_and_come_back():
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    with Server(preexec=limit) as server:
        assert len(generate(server, max_new_tokens=2).token_ids) == 2
        host, port = server.target.split(":")
        idle = []
        for _ in range(200):
            connection = socket.socket()
            connection.settimeout(.2)
            try:
                connection.connect((host, int(port)))
            except OSError:
                pass
            idle.append(connection)
        time.sleep(.5)
        assert server.alive()
        for connection in idle:
            connection.close()

        def serves_a_new_connection():
            with grpc.insecure_channel(server.target,
                                       [("grpc.use_local_subchannel_pool", 1)]) as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                try:
                    return stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=1).vocab_size == 2048
                except grpc.RpcError:
                    return False
        wait_for(serves_a_new_connection, 5, "accepting again")
        assert server.stop() == 0


def test_24_connections_over_the_limit_are_refused_and_counted():
    with Server("--max-connections", 4) as server:
        generate(server, max_new_tokens=1)
        host, port = server.target.split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(10)]
        wait_for(lambda: server.metric("gla_rejections_total", reason="connections") >= 7, 5,
                 "counted rejections")
        assert len(generate(server, max_new_tokens=2).token_ids) == 2
        for connection in idle:
            connection.close()
        assert server.stop() == 0


# 27 -------------------------------------------------------------------------------------------------

def test_27_sigterm_idle():
    with Server() as server:
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 5


def test_27_sigterm_under_load_finishes_what_runs_and_refuses_what_is_new():
    with Server() as server:
        running = server.inference.Generate(request(max_new_tokens=2500, ignore_eos=True))
        next(running)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.http("/readyz")[0] == 503, 2, "unready")

        def refuses():  # unready comes first, so that balancers look away before anyone is refused
            try:
                list(server.inference.Generate(request(max_new_tokens=1)))
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.UNAVAILABLE
                return True
            return False

        wait_for(refuses, 2, "refusal")
        assert len(Answer(running).token_ids) == 2499
        assert server.wait() == 0


def test_27_drain_that_takes_too_long_ends_streams_as_unavailable():
    with Server("--shutdown-timeout", 1, "--max-new-tokens-limit", 1000000) as server:
        running = server.inference.Generate(request(max_new_tokens=1000000, ignore_eos=True))
        next(running)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert refused(lambda: running).code() == grpc.StatusCode.UNAVAILABLE
        assert server.wait() == 0
        assert time.monotonic() - began < 7


def test_27_second_sigterm_skips_the_wait():
    with Server("--shutdown-timeout", 30, "--max-new-tokens-limit", 1000000) as server:
        running = server.inference.Generate(request(max_new_tokens=1000000, ignore_eos=True))
        next(running)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(.3)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert refused(lambda: running).code() == grpc.StatusCode.UNAVAILABLE
        assert server.wait() == 0
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("delay", [0, .01, .03, .06, .1])
def test_27_sigterm_while_loading(delay):
    with Server(wait=False) as server:
        time.sleep(delay)
        server.process.send_signal(signal.SIGTERM)
        # before the handler is installed the signal's default ends the process
        assert server.wait() in (0, -signal.SIGTERM)


def test_27_health_follows():
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    with Server() as server:
        stub = health_pb2_grpc.HealthStub(server.channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        for name in ("", "gla.v1.InferenceService", "gla.v1.SessionService"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == serving
        unknown = refused(lambda: stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
        assert unknown.code() == grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == serving
        running = server.inference.Generate(request(max_new_tokens=1500, ignore_eos=True))
        next(running)
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        Answer(running)
        watch.cancel()
        assert server.wait() == 0


def test_reflection_lists_the_services():
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase)
    with Server() as server:
        names = ProtoReflectionDescriptorDatabase(server.channel).get_services()
        assert {"gla.v1.InferenceService", "gla.v1.SessionService",
                "grpc.health.v1.Health"} <= set(names)


# 41 -------------------------------------------------------------------------------------------------

def run(*flags):
    return subprocess.run([str(SERVER), *map(str, flags)], capture_output=True, text=True,
                          timeout=20)


@pytest.mark.parametrize("which", ["--port", "--http-port"])
def test_41_port_taken(which):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = "--http-port" if which == "--port" else "--port"
        result = run("--model", BARD, "--host", "127.0.0.1", which, port, other, 0)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("gla-server:")]
    assert len(lines) == 1 and str(port) in lines[0]
    assert "ready:" not in result.stdout + result.stderr


def test_41_address_not_available():
    result = run("--model", BARD, "--host", "192.0.2.1", "--port", 0, "--http-port", 0)
    assert result.returncode == 2
    assert "192.0.2.1" in result.stderr


@pytest.mark.parametrize("flags,fragments", [
    (["--no-such-flag", "1"], ["no-such-flag"]), (["--port", "99999"], ["port", "99999"]),
    (["--port", "eight"], ["port", "eight"]), (["--dtype", "int4"], ["dtype", "int4"]),
    (["--max-num-seqs", "0"], ["max-num-seqs", "0"]), (["--state-memory", "12XB"], ["state-memory"]),
    (["--state-memory", "1KiB"], ["state-memory"]), (["--prefill-form", "magic"], ["prefill-form"]),
    (["--model"], ["model"]), (["--log-format", "xml"], ["log-format"]),
])
def test_bad_flags_end_with_2_and_one_line(flags, fragments):
    result = run("--model", BARD, "--host", "127.0.0.1", "--port", 0, "--http-port", 0, *flags)
    assert result.returncode == 2, result
    for fragment in fragments:
        assert fragment in result.stderr, result.stderr


def test_more_state_memory_than_the_device_has_is_refused():
    result = run("--model", BARD, "--host", "127.0.0.1", "--port", 0, "--http-port", 0,
                 "--state-memory", "100TiB")
    assert result.returncode == 2, result
    last = result.stderr.strip().splitlines()[-1]
    assert "state" in last and "free" in last, result.stderr


def test_environment_twins_and_their_order():
    with Server("--served-model-name", "by-flag",
                env={"GLA_SERVED_MODEL_NAME": "by-env", "GLA_MAX_NUM_SEQS": "7"}) as server:
        info = server.inference.GetModelInfo(pb.GetModelInfoRequest())
        assert (info.model, info.max_num_seqs) == ("by-flag", 7)


# start ----------------------------------------------------------------------------------------------

def test_ready_within_a_second_and_never_before_it_serves():
    with Server() as server:
        assert server.ready_after < 2, server.ready_after  # aim 1 s on an idle machine
        assert server.http("/readyz")[0] == 200
        assert server.http("/livez")[0] == 200
        assert any("sessions" in line and "state" in line for line in server.log), server.log


def test_closed_output_does_not_end_the_server():
    process = subprocess.Popen([str(SERVER), "--model", str(BARD), "--host", "127.0.0.1", "--port", "0",
                                "--http-port", "0"], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    for line in process.stdout:
        match = re.search(rb"ready: grpc 127.0.0.1:(\d+)", line)
        if match:
            break
    process.stdout.close()
    with grpc.insecure_channel(f"127.0.0.1:{int(match[1])}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for _ in range(20):
            Answer(stub.Generate(request(max_new_tokens=2), timeout=10))
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_sessions_are_not_lost_by_a_refused_request():
    with Server() as server:
        server.sessions.CreateSession(spb.CreateSessionRequest(session_id="keep"))
        generate(server, [1, 2, 3], session_id="keep", max_new_tokens=3, ignore_eos=True)
        refused(lambda: server.inference.Generate(request([9], session_id="keep", max_new_tokens=0)))
        assert server.sessions.GetSession(spb.GetSessionRequest(session_id="keep")).position == 6
        assert reason_of(refused(lambda: server.inference.Generate(
            request([9], session_id="keep", expected_position=1)))) == "STALE_POSITION"
        assert server.stop() == 0
