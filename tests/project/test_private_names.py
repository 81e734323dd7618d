"""The private names of torch that rmtc uses, and what breaks when a release of torch takes one away."""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

BREAKS: dict[str, tuple[str, ...]] = {
    "capture: what a fake tensor cannot tell is no longer refused where the code asks for it": (
        "torch.Tensor._base",
        "torch.Tensor._is_view",
    ),
    "capture: a forward can no longer be traced into a graph of operations that change nothing": (
        "torch._from_functional_tensor",
        "torch._functionalize_sync",
        "torch._C.DispatchKey.CompositeImplicitAutograd",
        "torch._dispatch.python.no_python_dispatcher",
        "torch._subclasses.functional_tensor.FunctionalTensor.metadata_fns",
        "torch._subclasses.functional_tensor.FunctionalTensorMode",
        "torch._subclasses.functional_tensor.disable_functional_mode",
        "torch._subclasses.functional_tensor.dispatch_functionalize",
        "torch.fx._lazy_graph_module._use_lazy_graph_module",
        "torch.fx.experimental.proxy_tensor._MakefxTracer",
        "torch.fx.experimental.proxy_tensor._ProxyTensor",
    ),
    "capture: tensors without values can no longer stand in for the model's own": (
        "torch.Tensor._make_subclass",
        "torch._C._DisableTorchDispatch",
        "torch._C._get_default_device",
        "torch._C._set_throw_on_mutable_data_ptr",
        "torch._C._set_warn_deprecated_on_mutable_data_ptr",
        "torch._subclasses.fake_impls.has_meta",
        "torch._subclasses.fake_impls.op_implementations_checks",
        "torch._subclasses.fake_tensor.FakeTensor.__hash__",
        "torch._subclasses.fake_tensor.FakeTensorMode.lift_fns",
        "torch._subclasses.fake_tensor.in_kernel_invocation_manager",
        "torch.utils._python_dispatch._disable_current_modes",
    ),
    "capture: transforms of torch.func inside the forward no longer show the operations that they run": (
        "torch._C._AutoDispatchBelowADInplaceOrView",
        "torch._C._ForceDispatchKeyGuard",
        "torch._C._TorchDispatchModeKey.FUNCTIONAL",
        "torch._C._TorchDispatchModeKey.PROXY",
        "torch._C._functorch.get_unwrapped",
        "torch._decomp.decomposition_table.get",
        "torch._functorch.apis",
        "torch._functorch.eager_transforms",
        "torch.nn.Module._wrapped_call_impl",
        "torch.utils._python_dispatch._push_mode",
        "torch.utils._python_dispatch._unset_infra_mode",
    ),
    "capture: two views of one tensor are no longer told from two tensors": ("torch.Tensor._cdata",),
    "capture: a tensor that was written to is no longer told from one that was not": ("torch.Tensor._version",),
    "capture: code that asks for a tensor's value is no longer refused with its line": (
        "torch._subclasses.fake_tensor.DataDependentOutputException",
        "torch._subclasses.fake_tensor.DynamicOutputShapeException",
    ),
    "kernels: causal masks are no longer recognised where nothing is launched": (
        "torch._subclasses.fake_tensor.unset_fake_temporarily",
    ),
    "capture: that parametrized tensors are cached is no longer seen": ("torch.nn.utils.parametrize._cache_enabled",),
    "training: hooks of the caller for saved tensors are no longer seen": (
        "torch._C._autograd._saved_tensors_hooks_is_enabled",
        "torch._C._autograd._top_saved_tensors_default_hooks",
    ),
    "training: hooks of what a loss does not reach are called with None": (
        "torch.autograd.Variable._execution_engine.queue_callback",
    ),
    "training: that a graph is kept for another backward pass is no longer seen": (
        "torch._C._autograd._get_current_graph_task_keep_graph",
    ),
    "capture: the modes that a call is made under are no longer seen, or kept out of the trace": (
        "torch._C._current_autograd_node",
        "torch._C._functorch.is_functorch_wrapped_tensor",
        "torch._C._functorch.peek_interpreter_stack",
        "torch._C._get_function_stack_at",
        "torch._C._is_any_autocast_enabled",
        "torch._C._len_torch_dispatch_stack",
        "torch._C._len_torch_function_stack",
        "torch.autograd.forward_ad._current_level",
        "torch.overrides._get_current_function_mode_stack",
        "torch.utils._device.DeviceContext",
    ),
    "capture: what a forward leaves of torch's settings is no longer seen, or not put back": (
        "torch._C._dispatch_key_parse",
        "torch._C.DispatchKey.PreDispatch",
        "torch._C._dispatch_tls_local_exclude_set",
        "torch._C._dispatch_tls_local_include_set",
        "torch._C._dispatch_tls_set_dispatch_key_excluded",
        "torch._C._dispatch_tls_set_dispatch_key_included",
        "torch._C._exit_dual_level",
        "torch._C._functorch.get_dynamic_layer_stack_depth",
        "torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth",
        "torch._C._get_dispatch_stack_at",
        "torch._C._is_fwd_grad_enabled",
        "torch._C._is_multithreading_enabled",
        "torch._C._pop_torch_function_stack",
        "torch._C._push_on_torch_function_stack",
        "torch._C._set_fwd_grad_enabled",
        "torch._C._set_multithreading_enabled",
        "torch._GLOBAL_DEVICE_CONTEXT",
        "torch._ops.HigherOrderOperator",
    ),
    "capture: regions of autocast and of grad mode are no longer recognised in a trace": (
        "torch._C._set_grad_enabled",
        "torch.amp.autocast_mode._enter_autocast",
        "torch.amp.autocast_mode._exit_autocast",
    ),
    "capture: replays, and guards of a model's state, no longer see that a dictionary was written to": (
        "torch._C._dynamo.guards.dict_version",
    ),
    "capture: a replay no longer answers calls of modules from memory": ("torch._C.DisableTorchFunction",),
    "capture: arguments and results in containers are no longer taken apart and put together": (
        "torch.utils._pytree.SUPPORTED_NODES",
        "torch.utils._pytree.keystr",
        "torch.utils._pytree.tree_flatten",
        "torch.utils._pytree.tree_flatten_with_path",
        "torch.utils._pytree.tree_leaves",
        "torch.utils._pytree.tree_map_only",
        "torch.utils._pytree.tree_structure",
        "torch.utils._pytree.tree_unflatten",
    ),
    "calls: a compiled module no longer runs in place of its forward, or not with its hooks": (
        "torch.Tensor._backward_hooks",
        "torch.nn.Module._backward_pre_hooks",
        "torch.nn.Module._buffers",
        "torch.nn.Module._call_impl",
        "torch.nn.Module._forward_hooks",
        "torch.nn.Module._forward_hooks_always_called",
        "torch.nn.Module._forward_hooks_with_kwargs",
        "torch.nn.Module._forward_pre_hooks",
        "torch.nn.Module._forward_pre_hooks_with_kwargs",
        "torch.nn.Module._modules",
        "torch.nn.Module._parameters",
    ),
    "calls: a call inside torch.jit.trace, or under torch.compiler.set_stance, no longer runs as before": (
        "torch._C._get_tracing_state",
        "torch._dynamo.eval_frame._stance.stance",
    ),
    "calls: guards no longer see that an argument lies otherwise in memory": (
        "torch._prims_common.is_non_overlapping_and_dense_or_false",
    ),
    "passes: operations are no longer told from other functions, nor a view that copies from one that does not": (
        "torch._ops.OpOverload",
        "torch._ops.OpOverloadPacket",
        "torch.ops.aten._unsafe_view.default",
        "torch.utils._python_dispatch.TorchDispatchMode",
    ),
    "codegen: operations are no longer printed as the functions of Python that cost least": (
        "torch._C._dispatch_has_kernel_for_dispatch_key",
        "torch._C._nn",
    ),
    "training: a graph whose bodies Inductor compiled can no longer be kept (retain_graph)": (
        "torch._functorch.config.patch",
    ),
    "codegen: the kernel of linear maps in C++ is no longer compiled": (
        "torch._inductor.codecache.CppCodeCache.load",
        "torch._inductor.codecache.CppCodeCache.load_async",
        "torch._inductor.cpp_builder.get_cpp_compiler",
        "torch._inductor.exc.InvalidCxxCompiler",
    ),
    'backend="inductor": bodies are no longer compiled once for all widths, or errors no longer recognised': (
        "torch._dynamo.exc.FailOnRecompileLimitHit",
        "torch._dynamo.exc.TorchDynamoException",
        "torch._dynamo.mark_dynamic",
    ),
}
"""Names by what breaks without them."""


