"""A peer's public names, replaced by ours in a running process, and put back.

A peer that is installed is imported as ever and its names are then replaced, in the modules that are loaded already and
in those that are loaded while the patch holds; where it is not installed, our modules stand in its place.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from .._checks import describe

_HERE = Path(__file__).parent
_MISSING = object()
_PACKAGES = {"sit": "transport"}  # of peers whose package has another name than ours


def _peers() -> list[str]:
    """Those that have a module here."""
    names = (path.stem for path in _HERE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())
    return sorted(name for name in names if not name.startswith("_"))


def _mirror(name: str) -> ModuleType | None:
    """Our module of a peer's module, imported."""
    top, dot, rest = name.partition(".")
    ours = {package: peer for peer, package in _PACKAGES.items()}.get(top, top)
    name = ours + dot + rest
    path = _HERE.joinpath(*name.split("."))
    if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
        return importlib.import_module(f"{__package__}.{name}")
    return None


def _import_mirrors(peer: str) -> None:
    """Imports all our modules of a peer, before its own are replaced; where one that they need is missing, fewer."""
    path = _HERE / peer
    files = sorted(path.rglob("*.py")) if path.is_dir() else []
    names = [".".join(file.relative_to(_HERE).with_suffix("").parts).removesuffix(".__init__") for file in files]
    with contextlib.suppress(ImportError):
        for name in names or [peer]:
            importlib.import_module(f"{__package__}.{name}")


def _public(module: ModuleType) -> dict[str, Any]:
    return {name: getattr(module, name) for name in module.__all__}


class _Replaced(Loader):
    """Loads a module as its own loader does, then replaces its names."""

    def __init__(self, loader: Loader, patch: Patch) -> None:
        self.loader, self.patch = loader, patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.patch._replace(module)

    def __getattr__(self, name: str) -> Any:  # get_source, is_package and what else importlib asks for
        return getattr(self.loader, name)


class _InPlace(Loader):
    """One of ours, under a peer's name."""

    def __init__(self, ours: ModuleType) -> None:
        self.ours = ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        own = {name: value for name, value in vars(self.ours).items() if not name.startswith("__")}
        module.__dict__.update(own, __doc__=self.ours.__doc__, __all__=list(self.ours.__all__))


class Patch(MetaPathFinder):
    """What :func:`patch` did; :meth:`undo`, or the end of a ``with`` block, takes it back."""

    def __init__(self, peers: Sequence[str]) -> None:
        self.peers = tuple(peers)
        self._saved: list[tuple[ModuleType, str, Any]] = []
        self._added: list[str] = []
        self._theirs: dict[int, Any] = {}  # by what of ours, which our modules keep alive, stands in its place
        self._searching: set[str] = set()
        for peer in self.peers:
            _import_mirrors(peer)  # which may load the peer
        for name in sorted(sys.modules):
            module = sys.modules[name]
            if self._is_peers(name) and isinstance(module, ModuleType):
                self._replace(module)
        sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """For the import system."""
        if not self._is_peers(fullname) or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        except (ImportError, ValueError):
            spec = None
        finally:
            self._searching.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Replaced(spec.loader, self)
            return spec
        ours = _mirror(fullname)
        if ours is None:
            return None
        self._added.append(fullname)
        return ModuleSpec(fullname, _InPlace(ours), is_package=hasattr(ours, "__path__"))

    def undo(self) -> None:
        """Puts the peers' own names back, those of modules loaded meanwhile too. More than once does nothing more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for module, name, value in reversed(self._saved):
            if value is _MISSING:
                module.__dict__.pop(name, None)
            else:
                setattr(module, name, value)
        for name in reversed(self._added):
            module = sys.modules.pop(name, None)
            parent, _, child = name.rpartition(".")
            if parent in sys.modules and getattr(sys.modules[parent], child, None) is module:
                delattr(sys.modules[parent], child)
        self._saved, self._added = [], []

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _is_peers(self, name: str) -> bool:
        return name.partition(".")[0] in {_PACKAGES.get(peer, peer) for peer in self.peers}

    def _replace(self, module: ModuleType) -> None:
        ours = _mirror(module.__name__)
        for name, value in {} if ours is None else _public(ours).items():
            before = module.__dict__.get(name, _MISSING)
            if before is value:  # from a module of the peer's that is replaced already
                before = self._theirs.get(id(value), value)
            else:
                self._theirs[id(value)] = before
            self._saved.append((module, name, before))
            setattr(module, name, value)


def patch(*peers: str) -> Patch:
    """Replaces peers' public names by ours::

        with fmkernels.compat.patch("torchcfm"):
            from torchcfm.conditional_flow_matching import ConditionalFlowMatcher  # ours

        patched = fmkernels.compat.patch("torchdiffeq")  # from here on
        patched.undo()

    Modules of a peer that are loaded get our names too, so that ``torchcfm.ConditionalFlowMatcher`` is ours; a name
    that a script has bound before (``from torchcfm import X``) stays what it is. Patches of one peer end in the reverse
    order of their beginning. Where a peer is not installed, its modules that we mirror can be imported all the same.

    Args:
        peers: names of modules of :mod:`fmkernels.compat`, which are those of the peers' packages, but for "sit", whose
            package is ``transport``; all of them if none is given.

    Raises:
        ValueError: a peer that there is no drop-in for.
    """
    known = _peers()
    for name in peers:
        if name not in known:
            raise ValueError(f"peers: expected names of {', '.join(known)}, got {describe(name)}")
    return Patch(peers or known)
