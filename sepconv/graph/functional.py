"""Functional convolution calls: found in the source of the forward that makes them, replaced there.

Only the call changes. The rest of the forward stays the user's own code, which reads attributes,
modes and globals when it runs, and so does the call: as soon as it is no longer the convolution
that was converted, it computes what it says, with the dense weight. What tracing would fix is
therefore not fixed; and the parameters that move into the separable layer can still be asked for.
"""

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, cast

from torch import Tensor, fx, nn

from sepconv.graph.calls import ARGUMENTS, SPATIAL_DIMS, spread
from sepconv.graph.extend import extended
from sepconv.nn.weight import SettableProperties

# A forward of these alone does the same each time: no branch, loop, region or function of its own.
_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return, ast.Pass)
_BRANCHES = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
_LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def can_rewrite(owner: nn.Module, weight: str, bias: str | None = None) -> bool:
    """Whether the call that convolves with `weight` can be replaced in the forward of `owner`.

    Args:
        owner: The module whose forward makes the call.
        weight: The name of its parameter.
        bias: Likewise, None where the call adds no parameter.

    The forward must be a straight line, without decorators, whose source can be had; it must pass
    the parameters to one call of a convolution, and no other code of the class may name them.
    """
    names = [name for name in (weight, bias) if name is not None]
    kind = _original(owner)
    if isinstance(owner, fx.GraphModule):
        # It is its graph: no code of its own, and the attributes that the graph reads.
        bare = all(
            type(owner.get_submodule(name.rpartition(".")[0])) in (nn.Module, type(owner))
            for name in names
        )
        return bare and not any(_mentions(kind, name.rpartition(".")[2]) for name in names)
    if any(name not in owner._parameters or _mentions(kind, name) != 1 for name in names):
        return False
    tree = _straight_forward(owner)
    call = None if tree is None else _call_of(tree, weight)
    if tree is None or call is None or _convolution(call, tree, owner) is None:
        return False
    given = _by_name(call)
    return bias is None or _is_read(given.get("bias"), tree, bias)


def rewrite_forward(owner: nn.Module, children: Mapping[str, str]) -> None:
    """Make children of `owner` run in the place of the calls that `can_rewrite` accepted.

    The class of `owner` becomes a subclass of its own, so that `isinstance`, methods and hooks
    stay; in it the parameters that moved into the children are properties, to be read and assigned.

    Args:
        owner: Has the children already, and the parameters still.
        children: The name of the child by that of the weight.
    """
    tree = _straight_forward(owner)
    assert tree is not None, "match() offers only forwards that can be rewritten"
    moved = dict(getattr(type(owner), "_sepconv_moved", {}))
    for weight, child in children.items():
        call = _call_of(tree, weight)
        assert call is not None, "likewise"
        moved[weight] = child, "weight"
        bias = _by_name(call).get("bias")
        moved |= {
            name: (child, "bias")
            for name, parameter in owner._parameters.items()
            if parameter is not None and _is_read(bias, tree, name)
        }
        _replace(call, tree, child)
    for name in moved:
        owner._parameters.pop(name, None)
    owner.__class__ = _subclass(_original(owner), ast.unparse(tree), moved)


def _original(owner: nn.Module) -> type[nn.Module]:
    """The class that the user wrote."""
    return getattr(type(owner), "_sepconv_original", type(owner))


def _subclass(
    original: type[nn.Module], source: str, moved: Mapping[str, tuple[str, str]]
) -> type[nn.Module]:
    """A subclass with the forward of the given source.

    Args:
        original: The class that the user wrote.
        source: Of the function.
        moved: Names that stand for an attribute of a child: (child, attribute).
    """
    members = {
        "_sepconv_original": original,
        "_sepconv_source": source,
        "_sepconv_moved": moved,
        "_sepconv_call": staticmethod(_convolve),
        "forward": _function(source, original.forward),
        **{name: _property(*path) for name, path in moved.items()},
    }
    return extended(original, members, (_subclass, source, moved), (SettableProperties,))


def _property(child: str, attribute: str) -> property:
    def read(self: nn.Module) -> Any:
        return getattr(getattr(self, child), attribute)

    def write(self: nn.Module, value: Any) -> None:
        setattr(getattr(self, child), attribute, value)

    return property(read, write)


