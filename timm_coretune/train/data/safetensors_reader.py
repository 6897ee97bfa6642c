"""Images and labels from one safetensors file, read as timm reads folders and tars"""

import io
import json

import torch
from safetensors import SafetensorError, safe_open
from timm.data.readers.reader import Reader


class ReaderSafetensors(Reader):
    """Reads the split `name` of a safetensors file from its tensors `name.image` and `name.label`.

    Images are uint8 (N, H, W) or (N, H, W, 3), labels integers (N,). Names of classes, if any, are a JSON list in the
    metadata under `class_names`. An image is handed over as a PGM or PPM file in memory, which is its bytes with a line
    before them, so that everything behind a reader works as with files.

    Args:
        root: The file.
        split: Which tensors to read.

    Raises:
        ValueError: The file cannot be read, has no such split, or its tensors are of another kind.
    """

    def __init__(self, root: str, split: str):
        super().__init__()
        self.root = root
        self.split = split
        try:
            with safe_open(root, framework='pt') as f:
                metadata, keys = f.metadata() or {}, set(f.keys())
                splits = sorted({key.rpartition('.')[0] for key in keys if f'{key.rpartition(".")[0]}.label' in keys})
                if split not in splits:
                    raise ValueError(
                        f'Expected tensors {split}.image and {split}.label in {root!r}, which has the splits {splits}. '
                        'Choose with --train-split and --val-split.'
                    )
                self.image = f.get_tensor(f'{split}.image')
                self.label = f.get_tensor(f'{split}.label')
        except (OSError, SafetensorError) as e:
            raise ValueError(f'Expected a safetensors file of images and labels, could not read {root!r}: {e}') from e
        self._check()
        names = json.loads(metadata.get('class_names', 'null')) or range(int(self.label.max()) + 1)
        self.class_to_idx = {str(name): index for index, name in enumerate(names)}

    def _check(self) -> None:
        image, label = self.image, self.label
        if image.dtype != torch.uint8 or not (image.ndim == 3 or image.ndim == 4 and image.shape[-1] == 3):
            raise ValueError(
                f'Expected {self.split}.image as uint8 (N, H, W) or (N, H, W, 3), got {image.dtype} '
                f'{tuple(image.shape)} in {self.root!r}.'
            )
        if label.shape != image.shape[:1] or label.is_floating_point() or len(label) == 0:
            raise ValueError(
                f'Expected {self.split}.label as integers ({len(image)},), got {label.dtype} {tuple(label.shape)} in '
                f'{self.root!r}.'
            )

    def __getitem__(self, index: int):
        image = self.image[index]
        kind = b'P5' if image.ndim == 2 else b'P6'
        header = b'%s\n%d %d\n255\n' % (kind, image.shape[1], image.shape[0])
        return io.BytesIO(header + image.numpy().tobytes()), int(self.label[index])

    def __len__(self) -> int:
        return len(self.image)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f'{self.root}:{self.split}/{index}'
