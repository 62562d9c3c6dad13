"""Count the examples of each class, and turn class counts into a log prior: once before training, or at every step.

    n_c         = number of training examples of class c
    log_prior_c = log((n_c + a) / (sum_k n_k + C * a)),    a = pseudocount, C = number of classes

`count_classes` and `log_prior_from_counts` run once, before training, so they may read values: on a GPU they wait for
the device. With fake tensors and while a graph is recorded there are no values, and they compute without checking.
`RunningPrior` counts the labels of a stream, a batch a step, and waits for no device.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_la._call import checks
from fused_la._call.class_counts import dtype_name, log_prior_of, to_int64
from fused_la._call.values import is_compiled_or_traced, read_value

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MAX_COUNTS = 1 << 34  # 128 GB of them


def count_classes(
    target: Tensor | np.ndarray | Sequence[Any],
    n_classes: int,
    *,
    ignore_index: int = -100,
    groups: Tensor | np.ndarray | Sequence[Any] | None = None,
    n_groups: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Count the examples of each class, or with `groups` those of each class in each group.

        n_c  = #{i : target_i = c and target_i != ignore_index}
        n_gc = #{i : groups_i = g and target_i = c and target_i != ignore_index}

    Args:
        target: class indices in [0, n_classes) or `ignore_index`, of any shape, also empty: a tensor or array of any
            integer dtype, or a (nested) list of ints, also of lists of different lengths, as of sentences.
        n_classes: the number of classes C. Classes that never occur, also the last ones, get the count 0.
        ignore_index: entries of this value are not counted, as in `torch.nn.functional.cross_entropy`.
        groups: the group of each entry, such as its hospital, site, client or domain: integers of the shape of
            `target`, in [0, n_groups). That of an ignored entry does not matter.
        n_groups: the number of groups G. None is the largest group that is counted + 1, over all ranks of `group`.
        group: a `torch.distributed` process group, which has nothing to do with `groups`. The counts are summed over
            its ranks. Every rank has to make this call, and an error on one rank raises on all. With None only the
            target of this process is counted, without communication, even if a default process group exists.

    Returns:
        Counts, (C,) or with `groups` (G, C), int64, on the device of `target` (the CPU for arrays and lists).

    Raises:
        TypeError: `target` or `groups` is not integer, or another argument has the wrong type.
        ValueError: `groups` does not have its shape; `n_classes` or `n_groups` is not positive, or
            not the same on all ranks; `n_groups` is given without `groups`, or missing where values cannot be read.
        IndexError: an entry is neither in [0, n_classes) nor `ignore_index`, or the group of an entry that counts is
            not in [0, n_groups), on this rank or another.

    Example:
        >>> count_classes([0, 1, 0, -100, 0], n_classes=3)
        tensor([3, 1, 0])
        >>> count_classes([0, 1, 0, -100, 0], n_classes=3, groups=[0, 0, 1, 1, 1])
        tensor([[1, 1, 0],
                [2, 0, 0]])

    Source:
        The class frequencies of Menon et al., "Long-tail learning via logit adjustment", ICLR 2021.
    """
    if group is None:
        return _count(target, n_classes, ignore_index, groups, n_groups)
    from fused_la._class_parallel import exchange  # here: builds of PyTorch without torch.distributed can count too

    def check() -> tuple[Tensor, dict[str, Any]]:
        counts = _count(target, n_classes, ignore_index, groups, n_groups)
        n_counted_groups = 0 if groups is None else len(counts)
        return counts, {
            "n_classes": counts.shape[-1], "grouped": groups is not None, "n_groups": n_groups or 0,
            "n_counted_groups": n_counted_groups,
        }  # fmt: skip

    class_counts, headers = exchange.exchange_headers(exchange.ranks_of(group), "count_classes", check)
    exchange.check_same("n_classes", "the same", [numbers["n_classes"] for numbers in headers])
    exchange.check_same("groups", "given or None", ["given" if numbers["grouped"] else "None" for numbers in headers])
    exchange.check_same("n_groups", "the same", [numbers["n_groups"] or None for numbers in headers])
    if groups is not None:
        missing = max(numbers["n_counted_groups"] for numbers in headers) - len(class_counts)
        class_counts = nn.functional.pad(class_counts, (0, 0, 0, missing))
    return exchange.sum_over_group(class_counts, group)


