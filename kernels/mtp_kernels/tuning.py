"""What tuning found on this device, in one file: how to cut up products, and which models win by the kernels."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from . import attention_inputs, few_row_attention, few_row_matmul, gated_delta
from .few_row_matmul.variants import Variant
from .launch import version_of
from .store import write_json

log = logging.getLogger(__name__)

KERNELS = version_of(*(k.VERSION for k in (attention_inputs, few_row_attention, few_row_matmul, gated_delta)))
STEP = 0.98
"""A candidate takes the place of the best so far below this share of its time: less is noise."""
WIN = 0.97
"""What is saved takes at most this share of the stock step's time on average; more than EACH at no number of rows."""
EACH = 1.02

Seconds = Mapping[int, float]
"""Seconds of a step by its rows."""
Measure = Callable[[Mapping[str, Variant]], Seconds | None]
"""Seconds of the whole model's step under these variants by product; None where a check failed."""


@dataclass(frozen=True)
class Result:
    """The best variants found, and the step's seconds with them."""

    variants: Mapping[str, Variant]
    seconds: Seconds


def search(products: Sequence[str], candidates: Sequence[Variant], measure: Measure) -> Result | None:
    """Tries the candidates on one product after another, each in the whole step, keeping what is faster.

    A product alone in a loop says little of what it costs between others. None where no trial passed its checks.
    """
    best: Result | None = None
    for product in products:
        for candidate in (None, *candidates):
            variants = dict(best.variants) if best else {}
            if candidate is not None:
                variants[product] = candidate
            elif best is not None:
                continue
            seconds = measure(variants)
            if seconds is not None and (best is None or _share(seconds, best.seconds) < STEP):
                best = Result(variants, seconds)
    return best


def wins(kernels: Seconds, stock: Seconds) -> bool:
    """Whether the kernels' step is worth saving."""
    return _share(kernels, stock) <= WIN and all(kernels[rows] <= EACH * stock[rows] for rows in stock)


def _share(seconds: Seconds, of: Seconds) -> float:
    return sum(seconds[rows] / of[rows] for rows in of) / len(of)


class Tuning:
    """What was saved for one device and version of MLX, under these versions of the kernels.

    Args:
        file: JSON; None or an unreadable one counts as empty.
        device: name of the device and version of MLX.
    """

    def __init__(self, file: Path | None, device: str) -> None:
        self._file, self._key = file, f"{device}:{KERNELS}"
        self._stored = _load(file)
        entry = self._stored.get(self._key, {"variants": {}, "models": {}})
        self.variants = {product: Variant(*numbers) for product, numbers in entry["variants"].items()}
        self._models: dict[str, Any] = entry["models"]

    def won(self, model: str) -> bool:
        """Whether a model, named by its products, was faster through the kernels."""
        return model in self._models

    def save(self, products: Sequence[str], model: str, result: Result, stock: Seconds) -> None:
        """Keeps a win. Another model's is dropped if it was measured with a variant that now changes.

        Raises:
            OSError: the file cannot be written.
        """
        if self._file is None:
            raise ValueError("no file to save to")
        chosen = {product: variant for product, variant in result.variants.items() if product in products}
        changed = {product for product in products if self.variants.get(product) != chosen.get(product)}
        self.variants = {p: v for p, v in self.variants.items() if p not in changed} | chosen
        self._models = {name: m for name, m in self._models.items() if not changed & set(m["products"])}
        self._models[model] = {"products": list(products), "kernels": _named(result.seconds), "stock": _named(stock)}
        numbers = {product: list(astuple(variant)) for product, variant in self.variants.items()}
        self._stored[self._key] = {"variants": numbers, "models": self._models}
        write_json(self._file, self._stored)


def _named(seconds: Seconds) -> dict[str, float]:
    return {str(rows): value for rows, value in seconds.items()}


def _load(file: Path | None) -> dict[str, Any]:
    if file is None or not file.exists():
        return {}
    try:
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for entry in stored.values():
            for numbers in entry["variants"].values():
                Variant(*numbers)
            for model in entry["models"].values():
                model["products"] = [str(product) for product in model["products"]]
        return stored
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        log.warning("kernel tuning in %s is unreadable and counts as absent", file)
        return {}
