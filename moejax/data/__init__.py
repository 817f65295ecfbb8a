"""Text: corpora with leak-free splits, tokenizer, token stores, batches, evaluation windows."""

from moejax.data.batches import Batch, Batches
from moejax.data.corpus import (
    HELDOUT_BYTES,
    SPLITS,
    Corpus,
    Document,
    Split,
    heldout_documents,
    heldout_text,
    split_of,
)
from moejax.data.folder_corpus import FolderCorpus
from moejax.data.folder_tokenizer import folder_tokenizer, write_folder_tokenizer
from moejax.data.gguf_tokenizer import gguf_tokenizer
from moejax.data.heldout import HeldoutSample, ReferenceHeldout, write_heldout_sample
from moejax.data.pip_corpus import GROUPS, PipCorpus
from moejax.data.python_topics import PythonTopics
from moejax.data.store import GroupFacts, TokenStore, tokenize_corpus
from moejax.data.tokenizer import (
    END_OF_DOCUMENT,
    Tokenizer,
    balanced_texts,
    shipped_tokenizer,
    train_tokenizer,
)
from moejax.data.windows import EvalBatch, windows
from moejax.data.xz_baseline import MOST_PRIMING_BYTES, xz_bits_per_byte

__all__ = [
    "END_OF_DOCUMENT",
    "GROUPS",
    "HELDOUT_BYTES",
    "MOST_PRIMING_BYTES",
    "SPLITS",
    "Batch",
    "Batches",
    "Corpus",
    "Document",
    "EvalBatch",
    "FolderCorpus",
    "GroupFacts",
    "HeldoutSample",
    "PipCorpus",
    "PythonTopics",
    "ReferenceHeldout",
    "Split",
    "TokenStore",
    "Tokenizer",
    "balanced_texts",
    "folder_tokenizer",
    "gguf_tokenizer",
    "heldout_documents",
    "heldout_text",
    "shipped_tokenizer",
    "split_of",
    "tokenize_corpus",
    "train_tokenizer",
    "windows",
    "write_folder_tokenizer",
    "write_heldout_sample",
    "xz_bits_per_byte",
]