@functools.cache
def used() -> dict[str, set[str]]:
    """The private names in the package's sources, without those that lead to others, and the files that use them."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "rmtc").rglob("*.py")):
        for name in _names(ast.parse(file.read_text())):
            if any(_private(part) for part in name.split(".")):
                found.setdefault(name, set()).add(file.relative_to(ROOT).as_posix())
    return {name: files for name, files in found.items() if not any(each.startswith(name + ".") for each in found)}


def _private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def _names(tree: ast.Module) -> Iterator[str]:
    """Names in torch that a module imports or reaches, and private attributes of tensors and modules."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                known[each.asname or each.name.partition(".")[0]] = (
                    each.name if each.asname else each.name.split(".")[0]
                )
                yield from [each.name] if each.name.startswith("torch.") else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            for each in node.names:
                known[each.asname or each.name] = f"{node.module}.{each.name}"
                yield f"{node.module}.{each.name}"
    module = torch.nn.Module()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        parts, value = [node.attr], node.value
        while isinstance(value, ast.Attribute):
            parts.append(value.attr)
            value = value.value
        if isinstance(value, ast.Name) and known.get(value.id, "").partition(".")[0] == "torch":
            yield ".".join([known[value.id], *reversed(parts)])
        elif _private(node.attr) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            if hasattr(torch.Tensor, node.attr):
                yield f"torch.Tensor.{node.attr}"
            elif hasattr(module, node.attr):
                yield f"torch.nn.Module.{node.attr}"


def resolved(name: str) -> Any:
    """What a name stands for."""
    parts = name.split(".")
    if parts[:3] == ["torch", "nn", "Module"]:
        return functools.reduce(getattr, parts[3:], torch.nn.Module())
    for count in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[count:], value)
    raise AssertionError(name)


def test_the_list_is_whole() -> None:
    listed = [name for names in BREAKS.values() for name in names]
    assert len(listed) == len({*listed})
    assert {*listed} == used().keys()


@pytest.mark.parametrize(("name", "what"), [(name, what) for what, names in BREAKS.items() for name in names])
def test_a_private_name_of_torch_is_there(name: str, what: str) -> None:
    try:
        resolved(name)
    except (AttributeError, ModuleNotFoundError):
        files = ", ".join(sorted(used().get(name, ())))
        pytest.fail(f"torch {torch.__version__} has no {name} any more. What breaks: {what} ({files})")
