"""Input pipeline: image transforms, samplers, loaders for training and evaluation, and mixup and cutmix."""

import random
from typing import Any

import torch
from data import Images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data.distributed import DistributedSampler
from torchvision.transforms import v2
from world import World

NORMALIZATION = {  # mean and standard deviation of each channel
    "digits-lt": ((0.5,) * 3, (0.5,) * 3),
    "cifar10-lt": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100-lt": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "inaturalist2018": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def train_transform(args: Any) -> v2.Transform:
    size = args.image_size
    augmentations: dict[str, list[v2.Transform]] = {
        "none": [resize_and_crop(args)],
        "shift": [resize_and_crop(args), v2.RandomAffine(degrees=(-10, 10), translate=(0.1, 0.1), scale=(0.9, 1.1))],
        "pad-crop-flip": [resize_and_crop(args), v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()],
        "resized-crop-flip": [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()],
    }
    return v2.Compose([v2.ToImage(), *augmentations[args.augment], normalize(args)])


def eval_transform(args: Any) -> v2.Transform:
    return v2.Compose([v2.ToImage(), resize_and_crop(args), normalize(args)])


def resize_and_crop(args: Any) -> v2.Transform:
    """Resize the shorter side to 8/7 of the crop, as 256 for 224, and crop the middle. Small sizes are not cropped."""
    size = args.image_size
    if size <= 64:
        return v2.Resize((size, size))
    return v2.Compose([v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)])


def normalize(args: Any) -> v2.Transform:
    mean, std = NORMALIZATION.get(args.dataset, IMAGENET)
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


class Transformed(Dataset):
    """(image, label) pairs, transformed. An image's randomness depends on seed, epoch and index alone.

    So it is the same for any number of workers and processes, and after a run is resumed.
    """

    def __init__(self, images: Images, transform: v2.Transform, seed: int):
        self.images, self.transform, self.seed = images, transform, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, self.epoch, index))
            return self.transform(image), int(self.images.target[index])


def derive_seed(*numbers: int) -> int:
    """Derive one seed from several numbers. Neighbouring numbers give unrelated seeds."""
    return random.Random(repr(numbers)).getrandbits(63)


class ClassBalancedSampler(DistributedSampler):
    """Draws with replacement, each class equally often; an epoch has as many images as the data set."""

    def __init__(self, target: Tensor, *args: Any, **kwargs: Any):
        super().__init__(target, *args, **kwargs)  # type: ignore[arg-type]  # only its length is used
        self.weights = target.bincount().double().reciprocal()[target]

    def __iter__(self):
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        positions = torch.rand(self.total_size, generator=generator, dtype=torch.float64) * self.weights.sum()
        drawn = torch.searchsorted(self.weights.cumsum(0), positions, right=True).clamp_max(len(self.weights) - 1)
        return iter(drawn[self.rank : self.total_size : self.num_replicas].tolist())


class TrainLoader:
    """The batches of an epoch: `batch_size` images a step over all processes. An incomplete last batch is dropped.

    Process r of R gets every R-th image of the epoch's order, so all together get the batches that one process would.
    """

    def __init__(self, args: Any, images: Images, world: World):
        self.dataset = Transformed(images, train_transform(args), args.seed)
        options = {"num_replicas": world.n_ranks, "rank": world.rank, "seed": args.seed, "drop_last": True}
        balanced = args.sampler == "class-balanced"
        self.sampler = (
            ClassBalancedSampler(images.target, **options) if balanced else DistributedSampler(self.dataset, **options)
        )
        self.loader = DataLoader(
            self.dataset, args.batch_size // world.n_ranks, sampler=self.sampler, num_workers=args.workers,
            drop_last=True, pin_memory=world.device.type == "cuda",
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, number: int) -> DataLoader:
        self.dataset.epoch = number  # before the workers start, because they copy the data set
        self.sampler.set_epoch(number)
        return self.loader


def eval_loader(args: Any, images: Images, world: World) -> DataLoader:
    """Every image once: process r gets every R-th. None is repeated to make the processes' shares equal."""
    dataset = Transformed(images, eval_transform(args), args.seed)
    shard = Subset(dataset, range(world.rank, len(dataset), world.n_ranks))
    pinned = world.device.type == "cuda"
    return DataLoader(shard, args.batch_size // world.n_ranks, num_workers=args.workers, pin_memory=pinned)


def on_device(images: Tensor, args: Any, world: World) -> Tensor:
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return images.to(world.device, non_blocking=True, memory_format=layout)


class Mix:
    """Mixup and cutmix of torchvision. A mixed image has both labels, each weighted by its share of the image.

    Pairs are drawn uniformly, so the labels are as frequent as before, and the prior stays the same.
    """

    def __init__(self, args: Any):
        self.alphas = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]
        self.alphas = [(kind, alpha) for kind, alpha in self.alphas if alpha > 0]

    def __call__(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mixed images, labels (N, 2) and their weights (N, 2). Without mixing: the images, labels (N,) and None."""
        if not self.alphas:
            return images, target, None
        kind, alpha = self.alphas[int(torch.randint(len(self.alphas), ()))]
        rows = torch.arange(len(target), device=target.device)
        # Pass an image's position as its label: the returned row then names its partner, at a cost of N^2, not N * C.
        images, shares = kind(alpha=alpha, num_classes=len(target))(images, rows)
        weight, partner = shares.masked_fill(rows[:, None] == rows, 0.0).max(1)
        return images, torch.stack([target, target[partner]], 1), torch.stack([1.0 - weight, weight], 1)
