"""Converts annotations of other programs to folders of images and masks. Nothing in their files is trusted"""
