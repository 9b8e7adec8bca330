"""Thread pools are found once, and again when modules were imported; limits hold inside and end outside."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import threadpoolctl

from thresher.runtime.process import matrix_kernels, one_blas_thread, thread_pools


def blas_threads() -> set[int]:
    return {int(one["num_threads"]) for one in threadpoolctl.threadpool_info() if one["user_api"] == "blas"}


def test_libraries_are_looked_at_again_only_after_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_nothing_else.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = thread_pools()
    assert thread_pools() is found
    importlib.import_module("of_nothing_else")
    try:
        assert thread_pools() is not found
    finally:
        del sys.modules["of_nothing_else"]


def test_kernels_are_those_of_all_libraries() -> None:
    found = {one.get("architecture", "") for one in threadpoolctl.threadpool_info()}
    assert matrix_kernels() == sorted(found - {""})


def test_blas_has_one_thread_inside_and_as_many_as_before_outside() -> None:
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        for _ in range(2):  # the second time with the libraries of the first
            with one_blas_thread:
                assert blas_threads() == {1}
            assert blas_threads() == before
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        before = blas_threads()
        with one_blas_thread, one_blas_thread:
            assert blas_threads() == {1}
        assert blas_threads() == before != {1}
