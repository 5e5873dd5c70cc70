"""Small models of other people's packages, built without a download, and inputs for them.

A model's name is `package/what it is`. Each is there for its own kind of code: what it calls, what
it returns, what its modules ask of each other.
"""

import os
import re
import tempfile
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Some packages keep settings and downloads in the user's home; a test leaves none there.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CLASSES = 4
Built = tuple[nn.Module, Any]  # and its example inputs


class Model(NamedTuple):
    """One model of the matrix.

    Attributes:
        name: `package/model`.
        package: What to import.
        build: Makes it, and its example inputs.
        default: Whether it is in the default run of the tests.
        single: Whether it computes in float32 inside, whatever its weights are.
    """

    name: str
    package: str
    build: Callable[[], Built]
    default: bool
    single: bool


MODELS: dict[str, Model] = {}


def images(*size: int, batch: int = 2, channels: int = 3) -> Tensor:
    """[batch, channels, *size], the same every time."""
    shape = (batch, channels, *(size or (64, 64)))
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


SMALL = images(32, 32)


def _add(
    name: str, build: Callable[[], Built], default: bool = False, single: bool = False
) -> None:
    assert name not in MODELS, name
    MODELS[name] = Model(name, name.partition("/")[0], build, default, single)


def _named(path: str) -> Any:
    """An object by its full name, `package.module:name`."""
    module, _, name = path.partition(":")
    return attrgetter(name)(import_module(module))


def _model(
    name: str,
    path: str,
    x: Any,
    *args: Any,
    default: bool = False,
    single: bool = False,
    **kwargs: Any,
) -> None:
    """A model that is one call."""
    _add(name, lambda: (_named(path)(*args, **kwargs), x), default, single)


# ultralytics: parts listed in YAML, tensors collected by index, heads with state made in forward.
def _yolo(
    cfg: str, task: str = "DetectionModel", default: bool = False, width: float = 0.125
) -> None:
    def build() -> Built:
        described = _named("ultralytics.nn.tasks:yaml_model_load")(f"{cfg}.yaml")
        described["scales"] = {"n": [0.33, width, 512]}  # depth, width (theirs: 0.25), channels
        make = _named(f"ultralytics.nn.tasks:{task}")
        return make(described, nc=CLASSES, verbose=False), images()

    _add(f"ultralytics/{cfg}", build, default=default)


_yolo("yolov8n")
_yolo("yolov3-tiny", default=True)
_yolo("yolov5n")
_yolo("yolov6n")
_yolo("yolov8n-ghost")
_yolo("yolov9t")
_yolo("yolov10n")
_yolo("yolo11n")
_yolo("yolo12n", width=0.25)
_yolo("yolo26n")
_yolo("yolov8n-seg", "SegmentationModel")
_yolo("yolov8n-pose", "PoseModel")
_yolo("yolov8n-obb", "OBBModel")
_yolo("yolo11n-cls", "ClassificationModel")
_yolo("yolov8n-rtdetr", "RTDETRDetectionModel")


# segmentation-models-pytorch: encoders of several libraries under one interface.
def _smp(kind: str, encoder: str, default: bool = False, **kwargs: Any) -> None:
    _model(
        f"segmentation_models_pytorch/{kind}-{encoder}",
        f"segmentation_models_pytorch:{kind}",
        SMALL,
        encoder,
        default=default,
        encoder_weights=None,
        classes=CLASSES,
        **kwargs,
    )


_smp("Unet", "mobilenet_v2", default=True, decoder_channels=(32, 16, 16, 8, 8))
_smp("Unet", "resnet18", decoder_channels=(32, 16, 16, 8, 8))
_smp("UnetPlusPlus", "timm-mobilenetv3_small_100", decoder_channels=(32, 16, 16, 8, 8))
_smp("Linknet", "mobilenet_v2")
_smp("FPN", "efficientnet-b0", decoder_pyramid_channels=32)
_smp("DeepLabV3", "mobilenet_v2", decoder_channels=32)
_smp("DeepLabV3Plus", "mobilenet_v2", decoder_channels=32, aux_params={"classes": CLASSES})
_smp("UPerNet", "timm-mobilenetv3_small_100", decoder_channels=32)
_smp("Segformer", "mit_b0", decoder_segmentation_channels=32)

# MONAI: dimension as an argument, skip connections built by recursion, deep supervision.
MONAI = "monai.networks.nets:"
GREY = images(channels=1)
_WIDE = {"features": (8, 8, 16, 16, 16, 8)}
_PLANE = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}


