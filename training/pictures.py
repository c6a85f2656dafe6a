"""What recipes on pictures of one's own share: a frozen base, caches, and the order of examples.

The base is any pipeline of `frozen_bases`, with the prediction and the schedule that it was trained with.
Latents and states of captions are computed once and kept on disk; then the text encoders are let go.
"""

import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from interactdiff.data.latents import BAD, LatentCache, vae_mean, weights_key
from interactdiff.data.mixture import Mixture
from interactdiff.data.problems import SHOWN
from interactdiff.data.reading import Records
from interactdiff.data.records import ImageRecord
from interactdiff.data.texts import TextCache, captions_of
from interactdiff.errors import DataError, RecipeError
from interactdiff.models import resolve
from interactdiff.pipeline_calls import repeatable_call
from interactdiff.pipeline_loading import load_pipeline
from interactdiff.training.control import FrozenControl
from interactdiff.training.frozen_bases import frozen_base
from interactdiff.training.interaction_data import PictureData, Varied, WordsDone, open_pictures
from interactdiff.training.pictures_config import PicturesConfig
from interactdiff.training.quantization import check_quantization, quantize
from interactdiff.training.recipe import Recipe

P = TypeVar("P", bound=PicturesConfig)
PRECISION_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ShownPicture:
    """A picture whose scene is drawn.

    Attributes:
        record: its row.
        width: in pixels, as shown.
        height: likewise.
    """

    record: ImageRecord
    width: int
    height: int


