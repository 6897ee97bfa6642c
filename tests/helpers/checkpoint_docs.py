"""The table of docs/checkpoints.md, from the cases that the tests run

python tests/helpers/checkpoint_docs.py > docs/checkpoints.md
"""

from checkpoint_formats import FORMATS
from checkpoint_libraries import LIBRARIES

from timm_coretune.checkpoint.rules import ONLINE, ONLY, REFUSALS, RULES, TEACHER
from timm_coretune.checkpoint.source import RELEASES

FAMILIES = {'resnet': 'ResNet', 'wide_resnet': 'ResNet', 'vit': 'ViT', 'convnext': 'ConvNeXt', 'swin': 'Swin'}
COLUMNS = ('ResNet', 'ViT', 'ConvNeXt', 'Swin')

HEAD = """# Checkpoints

`load_checkpoint(model, source)`, `train.py --pretrained-path SOURCE` and
`python -m timm_coretune.checkpoint inspect SOURCE` take a file (safetensors, `.pth`, `.pth.tar`, `.pt`, `.ckpt`,
`.bin`, and `.npz` where timm reads it), a folder (of shards, of Hugging Face, or of a run),
`hf-hub:owner/name[/file][@revision]`, an `https://` URL, or a short name. A repository or folder with several files of
weights and none of a usual name is refused, and the error lists them. Code in pickles is never run. A file that needs
more than tensors and plain data is refused, and the error names what the file wanted to import.

The file must have all of the backbone, and no block of the file may be left over. Otherwise the model stays unchanged,
and the error names the timm models that would fit. `python -m timm_coretune.checkpoint convert SOURCE FILE.safetensors`
writes the backbone to a file for plain timm:
`timm.create_model(name, num_classes=0, checkpoint_path='FILE.safetensors')`.

Shapes do not show everything. These are compared too:

- With the `config.json` of transformers or the config of open_clip: number of attention heads, activation, epsilon of
  layer norms, and where a ResNet halves the image. With timm's `config.json`: heads, activations and epsilons of the
  model that it names. A difference is an error. `--allow-differences` (`allow_differences`) loads the file with a
  warning. The default ViT of transformers has a `layer_norm_eps` of 1e-12, those of timm have 1e-6.
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

## How this page is written

`tests/helpers/checkpoint_docs.py` writes this page from the cases of the tests. A test checks that it is up to date.

## Formats

How a format is tested with an architecture:

- layout: a file is written with the keys of the published code, and every loaded tensor equals the one written
- outputs: the timm model gives the same outputs as the model of the library that wrote the file, to 1e-5

Why this copy of the backbone is loaded:

- online: the encoder that is trained by gradients, which the authors load for their linear evaluation
- averaged: the moving average of the weights, which the authors load for their evaluation

"""
WHY = {ONLINE: 'online', TEACHER: 'averaged', ONLY: 'the only one'}


def family(architecture):
    return next(column for start, column in FAMILIES.items() if architecture.startswith(start))


def rows():
    """Name of the format, copy, why, and the architectures of each way of testing."""
    table = {}
    for fmt in FORMATS:
        why = next((rule.why for rule in RULES if rule.method == fmt.method), 'the only one that fits')
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
