"""Names of modules, parameters and buffers: data, until torch.fx writes them into the source of a graph.

`self.layer1.0.conv` becomes `getattr(self.layer1, "0").conv` there, unescaped. So only identifiers and numbers may get that far.
"""

from __future__ import annotations

import functools
import keyword
import re
import unicodedata
from collections.abc import Iterable

from torch import fx, nn

_LONGEST = 255
# A number, or a number with a suffix after an underscore: `0_1`, the name of a copied layer.
_NUMBER = re.compile(r"[0-9]{1,9}(_[0-9A-Za-z_]*)?")


def is_plain(name: str) -> bool:
    """Whether a name is an identifier or a number, or some joined by hyphens (RegNet's `block4-0`): nothing that could be more.

    Python reads some letters as others (a wide f as an f); names with such letters are not plain.
    """
    if len(name) > _LONGEST or not unicodedata.is_normalized("NFKC", name):
        return False
    return all(part.isidentifier() or _NUMBER.fullmatch(part) for part in name.split("-"))


def is_plain_path(path: str) -> bool:
    """Whether all names of a dotted path are plain."""
    return all(map(is_plain, path.split(".")))


@functools.cache
def reserved() -> frozenset[str]:
    """The names that a graph module has of its own: `forward`, `graph`, `training` and others."""
    return frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))


def writable(name: str) -> str:
    """The name, or one like it that may stand in a graph: plain, no keyword, and none of a graph module's own."""
    if is_plain(name) and not keyword.iskeyword(name) and name not in reserved():
        return name
    made = f"_{re.sub(r'[^a-zA-Z0-9_]', '_', name)[: _LONGEST - 3]}_"
    return made if made not in reserved() else f"{made}_"  # `:module:` would be `__module__`


def writable_paths(paths: Iterable[str]) -> dict[str, str]:
    """For every dotted path the one to stand for it in a graph; two paths never become one."""
    paths = list(paths)
    used_paths = {
        path[:end] for path in paths for end in (*(at for at, sign in enumerate(path) if sign == "."), len(path))
    }
    found: dict[str, str] = {}
    for path in paths:
        old = new = ""
        for part in path.split("."):
            old, dot = f"{old}.{part}" if old else part, "." if new else ""
            if old not in found:
                found[old] = f"{new}{dot}{writable(part)}"
                while found[old] != old and (found[old] in used_paths or found[old].rpartition(".")[2] in reserved()):
                    found[old] += "_"
                used_paths.add(found[old])
            new = found[old]
    return {path: found[path] for path in paths}
