"""What the benchmark trains on, and how much: its tasks, and the tiers that they come in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

#: Tuning runs of an arm in a task.
CANDIDATES = 6


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
    rates=(0.004, 0.008, 0.016),  # of 0.002 to 0.008 every arm took the largest
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
    """Return a task that tunes on what judges, if it has data of its own for that."""
    return replace(task, tuning=(), tuned_on=Task.tuned_on) if task.tuning else task


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
