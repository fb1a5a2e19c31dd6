"""Transformers' Trainer, with our objective, our order of examples, and no voice of its own."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState

from prunekit.batching import Tokens
from prunekit.course import Stopped, signals_noted
from prunekit.errors import InputError
from prunekit.progress import progress_bar
from prunekit.recover.data import ByLength, Examples, collate
from prunekit.recover.settings import Settings

STATE = "trainer_state.json"
CURVE = ("step", "epoch", "loss", "grad_norm", "learning_rate")
_BETAS = (0.9, 0.98)  # the runs are short: a second moment over 1000 steps would never warm up
_CLIP = 1.0


class Recovery(Trainer):
    """A Trainer that minimises an objective summed over an optimiser step's labelled tokens.

    Args:
        model: what trains: its parameters that require gradients.
        objective: called as ``objective(model, ids, labels)``; a sum over labelled tokens.
        prompts: the encoded examples.
        settings: the hyperparameters.
        folder: for checkpoints; None writes none.
        save_every: steps between checkpoints.
        quiet: no progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Callable[..., torch.Tensor],
        prompts: list[Tokens],
        settings: Settings,
        *,
        folder: Path | None,
        save_every: int,
        quiet: bool,
    ):
        self.objective, self.settings, self.prompts = objective, settings, prompts
        arguments = _arguments(settings, folder, save_every)
        callbacks = [_Watch(quiet)]
        super().__init__(
            model, arguments, collate, train_dataset=Examples(prompts), callbacks=callbacks
        )
        self.remove_callback(PrinterCallback)  # which prints on stdout, where results belong
        self.model_accepts_loss_kwargs = True  # labelled tokens are counted over a whole step
        self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = True

    def _get_train_sampler(self, *_: Any) -> ByLength:
        return ByLength(self.prompts, self.settings.batch, self.settings.seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The objective, a labelled token of the whole optimiser step."""
        total = self.objective(model, inputs["input_ids"], inputs["labels"])
        # Counted over all processes, whose gradients are then averaged.
        return total / num_items_in_batch * self.accelerator.num_processes

    def run(self, checkpoint: Path | None) -> None:
        """Train from the beginning, or from where a checkpoint was written.

        Raises:
            Stopped: Ctrl-C or SIGTERM came, and the step that it came in is kept in a checkpoint;
                where several processes train, or none is written, signals act as ever.
        """
        keeps = self.args.save_strategy != "no" and self.args.world_size == 1
        with signals_noted() if keeps else nullcontext([]) as came:
            self.add_callback(_Stop(came))
            self._run(checkpoint)
        if came:
            said = f"step {self.state.global_step} of {self.state.max_steps} was done and is kept"
            raise Stopped(came[0], said)

    def _run(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        if state.global_step < state.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        self._load_from_checkpoint(str(checkpoint))  # the last: `train` would take a step more
        self.state = state

    def curve(self) -> list[dict[str, float]]:
        """The loss of every step, those before a resumption included."""
        return [{k: row[k] for k in CURVE} for row in self.state.log_history if "grad_norm" in row]


class _Stop(TrainerCallback):
    """Ends training, with a checkpoint, after the step in which a signal came."""

    def __init__(self, came: list[int]):
        self.came = came

    def on_step_end(self, args, state, control, **_: Any) -> None:
        if self.came:
            control.should_save = control.should_training_stop = True


class _Watch(TrainerCallback):
    """Moves a progress bar, and stops where the loss is no number."""

    def __init__(self, quiet: bool):
        self.quiet = quiet

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        shown = state.is_world_process_zero and not self.quiet
        self.bar = progress_bar(state.max_steps, "recover", "step", quiet=not shown)
        self.bar.update(state.global_step)

    def on_log(self, args, state, control, logs: dict[str, float], **_: Any) -> None:
        if not math.isfinite(logs.get("loss", 0.0) + logs.get("grad_norm", 0.0)):
            raise InputError(
                f"recover: got a loss or gradient with NaN or Inf at step {state.global_step}, "
                "expected finite ones; lower the learning rate, or take dtype fp32"
            )
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
            self.bar.update()

    def on_train_end(self, args, state, control, **_: Any) -> None:
        self.bar.close()


def has_bf16() -> bool:
    """Whether the hardware that will train multiplies bf16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def checkpoint_to_resume(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: its state is what the Trainer writes last."""
    steps = {
        int(path.name.rpartition("-")[2]): path
        for path in folder.glob("checkpoint-*")
        if (path / STATE).is_file()
    }
    return steps[max(steps)] if steps else None


def _arguments(settings: Settings, folder: Path | None, save_every: int) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    wanted = settings.dtype == "bf16" or (settings.dtype == "auto" and has_bf16())
    arguments = TrainingArguments(
        output_dir=str(folder or tempfile.gettempdir()),  # made, even if nothing is written
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        max_grad_norm=_CLIP,
        bf16=wanted,
        seed=settings.seed,
        save_strategy="steps" if folder else "no",
        save_steps=save_every,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
        use_cpu=not on_gpu,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # more GPUs come through `accelerate launch`
    return arguments
