"""Micro-batch and accumulation for a number of devices."""

from __future__ import annotations

from pydantic import BaseModel

from flows.config.sections import FitSettings
from rfdetr.config import TrainConfig
from rfdetr.errors import ConfigError


class BatchPlan(BaseModel, frozen=True):
    """Images per optimizer step: `batch_size * grad_accum_steps * world == effective`."""

    batch_size: int
    grad_accum_steps: int
    world: int
    effective: int


def plan_batch(fit: FitSettings, world: int) -> BatchPlan:
    """Micro-batch and accumulation for `world` devices.

    With `effective_batch_size`, uses the largest micro-batch up to `batch_size` that divides it.
    If there is none, raises ConfigError that suggests a possible combination.
    """
    plan = _find_plan(fit, world)
    if plan is None:
        raise ConfigError(_impossible(fit, world))
    return plan


def _find_plan(fit: FitSettings, world: int) -> BatchPlan | None:
    total = fit.effective_batch_size
    steps = fit.grad_accum_steps
    if total is None:
        steps = steps or TrainConfig.model_fields["grad_accum_steps"].default
        return _plan(fit.batch_size, steps, world)
    for batch in range(fit.batch_size, 0, -1):
        needed, rest = divmod(total, batch * world)
        if not rest and steps in (None, needed):
            return _plan(batch, needed, world)
    return None


def _plan(batch: int, steps: int, world: int) -> BatchPlan:
    return BatchPlan(
        batch_size=batch, grad_accum_steps=steps, world=world, effective=batch * steps * world
    )


def _impossible(fit: FitSettings, world: int) -> str:
    total = fit.effective_batch_size or 0
    candidates = sorted(range(1, 2 * (total + world) + 1), key=lambda n: (abs(n - total), -n))
    near = next(
        n
        for n in candidates
        if _find_plan(fit.model_copy(update={"effective_batch_size": n}), world)
    )
    devices = [n for n in range(1, min(total, 64) + 1) if _find_plan(fit, n)]
    fixed = f" and fit.grad_accum_steps {fit.grad_accum_steps}" if fit.grad_accum_steps else ""
    other = f", or keep {total} on {', '.join(map(str, devices))} device(s)" if devices else ""
    free = ", or leave fit.grad_accum_steps out" if fit.grad_accum_steps else ""
    return (
        f"fit.effective_batch_size {total} cannot be reached on {world} device(s) with "
        f"fit.batch_size up to {fit.batch_size}{fixed}. Possible: effective_batch_size {near} on "
        f"{world} device(s){other}{free}."
    )
