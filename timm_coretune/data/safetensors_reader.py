"""A timm reader, like those for folders and tar files, for images and labels in a safetensors file"""

import io
from typing import List, Tuple, Union

from timm.data.readers.reader import Reader

from .safetensors_images import read_split


class ReaderSafetensors(Reader):
    """Reads the split `name` of a safetensors file from its tensors `name.image` and `name.label`.

    Images are uint8 (N, H, W) or (N, H, W, 3). Labels are integers (N,), or multi-hot rows (N, C) for images with
    several labels. The names of the classes come from the metadata of the file, as a JSON list under `class_names`;
    without it the names are the class indices. Each image is handed over as a PGM or PPM file in memory: a line of
    header, then the bytes of the image. Code that uses a reader therefore works as with real files.

    Args:
        root: Path of the file.
        split: Name of the split to read.

    Raises:
        ValueError: The file cannot be read, has no such split, or its tensors have another dtype or shape.
    """

    def __init__(self, root: str, split: str):
        super().__init__()
        self.root = root
        self.split = split
        self.image, self.label, names = read_split(root, split)
        count = self.label.shape[1] if self.label.ndim == 2 else int(self.label.max()) + 1
        names = names or [str(index) for index in range(count)]
        self.class_to_idx = {name: index for index, name in enumerate(names)}

    def __getitem__(self, index: int) -> Tuple[io.BytesIO, Union[int, List[float]]]:
        image = self.image[index]
        kind = b'P5' if image.ndim == 2 else b'P6'
        header = b'%s\n%d %d\n255\n' % (kind, image.shape[1], image.shape[0])
        return io.BytesIO(header + image.numpy().tobytes()), self.label[index].tolist()

    def __len__(self) -> int:
        return len(self.image)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f'{self.root}:{self.split}/{index}'
