"""Every name of TensorRT's and CUDA's Python API that is used exists in the bindings, which cannot run here.

The wheel with TensorRT's bindings has no library behind it; functions that do nothing let it be imported, so that its
classes can be looked at.
"""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda.bindings import driver

ROOT = Path(__file__).parents[3]
TENSORRT = ROOT / "engines" / "tensorrt"
# What our code calls a thing → the class it is, as far as TensorRT's API is used on it.
CLASSES = {
    "module": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "errors[0]": "ParserError",
    "layer": "ILayer",
    "tensor": "ITensor",
    "made": "IBuilderConfig",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "registry": "IPluginRegistry",
    "inspector": "EngineInspector",
    "config": "IRuntimeConfig",
    "cache": "IRuntimeCache",
    "flags": "BuilderFlag",
}
FILES = ("builder.py", "network.py", "loading.py", "library.py", "bindings.py", "session.py", "inspector.py")
# TensorRT-RTX alone has these: ahead-of-time targets, and the cache of what it compiles when a plan first runs.
RTX_ALONE = {"ComputeCapability", "IRuntimeCache.deserialize", "IRuntimeCache.serialize"} | {
    f"IRuntimeConfig.{name}"
    for name in ("create_runtime_cache", "set_runtime_cache", "dynamic_shapes_kernel_specialization_strategy")
}
RTX_ALONE |= {"DynamicShapesKernelSpecializationStrategy", "BuilderFlag.REQUIRE_USER_ALLOCATION"}
# Used where a library has it, by a name in quotes.
RTX_QUOTED = ["IExecutionContext.is_stream_capturable", "DynamicShapesKernelSpecializationStrategy.NONE"]


