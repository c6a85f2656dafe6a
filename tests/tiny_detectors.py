"""Tiny detectors, CLIPs and a vision-language model with random weights: transformers' own classes."""

import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any, cast

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTokenizer

LABELS = {0: "person", 1: "bike", 2: "dog"}
SIDE = 32
tf = cast(Any, transformers)  # whose annotations are too narrow for these configurations


def _resnet() -> Any:
    return tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"]
    )


def detr() -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = tf.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=_resnet(),
        num_queries=6,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    size = {"shortest_edge": SIDE, "longest_edge": 2 * SIDE}
    return tf.DetrForObjectDetection(config).eval(), tf.DetrImageProcessor(size=size)


def _rt_options() -> dict[str, Any]:
    return {
        "encoder_hidden_dim": 16,
        "d_model": 16,
        "encoder_in_channels": [8, 8, 8],
        "feat_strides": [8, 16, 32],
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "decoder_in_channels": [16, 16, 16],
        "num_queries": 6,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "decoder_n_points": 2,
        "num_denoising": 0,
        "id2label": LABELS,
        "label2id": {name: number for number, name in LABELS.items()},
    }


def rt_detr() -> tuple[Any, Any]:
    torch.manual_seed(0)
    backbone = tf.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = tf.RTDetrConfig(backbone_config=backbone, **_rt_options())
    processor = tf.RTDetrImageProcessor(size={"height": 2 * SIDE, "width": 2 * SIDE})
    return tf.RTDetrForObjectDetection(config).eval(), processor


def d_fine() -> tuple[Any, Any]:
    torch.manual_seed(0)
    backbone = tf.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 8, 8],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 8, 8, 8],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        embedding_size=8,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = tf.DFineConfig(backbone_config=backbone, **_rt_options())
    processor = tf.RTDetrImageProcessor(size={"height": 2 * SIDE, "width": 2 * SIDE})
    return tf.DFineForObjectDetection(config).eval(), processor


def grounding_dino(folder: Path) -> tuple[Any, Any]:
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "person", "bike", "dog", "red"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = tf.BertTokenizer(str(folder / "vocab.txt"))
    backbone = tf.SwinConfig(
        image_size=SIDE,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )
    text = tf.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    config = tf.GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        num_queries=6,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        d_model=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_text_len=32,
    )
    size = {"shortest_edge": 2 * SIDE, "longest_edge": 4 * SIDE}
    processor = tf.GroundingDinoProcessor(tf.GroundingDinoImageProcessor(size=size), tokenizer)
    return tf.GroundingDinoForObjectDetection(config).eval(), processor


def _clip_parts() -> dict[str, Any]:
    vision = {"image_size": SIDE, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 1}
    return vision | {"num_attention_heads": 2, "intermediate_size": 16}


def owl(tokenizer: CLIPTokenizer) -> tuple[Any, Any]:
    torch.manual_seed(0)
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = tf.Owlv2Config(text_config=text, vision_config=_clip_parts(), projection_dim=16)
    images = tf.Owlv2ImageProcessor(size={"height": SIDE, "width": SIDE})
    return tf.Owlv2ForObjectDetection(config).eval(), tf.Owlv2Processor(images, tokenizer)


def clip(tokenizer: CLIPTokenizer) -> tuple[Any, Any]:
    torch.manual_seed(0)
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = tf.CLIPConfig(text_config=text, vision_config=_clip_parts(), projection_dim=16)
    images = tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return tf.CLIPModel(config).eval(), tf.CLIPProcessor(images, tokenizer)


def siglip(tokenizer: CLIPTokenizer) -> tuple[Any, Any]:
    torch.manual_seed(0)
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "projection_size": 16,
    }
    config = tf.SiglipConfig(text_config=text, vision_config=_clip_parts())
    images = tf.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    return tf.SiglipModel(config).eval(), tf.SiglipProcessor(images, tokenizer)


def llava(folder: Path) -> tuple[Any, Any]:
    """Words are tokens; any other word is none of them."""
    torch.manual_seed(0)
    words = [
        "<unk>",
        "<pad>",
        "<s>",
        "</s>",
        "<image>",
        "yes",
        "no",
        "Is",
        "the",
        "person",
        "in",
        "red",
        "box",
    ]
    words += ["riding", "bike", "blue", "1", ":", *ascii_lowercase]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<image>"])
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    images = tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = tf.LlavaProcessor(
        images,
        fast,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_clip_parts()),
        text_config=tf.LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            eos_token_id=3,
            bos_token_id=2,
            pad_token_id=1,
        ),
        image_token_index=words.index("<image>"),
        vision_feature_layer=-1,
    )
    (folder / "words.json").write_text(json.dumps(words))
    return tf.LlavaForConditionalGeneration(config).eval(), processor
