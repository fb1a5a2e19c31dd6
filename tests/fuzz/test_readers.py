"""Every reader answers hostile input with what it read or one line: found by hypothesis."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import FRAMED, KINDS
from tests.fuzz.readers import READERS, header_of, with_header

FOUND = Path(__file__).parent / "found"
SETTINGS = settings(
    max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


def places(value, path=()):
    """The path of everything in a JSON value, itself included."""
    yield path
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*path, key))


def changed(value, path, new):
    """A copy of a JSON value in which something else stands at a path; nothing, for ``del``."""
    if not path:
        return new
    copy = value.copy()
    if len(path) == 1 and new is del_:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


del_ = object()


def mutated(draw, value):
    path = draw(st.sampled_from(sorted(places(value), key=str)))
    new = draw(VALUES) if not path or draw(st.booleans()) else del_
    return changed(value, path, new)


def test_every_kind_of_file_has_a_reader():
    assert tuple(READERS) == KINDS


@pytest.mark.parametrize("name", READERS)
def test_what_is_whole_is_read(name):
    assert READERS[name](READERS[name].seed())


@pytest.mark.parametrize("name", FRAMED)
@SETTINGS
@given(data=st.data())
def test_headers_of_other_values(name, data):
    whole = READERS[name].seed()
    READERS[name](with_header(whole, mutated(data.draw, header_of(whole))))


@SETTINGS
@given(data=st.data())
def test_records_of_other_values(data):
    record = json.loads(READERS["record"].seed())
    READERS["record"](json.dumps(mutated(data.draw, record)).encode())


@pytest.mark.parametrize("name", READERS)
@SETTINGS
@given(data=st.data())
def test_bytes_changed_cut_and_added(name, data):
    whole = bytearray(READERS[name].seed())
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, min(len(whole), 2000)))
        bytes_ = data.draw(st.binary(max_size=12))
        gone = data.draw(st.integers(0, 12))
        whole[where : where + gone] = bytes_
    READERS[name](bytes(whole[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))]))


@pytest.mark.parametrize("name", ["record", "jsonl", *FRAMED])
def test_values_nested_too_deep(name):
    deep = "[" * 100_000
    whole = READERS[name].seed()
    assert not READERS[name](with_header(whole, deep) if name in FRAMED else deep.encode())


def test_arrays_nested_too_deep_in_gguf():
    key = b"\x01\0\0\0\0\0\0\0a\x09\0\0\0"
    deep = b"\x09\0\0\0\x01\0\0\0\0\0\0\0" * 5000
    head = b"GGUF\x03\0\0\0" + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    assert not READERS["gguf"](head + key + deep)


@pytest.mark.parametrize(
    "path", sorted(FOUND.glob("*/*")), ids=lambda p: f"{p.parent.name}-{p.name}"
)
def test_what_the_fuzzer_found(path):
    READERS[path.parent.name](path.read_bytes())
