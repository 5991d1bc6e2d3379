"""What an ExportedProgram's file would have torch run, found before torch reads it. Pure, no I/O.

``torch.export.load`` (2.14) unpickles what it can't load as weights, evaluates sizes as Python, looks up functions by
any path within torch, loads libraries of compiled models, and makes code of the guards. Of these, only what
``torch.export.save`` writes for models of tensors is let through here.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

_TARGET = re.compile(
    r"_operator\.(i?(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift|matmul)|and_|or_|not_|neg|pos|abs|invert"
    r"|eq|ne|lt|le|gt|ge|is_|is_not|truth|index|getitem)"
    r"|math\.(?!__)\w+|torch\.(sym_|_sym_)\w+|torch\.ops\.higher_order\.(?!__)\w+"
    r"|torch\.ops\.(aten|prims|_quantized|quantized|quantized_decomposed|torchvision)"
    r"\.(?!(from_file|save)\b|__(class|init|new|dict|reduce|getattribute|setattr)\w*__)\w+\.(?!_)\w+"
)
_NATIVE = re.compile(r"data/(aotinductor|executorch)/|mtia/")
_PICKLED = re.compile(r"data/(weights|constants|sample_inputs)/[^/]+\.pt")
_FUNCTION = re.compile(
    r"Abs|Add|And|Ceil(Div|ToInt)|CleanDiv|Eq|Equality|Float|Float(Pow|TrueDiv)|Floor(Div|ToInt)|Ge|GreaterThan|Gt|Identity"
    r"|Int(TrueDiv|eger)|IsNonOverlappingAndDenseIndicator|LShift|Le|LessThan|Lt|Max|Min|Mod|ModularIndexing|Mul|Ne|Not|Or"
    r"|Piecewise|Pow|PowByNatural|PythonMod|RShift|Rational|Round(Decimal|ToInt)|Strict(Greater|Less)Than|ToFloat"
    r"|TruncTo(Float|Int)|Unequality|Where|ceiling|floor|sqrt"
)
_GUARD = re.compile(r"sym_(max|min|not|ite|int|float)|size|stride|storage_offset|item|ndim")
_TEXTS = {"Symbol": re.compile(r"\w+"), "Float": re.compile(r"[-+.eE\d]+")}  # elsewhere sympy would evaluate a text
_WORD = re.compile(r"[\w.]*")
_POWER = re.compile(r"[\d.]e[-+]?[\d_]{4}|\^", re.IGNORECASE)  # which sympy computes, as it takes ^ for **
_LONGEST = 20_000  # characters of an expression
_TERMS = 1000  # that an expression may have when its products are multiplied out
_MOST = 64  # of what an exponent is, and of the bits of a Float
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
    ast.expr_context, ast.Name,
)  # fmt: skip


def refusals(names: Iterable[str], read: Callable[[str], bytes]) -> Iterator[str]:
    """What is not let through, in words.

    Args:
        names: Of the file's records.
        read: Gives the bytes of one.

    Raises:
        ValueError: A record is not what it should be.
    """
    for name in names:
        if _NATIVE.match(name):
            yield f"compiled code ({name})"
        elif _PICKLED.fullmatch(name):
            content = read(name)
            if content and not _is_plain(content):
                yield f"a pickle of more than tensors ({name})"
        elif name.endswith("_config.json"):
            for key, payload in json.loads(read(name).decode())["config"].items():
                if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
                    yield f"a pickled object ({key})"
        elif name.startswith("models/"):
            yield from _of_model(json.loads(read(name).decode()))


def _is_plain(content: bytes) -> bool:
    """Whether torch loads it without running anything; if not, ``torch.export`` would load it in the other way."""
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # noqa: BLE001 - whatever it is, torch.export would go on to unpickle
        return False
    return True


def _of_model(model: Any) -> Iterator[str]:
    for guard in model.get("guards_code") or ():
        if not _is_guard(guard):
            yield f"the guard {guard!r:.200}"
    waiting = [model]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each
        elif isinstance(each, str) and "default_factory" in each:
            yield "a defaultdict, whose factory would be imported"
        elif isinstance(each, dict):
            waiting += each.values()
            target, size = each.get("target"), each.get("expr_str")
            functions = [target if "inputs" in each else None, each.get("as_operator")]
            yield from (f"the function {name:.200}" for name in functions if name and not _TARGET.fullmatch(str(name)))
            if isinstance(size, str) and not _is_size(size):
                yield f"the size {size!r:.200}"


def _is_size(text: str) -> bool:
    """Whether it is arithmetic of sizes, as sympy writes it."""
    return _POWER.search(text) is None and _holds(text, _is_part_of_a_size)


def _is_part_of_a_size(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", None)
        form = _TEXTS.get(str(name))
        if form is not None and isinstance(text := getattr(next(iter(node.args), None), "value", None), str):
            node.args = node.args[1:]
            return form.fullmatch(text) is not None and not node.args
        if name in _TEXTS:
            return False
        return bool(_FUNCTION.fullmatch(str(name)))
    if isinstance(node, ast.keyword):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, int) and node.value.value <= _MOST
    return isinstance(node, _ARITHMETIC) or (isinstance(node, ast.Constant) and not isinstance(node.value, str | bytes))


def _is_guard(text: str) -> bool:
    """Whether it compares sizes of the inputs."""
    return _holds(text, _is_part_of_a_guard)


def _is_part_of_a_guard(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute | ast.Name)
    if isinstance(node, ast.Attribute):
        return bool(_GUARD.fullmatch(node.attr))
    if isinstance(node, ast.Name):
        return node.id in ("L", "torch", "math", "inf") or bool(_FUNCTION.fullmatch(node.id))
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str) or _WORD.fullmatch(node.value) is not None
    return isinstance(node, (ast.Subscript, *_ARITHMETIC))


def _holds(text: str, is_allowed: Callable[[ast.AST], bool]) -> bool:
    """Whether all of an expression is allowed, and soon computed; what contains a part is asked before it."""
    if len(text) > _LONGEST:
        return False
    try:
        whole = ast.parse(text.strip(), mode="eval")
        if _terms(whole.body) > _TERMS:
            return False
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    waiting: list[tuple[ast.AST, float]] = [(whole, _MOST)]
    while waiting:
        node, most = waiting.pop()
        exponent = _exponent(node)
        if exponent > most or not _is_short(node) or not is_allowed(node):
            return False
        waiting += [(part, most // max(1, exponent)) for part in ast.iter_child_nodes(node)]
    return True


def _terms(node: ast.AST) -> float:
    """Of a sum that sympy makes of it, or a little more than :data:`_TERMS`."""
    inner = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
    parts = [_terms(part) for part in inner if isinstance(part, ast.expr)]
    match node:
        case ast.BinOp(op=ast.Add() | ast.Sub()) | ast.Call(func=ast.Name(id="Add")):
            terms = math.fsum(parts)
        case ast.BinOp(op=ast.Mult() | ast.Div()) | ast.Call(func=ast.Name(id="Mul")):
            terms = math.prod(parts, start=1.0)
        case _:
            terms = max(parts, default=1.0) ** min(_exponent(node), _MOST)
    return min(terms, _TERMS + 1.0)


def _is_short(node: ast.AST) -> bool:
    """Whether it is no number, or one of 64 bits."""
    return not isinstance(node, ast.Constant) or not isinstance(node.value, int) or node.value <= 2**63


def _exponent(node: ast.AST) -> float:
    """Of a power, or a shift; 1 of others, and infinite where it has to be computed first."""
    match node:
        case ast.BinOp(op=ast.Pow() | ast.LShift(), right=exponent):
            return _literal(exponent)
        case ast.Call(func=ast.Name(id="Pow" | "PowByNatural" | "LShift"), args=arguments):
            return _literal(arguments[1]) if len(arguments) == 2 else math.inf
    return 1


def _literal(node: ast.AST) -> float:
    match node:
        case ast.UnaryOp(operand=number) | ast.Call(func=ast.Name(id="Integer"), args=[number]):
            return _literal(number)
        case ast.Call(func=ast.Name(id="Rational"), args=[number, ast.Constant(value=int())]):
            return _literal(number)
        case ast.Constant(value=int() | float() as value):
            return value
    return math.inf
