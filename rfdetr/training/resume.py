"""What a checkpoint needs beyond Lightning's own state, so that a resumed run goes on exactly.

Used by RFDETRModule: `save` and `load` are its checkpoint hooks, `start` runs when training starts.
Lightning restores weights, optimizer, scheduler, callbacks and counters; this adds the position in
the data, the random generators, the schedule under a changed length or number of devices, and the
history in metrics.csv (training specification, section 14.4).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from rfdetr.checkpoints.adapt import add_silent_classes, fold_adapters
from rfdetr.checkpoints.convert import LEGACY_MARKER
from rfdetr.checkpoints.pretrained import OPTIONAL_SUFFIXES
from rfdetr.checkpoints.record import CheckpointRecord, parse_checkpoint
from rfdetr.checkpoints.structure import structure_mismatch, warn_differing_settings
from rfdetr.config import ModelConfig
from rfdetr.errors import CheckpointError
from rfdetr.training.rng import random_state, restore_random_state

if TYPE_CHECKING:
    from rfdetr.training.module import RFDETRModule

KEY = "rfdetr_resume"
PREFIX = "model."
ENDLESS_EPOCHS = 100  # the length of the schedule of training without an end
STREAM_STEPS = 1000  # steps of an epoch of such training on data without a length


def planned_steps(trainer: pl.Trainer) -> tuple[int, int]:
    """(optimizer steps of the whole fit, optimizer steps of an epoch), as Lightning runs them."""
    total = trainer.estimated_stepping_batches  # builds the training loader, where it has an end
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    if math.isinf(per_epoch):
        epochs = max(1, trainer.max_epochs or 1)
        per_epoch = STREAM_STEPS if math.isinf(total) else total // epochs
    if math.isinf(total):
        total = math.ceil(per_epoch) * ENDLESS_EPOCHS
    return max(1, int(total)), max(1, math.ceil(per_epoch))


def save(module: RFDETRModule, checkpoint: dict[str, Any]) -> None:
    """Add the record of this run to a checkpoint that is about to be written."""
    trainer = module._trainer
    checkpoint["model_name"] = type(module.model_config).__name__.removesuffix("Config")
    checkpoint["class_names"] = module.class_names
    if trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return
    checkpoint[KEY] = {
        "random": random_state(),
        "samples_per_batch": _samples_per_batch(module),
        "steps_per_epoch": planned_steps(trainer)[1],
        "epoch_sums": _epoch_sums(trainer),
    }


def _epoch_sums(trainer: Any) -> dict[str, list[Tensor]]:
    """Sums and counts behind the epoch means that are being logged."""
    return {
        key: [metric.value.detach().cpu(), metric.cumulated_batch_size.cpu()]
        for key, metric in trainer.fit_loop.epoch_loop._results.items()
        if metric.meta.on_epoch and metric.meta.is_mean_reduction
    }


def load(module: RFDETRModule, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint fits and remember what `start` needs.

    A dictionary without Lightning's `state_dict` gets one from its `model`. Raises CheckpointError
    when weights and network differ in structure or class count, when they share no tensor, or when
    a full checkpoint lacks one.
    """
    trainer = module._trainer
    path = str(getattr(trainer, "ckpt_path", None) or "The checkpoint")
    found = parse_checkpoint(checkpoint, path)
    whole = found.kind == "lightning" and not checkpoint.get(LEGACY_MARKER)
    container = found if whole else _with_surplus_row(found, module.model_config)
    container = fold_adapters(container, module.model_config)
    _check_fit(module, container, whole=whole)
    if "state_dict" not in checkpoint or container.has_legacy_names or container is not found:
        checkpoint["state_dict"] = {PREFIX + k: v for k, v in container.weights.items()}
    if checkpoint.get("ema_model") or checkpoint.get("legacy_ema_state_dict"):
        module.legacy_ema_state = container.ema
    module.stored_class_names = container.class_names
    if trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return
    module.resume_record = {**(checkpoint.get(KEY) or {}), "step": checkpoint.get("global_step")}
    _forget_group_factors(checkpoint)
    loops = (checkpoint.get("loops") or {}).get("fit_loop")
    if loops:
        _say_when_finished(trainer, loops)
        _rescale_position(module, loops)


