"""Verbs of a person and an object, by CLIP or SigLIP, or by a language model that looks at pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from interactdiff.data.classes import SUBJECT
from interactdiff.errors import ModelError
from interactdiff.evaluation.detection import PixelBox
from interactdiff.evaluation.two_stage import Candidate, on_device
from interactdiff.fingerprints import weights_digest

MARGIN = 0.1  # of the union's sides, around the crop
PERSON_COLOUR, OBJECT_COLOUR = "red", "blue"
NO_INTERACTION = "with"


def verb_sentence(verb: str, thing: str) -> str:
    """What CLIP compares a crop with: "a person riding a bicycle"."""
    return f"a {SUBJECT} {verb} {'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def union_crop(image: Image.Image, person: PixelBox, thing: PixelBox) -> Image.Image:
    """The smallest box around both, and `MARGIN` more on each side, within the picture."""
    x0, y0 = min(person[0], thing[0]), min(person[1], thing[1])
    x1, y1 = max(person[2], thing[2]), max(person[3], thing[3])
    across, down = MARGIN * (x1 - x0), MARGIN * (y1 - y0)
    left, top = max(0, int(x0 - across)), max(0, int(y0 - down))
    right, bottom = min(image.width, round(x1 + across)), min(image.height, round(y1 + down))
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


@dataclass
class ContrastiveVerbs:
    """CLIP or SigLIP on the crop around both boxes: a softmax over the verbs that the object can have.

    Attributes:
        model: `CLIPModel` or `SiglipModel`.
        processor: of its pictures and words.
        name: what tables call it.
    """

    model: Any
    processor: Any
    name: str = "clip"
    _texts: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def digest(self) -> str:
        """Of the model's weights."""
        return weights_digest(self.model)

    @torch.no_grad()
    def verbs(
        self, image: Image.Image, candidates: Sequence[Candidate], verbs_of: Mapping[str, Sequence[str]]
    ) -> list[dict[str, float]]:
        """For each candidate, a probability of each verb; they add up to 1."""
        crops = [union_crop(image, one.person, one.object) for one in candidates]
        pictures = normalised(
            self.model.get_image_features(
                **on_device(self.processor(images=crops, return_tensors="pt"), self.model)
            )
        )
        found = []
        for one, picture in zip(candidates, pictures, strict=True):
            verbs = tuple(verbs_of[one.name])
            logits = self._features(one.name, verbs) @ picture * self.model.logit_scale.exp()
            found.append(dict(zip(verbs, logits.float().softmax(0).tolist(), strict=True)))
        return found

    def _features(self, thing: str, verbs: tuple[str, ...]) -> Tensor:
        """[V, D] of the sentences about an object, made once."""
        if thing not in self._texts:
            sentences = [verb_sentence(verb, thing) for verb in verbs]
            padding = "max_length" if self.model.config.model_type.startswith("siglip") else True
            inputs = self.processor(text=sentences, padding=padding, truncation=True, return_tensors="pt")
            self._texts[thing] = normalised(self.model.get_text_features(**on_device(inputs, self.model)))
        return self._texts[thing]


def normalised(features: Any) -> Tensor:
    """Features of length 1; newer versions of transformers wrap them."""
    features = getattr(features, "pooler_output", features)
    return features / features.norm(dim=-1, keepdim=True)


@dataclass
class VisionLanguage:
    """A language model that looks at pictures: its next word, or its answer.

    Attributes:
        model: of transformers' `AutoModelForImageTextToText`.
        processor: with a chat template.
        name: what tables call it.
        most_tokens: of an answer.
    """

    model: Any
    processor: Any
    name: str = "vlm"
    most_tokens: int = 256

    @property
    def digest(self) -> str:
        """Of the model's weights."""
        return weights_digest(self.model)

    def _inputs(self, image: Image.Image, question: str) -> dict[str, Any]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return on_device(self.processor(images=[image], text=[text], return_tensors="pt"), self.model)

    @torch.no_grad()
    def yes(self, image: Image.Image, question: str) -> float:
        """P(yes) / (P(yes) + P(no)) of the first word of the answer.

        Raises:
            ModelError: its tokenizer has no such words.
        """
        logits = self.model(**self._inputs(image, question)).logits[0, -1].float()
        yes, no = self._words()
        both = torch.stack([logits[yes].logsumexp(0), logits[no].logsumexp(0)])
        return float(both.softmax(0)[0])

    @torch.no_grad()
    def answer(self, image: Image.Image, question: str) -> str:
        """The answer in words, the likeliest one."""
        inputs = self._inputs(image, question)
        tokens = self.model.generate(**inputs, max_new_tokens=self.most_tokens, do_sample=False)
        return self.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _words(self) -> tuple[list[int], list[int]]:
        found = []
        for word in ("yes", "no"):
            forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
            tokenizer = self.processor.tokenizer
            encoded = (tokenizer.encode(form, add_special_tokens=False) for form in forms)
            single = {tokens[0] for tokens in encoded if len(tokens) == 1}
            found.append(sorted(single - {tokenizer.unk_token_id}))
        if not found[0] or not found[1]:
            raise ModelError(f"expected yes and no as tokens of {self.name}, got a tokenizer without them")
        return found[0], found[1]


@dataclass
class AskedVerbs:
    """A vision-language model that answers yes or no for each verb, with both boxes drawn.

    Attributes:
        model: that answers.
    """

    model: VisionLanguage

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.model.name

    @property
    def digest(self) -> str:
        """Of the model's weights."""
        return self.model.digest

    def verbs(
        self, image: Image.Image, candidates: Sequence[Candidate], verbs_of: Mapping[str, Sequence[str]]
    ) -> list[dict[str, float]]:
        """For each candidate, how sure the model is of each verb; they need not add up to 1."""
        found = []
        for one in candidates:
            marked = with_boxes(image, one.person, one.object)
            found.append(
                {verb: self.model.yes(marked, _question(verb, one.name)) for verb in verbs_of[one.name]}
            )
        return found


def _question(verb: str, thing: str) -> str:
    person, object_ = f"the {SUBJECT} in the red box", f"the {thing} in the blue box"
    if verb == NO_INTERACTION:
        return f"Is {person} doing nothing to {object_}? Answer yes or no."
    return f"Is {person} {verb} {object_}? Answer yes or no."


def with_boxes(image: Image.Image, person: PixelBox, thing: PixelBox) -> Image.Image:
    """The picture with the person's box in red and the object's in blue."""
    marked = image.copy()
    draw = ImageDraw.Draw(marked)
    width = max(2, max(image.size) // 200)
    for box, colour in ((thing, OBJECT_COLOUR), (person, PERSON_COLOUR)):
        draw.rectangle(box, outline=colour, width=width)
    return marked
