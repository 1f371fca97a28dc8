"""A loader of streamed data that every process of a run can go on with.

Knows processes and the places that they are at. Knows nothing of records.
"""

from typing import Any

from torch import distributed
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_dalle.errors import UserError


class StreamLoader(StatefulDataLoader[Any]):
    """Its state has the places of all processes, and each goes on at its own.

    Lightning asks every process for the state of its loader, but writes down that of the first alone and gives it to
    all. For rows that is enough, since all are as far as one another; of a stream each reads its own shards, and passes
    over what is rejected there.
    """

    def state_dict(self) -> dict[str, Any]:
        """Where each process is; all have to ask for it at once, as they do for a checkpoint."""
        places: list[Any] = [super().state_dict()]
        if distributed.is_initialized():
            own, places = places[0], [None] * distributed.get_world_size()
            distributed.all_gather_object(places, own)
        return {"processes": places}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to the place of this process with the next iteration.

        Raises:
            UserError: if there were more processes, or fewer.
        """
        places = state_dict["processes"]
        is_shared = distributed.is_initialized()
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if is_shared else (0, 1)
        if len(places) != world:
            raise UserError(
                f"the checkpoint's stream was read by {len(places)} processes, but this run has {world}, which cannot "
                "go on where those were"
            )
        super().load_state_dict(places[rank])
