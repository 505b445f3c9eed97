"""Builds fmkernels._C with CMake and ninja; everything else stands in pyproject.toml.

Environment: FMKERNELS_CUDA=on|off|auto, FMKERNELS_CUDA_ARCHITECTURES="80;90" (numbers), CMAKE_ARGS, MAX_JOBS.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def version() -> str:
    text = (ROOT / "fmkernels" / "version.py").read_text()
    found = re.search(r'__version__ = "([^"]+)"', text)
    if found is None:
        raise RuntimeError("fmkernels/version.py: expected __version__, got none")
    return found.group(1)


class CMakeBuild(build_ext):
    """Configures and builds with CMake in build/, then copies the module to where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # An isolated build's tools vanish with their environment; a cache that names them would break the next build.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "FMKERNELS_VERSION": version(),
            "FMKERNELS_TESTS": "OFF",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        for name in ("FMKERNELS_CUDA", "FMKERNELS_CUDA_ARCHITECTURES"):
            if os.environ.get(name):
                options[name] = os.environ[name]
        ninja = shutil.which("ninja")
        configure = ["cmake", "-S", str(ROOT), "-B", str(build)]
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure += [f"-D{name}={value}" for name, value in options.items()]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        built = next(build.glob("_C*.so"), None) or next(build.glob("_C*.pyd"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)
        self.tell(built)

    def tell(self, built: Path) -> None:
        """Says what was built, by asking the module itself."""
        code = (
            "import importlib.util as u, sys; s = u.spec_from_file_location('_C', sys.argv[1]); "
            "m = u.module_from_spec(s); s.loader.exec_module(m); "
            "print('fmkernels._C:', m.build_info(), 'CUDA:', m.cuda_architectures() or 'none', 'ISA:', m.isa())"
        )
        subprocess.run([sys.executable, "-c", code, str(built)], check=True)


setup(version=version(), ext_modules=[Extension("fmkernels._C", [])], cmdclass={"build_ext": CMakeBuild})
