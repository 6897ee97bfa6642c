"""The map of features is their principal components, and figures are shown as they were measured"""

import numpy as np
import pytest
import torch
from report_page import Page, number_in
from sklearn.decomposition import PCA

from timm_coretune.report.maps import FeatureSet, project, show_features


def test_the_map_is_that_of_scikit_learn():
    features = torch.randn(60, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)
    places, shares = project(features)
    unit = features.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    pca = PCA(2, svd_solver='full')
    expected = pca.fit_transform(unit)
    signs = np.sign((expected * places.numpy()).sum(axis=0))
    np.testing.assert_allclose(places.numpy(), expected * signs, atol=1e-9)
    assert shares == pytest.approx(pca.explained_variance_ratio_.tolist())


def test_few_images_and_equal_features_have_a_map_too():
    places, shares = project(torch.ones(4, 5))
    assert places.abs().max() < 1e-9
    assert shares == pytest.approx([0, 0], abs=1e-6)
    assert project(torch.randn(1, 5))[0].shape == (1, 2)
    assert project(torch.randn(3, 1))[0].shape == (3, 2)


def test_figures_change_and_colours_are_shown():
    labels = torch.tensor([0] * 5 + [2] * 4 + list(range(3, 14)))
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    before = dict(knn_top1=50.0, rank_me=9.0, within_class=0.5, between_class=0.25)
    after = dict(knn_top1=75.5, rank_me=4.0, within_class=0.3, between_class=0.6)
    sets = [FeatureSet('before', 'x', features, before), FeatureSet('after', 'y', features, after)]
    names = [f'<b>{i}' for i in range(14)]
    drawn = show_features(sets, labels, names, 'Looked.')
    page = Page(drawn)
    head, *rows = page.tables['figures']
    assert head == ['', 'before', 'after', 'Change']
    numbers = [[number_in(cell) for cell in row[1:]] for row in rows]
    expected = [[50, 75.5, 25.5], [0.5, 0.3, -0.2], [0.25, 0.6, 0.35], [2, 0.5, -1.5], [9, 4, -5]]
    assert numbers == [pytest.approx(row, abs=1e-9) for row in expected]
    # ten of the 13 classes that occur have a colour: those with most images, then the first
    legend = [i for i in range(14) if f'<bdi>&lt;b&gt;{i}</bdi>' in drawn]
    assert legend == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert 'The 3 classes with the fewest images are grey.' in page.sections['features']
    # each point is there once in each map: 17 in colour, 3 grey
    assert drawn.count('<use') >= 40
    assert sum('var(--muted)' in attributes.get('style', '') for tag, attributes in page.elements if tag == 'use') == 6
