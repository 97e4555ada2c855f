"""What the notebooks share: saying at the end which claims were asserted, and which could not be checked here."""

from layers.tutorial.checks import closing, not_checked

__all__ = ["closing", "not_checked"]
