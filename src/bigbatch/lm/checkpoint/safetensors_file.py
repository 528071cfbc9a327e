"""Safetensors files, written one tensor at a time.

`safetensors.torch.save_file` needs every tensor of a file on the CPU at once, reports a full disk without its errno and
returns no digest of the bytes it writes. Files are read by safetensors itself, so tests check the format.

    8 bytes: length of the header | header: JSON, padded to 8 bytes | the tensors' bytes, widest dtype first
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.lm.checkpoint.hashed_file import HashedFile

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names in safetensors of the dtypes that its ``load`` returns."""


def check_tensors(part: str, tensors: Mapping[str, Tensor]) -> None:
    """Reject tensors that would not survive a round trip through `write_tensors`; reads no tensor.

    Raises:
        TypeError: A name is not a str, or a value is not a plain dense tensor of a dtype that safetensors supports.
        ValueError: The format cannot store a name, or a tensor has no storage.
    """
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"{part} has a tensor called {name!r}, a {type(name).__name__}: use str names.")
        _check_name(part, name)
        if type(tensor) not in (Tensor, nn.Parameter):
            raise TypeError(
                f"{part}: {name} is a {type(tensor).__name__} and not a plain tensor: pass what one process can write "
                "by itself, such as .full_tensor() of a DTensor."
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise TypeError(f"{part}: {name} is sparse or quantized: pass it dense.")
        if tensor.dtype not in NAMES:
            raise TypeError(f"{part}: {name} is {tensor.dtype}, which safetensors does not support: convert it first.")
        if tensor.device.type == "meta":
            raise ValueError(f"{part}: {name} is on the meta device and has no values.")


def _check_name(part: str, name: str) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{part} has a tensor called {name!r}, which UTF-8 cannot hold.") from None
    if name == "__metadata__":
        raise ValueError(f"{part} has a tensor called __metadata__, a name that safetensors reserves.")


def write_tensors(file: HashedFile, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write checked tensors from any device; at most one of them is copied at a time.

    Strides are not preserved. Tensors that share a storage are written separately and loaded as separate tensors.

    Args:
        file: The file to write to.
        tensors: By name.
        notes: Text for the header, which `read_notes` returns; the metadata of safetensors.

    Raises:
        OSError: The file cannot be written.
    """
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so all are aligned
    header: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    end = 0
    for name, tensor in order:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for _, tensor in order:
        file.write(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = plain.as_strided((plain.numel(),), (1,))  # a single element is contiguous with any strides
    return flat.view(torch.uint8).numpy().data


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """Load tensors onto the CPU from the bytes of a safetensors file.

    Raises:
        ValueError: The bytes are not a safetensors file.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        loaded: dict[str, Any] = safetensors.torch.load(data)
    except (
        SafetensorError,
        KeyError,
        ValueError,
        RuntimeError,
        AssertionError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise ValueError(str(error)) from error
    return loaded


def read_notes(data: bytes) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file that `read_tensors` can load; empty without any."""
    size = int.from_bytes(data[:8], "little")
    notes: dict[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return notes
