"""State dicts of model and optimizer, unsharded. If the head's classes are sharded these are collectives."""

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

FULL_STATE = StateDictOptions(full_state_dict=True)


def model_state(model: Classifier) -> dict[str, Tensor]:
    state: dict[str, Any] = get_model_state_dict(model, options=FULL_STATE) if model.is_sharded else model.state_dict()
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def load_model(model: Classifier, state: dict[str, Tensor]) -> None:
    if model.is_sharded:
        set_model_state_dict(model, dict(state), options=FULL_STATE)
    else:
        model.load_state_dict(state)


def optimizer_state(model: Classifier, optimizer: Optimizer) -> dict[str, Any]:
    return (
        get_optimizer_state_dict(model, optimizer, options=FULL_STATE) if model.is_sharded else optimizer.state_dict()
    )


def load_optimizer(model: Classifier, optimizer: Optimizer, state: dict[str, Any]) -> None:
    if model.is_sharded:
        set_optimizer_state_dict(model, optimizer, state, options=FULL_STATE)
    else:
        optimizer.load_state_dict(state)
