"""Files from the Hugging Face Hub: ``hf-hub:ORG/REPO[@REVISION]``, on the command line only.

A repository holds either a file of this format or dense weights with timm's ``config.json``. Files
come through huggingface_hub into its cache. A file can name its base, a bare file name, which is
then fetched from the repository the user named; no other address ever comes from a file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from randsurgery.errors import FileFormatError, UsageError, reason
from randsurgery.format.checkpoint import is_checkpoint, parse_recipe
from randsurgery.format.container import Container
from randsurgery.format.shards import CONFIG
from randsurgery.surgery.bases import Config, read_config

PREFIX = "hf-hub:"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Address:
    """A repository on the Hub, at a revision (a branch, tag or commit; None: its main branch)."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return PREFIX + self.repo


def parse_address(text: str) -> Address:
    """``hf-hub:ORG/REPO[@REVISION]``. Raises UsageError."""
    found = re.fullmatch(r"hf-hub:(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", text, re.ASCII)
    if found is None:
        raise UsageError(f"{text!r} is no Hub address, expected hf-hub:ORG/REPO[@REVISION]")
    return Address(found[1], found[2])


def fetch(address: Address, name: str) -> Path:
    """One file of a repository, in the Hub's cache. Raises FileFormatError if it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(address.repo, name, revision=address.revision))
    except Exception as error:  # network, missing repository or file, no permission
        at = f" at {address.revision}" if address.revision else ""
        raise FileFormatError(
            f"{address}{at}: {name} cannot be fetched ({reason(error)})"
        ) from None


def local_file(name: str) -> str:
    """The path itself, or that of a Hub repository's weights, bases fetched beside them."""
    if not name.startswith(PREFIX):
        return name
    address = parse_address(name)
    path = fetch(address, WEIGHTS)
    with Container(path) as file:
        if not is_checkpoint(file):
            return str(path)
        recipe = parse_recipe(file.metadata["randsurgery"], path.name)
    for ref in recipe.bases.values():
        if ref.file is not None:
            fetch(address, ref.file)
    return str(path)


def holds_checkpoint(path: str) -> bool:
    """True if the file is one of this format."""
    with Container(path) as file:
        return is_checkpoint(file)


def config_of(address: Address) -> Config:
    """What timm's ``config.json`` says. Raises FileFormatError if it names no architecture."""
    config = read_config(fetch(address, CONFIG))
    if config.architecture is None:
        raise FileFormatError(f"{address}: {CONFIG} names no architecture of timm")
    return config
