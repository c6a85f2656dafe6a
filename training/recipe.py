"""One run: the loop that every recipe shares, on accelerate.

A recipe builds a model, makes batches, and has one loss method. Batches and noise are pure functions of
(seed, step), so a run that was cut off and resumed sees what the unbroken run saw.
"""

import json
import math
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Generic, TypeVar
from uuid import uuid4

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from interactdiff.errors import RecipeError
from interactdiff.files import write_aside
from interactdiff.training.checkpoints import Checkpoint, TrainingState
from interactdiff.training.config import RecipeConfig
from interactdiff.training.run_folder import SAMPLES, RunFolder

C = TypeVar("C", bound=RecipeConfig)


def attention_backend(device: torch.device) -> AbstractContextManager[object]:
    """On a CPU, torch's fused attention is slow backwards: a quarter of a step at 144 tokens."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def make_optimizers(parameters: list[nn.Parameter], config: RecipeConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or ("muon") Muon for matrices and kernels of convolutions and AdamW for the rest.

    Muon (Jordan et al. 2024) steps along the nearest orthogonal matrix to the momentum; its steps are scaled
    to the size of AdamW's (arXiv 2502.16982, section 2.2), so that both go by one learning rate.
    """
    shared: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, betas=(0.9, 0.99), fused=True, **shared)]
    if not hasattr(torch.optim, "Muon"):
        raise RecipeError("optimizer: expected adamw, since muon needs torch 2.9, got 'muon'")
    matrices = [p for p in parameters if p.ndim == 2]
    kernels = [p for p in parameters if p.ndim == 4]
    others = [p for p in parameters if p.ndim not in (2, 4)]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared))
    if kernels:
        optimizers.append(KernelMuon(kernels, **shared))
    if others:
        optimizers.append(torch.optim.AdamW(others, betas=(0.9, 0.99), fused=True, **shared))
    return optimizers


_MUON: Any = getattr(torch.optim, "Muon", torch.optim.Optimizer)  # torch 2.9 has it


