"""List the models that `experiments.third_party` exports, each small and as its authors wrote it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from experiments.third_party_sources import Argument, Builders, Case, config_dict, image, load, tokens

INFERENCE = {"train": False}
FIXED = {"deterministic": True}


def cases(sources: Path) -> list[Case]:
    """List the models, which are built on demand from `sources`."""
    builders = Builders(sources)
    return [
        *flax_examples(builders),
        *google_research(builders),
        *scenic(builders),
        *jax_models(builders),
        *other_repositories(builders),
        *transformers(builders),
        *diffusion(builders),
    ]


def flax_examples(builders: Builders) -> list[Case]:
    """List the examples of flax."""
    example = builders.example
    small = {"vocab_size": 50, "output_vocab_size": 50, "emb_dim": 32, "qkv_dim": 32, "mlp_dim": 64}
    small |= {"num_heads": 2, "num_layers": 2, "deterministic": True}

    def text(path: str, network: str, **settings: Any) -> Callable[[], nn.Module]:
        return lambda: getattr(example(path), network)(example(path).TransformerConfig(**settings))

    full = {"num_classes": 10, "dtype": jnp.float32}
    tagged = {"vocab_size": 50, "output_vocab_size": 12, "num_layers": 2}
    return [
        Case("flax imagenet ResNet18", lambda: example("imagenet").ResNet18(**full), (image(64),), INFERENCE),
        Case("flax imagenet ResNet50", lambda: example("imagenet").ResNet50(**full), (image(64),), INFERENCE),
        Case("flax ppo ActorCritic", lambda: example("ppo").ActorCritic(num_outputs=6), (image(84, 4),)),
        Case("flax vae Encoder", lambda: example("vae").Encoder(20), (Argument((784,)),)),
        Case("flax vae Decoder", lambda: example("vae").Decoder(), (Argument((20,)),)),
        Case(
            "flax nlp_seq Transformer",
            text("nlp_seq", "Transformer", **tagged),
            (tokens(16, "inputs"),),
            INFERENCE,
        ),
        Case("flax lm1b TransformerLM", text("lm1b", "TransformerLM", **small), (tokens(16),)),
        Case("flax wmt Transformer", text("wmt", "Transformer", **small), (tokens(12), tokens(10))),
        Case(
            "flax sst2 TextClassifier",
            lambda: example("sst2").TextClassifier(32, 16, 50, 2, 0.1, 0.1, deterministic=True),
            (tokens(12), Argument((), jnp.int32, below=12, least=1)),
        ),
    ]


def google_research(builders: Builders) -> list[Case]:
    """List the models of Vision Transformer, Big Vision, NesT and V-MoE."""
    named = builders.named
    encoder = {"num_layers": 2, "mlp_dim": 64, "num_heads": 2}
    vit = {"num_classes": 10, "hidden_size": 32, "transformer": encoder}
    mixer = {
        "num_classes": 10,
        "hidden_dim": 32,
        "num_blocks": 2,
        "tokens_mlp_dim": 16,
        "channels_mlp_dim": 64,
    }

    def transformer(**settings: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            return load("vit_jax.models_vit").VisionTransformer(
                **vit, patches=config_dict(size=(8, 8)), **settings
            )

        return build

    def hybrid() -> nn.Module:
        resnet = config_dict(num_layers=(1, 1), width_factor=0.5)
        patches = config_dict(size=(1, 1))
        return load("vit_jax.models_vit").VisionTransformer(**vit, patches=patches, resnet=resnet)

    def nest(**changes: Any) -> nn.Module:
        config = load("models.nest_net").default_config()
        config.update(init_patch_embed_size=1, patch_size=8, num_layers_per_block=[1, 1, 1], embedding_dim=32)
        config.update(num_heads=2, **changes)
        return load("models.nest_net").NestNet(num_classes=10, config=config)

    def moe(dispatcher: str) -> dict[str, Any]:
        router = {
            "num_selected_experts": 1,
            "dispatcher": {"name": dispatcher, "capacity": 4, "batch_priority": False},
        }
        experts = {"layers": (1,), "num_experts": 4, "group_size": 4, "router": router}
        layers = {"num_layers": 2, "mlp_dim": 16, "num_heads": 2, "dropout_rate": 0.0, "moe": experts}
        return {
            "patch_size": (8, 8),
            "hidden_size": 32,
            "encoder": layers,
            "num_classes": 10,
            "classifier": "gap",
        }

    def first(outputs: Any) -> Any:
        return outputs[0]

    vision, big, folder = "vision_transformer", "big_vision.models", "nested-transformer"
    tiny = {"num_classes": 10, "variant": "mu/8"}
    return [
        Case(f"{vision} ViT token", transformer(), (image(32),), INFERENCE),
        Case(f"{vision} ViT gap", transformer(classifier="gap"), (image(32),), INFERENCE),
        Case(f"{vision} ViT hybrid", hybrid, (image(64),), INFERENCE),
        Case(
            f"{vision} MlpMixer",
            lambda: load("vit_jax.models_mixer").MlpMixer(patches=config_dict(size=(8, 8)), **mixer),
            (image(32),),
            INFERENCE,
        ),
        Case("big_vision ViT gap", named(f"{big}.vit", "Model", **tiny), (image(32),), pick=first),
        Case(
            "big_vision ViT map",
            named(f"{big}.vit", "Model", pool_type="map", **tiny),
            (image(32),),
            pick=first,
        ),
        Case(
            "big_vision ViT scan",
            named(f"{big}.vit", "Model", scan=True, posemb="sincos2d", **tiny),
            (image(32),),
            pick=first,
        ),
        Case("big_vision ViT outputs", named(f"{big}.vit", "Model", pool_type="tok", **tiny), (image(32),)),
        Case(
            "big_vision MlpMixer",
            named(f"{big}.mlp_mixer", "Model", num_classes=10, variant="S/8", num_blocks=2),
            (image(32),),
            pick=first,
        ),
        Case(
            "big_vision BiT",
            named(f"{big}.bit", "Model", num_classes=10, width=0.5, depth=[1, 1, 1, 1]),
            (image(64),),
            pick=first,
        ),
        Case(f"{folder} NesT", nest, (image(32),)),
        Case(f"{folder} NesT multi-query", partial(nest, attn_type="local_multi_query"), (image(32),)),
        Case(
            f"{folder} WideResnet",
            lambda: load("models.wide_resnet").WideResnet(
                blocks_per_group=1, channel_multiplier=2, num_classes=10
            ),
            (image(32),),
        ),
        *(
            Case(
                f"vmoe VisionTransformerMoe {dispatcher}",
                named("vmoe.nn.vit_moe", "VisionTransformerMoe", deterministic=True, **moe(dispatcher)),
                (image(32),),
                pick=first,
            )
            for dispatcher in ("einsum", "indices")
        ),
    ]


def scenic(builders: Builders) -> list[Case]:
    """List the models of Scenic."""
    baselines = "scenic.projects.baselines"
    sizes = {"num_layers": 2, "mlp_dim": 64, "num_heads": 2, "hidden_size": 32, "num_classes": 10}
    mixer = {"num_classes": 10, "hidden_size": 32, "num_layers": 2, "channels_mlp_dim": 64}
    clip = {"patch_size": 8, "features": 32, "num_layers": 2, "num_heads": 2, "out_features": 16}
    text = {"vocab_size": 50, "features": 32, "num_layers": 2, "num_heads": 2, "out_features": 16}
    named = builders.named

    def vit() -> nn.Module:
        return load(f"{baselines}.vit").ViT(patches=config_dict(size=(8, 8)), **sizes)

    def axial() -> nn.Module:
        attention = config_dict(num_heads=2)
        network = load(f"{baselines}.axial_resnet").AxialResNet
        return network(num_outputs=10, axial_attention_configs=attention, num_layers=26)

    return [
        Case("scenic ViT", vit, (image(32),), INFERENCE),
        Case(
            "scenic Mixer",
            named(
                f"{baselines}.mixer",
                "Mixer",
                patch_size=(8, 8),
                sequence_mlp_dim=16,
                layer_scale=0.1,
                **mixer,
            ),
            (image(32),),
            INFERENCE,
        ),
        Case(
            "scenic UNet",
            named(f"{baselines}.unet", "UNet", num_classes=5, block_size=(8, 16, 32)),
            (image(64),),
            INFERENCE,
        ),
        Case(
            "scenic ResNet18",
            named(f"{baselines}.resnet", "ResNet", num_outputs=10, num_filters=16, num_layers=18),
            (image(64),),
            INFERENCE,
        ),
        Case("scenic AxialResNet", axial, (image(64),), INFERENCE),
        Case(
            "scenic SimpleCNN",
            named(
                f"{baselines}.simple_cnn",
                "SimpleCNN",
                num_outputs=10,
                output_projection_type="segmentation",
                num_filters=(8, 16),
                kernel_sizes=(3, 3),
                use_bias=True,
            ),
            (image(32),),
            INFERENCE,
        ),
        Case(
            "scenic CLIP image",
            named(f"{baselines}.clip.layers", "VisionTransformer", **clip),
            (image(32),),
        ),
        Case("scenic CLIP text", named(f"{baselines}.clip.layers", "TextEncoder", **text), (tokens(12),)),
        Case(
            "scenic CLIP ResNet",
            named(
                f"{baselines}.clip.layers",
                "ModifiedResNet",
                features=16,
                out_features=16,
                num_layers=(1, 1, 1, 1),
                num_heads=2,
            ),
            (image(64),),
        ),
        Case(
            "scenic TokenLearner",
            named("scenic.projects.token_learner.model", "TokenLearnerModule", num_tokens=4),
            (Argument((8, 8, 16)),),
        ),
    ]


def jax_models(builders: Builders) -> list[Case]:
    """List the models of jax-models."""
    head = {"attach_head": True, "num_classes": 10}

    def model(name: str, file: str, network: str, size: int = 64, **sizes: Any) -> Case:
        build = builders.named(f"jax_models.models.{file}", network, **head, **sizes)
        return Case(f"jax-models {name}", build, (image(size),), FIXED)

    stages = {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)}
    windows = {"emb_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    channels = {"channels_list": (16, 24, 32, 48), "num_layers_list": (1, 1, 1, 1)}
    return [
        model("ConvMixer", "conv_mixer", "ConvMixer", 56, features=64, num_mixer_layers=2),
        model("ConvNeXt", "convnext", "ConvNeXt", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)),
        model("MLPMixer", "mlp_mixer", "MLPMixer", 32, patch_size=8, hidden_size=32),
        model("PoolFormer", "poolformer", "S12"),
        model("Swin", "swin_transformer", "SwinTransformer", **windows),
        model("SegFormer-B0", "segformer", "segformer_b0"),
        model(
            "CaiT", "cait", "CaiT", 32, patch_size=8, embed_dim=32, depth=2, num_heads=2, depth_token_only=1
        ),
        model("VAN", "van", "VAN", **stages),
        model("PVT", "pvit", "PyramidViT", **stages),
        model("MPViT", "mpvit", "MPViT", **channels),
        model("PatchConvNet", "patchconvnet", "PatchConvNet", depth=2, dim=32),
    ]


def other_repositories(builders: Builders) -> list[Case]:
    """List the models of flaxmodels, jax-resnet, efficientnet-jax and vqgan-jax."""
    named = builders.named

    def efficientnet(variant: str) -> Callable[[], nn.Module]:
        return lambda: load("jeffnet.linen").create_model(variant, input_shape=(3, 64, 64))[0]

    def vqgan() -> nn.Module:
        sizes = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "resolution": 32, "z_channels": 16}
        config = load("vqgan_jax.configuration_vqgan").VQGANConfig(
            **sizes, attn_resolutions=(16,), n_embed=24, embed_dim=16
        )
        return load("vqgan_jax.modeling_flax_vqgan").VQModule(config)

    efficient = {"training": False}
    return [
        Case(
            "flaxmodels ResNet18", named("flaxmodels", "ResNet18", pretrained=None), (image(64),), INFERENCE
        ),
        Case("flaxmodels VGG16", named("flaxmodels", "VGG16", pretrained=None), (image(224),), INFERENCE),
        Case("jax-resnet ResNet18", named("jax_resnet", "ResNet18", n_classes=10), (image(64),)),
        Case("jax-resnet ResNetD50", named("jax_resnet", "ResNetD50", n_classes=10), (image(64),)),
        Case("jax-resnet ResNeSt50Fast", named("jax_resnet", "ResNeSt50Fast", n_classes=10), (image(64),)),
        Case("efficientnet-jax EfficientNet-B0", efficientnet("pt_efficientnet_b0"), (image(64),), efficient),
        Case("efficientnet-jax TF-Lite0", efficientnet("tf_efficientnet_lite0"), (image(64),), efficient),
        Case(
            "efficientnet-jax MobileNetV3",
            efficientnet("pt_mobilenetv3_large_100"),
            (image(64),),
            efficient,
        ),
        Case("efficientnet-jax MixNet-S", efficientnet("tf_mixnet_s"), (image(64),), efficient),
        Case("vqgan-jax VQGAN encode", vqgan, (image(32),), {"method": "encode"}),
        Case("vqgan-jax VQGAN decode", vqgan, (Argument((16, 16, 16)),), {"method": "decode"}),
    ]


def transformers(builders: Builders) -> list[Case]:
    """List the models of transformers."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    size |= {"num_labels": 10}
    vision = size | {"image_size": 32, "patch_size": 8}
    text = size | {"vocab_size": 50, "max_position_embeddings": 32}
    stages = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 10}
    ids, mask, kinds, positions = tokens(12), tokens(12, below=2), tokens(12, below=2), tokens(12, below=12)
    plain, full = {"return_dict": True}, {"return_dict": True, "head_mask": None}

    def model(
        name: str,
        task: str,
        sizes: dict[str, Any],
        inputs: tuple[Argument, ...] = (image(32),),
        call: dict[str, Any] = plain,
        output: str = "logits",
    ) -> Case:
        build = builders.configured(name, f"{name}{task}", sizes)
        return Case(f"transformers {name}", build, inputs, call, lambda outputs: outputs[output])

    picture, sequence = "ForImageClassification", "ForSequenceClassification"
    contrastive = {"text_config": text, "vision_config": vision, "projection_dim": 16}
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    bart = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 50}
    bart |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    bart |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    whisper = bart | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    whisper |= {name: 1 for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    whisper |= {"decoder_start_token_id": 1}
    speech = size | {"vocab_size": 20, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3]}
    speech |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    speech |= {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    llama = text | {"num_key_value_heads": 1}
    distil = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 50, "num_labels": 10}
    return [
        model("ViT", picture, vision),
        model("Beit", picture, vision | {"use_relative_position_bias": True}),
        model("Dinov2", picture, vision),
        model("ResNet", picture, stages),
        model("RegNet", picture, stages | {"groups_width": 8}),
        model("CLIP", "", contrastive, (tokens(12), image(32), mask, positions), output="text_embeds"),
        model("Bert", sequence, text, (ids, mask, kinds, positions), full),
        model("DistilBert", sequence, distil, (ids, mask)),
        model("Electra", "ForMaskedLM", text | {"embedding_size": 16}, (ids, mask, kinds, positions), full),
        model("RoFormer", "ForMaskedLM", text, (ids, mask, kinds), full),
        model("GPT2", "LMHead", gpt, (ids, mask, positions)),
        model("Llama", "ForCausalLM", llama, (ids, mask, positions)),
        model("Gemma", "ForCausalLM", llama | {"head_dim": 16}, (ids, mask, positions)),
        model("Bart", "", bart, (ids, mask, ids, mask, positions, positions), output="last_hidden_state"),
        model(
            "Whisper",
            "ForConditionalGeneration",
            whisper,
            (Argument((8, 32)), tokens(8), tokens(8, below=2), tokens(8, below=8)),
        ),
        model("Wav2Vec2", "ForCTC", speech, (Argument((400,)),)),
    ]


