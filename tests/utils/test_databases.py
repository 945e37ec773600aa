import pytest

from autopeft.utils.databases import is_in_memory


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite://", True),
        ("sqlite:///", True),
        ("sqlite:///:memory:", True),
        ("sqlite+pysqlite:///:memory:", True),
        ("SQLITE:///:memory:", True),
        ("sqlite:///file::memory:?cache=shared&uri=true", True),
        ("sqlite:///file:a?mode=memory&uri=true", True),
        ("sqlite:///study.db", False),
        ("sqlite:////tmp/study.db?timeout=3", False),
        ("study.db", False),
        ("postgresql://me@host/memory", False),
    ],
)
def test_only_what_ends_with_its_connection_is_in_memory(url: str, expected: bool) -> None:
    assert is_in_memory(url) is expected
