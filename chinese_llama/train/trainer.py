"""The Trainer of both recipes: groups with their own learning rates, a watch for NaN, whole checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import rotate_checkpoints

from chinese_llama.directories import disk_is_full, write_text
from chinese_llama.errors import UserError
from chinese_llama.model.lora import group_of
from chinese_llama.train.checkpoints import PREFIX, seal
from chinese_llama.train.later import Later

ROWS = ("embed_tokens", "lm_head")
UNLOGGED = "unlogged.json"  # in a checkpoint: the loss since the last line of the log


class VocabularyTrainer(Trainer):
    """The Trainer, with a learning rate of their own for vocabulary rows and for LoRA's B, and no weight
    decay on rows: a piece that a batch does not hold would shrink.

    For the first `rows_only_steps` steps LoRA's learning rate is zero; its schedule starts after them.
    """

    optimizer: Any

    def __init__(self, fields: Any, sources: list[str], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.fields, self.sources = fields, sources
        self.watch = Watch()
        self._restored = False
        self._work = 0
        self._keep = self.args.save_total_limit
        self.args.save_total_limit = None  # old ones go when the new one is sealed

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            cls, arguments = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            odd = {"params", "model", "optimizer_dict"} & set(arguments)
            if odd or not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
                raise UserError(
                    f"optim: {self.args.optim} keeps its own groups of parameters; take one of adamw_torch, "
                    "adamw_8bit, paged_adamw_8bit, adafactor, sgd."
                )
            groups = parameter_groups(model or self.model, self.args, self.fields)
            with settings_are_to_blame():
                self.optimizer = cls(groups, **arguments)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        with settings_are_to_blame():
            scheduler = super().create_scheduler(num_training_steps, optimizer)
        alone = self.fields.rows_only_steps
        if alone and not isinstance(scheduler, LambdaLR):
            raise UserError(
                f"rows_only_steps does not go with lr_scheduler_type: {self.args.lr_scheduler_type}."
            )
        check_steps(num_training_steps, alone)
        if alone:
            self.lr_scheduler = self._after(alone, scheduler, num_training_steps)
        return self.lr_scheduler

    def _after(self, alone: int, scheduler: LambdaLR, steps: int) -> LambdaLR:
        """`scheduler`, in which the groups of LoRA wait for `alone` steps and then have its whole course."""
        rest = get_scheduler(
            self.args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=1.0),
            num_warmup_steps=self.args.get_warmup_steps(steps - alone),
            num_training_steps=steps - alone,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        ).lr_lambdas[0]

        def late(step: int) -> float:
            return 0.0 if step < alone else rest(step - alone)

        optimizer = scheduler.optimizer
        rows = [group["name"] == "rows" for group in optimizer.param_groups]
        return LambdaLR(
            optimizer, [f if row else late for f, row in zip(scheduler.lr_lambdas, rows, strict=True)]
        )

    def _run_epoch(self, **arguments: Any) -> None:
        """Not an epoch of a run that is over: a kill may come after the last checkpoint."""
        self._restore_loss(arguments["resume_from_checkpoint"])
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**arguments)

    def _restore_loss(self, checkpoint: str | None) -> None:
        """Go on with the mean loss that the log's next line is made of."""
        if checkpoint and not self._restored:
            self._restored = True
            kept = json.loads((Path(checkpoint) / UNLOGGED).read_text(encoding="utf-8"))
            self._tr_loss += kept["loss"]
            self._globalstep_last_logged = kept["since"]

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> torch.Tensor:
        documents = inputs.pop("documents", [])
        if not getattr(self.model.get_base_model(), "counts_learnt", False):
            inputs.pop("learnt", None)
        loss = super().training_step(model, inputs, *rest, **named)
        self.watch.losses.append((loss, documents))
        return loss

    def _get_num_items_in_batch(self, batches: list[Any], device: torch.device) -> Any:
        """A step can be without a target, where a corpus ends with a block of single tokens: its loss is 0, not 0 / 0."""
        items = super()._get_num_items_in_batch(batches, device)
        return items.clamp(min=1) if torch.is_tensor(items) else items

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.check()  # the step before: it is computed by now, so that nothing waits
        self.watch.step(self.state.global_step + 1, grad_norm, scaled=self.accelerator.scaler is not None)
        return grad_norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers has it, but the parameters are counted once, not for every batch."""
        tokens = inputs["input_ids"].numel()
        self._work = self._work or super().floating_point_ops(inputs) // tokens
        return self._work * tokens

    def check(self) -> None:
        """Raise UserError if a loss or a gradient was not finite."""
        found = self.watch.bad()
        if found:
            step, what, documents = found
            raise UserError(
                f"{what} at step {step}. Its batch held {self._told(documents)}. Likely cause: {self.cause()}. The last "
                f"checkpoint in {self.args.output_dir}, if there is one, is from before."
            )

    def _told(self, documents: list[Any]) -> str:
        """Documents of a batch in words, the first dozen."""
        named = [f"{self.sources[source]} {number + 1:,}" for source, found in documents for number in found]
        more = f" and {len(named) - 12} more" if len(named) > 12 else ""
        return f"the documents {', '.join(named[:12])}{more}"

    def cause(self) -> str:
        """Why values are not finite any more, as far as one can see."""
        frozen = (item for item in self.model.named_parameters() if not item[1].requires_grad)
        for name, parameter in frozen:
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                return f"the base itself: {name} has values that are not finite"
        if self.fields.dtype == "float16":
            return "float16 overflows; use dtype: bfloat16 or float32"
        if self.watch.grown():
            return f"the gradient grew from {self.watch.grown()}; lower learning_rate, or warm up longer"
        return "a learning_rate that is too high"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check()
        directory = Path(self.args.output_dir) / f"{PREFIX}-{self.state.global_step}"
        unlogged = {
            "loss": float(self.accelerator.gather(self._tr_loss.reshape(1)).mean()),
            "since": self._globalstep_last_logged,
        }
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                write_text(directory / UNLOGGED, json.dumps(unlogged) + "\n")
                seal(directory)
        except Exception as error:  # torch, safetensors and the system have no common base
            if not disk_is_full(error):
                raise
            shutil.rmtree(directory, ignore_errors=True)
            raise UserError(
                f"The disk is full: step {self.state.global_step} could not be saved in {self.args.output_dir}. Checkpoints "
                "before it are whole; make room and give the same command."
            ) from error
        if self.is_world_process_zero():
            rotate_checkpoints(self.args.output_dir, self._keep)


@contextlib.contextmanager
def settings_are_to_blame() -> Iterator[None]:
    """What torch and transformers say of a setting, as a sentence of ours."""
    try:
        yield
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(f"Training cannot be set up: {str(error).strip().splitlines()[0]}") from error


def check_steps(steps: int, alone: int) -> None:
    """Raise UserError for a run without steps, or without any for LoRA."""
    if steps < 1:
        raise UserError("There is no step to train: num_train_epochs or max_steps is too small.")
    if alone >= steps:
        raise UserError(f"rows_only_steps: {alone} leaves LoRA none of the {steps} steps.")


def parameter_groups(model: Any, arguments: Any, fields: Any) -> list[dict[str, Any]]:
    """What trains, as groups for the optimizer, each with a name: rows, lora, lora_B.

    LoRA+ gives B `loraplus_lr_ratio` times the learning rate of A (arXiv 2402.12354).
    """
    rate, decay = arguments.learning_rate, arguments.weight_decay
    rows_rate = rate if fields.embedding_learning_rate is None else fields.embedding_learning_rate
    groups: dict[str, dict[str, Any]] = {
        "lora": {"lr": rate, "weight_decay": decay},
        "lora_B": {"lr": rate * (fields.loraplus_lr_ratio or 1.0), "weight_decay": decay},
        "rows": {"lr": rows_rate, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = group_of(name)
            own = group == "lora_B" and fields.loraplus_lr_ratio
            part = "rows" if group in ROWS else "lora_B" if own else "lora"
            groups[part].setdefault("params", []).append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if "params" in group]


class Watch:
    """The losses and the gradient norm of the last step, on their way to the host, and norms before it."""

    def __init__(self) -> None:
        self.losses: list[tuple[torch.Tensor, list[Any]]] = []
        self._last: tuple[int, Later, list[list[Any]], bool] | None = None
        self._norms: list[float] = []

    def step(self, step: int, grad_norm: Any, scaled: bool) -> None:
        """A step is done. With `scaled` losses (float16) an infinite gradient only skips a step."""
        losses, self.losses = self.losses, []
        figures = [loss.detach().float().reshape(()) for loss, _ in losses]
        if known := grad_norm is not None and not scaled:
            norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm  # FSDP2's
            figures.append(torch.as_tensor(norm, dtype=torch.float32, device=figures[0].device).reshape(()))
        self._last = (step, Later(torch.stack(figures)), [documents for _, documents in losses], known)

    def bad(self) -> tuple[int, str, list[Any]] | None:
        """(step, what, documents) if the last step was not finite."""
        if self._last is None:
            return None
        (step, later, batches, known), self._last = self._last, None
        figures = later.read()
        for loss, documents in zip(figures, batches, strict=False):
            if not math.isfinite(loss):
                return step, f"The loss is {loss}", documents
        if known:
            norm = figures[-1]
            if not math.isfinite(norm):
                return step, f"The gradient is {norm}", [item for documents in batches for item in documents]
            self._norms = [*self._norms[-50:], norm]
        return None

    def grown(self) -> str:
        """'A to B' if the norm grew tenfold over the last steps, else ''."""
        if len(self._norms) < 3 or self._norms[-1] < 10 * min(self._norms):
            return ""
        return f"{min(self._norms):.3g} to {self._norms[-1]:.3g}"
