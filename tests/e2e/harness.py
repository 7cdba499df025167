"""Starts real servers on real sockets for the end-to-end tests.

GLA_BIN names the folder of the binaries (default build/release/bin), GLA_BACKEND the backend
(default cpu), GLA_SERVER another server than the one there, for instance one built with a sanitizer.
Every server listens on ports of its own on 127.0.0.1 and is stopped by its test.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("GLA_BIN", ROOT / "build/release/bin"))
BACKEND = os.environ.get("GLA_BACKEND", "cpu")
SERVER = pathlib.Path(os.environ.get("GLA_SERVER", BIN / f"gla-server-{BACKEND}"))
# A sanitizer's own memory grows with what it has seen.
SANITIZED = any(mark in SERVER.read_bytes() for mark in (b"__tsan_init", b"__asan_init"))
CLIENT = BIN / "gla"
BARD = ROOT / "deploy/models/bard-6m"


def load_protos():
    """Generates the Python stubs once, next to the build, and imports them."""
    from grpc_tools import protoc
    import grpc_tools

    out = pathlib.Path(tempfile.gettempdir()) / f"gla-protos-{os.getpid()}"
    out.mkdir(exist_ok=True)
    include = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    files = ["gla/v1/inference.proto", "gla/v1/session.proto"]
    code = protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"-I{include}", f"--python_out={out}",
                        f"--grpc_python_out={out}", *files])
    assert code == 0, "protoc failed"
    sys.path.insert(0, str(out))


load_protos()

import grpc  # noqa: E402
from gla.v1 import inference_pb2 as pb  # noqa: E402
from gla.v1 import inference_pb2_grpc  # noqa: E402
from gla.v1 import session_pb2 as spb  # noqa: E402
from gla.v1 import session_pb2_grpc  # noqa: E402


class Server:
    """A running gla-server."""

    def __init__(self, *flags, model=BARD, wait=True, preexec=None, env=None):
        command = [str(SERVER), "--model", str(model), "--host", "127.0.0.1", "--port", "0",
                   "--http-port", "0", *map(str, flags)]
        self.log = []
        self.ports = {}
        self.started = time.monotonic()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        preexec_fn=preexec, env={**os.environ, **(env or {})})
        self._seen_ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            self.wait_ready()

    def _read(self):
        for raw in self.process.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            self.log.append(line)
            match = re.search(r"ready\b.*grpc\S*[ =:\"]+[\w.:\[\]]*:(\d+).*http\S*[ =:\"]+[\w.:\[\]]*:(\d+)", line)
            if match:
                self.ports = {"grpc": int(match[1]), "http": int(match[2])}
                self._seen_ready.set()
        self._seen_ready.set()

    def wait_ready(self, timeout=60):
        self._seen_ready.wait(timeout)
        assert self.ports, "the server did not become ready:\n" + "\n".join(self.log)
        self.ready_after = time.monotonic() - self.started
        self.target = f"127.0.0.1:{self.ports['grpc']}"
        self.channel = grpc.insecure_channel(self.target, [("grpc.use_local_subchannel_pool", 1)])
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(self.channel)

    def http(self, path):
        """(status, body) of a page of the http port."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['http']}{path}",
                                        timeout=5) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name, **labels):
        """The sum of the series of `name` that carry `labels`."""
        total = 0.0
        for line in self.http("/metrics")[1].splitlines():
            match = re.match(r"^(\w+)(\{.*\})? (\S+)$", line)
            if match and match[1] == name:
                found = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                if all(found.get(key) == value for key, value in labels.items()):
                    total += float(match[3])
        return total

    def wait_idle(self, timeout=10):
        """Until nothing runs or waits and no slot but the sessions' is held."""
        wait_for(lambda: self.metric("gla_requests_running") == 0
                 and self.metric("gla_requests_queued") == 0
                 and self.metric("gla_state_slots", state="used")
                 == self.metric("gla_state_slots", state="pinned"), timeout, "idle server")

    def alive(self):
        return self.process.poll() is None

    def rss_kib(self):
        text = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1])

    def num_fds(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def num_threads(self):
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def stop(self, timeout=40):
        """SIGTERM; gives the exit code."""
        if self.alive():
            self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def wait(self, timeout=40):
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError("the server did not exit:\n" + "\n".join(self.log[-20:]))
        self._reader.join(5)
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.alive():
            self.process.kill()
        self.process.wait()


def wait_for(condition, timeout=10, what="condition"):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"no {what} after {timeout} s"
        time.sleep(0.02)


def request(prompt="In the beginning God", **fields):
    """A greedy GenerateRequest; `prompt` is text or a list of ids."""
    sampling = fields.pop("sampling", {"temperature": 0})
    message = pb.GenerateRequest(sampling=pb.SamplingParams(**sampling), **fields)
    if isinstance(prompt, str):
        message.text = prompt.encode()
    elif isinstance(prompt, bytes):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    return message


class Answer:
    def __init__(self, messages):
        self.token_ids, self.text, self.finish, self.logprobs = [], b"", None, []
        for message in messages:
            message.text.decode()  # whole characters in every message
            self.token_ids += message.token_ids
            self.text += message.text
            self.logprobs += message.logprobs
            if message.HasField("finish"):
                assert self.finish is None
                self.finish = message.finish
        assert self.finish is not None


def generate(server, prompt="In the beginning God", timeout=60, **fields):
    return Answer(server.inference.Generate(request(prompt, **fields), timeout=timeout))


def refused(call):
    """The grpc.RpcError of `call`, which must fail."""
    try:
        result = call()
        if hasattr(result, "__iter__"):
            list(result)
    except grpc.RpcError as error:
        return error
    raise AssertionError("expected an error, got none")


def reason_of(error):
    """google.rpc.ErrorInfo.reason of an RPC error."""
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    status = rpc_status.from_call(error)
    for detail in status.details if status else []:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.reason
    return None


def read_safetensors(path):
    """(header, data) of a safetensors file, as they are."""
    raw = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:8 + size]), bytearray(raw[8 + size:])


def write_safetensors(path, header, data):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def copy_model(folder, source=BARD):
    """A copy of a model to break; `folder` must not exist."""
    shutil.copytree(source, folder)
    return pathlib.Path(folder)


def edit_config(folder, **changes):
    path = pathlib.Path(folder) / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def bf16(value):
    """The two bytes of a float as bfloat16 (truncated)."""
    return struct.pack("<f", value)[2:]
