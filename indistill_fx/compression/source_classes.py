"""From blocks to classes: blocks that differ in literals only share a class, and the literals become its arguments."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from indistill_fx.compression.source_pieces import SIZE, Block, Construct, Line, Literal, Piece

_WIDE = 100
_WIDEST = 110
_TAB = "    "


@dataclass(eq=False)
class _Class:
    """A class: its blocks, the constructor arguments of each block, and the values that need not be given."""

    name: str
    blocks: list[Block]
    arguments: dict[Block, dict[str, str]] = field(default_factory=dict)
    columns: dict[int, str] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)


def class_texts(root: Block, taken: Iterable[str] = ()) -> list[str]:
    """The source of all classes, each before those that use it; the last is the network's. Other names in the file are taken."""
    found = _Classes(taken)
    groups: dict[object, list[Block]] = {}
    for block in _inside(root):
        groups.setdefault(_key(block), []).append(block)
    for blocks in sorted(groups.values(), key=lambda members: _height(members[0])):
        found.add(blocks)
    return [found.text(group) for group in found.classes]


def _inside(block: Block) -> Iterator[Block]:
    for line in (*block.setup, *block.forward):
        for piece in _flat(line):
            if isinstance(piece, Block):
                yield from _inside(piece)
    yield block


def _flat(line: Line) -> Iterator[str | Literal | Block]:
    for piece in line:
        if isinstance(piece, Construct):
            for argument in piece.arguments:
                yield from _flat(argument)
        else:
            yield piece


def _height(block: Block) -> int:
    inner = [_height(piece) for line in block.setup for piece in _flat(line) if isinstance(piece, Block)]
    return max(inner, default=-1) + 1


def _key(piece: Piece | Line) -> object:
    """What two blocks of one class have in common."""
    if isinstance(piece, Literal):
        return "literal", piece.keyword
    if isinstance(piece, Construct):
        return piece.name, piece.brackets, tuple(map(_key, piece.arguments))
    if isinstance(piece, Block):
        return piece.preferred_name, piece.base, tuple(map(_key, piece.setup)), tuple(map(_key, piece.forward))
    return piece if isinstance(piece, str) else tuple(map(_key, piece))


class _Classes:
    def __init__(self, taken: Iterable[str]) -> None:
        self.classes: list[_Class] = []
        self.of: dict[Block, _Class] = {}
        self.names = {*taken, "nn", "torch", "F", "Tensor", "Parts", "HeadAttention", "math", "operator"}

    def add(self, blocks: list[Block]) -> None:
        """Make one class for blocks that share their code; the blocks inside them have classes already."""
        name, count = blocks[0].preferred_name, 1
        while name in self.names:
            count += 1
            name = f"{blocks[0].preferred_name}{count}"
        self.names.add(name)
        group = _Class(name, blocks)
        rows = [self._literals(block) for block in blocks]
        columns = list(zip(*rows, strict=True))
        names: dict[tuple[str, ...], str] = {}
        used_names = _taken(blocks[0])
        for k, column in enumerate(columns):
            values = tuple(entry.text for entry in column)
            if len(set(values)) == 1:
                continue
            widths, size = _are_widths(values), column[0].name.startswith(SIZE)
            same = (SIZE * (size and not widths), *values)
            if same in names:
                group.columns[k] = names[same]
                continue
            group.columns[k] = name_of_column = _free(
                _best_name(columns, values) if widths else column[0].name, used_names
            )
            used_names.add(name_of_column)
            if column[0].default in values:
                group.defaults[name_of_column] = column[0].default
            if widths or size:
                names[same] = name_of_column
        for block, row in zip(blocks, rows, strict=True):
            group.arguments[block] = {arg: row[k].text for k, arg in group.columns.items()}
            self.of[block] = group
        self.classes.append(group)

    def _literals(self, block: Block) -> list[Literal]:
        found: list[Literal] = []
        for line in (*block.setup, *block.forward):
            for piece in _flat(line):
                if isinstance(piece, Literal):
                    found.append(piece)
                elif isinstance(piece, Block):
                    inner = self.of[piece]
                    found += [
                        Literal(text, name, name, inner.defaults.get(name))
                        for name, text in inner.arguments[piece].items()
                    ]
        return found

    def text(self, group: _Class) -> str:
        """The source of a class."""
        counter = iter(range(10**9))
        block = group.blocks[0]
        setup = [self._line(line, group, counter, "") for line in block.setup]
        kept: dict[str, None] = {}

        def remember(name: str) -> str:
            kept[name] = None
            return f"self.{name}"

        forward = [self._line(line, group, counter, "", remember) for line in block.forward]
        given = list(dict.fromkeys(group.columns.values()))
        names = [
            "self",
            *(n for n in given if n not in group.defaults),
            *(f"{n}={v}" for n, v in group.defaults.items()),
        ]
        setup = [*(f"self.{name} = {name}" for name in kept), *setup]
        parts = []
        if setup or block.base != "nn.Module":
            parts.append(
                [_wrapped(f"def __init__({', '.join(names)}):"), *(_indented(_wrapped(line)) for line in setup)]
            )
            if block.base == "nn.Module":
                parts[0].insert(1, f"{_TAB}super().__init__()")
        if forward:
            parts.append([forward[0], *(_indented(_wrapped(line)) for line in forward[1:])])
        body = "\n\n".join(_indented("\n".join(lines)) for lines in parts)
        return f"class {group.name}({block.base}):\n{body}\n"

    def _line(
        self, line: Line, group: _Class, counter: Iterator[int], indent: str, rename: Callable[[str], str] = str
    ) -> str:
        return "".join(self._piece(piece, group, counter, rename) for piece in line)

    def _piece(self, piece: Piece, group: _Class, counter: Iterator[int], rename: Callable[[str], str]) -> str:
        if isinstance(piece, str):
            return piece
        if isinstance(piece, Literal):
            name = group.columns.get(next(counter))
            text = rename(name) if name is not None else piece.text
            if name is None and piece.keyword and text == piece.default:
                return ""
            return f"{piece.keyword}={text}" if piece.keyword else text
        if isinstance(piece, Construct):
            parts = [self._line(argument, group, counter, "", rename) for argument in piece.arguments]
            return _call(piece.name, [part for part in parts if part], piece.brackets)
        inner = self.of[piece]
        parts = []
        for name, text in inner.arguments[piece].items():
            outer = group.columns.get(next(counter))
            if outer is not None or text != inner.defaults.get(name):
                parts.append(f"{name}={rename(outer) if outer is not None else text}")
        return _call(inner.name, parts, ("(", ")"))


