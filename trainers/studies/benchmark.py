"""The benchmark: geometric routing against what people use, on text, images and planted data.

An arm is a choice of ``configs/arm``, a task one of ``configs/experiment/benchmark``; a tier says how large they are.
Every arm is tuned on the same small budget, with a seed of its own, before its runs begin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from trainers.studies.runs import Run

#: The seed of all tuning runs; the runs that are judged have 0, 1, ….
TUNING_SEED = 1000

#: Tuning runs of an arm in a task.
CANDIDATES = 6

Setting = dict[str, float]
"""Tuned keys of the configuration and their values."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A router.

    Attributes:
        title: in reports.
        knob: the key that is tuned beside the learning rate, and its two values; without one, twice as many learning
            rates are tried.
        ours: whether it is this library's.
        linear: whether it is a baseline that ours are compared with, if it is the best.
        weight: how long a step takes, in steps of a plain mixture.
        without: the arm that it is without its controller; what tuning finds may differ, so that it is also run
            at this arm's setting.
    """

    title: str
    knob: tuple[str, tuple[float, float]] | None = None
    ours: bool = False
    linear: bool = False
    weight: float = 1.0
    without: str | None = None


_BALANCE = ("geometry.regularizers.balance", (0.001, 0.01))

ARMS: Mapping[str, Arm] = {
    "linear_switch": Arm(title="linear, Switch loss", knob=_BALANCE, linear=True),
    "linear_z": Arm(title="linear, Switch loss and z-loss", knob=_BALANCE, linear=True),
    "linear_bias": Arm(title="linear, loss-free bias", knob=("prior.speed", (0.001, 0.01)), linear=True),
    "polar_riemannian": Arm(title="ours: polar, Riemannian Adam", knob=_BALANCE, ours=True, weight=1.1),
    "polar_natural": Arm(title="ours: polar, natural gradient", knob=_BALANCE, ours=True, weight=1.15),
    "polar_natural_regularized": Arm(title="ours: natural, regularizers", knob=_BALANCE, ours=True, weight=1.2),
    "polar_natural_act": Arm(
        title="ours: natural, controller acting", knob=_BALANCE, ours=True, weight=1.25, without="polar_natural"
    ),
    "cosine": Arm(title="cosine, Switch loss", knob=_BALANCE),
    "hash": Arm(title="hash"),
    "frozen": Arm(title="frozen random"),
    "soft": Arm(title="soft (all experts)", weight=2.5),
    "dense": Arm(title="dense"),
}

#: Those that are tuned and trained first, because the question is about them.
LEADING = tuple(name for name, arm in ARMS.items() if arm.ours or arm.linear)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned.

    Attributes:
        title: in reports: the data, a comma, what is measured.
        experiment: of configs/experiment/benchmark.
        metrics: results and their headings; the first decides.
        size: overrides that make it larger or smaller than the experiment.
        tuning: overrides of the tuning runs alone.
        tuned_on: what their loss is of, for the report.
        steps: of a run.
        share: length of a tuning run in runs.
        rates: learning rates that are tried, ascending.
        seconds: of one run of a plain mixture, about; for the time left.
        observed: further results and their headings.
        domains: whether the loss of each domain is of interest.
    """

    title: str
    experiment: str
    metrics: Mapping[str, str]
    size: tuple[str, ...] = ()
    tuning: tuple[str, ...] = ()
    tuned_on: str = "the held-out data that judge as well"
    steps: int
    share: float = 0.125
    rates: tuple[float, float, float] = (0.002, 0.004, 0.008)
    seconds: float
    observed: Mapping[str, str] = field(default_factory=dict)
    domains: bool = False

    @property
    def primary(self) -> str:
        """The result that decides."""
        return next(iter(self.metrics))

    @property
    def data(self) -> str:
        """The title without what is measured."""
        return self.title.partition(",")[0]


def rises(metric: str) -> bool:
    """Return whether more of a metric is better."""
    return metric.endswith(("/accuracy", "/recovery", "/recovery_ami"))


_SHIFTS = {
    "noise10": "noise",
    "noise20": "more noise",
    "blur": "blur",
    "contrast": "half the contrast",
    "rotation": "turned",
}
_ACCURACY = {
    "valid/accuracy": "accuracy",
    "valid/loss": "loss, nats",
    **{f"probe/{name}/accuracy": title for name, title in _SHIFTS.items()},
}
_BITS = {"valid/bits_per_byte": "held-out text"}

