"""Which requests run and which models are in memory: pure decisions, told to one port. One event loop, no locks.

* Each model has a bounded line (see `line.py`). Models of one lane share its places; among them, and among the models
  that want to be loaded, who has waited longer than its patience comes first, in order of arrival; then INTERACTIVE
  before BATCH, each in order of arrival.
* A model is loaded while somebody waits for it. What is in memory keeps within the budget: idle models are dropped to
  make room, the one that was used longest ago first; a busy, held or pinned one never is.
* A model that is in memory goes on serving its own line, so that bursts do not swap models back and forth. Only when a
  request for another one has waited longer than its patience, and the model has had its turn, does it take no more
  requests until its running ones have ended and it can be dropped. Until that request's model is loaded no other is.
* A load that nobody waits for any more is cancelled. Who left causes no load and no eviction.
* An idle model with a keep-alive is dropped once that has passed.
"""

from router.scheduler.decisions import Scheduler
from router.scheduler.models import MAX_RETRY_AFTER, Effects, Model, Phase, Rules, Terms

__all__ = ["MAX_RETRY_AFTER", "Effects", "Model", "Phase", "Rules", "Scheduler", "Terms"]
