"""An fx tracer that refuses what no graph can hold, instead of keeping one answer to it.

A value that is traced has no type, length or truth that code could ask for; what leaves no node,
such as a context manager or a random number, is noticed from the side.
"""

import dis
import inspect
import operator
import os
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import SUPPORTED_NODES, tree_leaves

from sepconv.nn import SeparableConv2d

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_TORCH, _PYTHON = (f"{Path(str(module.__file__)).parent}{os.sep}" for module in (torch, os))
# Whose questions about types are not the model's.
_TORCHS_OWN = tuple(_TORCH + name for name in ("fx", "nn", "overrides.py", "utils"))
# Random numbers for each element of a tensor.
DRAWS_LIKE = {
    torch.bernoulli,
    torch.multinomial,
    torch.normal,
    torch.poisson,
    torch.rand_like,
    torch.randint_like,
    torch.randn_like,
    Tensor.bernoulli_,
    Tensor.cauchy_,
    Tensor.exponential_,
    Tensor.geometric_,
    Tensor.log_normal_,
    Tensor.normal_,
    Tensor.random_,
    Tensor.uniform_,
}
_DRAWING_METHODS = {function.__name__ for function in DRAWS_LIKE}

_ASKING = {"isinstance", "__class__", "_abc_instancecheck"}
_DECORATORS = f"{_TORCH}utils{os.sep}_contextlib.py"  # of `@torch.no_grad()` and the like
_WITH = {"BEFORE_WITH", "BEFORE_ASYNC_WITH", "LOAD_SPECIAL"}  # the last from Python 3.14 on
# Whose answers are of the moment.
_MOMENTARY = {"is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled"}


class RefusedError(Exception):
    """A forward that no graph can stand for, and why."""


class _Proxy(fx.Proxy):
    """Records `x += y` as the write that it is; fx's own proxy makes `x = x + y` of it.

    Then other names of the same tensor would keep the old value.
    """

    tracer: "ModuleTracer"

    @property  # type: ignore[misc]  # which a class may have
    def __class__(self) -> type:
        """`isinstance` reads this, where `type()` is not what it asked for."""
        if _asks_type(sys._getframe(1)):
            self.tracer.refuse("asks for the type of a value")
        return type(self)

    def __getattr__(self, name: str) -> "_Attribute":
        if not hasattr(Tensor, name):
            self._take_apart()
        return _Attribute(self, name)

    def __getitem__(self, index: Any) -> Any:
        if type(index) in (int, str):
            self._take_apart()
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def __iter__(self) -> Any:
        self._take_apart()
        return super().__iter__()

    def _take_apart(self) -> None:
        """Parts of what is not known may be None, and code may ask; a proxy never is."""
        if self.node in self.tracer.unknown:
            self.tracer.refuse("takes apart what code that was not traced returns")

    def __len__(self) -> int:
        self.tracer.refuse("asks for the length of a value")
        return super().__len__()


class _Attribute(_Proxy, fx.proxy.Attribute):
    """An attribute of a value; one that is not used was a question (`hasattr`)."""

    def __init__(self, root: _Proxy, attr: str) -> None:
        super().__init__(root, attr)
        # Every value that a graph holds is taken to have what tensors have.
        if not hasattr(Tensor, attr):
            self.tracer.unused[id(self)] = (self, self.tracer.path())

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """Of the read."""
        self.tracer.unused.pop(id(self), None)
        return super().node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.tracer.unused.pop(id(self), None)
        return super().__call__(*args, **kwargs)


def _asks_type(frame: FrameType) -> bool:
    """Whether code that reads `__class__` is the model's own question, not a function's check."""
    code = frame.f_code
    if code.co_filename.startswith(_TORCHS_OWN):
        return False
    asked = dis.opname[code.co_code[frame.f_lasti]] == "MATCH_CLASS"
    return asked or not _ASKING.isdisjoint(code.co_names)


def _record_in_place(name: str) -> None:
    target = getattr(operator, name)

    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    setattr(_Proxy, f"__{name}__", method)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    _record_in_place(f"i{_name}")