def _monai(name: str, x: Any = GREY, default: bool = False, **kwargs: Any) -> None:
    _model(f"monai/{name}", MONAI + name, x, default=default, **kwargs)


_monai("UNet", default=True, **_PLANE, channels=(8, 16, 32), strides=(2, 2), num_res_units=2)
_monai("BasicUNet", **_PLANE, **_WIDE)
_monai("BasicUNetPlusPlus", **_PLANE, **_WIDE, deep_supervision=True)
_monai("AttentionUnet", **_PLANE, channels=(8, 16, 32), strides=(2, 2))
_monai(
    "DynUNet",
    **_PLANE,
    kernel_size=(3, 3, 3),
    strides=(1, 2, 2),
    upsample_kernel_size=(2, 2),
    filters=(8, 16, 32),
    res_block=True,
)
_monai("SegResNet", **_PLANE, init_filters=8)
_monai("DenseNet121", **_PLANE)
_monai(
    "EfficientNetBN",
    model_name="efficientnet-b0",
    pretrained=False,
    **{k: v for k, v in _PLANE.items() if k != "out_channels"},
    num_classes=2,
)
_monai("HighResNet", **_PLANE)
_monai("RegUNet", default=True, **_PLANE, num_channel_initial=8, depth=2)
_monai("UNETR", **_PLANE, img_size=64, feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4)
_monai("SwinUNETR", **_PLANE, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
_monai("FlexibleUNet", spatial_dims=2, in_channels=1, out_channels=2, backbone="resnet18")
_monai("MedNeXt", **_PLANE, init_filters=8)
_monai("SegResNetDS", **_PLANE, init_filters=8, dsdepth=2)
_monai(
    "AutoencoderKL",
    **_PLANE,
    num_res_blocks=(1, 1),
    channels=(8, 16),
    attention_levels=(False, True),
    latent_channels=3,
    norm_num_groups=4,
)
_monai(
    "VQVAE",
    **_PLANE,
    channels=(8, 16),
    num_res_channels=(8, 16),
    num_res_layers=1,
    downsample_parameters=((2, 4, 1, 1),) * 2,
    upsample_parameters=((2, 4, 1, 1, 0),) * 2,
    num_embeddings=16,
    embedding_dim=8,
)
_monai(
    "DiffusionModelUNet",
    {"x": GREY, "timesteps": torch.tensor([3, 7])},
    spatial_dims=2,
    in_channels=1,
    out_channels=1,
    num_res_blocks=1,
    channels=(8, 16),
    attention_levels=(False, True),
    norm_num_groups=4,
    num_head_channels=8,
)

# diffusers: keyword arguments, output objects, checks of types and of configurations.
_BLOCKS = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}
_LATENT = images(16, 16, channels=4)
_NOISY = {"sample": _LATENT, "timestep": torch.tensor(3)}
_TEXT = images(16, channels=5)[..., :16]  # [N, tokens, channels]
_CONDITIONED = {
    **_BLOCKS,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}
_UP = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}


def _diffusers(name: str, x: Any, default: bool = False, **kwargs: Any) -> None:
    _model(f"diffusers/{name}", f"diffusers:{name}", x, default=default, **kwargs)


