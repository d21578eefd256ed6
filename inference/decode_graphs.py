"""Decode steps that are recorded on the device and replayed: CUDA graphs, one launch for a whole step.

A step of one new token for each job consists of the same operations whatever the tokens are, and to launch them one by
one takes longer than the device needs for them. So they are recorded once for each of a few numbers of jobs, over
tensors that stay where they are. A step writes into these, and replays the recording for as many jobs, or for some
more: its first job is in it several times then, and writes the same KV to the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from inference.attention.paged import PagedStep, Part, through_block_table
from inference.paged_kv import PagedKv, Pages
from inference.working_kv import new_context

Replay = Callable[[], torch.Tensor]
Record = Callable[[Callable[[], torch.Tensor]], Replay]  # what a call does on the device -> what does it once more


@dataclass(frozen=True)
class DecodeStep:
    """What a recorded step reads, always in the same place."""

    tokens: torch.Tensor  # token ids, and below them their positions  # [2, jobs] int64
    wanted: torch.Tensor  # the tokens whose logits are asked for: all  # [jobs] int64
    paged: PagedStep


class DecodeGraphs:
    """The recordings for several numbers of jobs. For one thread."""

    def __init__(
        self,
        pages: Pages,
        longest: int,
        sizes: Sequence[int],
        run: Callable[[DecodeStep], torch.Tensor],
        record: Record,
    ) -> None:
        """longest: tokens of a context. sizes: numbers of jobs. run: the forward pass, to logits [jobs, vocabulary].

        Raises InternalError: the model's attention cannot be recorded; OutOfKv; what `run` and `record` raise.
        """
        self.steps = 0  # that were taken from recordings
        self._pages, self._longest = pages, longest
        self._recorded: dict[int, tuple[DecodeStep, Replay]] = {}
        kv = new_context(pages, 1, 0)
        assert isinstance(kv, PagedKv)
        for size in sorted(sizes, reverse=True):  # the memory of the largest is enough for the others
            step = DecodeStep(
                torch.zeros(2, size, dtype=torch.int64, device=pages.shape.device),
                torch.arange(size, device=pages.shape.device),
                PagedStep([Part(kv, 0, 1)] * size, through_block_table, longest),
            )
            self._recorded[size] = step, record(lambda step=step: run(step))  # type: ignore[misc]

    def step(self, token_ids: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor | None:
        """The logits of each job's new token, until the next step; None: there is no recording of such a step.

        token_ids [jobs] int64; parts: of one new token each.  # -> [jobs, vocabulary]
        """
        size = min((size for size in self._recorded if size >= len(parts)), default=None)
        if size is None or not all(map(self._is_recorded, parts)):
            return None
        step, replay = self._recorded[size]
        more = size - len(parts)
        tokens = torch.stack((token_ids, torch.tensor([part.past for part in parts])))
        step.tokens.copy_(torch.cat((tokens, tokens[:, :1].expand(2, more)), 1), non_blocking=True)
        step.paged.fill([*parts, *[parts[0]] * more])
        self.steps += 1
        return replay()[: len(parts)]

    def _is_recorded(self, part: Part) -> bool:
        is_here = part.kv.pages is self._pages and part.total <= self._longest
        return is_here and part.new == 1 and part.past >= part.kv.raw.base


def batch_sizes(most: int) -> list[int]:
    """The numbers of jobs to record: powers of two, and `most`."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]


def cuda_graphs(device: torch.device) -> Record:
    """Recordings that share their memory: only the newest answer of all counts."""
    memory = torch.cuda.graph_pool_handle()

    def record(call: Callable[[], torch.Tensor]) -> Replay:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):  # what libraries do at their first call cannot be recorded
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            answer = call()

        def replay() -> torch.Tensor:
            graph.replay()
            return answer

        return replay

    return record