class PictureRecipe(Recipe[P]):
    """Trains an adapter on a frozen base, on pictures.

    Attributes:
        pipe: the base's pipeline, without text encoders once captions are cached.
        base: as training calls it.
        data: the pictures.
        shown: those whose scenes are drawn, all of them whole.
        latents: a cache for each data set.
        control_latents: likewise of control images, where a ControlNet reads latents.
        texts: the states of captions.
        handle: what is attached.
    """

    shares_batches = True
    handle: Any

    def build(self) -> nn.Module:
        config = self.config
        check_quantization(config.base_quantization)
        chosen = config.base_dtype
        self.dtype = PRECISION_DTYPES[config.mixed_precision] if chosen == "auto" else getattr(torch, chosen)
        with self.accelerator.main_process_first():  # before the base, which may have to be downloaded
            records, validation = open_pictures(config), config.validation.data
            drawn = records if validation is None else Records.open(validation)
        self.check_data(records)
        self.data_digest = " ".join(part.digest for part in records.parts)
        self.shown = self._whole_pictures(drawn)
        self.pipe: Any = load_pipeline(resolve("model", config.base), torch.device("cpu"), self.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.base = frozen_base(self.pipe, config.loss, config.text_tokens)
        self.pipe.vae.float()  # SDXL's overflows in half precision
        self.in_unet = hasattr(self.pipe, "unet")
        if names := sorted(self.misplaced_keys()):
            kind = "U-Net" if self.in_unet else "transformer"
            raise RecipeError(f"expected keys for the {kind} of {config.base}, got {', '.join(names)}")
        control = self.base.control = self.load_control()
        adapter = self.new_adapter().train()
        self.data = PictureData(config, records, self.base.multiple)
        if self.shown:
            self.load_validation()
        self._cache(adapter)
        self._check_pictures()
        if config.gradient_checkpointing:
            self.base.denoiser.enable_gradient_checkpointing()
        if self.in_unet:
            self.base.denoiser.to(memory_format=torch.channels_last)
        if control is not None:
            memory_format = torch.channels_last if self.in_unet else torch.preserve_format
            control.net.to(self.device, memory_format=memory_format)
        self.handle = self.attached(adapter)
        self._batches: Iterator[dict[str, Any]] | None = None
        self._next_step = -1
        if self.processes.is_main:
            print(self._summary(adapter), file=sys.stderr)
        return adapter

    def misplaced_keys(self) -> set[str]:
        """Keys that are set and are for the other kind of base."""
        return self.config.loss.misplaced(self.in_unet)

    def check_data(self, records: Mixture) -> None:
        """Refuse pictures that nothing can be learnt of.

        Raises:
            RecipeError: they lack what the recipe trains on.
        """

    def load_control(self) -> FrozenControl | None:
        """A frozen ControlNet that gives the layout in training, on the CPU; None without one."""
        return None

    def _whole_pictures(self, records: Records | Mixture) -> list[ShownPicture]:
        """The first ones that can be decoded, as many as are drawn; others are named on stderr."""
        found: list[ShownPicture] = []
        for number in range(len(records)):
            if len(found) == self.config.validation.count:
                break
            record = records[number]
            try:
                record.open()
            except DataError as error:
                if self.processes.is_main:
                    print(f"interactdiff: {record.name}: not drawn: {error}", file=sys.stderr)
                continue
            found.append(ShownPicture(record, int(records.widths[number]), int(records.heights[number])))
        return found

    def load_validation(self) -> None:
        """Load what looks at samples, where some are drawn.

        Raises:
            RecipeError: it cannot be loaded.
        """

    @abstractmethod
    def new_adapter(self) -> nn.Module:
        """What is trained, in float32, attached to nothing yet."""

    @abstractmethod
    def attached(self, adapter: Any) -> Any:
        """Its handle in the base."""

    @abstractmethod
    def vary(self) -> Varied:
        """What draws what an example is trained without."""

    def captions(self) -> Iterator[str]:
        """Every caption that may be drawn of the data, and none."""
        yield ""
        for caption, _ in captions_of(self.data.records, self.data.framing, self.config.flip > 0):
            yield caption

    @abstractmethod
    def condition(self, batch: dict[str, Any]) -> None:
        """Give the adapter the items of a batch, so that it acts in the base's next call."""

    def cache_more(self, adapter: Any, done: bool) -> None:
        """Fill further caches while the text encoders are there, but for the largest.

        Args:
            adapter: what is trained.
            done: whether all that the data's rows ask for was noted to be there.
        """

    def further_caches(self, keys: Mapping[str, str]) -> dict[str, TextCache]:
        """Those that `cache_more` fills, by name.

        Args:
            keys: hashes of the parts' weights, by name.
        """
        return {}

    @torch.no_grad()
    def _cache(self, adapter: nn.Module) -> None:
        """Make what is missing in the caches, and let go of the text encoders.

        The autoencoder is on the device alone; the denoiser comes when the largest encoder has left it.
        """
        base, data, pipe = self.base, self.data, self.pipe
        keys = {name: weights_key(part) for name, part in {"vae": pipe.vae, **base.encoders}.items()}
        of_encoders = " ".join(keys[name] for name in base.encoders)
        self.latents = data.latent_caches(keys["vae"])
        self.control_latents: list[LatentCache] = []
        encoded = [(one, vae_mean(pipe.vae)) for one in self.latents]
        if (control := base.control) is not None and not control.reads_pixels:
            self.control_latents = data.latent_caches(f"{keys['vae']} {control.shifted}", control=True)
            encoded += [(one, vae_mean(pipe.vae, control.shifted)) for one in self.control_latents]
        length = base.padded_length(0)
        self.texts = TextCache(
            data.cache / "texts", f"{type(base).__name__} {of_encoders} {length}", self.dtype
        )
        more = self.further_caches(keys)
        noted = WordsDone(data, self.drawn_of_rows(), {"texts": self.texts, **more})
        done = noted.recalled()
        captions = [self.shown_scene(n)[0] for n in range(self.shown_count)]
        if not done:
            captions += self.captions()
        rank, count = self.processes.rank, self.processes.count
        pipe.vae.to(self.device)
        for one, encode in encoded:
            for _ in one.build(encode, rank, count, self._pictures_at_once):
                pass
        pipe.vae.cpu()
        base.encoders_to(self.device)
        for _ in self.texts.build(captions, base.encode_texts(self.device), rank, count):
            pass
        if base.long_encoder is not None:
            base.drop(base.long_encoder)
        if (kind := self.config.base_quantization) != "none":
            quantize(base.denoiser, kind, self.device)
        base.denoiser.to(self.device)
        self.cache_more(adapter, done)
        base.drop(*base.encoders)
        self.accelerator.wait_for_everyone()
        for one in (self.texts, *more.values()):
            one.refresh()
        self.processes.on_main(noted.note)

    @property
    def _pictures_at_once(self) -> int:
        """That the autoencoder encodes, in float32: 8 of 512 x 512 pixels, or as many pixels."""
        return max(1, 8 * 512**2 // self.config.resolution**2)

    def _check_pictures(self) -> None:
        """Name the pictures that cannot be read.

        Raises:
            DataError: they are too many; in every process.
        """
        bad = self.data.unreadable([*self.latents, *self.control_latents])
        if bad and self.processes.is_main:
            more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            count = f"{len(bad)} of {len(self.data.records)} pictures"
            listed = f"{'; '.join(bad[:SHOWN])}{more} (all in {self.latents[0].folder / BAD})"
            print(
                f"interactdiff: {count} cannot be read, others stand in for them: {listed}", file=sys.stderr
            )

    def drawn_of_rows(self) -> str:
        """What decides, beside the rows, which captions and phrases may be drawn."""
        return f"{self.data.framing} {self.config.flip > 0}"

    def _summary(self, adapter: nn.Module) -> str:
        config, data = self.config, self.data
        count = int(data.records.weights.sum())
        return (
            f"interactdiff: {len(data.records)} pictures in {len(data.order.buckets)} sizes; steps of "
            f"{config.batch_size} x {config.accumulate} x {self.processes.count} = {config.global_batch}; "
            f"{config.steps} steps are {config.steps * config.global_batch / count:.1f} epochs; adapter "
            f"{self.started_from()}, {sum(p.numel() for p in adapter.parameters()) / 1e6:.1f} M parameters"
            f"{', sharded' * (config.shard and self.processes.count > 1)}; "
            f"base {config.base} in {self.precision}"
            + (f"; control images of {data.records.controls.sum()} pictures" if self.base.control else "")
        )

    @property
    def precision(self) -> str:
        """Of the base, in words."""
        kind = self.config.base_quantization
        return str(self.dtype).removeprefix("torch.") + (f" with layers in {kind}" if kind != "none" else "")

    def started_from(self) -> str:
        """Where the adapter's weights come from, in words."""
        return "new"

    def batch(self, step: int) -> dict[str, Any]:
        """The first part of this process's share of a step."""
        return self.micro_batches(step)[0]

    def micro_batches(self, step: int) -> list[dict[str, Any]]:
        """This process's parts of a step, read in order; another step than the next one starts anew."""
        control = self.base.control
        if self._batches is None or step != self._next_step:
            self._batches = self.data.batches(
                step,
                self.processes.rank,
                self.processes.count,
                self.latents,
                self.vary(),
                self.texts,
                self.base.objective,
                None if control is None else control.images(self.data.records, self.control_latents),
            )
        self._next_step = step + 1
        return [next(self._batches) for _ in range(self.config.accumulate)]

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Noise comes with the batch."""
        self.condition(batch)
        return self.base.loss_of(batch, self.device, self.dtype)

    # --- samples ---

    @property
    def shown_count(self) -> int:
        """How many scenes are drawn."""
        return len(self.shown)

    def shown_scene(self, number: int) -> tuple[str, Sequence[Any], Any]:
        """Caption, items and placement of a picture that is drawn."""
        shown, framing = self.shown[number], self.data.framing
        record = shown.record
        placement = framing.place(shown.width, shown.height, record.items)
        items = framing.items(placement, record.items)
        prompt = placement.prompt(record.prompt, record.items, items)
        return prompt, self.trained_items(items), placement

    def trained_items(self, items: Sequence[Any]) -> Sequence[Any]:
        """Those items that the adapter takes."""
        return items

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """The autoencoder on the device meanwhile."""
        self.pipe.vae.to(self.device)
        try:
            with self.accelerator.autocast():
                yield
        finally:
            self.handle.clear()
            self.pipe.vae.cpu()

    def draw(self, number: int) -> Image.Image:
        """Draw the caption of a shown picture as the handle's scene says."""
        prompt, _, placement = self.shown_scene(number)
        config = self.config.validation
        worded, empty = (
            {n: t.to(self.device, self.dtype) for n, t in self.texts.get(p).items()} for p in (prompt, "")
        )
        height, width = placement.size
        return repeatable_call(
            self.pipe,
            **self.base.drawing_arguments(worded, empty, config.guidance_scale),
            height=height,
            width=width,
            num_inference_steps=config.steps,
            generator=torch.Generator().manual_seed(self.config.seed + number),
        ).images[0]

    @abstractmethod
    def row(self, number: int) -> list[Image.Image]:
        """Pictures of one shown scene, of one height."""

    @torch.no_grad()
    def sample(self) -> Image.Image | None:
        """A row for each scene."""
        with self._drawing():
            rows = [self.row(number) for number in range(self.shown_count)]
        if not rows:
            return None
        widths = [sum(picture.width for picture in row) for row in rows]
        sheet = Image.new("RGB", (max(widths), sum(row[0].height for row in rows)), "white")
        top = 0
        for row in rows:
            left = 0
            for picture in row:
                sheet.paste(picture, (left, top))
                left += picture.width
            top += row[0].height
        return sheet