_LANGUAGE = Task(
    title="English Wikipedia, bits per byte",
    experiment="language",
    metrics={
        "probe/enwiki_valid/bits_per_byte": "enwiki valid",
        "probe/wikitext2_valid/bits_per_byte": "WikiText-2 valid",
        "probe/wikitext2_test/bits_per_byte": "WikiText-2 test",
    },
    tuned_on="32,768 bytes of the split that judges; 1.6% of the bytes that judge are among them",
    steps=1560,
    seconds=100,
)
_VISION = Task(
    title="Fashion-MNIST, accuracy",
    experiment="fashion_mnist",
    metrics=_ACCURACY,
    tuning=("data.split=valid",),  # no look at the test images
    tuned_on="the last 5,000 train images, which are not trained on then",
    steps=1000,
    share=0.5,  # an eighth prefers rates that lose in the end
    seconds=100,
)
_PLANTED = Task(
    title="Planted Markov sources, nats a token",
    experiment="planted",
    metrics={
        "valid/loss": "loss",
        "valid/recovery": "recovered assignment",
        "valid/recovery_ami": "adjusted mutual information",
    },
    tuned_on="planted data of another seed",
    steps=400,
    share=0.5,  # of short runs
    seconds=15,
)

CPU_TASKS: Mapping[str, Task] = {
    "language": _LANGUAGE,
    "fashion_mnist": _VISION,
    "cifar10": replace(
        _VISION,
        title="CIFAR-10 (first half of train), accuracy",
        experiment="cifar10",
        rates=(0.001, 0.002, 0.004),  # of 0.002 to 0.008 every arm took the least
        seconds=150,
    ),
    "multidomain": replace(
        _LANGUAGE,
        title="Text of many domains, bits per byte",
        experiment="multidomain",
        metrics=_BITS,
        tuning=("data.split=valid",),  # no look at the documents that judge
        tuned_on="other documents, which are not trained on then",
        domains=True,
        observed={"valid/geometry/fsi_domain": "FSI of domains", "valid/geometry/fsi_domain_null": "its null"},
    ),
    "planted": _PLANTED,
}


def _size(experts: int, top_k: int, hidden: int) -> tuple[str, ...]:
    """Return the overrides of a mixture's size; arms take theirs from it."""
    sizes = {"num_experts": experts, "top_k": top_k, "expert_hidden": hidden, "dense_hidden": top_k * hidden}
    return tuple(f"size.{name}={value}" for name, value in sizes.items())


def _smoke(task: Task, title: str, *size: str) -> Task:
    toy = ("model.dim=16", "model.heads=2", *_size(4, 2, 16), *size)
    return replace(_untuned(task), title=title, size=toy, steps=8, share=0.5, seconds=0.5)


def _untuned(task: Task) -> Task:
    """Return a task without data of its own to tune on."""
    return replace(task, tuning=(), tuned_on=Task.tuned_on)


#: Small data that every installation has.
SMOKE_TASKS: Mapping[str, Task] = {
    "planted": _smoke(
        _PLANTED,
        "A few planted Markov sources, nats a token",
        *("data.documents=400", "data.length=64", "data.valid_tokens=2048"),
    ),
    "vision": _smoke(
        _VISION,
        "Planted images, accuracy",
        *("data=planted_images", "probes=[]", "data.images=400", "model.patch=2"),
    ),
}


def _gpu(experts: int, top_k: int, hidden: int) -> Task:
    size = (
        *("device=cuda", "loop.precision=bf16", "model.layers=8", "model.dim=512", "model.heads=8"),
        *_size(experts, top_k, hidden),
        *("data.max_bytes=null", "data.batch_size=32", "data.length=512", "data.valid_tokens=262144"),
    )
    return replace(
        _LANGUAGE,
        title=f"English Wikipedia, {experts} experts, bits per byte",
        size=size,
        tuning=("data.split=test",),  # valid judges
        tuned_on="enwiki's test split",
        steps=1500,
        rates=(0.0005, 0.001, 0.002),
        seconds=120,
    )


GPU_TOP_K = {"language_8": 2, "language_64": 8}

#: 65 and 109 million parameters.
GPU_TASKS: Mapping[str, Task] = {
    "language_8": _gpu(8, GPU_TOP_K["language_8"], 576),
    "language_64": _gpu(64, GPU_TOP_K["language_64"], 128),
}


def _toy(name: str, task: Task) -> Task:
    """Return the GPU's task on a CPU: the same but for the device, the text, and the sizes other than the experts'."""
    toy = (
        *("device=cpu", "data=stdlib", "data.max_bytes=200000", "probes=[]", "data.batch_size=2", "data.length=64"),
        *("model.layers=2", "model.dim=32", "model.heads=2", "data.valid_tokens=2048"),
        *("size.expert_hidden=8", f"size.dense_hidden={8 * GPU_TOP_K[name]}"),
    )
    return replace(
        _untuned(task), title=f"Toy of {name}", metrics=_BITS, size=(*task.size, *toy), steps=8, share=0.5, seconds=0.5
    )


@dataclass(frozen=True, kw_only=True)
class Tier:
    """How much is run.

    Attributes:
        name: in the rows; rows of another tier are refused.
        tasks: by name, in their order.
        seeds: of ours and the linear baselines.
        others: seeds of the other arms, at most.
        candidates: tuning runs of an arm.
        processes: side by side.
        leading_first: whether the other arms wait until those that decide the question are done in all tasks.
        minutes: after which no run begins unless another slice is asked for; None: no limit.
    """

    name: str
    tasks: Mapping[str, Task]
    seeds: int = 10
    others: int = 5
    candidates: int = CANDIDATES
    processes: int = 2
    leading_first: bool = True
    minutes: float | None = None

    @property
    def study(self) -> str:
        """The study's name in the rows."""
        return f"benchmark-{self.name}"