def _count(target: Any, n_classes: Any, ignore_index: Any, groups: Any, n_groups: Any) -> Tensor:
    """The counts of the target of this process, (C,) or (G, C)."""
    n_classes, ignore_index = _to_positive_int(n_classes, "n_classes"), _to_int(ignore_index, "ignore_index")
    labels, is_uint64 = to_int64(target, "target")
    counted = labels != ignore_index
    if is_uint64:
        counted |= labels < 0  # an entry of 2^63 or more has wrapped to a negative one: out of range, never ignored
    if not is_compiled_or_traced(labels):
        expected = f"in [0, {n_classes}) or equal to ignore_index = {ignore_index}"
        _check_range("target", labels, is_uint64, counted, n_classes, expected)
    if groups is None:
        if n_groups is not None:
            raise ValueError(f"n_groups must be None without groups, got {n_groups!r}")
        return _histogram(labels, counted, n_classes)

    rows, is_uint64 = to_int64(groups, "groups")
    if rows.shape != labels.shape:
        raise ValueError(f"groups must have the shape of target, {tuple(labels.shape)}, got {tuple(rows.shape)}")
    n_groups, rows = None if n_groups is None else _to_positive_int(n_groups, "n_groups"), rows.to(labels.device)
    if not (is_compiled_or_traced(labels) or is_compiled_or_traced(rows)):
        expected = f"{'of at least 0' if n_groups is None else f'in [0, {n_groups})'} where target is not ignored"
        _check_range("groups", rows, is_uint64, counted, n_groups or 2**63, expected)
        if n_groups is None:
            n_groups = int(rows[counted].max()) + 1 if bool(counted.any()) else 0
    elif n_groups is None:
        raise ValueError("n_groups must be given with groups that are fake or traced and have no values, got None")
    if n_groups * n_classes > _MAX_COUNTS:
        raise ValueError(
            f"groups must be numbers from 0 on, got {n_groups} groups of {n_classes} classes, too many to count; "
            "torch.unique(groups, return_inverse=True) makes such numbers of ids"
        )
    is_class = (labels >= 0) & (labels < n_classes)  # another label must not count as a class of another group
    cells = torch.where(is_class, rows * n_classes + labels, n_groups * n_classes)
    return _histogram(cells, counted, n_groups * n_classes).view(n_groups, n_classes)


def _check_range(name: str, values: Tensor, is_uint64: bool, counted: Tensor, end: int, expected: str) -> None:
    """Raise for the first counted value outside [0, end)."""
    values, counted = values.reshape(-1), counted.reshape(-1)
    kept = values[counted]
    if kept.numel() == 0 or 0 <= int(kept.min()) <= int(kept.max()) < end:
        return
    position = int((counted & ((values < 0) | (values > end - 1))).nonzero()[0])
    value = int(values[position]) % 2**64 if is_uint64 else int(values[position])
    raise IndexError(f"{name} must have entries {expected}, got {value} at flat index {position}")


def _histogram(values: Tensor, counted: Tensor, n_values: int) -> Tensor:
    """How often each value in [0, n_values) is among the counted ones, (n_values,) int64."""
    if is_compiled_or_traced(values):
        values, counted = values.reshape(-1), counted.reshape(-1)
        counts = values.new_zeros(n_values)
        return counts.scatter_add(0, values.masked_fill(~counted, 0), counted.to(torch.int64))
    return torch.bincount(values[counted], minlength=n_values)


