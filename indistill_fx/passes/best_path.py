"""The order-preserving alignment of two lists: dynamic programming over a table of gains."""

from __future__ import annotations

from collections.abc import Sequence


def best_path(gain: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """The strictly ascending (row, column) pairs with the largest sum of gains; only positive gains are taken.

    Ties go to the pairs nearest to the end. Time and memory are rows x columns.

    Source:
        Needleman, Wunsch, "A general method applicable to the search for similarities", 1970; here gaps cost nothing.

    >>> best_path([[0.9, 0.1], [0.8, 0.2], [0.0, 0.7]])
    [(0, 0), (2, 1)]
    """
    rows, columns = len(gain), len(gain[0]) if gain else 0
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    for i, row in enumerate(gain):
        for j, value in enumerate(row):
            best[i + 1][j + 1] = max(best[i][j + 1], best[i + 1][j], best[i][j] + value)
    path, i, j = [], rows, columns
    while i and j:
        if gain[i - 1][j - 1] > 0 and best[i][j] == best[i - 1][j - 1] + gain[i - 1][j - 1]:
            i, j = i - 1, j - 1
            path.append((i, j))
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            j -= 1
    return path[::-1]
