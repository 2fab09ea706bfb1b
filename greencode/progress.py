"""Progress bars for people; silence in logs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], title: str) -> Iterable[T]:
    """`items`, with a bar on a terminal and nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(items, desc=title, disable=not sys.stderr.isatty(), leave=False)