def log_prior_from_counts(
    class_counts: Tensor | np.ndarray | Sequence[float] | Sequence[Sequence[float]] | Mapping[int, float],
    *,
    pseudocount: float = 0.0,
    exclude_absent: bool = False,
) -> Tensor:
    """Turn class counts into the logarithm of the class prior, for all examples or for each group of them.

        log_prior_c = log((n_c + a) / (sum_k n_k + C * a)),    a = pseudocount

    Args:
        class_counts: examples of each class, n_c >= 0, (C,): a tensor or array of any integer or floating
            dtype, or a sequence of numbers. Or a mapping whose keys are the classes 0 to C - 1 in any order:
            `collections.Counter(labels)`, a dict, or `pandas.Series(labels).value_counts()`. Fractions are fine; not
            every count may be 0. Or (G, C), the counts of G groups, as from `count_classes(..., groups=...)`; each
            group has a prior of its own. A group without any example needs a pseudocount and gets a uniform prior.
        pseudocount: examples added to every class, a >= 0. Classes without examples need a > 0, or `exclude_absent`.
        exclude_absent: give classes without examples a log prior of -inf, which excludes them from a loss; for example
            if a head of 1,000 outputs is trained on 10 classes.

    Returns:
        Log prior, (C,) or (G, C) float32, finite except for classes excluded by `exclude_absent`; computed in float64,
        on the device of `class_counts` (the CPU for arrays and sequences). It carries no gradient.

    Raises:
        TypeError: `class_counts` is not numeric, or another argument has the wrong type.
        ValueError: `class_counts` has neither one nor two dimensions, is empty, has a NaN, infinite or negative count,
            or only zeros; keys are not the classes 0 to C - 1; a class has no examples and neither `pseudocount` nor
            `exclude_absent` is given, or a group has none and no `pseudocount` is given; both are given; `pseudocount`
            is negative or not finite.

    Example:
        >>> from collections import Counter
        >>> log_prior_from_counts([4, 2, 2]).exp()
        tensor([0.5000, 0.2500, 0.2500])
        >>> log_prior_from_counts(Counter([1, 0, 2, 0, 1, 0, 0, 2])).exp()
        tensor([0.5000, 0.2500, 0.2500])
        >>> log_prior_from_counts([6, 0], pseudocount=1).exp()
        tensor([0.8750, 0.1250])
        >>> log_prior_from_counts([[4, 2, 2], [1, 0, 1]], pseudocount=1).exp()
        tensor([[0.4545, 0.2727, 0.2727],
                [0.4000, 0.2000, 0.4000]])

    Source:
        The prior pi of Menon et al., "Long-tail learning via logit adjustment", ICLR 2021; the pseudocount is
        additive (Laplace) smoothing.
    """
    return log_prior_of(class_counts, pseudocount, exclude_absent)


