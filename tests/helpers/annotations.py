"""Small data sets as annotation programs write them"""

import json

import numpy as np
from PIL import Image, ImageDraw

CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # of trainId 0, 1, ...


def save_image(path, size, seed=0):
    """An image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def compress(mask):
    """A mask as compressed RLE of pycocotools."""
    from pycocotools import mask as coco_mask

    found = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': list(found['size']), 'counts': found['counts'].decode()}


def runs_of(mask):
    """A mask as uncompressed RLE, by loops: run lengths down the columns, the first of zeros."""
    counts, value = [0], False
    for pixel in mask.T.flatten().tolist():
        if bool(pixel) != value:
            counts.append(0)
            value = bool(pixel)
        counts[-1] += 1
    return {'size': list(mask.shape), 'counts': counts}


def coco_data(size=(20, 14)):
    """Polygons, both kinds of RLE, a crowd, overlaps, category ids with gaps, and instances without pixels."""
    width, height = size
    rows, columns = np.indices((height, width))
    disc = (rows - 6) ** 2 + (columns - 9) ** 2 < 20
    stripes = (columns % 3 == 0) & (rows > 2)
    crowd = columns > 12
    annotation = dict(iscrowd=0, image_id=7, category_id=18)
    annotations = [
        {**annotation, 'segmentation': [[1, 1, 17.5, 1.5, 16, 12, 2, 11]]},
        {**annotation, 'category_id': 90, 'segmentation': [[3, 3, 8, 3, 8, 8], [10, 5, 14, 5, 12, 13, 10, 9]]},
        {**annotation, 'category_id': 3, 'segmentation': compress(disc)},
        {**annotation, 'category_id': 90, 'segmentation': runs_of(stripes & disc)},
        {**annotation, 'category_id': 3, 'segmentation': runs_of(crowd), 'iscrowd': 1},
        {**annotation, 'segmentation': []},
        {**annotation, 'segmentation': [[1, 1, 4, 4]]},
        {**annotation, 'image_id': 9, 'segmentation': [[-3, -2, 30, 5, 4, 40]]},
    ]
    for number, record in enumerate(annotations):
        record.update(id=number + 1, area=0, bbox=[0, 0, 1, 1])
    return {
        'images': [
            {'id': 7, 'file_name': 'a.jpg', 'width': width, 'height': height},
            {'id': 9, 'file_name': 'b.png', 'width': height, 'height': width},
            {'id': 4, 'file_name': 'city/c.jpg', 'width': width, 'height': height},
        ],
        'categories': [{'id': 90, 'name': 'tooth\nbrush'}, {'id': 3, 'name': 'car'}, {'id': 18, 'name': 'dog'}],
        'annotations': annotations,
    }


def write_coco(folder, name='val', size=(20, 14)):
    """The JSON file of coco_data, and its images."""
    data = coco_data(size)
    for number, record in enumerate(data['images']):
        save_image(folder / f'{name}2017' / record['file_name'], (record['width'], record['height']), number)
    return write_json(folder / f'instances_{name}2017.json', data)


def write_cityscapes(root):
    """An image of a row for each split, with all values of labelIds."""
    for split, city in (('train', 'ulm'), ('train', 'jena'), ('val', 'bonn'), ('test', 'bern')):
        stem = f'{city}_000000_000019'
        save_image(root / 'leftImg8bit' / split / city / f'{stem}_leftImg8bit.png', (34, 1))
        save_mask(root / 'gtFine' / split / city / f'{stem}_gtFine_labelIds.png', [range(34)])
        save_mask(root / 'gtFine' / split / city / f'{stem}_gtFine_instanceIds.png', [range(34)])
    return root


def write_ade20k(root, names=True):
    """An image for each split, with all values of the masks."""
    values = np.arange(151).repeat(2).reshape(2, 151)
    for number, split in enumerate(('training', 'validation')):
        save_image(root / 'images' / split / f'ADE_{number}.jpg', (151, 2))
        save_mask(root / 'annotations' / split / f'ADE_{number}.png', values)
    if names:
        rows = [f'{n}\t0.1\t9\t9\t1\tname {n}, other' for n in range(1, 151)]
        (root / 'objectInfo150.txt').write_text('\n'.join(['Idx\tRatio\tTrain\tVal\tStuff\tName', *rows]) + '\n')
    return root


def labelme_shape(label, points, kind='polygon', **more):
    return dict(label=label, points=points, group_id=None, shape_type=kind, flags={}, **more)


SHAPES = [
    labelme_shape('dog', [[1.5, 1], [12, 2.25], [10, 9], [2, 8]]),
    labelme_shape('cat', [[9, 8], [4, 3]], 'rectangle'),
    labelme_shape('dog', [[8, 6], [8, 9]], 'circle'),
    labelme_shape('__ignore__', [[14, 0], [17, 0], [17, 11]]),
    labelme_shape('cat', [[1, 1], [5, 5]], 'line'),
    labelme_shape('cat', [[1, 1]], 'point'),
]


def write_labelme(folder, stem='a', size=(18, 12), shapes=SHAPES, **more):
    save_image(folder / f'{stem}.jpg', size)
    data = dict(version='5.5.0', flags={}, shapes=shapes, imagePath=f'{stem}.jpg', imageData=None)
    data |= dict(imageHeight=size[1], imageWidth=size[0]) | more
    return write_json(folder / f'{stem}.json', data)


def draw_by_pil(size, shapes, labels):
    """Shapes drawn one by one by PIL, each on a picture of its own."""
    mask = np.zeros((size[1], size[0]), int)
    for shape in shapes:
        canvas = Image.new('1', size)
        pen, points = ImageDraw.Draw(canvas), [tuple(point) for point in shape['points']]
        if shape['shape_type'] == 'polygon':
            pen.polygon(points, fill=1, outline=1)
        elif shape['shape_type'] == 'rectangle':
            pen.rectangle([*map(min, *points), *map(max, *points)], fill=1)
        elif shape['shape_type'] == 'circle':
            (x, y), (a, b) = points
            r = ((x - a) ** 2 + (y - b) ** 2) ** 0.5
            pen.ellipse([x - r, y - r, x + r, y + r], fill=1)
        mask[np.array(canvas)] = labels[shape['label']]
    return mask
