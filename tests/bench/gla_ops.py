"""The operators of libgla_ops_<backend>.so on torch tensors, for the scripts in this folder.

Tensors are contiguous, on the library's device, and batched: q, k [B, T, H, K], v [B, T, H, V],
states [B, H, K, V] float32, the gate [B, T, H] or [B, T, H, K] in float32 or q's type. The library
works on a stream of its own: synchronize torch before a call and this library after it.
"""

import ctypes
import pathlib

import torch

RECURRENT, CHUNKWISE = 0, 1
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_SIZES = ["num_seqs", "num_rows", "max_len", "num_heads", "num_kv_heads", "key_dim", "value_dim",
          "state_heads", "gate_kind", "gate_dtype", "dtype"]


class Forward(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in
                ("q", "k", "v", "gate", "o", "state", "key_sum_state", "cu_seqlens", "read_slots",
                 "write_slots", "workspace")] + \
               [("state_stride", ctypes.c_int64)] + [(name, _INT) for name in _SIZES] + \
               [("scale", ctypes.c_float)]


class Backward(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in
                ("q", "k", "v", "gate", "initial_state", "d_o", "d_final_state", "dq", "dk", "dv",
                 "d_gate", "d_initial_state", "cu_seqlens", "workspace")] + \
               [(name, _INT) for name in _SIZES] + [("scale", ctypes.c_float)]


def _address(tensor):
    if tensor is None:
        return None
    assert tensor.is_contiguous(), f"a tensor of shape {tuple(tensor.shape)} is not contiguous"
    return tensor.data_ptr()


class Library:
    """One device of one backend; `path` names the library built for it."""

    def __init__(self, path, ordinal=0, threads=0):
        lib = ctypes.CDLL(str(pathlib.Path(path).resolve()))
        lib.gla_ops_open.restype = _POINTER
        lib.gla_ops_backend.restype = lib.gla_ops_device_name.restype = ctypes.c_char_p
        lib.gla_ops_memory_in_use.restype = lib.gla_ops_backward_bytes.restype = ctypes.c_uint64
        lib.gla_ops_forward_bytes.restype = ctypes.c_uint64
        for name, struct in (("forward", Forward), ("backward", Backward)):
            size = getattr(lib, f"gla_ops_{name}_struct_bytes")()
            if size != ctypes.sizeof(struct):
                raise RuntimeError(f"{path}: {name} takes a struct of {size} bytes, expected "
                                   f"{ctypes.sizeof(struct)}: built from other sources?")
        error = ctypes.create_string_buffer(512)
        device = lib.gla_ops_open(ordinal, threads, error, ctypes.c_size_t(len(error)))
        if not device:
            raise RuntimeError(error.value.decode())
        self._lib, self._device = lib, _POINTER(device)
        self.backend = lib.gla_ops_backend().decode()
        self.device_name = lib.gla_ops_device_name(self._device).decode()

    def close(self):
        self._lib.gla_ops_close(self._device)

    def memory_in_use(self):
        return self._lib.gla_ops_memory_in_use(self._device)

    def synchronize(self):
        self._lib.gla_ops_synchronize(self._device)


