"""Hooks of compiled modules.

A module's own hooks fire around its call. With other hooks, which a scheduled run would not call, the call runs as
written.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._device import DeviceContext

from rmtc.capture.translation import WHOLE_WEIGHTS, sharding
from rmtc.errors import user_level
from rmtc.stages import substage

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CAPTURING = "transformers.utils.output_capturing"  # hooks that do nothing unless the model's own code asks
_CHECKPOINTING = "make_inputs_require_grad"  # a hook of embeddings, by transformers and peft
_RECOMPUTED = "leave gradient checkpointing off, rmtc.compile(model, recompute='cells') does the same"


@substage("hooks")
def hooked(modules: Sequence[nn.Module], tables: Sequence[Mapping[int, Any]]) -> str | None:
    """Return the reason why a call must run as written because something watches or transforms it, or None.

    Args:
        modules: the submodules, for the message.
        tables: their tables of hooks, four for each.
    """
    if (general := global_hooks()) is not None:
        return general
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is active (TorchDispatchMode)"
    if torch._C._len_torch_function_stack() and any(
        not isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return "a function mode is active (TorchFunctionMode)"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode gradients are asked for (torch.autograd.forward_ad)"
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None:  # its tensors are of another level than those that a run keeps
        return f"a transform of torch.func is active ({transform.key().name.lower()})"
    if parametrize._cache_enabled:
        return "parametrized tensors are cached (torch.nn.utils.parametrize.cached)"
    if any(tables):
        for number, table in enumerate(tables):
            for hook in table.values():
                if getattr(hook, "__module__", None) != _CAPTURING:
                    module = modules[number // len(_HOOKS)]
                    name, kind = type(module).__name__, sharding(module)
                    why = f"there is a hook on a submodule ({name}), which would not be called"
                    if _CHECKPOINTING in getattr(hook, "__name__", ""):
                        return f"{why}: it is that of gradient checkpointing; remedy: {_RECOMPUTED}"
                    return f"{why}: it gathers weights for {kind}; remedy: {WHOLE_WEIGHTS}" if kind else why
    return None


def has_hooks(module: object) -> bool:
    """Tell whether a module has hooks of its own; a function has none."""
    if not isinstance(module, nn.Module):
        return False
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def global_hooks() -> str | None:
    """Return the reason why a call must run as written because hooks watch every module, or None if none does."""
    general = torch.nn.modules.module
    if general._global_forward_hooks or general._global_forward_pre_hooks:
        return "there are global forward hooks (torch.nn.modules.module)"
    if torch.is_grad_enabled() and (general._global_backward_hooks or general._global_backward_pre_hooks):
        return "there are global backward hooks (torch.nn.modules.module)"
    return None


def hook_tables(modules: Sequence[nn.Module]) -> list[Mapping[int, Any]]:
    """Return the tables of hooks of some modules, in the order :func:`hooked` expects."""
    return [getattr(module, name) for module in modules for name in _HOOKS]


class OwnNode(torch.autograd.Function):
    """One of the results of a loop, so that hooks of those that a loss does not depend on are not called."""

    @staticmethod
    def forward(ctx: Any, made: torch.Tensor) -> torch.Tensor:
        return made.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def leave_hooks_uncalled(tensors: Iterable[torch.Tensor]) -> None:
    """Keep hooks of tensors that get no gradient, and of leaves behind them, from being called in this backward pass.

    Autograd calls the hooks of all that a node leads to, with None. The code as written does not lead there. If a
    tensor gets a gradient in another way, its hooks are called. Those of ``torch.autograd.graph`` count the calls that
    they expect, and stay.
    """
    undo: list[Callable[[], object]] = []
    for each in _behind(tensors):
        hooks: dict[int, Any] = each._backward_hooks or {}
        after: dict[int, Any] = getattr(each, "_post_accumulate_grad_hooks", None) or {}
        for key, hook in hooks.items():
            if getattr(hook, "__module__", None) != torch.autograd.graph.__name__:
                hooks[key] = functools.partial(_call_with_gradient, hook)
                undo.append(functools.partial(_put_back, hooks, key, hook))
        if after:
            got: list[torch.Tensor] = []
            undo.append(each.register_hook(functools.partial(_call_with_gradient, got.append)).remove)
        for key, hook in after.items():
            after[key] = functools.partial(_call_if, got, hook)
            undo.append(functools.partial(_put_back, after, key, hook))

    def restore() -> None:
        for each in reversed(undo):  # hooks may be changed twice, for two calls of one model
            each()

    if undo:
        torch.autograd.Variable._execution_engine.queue_callback(restore)


def _behind(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield tensors, and the leaves that they were computed from."""
    nodes, seen = [], set[Any]()
    for each in tensors:
        yield each
        nodes.append(each.grad_fn)
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        nodes += [each for each, _ in node.next_functions]


def _call_with_gradient(hook: Callable[[torch.Tensor], Any], gradient: torch.Tensor | None) -> Any:
    return None if gradient is None else hook(gradient)


def _call_if(got: Sequence[torch.Tensor], hook: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> Any:
    return hook(tensor) if got else None


def _put_back(hooks: dict[int, Any], key: int, hook: Any) -> None:
    if key in hooks:
        hooks[key] = hook


def call_with_hooks(module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Fire a module's forward hooks around a call, as `nn.Module` does.

    Args:
        module: the owner of the hooks.
        call: the function that stands in for its forward.
        args, kwargs: the call's.
    """
    called: set[int] = set()
    result = None
    try:
        for key, before in list(module._forward_pre_hooks.items()):
            args, kwargs = _before(module, key, before, args, kwargs)
        result = call(*args, **kwargs)
        for key, after in list(module._forward_hooks.items()):
            called.add(key)
            result = _after(module, key, after, args, kwargs, result)
    except Exception:
        for key, after in list(module._forward_hooks.items()):
            if key in module._forward_hooks_always_called and key not in called:
                try:
                    result = _after(module, key, after, args, kwargs, result)
                except Exception as error:  # noqa: BLE001 (as nn.Module does)
                    warnings.warn(
                        "module forward hook with ``always_call=True`` raised an exception that was silenced as "
                        f"another error was raised in forward: {error}",
                        stacklevel=user_level(),
                    )
        raise
    return result


def _before(module: nn.Module, key: int, hook: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    if key in module._forward_pre_hooks_with_kwargs:
        changed = hook(module, args, kwargs)
        if changed is None:
            return args, kwargs
        if isinstance(changed, tuple) and len(changed) == 2:
            return changed
        raise RuntimeError(
            f"forward pre-hook must return None or a tuple of (new_args, new_kwargs), but got {changed}."
        )
    changed = hook(module, args)
    if changed is None:
        return args, kwargs
    return changed if isinstance(changed, tuple) else (changed,), kwargs


def _after(module: nn.Module, key: int, hook: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> Any:
    given = (args, kwargs) if key in module._forward_hooks_with_kwargs else (args,)
    changed = hook(module, *given, result)
    return result if changed is None else changed