def diffusion(builders: Builders) -> list[Case]:
    """List the networks of diffusers, which take and return channels-first images."""
    down = ("CrossAttnDownBlock2D", "DownBlock2D")
    unet = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "attention_head_dim": 2,
    }
    unet |= {"down_block_types": down, "cross_attention_dim": 32}
    up = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 32} | blocks
    latents, text = Argument((4, 16, 16)), Argument((7, 32))
    steps = Argument((), jnp.int32, below=1000)
    networks = "diffusers.models"
    return [
        Case(
            "diffusers UNet2DCondition",
            builders.named(
                f"{networks}.unets.unet_2d_condition_flax", "FlaxUNet2DConditionModel", **unet, **up
            ),
            (latents, steps, text),
            pick=lambda outputs: outputs.sample,
            layout="nhwc",
        ),
        Case(
            "diffusers UNet2DCondition linear",
            builders.named(
                f"{networks}.unets.unet_2d_condition_flax",
                "FlaxUNet2DConditionModel",
                use_linear_projection=True,
                **unet,
                **up,
            ),
            (latents, steps, text),
            pick=lambda outputs: outputs.sample,
            layout="nhwc",
        ),
        Case(
            "diffusers ControlNet",
            builders.named(f"{networks}.controlnets.controlnet_flax", "FlaxControlNetModel", **unet),
            (latents, steps, text, Argument((3, 128, 128))),
            pick=lambda outputs: outputs.mid_block_res_sample,
            layout="nhwc",
        ),
        Case(
            "diffusers AutoencoderKL",
            builders.named(f"{networks}.vae_flax", "FlaxAutoencoderKL", **vae),
            (Argument((3, 32, 32)),),
            pick=lambda outputs: outputs.sample,
            layout="nhwc",
        ),
    ]