def names_used():
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse((TENSORRT / file).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            owner = ast.unparse(node.value)
            owner = owner.rsplit(".", 1)[-1]
            if owner in CLASSES and not node.attr.startswith("_"):
                found.add(f"{CLASSES[owner]}.{node.attr}".removeprefix("."))
    return found


def test_the_names_are_found():
    used = names_used()
    for name in (
        "Builder.create_network",
        "ICudaEngine.get_aliased_input_tensor",
        "IExecutionContext.execute_async_v3",
    ):
        assert name in used
    assert {"Runtime", "LayerType", "IProgressMonitor", "ExecutionContextAllocationStrategy"} <= used
    assert len(used) > 40


def missing_in(module, names):
    def has(name):
        owner, _, attribute = name.rpartition(".")
        return hasattr(getattr(module, owner, None) if owner else module, attribute)

    return sorted(name for name in names if not has(name))


def test_tensorrt_rtx_has_them():
    import tensorrt_rtx

    assert missing_in(tensorrt_rtx, [*names_used(), *RTX_QUOTED]) == []


STUB = """
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
int initLibNvInferPlugins(void) { return 1; }
"""

LOOK = """
import json, sys
import tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
names = json.load(sys.stdin)
def has(name):
    owner, _, attribute = name.rpartition(".")
    return hasattr(getattr(tensorrt_bindings, owner, None) if owner else tensorrt_bindings, attribute)
print(json.dumps([tensorrt_bindings.__version__, [name for name in names if not has(name)]]))
"""

REGISTER = """
import sys
from types import SimpleNamespace
import tensorrt_bindings as tensorrt
sys.modules["tensorrt"] = tensorrt
import tensorrt_bindings.plugin
sys.modules["tensorrt.plugin"] = tensorrt_bindings.plugin
sys.modules["tensorrt.plugin._lib"] = tensorrt_bindings.plugin._lib
tensorrt.plugin = tensorrt_bindings.plugin
tensorrt.__name__ = "tensorrt"
# The registry behind get_plugin_registry is one of the functions that do nothing.
tensorrt_bindings.plugin._lib._register_plugin_creator = lambda *arguments: None
from plugins.gpu.tensorrt_plugin import LINEAR, QUANTIZE, register
register(tensorrt, "8.9")
register(tensorrt, "8.9")
registry = tensorrt_bindings.plugin._lib.QDP_REGISTRY
for name in (QUANTIZE, LINEAR):
    plugin = registry[name]
    print(plugin.plugin_id, plugin.input_tensor_names, plugin.num_outputs, plugin.aot_impl_func is not None)
"""


# TensorRT's own expressions over numbers: what it does with the library's builder when it compiles a plan.
LAUNCH = (
    REGISTER
    + """
import operator
from tensorrt_bindings.plugin import ShapeExprs, TensorDesc
from tensorrt_bindings.plugin._tensor import SymIntExpr
kinds = tensorrt.DimensionOperation
functions = {kinds.PROD: operator.mul, kinds.SUM: operator.add, kinds.CEIL_DIV: lambda a, b: -(-a // b)}
class Number:
    def __init__(self, value, known=True):
        self.value, self.known = value, known
    def is_constant(self):
        return self.known
    def get_constant_value(self):
        assert self.known
        return self.value
class Builder:
    constant = staticmethod(Number)
    @staticmethod
    def operation(kind, a, b):
        return Number(functions[kind](a.value, b.value), a.known and b.known)
SymIntExpr._exprBuilder = Builder
# Only the library makes objects of that class.
tensorrt.IDimensionExpr = Number
def tensor(kind, *shape, unknown=None):
    desc = TensorDesc(ShapeExprs.from_tuple(shape), kind)
    if unknown is not None:
        desc.shape_expr[unknown]._int_expr.known = False
    return desc
FLOAT, INT8 = tensorrt.float32, tensorrt.int8
def numbers(exprs):
    return [expr._expr.value for expr in exprs]
def launch(name, *inputs):
    outputs = registry[name].register_func(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    entry, ptx, params, arguments = registry[name].aot_impl_func(*inputs, outputs, 0)
    grid = numbers((params.grid_x, params.grid_y, params.grid_z, params.block_x))
    known = params.grid_x._expr.known
    shapes = [numbers(output.shape_expr) for output in outputs]
    print(entry, shapes, grid, known, numbers(arguments), f".entry {entry}(" in ptx)
launch(QUANTIZE, tensor(FLOAT, 1, 33, 576, unknown=1))
def linear(q=INT8, inputs=576, weight=(3, 5, 64, 128), unknown=1, bias=(130,)):
    given = tensor(q, 1, 33, inputs, unknown=unknown), tensor(FLOAT, 1, 33, 1, unknown=1), tensor(INT8, *weight)
    try:
        launch(LINEAR, *given, tensor(FLOAT, 130), tensor(FLOAT, *bias))
    except ValueError as error:
        print(error)
linear()
linear(q=FLOAT)
linear(inputs=568)
linear(weight=(3, 4, 64, 128))
linear(unknown=2)
linear(bias=(1, 130))
"""
)


@pytest.fixture(scope="module")
def run_with_stubs(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("needs a C compiler and the wheel tensorrt-cu13-bindings")
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "stub.c").write_text(STUB)
    major = (ROOT / "constraints.txt").read_text().split("tensorrt_cu13_bindings==")[1].split(".")[0]
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        library = folder / f"lib{name}.so.{major}"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "stub.c"], check=True)

    def run(code, given=""):
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=given,
            env={"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_tensorrt_has_them(run_with_stubs):
    version, missing = json.loads(run_with_stubs(LOOK, json.dumps(sorted(names_used() - RTX_ALONE))))
    assert int(version.split(".")[0]) >= 10
    assert missing == []
    # The look does see what is not there.
    _, missing = json.loads(run_with_stubs(LOOK, json.dumps(["ICudaEngine.get_aliased_output", "NoSuchClass"])))
    assert missing == ["ICudaEngine.get_aliased_output", "NoSuchClass"]


def test_the_quick_plugins_are_accepted_by_tensorrts_own_checks(run_with_stubs):
    # What the registry that does nothing makes TensorRT print comes first.
    assert run_with_stubs(REGISTER).splitlines()[-2:] == [
        "quasar::quantize_per_token ['x'] 2 True",
        "quasar::integer_linear ['q', 'a', 'weight', 'scale', 'bias'] 1 True",
    ]


def test_the_quick_plugins_launch_what_their_shapes_need(run_with_stubs):
    """Or refuse in a sentence: 33 tokens, which TensorRT knows when it runs, of 576 inputs to 130 outputs."""
    plugin = "quasar::integer_linear takes"
    assert run_with_stubs(LAUNCH).splitlines()[-7:] == [
        "quantize_per_token [[1, 33, 576], [1, 33, 1]] [33, 1, 1, 128] False [576, 576] True",
        "integer_linear [[1, 33, 130]] [2, 3, 1, 128] False [33, 576, 130] True",
        f"{plugin} q as DataType.INT8 with 3 axes; DataType.FLOAT with 3 came",
        f"{plugin} a multiple of 16 inputs; 568 came",
        f"{plugin} a weight packed in [3, 5, 64, 128]; [3, 4, 64, 128] came",
        f"{plugin} inputs that are known when the plan is compiled",
        f"{plugin} bias as DataType.FLOAT with 1 axes; DataType.FLOAT with 2 came",
    ]


def test_cuda_python_has_what_is_used():
    used = set()
    for node in ast.walk(ast.parse((TENSORRT.parent / "gpu" / "driver.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("driver", "self._driver"):
            used.add(node.attr)
    assert {"cuInit", "cuGraphInstantiate", "cuLaunchKernel"} <= used
    assert len(used) > 25
    assert [name for name in sorted(used) if not hasattr(driver, name)] == []
    for name in (
        *("CUresult.CUDA_ERROR_OUT_OF_MEMORY", "CUresult.CUDA_ERROR_NO_DEVICE"),
        *("CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "CUstream_flags.CU_STREAM_NON_BLOCKING"),
        *("CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL",),
        *("CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",),
        *("CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT",),
        *("CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION",),
        *("CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES",),
    ):
        owner, attribute = name.split(".")
        assert hasattr(getattr(driver, owner), attribute)
