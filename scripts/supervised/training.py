"""The image tower of a finished run, trained anew as a classifier: softmax over the training concepts, no text.

All but the loss is the run's: the tower and its random start, the pictures in their order with their augmentation,
optimizer, schedule, samples and batch.
"""

import json
import resource
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.config import PretrainConfig, identity, parse
from clipkit.data.emoji.pack import read_emoji_rows
from clipkit.data.lanes import default_lanes
from clipkit.data.loader import TrainLoader, make_train_loader
from clipkit.data.samples import PictureExamples, group_id
from clipkit.data.shards import count_samples
from clipkit.data.sources import find_sources
from clipkit.evaluation.feature_rows import evaluation_mode
from clipkit.model.image_text import ImageTextModel
from clipkit.training.allocator import keep_freed_memory
from clipkit.training.atomic_files import write_bytes_atomically
from clipkit.training.distributed import start_process
from clipkit.training.live_line import LiveLine
from clipkit.training.optim import clip_gradient, make_optimizer, optimizer_step, set_learning_rate
from clipkit.training.plan import Plan, make_plan
from clipkit.training.precision import autocast
from clipkit.training.random_state import seed_all
from clipkit.training.schedule import learning_rate
from clipkit.training.trained_model import make_model

SHOWN_EVERY = 10  # steps
SHARED_SETTINGS = ("seed", "model", "data", "optim", "schedule", "train")  # those of a run that the classifier has too


class Classifier(NamedTuple):
    """A tower with a linear layer in the place of its projection. Legend: F width of the trunk, K training concepts."""

    model: ImageTextModel  # its text tower and projections are random
    head: nn.Linear  # (F) to (K)
    facts: dict[str, Any]  # samples, steps, last_loss, skipped_steps, bad, cpu_seconds of the training

    def logits(self, trunk_features: Tensor) -> Tensor:
        """Score features (N, F). (N, K)."""
        with torch.no_grad():
            return self.head(trunk_features)


def read_settings(run: Path) -> PretrainConfig:
    """Read the settings of a run on the embedded data.

    Raises:
      FileNotFoundError: there is no such run.
      ValueError: it was trained on other data, or in a way that is not repeated here.
    """
    import yaml

    file = run / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; give --model=<run folder>, or make the default run first: make pretrain")
    config = parse(PretrainConfig, yaml.safe_load(file.read_text(encoding="utf-8")))
    if config.data.train != ("emoji",):
        raise ValueError(f"{run} was trained on {', '.join(config.data.train)}; the comparison is about the embedded data: "
                         "give a run with data.train=emoji")
    if config.train.ema_decay or config.train.overfit_batches:
        raise ValueError(f"{run} has train.ema_decay or train.overfit_batches, which the supervised training leaves out; give "
                         "a run without them")
    return config


def train_concepts() -> dict[str, str]:
    """The K classes in their order: code points of each concept that train has -> its label."""
    return {row.concept: row.label for row in sorted(read_emoji_rows(), key=lambda row: row.concept) if row.split == "train"}


def trained_classifier(config: PretrainConfig, file: Path) -> Classifier:
    """Read the classifier of a run from its file; where there is none, train it and write it.

    Raises:
      ValueError: the file is of a run with other settings.
    """
    from safetensors import safe_open
    from safetensors.torch import save

    settings = {key: value for key, value in identity(config).items() if key.split(".")[0] in SHARED_SETTINGS}
    settings = json.loads(json.dumps(settings))
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(config.train.threads or threads)
        fresh = train(config)
        torch.set_num_threads(threads)  # the probes may have them all
        tensors = {**fresh.model.towers.visual.state_dict(prefix="visual."), **fresh.head.state_dict(prefix="head.")}
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes_atomically(file, save(plain, {"settings": json.dumps(settings), "facts": json.dumps(fresh.facts)}))
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no mapping)
    differing = [key for key, value in json.loads(about["settings"]).items() if settings.get(key, value) != value]
    if differing:
        raise ValueError(f"{file} was trained with other settings than the run ({', '.join(differing)}); give another --out, "
                         "or remove it")
    model, head = make_model(config), nn.Linear(*reversed(tensors["head.weight"].shape))
    for module, prefix in ((model.towers.visual, "visual."), (head, "head.")):
        module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()
                                if name.startswith(prefix)})
    return Classifier(model.eval(), head, json.loads(about["facts"]))


