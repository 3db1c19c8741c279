"""Load a `.pt2` archive of torch.export as a program of tensor operations, and as nothing else.

`torch.export.load` trusts its file: it falls back to the unrestricted unpickler, unpickles constants, resolves an
operator by walking any attributes of `torch`, evaluates shape expressions and guards as Python, writes the graph's
names into generated source, and loads compiled libraries. So the archive is never given to it. A new one is written in
memory, from the parts that were checked here:

  1. Only weights, constants and the program itself; weights are raw bytes, never pickles.
  2. Every operator is a tensor operator of an allowed namespace, none of which takes a file name.
  3. Every name is an identifier; shape expressions are arithmetic over symbols; input structures are plain containers.
  4. Guards and all metadata but the module paths are left out; example inputs go through the restricted loader.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import logging
import math
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

from indistill_fx.errors import ConfigError
from indistill_fx.graph.names import is_plain, is_plain_path, reserved
from indistill_fx.loading.file_kinds import damaged, open_zip
from indistill_fx.loading.operators import may_be_called
from indistill_fx.loading.pickle_make import MOST_EXPANDED
from indistill_fx.loading.safe_pickle import open_saved
from indistill_fx.system.files import parse_json

_ENTRY = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
    r"|version|models/model\.json|data/(weights|constants)/(weight_\d+|tensor_\d+|model_(weights|constants)_config\.json)"
)
_PROGRAM, _EXAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_NAMESPACES = ("aten", "prims", "torchvision")
_HIGHER_ORDER = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "while_loop", "map_impl", "scan")
_SCALAR = frozenset(
    (
        *(f"_operator.{name}" for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "getitem")),
        *(f"_operator.{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")),
        *(f"math.{name}" for name in ("trunc", "ceil", "floor")),
        *(f"torch.sym_{name}" for name in ("int", "float", "max", "min", "not", "ite", "sqrt")),
    )
)
_SYMBOLIC = frozenset(
    (
        *("Integer", "Rational", "Add", "Mul", "Max", "Min", "Mod", "PythonMod", "Equality"),
        *("Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "And", "Or", "Not"),
        *("FloorDiv", "CleanDiv", "CeilDiv", "ModularIndexing", "Where", "IntTrueDiv", "FloatTrueDiv", "ToFloat"),
        *("CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "TruncToFloat", "Identity"),
    )
)
_FROZEN = "torch.fx.immutable_collections.immutable_"
_CONTAINERS = (
    *("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None),
    *(f"{_FROZEN}list", f"{_FROZEN}dict"),  # the type of a graph with several outputs that we saved
)

_FREE = re.compile(r"[\w.+\-]*")  # for versions, devices, dialects
_PATH = re.compile(r"[\w.\-/: ]*")  # for paths of modules, which are only displayed
_SYMBOL = re.compile(r"[a-z]{1,4}\d{1,5}")
_LONGEST = 2000
_MOST_VALUES = 1 << 22  # of a program, which has about 64 for each operator
_LARGEST_EXPRESSION = 128
"""Degree and terms of a shape expression: sympy multiplies it out."""


def load_exported(path: Path, *, trust: Sequence[str] = ()) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    """Load a `.pt2` archive.

    Args:
        path: the archive.
        trust: operator namespaces, beside PyTorch's own, whose operators the program may call.

    Returns:
        The module, and the example inputs when the archive has them and all are tensors.

    Raises:
        ConfigError: the archive is damaged, or holds what is not a program of tensor operations.
    """
    label = str(path)
    with path.open("rb") as file:
        archive = open_zip(file, label)
        checked, examples = _copy_checked(archive, label, trust)
    inputs = _load_examples(examples, label)
    log = _FirstError()
    try:
        with _listening(log):
            module: nn.Module = torch.export.load(checked).module(check_guards=False)
    except Exception as error:
        cause = log.error or error
        reason = (str(cause).strip().splitlines() or [""])[-1]
        raise damaged(label, f"{type(cause).__name__}: {reason}") from error
    return _settle_mode(module), inputs


def runs_in_training_mode(module: nn.Module) -> bool:
    """Whether an exported graph has dropout that drops or batch norm that updates; both are fixed at export."""
    graph = getattr(module, "graph", None)
    for node in graph.nodes if graph is not None else ():
        schema = getattr(node.target, "_schema", None)
        for position, argument in enumerate(schema.arguments if schema is not None else ()):
            if argument.name in ("training", "train") and position < len(node.args) and node.args[position] is True:
                return True
    return False


def _settle_mode(module: nn.Module) -> nn.Module:
    """Set the training flags to the graph's mode, and let `train` and `eval` set them, as on any module.

    In torch both raise, because they cannot change the graph; code that stores and restores flags would then fail.
    """
    vars(module).pop("train", None)
    vars(module).pop("eval", None)
    return module.train(runs_in_training_mode(module))


def _copy_checked(archive: zipfile.ZipFile, label: str, trust: Sequence[str]) -> tuple[BinaryIO, bytes]:
    """A new archive with the checked parts, and without the example inputs, which are returned separately."""
    checked, examples = io.BytesIO(), b""
    sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in archive.infolist()}
    try:
        with zipfile.ZipFile(checked, "w") as target:
            for entry in archive.infolist():
                name, content = entry.filename.partition("/")[2], archive.read(entry)
                if name == _EXAMPLES:
                    examples = content
                if not name.startswith("extra/"):
                    target.writestr(f"model/{name}", _check_entry(name, content, sizes, trust))
    except _UnfitError as error:
        raise ConfigError(
            f"`{label}` was refused, and nothing in it was run: it {error}.",
            where=label,
            got=str(error),
            expected="a program of PyTorch's own tensor operations, with its weights",
            hint="If it is your own export, name the model it was made from instead.",
        ) from error
    except Exception as error:  # the file may hold any bytes, so anything may be raised
        raise damaged(label, f"its program makes no sense ({type(error).__name__}: {error})") from error
    checked.seek(0)
    return checked, examples


def _check_entry(name: str, content: bytes, sizes: dict[str, int], trust: Sequence[str]) -> bytes:
    if name == _EXAMPLES:
        return b""
    if not _ENTRY.fullmatch(name):
        raise _UnfitError(f"holds {name!r}, which is neither weights nor the program")
    if name == _PROGRAM:
        return json.dumps(_on_cpu(_check_program(parse_json(content, _MOST_VALUES), trust))).encode()
    if name.endswith("_config.json"):
        config = parse_json(content, _MOST_VALUES)
        _check_payloads(config, name, sizes)
        return json.dumps(_on_cpu(config)).encode()
    return content


def _on_cpu(value: Any) -> Any:
    """A copy with every device set to the CPU, because the archive may come from another machine."""
    if isinstance(value, dict):
        return {
            key: {"type": "cpu", "index": None} if key in ("device", "as_device") and item else _on_cpu(item)
            for key, item in value.items()
        }
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value


class _UnfitError(Exception):
    """An archive holds something that is not allowed; the message names it."""


def _check_payloads(config: Any, name: str, sizes: dict[str, int]) -> None:
    folder, expanded = name.rpartition("/")[0], 0
    for path, payload in config["config"].items():
        _require_path(path)
        if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
            raise _UnfitError(f"has a pickled object among its {folder.rpartition('/')[2]}")
        expanded += _require_fit(payload["tensor_meta"], sizes[f"{folder}/{payload['path_name']}"], path)
        if expanded > MOST_EXPANDED:
            raise _UnfitError(f"has tensors that together show {expanded:,} elements more than are stored")


def _require_fit(meta: Any, stored: int, path: str) -> int:
    """How many elements a view has beyond its storage. It must lie within the stored bytes, which torch would otherwise enlarge."""
    size, stride = ([length["as_int"] for length in meta[key]] for key in ("sizes", "strides"))
    offset, dtype = meta["storage_offset"]["as_int"], _SERIALIZE_TO_TORCH_DTYPE[meta["dtype"]]
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise _UnfitError(f"has a tensor {path[:60]!r} of a size that cannot be")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    shown, elements = int(math.prod(size)), int(stored // dtype.itemsize)
    if shown and (last >= elements or shown > max(elements, MOST_EXPANDED)):
        raise _UnfitError(f"declares a tensor {path[:60]!r} of {shown:,} elements and has {elements:,}")
    return max(0, shown - elements)


def _check_program(program: Any, trust: Sequence[str]) -> Any:
    if not isinstance(program, dict) or "graph_module" not in program:
        raise ValueError("no exported program")
    program["guards_code"] = []
    for symbol in program.get("range_constraints") or ():
        if not _SYMBOL.fullmatch(symbol):
            raise _UnfitError(f"has a symbol {symbol[:40]!r}")
    return _check(program, "", trust)


def _check(value: Any, key: str, trust: Sequence[str]) -> Any:
    """A copy of a part of the program, in which every string is checked according to its key."""
    if key in ("as_custom_obj", "custom_obj_values") and value:
        raise _UnfitError("has a script object")
    if isinstance(value, dict):
        if key == "metadata":
            value = {name: text for name, text in value.items() if name == "nn_module_stack"}
        for name in value:
            _require(name, _PATH, "name")
        return {name: _check(item, name, trust) for name, item in value.items() if name != "treespec_namedtuple_fields"}
    if isinstance(value, list):
        return [_check(item, key, trust) for item in value]
    if isinstance(value, str):
        _check_text(value, key, trust)
    return value


def _check_text(value: str, key: str, trust: Sequence[str]) -> None:
    match key:
        case "target" | "as_operator":
            _check_operator(value, trust)
        case "expr_str":
            _check_expression(value)
        case "in_spec" | "out_spec":
            _check_structure(parse_json(value)[1] if value else {})
        case "as_string" | "as_strings":
            pass  # `repr` writes these strings into the source, quoted
        case "name" | "as_name" | "forward_arg_names" | "user_input_name":
            if value and not is_plain(value):
                raise _UnfitError(f"has a name {value[:60]!r}")
        case "nn_module_stack":
            _require(re.sub(r"[;,@\[\]()']|<locals>", "", value), _PATH, "module path")
        case "parameter_name" | "buffer_name" | "tensor_constant_name":
            _require_path(value)
        case "fqn":
            _require(value, _PATH, "module path")
        case _:
            _require(value, _FREE, key)


def _require(value: str, pattern: re.Pattern[str], name: str) -> None:
    if not pattern.fullmatch(value):
        raise _UnfitError(f"has a {name} {value[:60]!r}")


def _require_path(path: str) -> None:
    """Check the path of a parameter or buffer: it must not hide an attribute of a graph module."""
    if not is_plain_path(path) or not reserved().isdisjoint(path.split(".")):
        raise _UnfitError(f"has a parameter or buffer by the name {path[:60]!r}")


def _check_operator(target: str, trust: Sequence[str]) -> None:
    if target in _SCALAR:
        return
    match target.split("."):
        case ["torch", "ops", "higher_order", name] if name in _HIGHER_ORDER:
            return
        case ["torch", "ops", namespace, name, *overload] if namespace in (*_NAMESPACES, *trust) and len(overload) <= 1:
            if namespace == "torchvision":
                importlib.import_module(namespace)  # the import registers the package's operators
            found = getattr(getattr(torch.ops, namespace), name, None)
            found = getattr(found, overload[0], None) if overload else found
            if found is not None and may_be_called(namespace, name, found):
                return
    raise _UnfitError(f"calls {target[:80]!r}, which is not a tensor operation known here")


def _check_structure(spec: Any) -> None:
    """Refuse containers other than those with positions and plain keys, because others import the class that they name."""
    if not spec:
        return
    context = parse_json(spec["context"]) if isinstance(spec["context"], str) else spec["context"]
    if spec["type"] not in _CONTAINERS or not _is_plain(context):
        raise _UnfitError(f"has inputs or outputs in a {str(spec['type'])[:60]!r}")
    for child in spec["children_spec"]:
        _check_structure(child)


def _is_plain(context: Any) -> bool:
    return context is None or (isinstance(context, list) and all(isinstance(key, (str, int)) for key in context))


def _check_expression(text: str) -> None:
    """Refuse a shape expression that is more than arithmetic; torch evaluates it as Python."""
    if (
        len(text) > _LONGEST
        or not text.isascii()
        or "\n" in text
        or not _is_arithmetic(tree := ast.parse(text, mode="eval").body)
        or max(_extent(tree)) > _LARGEST_EXPRESSION
    ):
        raise _UnfitError(f"has a shape expression {text[:60]!r}")


def _is_arithmetic(node: ast.AST) -> bool:
    """Whether an expression has the form that sympy prints: calls of listed functions on symbols and numbers."""
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return abs(value) < 1 << 64
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() as operand):
            return _is_arithmetic(operand)
        case ast.Name(id=name):
            return name in ("true", "false", "oo", "int_oo")
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=words):
            return bool(_SYMBOL.fullmatch(name)) and all(isinstance(word.value, ast.Constant) for word in words)
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(digits))], keywords=words):
            return bool(re.fullmatch(r"-?[\d.]{1,40}", digits)) and all(_is_arithmetic(word.value) for word in words)
        case ast.Call(func=ast.Name(id="Pow"), args=[base, ast.Call(func=ast.Name(id="Integer"), args=[power])]):
            # a power of a power could take forever to compute
            small = isinstance(power, ast.Constant) and power.value in range(9)
            return small and _is_arithmetic(base) and "id='Pow'" not in ast.dump(base)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return name in _SYMBOLIC and all(map(_is_arithmetic, arguments))
    return False


def _extent(node: ast.AST) -> tuple[int, int]:
    """The degree of an expression, and an upper bound of its terms when sympy expands it."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id in ("Integer", "Float"):
        return 0, 1
    parts = [_extent(part) for part in node.args]
    degrees, terms = [degree for degree, _ in parts], [count for _, count in parts]
    match node.func.id:
        case "Symbol":
            return 1, 1
        case "Add":
            return max(degrees, default=0), sum(terms)
        case "Mul":
            return sum(degrees), math.prod(terms)
        case "Pow":
            power = node.args[1].args[0].value  # type: ignore[attr-defined]
            return degrees[0] * power, terms[0] ** power
    return max(degrees, default=0), sum(terms)


def _load_examples(content: bytes, label: str) -> tuple[Tensor, ...] | None:
    if not content:
        return None
    with open_saved(io.BytesIO(content), f"{label} (its example inputs)") as saved:
        examples = saved.make(saved.root)
    match examples:
        case (tuple(arguments), dict(keywords)) if not keywords and all(isinstance(item, Tensor) for item in arguments):
            return arguments
    return None


class _FirstError(logging.Filter):
    """A log filter that stores the first error that torch logs instead of raising, and suppresses all entries."""

    error: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Store the error, and suppress the entry."""
        if record.exc_info and self.error is None:
            self.error = record.exc_info[1]
        return False


@contextmanager
def _listening(log: _FirstError) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export.serde.serialize")]
    for logger in loggers:
        logger.addFilter(log)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(log)
