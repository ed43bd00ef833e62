"""A CUDA device through cuda-python's driver API: memory, one stream, graphs and kernels. No torch, no pycuda."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from engines.gpu.device import Bytes, Gpu, LoadedKernel, OutOfMemoryError, array_at
from plugins.gpu.variants import TRITON_TYPES
from quasar.errors import EngineError

_INSTALL = "run pip install 'quasar-verifier[cuda]'"
# Shared memory of a program that a kernel may have without asking for it: 48 KiB, of which 1 may be the system's.
_SHARED_WITHOUT_ASKING = 47 << 10
# Triton gives every kernel two more pointers after its own arguments, for scratch memory that ours do not use.
_SCRATCH_POINTERS = (0, 0)
_NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, TRITON_TYPES["float32"]: ctypes.c_float}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSearch:
    """The GPU that was found, or the reason why there is none."""

    found: Gpu | None
    reason: str


def find_gpu(index: int = 0) -> GpuSearch:
    """Look for a GPU without allocating anything on it."""
    try:
        driver = _driver()
        device = _call(driver, driver.cuDeviceGet(index))
        return GpuSearch(found=_describe(driver, device), reason="")
    except EngineError as error:
        return GpuSearch(found=None, reason=str(error))


class CudaDevice:
    """The primary context of one GPU, a stream of its own, and everything that was allocated through it."""

    def __init__(self, index: int = 0) -> None:
        """Take the GPU; raises `EngineError` without cuda-python, a driver that is new enough, or a GPU."""
        self._driver = _driver()
        self._device = self._call(self._driver.cuDeviceGet(index))
        self.gpu = _describe(self._driver, self._device)
        self._allocated: list[Any] = []
        self._host: list[int] = []
        self._modules: list[Any] = []
        self._stream: Any = None
        self._context = self._call(self._driver.cuDevicePrimaryCtxRetain(self._device))
        try:
            self._enter()
            self._stream = self._call(
                self._driver.cuStreamCreate(int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
            )
        except BaseException:
            self.close()
            raise

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    @property
    def multiprocessors(self) -> int:
        """How many there are."""
        attribute = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        return int(self._call(self._driver.cuDeviceGetAttribute(attribute, self._device)))

    @property
    def free_bytes(self) -> int:
        """Device memory that nobody uses."""
        self._enter()
        return int(self._call(self._driver.cuMemGetInfo())[0])

    def allocate(self, size: int) -> int:
        """The address of zeroed device memory; raises `OutOfMemoryError`."""
        self._enter()
        status, address = self._driver.cuMemAlloc(max(size, 1))
        if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemoryError(f"{size} bytes do not fit the GPU, of which {self.free_bytes} are free")
        self._call((status,))
        self._allocated.append(address)
        self._call(self._driver.cuMemsetD8Async(address, 0, max(size, 1), self._stream))
        return int(address)

    def pinned(self, size: int) -> Bytes:
        """Zeroed page-locked host memory."""
        self._enter()
        address = int(self._call(self._driver.cuMemAllocHost(max(size, 1))))
        self._host.append(address)
        array = array_at(address, size)
        array[:] = 0
        return array

    def upload(self, address: int, source: Bytes) -> None:
        """Copy to the device, in the stream's order."""
        self._enter()
        self._call(self._driver.cuMemcpyHtoDAsync(address, source.ctypes.data, source.nbytes, self._stream))

    def download(self, target: Bytes, address: int) -> None:
        """Copy from the device, in the stream's order."""
        self._enter()
        self._call(self._driver.cuMemcpyDtoHAsync(target.ctypes.data, address, target.nbytes, self._stream))

    def synchronize(self) -> None:
        """Wait for the stream; an error of earlier work shows here."""
        self._enter()
        self._call(self._driver.cuStreamSynchronize(self._stream))

    def begin_capture(self) -> None:
        """Record the stream from now on. Other threads may go on allocating."""
        self._enter()
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call(self._driver.cuStreamBeginCapture(self._stream, mode))

    def end_capture(self) -> "CudaGraph":
        """The recorded work, ready to launch."""
        self._enter()
        graph = self._call(self._driver.cuStreamEndCapture(self._stream))
        try:
            executable = self._call(self._driver.cuGraphInstantiate(graph, 0))
        finally:
            self._driver.cuGraphDestroy(graph)
        return CudaGraph(self, executable)

    def abandon_capture(self) -> None:
        """End a recording that failed: the stream runs again."""
        self._enter()
        status, graph = self._driver.cuStreamEndCapture(self._stream)
        if status == self._driver.CUresult.CUDA_SUCCESS and graph is not None and int(graph):
            self._driver.cuGraphDestroy(graph)

    def load_kernel(
        self, image: bytes, entry: str, *, threads: int, shared_bytes: int, types: Sequence[str]
    ) -> LoadedKernel:
        """A kernel from a cubin."""
        self._enter()
        module = self._call(self._driver.cuModuleLoadData(image))
        self._modules.append(module)
        handle = self._call(self._driver.cuModuleGetFunction(module, entry.encode()))
        if shared_bytes > _SHARED_WITHOUT_ASKING:
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call(self._driver.cuFuncSetAttribute(handle, attribute, shared_bytes))
        return LoadedKernel(handle=handle, threads=threads, shared_bytes=shared_bytes, types=tuple(types))

    def launch(
        self, kernel: LoadedKernel, grid: tuple[int, ...], arguments: Sequence[int | float], *, overlap: bool = False
    ) -> None:
        """Run a kernel on the stream. `overlap`: it may start before the kernel before it has ended (9.0 and above)."""
        self._enter()
        values, types = (*arguments, *_SCRATCH_POINTERS), _argument_types(kernel.types)
        x, y, z = (*grid, 1, 1)[:3]
        if overlap:
            self._launch_overlapping(kernel, (x, y, z), (values, types))
            return
        self._call(
            self._driver.cuLaunchKernel(
                kernel.handle, x, y, z, kernel.threads, 1, 1, kernel.shared_bytes, self._stream, (values, types), 0
            )
        )

    def _launch_overlapping(self, kernel: LoadedKernel, grid: tuple[int, int, int], arguments: tuple[Any, Any]) -> None:
        """Programmatic dependent launch: the kernel waits for the one before it where its own code says so."""
        driver = self._driver
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
        config.sharedMemBytes, config.hStream = kernel.shared_bytes, self._stream
        config.attrs, config.numAttrs = [attribute], 1
        self._call(driver.cuLaunchKernelEx(config, kernel.handle, arguments, 0))

    def launch_graph(self, executable: Any) -> None:
        """Put a recorded graph on the stream."""
        self._enter()
        self._call(self._driver.cuGraphLaunch(executable, self._stream))

    def destroy_graph(self, executable: Any) -> None:
        """Free a recorded graph."""
        self._enter()
        self._driver.cuGraphExecDestroy(executable)

    def close(self) -> None:
        """Wait for the stream, free everything, and let go of the GPU."""
        if self._context is None:
            return
        driver = self._driver
        driver.cuCtxSetCurrent(self._context)
        if self._stream is not None:
            driver.cuStreamSynchronize(self._stream)
        for module in self._modules:
            driver.cuModuleUnload(module)
        for address in self._allocated:
            driver.cuMemFree(address)
        for host in self._host:
            driver.cuMemFreeHost(host)
        if self._stream is not None:
            driver.cuStreamDestroy(self._stream)
        driver.cuDevicePrimaryCtxRelease(self._device)
        self._context = self._stream = None
        self._modules, self._allocated, self._host = [], [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _enter(self) -> None:
        """Contexts are current per thread: whoever calls may be another thread than the one that made this."""
        if self._context is None:
            raise EngineError("this GPU session is closed: load the engine again")
        self._call(self._driver.cuCtxSetCurrent(self._context))

    def _call(self, result: tuple[Any, ...]) -> Any:
        return _call(self._driver, result)


class CudaGraph:
    """A captured CUDA graph."""

    def __init__(self, device: CudaDevice, executable: Any) -> None:
        self._device = device
        self._executable = executable

    def launch(self) -> None:
        """Put it on the stream."""
        self._device.launch_graph(self._executable)

    def close(self) -> None:
        """Free it."""
        if self._executable is not None:
            self._device.destroy_graph(self._executable)
            self._executable = None


@cache
def _argument_types(names: tuple[str, ...]) -> tuple[Any, ...]:
    """The types of a kernel's arguments for ctypes, from Triton's words for them; scratch pointers come last."""
    own = (ctypes.c_void_p if name.startswith("*") else _NUMBERS[name] for name in names)
    return (*own, *(ctypes.c_void_p for _ in _SCRATCH_POINTERS))


def _driver() -> Any:
    """cuda-python's driver module, initialized; raises `EngineError` saying what is missing."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise EngineError(f"cuda-python is not installed: {_INSTALL}") from None
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError:  # what cuda-python's errors for a missing library or function derive from
        raise EngineError("there is no NVIDIA driver on this machine") from None
    if status == driver.CUresult.CUDA_ERROR_NO_DEVICE:
        raise EngineError("there is no NVIDIA GPU in this machine, or CUDA_VISIBLE_DEVICES hides it")
    if status == driver.CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH:
        raise EngineError("the NVIDIA driver's kernel module and its libraries differ in version: reboot")
    _call(driver, (status,))
    return driver


def _describe(driver: Any, device: Any) -> Gpu:
    attribute = driver.CUdevice_attribute
    major, minor = (
        _call(driver, driver.cuDeviceGetAttribute(which, device))
        for which in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    name = _call(driver, driver.cuDeviceGetName(128, device))
    version = int(_call(driver, driver.cuDriverGetVersion()))
    return Gpu(
        name=bytes(name).split(b"\0")[0].decode(),
        compute_capability=f"{major}.{minor}",
        driver=f"{version // 1000}.{version % 1000 // 10}",
    )


def _call(driver: Any, result: tuple[Any, ...]) -> Any:
    """The values that follow a driver call's status; raises `EngineError` with CUDA's own words."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        said = bytes(text).decode() if text else "no further word"
        raise EngineError(f"CUDA reports {status.name}: {said}")
    return values[0] if len(values) == 1 else tuple(values)
