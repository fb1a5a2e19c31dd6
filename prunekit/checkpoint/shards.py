"""The safetensors files of a model folder, and the index that says which holds what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prunekit import files
from prunekit.errors import InputError
from prunekit.tensors import Entry, Shard, read_shard
from prunekit.values import parse_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NESTED = "nested.safetensors"


def has_weights(folder: str | Path) -> bool:
    """Whether a folder has safetensors, or an index that says so."""
    return any((Path(folder) / name).is_file() for name in (INDEX, SINGLE))


class Shards:
    """The safetensors files of a model folder.

    Args:
        folder: holds ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.

    Raises:
        InputError: there is neither, a shard is missing or broken, or the index lies.

    Cost:
        The headers are read, no tensor.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / INDEX
        if index.is_file():
            self.shards = self._indexed(index)
        elif (self.folder / SINGLE).is_file():
            self.shards = [read_shard(self.folder / SINGLE)]
        else:
            raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}")
        self.entries = {entry.name: entry for shard in self.shards for entry in shard.entries}

    def _indexed(self, index: Path) -> list[Shard]:
        try:
            said = parse_json(index.read_text())["weight_map"]
            names = sorted(set(said.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: is no index: {type(error).__name__}") from None
        for name in names:
            # Names come from whoever made the checkpoint: they stay inside it.
            if not isinstance(name, str) or Path(name).name != name or not name:
                raise InputError(f"{index}: names {name!r}, which is no file of this folder")
        shards = [read_shard(self.folder / name) for name in names]
        held = {entry.name: shard.path.name for shard in shards for entry in shard.entries}
        for name, file in sorted(said.items()):
            if held.get(name) != file:
                raise InputError(f"{index}: does not fit its shards: {name} is not in {file}")
        return shards

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    @property
    def sharded(self) -> bool:
        """Whether an index says which file holds what."""
        return (self.folder / INDEX).is_file()


def write_index(folder: Path) -> None:
    """Say that a folder's weights lie in one file, unless an index says already where they lie.

    Some loaders take every safetensors file of a folder without an index for weights.
    """
    weights = Shards(folder)
    if not weights.sharded:
        total = sum(entry.size for entry in weights)
        where = {entry.name: SINGLE for entry in weights}
        files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