class KernelMuon(_MUON):
    """Muon for kernels of convolutions, [O, I, H, W], each taken as a matrix of O rows."""

    def __init__(self, kernels: list[nn.Parameter], **options: float):
        self._kernels = kernels
        self._matrices = [nn.Parameter(_as_matrix(kernel.detach())) for kernel in kernels]
        super().__init__(self._matrices, adjust_lr_fn="match_rms_adamw", **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step on the kernels themselves, which may have moved to another device meanwhile."""
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            matrix.data = _as_matrix(kernel.detach())
            matrix.grad = None if kernel.grad is None else _as_matrix(kernel.grad, kernel)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the kernels' gradients."""
        super().zero_grad(set_to_none)
        for kernel in self._kernels:
            kernel.grad = None


def _as_matrix(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """[O, I, H, W] as [O, I * H * W], in the order in which a kernel (`like`, or itself) lies in memory.

    Of a kernel itself it is a view.
    """
    by_rows = (tensor if like is None else like).is_contiguous()
    return tensor.flatten(1) if by_rows else tensor.permute(0, 2, 3, 1).flatten(1)  # else channels last


class StopSignals:
    """Inside the block the first SIGTERM or Ctrl-C is noted, so that work is saved; another acts as ever.

    Only the main thread gets signals; in another one nothing is noted.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: object) -> None:
        self.received = number
        self.__exit__()


class Recipe(ABC, Generic[C]):
    """A training run by a configuration.

    Args:
        config: the recipe's own kind of `RecipeConfig`.

    Attributes:
        config_type: that kind.
        run: the identity of the run, which its checkpoints bear.
        step: how many steps were taken.
    """

    config_type: type[Any]

    def __init__(self, config: C):
        self.config: C = config
        self.folder = RunFolder(config.output_dir)
        self.output = self.folder.path
        self.output.mkdir(parents=True, exist_ok=True)
        if config.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise RecipeError("mixed_precision: expected no or bf16 on a machine without a GPU, got 'fp16'")
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        self.device = self.accelerator.device
        set_seed(config.seed)
        self.model: Any = self.build()  # accelerate may wrap it
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        optimizers = make_optimizers(trainable, config)
        self.started = time.monotonic()
        schedulers = [self._scheduler(optimizer) for optimizer in optimizers]
        self.model, *prepared = self.accelerator.prepare(self.model, *optimizers, *schedulers)
        self.optimizers, self.schedulers = prepared[: len(optimizers)], prepared[len(optimizers) :]
        self.ema = EMAModel(trainable, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        self.ema.to(self.device)
        self.state = TrainingState(
            self.accelerator.unwrap_model(self.model),
            self.optimizers,
            self.schedulers,
            self.ema,
            self.accelerator.scaler,
        )
        self.step, self.run = 0, uuid4().hex
        self._replaces: tuple[Path, ...] = ()

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        config = self.config
        if config.lr_scheduler != "cosine_by_time":
            return get_scheduler(
                config.lr_scheduler,
                optimizer,
                num_warmup_steps=config.warmup_steps,
                num_training_steps=config.steps,
            )

        def factor(step: int) -> float:
            spent = (time.monotonic() - self.started) / 60 / config.stop_after
            warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, spent)))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    @abstractmethod
    def build(self) -> nn.Module:
        """The module whose trainable parameters are trained."""

    @abstractmethod
    def batch(self, step: int) -> dict[str, Any]:
        """The examples of a step: a pure function of (seed, step)."""

    @abstractmethod
    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """The scalar that is minimised; noise comes from `generator`."""

    @abstractmethod
    def sample(self) -> Image.Image | None:
        """A grid that shows what the (averaged) model does now."""

    @abstractmethod
    def export(self) -> None:
        """Write the (averaged) model where `export_to` says."""

    def generator(self, step: int) -> torch.Generator:
        """The source of a step's noise, on the device."""
        return torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + step)

    def train(self, overwrite: bool = False) -> list[float]:
        """Run to the last step, and export.

        The first SIGTERM or Ctrl-C ends the run at the next step with a checkpoint, and nothing is exported.

        Args:
            overwrite: whether to remove an older run's checkpoints from the output folder, and of this run
                those after the one that it goes on from.

        Returns:
            The losses of the steps run here.

        Raises:
            RecipeError: the folder is another run's, a loss is not finite, or something could not be written.
            SystemExit: after a SIGTERM.
            KeyboardInterrupt: after a Ctrl-C.
        """
        with self.folder.held(self.run, self.config, self.step, self._replaces, overwrite):
            bar = tqdm(total=self.config.steps, initial=self.step, desc=self.output.name, mininterval=5.0)
            with bar, StopSignals() as stop, ThreadPoolExecutor(1) as pool:  # makes the next batch meanwhile
                losses = self._train(bar, pool, stop)
            if stop.received is not None:
                print(
                    f"interactdiff: stopped at step {self.step} of {self.config.steps}: "
                    "--resume_from_checkpoint latest goes on",
                    file=sys.stderr,
                )
                raise KeyboardInterrupt if stop.received == signal.SIGINT else SystemExit(128 + stop.received)
            with self._averaged():
                try:
                    self.export()
                except (OSError, SafetensorError) as error:
                    where = self.config.export_to
                    raise RecipeError(f"expected room for what was trained in {where}, got {error}") from None
        return losses

    def _train(self, bar: "tqdm[Any]", pool: ThreadPoolExecutor, stop: StopSignals) -> list[float]:
        config, losses = self.config, []
        self.started = time.monotonic()
        end = min(config.steps, config.stop_at)
        upcoming = pool.submit(self.batch, self.step)
        while self.step < end and stop.received is None:
            self.model.train()
            batch = upcoming.result()
            upcoming = pool.submit(self.batch, self.step + 1)
            with self.accelerator.autocast(), attention_backend(self.device):
                loss = self.loss(batch, self.generator(self.step))
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
            self.ema.step(p for p in self.model.parameters() if p.requires_grad)
            self.step += 1
            losses.append(loss.detach())  # read when it is logged: reading waits for the device
            bar.update()
            if self.step % config.log_every == 0:
                self._log(losses[-config.log_every :])
            last = self.step >= end or (time.monotonic() - self.started) / 60 > config.stop_after
            if self.step % config.checkpoint_every == 0 or last:
                self.save_checkpoint()
            if (self.step % config.sample_every == 0 or last) and stop.received is None:
                self.save_sample()
            if last:
                break
        if losses and stop.received is not None and not self.folder.has(self.step):
            self.save_checkpoint()
        return torch.stack(losses).tolist() if losses else []

    def _log(self, recent: list[Tensor]) -> None:
        loss = torch.stack(recent).mean().item()
        if not math.isfinite(loss):
            raise RecipeError(f"expected a finite loss, got {loss} before step {self.step}")
        row = {"step": self.step, "loss": loss, "lr": self.schedulers[0].get_last_lr()[0]}
        with (self.output / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        tqdm.write(f"step {self.step}: loss {row['loss']:.4f}")

    def _averaged(self) -> "_Averaged":
        return _Averaged(self.ema, [p for p in self.model.parameters() if p.requires_grad])

    def save_sample(self) -> None:
        """Write the sample grid of the averaged model to `samples/`."""
        self.model.eval()
        # Other shapes than the training step's: compiling for them would cost minutes.
        with torch.no_grad(), self._averaged(), torch.compiler.set_stance("force_eager"):
            picture = self.sample()
        if picture is not None:
            path = self.output / SAMPLES / f"{self.step:06d}.png"
            path.parent.mkdir(exist_ok=True)
            write_aside(path, picture.save)

    def save_checkpoint(self) -> None:
        """Write everything needed to go on.

        Raises:
            RecipeError: it could not be written; the checkpoints before it are as they were.
        """
        self.folder.save(self.state, self.run, self.step, self.config)

    def resume(self, which: str) -> None:
        """Go on from a checkpoint, see `RunFolder.find`.

        Args:
            which: "latest", or the path of a checkpoint folder.

        Raises:
            RecipeError: there is no such checkpoint, it is damaged, or of another configuration.
        """
        if (checkpoint := self.folder.find(which, self.config)) is not None:
            self.restore(checkpoint)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint that was read.

        Raises:
            RecipeError: it is of a model or optimizers of other shapes.
        """
        self.state.load(checkpoint)
        self.step, self.run, self._replaces = checkpoint.state.step, checkpoint.state.run, checkpoint.replaces


class _Averaged:
    """Inside the block, parameters hold their moving averages."""

    def __init__(self, ema: EMAModel, parameters: list[nn.Parameter]):
        self.ema, self.parameters = ema, parameters

    def __enter__(self) -> None:
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)

    def __exit__(self, *_: object) -> None:
        self.ema.restore(self.parameters)
