"""What the next iteration holds: the base of all policies, which batches continuously in the order of arrival."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from workbench.cost.serving.jobs import Job, Plan, Serving
from workbench.described import Described
from workbench.parameters import param
from workbench.registry import Paper


class Policy(Described):
    """Iteration-level batching, first come first served: whoever fits joins at the next iteration.

    Who came first stays; when the caches outgrow their room, the last to come is dropped and reads again later. A
    subclass changes the order, what a dropped job costs, or how prompts are read. paper, claim: of a system from the
    literature; what a simulation gives is a model's figure, beside it.
    """

    key = "fcfs"
    title = "First come, first served"
    paper: ClassVar[Paper | None] = None
    claim: ClassVar[str] = ""
    preempts: ClassVar[bool] = False  # one that runs may have to wait for another that comes before it in the order

    batch: int = param(256, ge=1, unit="sequences", help="at most in an iteration")
    chunk: int | None = param(None, help="tokens of prompts read in an iteration beside decoding; None: whole prompts")

    def order(self, jobs: Sequence[Job], now: float) -> list[Job]:
        """The jobs, the one to be served first in front."""
        return sorted(jobs, key=lambda job: (job.arrived, job.request.number))

    def next(self, server: Serving, now: float) -> Plan:
        """The next iteration of a server, whose jobs it may bring in or out. An empty plan: nothing can be done."""
        plan, chosen = Plan(), self._chosen(server, now)
        for job in [job for job in server.jobs if job.on_device and job not in chosen]:
            plan.stall += self.drop(job, server)
        for job in chosen:
            if not job.on_device:
                plan.stall += self.bring(job, server)
        self.fill(plan, chosen, server)
        return plan

    def _chosen(self, server: Serving, now: float) -> list[Job]:
        """Those whose caches will be on the device, within its room."""
        ordered = self.order([job for job in server.jobs if job.done is None], now)
        if not self.preempts:
            ordered.sort(key=lambda job: not job.on_device)  # stable: who is there stays, in order
        chosen: list[Job] = []
        room = server.times.room
        for job in ordered[: self.batch]:
            needed = server.times.nbytes(max(job.to_read, job.read) + 1)
            if needed > room:
                break
            room -= needed
            chosen.append(job)
        return chosen

    def drop(self, job: Job, server: Serving) -> float:
        """Take a job's cache off the device; seconds that everything waits for it. By default it is read again."""
        job.on_device, job.read, job.layers = False, 0, 0.0
        job.restarts += 1
        return 0.0

    def bring(self, job: Job, server: Serving) -> float:
        """Give a job its place on the device; seconds that everything waits for it."""
        job.on_device = True
        return 0.0

    def fill(self, plan: Plan, chosen: Sequence[Job], server: Serving) -> None:
        """What the chosen jobs do: with a chunk, decode and read together; without one, prompts first and alone."""
        reading = [job for job in chosen if not job.ready]
        if self.chunk is None:
            if reading:
                plan.read = [(job, job.to_read - job.read) for job in reading[:1]]
            else:
                plan.decode = list(chosen)
            return
        plan.decode = [job for job in chosen if job.ready]
        left = self.chunk
        for job in reading:
            part = min(job.to_read - job.read, left)
            if part > 0:
                plan.read.append((job, part))
                left -= part

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description."""
        return {"policy": self.key, **self.model_dump(mode="json")}
