"""A GGUF writer for tests, byte by byte from ggml's docs/gguf.md; it checks nothing."""

import struct
from pathlib import Path

import ml_dtypes
import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q",
    I64: "q", F64: "d",
}  # fmt: skip
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30, "Q6_K": 14}


def write_gguf(path: Path, metadata: dict, tensors: dict, *, version=3, alignment=32) -> None:
    """metadata: key -> (value type, value), of an array (ARRAY, (element type, values)).

    tensors: name -> (type, shape with rows first, bytes).
    """
    head = bytearray(b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)))
    for key, (kind, value) in metadata.items():
        head += string(key) + struct.pack("<I", kind) + encoded(kind, value)
    data = bytearray()
    for name, (kind, shape, payload) in tensors.items():
        data += bytes(-len(data) % alignment)
        head += string(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", extent) for extent in reversed(shape))
        head += struct.pack("<IQ", TYPES[kind], len(data))
        data += payload
    Path(path).write_bytes(head + bytes(-len(head) % alignment) + data)


def encoded(kind: int, value) -> bytes:
    """One metadata value."""
    if kind == STRING:
        return string(value)
    if kind == ARRAY:
        element, values = value
        return struct.pack("<IQ", element, len(values)) + b"".join(
            encoded(element, item) for item in values
        )
    return struct.pack(f"<{CODES[kind]}", value)


def string(text: str) -> bytes:
    """A string with its length in front."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def stored(kind: str, array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor of a plain type, ready for `write_gguf`."""
    dtype = {"F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}[kind]
    return kind, array.shape, array.astype(dtype).tobytes()


def quantized(kind: str, shape: tuple[int, ...], seed: int = 0):
    """(tensor for `write_gguf`, float32 values) of random blocks, decoded weight by weight."""
    rng = np.random.default_rng(seed)
    payload, values = bytearray(), []
    for _ in range(int(np.prod(shape)) // 32):
        scale, least = rng.normal(size=2).astype(np.float16)
        payload += scale.tobytes() + (least.tobytes() if kind == "Q4_1" else b"")
        if kind == "Q8_0":
            codes = rng.integers(-128, 128, 32)
            payload += codes.astype(np.int8).tobytes()
            values += [np.float32(scale) * np.float32(code) for code in codes]
            continue
        codes = rng.integers(0, 16, 32)
        payload += bytes(int(codes[i]) | int(codes[i + 16]) << 4 for i in range(16))
        zero = 8 if kind == "Q4_0" else 0
        shift = np.float32(least) if kind == "Q4_1" else np.float32(0)
        values += [np.float32(scale) * np.float32(code - zero) + shift for code in codes]
    return (kind, shape, bytes(payload)), np.asarray(values, np.float32).reshape(shape)
