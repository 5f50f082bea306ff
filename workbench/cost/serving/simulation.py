"""The event loop: requests arrive, servers run iterations, caches move between servers; each token is counted."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.cost.serving.jobs import Job, Plan
from workbench.cost.serving.policy import Policy
from workbench.cost.serving.step_times import Times
from workbench.cost.serving.workload import Workload
from workbench.display import Shown
from workbench.errors import BadParameter, NotApplicable

if TYPE_CHECKING:
    import pandas as pd

Stage = str
ENCODE, READ, DECODE = "encode", "read", "decode"


@dataclass
class Server:
    """A machine that runs one iteration after another under a policy, for the stages of requests that it serves.

    send: seconds in which a cache of so many bytes goes on to another server, where one does not serve all stages.
    encoding: seconds an image takes. watts: while it reads and while it decodes.
    """

    name: str
    times: Times
    policy: Policy
    stages: frozenset[Stage] = frozenset({READ, DECODE})
    send: Callable[[float], float] | None = None
    encoding: float = 0.0
    watts: tuple[float, float] = (0.0, 0.0)
    jobs: list[Job] = field(default_factory=list)
    busy: bool = False

    @property
    def held(self) -> float:
        """Bytes of the caches on the device."""
        return sum(self.times.nbytes(job.held) for job in self.jobs if job.on_device)

    def stage_of(self, job: Job) -> Stage:
        """What a job needs next."""
        if job.request.images and not job.encoded:
            return ENCODE
        return DECODE if job.ready else READ


@dataclass(frozen=True)
class Iteration:
    """One iteration as it went: seconds from `start` to `end`, stalls included."""

    server: str
    start: float
    end: float
    decoding: int
    reading: int
    held: float
    queue: int
    stall: float


@dataclass(frozen=True, repr=False)
class Simulation(Shown):
    """What became of a workload: a model's figures, not a measurement.

    jobs: all requests with their times; gaps: seconds between tokens of a request, all in one row; joules: of the time
    in which servers were busy.
    """

    workload: Workload
    servers: tuple[str, ...]
    policy: str
    jobs: tuple[Job, ...]
    iterations: tuple[Iteration, ...]
    gaps: tuple[float, ...]
    joules: float

    def requests(self) -> pd.DataFrame:
        """One row a request: arrival, wait until anything is done for it, time to the first token, and until done."""
        import pandas as pd

        rows = [
            {
                "request": job.request.number,
                "arrival": job.request.arrival,
                "prompt": job.request.prompt,
                "output": job.made,
                "wait_s": _since(job, job.started),
                "first_token_s": _since(job, job.first),
                "done_s": _since(job, job.done),
                "restarts": job.restarts,
            }
            for job in self.jobs
        ]
        return pd.DataFrame(rows)

    def timeline(self) -> pd.DataFrame:
        """One row an iteration: server, start, end, sequences that decode, tokens read, bytes held, jobs that wait."""
        import pandas as pd

        return pd.DataFrame([vars(each) for each in self.iterations])

    @property
    def seconds(self) -> float:
        """Until the last token."""
        return max((job.done or 0.0 for job in self.jobs), default=0.0)

    def numbers(self) -> dict[str, Any]:
        """Percentiles of waits, first tokens and gaps, and throughput, JSON-able."""
        frame = self.requests()
        busy: dict[str, float] = dict.fromkeys(self.servers, 0.0)
        for each in self.iterations:
            busy[each.server] += each.end - each.start
        return {
            "policy": self.policy,
            "requests": len(frame),
            "tokens": int(frame["output"].sum()),
            "seconds": self.seconds,
            "tokens_per_s": float(frame["output"].sum()) / self.seconds,
            "wait_s": _spread(frame["wait_s"]),
            "first_token_s": _spread(frame["first_token_s"]),
            "done_s": _spread(frame["done_s"]),
            "gap_s": _spread(self.gaps),
            "restarts": int(frame["restarts"].sum()),
            "busy": {name: spent / self.seconds for name, spent in busy.items()},
            "joules": self.joules,
        }

    def summary(self) -> str:
        """The same in a few lines."""
        told = self.numbers()
        rows = [
            f"  {title:18} mean {_time(told[name]['mean'])}, 99 % within {_time(told[name]['p99'])}"
            for name, title in (
                ("wait_s", "wait"),
                ("first_token_s", "first token"),
                ("gap_s", "between tokens"),
                ("done_s", "until done"),
            )
        ]
        head = f"{told['requests']:,} requests under {self.policy} on {', '.join(self.servers)} (a model)"
        return "\n".join([head, f"  throughput         {told['tokens_per_s']:,.1f} tokens/s", *rows])

    def __repr__(self) -> str:
        return f"<Simulation of {len(self.jobs):,} requests under {self.policy}>"


def simulate(
    servers: Sequence[Server] | Times, workload: Workload, policy: Policy | None = None, *, until: int = 10_000_000
) -> Simulation:
    """Run a workload. servers: that share it, each with its policy; or one machine's times, with `policy`.

    A request goes to the server with the fewest bytes of caches among those of its next stage. until: the most
    iterations. Raises NotApplicable for a request that no server can hold, BadParameter for a stage that none serves.
    """
    made = list(servers) if isinstance(servers, Sequence) else [Server("server", servers, policy or Policy())]
    run = _Run(made, workload)
    run.finish(until)
    names = " + ".join(dict.fromkeys(server.policy.key for server in made))
    order = sorted(run.jobs, key=lambda job: job.request.number)
    return Simulation(
        workload,
        tuple(server.name for server in made),
        names,
        tuple(order),
        tuple(run.iterations),
        tuple(run.gaps),
        run.joules,
    )


class _Run:
    """The state of one simulation."""

    def __init__(self, servers: Sequence[Server], workload: Workload) -> None:
        self.servers = servers
        self.jobs: list[Job] = []
        self.iterations: list[Iteration] = []
        self.gaps: list[float] = []
        self.joules = 0.0
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = count()
        for request in workload.requests:
            job = Job(request, request.arrival)
            self.jobs.append(job)
            self._at(request.arrival, partial(self._send, job))

    def _at(self, time: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), event))

    def finish(self, until: int) -> None:
        while self._events:
            now, _, event = heapq.heappop(self._events)
            event(now)
            if len(self.iterations) > until:
                raise NotApplicable(f"the simulation goes on after {until:,} iterations: it is overloaded")
        stuck = [job.request.number for job in self.jobs if job.done is None]
        if stuck:
            raise NotApplicable(
                f"request {stuck[0]} never fits: its {self.jobs[stuck[0]].to_read + 1:,} tokens take more than the "
                "room for caches that any server has"
            )

    def _send(self, job: Job, now: float) -> None:
        """To the server of its next stage that has the fewest bytes of caches."""
        stage = self.servers[0].stage_of(job)
        able = [server for server in self.servers if stage in server.stages]
        if not able:
            raise BadParameter(f"no server serves the stage {stage!r}")
        server = min(able, key=lambda each: sum(each.times.nbytes(other.to_read) for other in each.jobs))
        server.jobs.append(job)
        self._start(server, now)

    def _start(self, server: Server, now: float) -> None:
        if server.busy or not server.jobs:
            return
        plan = self._encoding(server) or server.policy.next(server, now)
        if not plan:
            return
        server.busy = True
        for job in (*plan.decode, *(job for job, _ in plan.read), *(job for job, _ in plan.layered)):
            job.started = now if job.started is None else job.started
        held = sum(job.held for job in plan.decode)
        reading = [(tokens, job.read) for job, tokens in plan.read]
        spent = server.times.iteration(len(plan.decode), held, reading) + plan.extra
        for job, share in plan.layered:
            spent += share * server.times.iteration(0, 0, [(job.to_read, 0)])
        end = now + plan.stall + spent
        queue = sum(not job.on_device for job in server.jobs)
        tokens = sum(count for count, _ in reading) + round(sum(job.to_read * share for job, share in plan.layered))
        self.iterations.append(
            Iteration(server.name, now, end, len(plan.decode), tokens, server.held, queue, plan.stall)
        )
        self.joules += (end - now) * server.watts[0 if tokens else 1]
        self._at(end, partial(self._end, server, plan))

    @staticmethod
    def _encoding(server: Server) -> Plan | None:
        """Images come before anything else, on a server that encodes."""
        waiting = [job for job in server.jobs if server.stage_of(job) == ENCODE]
        if not waiting:
            return None
        return Plan(layered=[(waiting[0], 0.0)], extra=server.encoding * waiting[0].request.images)

    def _end(self, server: Server, plan: Plan, now: float) -> None:
        server.busy = False
        for job, share in plan.layered:
            if not job.encoded and job.request.images:
                job.encoded = True
                continue
            job.layers += share
            if job.layers > 1 - 1e-9:
                job.read = job.to_read
                self._read(job, now)
        for job, tokens in plan.read:
            job.read += tokens
            if job.read >= job.to_read:
                self._read(job, now)
        for job in plan.decode:
            job.read += 1
            self._token(job, now)
        moved = [job for job in server.jobs if job.done is None and server.stage_of(job) not in server.stages]
        for job in moved:
            job.on_device = False
            delay = server.send(server.times.nbytes(job.held)) if job.held and server.send is not None else 0.0
            self._at(now + delay, partial(self._send, job))
        server.jobs = [job for job in server.jobs if job.done is None and job not in moved]
        self._start(server, now)

    def _read(self, job: Job, now: float) -> None:
        """The prompt is read, which gives the first token; what is read again after a restart gives none."""
        if not job.made:
            self._token(job, now)

    def _token(self, job: Job, now: float) -> None:
        job.made += 1
        if job.first is None:
            job.first = now
        elif job.last is not None:
            self.gaps.append(now - job.last)
        job.last = now
        if job.made >= job.request.output:
            job.done, job.on_device = now, False


def _since(job: Job, at: float | None) -> float:
    return float("nan") if at is None else at - job.request.arrival


def _spread(values: Any) -> dict[str, float]:
    found = np.asarray(values, dtype=float)
    if not found.size:
        return {"mean": 0.0, "p50": 0.0, "p99": 0.0}
    return {"mean": float(found.mean()), "p50": float(np.median(found)), "p99": float(np.quantile(found, 0.99))}


def _time(value: float) -> str:
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:,.2f} ms"
