"""What of a run is saved, whole also where the head's classes are spread over processes (which all have to ask)."""

from typing import Any

from model import Classifier
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

WHOLE = StateDictOptions(full_state_dict=True)


def model_state(model: Classifier) -> dict[str, Tensor]:
    state: dict[str, Any] = get_model_state_dict(model, options=WHOLE) if model.is_spread else model.state_dict()
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def load_model(model: Classifier, state: dict[str, Tensor]) -> None:
    if model.is_spread:
        set_model_state_dict(model, dict(state), options=WHOLE)
    else:
        model.load_state_dict(state)


def optimizer_state(model: Classifier, optimizer: Optimizer) -> dict[str, Any]:
    return get_optimizer_state_dict(model, optimizer, options=WHOLE) if model.is_spread else optimizer.state_dict()


def load_optimizer(model: Classifier, optimizer: Optimizer, state: dict[str, Any]) -> None:
    if model.is_spread:
        set_optimizer_state_dict(model, optimizer, state, options=WHOLE)
    else:
        optimizer.load_state_dict(state)