def _forget_group_factors(checkpoint: dict[str, Any]) -> None:
    """Drop the empty record that a schedule keeps for each group: groups may be others now."""
    for state in checkpoint.get("lr_schedulers") or ():
        if not any(state.get("lr_lambdas") or ()):
            state["lr_lambdas"] = []


def _with_surplus_row(container: CheckpointRecord, config: ModelConfig) -> CheckpointRecord:
    """Give old YOLO-format files, whose head has N rows for N classes, the row N + 1 of ours."""
    names, classes = container.class_names, config.num_classes
    old = len(names) == classes if names else container.setting("dataset_file") == "yolo"
    if container.num_classes != classes - 1 or not old:
        return container
    rank_zero_warn(
        f"{container.path} has a class head of {classes} rows for {classes} classes, as older "
        "YOLO-format trainings wrote it: the surplus row of the present layout is added."
    )
    return dataclasses.replace(
        container,
        weights=add_silent_classes(container.weights, classes + 1),
        ema=container.ema and add_silent_classes(container.ema, classes + 1),
        num_classes=classes,
    )


def _check_fit(module: RFDETRModule, container: CheckpointRecord, *, whole: bool) -> None:
    """`whole`: the file is a full checkpoint, in which nothing may be missing."""
    config = module.model_config
    problem = structure_mismatch(container, config)
    classes = container.num_classes
    if problem is None and classes is not None and classes != config.num_classes:
        problem = (
            f"{container.path} has {classes} classes, the model {config.num_classes}. Resuming "
            "goes on with the same classes. To fine-tune these weights on other classes give the "
            "file as pretrain_weights of the model configuration instead of resume / ckpt_path."
        )
    own = module.model.state_dict()
    wrong = [n for n, v in container.weights.items() if n in own and own[n].shape != v.shape]
    if problem is None and wrong:
        problem = (
            f"{container.path} holds {len(wrong)} tensors of another size, first {wrong[0]}: "
            f"{tuple(container.weights[wrong[0]].shape)} instead of {tuple(own[wrong[0]].shape)}. "
            "Resume needs the model configuration of the saved run; to start from these weights "
            "with another one, give the file as pretrain_weights."
        )
    if problem is not None:
        raise CheckpointError(problem)
    warn_differing_settings(container, config)
    missing = [n for n in own if n not in container.weights and not n.endswith(OPTIONAL_SUFFIXES)]
    unexpected = [name for name in container.weights if name not in own]
    difference = (
        f"{len(missing)} tensors of the model are missing in it: {', '.join(missing) or 'none'}; "
        f"{len(unexpected)} are not of this model: {', '.join(unexpected) or 'none'}."
    )
    if len(unexpected) == len(container.weights) or (whole and missing):
        raise CheckpointError(
            f"{container.path} is no checkpoint of this model, so training cannot go on from it. "
            f"Give the file of the run to resume. {difference}"
        )
    if missing or unexpected:
        warnings.warn(f"{container.path}: {difference}", UserWarning, stacklevel=2)


def _say_when_finished(trainer: pl.Trainer, loops: dict[str, Any]) -> None:
    done = loops["epoch_progress"]["current"]["processed"]
    wanted = trainer.max_epochs
    if wanted is None or wanted < 0 or done < wanted:
        return
    rank_zero_warn(
        f"{trainer.ckpt_path} is a finished run: {done} epochs are done and {wanted} asked for. "
        "Nothing is left to do; raise epochs to train on."
    )
    trainer.fit_loop.max_epochs = done  # Lightning refuses a checkpoint beyond max_epochs


def _samples_per_batch(module: RFDETRModule) -> int:
    return module.train_config.batch_size * module.trainer.world_size