_diffusers(
    "UNet2DModel",
    _NOISY,
    default=True,
    **_BLOCKS,
    in_channels=4,
    out_channels=4,
    attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
_diffusers(
    "UNet2DConditionModel", {**_NOISY, "encoder_hidden_states": _TEXT}, **_CONDITIONED, **_UP
)
_diffusers(
    "ControlNetModel",
    {**_NOISY, "encoder_hidden_states": _TEXT, "controlnet_cond": images(32, 32)},
    **_CONDITIONED,
    conditioning_embedding_out_channels=(8, 16),
)
_diffusers(
    "AutoencoderKL",
    images(32, 32),
    block_out_channels=(16, 32),
    norm_num_groups=8,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
_diffusers(
    "AutoencoderTiny",
    images(32, 32),
    encoder_block_out_channels=(16, 16),
    decoder_block_out_channels=(16, 16),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 1),
)
_diffusers(
    "VQModel",
    images(32, 32),
    block_out_channels=(16, 32),
    norm_num_groups=8,
    num_vq_embeddings=16,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
_diffusers(
    "AutoencoderDC",
    images(32, 32),
    encoder_block_out_channels=(16, 32),
    decoder_block_out_channels=(16, 32),
    encoder_layers_per_block=(1, 1),
    decoder_layers_per_block=(1, 1),
    encoder_block_types=("ResBlock", "EfficientViTBlock"),
    decoder_block_types=("ResBlock", "EfficientViTBlock"),
    encoder_qkv_multiscales=((), (5,)),
    decoder_qkv_multiscales=((), (5,)),
    attention_head_dim=8,
    latent_channels=4,
)
_diffusers("T2IAdapter", images(64, 64), channels=(16, 32), num_res_blocks=1, downscale_factor=8)
_diffusers(
    "UNet1DModel",
    {"sample": images(64, channels=4), "timestep": torch.tensor([3, 3])},
    in_channels=4,
    out_channels=4,
    extra_in_channels=64,  # of the time embedding
    block_out_channels=(32, 32),
    down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
    up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
)
_diffusers(
    "UVit2DModel",
    {
        "input_ids": torch.arange(32).view(2, 4, 4),
        "encoder_hidden_states": _TEXT,
        "pooled_text_emb": _TEXT[:, 0],
        "micro_conds": torch.ones(2, 3),
    },
    hidden_size=16,
    cond_embed_dim=16,
    micro_cond_encode_dim=8,
    micro_cond_embed_dim=24,
    encoder_hidden_size=16,
    vocab_size=40,
    codebook_size=32,
    in_channels=16,
    block_out_channels=16,
    num_res_blocks=1,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    block_num_heads=2,
    single=True,
)


# transformers: configurations, output objects, dtype looked up in the weights.
def _transformer(kind: str, x: Any, default: bool = False, **config: Any) -> None:
    base = re.split("Model$|For[A-Z]", kind)[0]

    def build() -> Built:
        made = _named(f"transformers:{base}Config")(**config)
        return _named(f"transformers:{kind}")(made), x

    _add(f"transformers/{kind}", build, default=default)


_FOUR = {"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]}
_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
_PIXELS = {"pixel_values": images()}
_transformer(
    "ResNetForImageClassification",
    images(),
    default=True,
    **_FOUR,
    embedding_size=8,
    layer_type="basic",
)
_transformer("RegNetModel", _PIXELS, **_FOUR, embedding_size=8, groups_width=8)
_transformer("BitModel", images(), **_FOUR, embedding_size=8, num_groups=4)
_transformer("ConvNextV2ForImageClassification", _PIXELS, **_FOUR)
_transformer("MobileNetV1Model", _PIXELS, depth_multiplier=0.25)
_transformer("MobileNetV2ForSemanticSegmentation", _PIXELS, depth_multiplier=0.35)
_transformer(
    "MobileViTForSemanticSegmentation",
    _PIXELS,
    hidden_sizes=(16, 24, 32),
    neck_hidden_sizes=(8, 8, 16, 16, 24, 32, 48),
    num_attention_heads=2,
    image_size=64,
    aspp_out_channels=16,
    atrous_rates=(1, 2, 3),
)
_transformer(
    "EfficientNetModel", _PIXELS, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320
)
_transformer("PoolFormerModel", _PIXELS, **_FOUR)
_transformer(
    "LevitModel",
    _PIXELS,
    image_size=64,
    hidden_sizes=(16, 16, 16),
    key_dim=(8, 8, 8),
    num_attention_heads=(2, 2, 2),
    depths=(1, 1, 1),
)
_transformer("CvtModel", _PIXELS, embed_dim=(8, 16, 16), num_heads=(1, 2, 2), depth=(1, 2, 3))
_transformer(
    "PvtV2Model",
    _PIXELS,
    hidden_sizes=(8, 16, 16, 16),
    depths=(1, 1, 1, 1),
    num_attention_heads=(1, 2, 2, 2),
)
_transformer(
    "SegformerForSemanticSegmentation",
    _PIXELS,
    hidden_sizes=(8, 16, 16, 16),
    depths=(1, 1, 1, 1),
    num_attention_heads=(1, 2, 2, 2),
    decoder_hidden_size=16,
)
_transformer(
    "FocalNetModel",
    _PIXELS,
    image_size=64,
    embed_dim=16,
    depths=(1, 1),
    focal_levels=(2, 2),
    focal_windows=(3, 3),
    hidden_sizes=(16, 32),
)
_transformer(
    "Swin2SRForImageSuperResolution",
    {"pixel_values": images(32, 32)},
    image_size=32,
    embed_dim=16,
    depths=(1, 1),
    num_heads=(2, 2),
    window_size=4,
)
_transformer(
    "YolosForObjectDetection",
    _PIXELS,
    default=True,
    **_SMALL | {"image_size": (64, 64)},
    num_detection_tokens=5,
)
_transformer("ViTForMaskedImageModeling", _PIXELS, **_SMALL)
_transformer(
    "GLPNForDepthEstimation",
    _PIXELS,
    hidden_sizes=(8, 16, 16, 16),
    depths=(1, 1, 1, 1),
    num_attention_heads=(1, 2, 2, 2),
    decoder_hidden_size=16,
)
_transformer(
    "DPTForDepthEstimation",
    _PIXELS,
    **_SMALL | {"num_hidden_layers": 4},
    is_hybrid=False,
    backbone_out_indices=(0, 1, 2, 3),
    neck_hidden_sizes=(8, 8, 16, 16),
    fusion_hidden_size=16,
)
_transformer("SuperPointForKeypointDetection", images(64, 64))
_transformer(
    "Wav2Vec2Model",
    {"input_values": torch.rand(2, 1600) - 0.5},
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    conv_dim=(16, 16, 16),
    conv_stride=(5, 2, 2),
    conv_kernel=(10, 3, 3),
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
)
_transformer(
    "EncodecModel",
    {"input_values": torch.rand(1, 1, 640) - 0.5},
    num_filters=4,
    hidden_size=16,
    codebook_size=16,
    upsampling_ratios=(4, 2),
    num_lstm_layers=1,
)
_transformer("SpeechT5HifiGan", images(12, 80)[0, :, :, :][:, :12], upsample_initial_channel=32)


def _upernet() -> Built:
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ConvNextConfig(**_FOUR, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        auxiliary_channels=8,
        auxiliary_in_channels=32,
        pool_scales=(1, 2),
    )
    return UperNetForSemanticSegmentation(config), _PIXELS


def _detr() -> Built:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(**_FOUR, embedding_size=8, out_features=["stage4"])
    config = DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        num_queries=5,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    return DetrForObjectDetection(config), _PIXELS


_add("transformers/UperNetForSemanticSegmentation", _upernet)
_add("transformers/DetrForObjectDetection", _detr)

# kornia: descriptors of patches, matchers, dense features; loops over lists of modules.
PATCHES = images(32, 32, channels=1)
_KORNIA = {"pretrained": False}
_model("kornia/HardNet", "kornia.feature:HardNet", PATCHES, default=True, **_KORNIA)
_model("kornia/HyNet", "kornia.feature:HyNet", PATCHES, **_KORNIA)
_model("kornia/SOSNet", "kornia.feature:SOSNet", PATCHES, **_KORNIA)
_model("kornia/TFeat", "kornia.feature:TFeat", PATCHES, **_KORNIA)
_model("kornia/OriNet", "kornia.feature:OriNet", PATCHES, **_KORNIA)
_model("kornia/KeyNet", "kornia.feature:KeyNet", GREY, **_KORNIA)
_model("kornia/DISK", "kornia.feature:DISK", images())
_model("kornia/XFeatModel", "kornia.feature:XFeatModel", images())
_model(
    "kornia/LoFTR",
    "kornia.feature:LoFTR",
    {"data": {"image0": GREY[:1], "image1": GREY[1:]}},
    pretrained=None,
)
_model("kornia/RRDBNet", "kornia.models:RRDBNet", images(16, 16), 3, 3, num_feat=16, num_block=1)
_model(
    "kornia/TinyViT",
    "kornia.models.tiny_vit:TinyViT",
    images(),
    img_size=64,
    num_classes=CLASSES,
    embed_dims=[16, 32, 32, 32],
    depths=[1, 1, 1, 1],
    num_heads=[1, 2, 2, 2],
    window_sizes=[2, 2, 2, 2],
)


# pytorchcv: hundreds of papers in one style; octave, shuffled, gated and shared convolutions.
def _cv(name: str, x: Any = None, default: bool = False, **kwargs: Any) -> None:
    def build() -> Built:
        net = _named("pytorchcv.model_provider:get_model")(name, **kwargs)
        for module in net.modules():
            if isinstance(getattr(module, "final_pool", None), nn.AvgPool2d):
                module.final_pool = nn.AdaptiveAvgPool2d(1)  # it was of 224 px images
        return net, SMALL if x is None else x

    _add(f"pytorchcv/{name}", build, default=default)


_SIZE = {"in_size": (32, 32)}
_cv("octresnet10_ad2", **_SIZE)
_cv("preresnet18_wd4", default=True, **_SIZE)
_cv("sepreresnet10", **_SIZE)
_cv("cbam_resnet18", **_SIZE)
_cv("bam_resnet18", **_SIZE)
_cv("diracnet18v2", **_SIZE)
_cv("sharesnet18", **_SIZE)
_cv("resnesta18", **_SIZE)
_cv("shufflenet_g3_wd4", **_SIZE)
_cv("menet108_8x1_g3", **_SIZE)
_cv("igcv3_wd4", **_SIZE)
_cv("darknet_tiny", **_SIZE)
_cv("squeezeresnet_v1_1", **_SIZE)
_cv("mnasnet_small", **_SIZE)
_cv("fdmobilenet_wd4", **_SIZE)
_cv("resnet20_cifar10")
_cv("densenet40_k12_cifar10")
_cv("diaresnet20_cifar10")
_cv("revnet38", **_SIZE)
_cv("fastscnn_cityscapes", images(), in_size=(64, 64))
_cv("lednet_cityscapes", images(), in_size=(64, 64))
_cv("cgnet_cityscapes", images(), in_size=(64, 64))
_cv("sinet_cityscapes", images(128, 128), in_size=(128, 128))
_cv("espcnet_cityscapes", images(), in_size=(64, 64))
_cv("simplepose_mobile_resnet18_coco", images(), in_size=(64, 64))
_cv(
    "quartznet5x5_en_ls",
    {"x": images(64, channels=64), "x_len": torch.tensor([64, 48])},
    from_audio=False,
)


# spandrel: super-resolution; names of settings found in the weights' shapes.
def _sr(arch: str, path: str, *args: Any, default: bool = False, size: int = 32, **kw: Any) -> None:
    _model(
        f"spandrel/{arch}",
        f"spandrel.architectures.{path}",
        images(size, size),
        *args,
        default=default,
        **kw,
    )


_sr("ESRGAN", "ESRGAN:ESRGAN", num_filters=16, num_blocks=1, scale=2)
_sr("Compact", "Compact:Compact", default=True, num_feat=16, num_conv=4, upscale=2)
_sr("SPAN", "SPAN:SPAN", num_in_ch=3, num_out_ch=3, feature_channels=16)
_sr("RealCUGAN", "RealCUGAN:UpCunet2x")
_sr("NAFNet", "NAFNet:NAFNet", width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])
_sr("SCUNet", "SCUNet:SCUNet", config=[1, 1, 1, 1, 1, 1, 1], dim=64, size=64)
_sr("DRUNet", "DRUNet:DRUNet", in_nc=3, nc=[8, 16, 16, 16], nb=1)
_sr("DnCNN", "DnCNN:DnCNN", in_nc=3, out_nc=3, nc=16, nb=4)
_sr(
    "SwinIR",
    "SwinIR:SwinIR",
    depths=[1, 1],
    num_heads=[2, 2],
    embed_dim=16,
    window_size=8,
    img_size=32,
    upscale=2,
    upsampler="pixelshuffle",
)
_sr("PLKSR", "PLKSR:PLKSR", dim=16, n_blocks=2)
_sr("OmniSR", "OmniSR:OmniSR", num_feat=16, res_num=1, block_num=1, window_size=8, up_scale=2)
_sr("SAFMN", "SAFMN:SAFMN", dim=16, n_blocks=2)
_sr("RCAN", "RCAN:RCAN", n_resgroups=1, n_resblocks=1, n_feats=16)
_sr("MoSR", "MoSR:MoSR", n_block=2, dim=16)

# efficientnet-pytorch: padding computed in forward, or fixed when built; swish as a Function.
_model(
    "efficientnet_pytorch/b0",
    "efficientnet_pytorch:EfficientNet.from_name",
    images(),
    "efficientnet-b0",
    default=True,
    num_classes=CLASSES,
)
_model(
    "efficientnet_pytorch/b0-64px",
    "efficientnet_pytorch:EfficientNet.from_name",
    images(),
    "efficientnet-b0",
    num_classes=CLASSES,
    image_size=64,
)


# peft: adapters around, and merged into, convolutions.
def _adapted(config: str, merged: bool = False, **kwargs: Any) -> Callable[[], Built]:
    def build() -> Built:
        import peft
        from transformers import ResNetConfig, ResNetForImageClassification

        settings = ResNetConfig(**_FOUR, embedding_size=8, layer_type="basic")
        made = peft.get_peft_model(
            ResNetForImageClassification(settings),
            getattr(peft, config)(target_modules=r".*convolution", **kwargs),
        )
        return made.merge_and_unload() if merged else made, _PIXELS

    return build


_add("peft/lora", _adapted("LoraConfig", r=2), default=True)
_add("peft/loha", _adapted("LoHaConfig", r=2, use_effective_conv2d=True))
_add("peft/lora-merged", _adapted("LoraConfig", merged=True, r=2))
