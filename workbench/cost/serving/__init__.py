"""Serving as a simulation: requests that arrive, servers that run iterations under a policy, and an event loop.

`simulate(Modelled(wb.cost(...)), Workload.poisson(...), Policy())` runs one; times come from an estimate. All that it
gives is a model's figure.
"""

from workbench.cost.serving.jobs import Job, Plan
from workbench.cost.serving.policies import Alise, FastSwitch, FlexLLM, LayeredPrefill
from workbench.cost.serving.policy import Policy
from workbench.cost.serving.simulation import Iteration, Server, Simulation, simulate
from workbench.cost.serving.step_times import Fixed, Modelled, Times
from workbench.cost.serving.workload import Lengths, Request, Workload

__all__ = [
    "Alise",
    "FastSwitch",
    "Fixed",
    "FlexLLM",
    "Iteration",
    "Job",
    "LayeredPrefill",
    "Lengths",
    "Modelled",
    "Plan",
    "Policy",
    "Request",
    "Server",
    "Simulation",
    "Times",
    "Workload",
    "simulate",
]
