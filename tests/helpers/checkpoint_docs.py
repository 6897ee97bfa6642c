"""The table of docs/checkpoints.md, from the cases that the tests run

python tests/helpers/checkpoint_docs.py > docs/checkpoints.md
"""

from checkpoint_formats import FORMATS
from checkpoint_libraries import LIBRARIES

from timm_coretune.checkpoint.rules import ONLINE, ONLY, REFUSALS, RULES, TEACHER
from timm_coretune.checkpoint.source import RELEASES

FAMILIES = {'resnet': 'ResNet', 'wide_resnet': 'ResNet', 'vit': 'ViT', 'convnext': 'ConvNeXt', 'swin': 'Swin',
            'tf_efficientnet': 'others'}  # fmt: skip
COLUMNS = ('ResNet', 'ViT', 'ConvNeXt', 'Swin', 'others')

HEAD = """# Checkpoints

`load_checkpoint(model, source)`, `train.py --pretrained-path SOURCE` and
`python -m timm_coretune.checkpoint inspect SOURCE` take a file (safetensors, `.pth`, `.pth.tar`, `.pt`, `.ckpt`,
`.bin`, `.pkl` with arrays by name, and `.npz` where timm reads it), a folder (of shards, of Hugging Face, or of a run,
also one that was cut off), `hf-hub:owner/name[/file][@revision]`, an `https://` URL, or a short name. A repository or
folder with several files of weights and none of a usual name is refused, and the error lists them.

Code in pickles is never run. Tensors, arrays of numpy and dictionaries are rebuilt. All else that a pickle names is
left out without being imported, and the log and the report count it by class: `datetime.datetime (3)`. So one object of
another library does not make a file unreadable. A file that names a function that runs commands (`os.system`) is
refused, and so is a whole `nn.Module`: save its `state_dict()`. A file may have 50,000 tensors and 500,000 dots in
their keys, and a key 1,000 characters and 50 dots. `python benchmarks/fuzz_checkpoints.py` loads 2,600 damaged files.

The file must have all of the backbone, and no block of the file may be left over. Otherwise the model stays unchanged,
and the error names the timm models that would fit. `python -m timm_coretune.checkpoint convert SOURCE FILE.safetensors`
writes the backbone to a file for plain timm:
`timm.create_model(name, num_classes=0, checkpoint_path='FILE.safetensors')`.

Shapes do not show everything. These are compared too:

- With the `config.json` of transformers or the config of open_clip: number of attention heads, activation, epsilon of
  layer norms, and where a ResNet halves the image. With timm's `config.json`: heads, activations and epsilons of the
  model that it names. A difference is an error. `--allow-differences` (`allow_differences`) loads the file with a
  warning. The default ViT of transformers has a `layer_norm_eps` of 1e-12, those of timm have 1e-6.
- The names of EfficientNet-PyTorch (`_blocks.0._bn1`) tell that a network comes from TensorFlow. Without the epsilon of
  its BatchNorms (1e-3) and its padding (`same`) a model is refused: those of timm whose names start with `tf_` have
  both.
- The size of the patches of a ViT: the patch projection is resampled as timm does, and a warning names both sizes.
- The number of position embeddings: they are resized as timm does, and a warning says so.
- The time axis of a network of video: an error, unless it surely has one frame. `--checkpoint-frames N` (`frames`)
  makes it a network of pictures: the patch projection is summed over time, the position embeddings are averaged.

## Downloads

A URL may have a login (`https://USER:PASSWORD@HOST/...`) or a signature. No message, file or card shows these
([docs/hub.md](hub.md#secrets-and-paths)). A download continues where the connection was lost, by an HTTP range, if the
server has the same version of the file and says that it sends just the missing bytes. Otherwise it starts again. After
a connection that brought nothing new it waits 1, 2, 4 and 8 seconds, or as long as the server asks but at most a
minute, and is given up at the fifth in a row. It is also given up if it takes longer than 10 minutes and one second for
each 50 kB. The next run continues it.

## Weights of a run

`--initial-checkpoint` and `load_checkpoint(..., load_classifier=True)` read the `config.json` beside the file too, if
it is of the same timm model: mean, std, size, interpolation and crop of the images become those of the run. In
`train.py` model and arguments come from it as well, and of a segmentation run from `segmentation.json`, so that

```
train.py --eval-only --model output/train/RUN --data-dir DIR
train.py --eval-only --initial-checkpoint output/train/RUN/model_best.safetensors --data-dir DIR
```

give the figures of the run. Flags win, and a line of the log says what came from where. `--pretrained-path` takes
weights only.

## What loading costs

A file of timm's own names against `timm.models.load_checkpoint`, by `OMP_NUM_THREADS=1 python benchmarks/load.py` (one
thread of an Intel Xeon with 2 cores, torch 2.14.1, timm 1.0.31, medians of 9 rounds):

| load | wall against timm | bare | CPU against timm | bare | wall, s | CPU, s | memory added, ours / timm |
|---|---|---|---|---|---|---|---|
| resnet18, safetensors | 1.27 | 1.13 | 1.27 | 1.13 | 0.014 / 0.011 | 0.014 / 0.012 | 1.00 / 1.00 |
| resnet18, pth | 0.45 |  | 0.45 |  | 0.024 / 0.052 | 0.024 / 0.052 | 1.00 / 0.99 |
| vit_base_patch16_224, safetensors | 1.39 | 1.37 | 1.39 | 1.37 | 0.107 / 0.076 | 0.107 / 0.076 | 0.22 / 1.00 |
| vit_base_patch16_224, pth | 0.34 |  | 0.34 |  | 0.109 / 0.323 | 0.109 / 0.323 | 1.00 / 0.99 |
| vit_large_patch16_224, safetensors | 1.31 | 1.37 | 1.31 | 1.37 | 0.315 / 0.249 | 0.315 / 0.249 | 0.06 / 1.00 |
| vit_large_patch16_224, pth | 0.33 |  | 0.33 |  | 0.376 / 1.152 | 0.375 / 1.147 | 1.00 / 1.00 |

The model is changed only after every value of the file was found to be finite, so a safetensors file passes through
memory once to be checked and once to be copied. timm copies only. "Bare" is a sum and a copy of each tensor with
nothing around them, so a load that checks first cannot take much less. A test counts that no tensor is checked or
copied twice.

## How this page is written

`tests/helpers/checkpoint_docs.py` writes this page from the cases of the tests. A test checks that it is up to date.

## Formats

How a format is tested with an architecture:

- layout: a file is written with the keys of the published code, and every loaded tensor equals the one written
- outputs: the timm model gives the same outputs as the model of the library that wrote the file, to 1e-5

Why this copy of the backbone is loaded:

- online: the encoder that is trained by gradients, which the authors load for their linear evaluation
- averaged: the moving average of the weights, which the authors load for their evaluation

A file of an unknown method may have two copies too. If their names tell the roles, the copy that gradients train is
loaded (`online`, `student`, `query`, or the one without such a word), not the one that follows it (`target`, `teacher`,
`momentum`, `key`, `ema`), and the report says so. Otherwise the error lists the copies. `--checkpoint-key`
(`checkpoint_key`) takes another copy.

`teacher` and `averaged` of DINOv3 are what its released files hold. BEiT and data2vec are BEiTs in timm (`beit_*`), and
ViTs in the table. State dicts of transformers are read with the names of its files and with those that version 5 has in
memory.

"""
WHY = {ONLINE: 'online', TEACHER: 'averaged', ONLY: 'the only one'}


