"""How keep ratios are learned: the protocol, the registry, and one file per method."""

from hwprune.search.base import (
    DEFAULT_METHOD,
    METHODS,
    Context,
    Method,
    Search,
    SearchResult,
    create,
    method_class,
    search,
)

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "Context",
    "Method",
    "Search",
    "SearchResult",
    "create",
    "method_class",
    "search",
]
