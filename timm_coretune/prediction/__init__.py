"""Classify images with a tuned model"""

from .predictor import Prediction, Predictor

__all__ = ['Prediction', 'Predictor']
