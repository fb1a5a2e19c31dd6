"""Generated text in documents: between its markers, and nowhere else."""

import pytest

from bench.markers import between, rewrite
from prunekit.errors import InputError

MARKED = "before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n"


def test_the_text_replaces_what_was_between_the_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(MARKED)
    for _ in range(2):
        rewrite(path, "a", "new\n")
    assert path.read_text() == MARKED.replace("old", "new")


@pytest.mark.parametrize(
    "document",
    [
        "no markers",
        MARKED.replace("<!-- a:end -->", ""),
        MARKED + MARKED,
        "<!-- a:end --><!-- a:begin -->",
        MARKED.replace("a:", "b:"),
    ],
)
def test_a_document_without_one_place_for_it_is_refused(tmp_path, document):
    path = tmp_path / "page.md"
    path.write_text(document)
    with pytest.raises(InputError, match=r"page.md: expected .* once each and in this order"):
        rewrite(path, "a", "text")
    assert path.read_text() == document
    with pytest.raises(InputError):
        between(document, "a", "text")