TIERS: Mapping[str, Tier] = {
    "smoke": Tier(
        name="smoke",
        tasks=SMOKE_TASKS,
        seeds=1,
        others=1,
        candidates=2,
        processes=1,
        leading_first=False,  # to start few processes
    ),
    "cpu": Tier(name="cpu", tasks=CPU_TASKS),
    # A run that has begun is finished: 20 minutes of beginning are less than 25 in all.
    "gpu": Tier(name="gpu", tasks=GPU_TASKS, processes=1, minutes=20.0),
}

#: What ``gpu --toy`` runs.
TOY = replace(
    TIERS["gpu"],
    name="gpu-toy",
    tasks={name: _toy(name, task) for name, task in GPU_TASKS.items()},
    seeds=1,
    others=1,
    candidates=2,
    leading_first=False,
)


def settings(arm: Arm, task: Task, candidates: int = CANDIDATES) -> list[Setting]:
    """Return what is tried for an arm: three learning rates by two values of its knob, or six learning rates.

    Args:
        arm: whose knob.
        task: whose learning rates.
        candidates: how many of them.
    """
    if arm.knob is None:
        rates = sorted([*task.rates, *(float(f"{rate / 2**0.5:.2g}") for rate in task.rates)])
        return [{"optimizer.lr": rate} for rate in rates][:candidates]
    key, values = arm.knob
    return [{"optimizer.lr": rate, key: value} for rate in task.rates for value in values][:candidates]


def tuning_runs(tier: Tier, task: str, arm: str) -> list[Run]:
    """Return the tuning runs of an arm in a task."""
    found, chosen = ARMS[arm], tier.tasks[task]
    steps, weight = max(1, round(chosen.share * chosen.steps)), chosen.share * chosen.seconds * found.weight
    return [
        Run(
            f"{task}/tuning/{arm}/{'/'.join(f'{key}={value:g}' for key, value in setting.items())}",
            [*_common(chosen, arm, TUNING_SEED, steps), *chosen.tuning, "probes=[]", *_overrides(setting)],
            {"task": task, "arm": arm, "phase": "tuning", "setting": dict(setting)},
            weight,
        )
        for setting in settings(found, chosen, tier.candidates)
    ]


def seeds_of(tier: Tier, arms: Sequence[str], seeds: int | None = None) -> dict[str, int]:
    """Return how many runs of each arm are judged, in the order in which they begin.

    Args:
        tier: says how many.
        arms: those that are wanted.
        seeds: of those that decide the question; None: the tier's.
    """
    many = tier.seeds if seeds is None else seeds
    return {arm: many if arm in LEADING else min(many, tier.others) for arm in ARMS if arm in arms}


def main_runs(tier: Tier, task: str, choices: Mapping[str, Setting], seeds: Mapping[str, int]) -> list[Run]:
    """Return the runs that are judged, and those without a controller beside them; seeds outermost.

    Args:
        tier: the tier.
        task: one of its tasks.
        choices: the tuned setting of each arm.
        seeds: how many, for each arm in the order in which they begin.
    """
    runs = []
    for arm, seed in _by_seed(seeds):
        runs.append(_main_run(tier.tasks[task], task, arm, arm, choices[arm], seed))
        other = ARMS[arm].without
        if other is not None and choices.get(other) != choices[arm]:
            runs.append(_main_run(tier.tasks[task], task, arm, other, choices[arm], seed))
    return runs


def _main_run(found: Task, task: str, arm: str, trained: str, setting: Setting, seed: int) -> Run:
    """Return a run of an arm, or of the one that it is without its controller, at its setting."""
    return Run(
        main_key(task, arm, seed) if trained == arm else f"{task}/{arm}/without/seed{seed}",
        [*_common(found, trained, seed, found.steps), *_overrides(setting)],
        {"task": task, "arm": arm, "phase": "main" if trained == arm else "without", "setting": dict(setting)},
        found.seconds * ARMS[trained].weight,
    )


def main_key(task: str, arm: str, seed: int) -> str:
    """Return the key of a run that is judged."""
    return f"{task}/{arm}/seed{seed}"


def _by_seed(seeds: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    for seed in range(max(seeds.values(), default=0)):
        yield from ((arm, seed) for arm, count in seeds.items() if seed < count)


def _common(task: Task, arm: str, seed: int, steps: int) -> Sequence[str]:
    return (
        f"experiment=benchmark/{task.experiment}",
        f"arm={arm}",
        *task.size,
        f"loop.steps={steps}",
        f"loop.warmup={max(1, round(0.05 * steps))}",
        f"seed={seed}",
    )


def _overrides(setting: Setting) -> Iterator[str]:
    return (f"{key}={value:g}" for key, value in setting.items())
