"""Classify images with a tuned model"""

from .predictor import Prediction, Predictor
from .tuned import FineTuned

__all__ = ['FineTuned', 'Prediction', 'Predictor']
