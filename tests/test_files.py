"""Writers leave the old state or the new, never a half, and no litter."""

import os
import subprocess
import sys

import pytest
import torch

from prunekit import files
from prunekit.errors import InputError


class Killed(BaseException):
    pass


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(Killed), files.replacing_file(path) as temporary:
        temporary.write_text("half")
        raise Killed
    assert files.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "model"
    with files.replacing_folder(path) as folder:
        (folder / "a").write_text("old")
        (folder / files.MODEL_MARKER).touch()
    with pytest.raises(Killed), files.replacing_folder(path, force=True) as folder:
        (folder / "a").write_text("half")
        raise Killed
    assert (path / "a").read_text() == "old"
    with files.replacing_folder(path, force=True) as folder:
        (folder / "b").write_text("new")
    assert os.listdir(path) == ["b"]
    assert os.listdir(tmp_path) == ["model"]


def test_what_a_killed_writer_left_is_cleared_away_by_the_next(tmp_path):
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    for place, owner in (("gone", int(gone.stdout)), ("here", os.getpid())):
        left = tmp_path / f"{files._remains(tmp_path / 'a.json')}{owner}-{place}"
        left.write_text("half")
    files.write_json(tmp_path / "a.json", {})
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2
    assert left[0].endswith("here")  # its writer still lives


def test_a_folder_in_use_needs_force(tmp_path):
    (tmp_path / "a").write_text("precious")
    with pytest.raises(InputError, match=r"exists and is not empty; .* --force"):
        files.check_output_folder(tmp_path, force=False)
    with pytest.raises(InputError, match="--force replaces model folders alone"):
        files.check_output_folder(tmp_path, force=True)
    with pytest.raises(InputError, match="is a file; give a folder"):
        files.check_output_folder(tmp_path / "a", force=True)
    with pytest.raises(InputError, match="cannot be written"):
        files.check_output_file(tmp_path / "a" / "b")
    with pytest.raises(InputError, match="is a folder; give the name of a file"):
        files.check_output_file(tmp_path)


def test_tensors_and_header_survive(tmp_path):
    path = tmp_path / "t.safetensors"
    tensor = torch.arange(6).view(2, 3).T
    files.write_tensors(path, {"t": tensor}, "kind", {"note": "ü"})
    tensors, header = files.read_tensors(path, "kind")
    assert torch.equal(tensors["t"], tensor)
    assert header["note"] == "ü"
    with pytest.raises(InputError, match="is kind version 1, expected other version 1"):
        files.read_tensors(path, "other")


def test_digest_depends_on_content_and_not_on_key_order():
    assert files.digest({"a": 1, "b": 2}) == files.digest({"b": 2, "a": 1})
    assert files.digest({"a": 1}) != files.digest({"a": 2})