class ModuleTracer(fx.Tracer):
    """Traces down to convolutions, and notes the innermost module that no graph can stand for.

    Args:
        opaque: Names of modules to take as leaves.
        fixed: Arguments of the root's forward that are not traced but have these values.

    Attributes:
        failed: Name of that module, the root's being empty; None if there is none.
        why: What its forward does.
        unused: Attributes of values that were asked for and not used so far, and where.
        unknown: Results of leaves that are other people's code.
        constants: Names in the root under which constants of its code were put.
    """

    def __init__(
        self, opaque: Collection[str] = (), fixed: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.opaque, self.fixed = opaque, fixed or {}
        self.failed: str | None = None
        self.why = ""
        self.unused: dict[int, tuple[_Attribute, str]] = {}
        self.unknown: set[fx.Node] = set()
        self.constants: set[str] = set()
        self._random = _random_state()
        self._seen: set[int] = set()  # code without such; by `id`, as its hash takes long

    def path(self) -> str:
        """The name of the module whose forward is running."""
        return next(reversed(self.module_stack.values()))[0] if self.module_stack else ""

    def refuse(self, why: str, path: str | None = None) -> None:
        """Note what a forward does that no graph can hold."""
        if self.failed is None:
            self.failed, self.why = self.path() if path is None else path, why

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Trace; raises whatever the model's code raises, and `RefusedError`."""
        with _noting_questions(self):
            graph = super().trace(root, concrete_args)
        for attribute, path in self.unused.values():
            self.refuse(f"asks whether a value has .{attribute.attr}", path)
        self._raise_if_refused()
        return graph

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """A placeholder for each argument that is not fixed."""
        given: dict[str, Any] = {}
        for name, parameter in inspect.signature(self.root.forward).parameters.items():
            if name in self.fixed:
                given[name] = self.fixed[name]
            elif parameter.kind not in VARIADIC:
                given[name] = self.create_proxy("placeholder", name, (), {})
        return partial(self._forward, self.root, (), given), []

    def _forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module's own code."""
        before = _attributes(module)
        result = module.forward(*args, **kwargs)
        after = _attributes(module)
        for name in {**before, **after}.keys() - self.constants:
            if before.get(name) is not after.get(name):
                self.refuse(f"writes to self.{name}")
        if _random_state() != self._random:
            self.refuse("draws random numbers")
        for part in tree_leaves(result):
            if issubclass(type(part), dict | list):
                self.refuse(f"makes a {type(part).__name__}")
        self._raise_if_refused()
        return result

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Look at the code that asks for it, up to the root's forward."""
        if target in DRAWS_LIKE or (kind == "call_method" and target in _DRAWING_METHODS):
            self.refuse("draws random numbers")
        frame, why = sys._getframe(1), None
        while frame.f_code is not ModuleTracer.trace.__code__:
            if frame.f_code is ModuleTracer._forward.__code__ and why is not None:
                self.refuse(why, self.path_of_module(frame.f_locals["module"]))
                break
            if id(frame.f_code) not in self._seen:
                why = why or _asks_for_more(frame.f_code)
                if why is None:
                    self._seen.add(id(frame.f_code))
            assert frame.f_back is not None, "trace() is running"
            frame = frame.f_back
        return super().create_node(kind, target, *args, **kwargs)

    def _raise_if_refused(self) -> None:
        if self.failed is not None:
            raise RefusedError(self.why)

    def get_fresh_qualname(self, prefix: str) -> str:
        """A name for a constant, which will be set in the root."""
        name = super().get_fresh_qualname(prefix)
        self.constants.add(name)
        return name

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Proxies that answer no questions."""
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse, even if the model's code catches the error."""
        self.refuse("asks for the truth of a value")
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Any:
        """The same."""
        self.refuse("iterates over a value")
        return super().iter(obj)

    def create_arg(self, a: Any) -> Any:
        """A container of a class of its own is made anew, as pytree knows how to."""
        kind = type(a)
        if issubclass(kind, dict | list) and kind not in (dict, list):
            if kind not in SUPPORTED_NODES:
                raise RefusedError(f"makes a {kind.__name__}")
            values, context = SUPPORTED_NODES[kind].flatten_fn(a)
            name = self.get_fresh_qualname("_container")
            setattr(self.root, name, (kind, context))
            args = (self.create_arg(values), self.create_node("get_attr", name, (), {}))
            return self.create_node("call_function", made_anew, args, {})
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Convolutions of any class are leaves: a subclass's own forward is not ours to open."""
        return (
            module_qualified_name in self.opaque
            or isinstance(m, _ConvNd | SeparableConv2d)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a module's code without its hooks, and note the innermost whose code fails."""
        try:
            own = partial(self._forward, m)
            result = super().call_module(m, lambda *a, **k: own(a, k), args, kwargs)
            if not type(m).__module__.startswith(("torch.nn.", "sepconv.nn.")):
                leaf = self.is_leaf_module(m, self.path_of_module(m))
                self.unknown.update([result.node] if leaf else [])
            return result
        except Exception as error:
            self.refuse(said(error), self.path_of_module(m))
            raise


def made_anew(values: list[Any], how: tuple[type, Any]) -> Any:
    """A container of a class that pytree knows, in a graph."""
    kind, context = how
    return SUPPORTED_NODES[kind].unflatten_fn(values, context)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What an assignment to `self` changes."""
    return {**vars(module), **module._parameters, **module._buffers, **module._modules}


def _random_state() -> tuple[Any, ...]:
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    _, key, position, *_ = np.random.get_state()
    drawn = [state.numpy().tobytes() for state in (torch.get_rng_state(), *on_gpu)]
    return random.getstate(), np.asarray(key).tobytes(), position, *drawn


@cache
def _asks_for_more(code: CodeType) -> str | None:
    """What a function around an operation does that leaves no node in a graph, or None."""
    if _is_library(code):
        return None
    enters = any(instruction.opname in _WITH for instruction in dis.get_instructions(code))
    return "enters a context manager" if enters else None


@contextmanager
def _noting_questions(tracer: ModuleTracer) -> Iterator[None]:
    """Have the model's code refused that asks in which mode it runs."""

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*args: Any) -> Any:
            if not _is_library(sys._getframe(1).f_code):
                tracer.refuse(f"asks {name}()")
            return function(*args)

        return answer

    functions = {name: getattr(torch, name) for name in _MOMENTARY}
    for name, function in functions.items():
        setattr(torch, name, noting(name, function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(torch, name, function)


def _is_library(code: CodeType) -> bool:
    """Whether a function is torch's or Python's own."""
    file = code.co_filename
    if file.startswith((_TORCH, "<")):
        return file != _DECORATORS
    return file.startswith(_PYTHON) and "-packages" not in file


def said(error: Exception) -> str:
    """Why tracing stopped, in one line."""
    text = str(error) if isinstance(error, RefusedError) else f"{type(error).__name__}: {error}"
    return text.split("\n")[0]
