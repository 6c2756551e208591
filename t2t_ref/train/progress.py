"""Where a run is, and what is due there (chapter 11)."""

from dataclasses import dataclass

from t2t_ref.train.recipes import Recipe


@dataclass
class Progress:
    """The place of a run among its epochs and updates, as it moves on.

    Note:
        epoch and update count what is done; start is the updates of the present epoch that are done
    """

    recipe: Recipe
    updates_per_epoch: int
    epoch: int = 0
    start: int = 0
    update: int = 0
    finished: bool = False

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return self.recipe.epochs * self.updates_per_epoch

    @property
    def share(self) -> float:
        """Epochs that are done, with their fraction, for the log."""
        return round(self.update / self.updates_per_epoch, 4)

    @property
    def is_last_epoch(self) -> bool:
        """Whether the present epoch is the last one."""
        return self.epoch + 1 == self.recipe.epochs

    def next_update(self) -> None:
        """One more update is done."""
        self.start, self.update = self.start + 1, self.update + 1

    def next_epoch(self) -> None:
        """One more epoch is done."""
        self.epoch, self.start = self.epoch + 1, 0

    def is_time_to_log(self) -> bool:
        """After an update: whether its line of the log is due."""
        return due(self.recipe.log_every, self.update)

    def is_time_to_save(self) -> bool:
        """After an update: whether a state is due. At the end of a run another one is written."""
        return due(self.recipe.save_every_updates, self.update)

    def is_time_to_evaluate(self) -> bool:
        """At the end of the present epoch, the last one included, unless the recipe never does."""
        every = self.recipe.evaluate_every
        return due(every, self.epoch + 1) or (bool(every) and self.is_last_epoch)

    def is_time_to_save_epoch(self) -> bool:
        """After an epoch: whether a state is due. The last one is followed by that of the whole run."""
        return due(self.recipe.save_every, self.epoch) and self.epoch < self.recipe.epochs


def due(every: int, count: int) -> bool:
    """Whether something that comes ``every`` so often comes at ``count``; 0 is never."""
    return bool(every) and count % every == 0
