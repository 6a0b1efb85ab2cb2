"""Prefix cache: what prefill computed for whole chunks of earlier prompts, found again by their exact tokens.

A tree of chunks. Each node holds the keys and values of one chunk; some also hold what cannot be told apart by rows:
the recurrent states after the chunk, and the trunk hidden that the head has still to run. A sequence may start only
behind a node that has that. Only prefill writes here, in chunks aligned to absolute positions, so a sequence that
starts from the cache has the bits of one that does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_mtp_backend.api import EngineOptions
from mlx_mtp_backend.cache.base import copied
from mlx_mtp_backend.decode.sequence import Sequence
from mlx_mtp_backend.host import evaluate
from mlx_mtp_backend.load.device import memory_bytes

Rows = list[tuple[mx.array, ...]]  # of each cache, trunk first

RUNG = 8  # chunks between two states that are kept whatever the prompt
_SHARE, _LIMIT = 8, 4 << 30  # by default one part in so many of the memory, and at most this


@dataclass(frozen=True, slots=True)
class _State:
    """What a sequence needs behind a chunk besides rows: every cache's snapshot, and the head's pending hidden."""

    snapshots: Rows
    pending: mx.array | None

    @property
    def nbytes(self) -> int:
        return _nbytes(self.snapshots) + (0 if self.pending is None else self.pending.nbytes)


@dataclass(slots=True, eq=False)
class _Node:
    """One chunk. `used` and `state_used` are ticks of the store's clock."""

    tokens: tuple[int, ...]
    parent: _Node | None
    rows: Rows
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    state: _State | None = None
    used: int = 0
    state_used: int = 0

    @property
    def path(self) -> list[_Node]:
        """The chunks from the first one to this."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def below(self) -> Iterator[_Node]:
        """Every chunk after this one."""
        waiting = list(self.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()


@dataclass(frozen=True, slots=True)
class PrefixStatistics:
    """Counts since the start.

    Attributes:
        hits, misses: sequences that started behind cached chunks, and that did not.
        tokens: prompt tokens that were not run again.
        bytes: held now.
        evictions: chunks and states dropped for want of room.
    """

    hits: int
    misses: int
    tokens: int
    bytes: int
    evictions: int


class PrefixStore:
    """Chunks of all models within one budget; what was used longest ago goes first.

    Args:
        budget: bytes; 0 keeps nothing.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        # By model and by whether the head was run: without it a sequence cannot draft.
        self._roots: dict[tuple[str, bool], _Node] = {}
        self._clock = self._bytes = self._hits = self._misses = self._tokens = self._evictions = 0

    @property
    def statistics(self) -> PrefixStatistics:
        return PrefixStatistics(self._hits, self._misses, self._tokens, self._bytes, self._evictions)

    def adopt(self, model: str, sequence: Sequence, chunk: int) -> None:
        """Start a sequence that nothing was run for behind the longest stored prefix of its prompt.

        At least one token of the prompt is left to run, since its logits are needed.
        """
        node = self._root(model, sequence)
        found, prompt = None, sequence.tokens[: sequence.prompt_length]
        for start in range(0, len(prompt) - chunk, chunk):
            child = node.children.get(tuple(prompt[start : start + chunk]))
            if child is None:
                break
            node = child
            found = node if node.state is not None else found
        if found is None or found.state is None:
            self._misses += 1
            return
        path, state = found.path, found.state
        self._touch(found)
        for place, cache in enumerate(sequence.caches):
            cache.restore([step.rows[place] for step in path], state.snapshots[place])
        sequence.pending = [] if state.pending is None else [state.pending]
        sequence.prefilled = sequence.cached = chunk * len(path)
        self._hits += 1
        self._tokens += sequence.cached

    def wants(self, sequence: Sequence, chunk: int) -> bool:
        """Whether the state behind the chunk that was just run is one to keep: every RUNG chunks, behind the last whole
        chunk before the prompt's last token, and behind the last one within each boundary that the request names."""
        done = sequence.prefilled
        if self._budget == 0 or done % chunk or done == 0:
            return False
        ends = [*sequence.boundaries, sequence.prompt_length - 1]
        return done % (RUNG * chunk) == 0 or any(done == end // chunk * chunk for end in ends)

    def keep(self, model: str, sequence: Sequence, chunk: int) -> None:
        """Store the chunks of a sequence that has run whole chunks only, and the state behind the last one.

        Raises:
            DeviceFailure: nothing was stored.
        """
        node, added = self._root(model, sequence), []
        for start in range(0, sequence.prefilled, chunk):
            tokens = tuple(sequence.tokens[start : start + chunk])
            known = node.children.get(tokens)
            if known is None:
                known = _Node(tokens, node, _rows(sequence, start, start + chunk))
                added.append(known)
            node = known
        state = node.state
        if state is None:
            pending = copied(sequence.pending[-1]) if sequence.pending else None
            state = _State([cache.snapshot() for cache in sequence.caches], pending)
        # Evaluated now: a copy still to be made would hold on to the buffer, and the next pass copy it whole.
        evaluate([fresh.rows for fresh in added], state.snapshots, [] if state.pending is None else state.pending)
        for fresh in added:
            assert fresh.parent is not None
            fresh.parent.children[fresh.tokens] = fresh
            self._bytes += _nbytes(fresh.rows)
        if node.state is None:
            node.state = state
            self._bytes += state.nbytes
        self._touch(node)
        self._evict()

    def forget(self, model: str) -> None:
        """Drop everything of a model."""
        for key in [key for key in self._roots if key[0] == model]:
            self._bytes -= sum(_held(node) for node in self._roots.pop(key).below())

    def _root(self, model: str, sequence: Sequence) -> _Node:
        return self._roots.setdefault((model, bool(sequence.head)), _Node((), None, []))

    def _touch(self, node: _Node) -> None:
        self._clock += 1
        node.state_used = self._clock
        for step in node.path:
            step.used = self._clock

    def _evict(self) -> None:
        while self._bytes > self._budget:
            nodes = [node for root in self._roots.values() for node in root.below()]
            leaves = [(node.used, node, True) for node in nodes if not node.children]
            states = [(node.state_used, node, False) for node in nodes if node.children and node.state is not None]
            _, node, whole = min([*leaves, *states], key=lambda candidate: candidate[0])
            self._evictions += 1
            if whole:
                self._remove(node)
            elif node.state is not None:
                self._bytes -= node.state.nbytes
                node.state = None

    def _remove(self, node: _Node) -> None:
        """Drop a leaf, and chunks before it that lead nowhere any more."""
        parent = node.parent
        while parent is not None:
            self._bytes -= _held(node)
            del parent.children[node.tokens]
            if parent.children or parent.state is not None:
                return
            node, parent = parent, parent.parent


def _rows(sequence: Sequence, start: int, end: int) -> Rows:
    """Copies of one chunk's rows. The head is one slot behind: it needs the token after each."""
    trunk = [cache.rows(start, end) for cache in sequence.trunk]
    return trunk + [cache.rows(max(start - 1, 0), end - 1) for cache in sequence.head]


def _held(node: _Node) -> int:
    return _nbytes(node.rows) + (0 if node.state is None else node.state.nbytes)


def _nbytes(rows: Rows) -> int:
    return sum(array.nbytes for arrays in rows for array in arrays)


def budget_bytes(options: EngineOptions) -> int:
    """What the prefix cache may hold under these options on this machine."""
    if options.prefix_cache_bytes is not None:
        return options.prefix_cache_bytes
    return min(memory_bytes() // _SHARE, _LIMIT)
