"""One run: the loop that every recipe shares, on accelerate.

A recipe builds a model, makes batches, and has one loss method. Batches and noise are pure functions of
(seed, step), so a run that was cut off and resumed sees what the unbroken run saw. Several processes share
each step's examples; the main one alone writes.
"""

import json
import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar
from uuid import uuid4

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, set_seed
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
from interactdiff.training.launch import check_strategy, check_world_size, world_size
from interactdiff.training.optimizers import averaged, make_optimizers, make_scheduler
from interactdiff.training.processes import TIMEOUT, Processes, is_lost_process
from interactdiff.training.run_folder import LOG, SAMPLES, RunFolder, sample_name
from interactdiff.training.sharding import Sharding
from interactdiff.training.stop_signals import StopSignals
from interactdiff.training.tracking import Tracker, check_tracker

C = TypeVar("C", bound=RecipeConfig)


def attention_backend(device: torch.device) -> AbstractContextManager[object]:
    """On a CPU, torch's fused attention is slow backwards: a quarter of a step at 144 tokens."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


class Recipe(ABC, Generic[C]):
    """A training run by a configuration.

    Args:
        config: the recipe's own kind of `RecipeConfig`.

    Attributes:
        config_type: that kind.
        shares_batches: whether several processes may run it.
        run: the identity of the run, which its checkpoints bear.
        step: how many steps were taken.
        data_digest: changes with the rows of the data, and so with the order of all examples; None where the
            configuration alone says what they are.
    """

    config_type: type[Any]
    shares_batches: ClassVar[bool] = False
    data_digest: str | None = None
    _whole: dict[str, Tensor] | None = None  # a sharded model's weights, while they are gathered

    def __init__(self, config: C):
        self.config: C = config
        self.folder = RunFolder(config.output_dir)
        self.output = self.folder.path
        self.output.mkdir(parents=True, exist_ok=True)
        if config.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise RecipeError("mixed_precision: expected no or bf16 on a machine without a GPU, got 'fp16'")
        check_strategy()
        check_world_size(getattr(config, "processes", None))
        on_cpus = world_size() > 1 and not torch.cuda.is_available()  # accelerate would not join them
        check_tracker(config.tracker)
        self.accelerator = Accelerator(
            cpu=on_cpus,
            mixed_precision=config.mixed_precision,
            log_with=config.tracker,
            project_dir=self.output,
            # else a schedule takes a step for every process
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
        self.tracker = Tracker(self.accelerator, config.tracker)
        self.processes = Processes(self.accelerator)
        if self.processes.count != world_size():
            raise RecipeError(
                f"expected {world_size()} processes that train together, got {self.processes.count}"
            )
        if self.processes.count > 1 and not self.shares_batches:
            raise RecipeError(
                f"expected one process for the recipe {config.recipe}, got {self.processes.count}"
            )
        self.device = self.accelerator.device
        set_seed(config.seed)
        self.model: Any = self.build()  # accelerate may wrap it
        shards = getattr(config, "shard", False)
        self.sharding = None
        if shards and self.processes.count > 1:
            self.sharding = Sharding(self.model.to(self.device), self.processes.count)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        # what is sharded and single numbers, which are not, take no common optimizer
        parts = [p for p in trainable if p.ndim], [p for p in trainable if not p.ndim]
        groups = [part for part in parts if part] if shards else [trainable]
        optimizers = [one for group in groups for one in self.optimizers_of(group)]
        self.started = time.monotonic()
        schedulers = [make_scheduler(one, config, self._minutes) for one in optimizers]
        wrapped = [self.model] if self.sharding is None else []
        prepared = [*self.accelerator.prepare(*wrapped, *optimizers, *schedulers)]
        if wrapped:
            self.model = prepared.pop(0)
        self.optimizers, self.schedulers = prepared[: len(optimizers)], prepared[len(optimizers) :]
        averaged = trainable if config.ema_decay else []  # without a decay the weights are their average
        self.ema = EMAModel(averaged, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        self.ema.to(self.device)
        self.state = TrainingState(
            self.accelerator.unwrap_model(self.model),
            self.optimizers,
            self.schedulers,
            self.ema,
            self.accelerator.scaler,
            self.data_digest,
        )
        self.step, self.run = 0, self.processes.same(uuid4().hex)
        self._replaces: tuple[Path, ...] = ()

    def _minutes(self) -> float:
        """Since the training began."""
        return (time.monotonic() - self.started) / 60

    def optimizers_of(self, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """What steps along the gradients of trained parameters."""
        return make_optimizers(parameters, self.config)

    @abstractmethod
    def build(self) -> nn.Module:
        """The module whose trainable parameters are trained."""

    @abstractmethod
    def batch(self, step: int) -> dict[str, Any]:
        """The examples of a step: a pure function of (seed, step)."""

    def micro_batches(self, step: int) -> list[dict[str, Any]]:
        """This process's examples of a step, in parts of one size whose gradients are summed up."""
        return [self.batch(step)]

    @abstractmethod
    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """The scalar that is minimised; noise comes from `generator`."""

    @abstractmethod
    def sample(self) -> Image.Image | None:
        """A grid that shows what the (averaged) model does now."""

    def scores(self) -> dict[str, float]:
        """What the last sample scored, by names for the log; nothing where none was looked at."""
        return {}

    @abstractmethod
    def export(self) -> None:
        """Write the (averaged) model where `export_to` says."""

    def publish(self) -> None:
        """Upload what was exported, in the main process alone."""

    def generator(self, step: int) -> torch.Generator:
        """The source of a step's noise, on the device."""
        return torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + step)

    def train(self, overwrite: bool = False) -> list[float]:
        """Run to the last step, and export.

        The first SIGTERM or Ctrl-C ends the run at the next step with a checkpoint, and nothing is exported.

        Args:
            overwrite: whether to remove an older run's checkpoints, log and samples from the output folder,
                and of this run the checkpoints after the one that it goes on from.

        Returns:
            The losses of the steps run here.

        Raises:
            RecipeError: the folder is another run's, a loss is not finite, or something could not be written.
            SystemExit: after a SIGTERM.
            KeyboardInterrupt: after a Ctrl-C.
        """
        with ExitStack() as stack:
            held = self.folder.held(self.run, self.config, self.step, self._replaces, overwrite)
            self.processes.on_main(lambda: stack.enter_context(held))
            self.tracker.start(self.output.name, self.config.to_json())
            stack.callback(self.tracker.end)
            bar = tqdm(
                total=self.config.steps,
                initial=self.step,
                desc=self.output.name,
                mininterval=5.0,
                disable=not self.processes.is_main,
            )
            with bar, StopSignals() as stop, ThreadPoolExecutor(1) as pool:  # makes the next batch meanwhile
                try:
                    losses, received = self._train(bar, pool, stop)
                except RuntimeError as error:
                    raise self._refusal(error) or error from None
            if received is not None:
                if self.processes.is_main:
                    print(
                        f"interactdiff: stopped at step {self.step} of {self.config.steps}: "
                        "--resume_from_checkpoint latest goes on",
                        file=sys.stderr,
                    )
                raise KeyboardInterrupt if received == signal.SIGINT else SystemExit(128 + received)
            self._check_weights()
            with self._gathered():
                self.processes.on_main(self._export)
        if self.processes.is_main:
            self.publish()  # no process waits for another one any more
        return losses

    def _refusal(self, error: RuntimeError) -> RecipeError | None:
        """A sentence for what stops a training from outside; None for any other error."""
        if isinstance(error, torch.OutOfMemoryError):
            return RecipeError(
                f"expected a step to fit in memory, got one that does not (step {self.step}): --plan says "
                "what would"
            )
        if self.processes.count > 1 and is_lost_process(error):
            return RecipeError(
                f"expected all {self.processes.count} processes to go on, got one that ended in step "
                f"{self.step}: --resume_from_checkpoint latest goes on from the last checkpoint"
            )
        return None

    def _export(self) -> None:
        with self._averaged():
            try:
                self.export()
            except (OSError, SafetensorError) as error:
                where = self.config.export_to
                raise RecipeError(
                    f"expected disk space for what was trained in {where}, got {error}"
                ) from None

    def _train(
        self, bar: "tqdm[Any]", pool: ThreadPoolExecutor, stop: StopSignals
    ) -> tuple[list[float], int | None]:
        """The losses, and the signal that ended the run, if one did."""
        config, losses = self.config, []
        unread: list[Tensor] = []  # losses that are still on the device: reading waits for it
        self.started = time.monotonic()
        end = min(config.steps, config.stop_at)
        upcoming = pool.submit(self.micro_batches, self.step)
        while not self.processes.greatest(stop.received or 0) and self.step < end:
            self.model.train()
            batches = upcoming.result()
            upcoming = pool.submit(self.micro_batches, self.step + 1)
            unread.append(self._accumulated(batches))
            self._clip()
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
            self.ema.step(self._averaged_parameters)
            self.step += 1
            bar.update()
            late = self._minutes() > config.stop_after
            if math.isfinite(config.stop_after):
                late = bool(self.processes.greatest(late))
            last = self.step >= end or late
            logs, saves = self.step % config.log_every == 0, self.step % config.checkpoint_every == 0 or last
            if logs or saves:
                losses += self._read(unread)
            if logs:
                self._log(losses[-config.log_every :])
            if saves:
                self.save_checkpoint()
            if self.step % config.sample_every == 0 or last:
                with self._gathered():
                    self.processes.on_main(lambda: None if stop.received else self.save_sample())
            if last:
                break
        received = self.processes.greatest(stop.received or 0)
        losses += self._read(unread)
        if losses and received and not self.folder.has(self.step):
            self.save_checkpoint()
        return losses, received or None

    def _read(self, unread: list[Tensor]) -> list[float]:
        """The latest losses, each the mean of all processes', taken off the list.

        Raises:
            RecipeError: one is not finite.
        """
        if not unread:
            return []
        losses: list[float] = self.processes.mean(torch.stack(unread)).tolist()
        unread.clear()
        for step, loss in enumerate(losses, self.step - len(losses) + 1):
            if not math.isfinite(loss):
                raise RecipeError(f"expected a finite loss, got {loss} in step {step}")
        return losses

    def _accumulated(self, batches: list[dict[str, Any]]) -> Tensor:
        """Backward of every part; the last one shares gradients out. The mean loss of this process."""
        total: list[Tensor] = []
        for n, batch in enumerate(batches):
            apart = n + 1 < len(batches)
            alone = self.accelerator.no_sync(self.model) if apart else nullcontext()
            if self.sharding is not None:
                alone = self.sharding.part(not apart)
            with alone, attention_backend(self.device):  # also where blocks are computed again
                with self.accelerator.autocast():
                    loss = self.loss(batch, self.generator(self.step))
                self.accelerator.backward(loss if len(batches) == 1 else loss / len(batches))
            total.append(loss.detach())
        return total[0] if len(total) == 1 else torch.stack(total).mean()

    def _clip(self) -> None:
        most = self.config.max_grad_norm
        if self.sharding is None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), most)
        elif math.isfinite(most):
            self.sharding.clip(most)

    def _log(self, recent: list[float]) -> None:
        if not self.processes.is_main:
            return
        loss = math.fsum(recent) / len(recent)
        self._report({"loss": loss, "lr": self.schedulers[0].get_last_lr()[0]})
        tqdm.write(f"step {self.step}: loss {loss:.4f}")

    def _report(self, values: dict[str, float]) -> None:
        """A line of `log.jsonl`, and to the tracker if there is one."""
        with (self.output / LOG).open("a") as log:
            log.write(json.dumps({"step": self.step, **values}) + "\n")
        self.tracker.log(values, self.step)

    @property
    def _averaged_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad] if self.config.ema_decay else []

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside the block the model has its averaged weights; sharded ones have them by `_gathered`."""
        if self.sharding is not None:
            return nullcontext()
        return averaged(self.ema, self._averaged_parameters)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Inside the block the weights are whole and averaged, so that one process alone can use them."""
        if self.sharding is None:
            yield
            return
        with torch.no_grad(), averaged(self.ema, self._averaged_parameters):
            with self.sharding.gathered() as self._whole:
                yield
            self._whole = None

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by name, whole; while samples are drawn and when it is exported."""
        return self.accelerator.unwrap_model(self.model).state_dict() if self._whole is None else self._whole

    def save_sample(self) -> None:
        """Write the sample grid of the averaged model to `samples/`."""
        self.model.eval()
        # Other shapes than the training step's: compiling for them would cost minutes.
        with torch.no_grad(), self._averaged(), torch.compiler.set_stance("force_eager"):
            picture = self.sample()
        if picture is not None:
            path = self.output / SAMPLES / sample_name(self.step)
            path.parent.mkdir(exist_ok=True)
            write_aside(path, picture.save)
            self.tracker.picture(SAMPLES, picture, self.step)
        if scores := self.scores():
            self._report(scores)

    def save_checkpoint(self) -> None:
        """Write everything needed to go on.

        Raises:
            RecipeError: the weights are not finite, or it could not be written; the checkpoints before it are
                as they were.
        """
        self._check_weights()
        save = self.folder.save
        collected = None if self.sharding is None else self.state.collect()  # all processes take part
        self.processes.on_main(lambda: save(self.state, self.run, self.step, self.config, collected))

    def _check_weights(self) -> None:
        """Refuse weights that are not finite, which a step whose loss is finite can make."""
        wrong = self.state.not_finite()
        if self.processes.greatest(len(wrong)):
            which = wrong[0] if wrong else "another process"
            raise RecipeError(f"expected finite weights after step {self.step}, got others in {which}")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint that was read.

        Raises:
            RecipeError: it is of a model or optimizers of other shapes, or of other data.
        """
        saved = checkpoint.state.data
        if saved not in (None, self.data_digest) and not getattr(self.config, "allow_changed_data", False):
            raise RecipeError(
                f"expected the data of {checkpoint.folder}, got rows that were changed since, which come in "
                "another order: --set allow_changed_data=true goes on with them"
            )
        self.state.load(checkpoint)
        self.step, self.run, self._replaces = checkpoint.state.step, checkpoint.state.run, checkpoint.replaces