def _convolve(convolution: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """What stands in the place of a call: its separable layer, while it is that convolution.

    Args:
        convolution: What the call names.
        *args: Its arguments, the separable layer standing for the weight.
        **kwargs: Likewise.
    """
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given = {**defaults, **dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    separable, bias = given["weight"], given["bias"]
    dims = len(separable.kernel_size)
    settings = tuple(spread(given[name], dims) for name in ("stride", "padding", "dilation"))
    same = settings == (separable.stride, separable.padding, separable.dilation)
    # A bias that the call does not add may have come with calibration.
    same = same and given["groups"] == 1 and (bias is None or bias is separable.bias)
    if same and SPATIAL_DIMS.get(convolution) == dims:
        return cast(Tensor, separable(given["input"]))
    args = tuple(separable.weight if value is separable else value for value in args)
    if "weight" in kwargs:
        kwargs["weight"] = separable.weight
    y = convolution(*args, **kwargs)
    own = separable.bias if bias is None else None
    return y if own is None else y + own.view(-1, *[1] * dims)


# The source of a forward


def _straight_forward(owner: nn.Module) -> ast.FunctionDef | None:
    """The forward of `owner`, its defaults and annotations left out; None if it is not straight."""
    forward = type(owner).forward
    if not isinstance(forward, FunctionType) or "forward" in vars(owner):
        return None
    source = getattr(type(owner), "_sepconv_source", None)
    try:
        (tree,) = ast.parse(source or textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        return None
    inner = list(ast.walk(ast.Module(tree.body, [])))[1:]
    if any(
        isinstance(node, _BRANCHES + _LOOPS)
        or (isinstance(node, ast.stmt) and not isinstance(node, _STATEMENTS))
        for node in inner
    ):
        return None
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    tree.returns = None
    tree.args.defaults, tree.args.kw_defaults = [], [None] * len(tree.args.kwonlyargs)
    # A wrapper, a file that was edited since, a private name: the source is not what runs.
    runs, read = forward.__code__, _function(ast.unparse(tree), forward).__code__
    return tree if _marks(runs) == _marks(read) else None


def _marks(code: CodeType) -> tuple[Any, ...]:
    """What tells functions apart. Not the instructions: the rest of a file has a say in those."""
    # Nor the texts: a docstring stands indented in its file.
    numbers = [repr(value) for value in code.co_consts if not isinstance(value, str)]
    return code.co_names, code.co_varnames, code.co_freevars, numbers


def _function(source: str, like: Callable[..., Any]) -> FunctionType:
    """A function of that source with the globals and the defaults of another."""
    assert isinstance(like, FunctionType)
    namespace: dict[str, Any] = {}
    exec(compile(source, f"<rewritten {like.__qualname__}>", "exec"), like.__globals__, namespace)
    made: FunctionType = namespace["forward"]
    made.__defaults__, made.__kwdefaults__ = like.__defaults__, like.__kwdefaults__
    made.__qualname__ = like.__qualname__
    return made


def _call_of(tree: ast.FunctionDef, weight: str) -> ast.Call | None:
    """The call that is given `self.<weight>` as a convolution is given its weight."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [call for call in calls if _is_read(_by_name(call).get("weight"), tree, weight)]
    return found[0] if len(found) == 1 else None


def _by_name(call: ast.Call) -> dict[str, ast.expr]:
    """The arguments by the names that a convolution gives them; empty where some are unpacked."""
    keywords = {k.arg: k.value for k in call.keywords if k.arg is not None}
    unpacked = any(isinstance(argument, ast.Starred) for argument in call.args)
    if unpacked or len(keywords) < len(call.keywords):
        return {}
    return dict(zip(ARGUMENTS, call.args, strict=False)) | keywords


def _is_read(node: ast.expr | None, tree: ast.FunctionDef, name: str) -> bool:
    """Whether a node is `self.<name>`."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id == _self(tree)
    )


def _self(tree: ast.FunctionDef) -> str:
    return [*tree.args.posonlyargs, *tree.args.args][0].arg


def _convolution(call: ast.Call, tree: ast.FunctionDef, owner: nn.Module) -> Any:
    """The function of torch that the call names now, or None."""
    names = ast.unparse(call.func).split(".")
    found: Any = type(owner).forward.__globals__.get(names[0])
    try:
        value = functools.reduce(getattr, names[1:], owner if names[0] == _self(tree) else found)
        return value if value in SPATIAL_DIMS else None
    except (AttributeError, TypeError):
        return None


def _replace(call: ast.Call, tree: ast.FunctionDef, child: str) -> None:
    """`f(x, self.weight, ...)` becomes `self._sepconv_call(f, x, self.<child>, ...)`."""
    weight = _by_name(call)["weight"]
    assert isinstance(weight, ast.Attribute)
    weight.attr = child
    call.args.insert(0, call.func)
    call.func = ast.Attribute(ast.Name(_self(tree), ast.Load()), "_sepconv_call", ast.Load())


def _mentions(kind: type[nn.Module], name: str) -> int:
    """How often the code of a class names an attribute; `__init__` and torch's classes apart."""
    own = [k for k in kind.__mro__ if not k.__module__.startswith("torch.")]
    values = [value for k in own for key, value in vars(k).items() if key != "__init__"]
    return sum(
        instruction.argval == name
        and ("_ATTR" in instruction.opname or instruction.opname in ("LOAD_METHOD", "LOAD_CONST"))
        for value in values
        for code in _codes(value)
        for instruction in dis.get_instructions(code)
    )


def _codes(value: Any) -> Iterator[CodeType]:
    """The code of what may stand in a class, and of the functions in it."""
    inner: tuple[Any, ...] = ()
    if isinstance(value, CodeType):
        yield value
        inner = value.co_consts
    elif isinstance(value, FunctionType):
        inner = value.__code__, getattr(value, "__wrapped__", None)
    elif isinstance(value, staticmethod | classmethod):
        inner = (value.__func__,)
    elif isinstance(value, property):
        inner = value.fget, value.fset, value.fdel
    elif isinstance(value, functools.cached_property):
        inner = (value.func,)
    for each in inner:
        yield from _codes(each)