class RunningPrior(nn.Module):
    r"""The log prior of a stream of labels, from class counts that decay: for online and continual learning.

    .. math:: n_c \leftarrow d \, n_c + \#\{i : y_i = c\}, \qquad
              \log \pi_c = \log \frac{n_c + a}{\sum_k n_k + C a}

    with d the decay and a the pseudocount, which keeps every class finite, also one that has not come yet. `update`
    counts a batch and returns the log prior, an argument of `logit_adjusted_cross_entropy`. Another log prior at every
    step compiles nothing anew, neither kernels nor graphs of `torch.compile`. When classes are added, a compiled
    function that gets the log prior as an argument is compiled once more, then for any number of classes; one that
    calls `update` is compiled for each number.

    Args:
        n_classes: the number of classes C, to which `add_classes` adds.
        decay: d in [0, 1], the factor of the counts at each update. The counts are those of the last 1 / (1 - d)
            batches or so; 1 forgets nothing.
        pseudocount: a > 0, examples added to every class.
        ignore_index: entries of this value are not counted.
        group: a `torch.distributed` process group over which the counts of each batch are summed. All ranks then make
            the same calls, `add_classes` too; on a CPU an error on one rank raises on all. With None only the labels of
            this process are counted.

    Attributes:
        class_counts: (C,) float64, a buffer. It is in the `state_dict` and moves with the module. Casts of the module,
            such as `.half()`, do not round it.
        log_prior: (C,) float32, on the device of the counts; a new tensor each time, without a gradient.

    Shape:
        target of any shape; the log prior is (C,).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range; `update` for a target that is not
            integer or on another device, or on a CPU if the ranks differ in their number of classes.
        IndexError: `update` on a CPU for labels that are neither classes nor ignore_index, on any rank; nothing is
            counted then. On a GPU and under `torch.compile`, where reading them would wait, such labels are not
            counted, and the loss of their rows is NaN.

    Example:
        >>> prior = RunningPrior(3, decay=0.5)
        >>> prior.update(torch.tensor([0, 0, 0, 1])).exp()
        tensor([0.5714, 0.2857, 0.1429])
        >>> prior.update(torch.tensor([2, 2, 2, 2])).exp()
        tensor([0.2778, 0.1667, 0.5556])
        >>> prior.add_classes(1)
        >>> prior.log_prior.exp()
        tensor([0.2500, 0.1500, 0.5000, 0.1000])

    Source: The prior pi of Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, here of a stream.
    """

    class_counts: Tensor

    def __init__(
        self, n_classes: int, *, decay: float = 0.99, pseudocount: float = 1.0, ignore_index: int = -100,
        group: ProcessGroup | None = None,
    ):  # fmt: skip
        super().__init__()
        n_classes = checks.check_int("n_classes", n_classes, 1)
        self.decay = checks.check_number("decay", decay, 0.0, 1.0, "between 0 and 1")
        self.pseudocount = checks.check_number("pseudocount", pseudocount, 1e-30, 1e30, "finite and positive")
        self.ignore_index = checks.check_ignore_index(ignore_index)
        self.group = group
        if group is not None:
            from fused_la._class_parallel import exchange

            exchange.ranks_of(group)
        self.register_buffer("class_counts", torch.zeros(n_classes, dtype=torch.float64))

    @torch.no_grad()
    def update(self, target: Tensor) -> Tensor:
        """Count the labels of a batch, and return the new log prior, (C,) float32.

        Args:
            target: class indices or `ignore_index`, a tensor of any integer dtype and any shape, also empty.
        """
        n_classes = len(self.class_counts)
        if self.group is None:
            batch = self._count_batch(target)
        else:
            from fused_la._class_parallel import exchange

            if self.class_counts.is_cpu and not is_compiled_or_traced(self.class_counts):
                batch, headers = exchange.exchange_headers(
                    exchange.ranks_of(self.group), "RunningPrior.update",
                    lambda: (self._count_batch(target), {"n_classes": n_classes}),
                )  # fmt: skip
                exchange.check_same("n_classes", "the same", [numbers["n_classes"] for numbers in headers])
            else:
                batch = self._count_batch(target)
            batch = exchange.sum_over_group(batch, self.group)
        n_outside = read_value(batch[-1])
        if n_outside:
            raise IndexError(
                f"target must hold class indices in [0, {n_classes}) or ignore_index ({self.ignore_index}), "
                f"got {n_outside:.0f} labels that are neither"
            )
        self.class_counts.mul_(self.decay).add_(batch[:-1])
        return self.log_prior

    def _count_batch(self, target: Tensor) -> Tensor:
        """The counts of a batch, (C + 1,); the last is of labels that are no class."""
        checks.check_tensor("target", target)
        if not checks.is_integer(target):
            raise TypeError(f"target must be integer, got {dtype_name(target)}")
        if target.device != self.class_counts.device:
            raise ValueError(
                f"target must be on the device of class_counts, {self.class_counts.device}, got {target.device}; "
                "move the RunningPrior there with .to()"
            )
        n_classes = len(self.class_counts)
        labels = target.reshape(-1).long()  # as uint8, an ignore_index of -100 would be 156
        cells = torch.where((labels >= 0) & (labels < n_classes), labels, n_classes)
        batch = self.class_counts.new_zeros(n_classes + 1)
        return batch.scatter_add_(0, cells, (labels != self.ignore_index).to(batch.dtype))

    @property
    def log_prior(self) -> Tensor:
        counts = self.class_counts + self.pseudocount
        return (counts.log() - counts.sum().log()).float()

    def add_classes(self, n: int) -> None:
        """Append n classes with the count 0. The counts are then another tensor."""
        with torch.inference_mode(False):
            self.class_counts = nn.functional.pad(self.class_counts, (0, checks.check_int("n", n, 1)))

    def reset_parameters(self) -> None:
        """Forget all labels; also what gives the counts values after `to_empty`."""
        self.class_counts.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningPrior:
        counts = self.class_counts
        super()._apply(fn, recurse)
        if self.class_counts.dtype != counts.dtype:  # a cast, which moves the counts but does not round them
            self.class_counts = counts.to(self.class_counts.device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        saved = state_dict.get(prefix + "class_counts")
        if isinstance(saved, Tensor) and saved.dim() == 1 and len(saved) not in (0, len(self.class_counts)):
            self.class_counts = self.class_counts.new_zeros(len(saved))  # the number of classes is the saved one
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.class_counts = self.class_counts.double()  # load_state_dict(assign=True) takes the saved dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> RunningPrior:
        """A copy that counts over the same process group, which cannot be copied."""
        memo[id(self.group)] = self.group
        result = memo[id(self)] = type(self).__new__(type(self))
        result.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return result

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError("group must be None to pickle a RunningPrior, got a process group; save its state_dict()")
        return self.__dict__

    def extra_repr(self) -> str:
        return f"n_classes={len(self.class_counts)}, decay={self.decay}, pseudocount={self.pseudocount}"


def _to_int(value: Any, name: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got bool")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must fit in int64, got a number that does not")
    return number


def _to_positive_int(value: Any, name: str) -> int:
    number = _to_int(value, name)
    if number < 1:
        raise ValueError(f"{name} must be positive, got {number}")
    return number
