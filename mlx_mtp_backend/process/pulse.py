"""Whether the engine's process still lives."""

from __future__ import annotations

LOOK = 1.0  # seconds between looks
QUIET = 2  # looks without a word, after which it is asked for one
SILENT = 30  # looks without a word after which it is taken for dead: native code may hold the interpreter for a while
SUSPECTED_SILENT = 5  # the same once a stream has waited in vain
STUCK = 30  # looks that the MLX thread gets for its step once a stream has waited in vain


class Pulse:
    """Counts looks instead of seconds: a parent that was stopped itself, or slept, blames nobody. Any thread may call;
    a count that two of them change at once is off by one."""

    def __init__(self) -> None:
        self._silent = 0
        self._stuck = 0
        self.suspected = False

    def heard(self) -> None:
        """The process said something."""
        self._silent = 0

    def stepped(self) -> None:
        """The MLX thread answered."""
        self.suspected, self._stuck = False, 0

    def suspect(self) -> None:
        """A stream had no sign of life for longer than its reader would wait."""
        self.suspected = True

    @property
    def quiet(self) -> bool:
        """Whether it should be asked."""
        return self.suspected or self._silent >= QUIET

    def look(self) -> str | None:
        """Every LOOK seconds: what is wrong with the process, if it should be ended for that."""
        self._silent += 1
        self._stuck += self.suspected
        if self._silent > (SUSPECTED_SILENT if self.suspected else SILENT):
            return f"says nothing for {self._silent * LOOK:g} s"
        if self._stuck > STUCK:
            return f"has taken no step for {self._stuck * LOOK:g} s"
        return None
