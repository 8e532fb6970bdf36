"""Settings of a suite of `clipkit zero-shot`: tasks that are measured together, and the one number of each that counts."""

from dataclasses import dataclass

from clipkit.config.schema import setting

# The main metrics that a task can have, and the kind of task that gives them.
SUITE_METRICS = {"acc1": "zeroshot_classification", "mean_per_class_recall": "zeroshot_classification",
                 "mean_recall@1": "zeroshot_retrieval", "mean_average_precision": "zeroshot_multilabel",
                 "acc": "image_caption_selection"}


@dataclass(frozen=True, kw_only=True)
class SuiteTaskConfig:
    """One line of a suite. What a YAML leaves out is null."""

    name: str = setting("what tables call it")
    task: str | None = None  # as task=... takes it
    metric: str | None = None  # one of SUITE_METRICS
    revision: str | None = None  # commit, branch or tag of a set on the hub; null = the newest
    split: str | None = None  # null = test
    prompts: tuple[str, ...] | None = None  # as templates=... takes them; of several the first counts. null = the set's own
    n: int | None = None  # images that it should have; null = unknown
    left_out: str | None = None  # why a task of the suite is not measured, in the place of task and metric

    def __post_init__(self) -> None:
        if (self.task is None) == (self.left_out is None):
            raise ValueError(f"{self.name} needs either task (what to measure) or left_out (why it is not measured)")
        if self.task is not None and self.metric not in SUITE_METRICS:
            raise ValueError(f"metric of {self.name} is {self.metric!r}; choose one of {', '.join(SUITE_METRICS)}")


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    name: str = setting("what tables call it")
    tasks: tuple[SuiteTaskConfig, ...] = setting("its tasks, those that are left out among them")

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise ValueError(f"suite {self.name} has several tasks called {', '.join(twice)}; give each a name of its own")
        if all(task.task is None for task in self.tasks):
            raise ValueError(f"suite {self.name} has no task to measure; give at least one with task and metric")
