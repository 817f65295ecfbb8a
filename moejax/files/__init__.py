"""Files: fetched assets, shipped resources, safetensors, GGUF and the content-addressed cache."""

from moejax.files.assets import ASSETS, AssetSource, extract_member, fetch
from moejax.files.cache import cache_root, content_hash, sha256_of_file
from moejax.files.gguf import GGUF, GGUFTensor
from moejax.files.resources import find_resource
from moejax.files.tensors import (
    TensorHeader,
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
    "GGUFTensor",
    "TensorHeader",
    "cache_root",
    "check_finite",
    "content_hash",
    "extract_member",
    "fetch",
    "find_resource",
    "read_safetensors",
    "safetensors_header",
    "safetensors_metadata",
    "sha256_of_file",
    "write_safetensors",
]
