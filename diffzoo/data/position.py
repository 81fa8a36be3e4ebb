"""The position of a run in the endless sequence of samples."""

__all__ = ["Position"]


class Position:
    """Where training is: an anchor, and the micro-batches that were handed out since.

    Attributes:
        anchor: samples of the global sequence before the first batch of this epoch.
        taken: micro-batches of this rank that were handed to the trainer since.
    """

    def __init__(self) -> None:
        self.anchor, self.taken, self._finished_before = 0, 0, 0

    def move(self, anchor: int, finished: int | None = None) -> None:
        """Go on from an anchor.

        Args:
            anchor: samples of the global sequence.
            finished: micro-batches whose training step the trainer has finished in its life; None leaves it.
        """
        self.anchor, self.taken = anchor, 0
        self._finished_before = self._finished_before if finished is None else finished

    def finished(self, progress: int | None) -> int:
        """Micro-batches since the anchor. One that was handed out but whose step was cut short does not count.

        Args:
            progress: micro-batches whose step the trainer has finished in its life; None outside a trainer.
        """
        if progress is None or not self.taken:
            return self.taken
        return min(self.taken, progress - self._finished_before)