class Problem:
    """One operator on one set of inputs, with room for every result.

    After run(): o and final_state; dq, dk, dv, d_gate and d_initial_state (the last two None where
    the input is). `inputs` is a dict with q, k, v and optionally gate, initial_state, d_o,
    d_final_state.
    """

    def __init__(self, library, inputs, scale=None, form=CHUNKWISE, backward_form=None):
        self.lib, self.form = library, form
        self.backward_form = form if backward_form is None else backward_form
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        gate, h0 = inputs.get("gate"), inputs.get("initial_state")
        d_o, d_final_state = inputs.get("d_o"), inputs.get("d_final_state")
        batch, length, heads, key_dim = q.shape
        kv_heads, value_dim = k.shape[2], v.shape[3]
        like = dict(device=q.device)
        # Slots 0 to B - 1 hold the initial states, B to 2 B - 1 receive the final ones.
        self._states = torch.full((2 * batch, kv_heads, key_dim, value_dim), float("nan"), **like)
        if h0 is not None:
            self._states[:batch] = h0
        self.final_state = self._states[batch:]
        slots = torch.arange(2 * batch, dtype=torch.int32, **like)
        self._read = slots[:batch].clone() if h0 is not None else torch.full_like(slots[:batch], -1)
        self._write = slots[batch:].clone()
        self._cu = torch.arange(batch + 1, dtype=torch.int32, **like) * length
        self._inputs = inputs  # keeps them alive
        self.o = torch.empty(batch, length, heads, value_dim, dtype=q.dtype, **like)
        self.dq, self.dk, self.dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self.d_gate = None if gate is None else torch.empty_like(gate)
        self.d_initial_state = None if h0 is None else torch.empty_like(h0)
        gate_kind = 0 if gate is None else 2 if gate.dim() == 3 else 3
        sizes = dict(num_seqs=batch, num_rows=batch * length, max_len=length, num_heads=heads,
                     num_kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim,
                     state_heads=kv_heads, gate_kind=gate_kind,
                     gate_dtype=_DTYPES[torch.float32 if gate is None else gate.dtype],
                     dtype=_DTYPES[q.dtype], scale=key_dim ** -0.5 if scale is None else scale)
        common = dict(q=_address(q), k=_address(k), v=_address(v), gate=_address(gate),
                      cu_seqlens=_address(self._cu), **sizes)
        self._forward = Forward(o=_address(self.o), state=_address(self._states),
                                read_slots=_address(self._read),
                                write_slots=_address(self._write),
                                state_stride=kv_heads * key_dim * value_dim, **common)
        self._backward = Backward(initial_state=_address(h0), d_o=_address(d_o),
                                  d_final_state=_address(d_final_state), dq=_address(self.dq),
                                  dk=_address(self.dk), dv=_address(self.dv),
                                  d_gate=_address(self.d_gate),
                                  d_initial_state=_address(self.d_initial_state), **common)
        self.workspace_bytes = {}
        self._workspace = None

    def _prepare(self, forward, backward):
        """A workspace for what is called; forward and backward take turns in the same one."""
        lib, device = self.lib._lib, self.lib._device
        if forward:
            self.workspace_bytes["forward"] = lib.gla_ops_forward_bytes(
                device, ctypes.byref(self._forward), self.form)
        if backward:
            self.workspace_bytes["backward"] = lib.gla_ops_backward_bytes(
                device, ctypes.byref(self._backward), self.backward_form)
        size = max(self.workspace_bytes.values(), default=0)
        if size > 0 and (self._workspace is None or self._workspace.numel() < size):
            # 0xFF bytes are NaN: a read of what nothing wrote shows in the results.
            self._workspace = torch.full((size,), 255, dtype=torch.uint8, device=self.o.device)
            self._forward.workspace = self._backward.workspace = self._workspace.data_ptr()
        _wait(self.o)

    def results(self):
        """By the names of the gradients' inputs; what does not exist is left out."""
        named = dict(o=self.o, ht=self.final_state, dq=self.dq, dk=self.dk, dv=self.dv,
                     dg=self.d_gate, dh0=self.d_initial_state)
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def poison(self):
        for tensor in self.results().values():
            tensor.fill_(float("nan"))
        _wait(self.o)

    def run(self, forward=True, backward=True):
        lib, device = self.lib._lib, self.lib._device
        self._prepare(forward, backward)
        if forward:
            lib.gla_ops_forward(device, ctypes.byref(self._forward), self.form)
        if backward:
            lib.gla_ops_backward(device, ctypes.byref(self._backward), self.backward_form)
        self.lib.synchronize()

    def time(self, repeats, replay, forward=True, backward=True):
        """Milliseconds of each of `repeats` runs; `replay`: captured once and replayed."""
        self._prepare(forward, backward)
        milliseconds = (ctypes.c_double * repeats)()
        status = self.lib._lib.gla_ops_time(
            self.lib._device, ctypes.byref(self._forward) if forward else None, self.form,
            ctypes.byref(self._backward) if backward else None, self.backward_form, repeats,
            int(replay), milliseconds)
        if status != 0:
            raise RuntimeError(f"the {self.lib.backend} backend has no replay")
        return list(milliseconds)


def _wait(tensor):
    if tensor.is_cuda:
        torch.cuda.synchronize()


def ratio(found, expected):
    """RMS of the difference over RMS of `expected`, both in float64; NaN anywhere gives NaN."""
    found, expected = found.double(), expected.double()
    norm = expected.square().mean().sqrt().item()
    error = (found - expected).square().mean().sqrt().item()
    return error / norm if norm > 0 else error


def naive(q, k, v, gate=None, initial_state=None, scale=None):
    """The recurrence token by token in the inputs' own type: o and the final state."""
    batch, length, heads, key_dim = q.shape
    scale = key_dim ** -0.5 if scale is None else scale
    state = q.new_zeros(batch, heads, key_dim, v.shape[3]) if initial_state is None \
        else initial_state
    outputs = []
    for t in range(length):
        if gate is not None:
            decay = gate[:, t].exp()
            state = state * (decay[..., None, None] if gate.dim() == 3 else decay[..., None])
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    return torch.stack(outputs, 1), state
