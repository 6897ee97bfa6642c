"""Classify images with a tuned model, or write a mask for each with a model of segmentation

python -m timm_coretune.prediction MODEL IMAGES ... --output predictions.csv
accelerate launch -m timm_coretune.prediction MODEL IMAGES ... --output predictions.csv
"""

import argparse
import logging
import sys
from typing import List, Optional, Tuple

import torch
from timm.utils import setup_default_logging

from ..redaction import redacted_output
from ..segmentation.__main__ import main as predict_masks
from .classifier import is_segmentation
from .images import find_images
from .predictor import Prediction, Predictor, stack_features
from .tables import FEATURE_ENDINGS, TABLE_ENDINGS, check_ending, write_features, write_predictions

_logger = logging.getLogger(__name__)
_NUM_PRINTED = 20  # predictions that are printed where no table is asked for


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        'timm-coretune predict',
        description='Classify images. With a model of segmentation write a mask for each: '
        'python -m timm_coretune.segmentation predict --help tells its arguments.',
    )
    add = parser.add_argument
    add('model', metavar='MODEL', help='output folder of train.py, exported folder, weights, or hf-hub:OWNER/NAME')
    add('images', metavar='IMAGES', nargs='+', help='image files, folders, or lists (.txt, a path a line)')
    add('--output', metavar='FILE', help=f'table to write ({", ".join(TABLE_ENDINGS)}); without it a few are printed')
    add('--features', metavar='FILE', help=f'write the pre-logits features too ({", ".join(FEATURE_ENDINGS)})')
    add('--topk', type=int, default=5, metavar='K', help='classes an image, the best first (default: %(default)s)')
    add('-b', '--batch-size', type=int, default=64, metavar='N', help='images at once (default: %(default)s)')
    add('-j', '--workers', type=int, default=4, metavar='N', help='processes that open images (default: %(default)s)')
    add('--amp', action='store_true', help='compute in bfloat16 where that is enough')
    add('--device', help='device to compute on, such as cpu or cuda (default: a GPU if there is one)')
    return parser


def _predict(
    predictor: Predictor, images: List[str], with_features: bool
) -> Tuple[List[Prediction], Optional[torch.Tensor]]:
    """Predictions and features of all images, of which each process computes its share."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=predictor.device.type == 'cpu')
    rank, num_processes = state.process_index, state.num_processes
    own = range(rank, len(images), num_processes)
    found = predictor.iterate([images[i] for i in own], with_features, progress=state.is_main_process)
    rows = [(i, prediction, features) for i, (prediction, features) in zip(own, found, strict=True)]
    if num_processes > 1:
        rows = gather_object(rows)
    rows.sort(key=lambda row: row[0])
    features = stack_features([row for _, _, row in rows]) if with_features else None
    return [prediction for _, prediction, _ in rows], features


@redacted_output()
def main(arguments: Optional[List[str]] = None) -> None:
    """Run the command. Images that cannot be read are reported, and the rest is done; then the exit code is 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    model = next((word for word in arguments if not word.startswith('-')), None)
    setup_default_logging(default_level=logging.INFO)
    parser = create_parser()
    try:
        if model is not None and is_segmentation(model):
            predict_masks(['predict', *arguments])
            return
        args = parser.parse_args(arguments)
        for path, endings in ((args.output, TABLE_ENDINGS), (args.features, FEATURE_ENDINGS)):
            if path is not None:
                check_ending(path, endings)
        images = find_images(args.images)
        predictor = Predictor(args.model, args.device, args.batch_size, args.workers, args.amp, args.topk)
        predictions, features = _predict(predictor, images, args.features is not None)
    except ValueError as e:
        parser.error(f'{e}')
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if args.output is not None:
        write_predictions(args.output, images, predictions)
        print(f'Written: {len(images)} predictions to {args.output}')
    else:
        for image, prediction in list(zip(images, predictions, strict=True))[:_NUM_PRINTED]:
            words = zip(prediction.labels, prediction.probabilities, strict=True)
            print(f'{image}: ' + (prediction.error or ', '.join(f'{label} {100 * p:.1f} %' for label, p in words)))
        if len(images) > _NUM_PRINTED:
            print(f'... and {len(images) - _NUM_PRINTED} more. --output FILE writes all of them.')
    if features is not None:
        write_features(args.features, images, features)
        print(f'Written: features {tuple(features.shape)} to {args.features}')
    failed = [image for image, prediction in zip(images, predictions, strict=True) if prediction.error]
    if failed:
        _logger.error(f'{len(failed)} of {len(images)} images cannot be read: {", ".join(failed[:10])}')
        sys.exit(1)


if __name__ == '__main__':
    main()
