"""Files: fetched assets, shipped resources, safetensors, GGUF and the content-addressed cache."""

from moejax.files.assets import ASSETS, AssetSource, extract_member, fetch
from moejax.files.cache import cache_root, content_hash, sha256_of_file
from moejax.files.folders import new_folder
from moejax.files.gguf import GGUF, GGUFTensor
from moejax.files.header import TensorHeader, read_header
from moejax.files.resources import find_resource
from moejax.files.scaled import as_floats
from moejax.files.stored import FileTensor, StoredTensor, StoredTensors, open_tensors
from moejax.files.tensors import (
    check_finite,
    read_safetensors,
    safetensors_header,
    safetensors_metadata,
    write_safetensors,
)

__all__ = [
    "ASSETS",
    "GGUF",
    "AssetSource",
    "FileTensor",
    "GGUFTensor",
    "StoredTensor",
    "StoredTensors",
    "TensorHeader",
    "as_floats",
    "cache_root",
    "check_finite",
    "content_hash",
    "extract_member",
    "fetch",
    "find_resource",
    "new_folder",
    "open_tensors",
    "read_header",
    "read_safetensors",
    "safetensors_header",
    "safetensors_metadata",
    "sha256_of_file",
    "write_safetensors",
]
