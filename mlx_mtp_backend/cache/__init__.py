"""Per-layer state of one sequence, changed in transactions."""

from mlx_mtp_backend.cache.base import LayerCache, abort, begin, commit
from mlx_mtp_backend.cache.delta import DeltaCache
from mlx_mtp_backend.cache.kv import KVCache

__all__ = ["DeltaCache", "KVCache", "LayerCache", "abort", "begin", "commit"]
