"""Whether nodes can read files of this machine; a node is this process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from thresher import UnreachedError
from thresher.runtime.ray.files import check_readable, size_on_disk, unreadable

NODE = {"NodeManagerAddress": "10.0.0.7"}


def test_files_that_are_missing_or_others_are_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1_234))
    (tmp_path / "folder").mkdir()
    sizes = [(str(path), size_on_disk(str(path))) for path in (tmp_path / "file", tmp_path / "folder")]
    assert [size for _, size in sizes] == [1_234, -1]
    assert unreadable(sizes) == []
    (tmp_path / "file").write_bytes(bytes(9))
    (tmp_path / "folder").rmdir()
    assert unreadable(sizes) == [
        (str(tmp_path / "file"), "it has 9 bytes there, and 1,234 here"),
        (str(tmp_path / "folder"), "No such file or directory"),
    ]


def test_the_message_names_the_first_file_the_node_and_how_many_others() -> None:
    check_readable([(NODE, []), (NODE, [])])
    for count, others in ((1, ""), (2, ", and 1 other file"), (1_235, ", and 1,234 other files")):
        wrong = [(f"/data/{i}", "why") for i in range(count)]
        with pytest.raises(
            UnreachedError, match=re.escape(f"/data/0: cannot be read on node 10.0.0.7 (why){others}; put")
        ):
            check_readable([(NODE, []), (NODE, wrong)])