def family(architecture):
    return next(column for start, column in FAMILIES.items() if architecture.startswith(start))


def rows():
    """Name of the format, copy, why, and the architectures of each way of testing."""
    table = {}
    for fmt in FORMATS:
        other = 'by its name' if fmt.copy == 'online encoder' else 'the only one that fits'
        why = next((rule.why for rule in RULES if rule.method == fmt.method), other)
        table[fmt.name] = (fmt.copy, WHY.get(why, why), dict.fromkeys(map(family, fmt.architectures), 'layout'))
    for name, (copy, architectures) in LIBRARIES.items():
        why = {'teacher': 'averaged', 'online encoder': 'online'}.get(copy, 'the only one')
        table[name] = (copy, why, dict.fromkeys(architectures, 'outputs'))
    return table


def page():
    lines = [f'| format | copy | why | {" | ".join(COLUMNS)} |', f'|{"---|" * (3 + len(COLUMNS))}']
    for name, (copy, why, tested) in rows().items():
        cells = (tested.get(column, '') for column in COLUMNS)
        lines.append(f'| {name} | {copy} | {why} | {" | ".join(cells)} |')
    lines += ['', '## Refused', '', '| file | why |', '|---|---|']
    lines += [f'| {refusal.what} | {refusal.why} |' for refusal in REFUSALS]
    lines += ['', '## Short names', '', "The licence is the publisher's and binds whoever uses the weights.", '']
    lines += ['| name | timm model | licence | paper | stated in |', '|---|---|---|---|---|']
    lines += [
        f'| [{name}]({r.url}) | {r.model} | {r.licence} | [{r.paper}](https://arxiv.org/abs/{r.paper}) | {r.source} |'
        for name, r in RELEASES.items()
    ]
    return HEAD + '\n'.join(lines) + '\n'


if __name__ == '__main__':
    print(page(), end='')
