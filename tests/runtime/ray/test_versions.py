"""Whether the nodes of a cluster have the versions of this machine."""

from __future__ import annotations

import warnings

import pytest

from thresher import UsageError, __version__
from thresher.runtime.ray.versions import about, check_versions

NODE = {"NodeManagerAddress": "10.0.0.7"}


def test_another_version_of_thresher_is_refused_and_of_numpy_is_a_warning() -> None:
    own = about(None)
    assert own["thresher"] == __version__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions([(NODE, own), (NODE, dict(own))])
    with pytest.raises(UsageError, match=f"^node 10.0.0.7 has thresher 0.0.1, this machine {__version__}; install the"):
        check_versions([(NODE, own), (NODE, {**own, "thresher": "0.0.1"})])
    with pytest.warns(UserWarning, match=r"node 10.0.0.7 has .*numpy 1.0.*the last bits of products may differ"):
        check_versions([(NODE, {**own, "numpy": "1.0"})])