def train(config: PretrainConfig) -> Classifier:
    """Train tower and linear layer with cross-entropy. Legend: B batch, F width of the trunk, K training concepts."""
    before = cpu_seconds()
    device = start_process(config.device, config.parallel.timeout_seconds).device
    if device.type == "cpu":
        keep_freed_memory()
    seed_all(config.seed)  # the tower starts with the weights that the run's started with
    model = make_model(config).to(device)
    head = nn.Linear(trunk_width(model), len(train_concepts())).to(device)
    named = [*model.towers.visual.named_parameters(), *head.named_parameters(prefix="head")]
    optim, schedule = config.optim, config.schedule
    optimizer = make_optimizer(named, name=optim.name, recipe=optim.recipe, lr=optim.lr, weight_decay=optim.weight_decay,
                               beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps)
    seed_all(config.seed + 1)  # as in the run: dropout
    loader, plan = make_loader(config, model)
    class_of = {group_id("concept", "", {"concept": concept}): number for number, concept in enumerate(train_concepts())}
    loss, skipped = torch.zeros(()), torch.zeros((), device=device)
    model.train()
    with closing(loader), closing(LiveLine(sys.stdout)) as line:
        for step, batch in zip(range(plan.total_steps), loader, strict=False):
            set_learning_rate(optimizer, learning_rate(step, name=schedule.name, peak=optim.lr, warmup=plan.warmup_steps,
                                                       total_steps=plan.total_steps, cooldown=schedule.cooldown))
            labels = torch.tensor([class_of[group] for group in batch.group_ids.tolist()], device=device)  # (B,)
            with autocast(device, config.train.precision):
                _, trunk_features = model.encode_image_with_trunk(batch.images.to(device))  # (B, F)
                loss = F.cross_entropy(head(trunk_features).float(), labels)
            loss.backward()
            skipped += optimizer_step(optimizer, clip_gradient([parameter for _, parameter in named], optim.max_grad_norm))
            if step % SHOWN_EVERY == 0:
                line.update(f"supervised: step {step:,} of {plan.total_steps:,}, loss {loss.item():.3f}")
    facts = {"samples": plan.total_steps * plan.global_batch_size, "steps": plan.total_steps, "last_loss": loss.item(),
             "skipped_steps": int(skipped.item()), "bad": loader.bad, "cpu_seconds": cpu_seconds() - before}
    return Classifier(model, head, facts)


def make_loader(config: PretrainConfig, model: ImageTextModel) -> tuple[TrainLoader, Plan]:
    """The run's own pictures, in its order and with its augmentation; group ids are the concepts."""
    data, size = config.data, config.train.global_batch_size
    shards = find_sources(data.train, weighted=data.weights is not None, cache_dir=data.cache_dir)
    lanes = data.lanes or default_lanes(max(map(len, shards)))
    plan = make_plan(config.train, config.schedule, lanes=lanes,
                     num_samples=count_samples([shard for source in shards for shard in source], data.cache_dir))
    examples = PictureExamples(data=data, image_size=model.image_size, group_by="concept")
    return make_train_loader(data, shards=shards, lanes=lanes, tokenize=model.tokenize, examples=examples, seed=config.seed,
                             global_batch_size=size), plan


def trunk_width(model: ImageTextModel) -> int:
    """Length of the features before the projection, F."""
    with evaluation_mode(model):
        picture = torch.zeros(1, 3, model.image_size, model.image_size, dtype=torch.uint8, device=model.device)
        return model.encode_image_with_trunk(picture)[1].shape[1]


def cpu_seconds() -> float:
    """Processor time of this process and of its loader processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
