"""A Triton driver without a GPU: kernels are compiled for a real one and launched nowhere.

Everything before the hardware is Triton's own: arguments are bound and specialised, a kernel is compiled when its cache
has none that fits, and the launcher gets what a real one would get.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class FakeDriver(DriverBase):
    """A GPU of compute capability 8.9 (RTX 4090).

    Attributes:
        launches: how often each kernel was launched since the last ``clear``.
        compiled: names of kernels in the order in which they were compiled and loaded.
        grids: kernel -> (grid, arguments) of its last launch.
    """

    #: No real GPU has this number, so that what is compiled here is in no cache of one.
    DEVICE = 4090

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.compiled: list[str] = []
        self.last: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 101_376, "multiprocessor_count": 128},
            load_binary=self._load,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """The launcher of one compiled kernel."""
        name = metadata.name

        def launch(x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
            assert function == name and min(x, y, z) > 0
            self.launches[name] += 1
            self.last[name] = (x, y, z), rest[4:]  # after two kinds of metadata and two hooks

        return launch

    def _load(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        assert device == self.DEVICE and kernel
        self.compiled.append(name)
        return object(), name, 32, 0, 1024

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 89, 32)

    def get_current_device(self) -> int:
        return self.DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "void*"

    def get_active_torch_device(self) -> Any:
        raise AssertionError("nothing asks for a torch device")

    def get_benchmarker(self) -> Any:
        raise AssertionError("nothing is measured without a GPU")
