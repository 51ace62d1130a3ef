"""Keep account of which elements of a graph's tensors are scaled by the same factor.

Each element of a tensor bears a label, the number of the factor that scales it; label 0 stands for the
factor 1. Labels are int32 arrays of the tensor's rank. Along an axis where all elements bear the same labels
the array may have size 1, so that the labels of a feature map `(n, c, h, w)` are usually `(1, c, 1, 1)`.
Operators demand that labels be equal, or 0. Such demands are collected as edges of a graph whose connected
components are the factors that can be chosen.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

PINNED = 0
"""The label of elements that keep their values."""


class Ties:
    """Collect labels and what is demanded of them.

    >>> ties = Ties()
    >>> a, b = ties.fresh((3,)), ties.fresh((3,))
    >>> ties.tie(a, b)
    >>> ties.pin(a[:1])
    >>> ties.resolve()
    array([0, 0, 1, 2, 0, 1, 2], dtype=int32)
    """

    def __init__(self) -> None:
        self._count = 1
        self._edges: list[np.ndarray] = []
        self._pinned: list[np.ndarray] = []
        self._known = np.zeros(1, bool)

    def fresh(self, shape: Sequence[int]) -> np.ndarray:
        """Return an array of labels that nothing else bears."""
        size = math.prod(shape)
        labels = np.arange(self._count, self._count + size, dtype=np.int32).reshape(shape)
        self._count += size
        self._known = np.concatenate([self._known, np.zeros(size, bool)])
        return labels

    def tie(self, one: np.ndarray, two: np.ndarray) -> None:
        """Demand that labels be equal, element by element; the arrays are broadcast."""
        one, two = np.broadcast_arrays(one, two)
        differ = one != two
        if differ.any():
            self._edges.append(np.unique(np.stack([one[differ], two[differ]]), axis=1))

    def pin(self, labels: np.ndarray) -> None:
        """Demand that the factors of these labels be 1."""
        found = np.unique(labels)
        self._known[found] = True
        self._pinned.append(found)

    def is_pinned(self, labels: np.ndarray) -> bool:
        """Tell whether all these labels are 0, or have been pinned themselves."""
        return bool(np.all((labels == PINNED) | self._known[labels]))

    def along(self, labels: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Demand that labels be equal along `axes`; return them with size 1 there."""
        for axis in axes:
            if labels.shape[axis] == 0:  # no element has any label
                sizes = (*labels.shape[:axis], 1, *labels.shape[axis:][1:])
                labels = np.full(sizes, PINNED, np.int32)
            elif labels.shape[axis] > 1:
                first = labels.take([0], axis)
                self.tie(first, labels)
                labels = first
        return labels

    def resolve(self) -> np.ndarray:
        """Return, for each label, the number of its factor: 0 where it is pinned, else from 1 on, int32."""
        zeros = [np.stack([labels, np.zeros_like(labels)]) for labels in self._pinned]
        edges = np.concatenate([*self._edges, *zeros, np.zeros((2, 0), np.int32)], axis=1)
        links = coo_array((np.ones(edges.shape[1], bool), (edges[0], edges[1])), (self._count, self._count))
        _, component = connected_components(links, directed=False)
        _, first, number = np.unique(component, return_index=True, return_inverse=True)
        order = np.argsort(
            np.argsort(first)
        )  # in the order of first labels, so that label 0 is in component 0
        return order[number].astype(np.int32)


def full(labels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return labels of size 1 along some axes in the shape of their tensor.

    >>> full(np.int32([[4], [5]]), (2, 3)).tolist()
    [[4, 4, 4], [5, 5, 5]]
    """
    return np.broadcast_to(labels, tuple(shape))


def compact(labels: np.ndarray) -> np.ndarray:
    """Return labels with size 1 along each axis where they do not change.

    >>> compact(np.int32([[4, 4, 4], [5, 5, 5]])).tolist()
    [[4], [5]]
    """
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1 and (labels == labels.take([0], axis)).all():
            labels = labels.take([0], axis)
    return labels


def widened(labels: np.ndarray, rank: int) -> np.ndarray:
    """Return labels with axes of size 1 in front, as broadcasting puts them.

    >>> widened(np.int32([4, 5]), 3).shape
    (1, 1, 2)
    """
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)
