"""Changes of a configuration that make it fit, or make it faster, each with a prediction of its own."""

from __future__ import annotations

from dataclasses import dataclass

from lisa_dist.config import Config, UserError
from lisa_dist.config.checks import check_accumulation, check_combinations, check_streamed
from lisa_dist.config.gpu import Gpu
from lisa_dist.config.loading import vary
from lisa_dist.planning.estimate import Estimate, estimate
from lisa_dist.planning.prediction import predict_over_draws
from lisa_dist.planning.simulation import Trace, cluster_dims
from lisa_dist.runtime.units import GIB
from lisa_dist.sharding.activation_checkpointing import KINDS
from lisa_dist.sharding.checkpointing_policy import RESERVED_BYTES

MOST_MICRO_BATCH = 1024
MOST_NODES = 1024


@dataclass(frozen=True)
class Plan:
    """A configuration with what is predicted of it."""

    overrides: list[str]  # what was changed
    config: Config
    gpu: Gpu
    trace: Trace
    estimate: Estimate  # where the draw of blocks matters, of the mean over draws
    range: tuple[Estimate, Estimate] | None = None  # of the quickest and of the slowest draw, where it matters

    @property
    def head_room(self) -> int:
        """Bytes left on the device at the peak; negative where it does not fit."""
        return self.gpu.memory_bytes - RESERVED_BYTES - self.trace.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak fits into the device's memory."""
        return self.head_room >= 0


def make_plan(config: Config, gpu: Gpu, overrides: list[str] | None = None) -> Plan:
    """Predict memory and time of ``config`` with ``overrides``.

    Raises:
        UserError: the configuration fits neither the model nor the cluster.
    """
    overrides = overrides or []
    config = vary(config, overrides)
    parallel = config.parallel
    if "auto" in (parallel.activation_checkpointing, parallel.offload) and parallel.memory_limit is None:
        config = vary(config, [f"parallel.memory_limit={gpu.memory_bytes / GIB}"])
    trace, extremes = predict_over_draws(config)
    bounds = None
    if extremes is not None:
        bounds = (estimate(extremes[0], gpu, config), estimate(extremes[1], gpu, config))
    return Plan(overrides, config, gpu, trace, estimate(trace, gpu, config), bounds)


def changes_that_fit(plan: Plan) -> list[Plan]:
    """Return plans of changed configurations, those that fit first, the cheapest in time a token foremost.

    Tried are: a smaller micro-batch, checkpointing, masters over all replicas, offload, more ranks; each alone, and
    then the savings together.
    """
    alone = [make_plan(plan.config, plan.gpu, overrides) for overrides in single_changes(plan.config)]
    together = [] if any(other.fits for other in alone) else _joint_changes(plan)
    tried = [*alone, *together]
    return sorted(tried, key=lambda other: (not other.fits, _seconds_per_token(other), -other.head_room))


def _seconds_per_token(plan: Plan) -> float:
    """Return the GPU seconds of a token, so that more ranks are no cheaper for being more."""
    ranks = plan.config.parallel.nodes
    return plan.estimate.step_seconds * ranks / plan.trace.tokens


def single_changes(config: Config) -> list[list[str]]:
    """Return the changes that save memory and that ``config`` allows, as overrides."""
    parallel, micro_batch = config.parallel, config.train.micro_batch_size
    changes = [
        (f"train.micro_batch_size={micro_batch // 2}", micro_batch > 1),
        ("parallel.activation_checkpointing=selective", parallel.activation_checkpointing == "none"),
        ("parallel.activation_checkpointing=full", parallel.activation_checkpointing != "full"),
        ("parallel.optimizer_shard=world", parallel.replicate > 1 and parallel.optimizer_shard == "replica"),
        ("parallel.offload=frozen", parallel.offload == "none"),
        ("parallel.offload=all", parallel.offload == "none"),
        (f"parallel.nodes={2 * parallel.nodes}", True),
    ]
    return [[change] for change, saves in changes if saves and _is_allowed(config, [change])]


def _is_allowed(config: Config, overrides: list[str]) -> bool:
    varied = vary(config, overrides)
    try:
        check_combinations(varied)
        check_accumulation(varied, cluster_dims(varied.parallel).data_ranks)
        check_streamed(varied, cluster_dims(varied.parallel).num_ranks)
    except UserError:
        return False
    return True


def _joint_changes(plan: Plan) -> list[Plan]:
    """Return the plan with every saving, and with ever more machines until it fits."""
    savings = []
    if plan.config.parallel.activation_checkpointing != "full":
        savings.append("parallel.activation_checkpointing=full")
    if plan.config.train.micro_batch_size > 1:
        savings.append("train.micro_batch_size=1")
    tried = [make_plan(plan.config, plan.gpu, savings)] if savings else []
    offloaded = [*savings, "parallel.offload=all"]
    untried = plan.config.parallel.offload == "none" and _is_allowed(plan.config, offloaded)
    if untried and not (tried and tried[-1].fits):
        tried.append(make_plan(plan.config, plan.gpu, offloaded))
    nodes = 2 * plan.config.parallel.nodes
    while nodes <= MOST_NODES and not (tried and tried[-1].fits):
        changes = [*savings, f"parallel.nodes={nodes}"]
        if not _is_allowed(plan.config, changes):  # a fixed number of shards
            break
        tried.append(make_plan(plan.config, plan.gpu, changes))
        nodes *= 2
    return tried


def search(config: Config, gpu: Gpu) -> list[Plan]:
    """Return, for each kind of checkpointing, the plan of the largest micro-batch that fits; the fastest first."""
    found = [_largest_micro_batch(config, gpu, kind) for kind in KINDS]
    return sorted(found, key=lambda plan: (not plan.fits, _seconds_per_token(plan)))


def _largest_micro_batch(config: Config, gpu: Gpu, checkpointing: str) -> Plan:
    """Return the plan of the largest micro-batch that fits; that of a single sequence where none does.

    Each size tried is where a straight line between a size that fits and one that does not meets the limit.
    The peak is the greatest of several lines, so it is below such a chord, and sizes are found from below.
    """

    def plan(size: int) -> Plan:
        overrides = [f"parallel.activation_checkpointing={checkpointing}", f"train.micro_batch_size={size}"]
        return make_plan(config, gpu, overrides)

    low, fitting = 1, plan(1)
    if not fitting.fits:
        return fitting
    high, beyond = 2, plan(2)
    while beyond.fits and high < MOST_MICRO_BATCH:
        slope = max(1, (fitting.head_room - beyond.head_room) // (high - low))
        low, fitting = high, beyond
        high = min(MOST_MICRO_BATCH, high + 1 + fitting.head_room // slope)
        beyond = plan(high)
    while not beyond.fits and high - low > 1:
        share = fitting.head_room / (fitting.head_room - beyond.head_room)
        middle = min(high - 1, max(low + 1, low + int((high - low) * share)))
        tried = plan(middle)
        if tried.fits:
            low, fitting = middle, tried
        else:
            high, beyond = middle, tried
    return beyond if beyond.fits else fitting
