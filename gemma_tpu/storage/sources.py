"""From the name that a user gives to the Source behind it: a local folder, a bucket, or the Hugging Face Hub."""

import re
from pathlib import Path

from gemma_tpu.storage.hub import HubSource
from gemma_tpu.storage.remote import BucketSource, LocalSource, Source, restore_url


def open_source(where: str | Path) -> Source:
    """A local folder, gs:// or s3:// (any URL of fsspec), or hf://org/name[@revision]. A bare name is a folder: a
    mistyped path must not become a question to the network."""
    text = restore_url(where)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://", text)
    if scheme is None:
        return LocalSource(Path(text).expanduser())
    return HubSource(text) if scheme[1] == "hf" else BucketSource(text)


def local_folder(where: str | Path) -> Path:
    """The folder on this machine with the config and tokenizer of a checkpoint, wherever its weights lie."""
    return open_source(where).local_files()
