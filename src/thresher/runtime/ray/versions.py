"""Whether the nodes of a cluster have the versions of this machine."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import threadpoolctl

from thresher.errors import UsageError


def check_versions(nodes: Iterable[tuple[Mapping[str, Any], dict[str, str]]]) -> None:
    """Refuse nodes with another version of thresher, and warn of other products.

    Args:
        nodes: The nodes, and what :func:`about` returns there.

    Raises:
        UsageError: A node has another version of thresher.
    """
    own = about(None)
    for node, there in nodes:
        where = f"node {node['NodeManagerAddress']}"
        if there["thresher"] != own["thresher"]:
            raise UsageError(
                f"{where} has thresher {there['thresher']}, this machine {own['thresher']}; install the same version"
            )
        if there != own:
            theirs, ours = (", ".join(f"{name} {value}" for name, value in one.items()) for one in (there, own))
            warnings.warn(
                f"{where} has {theirs}; this machine has {ours}: the last bits of products may differ", stacklevel=2
            )


def about(_: None) -> dict[str, str]:
    """Return what the bits of a result depend on."""
    import numpy as np

    from thresher import __version__

    blas = {info.get("architecture", "") for info in threadpoolctl.threadpool_info() if info["user_api"] == "blas"}
    return {"thresher": __version__, "numpy": np.__version__, "kernels": " ".join(sorted(blas - {""}))}