def _call(name: str, parts: list[str], brackets: tuple[str, str]) -> str:
    """A call on one line; with one argument per line if it is long or an argument is a call itself."""
    flat = f"{name}{brackets[0]}{', '.join(parts)}{brackets[1]}"
    nested = sum("(" in part and not part.startswith("(") for part in parts) > 1
    if not nested and len(flat) <= _WIDE and "\n" not in flat:
        return flat
    inner = "".join(f"{_indented(part)},\n" for part in parts)
    return f"{name}{brackets[0]}\n{inner}{brackets[1]}"


def _wrapped(text: str) -> str:
    """A line of code; if it is too long and ends with a call, a list or a dict, with one entry per line."""
    end = len(text.removesuffix(":")) - 1
    if len(text) <= _WIDEST or "\n" in text or text[end] not in ")]}":
        return text
    opening, commas, depth, quote = -1, list[int](), 0, ""
    for place, letter in enumerate(text[: end + 1]):
        if quote or letter in "\"'":
            quote = letter if not quote else "" if letter == quote else quote
        elif letter in "([{":
            opening, commas = (place, []) if depth == 0 else (opening, commas)
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 1:
            commas.append(place)
    callee = text[opening - 1 : opening].isidentifier() or text[opening - 1 : opening] in ("]", ")")
    if callee != (text[end] == ")"):  # an index, or brackets around an expression, which a comma would make a tuple
        return text
    starts, stops = [opening, *commas], [*commas, end]
    parts = [text[start + 1 : stop].strip() for start, stop in zip(starts, stops, strict=True)]
    lead = text[: len(text) - len(text.lstrip())]
    inner = "".join(f"{lead}{_TAB}{part},\n" for part in parts if part)
    return f"{text[: opening + 1]}\n{inner}{lead}{text[end:]}"


def _indented(text: str) -> str:
    return "\n".join(f"{_TAB}{line}" if line else "" for line in text.split("\n"))


def _taken(block: Block) -> set[str]:
    """Names that an argument must not have: those of the block's own layers, and of values in `forward`."""
    heads = [line[0] for line in block.setup if isinstance(line[0], str)]
    own = [found[1] for head in heads if (found := re.match(r"self\.(?:\w+\(\")?(\w+)", head))]
    return {*own, "self", "x", "training", *dir(nn.Module)}


def _are_widths(values: tuple[str, ...]) -> bool:
    """Whether two literals with these values in a class's blocks are one width, not a stride and a size that are equal by chance."""
    return all(map(str.isdecimal, values)) and (min(map(int, values)) > 2 or len(set(values)) > 2)


def _best_name(columns: list[tuple[Literal, ...]], values: tuple[str, ...]) -> str:
    """The most telling name of literals that always have the same value: an output width; the size of a tensor last."""
    same = [column[0].name for column in columns if tuple(entry.text for entry in column) == values]
    return min(same, key=lambda name: (not name.endswith("_out"), SIZE in name))


def _free(preferred: str, used_names: set[str]) -> str:
    name, count = preferred, 1
    while name in used_names or not name.isidentifier() or keyword.iskeyword(name):
        count += 1
        name = (
            f"{preferred}_{count}"
            if preferred.isidentifier() and not keyword.iskeyword(preferred)
            else f"value_{count}"
        )
    return name
