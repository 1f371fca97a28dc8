"""DataLoader that resumes after the last batch that training read, although its workers had read ahead."""

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import distributed
from torch.utils.data import DataLoader

from lightning_dalle.data.loading.examples import StreamedDataset
from lightning_dalle.errors import UserError


class ResumableLoader(DataLoader[Any]):
    """DataLoader whose state is the epoch, the number of its batches and, of a stream, the position of each worker.

    A checkpoint from the end of an epoch is resumed in the next one, where the number of batches must be ignored.
    Lightning restores the state and calls `iter` before `set_epoch`, so nothing is read before the first `next`.
    """

    epoch, num_batches = 0, 0
    """Epoch of the last iteration, and number of its batches that were read."""
    is_resumed = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.num_readers, self.is_streamed = max(self.num_workers, 1), isinstance(self.dataset, StreamedDataset)
        sampler: Any = self.sampler
        self.source: Any = self.dataset if self.is_streamed else sampler
        if self.is_streamed:
            sampler.set_epoch = partial(setattr, self.dataset, "epoch")  # Lightning sets the epoch of samplers alone

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch = getattr(self.source, "epoch", 0)
        self.num_batches = self.num_batches if self.is_resumed and epoch == self.epoch else 0
        self.epoch, self.is_resumed = epoch, False
        self.source.num_read = self.num_batches * (self.batch_size or 0)
        batches: Iterator[Any] = super().__iter__()
        for batch in self._in_turn(batches) if self.is_streamed else batches:
            self.num_batches += 1
            yield batch

    def _in_turn(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the workers' batches in turn, and note the state from which each worker continues.

        DataLoader begins with the first worker, but a resumed epoch may begin with another one's batch.
        """
        waiting: list[deque[Any]] = [deque() for _ in range(self.num_readers)]
        turn = self.num_batches % self.num_readers
        for batch, worker, state in batches:
            if state is None:  # one pass, in which workers may have different numbers of batches
                yield batch
                continue
            waiting[worker].append((batch, state))
            while waiting[turn]:
                batch, self.source.states[turn] = waiting[turn].popleft()
                turn = (turn + 1) % self.num_readers
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the state. All ranks of a stream must call this together, as they do to save a checkpoint."""
        state: dict[str, Any] = {"epoch": self.epoch, "num_batches": self.num_batches}
        if self.is_streamed:
            state["ranks"] = [[self.source.states.get(worker) for worker in range(self.num_readers)]]
            if distributed.is_initialized():  # Lightning saves the state of rank 0 alone
                [own], state["ranks"] = state["ranks"], [None] * distributed.get_world_size()
                distributed.all_gather_object(state["ranks"], own)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of this rank; it takes effect with the next iteration.

        Raises:
            UserError: if the state is of an earlier version or of data in another form, or if a stream had other
                numbers of processes or workers.
        """
        if "num_batches" not in state:
            raise UserError("cannot resume the data: the checkpoint is of an earlier version; start a new run")
        if self.is_streamed != ("ranks" in state):
            was = "was not streamed, but is now" if self.is_streamed else "was streamed, but is not now"
            raise UserError(f"cannot resume the data: it {was}; set data.source as it was, or start a new run")
        if self.is_streamed:
            ranks, is_distributed = state["ranks"], distributed.is_initialized()
            rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if is_distributed else (0, 1)
            if (len(ranks), len(ranks[0])) != (world_size, self.num_readers):
                raise UserError(
                    f"cannot resume the streamed data: the checkpoint was written by {len(ranks)} processes with "
                    f"{len(ranks[0])} workers, but this run has {world_size} with {self.num_readers}; use as many"
                )
            self.source.states = {worker: position for worker, position in enumerate(ranks[rank]) if position}
        self.epoch, self.num_batches, self.is_resumed = state["epoch"], state["num_batches"], True
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self.epoch)
