"""Where each method keeps the backbone in its files, as a table that is read from top to bottom

A new format is a new row here and a file layout in the tests. Wrappers (`module.`, `_orig_mod.`, ...) are taken out of
all keys before a row sees them, and names inside the backbone are the business of `renames.py`.
"""

from typing import NamedTuple, Optional, Tuple

from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
CLIP = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

ONLINE = 'the encoder that gradients train, which the linear evaluation of its authors loads'
TEACHER = 'the averaged weights, which the evaluation of its authors loads'
ONLY = 'the only copy'


class Rule(NamedTuple):
    """How one kind of file is told from others, and what is taken from it.

    Attributes:
        method: Who writes such files, for the log and for errors.
        signature: Pattern that one key of the state dict matches.
        prefixes: What the keys of the backbone start with, tried in this order.
        copy: Name of the copy that is taken.
        why: Why this copy.
        source: Where that was read.
        container: Pattern of the path of keys to the state dict inside the file, '' is the file itself.
        beside: Key that the file must have at its top.
        normalization: Mean and std of the pretraining images, None where the file alone does not tell.
        heads: Width and number of heads that shapes do not show, where they differ from timm's model of that width.
        quick_gelu: Whether the network was trained with QuickGELU, None where the file alone does not tell.
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
RULES = (  # the most specific first; the last one fits any file, so the coverage of the model decides
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
    Rule('DINOv2 training', r'(dino_head|ibot_head)\.', ('backbone.',), 'teacher', TEACHER,
         'facebookresearch/dinov2 dinov2/train/train.py', 'teacher', normalization=IMAGENET),
    Rule('iBOT', r'backbone\.(mask_token|masked_embed)', ('backbone.',), 'teacher', TEACHER,
         'bytedance/ibot main_ibot.py, eval_linear.py', 'teacher', normalization=IMAGENET),
    Rule('DINO', r'backbone\.', ('backbone.',), 'teacher', TEACHER,
         'facebookresearch/dino main_dino.py, eval_linear.py', 'teacher', normalization=IMAGENET),
    Rule('EsViT', r'(head|head_dense|layers\.0)\.', ('',), 'teacher', TEACHER,
         'microsoft/esvit main_esvit.py, eval_linear.py', 'teacher', normalization=IMAGENET),
    Rule('I-JEPA', r'blocks\.0\.', ('',), 'target encoder', 'the averaged encoder, which the paper evaluates',
         'facebookresearch/ijepa src/train.py; arXiv 2301.08243', 'target_encoder', normalization=IMAGENET),
    Rule('PyContrast', r'encoder\.', ('encoder.',), 'query encoder', ONLINE + "; 'model_ema' is the key encoder here",
         'HobbitLong/PyContrast contrast_trainer.py, linear_trainer.py', 'model', 'model_ema', normalization=IMAGENET),
    Rule('timm train.py', r'.', ('',), 'EMA', "the averaged weights, timm's default", 'timm.models.load_state_dict',
         'state_dict_ema|model_ema', quick_gelu=None),
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
    Rule('Hugging Face ResNet', r'(resnet\.)?embedder\.embedder\.', ('', 'resnet.'), 'encoder', ONLY,
         'huggingface/transformers models/resnet'),
    Rule('Hugging Face ConvNeXt', r'(convnext\.)?encoder\.stages\.\d+\.layers\.\d+\.dwconv', ('', 'convnext.'),
         'encoder', ONLY, 'huggingface/transformers models/convnext'),
    Rule('Hugging Face Swin', r'(swin\.)?encoder\.layers\.\d+\.blocks\.\d+\.attention', ('', 'swin.'), 'encoder', ONLY,
         'huggingface/transformers models/swin'),
    Rule('Hugging Face CLIP', r'(vision_model\.)?pre_layrnorm', ('vision_model.', ''), 'image tower', ONLY,
         'huggingface/transformers models/clip, CLIPImageProcessor', normalization=CLIP, quick_gelu=None),
    Rule('Hugging Face ViT, MAE, DINOv2', r'(\w+\.)?encoder\.layer\.\d+\.attention',
         ('', 'vit.', 'dinov2.', 'dinov2_with_registers.', 'model.'), 'encoder', ONLY,
         'huggingface/transformers models/vit, models/vit_mae, models/dinov2'),
    Rule('plain backbone', r'.', ('',), 'encoder', ONLY,
         'Barlow Twins, VICReg, DINO and MAE as released; BYOL converted from JAX; timm', quick_gelu=None),
)

# fmt: on

WRAPPERS = ('module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module')  # of torch, anywhere in a key

# What may be left over under the prefix without harm: heads, memories and buffers of the pretraining
HEADS = (
    r'(fc|head|heads|head_dense|classifier|pooler|visual_projection|attnpool|pre_logits|lm_head|proj)(\.|$)'
    r'|(projector|projection_head|prediction_head|predictor|prototypes|neck|contrast|queue|momentum|decoder)'
    r'|(mask_token|masked_embed|logit_scale|logit_bias|norms\.|local_cls_norm|embeddings\.mask_token)'
    r'|.*(num_batches_tracked|relative_position_index|attn_mask|position_ids|rope_embed\.periods|bias_mask)$'
)
# What must not: a part of the network that the model does not have
BLOCKS = r'(layer\d+|blocks|stages|layers|encoder\.layers?|encoder\.stages)\.'


class Refusal(NamedTuple):
    """A file that no timm model can take, though it may look as if one could.

    Attributes:
        what: What the file is.
        key: Pattern of a key that such a file has.
        why: Why it is refused, and what to do.
        shape: Shape of that tensor, where the key alone does not tell.
    """

    what: str
    key: str
    why: str
    shape: Tuple[int, ...] = ()


# fmt: off
REFUSALS = (
    Refusal('an mmpretrain Swin', r'(.*\.)?stages\.0\.blocks\.0\.attn\.w_msa\.',
            'Its patch merging orders channels as torch.nn.Unfold does, unlike timm, which shapes do not show. '
            'Take the original Swin file of the same weights.'),
    Refusal('a MoCo v3 network with a convolutional stem', r'(.*\.)?base_encoder\.patch_embed\.proj\.0\.weight',
            'timm has no such stem.'),
    Refusal('a SimCLR network converted from TensorFlow', r'net\.\d+\.(?!weight|bias)',
            'Its network is built otherwise than a ResNet of timm.'),
    Refusal('a CMC checkpoint', r'encoder1\.', 'Its two encoders see one and two colour channels, not an RGB image.'),
    Refusal('a ResNet with the stem for small images', r'(.*\.)?conv1\.weight',
            "It has a 3x3 first convolution and no pooling after it, timm's ResNets have not. Train it in its own "
            'library, or start from one that was pretrained on larger images.', (64, 3, 3, 3)),
)
# fmt: on
