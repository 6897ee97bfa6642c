"""Where the files of each pretraining method have the backbone, as a table that is read from top to bottom

To add a format, add a row here and a file of that format to the tests. The names of wrappers (`module.`, `_orig_mod.`,
...) are removed from all keys before a row is compared with them. Names inside the backbone are in `names/`.
"""

from typing import NamedTuple, Optional, Tuple

from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
INCEPTION = (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
CLIP = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

ONLINE = 'the encoder that gradients train; the linear evaluation of the authors loads it'
TEACHER = 'the weights averaged over training; the evaluation of the authors loads them'
ONLY = 'the only copy'


class Rule(NamedTuple):
    """How to recognize the files of a method, and which part of them is the backbone.

    Attributes:
        method: Pretraining method or library that writes such files, for the log and for errors.
        signature: Regular expression that a key of the state dict must match.
        prefixes: Starts of the keys of the backbone, tried in this order.
        copy: Name of the copy of the encoder that is taken.
        why: Why this copy is taken.
        source: Repository and files from which this row was written.
        container: Regular expression for the keys that lead to the state dict inside the file, joined by slashes. ''
            is the top of the file.
        beside: Key that must be at the top of the file, '' if none is needed.
        normalization: Mean and std of the pretraining images, None if the format does not determine them.
        heads: Pairs of the width of a ViT and its number of attention heads. Shapes do not show the number, so only
            widths are listed for which timm's ViT has another number.
        quick_gelu: Whether the network was trained with QuickGELU, None if the format does not determine it.
    """

    method: str
    signature: str
    prefixes: Tuple[str, ...]
    copy: str
    why: str
    source: str
    container: str = '.*'
    beside: str = ''
    normalization: Optional[Tuple[Tuple[float, ...], Tuple[float, ...]]] = None
    heads: Tuple[Tuple[int, int], ...] = ()
    quick_gelu: Optional[bool] = False


# fmt: off
RULES = (  # the most specific first; the last one matches any file, which is then accepted if it fills the model
    Rule('MoCo v3', r'momentum_encoder\.(conv1|patch_embed)\.', ('base_encoder.',), 'base encoder', ONLINE,
         'facebookresearch/moco-v3 main_moco.py, main_lincls.py; heads: vits.py', 'state_dict', normalization=IMAGENET,
         heads=((384, 12),)),
    Rule('OpenSelfSup, DenseCL, mmselfsup', r'encoder_[qk]\.0\.', ('backbone.', 'encoder_q.0.'), 'query encoder',
         ONLINE, 'WXinlong/DenseCL densecl.py, tools/extract_backbone_weights.py', 'state_dict',
         normalization=IMAGENET),
    Rule('MoCo v1/v2, PCL', r'encoder_q\.', ('encoder_q.',), 'query encoder', ONLINE,
         'facebookresearch/moco main_moco.py, main_lincls.py; salesforce/PCL main_pcl.py', normalization=IMAGENET),
    Rule('PixPro', r'encoder_k\.', ('encoder.',), 'online encoder', ONLINE,
         'zdaxie/PixPro main_pretrain.py, main_linear.py', 'model', normalization=IMAGENET),
    Rule('BYOL of OpenSelfSup, mmselfsup', r'(online_net|target_net)\.', ('backbone.', 'online_net.0.'),
         'online encoder', ONLINE, 'open-mmlab/mmselfsup byol.py', normalization=IMAGENET),
    Rule('VISSL DINO', r'momentum_teacher\.trunk\.', ('momentum_teacher.trunk.',), 'teacher', TEACHER,
         'facebookresearch/vissl vissl/utils/checkpoint.py', 'classy_state_dict/loss', normalization=IMAGENET),
    Rule('VISSL', r'(base_model\.)?_feature_blocks\.', ('_feature_blocks.', 'base_model._feature_blocks.'), 'trunk',
         ONLY, 'facebookresearch/vissl extra_scripts/convert_vissl_to_torchvision.py', normalization=IMAGENET),
    Rule('VISSL', r'(blocks\.0|layer1\.0)\.', ('',), 'trunk', ONLY,
         'facebookresearch/vissl extra_scripts/convert_vissl_to_torchvision.py',
         'classy_state_dict/base_model/model/trunk', normalization=IMAGENET),
    Rule('DINO, iBOT in one state dict', r'(.*\.)?teacher\.((dino|ibot)_head|head\.last_layer)\.',
         ('teacher.backbone.', 'teacher.', 'model.teacher.backbone.', 'model.teacher.'), 'teacher', TEACHER,
         'facebookresearch/dinov2 dinov2/train/ssl_meta_arch.py; facebookresearch/dino vision_transformer.py',
         normalization=IMAGENET),
    Rule('DINOv2 training', r'(dino_head|ibot_head)\.', ('backbone.',), 'teacher', TEACHER,
         'facebookresearch/dinov2 dinov2/train/train.py', 'teacher', normalization=IMAGENET),
    Rule('iBOT', r'backbone\.(mask_token|masked_embed)', ('backbone.',), 'teacher', TEACHER,
         'bytedance/ibot main_ibot.py, eval_linear.py', 'teacher', normalization=IMAGENET),
    Rule('DINO', r'backbone\.', ('backbone.',), 'teacher', TEACHER,
         'facebookresearch/dino main_dino.py, eval_linear.py', 'teacher', normalization=IMAGENET),
    Rule('EsViT', r'(head|head_dense|layers\.0)\.', ('',), 'teacher', TEACHER,
         'microsoft/esvit main_esvit.py, eval_linear.py', 'teacher', normalization=IMAGENET),
    Rule('I-JEPA', r'blocks\.0\.', ('',), 'target encoder',
         'the weights averaged over training; the paper evaluates them',
         'facebookresearch/ijepa src/train.py; arXiv 2301.08243', 'target_encoder', normalization=IMAGENET),
    Rule('PyContrast', r'encoder\.', ('encoder.',), 'query encoder', ONLINE + " ('model_ema' is the key encoder)",
         'HobbitLong/PyContrast contrast_trainer.py, linear_trainer.py', 'model', 'model_ema', normalization=IMAGENET),
    Rule('timm train.py', r'.', ('',), 'EMA', 'the weights averaged over training; timm loads them by default',
         'timm.models.load_state_dict', 'state_dict_ema|model_ema', quick_gelu=None),
    Rule('LightlyTrain', r'teacher_embedding_model\.wrapped_model\._model\.',
         ('teacher_embedding_model.wrapped_model._model.',), 'teacher', TEACHER,
         'lightly-ai/lightly-train dino.py, timm.py'),
    Rule('lightly DINO', r'teacher_backbone\.', ('teacher_backbone.',), 'teacher', TEACHER,
         'lightly-ai/lightly examples/pytorch/dino.py', normalization=IMAGENET),
    Rule('lightly', r'backbone\.(0|4\.0)\.', ('backbone.',), 'online encoder', ONLINE,
         'lightly-ai/lightly examples/pytorch/moco.py', normalization=IMAGENET),
    Rule('SimCLR of sthalles', r'backbone\.fc\.0\.', ('backbone.',), 'encoder', ONLY,
         'sthalles/SimCLR simclr.py, models/resnet_simclr.py'),
    Rule('Barlow Twins, VICReg', r'projector\.', ('backbone.',), 'encoder', ONLY,
         'facebookresearch/barlowtwins main.py; facebookresearch/vicreg main_vicreg.py', 'model',
         normalization=IMAGENET),
    Rule('mmselfsup, mmpretrain', r'(neck|head|data_preprocessor|target_generator|momentum_encoder)\.', ('backbone.',),
         'online encoder', ONLINE, 'open-mmlab/mmpretrain mmpretrain/models/selfsup, configs', 'state_dict',
         beside='meta', normalization=IMAGENET),
    Rule('SimSiam', r'encoder\.fc\.', ('encoder.',), 'encoder', ONLY,
         'facebookresearch/simsiam main_simsiam.py, main_lincls.py', 'state_dict', normalization=IMAGENET),
    Rule('solo-learn', r'(momentum_backbone|classifier|projector|predictor|prototypes)\.', ('backbone.', 'encoder.'),
         'online encoder', ONLINE, 'vturrisi/solo-learn main_linear.py, solo/methods/base.py', 'state_dict',
         normalization=IMAGENET),
    Rule('SupContrast, Core-tuning', r'encoder\.', ('encoder.',), 'encoder', ONLY,
         'HobbitLong/SupContrast util.py, main_linear.py; Vanint/Core-tuning Core-tuning.py', 'model'),
    Rule('SimCLR of Spijkervet', r'projector\.', ('encoder.',), 'encoder', ONLY, 'Spijkervet/SimCLR simclr/simclr.py',
         container=''),
    Rule('SwAV, DeepCluster v2', r'(projection_head|prototypes)\b', ('',), 'encoder', ONLY,
         'facebookresearch/swav main_swav.py, hubconf.py', normalization=IMAGENET),
    Rule('OpenAI CLIP', r'(input_resolution|context_length)$', ('visual.',), 'image tower', ONLY,
         'openai/CLIP clip/clip.py, clip/model.py', normalization=CLIP, quick_gelu=True),
    Rule('OpenCLIP with a timm tower', r'visual\.trunk\.', ('visual.trunk.',), 'image tower', ONLY,
         'mlfoundations/open_clip timm_model.py, task/checkpoint.py', quick_gelu=None),
    Rule('OpenCLIP', r'visual\.(class_embedding|conv1|attnpool)', ('visual.',), 'image tower', ONLY,
         'mlfoundations/open_clip factory.py, task/checkpoint.py', quick_gelu=None),
    Rule('MAE', r'decoder_(embed|blocks|pos_embed)', ('',), 'encoder', ONLY,
         'facebookresearch/mae util/misc.py, main_finetune.py', 'model', normalization=IMAGENET),
    Rule('DINOv3', r'(storage_tokens$|norms\.)', ('',), 'teacher', TEACHER,
         'facebookresearch/dinov3 dinov3/hub/backbones.py', normalization=IMAGENET),
    Rule('iBOT backbone', r'masked_embed$', ('',), 'encoder', 'the file name tells teacher or student',
         'bytedance/ibot README.md', normalization=IMAGENET),
    Rule('DINOv2', r'(mask_token|register_tokens)$', ('',), 'teacher', TEACHER,
         'facebookresearch/dinov2 dinov2/hub/backbones.py', container='|model|state_dict', normalization=IMAGENET),
    Rule('torchvision',
         r'(encoder\.layers\.encoder_layer_0|features\.1\.(0\.attn|0\.block|conv)|trunk_output\.block1)\.', ('',),
         'encoder', ONLY, 'pytorch/vision torchvision/models, their weights', normalization=IMAGENET),
    Rule('EfficientNet-PyTorch', r'_conv_stem\.', ('',), 'encoder', ONLY,
         'lukemelas/EfficientNet-PyTorch efficientnet_pytorch/model.py', container='|state_dict|model'),
    Rule('Hugging Face ResNet, RegNet', r'(\w+\.)?embedder\.embedder\.', ('', 'resnet.', 'regnet.'), 'encoder', ONLY,
         'huggingface/transformers models/resnet, models/regnet'),
    Rule('Hugging Face PVTv2, Hiera',
         r'(\w+\.)?encoder\.(layers\.\d+\.patch_embedding|stages\.\d+\.layers\.\d+\.attn)\.', ('', 'pvt_v2.', 'hiera.'),
         'encoder', ONLY, 'huggingface/transformers models/pvt_v2, models/hiera'),
    Rule('Hugging Face ConvNeXt', r'(\w+\.)?encoder\.stages\.\d+\.layers\.\d+\.dwconv',
         ('', 'convnext.', 'convnextv2.'), 'encoder', ONLY,
         'huggingface/transformers models/convnext, models/convnextv2'),
    Rule('Hugging Face Swin', r'(\w+\.)?encoder\.layers\.\d+\.blocks\.\d+\.attention', ('', 'swin.', 'swinv2.'),
         'encoder', ONLY, 'huggingface/transformers models/swin, models/swinv2'),
    Rule('Hugging Face CLIP', r'(vision_model\.)?pre_layrnorm', ('vision_model.', ''), 'image tower', ONLY,
         'huggingface/transformers models/clip, CLIPImageProcessor', normalization=CLIP, quick_gelu=None),
    Rule('InternViT', r'(.*\.)?encoder\.layers?\.\d+\.(ls1$|attention\.projection_layer)',
         ('', 'vision_model.', 'vision_tower.', 'model.vision_tower.'), 'image tower', ONLY,
         'OpenGVLab/InternVL modeling_intern_vit.py; huggingface/transformers models/internvl', normalization=IMAGENET),
    Rule('Hugging Face SigLIP', r'(vision_model\.)?(head\.probe|embeddings\.patch_embedding\.)', ('vision_model.', ''),
         'image tower', ONLY, 'huggingface/transformers models/siglip, models/siglip2, SiglipImageProcessor',
         normalization=INCEPTION),
    Rule('Hugging Face DINOv3', r'(model\.)?(layer\.\d+\.mlp\.up_proj|stages\.\d+\.layers\.\d+\.depthwise_conv)', ('',),
         'teacher', TEACHER, 'huggingface/transformers models/dinov3_vit, models/dinov3_convnext'),
    Rule('Hugging Face BEiT, data2vec', r'(\w+\.)?(encoder\.layer|layers)\.\d+\.lambda_1$',
         ('', 'beit.', 'data2vec_vision.'), 'encoder', ONLY,
         'huggingface/transformers models/beit, models/data2vec'),
    Rule('Hugging Face ViT, MAE, DINOv2', r'(\w+\.)?(encoder\.layer\.\d+\.attention|layers\.\d+\.attention\.o_proj)',
         ('', 'vit.', 'deit.', 'ijepa.', 'dinov2.', 'dinov2_with_registers.', 'model.'), 'encoder', ONLY,
         'huggingface/transformers models/vit, models/vit_mae, models/dinov2, models/deit, models/ijepa'),
    Rule('Hugging Face AIMv2', r'(\w+\.)?encoder\.layers\.\d+\.rms_norm1', ('', 'vision_model.'), 'image tower', ONLY,
         'huggingface/transformers models/aimv2', normalization=CLIP),
    Rule('plain backbone', r'.', ('',), 'encoder', ONLY,
         'Barlow Twins, VICReg, DINO and MAE as released; BYOL converted from JAX; timm', quick_gelu=None),
)

# fmt: on

# Names that wrappers of torch (DDP, compile, FSDP, activation checkpointing) insert anywhere in a key
WRAPPERS = ('module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module')

# Names that may be left over under the prefix without harm: heads, queues and buffers of the pretraining
HEADS = (
    r'(fc|head|heads|head_dense|classifier|pooler|visual_projection|attnpool|attn_pool|pre_logits|lm_head|proj)(\.|$)'
    r'|(projector|projection_head|prediction_head|predictor|prototypes|neck|contrast|queue|momentum|decoder)'
    r'|(cls_classifier|distillation_classifier|heads\.head|multi_modal_projector)\.'
    r'|(mask_token|masked_embed|logit_scale|logit_bias|norms\.|local_cls_norm|embeddings\.mask_token)'
    r'|.*(num_batches_tracked|relative_position_index|relative_coords_table|attn_mask)$'
    r'|.*(position_ids|rope_embed\.periods|bias_mask)$'
)
# Names that must not be left over: blocks, tokens and positions of the network that the model does not have
BLOCKS = (
    r'(layer\d+|blocks|stages|layers|encoder\.layers?|encoder\.stages|s\d+\.b\d+|rel_pos_bias|norm_pre)\.'
    r'|(cls|dist|reg)_token$|pos_embed$'
)


class Refusal(NamedTuple):
    """A kind of file that no timm model can load correctly, though it may look as if one could.

    Attributes:
        what: What the file is, for the error.
        key: Regular expression for a key that such a file has.
        why: Why it is refused, and what to do instead.
        shape: Shape that the tensor of this key must have too, empty if the key is enough to recognize the file.
    """

    what: str
    key: str
    why: str
    shape: Tuple[int, ...] = ()


# fmt: off
REFUSALS = (
    Refusal('an mmpretrain Swin', r'(.*\.)?stages\.0\.blocks\.0\.attn\.w_msa\.',
            'Its patch merging orders channels as torch.nn.Unfold does, timm in another way. The shapes are the same, '
            'so the weights would load but compute nonsense. Take the original Swin file of the same weights.'),
    Refusal('a MoCo v3 network with a convolutional stem', r'(.*\.)?base_encoder\.patch_embed\.proj\.0\.weight',
            'timm has no ViT with such a stem. Take a MoCo v3 file of a plain ViT or a ResNet.'),
    Refusal('a SimCLR network converted from TensorFlow', r'net\.\d+\.(?!weight|bias)',
            'It has other layers than a ResNet of timm. Take a ResNet that was pretrained in PyTorch.'),
    Refusal('a CMC checkpoint', r'encoder1\.',
            'Its two encoders see one and two colour channels. timm models see all three: take another checkpoint.'),
    Refusal('a network with low-rank adapters (LoRA)', r'.*\.lora_[AB]\.',
            'They are not in its weights yet. Take model_best.safetensors of the same run, or merge them with '
            'merge_and_unload() of peft first.'),
    Refusal('a ResNet with the stem for small images', r'(.*\.)?conv1\.weight',
            'Its first convolution is 3x3 and no pooling follows. timm has no such ResNet. Fine-tune it in its own '
            'library, or take a ResNet that was pretrained on larger images.', (64, 3, 3, 3)),
)
# fmt: on
