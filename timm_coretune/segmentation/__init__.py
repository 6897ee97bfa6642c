"""Core-tuning for semantic segmentation"""