def _rescale_position(module: RFDETRModule, loops: dict[str, Any]) -> None:
    """Batches done in an unfinished epoch, in batches of the present size and device count."""
    assert module.resume_record is not None
    saved, now = module.resume_record.get("samples_per_batch"), _samples_per_batch(module)
    current = loops.get("epoch_loop.batch_progress", {}).get("current")
    if not saved or saved == now or not current or _epoch_is_finished(loops):
        return
    window = module.trainer.accumulate_grad_batches
    done = current["processed"] * saved // now // window * window
    open_hooks = current["processed"] - current["completed"]
    current.update(ready=done, started=done, processed=done, completed=done - open_hooks)


def _epoch_is_finished(loops: dict[str, Any]) -> bool:
    epoch = loops["epoch_progress"]["current"]
    return bool(epoch["ready"] == epoch["processed"])


def start(module: RFDETRModule) -> None:
    """Continue schedule, data order and random numbers where the checkpoint left them."""
    trainer, record = module.trainer, module.resume_record
    if record is not None:
        _place_steps(trainer)
        _place_schedule(trainer, record)
        _place_data(trainer, record.get("random"))
    if trainer.fit_loop.restarted_mid_epoch and _batches_done(trainer):
        return  # the first step of this epoch's remainder still needs the record
    module.resume_record = None


def _batches_done(trainer: Any) -> int:
    """Batches of an unfinished epoch that need no repetition; 0 when only validation is left."""
    done: int = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    return done if done < trainer.num_training_batches else 0


def add_epoch_sums(module: RFDETRModule) -> None:
    """After the first step of an epoch that was resumed inside: count its earlier part too."""
    results: Any = module.trainer.fit_loop.epoch_loop._results
    sums = (module.resume_record or {}).get("epoch_sums", {})
    for key, (value, count) in sums.items() if module.trainer.is_global_zero else ():
        if key in results:
            results[key].value += value.to(results[key].value)
            results[key].cumulated_batch_size += count.to(results[key].cumulated_batch_size)
    module.resume_record = None


def begin_history(module: RFDETRModule) -> None:
    """Tell loggers that keep files whether this fit goes on with them, and from which step."""
    record, trainer = module.resume_record, module.trainer
    step = record.get("step") if record and "random" in record else None
    for logger in trainer.loggers:
        begin = getattr(logger, "begin_fit", None)
        if callable(begin):
            begin(resumed=record is not None or trainer.global_step > 0, step=step)


def _place_steps(trainer: pl.Trainer) -> None:
    """Legacy files know their epoch, not their step."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.current_epoch and not trainer.global_step:
        step = loop.automatic_optimization.optim_progress.optimizer.step
        step.total.ready = step.total.completed = trainer.current_epoch * planned_steps(trainer)[1]
        loop._batches_that_stepped = trainer.global_step


def _place_schedule(trainer: pl.Trainer, record: dict[str, Any]) -> None:
    """Set the present configuration's rates for the next step.

    With another number of steps per epoch (devices, batch size) the position keeps its share of
    the epochs, not its step count.
    """
    now = planned_steps(trainer)[1]
    position = round(trainer.global_step * now / (record.get("steps_per_epoch") or now))
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        scheduler.last_epoch = position
        for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(position)
        scheduler._last_lr = [group["lr"] for group in groups]


def _place_data(trainer: pl.Trainer, state: dict[str, Any] | None) -> None:
    """Start the loader's iterator again at the right epoch and batch.

    Lightning built it before it knew the epoch. The generators are restored on the same side of
    that as in the saved run: before it at the end of an epoch, after it inside one.
    """
    fit_loop: Any = trainer.fit_loop
    inside = fit_loop.restarted_mid_epoch
    if state is not None and not inside:
        restore_random_state(state, trainer.global_rank)
    done = _batches_done(trainer) if inside else 0
    combined = fit_loop._combined_loader
    for loader in combined.flattened if combined is not None else ():
        _place_loader(loader, fit_loop.epoch_progress.current.processed, done)
    if fit_loop._data_fetcher is not None:
        iter(fit_loop._data_fetcher)
    if state is not None and inside:
        restore_random_state(state, trainer.global_rank)


def _place_loader(loader: Any, epoch: int, batches_done: int) -> None:
    sampler = getattr(loader, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)  # type: ignore[union-attr]
    if hasattr(loader, "load_state_dict"):
        loader.load_state_dict({"batches": batches_done})
