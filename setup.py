"""The native operators are compiled when the package is built; without a C++ compiler it is built without them."""

import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_CPU = Path("plugins") / "cpu"


class BuildNative(build_ext):
    """Compile the operator library with the package's own toolchain; it is no Python module."""

    def build_extension(self, ext: Extension) -> None:
        """Compile, or say why there will be no library."""
        toolchain = runpy.run_path(str(_CPU / "toolchain.py"))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            toolchain["compile_library"](output)
        except toolchain["CompileError"] as error:
            print(f"no native operators: {error}", file=sys.stderr)
            # An empty file would be copied and found: leave nothing.
            output.unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        """The library's own name, without Python's suffix; of a dotted name, the path."""
        folders = fullname.split(".")[:-1]
        return str(Path(*folders, runpy.run_path(str(_CPU / "toolchain.py"))["BUILT"].name))

    def get_outputs(self) -> list[str]:
        """Only what was made."""
        return [name for name in super().get_outputs() if Path(name).exists()]


setup(
    ext_modules=[Extension("plugins.cpu.libquasar_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
