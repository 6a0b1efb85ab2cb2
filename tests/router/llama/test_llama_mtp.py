"""Drafting with a model's own head inside llama.cpp: it really drafts, says so, and changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.generation import GREEDY, collect, counting, entry, finished, text

from router.backends.llama_cpp import LlamaCppBackend, fixed_draft_depth
from router.domain import Capability, Drafting, DraftSource, ErrorReason, RouterError, Sampling, SpeculationMode, Stop

LONG = Stop(max_output_tokens=41)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0)])
async def test_drafts_are_counted_and_change_nothing(make_backend, mtp_file: Path, sampling: Sampling) -> None:  # type: ignore[no-untyped-def]
    request = counting(stop=LONG, sampling=sampling, seed=None if sampling.greedy else 5)
    drafting = await collect(make_backend(), entry(mtp_file, draft_depth=3), request)
    plain = await collect(make_backend(), entry(mtp_file, speculation="off"), request)
    assert text(drafting) == text(plain)
    assert text(plain).startswith(" n0 n1")

    statistics = finished(drafting).speculation
    assert statistics.source is DraftSource.MTP_HEAD
    assert 0 < statistics.accepted_tokens < statistics.drafted_tokens  # wrong after every third token
    assert statistics.drafted_tokens <= 3 * statistics.rounds
    assert finished(drafting).usage.output_tokens == 41 == 1 + statistics.rounds + statistics.accepted_tokens
    off = finished(plain).speculation
    assert (off.source, off.rounds, off.drafted_tokens) == (DraftSource.NONE, 0, 0)
    assert finished(plain).numerics_fingerprint != finished(drafting).numerics_fingerprint


async def test_the_depth_is_the_configured_one(make_backend, mtp_file: Path) -> None:  # type: ignore[no-untyped-def]
    for depth in (1, 5):
        events = await collect(make_backend(), entry(mtp_file, draft_depth=depth), counting(stop=LONG))
        statistics = finished(events).speculation
        assert (depth - 1) * statistics.rounds < statistics.drafted_tokens <= depth * statistics.rounds


def test_drafting_needs_a_head_and_the_settings_consent(make_backend, mtp_file: Path, script_file: Path) -> None:  # type: ignore[no-untyped-def]
    backend: LlamaCppBackend = make_backend()
    assert entry(mtp_file).facts.can(Capability.MTP)
    assert backend.drafting(entry(mtp_file, draft_depth=4)) == Drafting(4)
    assert fixed_draft_depth(entry(mtp_file, speculation="off")) is None
    assert backend.drafting(entry(script_file)) is None


async def test_a_head_that_is_declared_but_missing_does_not_draft(make_backend, mtp_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """llama.cpp would refuse to start with drafting, so the facts must not promise a head that is not there."""
    headless = tmp_path / "headless.gguf"
    _rename(mtp_file, headless, "blk.2.nextn.eh_proj.weight", "blk.2.nextn.eh_prox.weight")
    model = entry(headless)
    assert not model.facts.can(Capability.MTP)
    with pytest.raises(RouterError) as caught:
        await collect(make_backend(), model, replace(counting(), speculation=SpeculationMode.AUTO))
    assert caught.value.reason is ErrorReason.MODEL_LOAD_FAILED


def _rename(source: Path, target: Path, old: str, new: str) -> None:
    target.write_bytes(source.read_bytes().replace(old.encode(), new.encode()))
