"""Changes of a configuration that make it fit, or make it faster, each with a prediction of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lisa_dist.config import Config, UserError
from lisa_dist.config.checks import check_accumulation, check_combinations, check_streamed
from lisa_dist.config.gpu import Gpu
from lisa_dist.config.loading import vary
from lisa_dist.config.placement import is_block_major
from lisa_dist.planning.estimate import Estimate, estimate
from lisa_dist.planning.prediction import predict_over_draws
from lisa_dist.planning.simulation import Trace, architecture_of, cluster_dims
from lisa_dist.runtime.units import GIB
from lisa_dist.sharding.activation_checkpointing import KINDS
from lisa_dist.sharding.memory_policy import RESERVED_BYTES
from lisa_dist.training.limits import check_streaming

MOST_MICRO_BATCH = 1024
MOST_NODES = 1024
OF_ACTIVATIONS = {  # keys that change what the passes need, and nothing that stays from step to step
    "train.micro_batch_size",
    "parallel.activation_checkpointing",
    "parallel.offload_activations",
    "parallel.block_major",
}


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
    def room(self) -> int:
        """Bytes of the device that tensors may take."""
        return self.gpu.memory_bytes - RESERVED_BYTES

    @property
    def head_room(self) -> int:
        """Bytes left on the device at the peak; negative where it does not fit."""
        return self.room - self.trace.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak fits into the device's memory."""
        return self.head_room >= 0

    @property
    def fits_without_activations(self) -> bool:
        """Whether the weights, gradients and moments on the device fit into its memory."""
        return sum(self.trace.persistent_bytes.values()) - self.trace.host_bytes <= self.room


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

    Tried are, until something fits: what saves memory and leaves the training as it is, each alone and then together;
    on top of it what trains less at a time; and more machines. Each plan takes a second or more, so what saves
    activations alone is left out where the rest alone does not fit. Where one rank fits with steps on the CPU alone,
    which are slow, training less on the device is tried too.
    """
    config, tried = plan.config, list[Plan]()
    for stage in (single_changes, _joint_savings, _lean_training, _smaller_training, _more_machines):
        if any(_ends_search(other, stage in (_joint_savings, _lean_training)) for other in tried):
            break
        for overrides in stage(config):
            is_known = _leaves_too_much(plan, overrides) or _is_known_from(tried, overrides)
            if is_known or not _is_allowed(config, overrides):
                continue
            changed = _plan_of_change(config, plan.gpu, overrides)
            if changed is not None:
                tried.append(changed)
                if changed.fits and stage is not single_changes:
                    break
    return sorted(tried, key=lambda other: (not other.fits, _seconds_per_token(other), -other.head_room))


def _ends_search(tried: Plan, is_lean_to_come: bool) -> bool:
    """Whether it fits, and nothing else is to be tried."""
    steps_on_cpu = tried.config.parallel.offload == "all"
    return tried.fits and not (steps_on_cpu and is_lean_to_come and _is_one_rank(tried.config))


def _leaves_too_much(plan: Plan, overrides: list[str]) -> bool:
    """Whether what stays on the device from step to step is too much by itself, and the change leaves it so."""
    keys = {override.partition("=")[0] for override in overrides}
    if not plan.fits_without_activations and keys <= OF_ACTIVATIONS:
        return True
    frozen = 0 if plan.config.parallel.offload != "none" else plan.trace.persistent_bytes.get("frozen_parameters", 0)
    return frozen > plan.room and not keys & {"parallel.offload", "parallel.nodes"}


def _is_known_from(tried: list[Plan], overrides: list[str]) -> bool:
    """Whether less saving did where steps are made on the CPU, or more saving did not where a block keeps more."""
    if "parallel.offload=all" in overrides[1:]:  # with other savings
        return any(other.fits for other in tried)
    full = ["parallel.activation_checkpointing=full"]
    selective = ["parallel.activation_checkpointing=selective"]
    return overrides == selective and any(other.overrides == full and not other.fits for other in tried)


def _plan_of_change(config: Config, gpu: Gpu, overrides: list[str]) -> Plan | None:
    """Return the plan of what training would take, None where the model does not go with the change.

    Where the global batch is no multiple of micro-batch x ranks then, it becomes the next one.
    """
    values = dict(override.split("=") for override in overrides)
    micro_batch = int(values.get("train.micro_batch_size", config.train.micro_batch_size))
    parallel = replace(config.parallel, nodes=int(values.get("parallel.nodes", config.parallel.nodes)))
    at_once = micro_batch * cluster_dims(parallel).data_ranks
    whole = at_once if config.optimizer.in_backward else -(-config.train.global_batch_size // at_once) * at_once
    if whole != config.train.global_batch_size:
        overrides = [*overrides, f"train.global_batch_size={whole}"]
    try:
        if "parallel.offload=frozen" in overrides:
            check_plan_streams(vary(config, overrides))
        return make_plan(config, gpu, overrides)
    except UserError:
        return None


def check_plan_streams(config: Config) -> None:
    """Raise :class:`UserError` where training would: frozen blocks come from host memory, with wrong gradients."""
    check_streaming(config, architecture_of(config.model), cluster_dims(config.parallel).num_ranks)


def _seconds_per_token(plan: Plan) -> float:
    """Return the GPU seconds of a token, so that more ranks are no cheaper for being more."""
    ranks = plan.config.parallel.nodes
    return plan.estimate.step_seconds * ranks / plan.trace.tokens


def single_changes(config: Config) -> list[list[str]]:
    """Return the changes that save memory without one of the training, and that ``config`` allows, as overrides."""
    parallel, micro_batch = config.parallel, config.train.micro_batch_size
    kept = "full" if is_block_major(parallel, config.train) else parallel.activation_checkpointing
    parts = next(parts for parts in range(2, micro_batch + 2) if micro_batch % parts == 0 or parts > micro_batch)
    changes = [
        (f"train.micro_batch_size={micro_batch // parts}", micro_batch > 1),
        ("parallel.activation_checkpointing=full", kept != "full"),
        ("parallel.activation_checkpointing=selective", kept == "none"),
        ("parallel.offload_activations=true", parallel.block_major and not parallel.offload_activations),
        ("parallel.block_major=false", parallel.block_major),
        ("parallel.optimizer_shard=world", parallel.replicate > 1 and parallel.optimizer_shard == "replica"),
        ("parallel.offload=frozen", parallel.offload == "none"),
        ("parallel.offload=all", parallel.offload == "none"),
    ]
    return [[change] for change, saves in changes if saves and _is_allowed(config, [change])]


def _is_allowed(config: Config, overrides: list[str]) -> bool:
    try:
        varied = vary(config, overrides)
        check_combinations(varied)
        check_accumulation(varied, cluster_dims(varied.parallel).data_ranks)
        check_streamed(varied, cluster_dims(varied.parallel).num_ranks)
    except UserError:
        return False
    return True


def _savings(config: Config) -> list[str]:
    savings = []
    if is_block_major(config.parallel, config.train):
        savings.append("parallel.block_major=false")
        savings += ["parallel.offload_activations=false"] if config.parallel.offload_activations else []
    if config.parallel.activation_checkpointing != "full":
        savings.append("parallel.activation_checkpointing=full")
    if config.train.micro_batch_size > 1:
        savings.append("train.micro_batch_size=1")
    return savings


def _offloaded(config: Config) -> list[str]:
    """Return the savings with what can lie in host memory there."""
    offload = ["parallel.offload=all"] if config.parallel.offload == "none" else []
    return [*_savings(config), *(offload if _is_allowed(config, offload) else [])]


def _is_one_rank(config: Config) -> bool:
    return cluster_dims(config.parallel).num_ranks == 1


def _joint_savings(config: Config) -> list[list[str]]:
    """Return every saving together, without and with offload; one alone was tried by itself."""
    return [joint for joint in (_savings(config), _offloaded(config)) if len(joint) > 1]


def _frozen_ends(config: Config) -> list[str]:
    ends = [f"always_active.{part}=false" for part in ("embeddings", "norm", "head")]
    return ends if config.always_active.embeddings else []


def _one_block(config: Config) -> list[str]:
    return ["sampler.active_layers=1"] if (config.sampler.active_layers or 0) > 1 else []


def _lean_training(config: Config) -> list[list[str]]:
    """Return, for one rank with every saving, frozen ends, a single block beside them, and others that stream."""
    leaner = [*_savings(config), *_frozen_ends(config)]
    one_block = [*leaner, *_one_block(config)]
    streamed = [*one_block, *(["parallel.offload=frozen"] if config.parallel.offload == "none" else [])]
    distinct = dict.fromkeys((*change,) for change in (leaner, one_block, streamed) if change)
    return [[*change] for change in distinct] if _is_one_rank(config) else []


def _smaller_training(config: Config) -> list[list[str]]:
    """Return, with every saving, what makes a trained parameter smaller, what trains fewer, and these together.

    The former are moments in 8 bits, masters and gradients in bfloat16, and gradients of one block at a time.
    """
    frozen_ends, one_block = _frozen_ends(config), _one_block(config)
    moments = ["optimizer=adamw8bit"] if _is_allowed(config, ["optimizer=adamw8bit"]) else []
    masters = [f"precision.{key}=bfloat16" for key in ("active", "reduce")]
    masters = masters if config.precision.active != "bfloat16" else []
    in_backward = [] if config.optimizer.in_backward else ["optimizer.in_backward=true", "optimizer.grad_clip=0"]
    less = [moments, masters, in_backward, frozen_ends, one_block]
    less += [[*frozen_ends, *one_block], [*moments, *frozen_ends, *one_block]]
    distinct = dict.fromkeys(tuple(change) for change in less if change)
    return [[*_offloaded(config), *change] for change in distinct]


def _more_machines(config: Config) -> list[list[str]]:
    """Return ever more machines: the next number alone, then all with every saving that leaves weights on the GPU."""
    doubled = [config.parallel.nodes * 2**times for times in range(1, MOST_NODES.bit_length())]
    nodes = [[f"parallel.nodes={number}"] for number in doubled if number <= MOST_NODES]
    savings = _savings(config)
    return [*nodes[:1], *([*savings, *number] for number in (nodes if savings else nodes[1:]))]


def search(config: Config, gpu: Gpu) -> list[Plan]:
    """Return, for each kind of checkpointing, the plan of the largest micro-batch that fits; the fastest first.

    A kind that the model does not go with is left out.
    """
    found = [plan for kind in KINDS if (plan := _largest_micro_batch(config, gpu, kind)) is not None]
    return sorted(found, key=lambda plan: (not plan.fits, _seconds_per_token(plan)))


def _largest_micro_batch(config: Config, gpu: Gpu, checkpointing: str) -> Plan | None:
    """Return the plan of the largest micro-batch that fits; that of a single sequence where none does.

    Each size tried is where a straight line between a size that fits and one that does not meets the limit; halfway
    where the one that does not can't be planned, as with ``parallel.offload=auto``.
    The peak is the greatest of several lines, so it is below such a chord, and sizes are found from below.
    """

    def plan(size: int) -> Plan | None:
        overrides = [f"parallel.activation_checkpointing={checkpointing}", f"train.micro_batch_size={size}"]
        return _plan_of_change(config, gpu, overrides)

    low, fitting = 1, plan(1)
    if fitting is None or not fitting.fits:
        return fitting
    high, beyond = 2, plan(2)
    while beyond is not None and beyond.fits and high < MOST_MICRO_BATCH:
        slope = max(1, (fitting.head_room - beyond.head_room) // (high - low))
        low, fitting = high, beyond
        high = min(MOST_MICRO_BATCH, high + 1 + fitting.head_room // slope)
        beyond = plan(high)
    while (beyond is None or not beyond.fits) and high - low > 1:
        share = 0.5 if beyond is None else fitting.head_room / (fitting.head_room - beyond.head_room)
        middle = min(high - 1, max(low + 1, low + int((high - low) * share)))
        tried = plan(middle)
        if tried is not None and tried.fits:
            low, fitting = middle, tried
        else:
            high, beyond = middle, tried
    return beyond if beyond is not None and beyond.fits else fitting
