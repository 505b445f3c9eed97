"""A peer's names replaced and put back, where it is installed and where it is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fmkernels import compat


def run(code: str, path: Path | None = None) -> None:
    """In a process of its own, where the peer is what ``path`` holds, or is not there."""
    head = "import sys\n" + (f"sys.path.insert(0, {str(path)!r})\n" if path else "")
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A package of torchcfm's name with names of its own."""
    package = tmp_path / "torchcfm"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("from .conditional_flow_matching import *\nversion = 'theirs'\n")
    (package / "conditional_flow_matching.py").write_text("class ConditionalFlowMatcher: pass\nclass Other: pass\n")
    (package / "optimal_transport.py").write_text("class OTPlanSampler: pass\n")
    (package / "models" / "__init__.py").write_text("class Net: pass\n")
    return tmp_path


def test_modules_that_are_loaded_later(peer: Path) -> None:
    run(
        """
import fmkernels.compat, fmkernels.compat.torchcfm as ours
with fmkernels.compat.patch("torchcfm"):
    import torchcfm
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher, Other
    from torchcfm.models import Net
    assert ConditionalFlowMatcher is torchcfm.ConditionalFlowMatcher is ours.ConditionalFlowMatcher
    assert torchcfm.version == "theirs" and Other.__module__ == "torchcfm.conditional_flow_matching"
assert torchcfm.ConditionalFlowMatcher is not ours.ConditionalFlowMatcher
assert torchcfm.conditional_flow_matching.ConditionalFlowMatcher is torchcfm.ConditionalFlowMatcher
assert not hasattr(torchcfm.conditional_flow_matching, "pad_t_like_x")  # which this peer does not have
import torchcfm.optimal_transport, importlib
assert torchcfm.optimal_transport.OTPlanSampler.__module__ == "torchcfm.optimal_transport"
""",
        peer,
    )


def test_modules_that_are_loaded_already(peer: Path) -> None:
    run(
        """
import torchcfm, fmkernels.compat, fmkernels.compat.torchcfm as ours
theirs = torchcfm.ConditionalFlowMatcher
patched = fmkernels.compat.patch("torchcfm")
assert torchcfm.ConditionalFlowMatcher is ours.ConditionalFlowMatcher
with fmkernels.compat.patch("torchcfm"):
    assert torchcfm.ConditionalFlowMatcher is ours.ConditionalFlowMatcher
assert torchcfm.ConditionalFlowMatcher is ours.ConditionalFlowMatcher
patched.undo()
patched.undo()
assert torchcfm.ConditionalFlowMatcher is theirs
""",
        peer,
    )


def test_a_peer_that_is_not_installed(tmp_path: Path) -> None:
    run(
        """
import fmkernels.compat, fmkernels.compat.torchcfm.optimal_transport as ours
class Hidden:
    # stands for the finders of files, which do not find the peer
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "torchcfm" else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
with fmkernels.compat.patch("torchcfm"):
    import torchcfm
    from torchcfm.optimal_transport import OTPlanSampler
    from torchcfm import *
    assert OTPlanSampler is ours.OTPlanSampler and ConditionalFlowMatcher is torchcfm.ConditionalFlowMatcher
    try:
        import torchcfm.models
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError
assert "torchcfm" not in sys.modules and "torchcfm.optimal_transport" not in sys.modules
try:
    import torchcfm
except ModuleNotFoundError:
    pass
else:
    raise AssertionError
"""
    )


def test_unknown_peers() -> None:
    with pytest.raises(ValueError, match=r"peers: expected names of .*torchcfm.*, got 'nobody'"):
        compat.patch("nobody")
