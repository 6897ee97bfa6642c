"""Keeps the training states of a run: the best epochs, the last one, and those within an epoch"""

import contextlib
import glob
import os
import shutil
from typing import Dict, List, Optional, Tuple

from timm.utils import CheckpointSaver

from ...atomic import move_into_place, write_whole
from ...run_folder import RECOVERY_PATTERN


class Saver(CheckpointSaver):
    """timm's saver, but files are replaced in one step. timm's own removes the old file before it moves the new one."""

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(save_path)  # torch.save would write through a symbolic link that somebody left there
        super()._save(save_path, epoch, metric)

    def _replace(self, src: str, dst: str) -> None:
        move_into_place(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        with write_whole(dst) as temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            try:
                os.link(src, temporary)
            except OSError:
                shutil.copy2(src, temporary)

    def state_of(self, epoch: int) -> str:
        """Path of the state that is kept for an epoch, if it is among the best."""
        return self._checkpoint_path(epoch)

    def copy_state(self, path: str, new: str) -> None:
        """Give a state a second name."""
        self._duplicate(path, new)

    def _ranking(self, metrics: Dict[int, float]) -> List[Tuple[int, float]]:
        """The epochs that are kept and their scores, best first, when these epochs are saved one after the other."""
        kept: List[Tuple[int, float]] = []
        for epoch, metric in sorted(metrics.items()):
            if len(kept) < self.max_history or self.cmp(metric, kept[-1][1]):
                kept = [*kept[: self.max_history - 1], (epoch, metric)]
                kept.sort(key=lambda item: item[1], reverse=not self.decreasing)
        return kept

    def restore(
        self,
        metrics: Dict[int, float],
        state: str,
        state_epoch: Optional[int],
    ) -> None:
        """Bring the folder and the ranks to where they were when a state was saved and nothing was cut off.

        A process that is killed while it saves an epoch may have written `last`, but not yet the state of the epoch,
        and may not have removed the state that this one displaces.

        Args:
            metrics: Score of every validated epoch up to the state.
            state: Path of the state that is continued.
            state_epoch: Epoch at whose end the state was saved, None if it was saved within an epoch.
        """
        ranking = self._ranking(metrics)
        kept = {epoch for epoch, _ in ranking}
        if state_epoch in kept and not os.path.exists(self.state_of(state_epoch)):
            self.copy_state(state, self.state_of(state_epoch))
        extra = [self.state_of(epoch) for epoch in metrics.keys() - kept if os.path.exists(self.state_of(epoch))]
        if len(extra) == 1 and not os.path.samefile(
            extra[0], state
        ):  # more are not from a kill: --checkpoint-hist was larger
            os.unlink(extra[0])
        paths = [(self.state_of(epoch), metric) for epoch, metric in ranking]
        self.checkpoint_files = [(path, metric) for path, metric in paths if os.path.exists(path)]
        recoveries = glob.glob(os.path.join(glob.escape(self.recovery_dir), RECOVERY_PATTERN))
        self.curr_recovery_file = max(recoveries, key=os.path.getmtime, default='')
